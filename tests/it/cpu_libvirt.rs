//! `virtnode baseline` and `virtnode compare` against a real libvirt: hypervisor-cpu-compare and
//! hypervisor-cpu-baseline about captured hosts, and guests with the proposed CPUs.
//!
//! The files `features-*.xml` beside the captured documents are libvirt's expansion of their host models:
//! what hypervisor-cpu-baseline prints on those hosts.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use virtnode::capability::{Capabilities, CpuDefinition, DomainCapabilities, NodeFacts, Version};
use virtnode::cluster::objects::NodeVirtualizationStatus;
use virtnode::hypervisor::ConnectionState;
use virtnode::probe::Reading;
use virtnode::publish::virtualization::Snapshot;

use crate::support::libvirtd::Libvirtd;
use crate::targets::virtnode;

const CAPTURED: [(&str, &str); 9] = [
    ("debian-sid-libvirt-12.8.0-qemu-11.1", "x86_64-q35-qemu"),
    ("debian12-libvirt-9.0.0-qemu-7.2", "x86_64-pc-kvm"),
    ("debian12-libvirt-9.0.0-qemu-7.2", "x86_64-pc-qemu"),
    ("debian12-libvirt-9.0.0-qemu-7.2", "x86_64-q35-kvm"),
    ("debian12-libvirt-9.0.0-qemu-7.2", "x86_64-q35-qemu"),
    ("debian13-libvirt-11.3.0-qemu-10.0", "x86_64-pc-kvm"),
    ("debian13-libvirt-11.3.0-qemu-10.0", "x86_64-pc-qemu"),
    ("debian13-libvirt-11.3.0-qemu-10.0", "x86_64-q35-kvm"),
    ("debian13-libvirt-11.3.0-qemu-10.0", "x86_64-q35-qemu"),
];
const LOCAL: &str = "local";

/// A host: its name, its NodeVirtualization, and the `<cpu>` of its host model.
struct Host {
    name: String,
    object: Value,
    cpu: String,
}

impl Host {
    /// Describes a host as its daemon does. The accelerator is this one, to compare it with others.
    fn new(name: &str, document: &str, features: &str, accelerator: &str) -> Self {
        let document = DomainCapabilities::parse("dc", document.as_bytes()).unwrap();
        let cpu = document
            .cpu
            .host_model
            .as_ref()
            .and_then(|it| it.to_cpu_xml());
        let capabilities = format!(
            "<capabilities><host><cpu><arch>x86_64</arch></cpu></host><guest><os_type>hvm</os_type>\
             <arch name='x86_64'><wordsize>64</wordsize><domain type='{}'/></arch></guest>\
             </capabilities>",
            document.virt_type.as_deref().unwrap()
        );
        let reading = Reading {
            facts: NodeFacts {
                libvirt_version: Some(Version::new(11, 3, 0)),
                hypervisor_version: Some(Version::new(10, 0, 2)),
                capabilities: Some(Capabilities::parse("caps", capabilities.as_bytes()).unwrap()),
                domain_capabilities: vec![document],
                baseline_cpu: Some(CpuDefinition::parse("cpu", features.as_bytes()).unwrap()),
                ..NodeFacts::default()
            },
            ..Reading::default()
        };
        let at = Timestamp::from_second(0).unwrap();
        let before = NodeVirtualizationStatus::default();
        let mut status =
            Snapshot::new(&reading, &[], &[], at).status(&before, ConnectionState::Up(1), at);
        assert!(!status.cpu.features.is_empty() && !status.cpu.models.is_empty());
        status.accelerator = Some(accelerator.to_owned());
        Self {
            name: name.to_owned(),
            object: json!({
                "kind": "NodeVirtualization", "metadata": {"name": name}, "status": status,
            }),
            cpu: cpu.unwrap(),
        }
    }

    fn captured(accelerator: &str) -> Vec<Self> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let read = |folder: &str, kind: &str, name: &str| {
            fs::read_to_string(directory.join(folder).join(format!("{kind}-{name}.xml"))).unwrap()
        };
        let hosts = CAPTURED.iter().map(|(folder, name)| {
            Self::new(
                &format!("{}-{name}", &folder[..8]),
                &read(folder, "dc", name),
                &read(folder, "features", name),
                accelerator,
            )
        });
        hosts.collect()
    }

    /// Describes the host of a real libvirt for one domain type.
    fn local(libvirtd: &Libvirtd, virt_type: &str) -> anyhow::Result<Self> {
        let query = ["--virttype", virt_type, "--machine", "q35"];
        let document = libvirtd.virsh(&[&["domcapabilities"], &query[..]].concat())?;
        let file = file(libvirtd, &document);
        let path = file.path().to_string_lossy().into_owned();
        let baseline = ["hypervisor-cpu-baseline", &path, "--features"];
        let features = libvirtd.virsh(&[&baseline[..], &query[..]].concat())?;
        Ok(Self::new(LOCAL, &document, &features, "tcg"))
    }
}

/// Returns a file that a libvirt in another root can read too.
fn file(libvirtd: &Libvirtd, content: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(libvirtd.directory()).unwrap();
    fs::write(file.path(), content).unwrap();
    file
}

/// Runs virtnode with these hosts and returns its JSON.
fn ask(hosts: &[&Host], arguments: &[&str]) -> Value {
    let items: Vec<&Value> = hosts.iter().map(|host| &host.object).collect();
    let list = json!({"kind": "List", "items": items}).to_string();
    let arguments = [arguments, &["--output", "json", "--nodes", "-"]].concat();
    let (_, out, err) = virtnode(&arguments, &list);
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {err}"))
}

fn names(list: &Value) -> BTreeSet<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .map(|item| item.as_str().or(item["name"].as_str()).unwrap().to_owned())
        .collect()
}

/// Returns the `<cpu>` of a proposal.
fn definition(proposal: &Value) -> String {
    let list = |policy: &str| -> String {
        names(&proposal[policy])
            .iter()
            .map(|name| format!("<feature policy='{policy}' name='{name}'/>"))
            .collect()
    };
    format!(
        "<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>{}</model>{}{}</cpu>",
        proposal["model"].as_str().unwrap(),
        list("require"),
        list("disable"),
    )
}

/// Returns the best proposal and the alternatives.
fn proposals(answer: &Value) -> Vec<Value> {
    let alternatives = answer["alternatives"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    answer
        .get("best")
        .cloned()
        .into_iter()
        .chain(alternatives)
        .collect()
}

fn required_in(xml: &str) -> BTreeSet<String> {
    let cpu = CpuDefinition::parse("cpu", xml.as_bytes()).unwrap();
    let required = cpu.features.into_iter();
    required
        .filter(|feature| feature.policy.as_deref() == Some("require"))
        .map(|feature| feature.name)
        .collect()
}

#[test]
fn libvirt_compares_every_captured_host_with_the_same_result() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let local = Host::local(&libvirtd, "qemu")?;
    let mut compared = 0;
    for host in Host::captured("tcg").iter().chain([&local]) {
        let file = file(&libvirtd, &host.cpu);
        let path = file.path().to_string_lossy().into_owned();
        let query = ["--virttype", "qemu", "--machine", "q35"];
        let compare = ["hypervisor-cpu-compare", &path, "--error"];
        let (words, missing) = match libvirtd.virsh(&[&compare[..], &query[..]].concat()) {
            Ok(words) => (words, BTreeSet::new()),
            Err(error) => {
                let error = error.to_string();
                let error = error.split("libvirtd's log").next().unwrap_or_default();
                // An older libvirt does not know all models and features of newer hosts.
                if error.contains("nknown CPU") {
                    continue;
                }
                let list = error
                    .split_once("required features: ")
                    .unwrap_or_else(|| panic!("{error}"));
                let list = list.1.trim().split(',');
                (
                    "incompatible".to_owned(),
                    list.map(|name| name.trim().to_owned()).collect(),
                )
            }
        };
        let answer = match host.name.as_str() {
            LOCAL => ask(&[&local], &["compare", LOCAL, LOCAL]),
            name => ask(&[host, &local], &["compare", name, LOCAL]),
        };
        let direction = &answer["directions"][0];
        let own = direction["answer"].as_str().unwrap();
        assert!(
            words.contains(own),
            "{}: {own}, libvirt: {words}",
            host.name
        );
        assert_eq!(names(&direction["missing"]), missing, "{}", host.name);
        compared += 1;
    }
    assert!(compared > 3, "{compared}");
    Ok(())
}

#[test]
fn libvirt_finds_the_same_common_features_for_every_pair() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let local = Host::local(&libvirtd, "qemu")?;
    let hosts = Host::captured("tcg");
    let mut compared = 0;
    for (at, first) in hosts.iter().enumerate() {
        for second in &hosts[at..] {
            let pair = format!("{} and {}", first.name, second.name);
            let file = file(&libvirtd, &format!("{}{}", first.cpu, second.cpu));
            let path = file.path().to_string_lossy().into_owned();
            let baseline = ["hypervisor-cpu-baseline", &path, "--features"];
            let query = ["--virttype", "qemu", "--machine", "q35"];
            let baseline = match libvirtd.virsh(&[&baseline[..], &query[..]].concat()) {
                Ok(baseline) => baseline,
                Err(error) if error.to_string().contains("nknown CPU") => continue,
                Err(error) => return Err(error),
            };
            let mut required = required_in(&baseline);
            required.remove("invtsc");
            // libvirt also cuts by what the QEMU at hand supports, of which its host model names a part.
            let common = names(&ask(&[first, second], &["baseline"])["common"]);
            assert!(required.is_subset(&common), "{pair}: {required:?}");
            let cut = names(&ask(&[first, second, &local], &["baseline"])["common"]);
            assert!(cut.is_subset(&required), "{pair}: {cut:?}");
            compared += 1;
        }
    }
    assert!(compared > 5, "{compared}");
    Ok(())
}

/// Starts guests with every CPU proposed for this host and each other one, and this host alone.
fn start_all(libvirtd: &Libvirtd, virt_type: &str) -> anyhow::Result<()> {
    let mut local = Host::local(libvirtd, virt_type)?;
    let start = |cpu: &str| {
        libvirtd.start_and_end(&format!(
            "<domain type='{virt_type}'><name>proposed</name><memory unit='MiB'>32</memory>\
             <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
             <features><acpi/><apic/></features>{cpu}</domain>"
        ))
    };
    // With QEMU 10.0 on some AMD hosts not even libvirt's own host model starts: KVM reports
    // arch-capabilities, whose register it does not accept.
    if let Err(error) = start("<cpu mode='host-model'/>") {
        assert!(error.contains("failed to set MSR 0x10a"), "{error}");
        let features = local.object["status"]["cpu"]["features"].as_array_mut();
        let of_register = [
            "arch-capabilities",
            "rdctl-no",
            "skip-l1dfl-vmentry",
            "mds-no",
            "pschange-mc-no",
            "gds-no",
            "rfds-no",
        ];
        let has = |name: &Value| of_register.iter().any(|it| name == it);
        features
            .into_iter()
            .for_each(|list| list.retain(|name| !has(name)));
    }
    let hosts = Host::captured("tcg");
    let mut definitions = BTreeSet::new();
    for host in hosts.iter().chain([&local]) {
        let answer = match host.name.as_str() {
            LOCAL => ask(&[&local], &["baseline"]),
            _ => ask(&[&local, host], &["baseline"]),
        };
        for proposal in proposals(&answer) {
            definitions.insert(definition(&proposal));
        }
    }
    assert!(definitions.len() > 5, "{definitions:?}");
    for cpu in definitions {
        let started = start(&cpu);
        assert_eq!(started, Ok(()), "{virt_type}: {cpu}");
    }
    Ok(())
}

#[test]
fn libvirt_starts_a_guest_with_every_proposed_cpu() -> anyhow::Result<()> {
    start_all(&Libvirtd::start()?, "qemu")
}

#[test]
fn kvm_starts_a_guest_with_every_proposed_cpu() -> anyhow::Result<()> {
    match Libvirtd::start_with_kvm()? {
        Some(libvirtd) => start_all(&libvirtd, "kvm"),
        None => Ok(()),
    }
}

/// The table of models agrees with the libvirt at hand: a usable model alone has the features of the
/// model, whatever else the host has.
#[test]
fn models_have_the_features_of_the_table() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let local = Host::local(&libvirtd, "qemu")?;
    let models = local.object["status"]["cpu"]["models"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let usable = models.iter().filter(|model| model["usable"] == "yes");
    let mut compared = 0;
    for name in usable.filter_map(|model| model["name"].as_str()) {
        let file = file(&libvirtd, &format!("<cpu><model>{name}</model></cpu>"));
        let path = file.path().to_string_lossy().into_owned();
        let query = ["--features", "--virttype", "qemu", "--machine", "q35"];
        let expanded =
            libvirtd.virsh(&[&["hypervisor-cpu-baseline", &path], &query[..]].concat())?;
        let expanded = required_in(&expanded);
        // A node with nothing but this model and its features needs no feature beyond the model.
        let mut object = local.object.clone();
        object["status"]["cpu"]["models"] = json!([{"name": name, "usable": "yes"}]);
        object["status"]["cpu"]["features"] = json!(expanded);
        let cpu = String::new();
        let host = Host {
            name: LOCAL.to_owned(),
            object,
            cpu,
        };
        let answer = ask(&[&host], &["baseline"]);
        let best = &answer["best"];
        assert_eq!(best["require"], json!([]), "{name}");
        assert_eq!(best["features"], expanded.len(), "{name}: {best:#}");
        compared += 1;
    }
    assert!(compared > 10, "{compared}");
    Ok(())
}
