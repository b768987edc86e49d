//! Compares docs/labels.md and docs/metrics.md with the code. To regenerate them:
//! `VIRTNODE_WRITE_DOCS=1 cargo test --locked --test it references`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use virtnode::capability::{
    Capabilities, CpuDefinition, DomainCapabilities, HostFacts, IommuKind, KvmHyperv, NodeFacts,
    Version,
};
use virtnode::daemon::Metrics;
use virtnode::domain::{DomainRef, DomainState};
use virtnode::external::NotTaken;
use virtnode::hotplug::Verdict;
use virtnode::hotplug::external::{ChangedResource, ExternalAction};
use virtnode::label::{LabelKey, LabelSet, Policy, Schema, derive, family, sources};
use virtnode::monitor::{DomainFigures, MemoryFigures, VcpuFigures};
use virtnode::units::{Bytes, Timestamp};

use crate::support::label_reference::REFERENCE;

/// Compares a document with `text`, or writes it if `VIRTNODE_WRITE_DOCS` is set.
fn compare_or_write(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("docs")
        .join(file);
    if std::env::var_os("VIRTNODE_WRITE_DOCS").is_some() {
        fs::write(path, text).unwrap();
        return;
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "docs/{file} is out of date, regenerate it with \
         VIRTNODE_WRITE_DOCS=1 cargo test --locked --test it references"
    );
}

/// The model as the captured host lists it, whose KVM gives guests fewer features than its CPU has.
const EPYC: &str = "<model usable='no' vendor='AMD' canonical='EPYC-v1'>EPYC</model>";

/// Returns the facts of a captured host with every supported feature added.
fn facts() -> NodeFacts {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0");
    let read = |file: &str| fs::read_to_string(fixtures.join(file)).unwrap();
    let document = read("dc-x86_64-q35-kvm.xml");
    let mut everything = document.clone();
    for (from, to) in [
        (
            "<sev supported='no'/>",
            "<sev supported='yes'><cbitpos>47</cbitpos><reducedPhysBits>1</reducedPhysBits>\
             <maxGuests>15</maxGuests><maxESGuests>15</maxESGuests></sev>\
             <s390-pv supported='yes'/><tdx supported='yes'/>",
        ),
        (
            "<sgx supported='no'/>",
            "<sgx supported='yes'><flc>yes</flc></sgx>",
        ),
        (
            "<launchSecurity supported='no'/>",
            "<launchSecurity supported='yes'><enum name='sectype'><value>sev-snp</value></enum></launchSecurity>",
        ),
        (
            EPYC,
            "<model usable='yes' vendor='AMD' canonical='EPYC-v1'>EPYC</model>",
        ),
    ] {
        assert!(everything.contains(from), "{from}");
        everything = everything.replace(from, to);
    }
    let foreign = read("dc-aarch64-virt-qemu.xml");
    let baseline = "<cpu mode='custom' match='exact'><model>EPYC</model><feature policy='require' name='sse4.2'/>\
                    <feature policy='require' name='x2apic'/></cpu>";
    let parsed = |text: &str| DomainCapabilities::parse("document", text.as_bytes()).unwrap();
    NodeFacts {
        libvirt_version: Some(Version::new(11, 3, 0)),
        hypervisor_version: Some(Version::new(10, 0, 2)),
        capabilities: Some(
            Capabilities::parse("capabilities", read("capabilities.xml").as_bytes()).unwrap(),
        ),
        domain_capabilities: vec![parsed(&everything), parsed(&foreign)],
        baseline_cpu: Some(CpuDefinition::parse("cpu", baseline.as_bytes()).unwrap()),
        host: Some(HostFacts {
            arch: "x86_64".to_owned(),
            kvm_max_vcpus: Some(4096),
            kvm_hyperv: Some(KvmHyperv::derive(|_| true, &[])),
            iommu: IommuKind::AmdVi,
            iommu_groups: 40,
            vfio: true,
            iommufd: true,
            nested: true,
            realtime: true,
        }),
        ..NodeFacts::default()
    }
}

fn all_labels() -> LabelSet {
    let facts = facts();
    let host_model = facts
        .primary_document()
        .and_then(|document| document.cpu.host_model.clone());
    let host_model = host_model.and_then(|host_model| host_model.model).unwrap();
    let policy = Policy {
        schema: Schema::Both,
        guest_architectures: vec!["aarch64".to_owned(), "s390x".to_owned()],
        ..Policy::default()
    };
    let mut labels = derive(&facts, &policy).labels;
    let obsolete = Policy {
        obsolete_cpu_models: Some([host_model].into()),
        ..policy
    };
    // A list of one's own replaces the default one.
    let marked = derive(&facts, &obsolete).labels.into_iter();
    labels.extend(marked.filter(|(key, _)| key.name() == "obsolete-host-model"));
    labels
}

#[test]
fn label_reference_matches_derived_labels() {
    let labels = all_labels();
    let mut examples: BTreeMap<usize, (&LabelKey, String)> = BTreeMap::new();
    for (key, value) in &labels {
        let described: Vec<usize> = (0..REFERENCE.len())
            .filter(|&at| REFERENCE[at].describes(key))
            .collect();
        assert_eq!(
            described.len(),
            1,
            "{key} matches the entries {described:?}"
        );
        examples
            .entry(described[0])
            .or_insert((key, value.to_string()));
    }
    let mut text = String::from(
        "# Labels\n\n\
         Generated from `tests/it/support/label_reference.rs` by tests/it/references.rs, which also compares it with \
         the code; do not edit.\n\n\
         A label keeps its last value while one of its sources fails. It is removed after two complete \
         probes in a row without it, but not while a running domain uses it (machine types and their \
         aliases, CPU models, features and vendor, enlightenments, `realtime`, confidential guests).\n\n\
         With the documents of KubeVirt's node-labeller (`labels.source`) the versions are those of a \
         connected launcher. While there is none, the source `versions` is not read: `eim` and the \
         version labels stay, and numbers of vCPUs keep their values; a new machine type gets the number \
         that needs no extended interrupt mode.\n",
    );
    for (schema, title) in [
        (
            Schema::Native,
            "Native (`--schema native`, the default, and `both`)",
        ),
        (
            Schema::Kubevirt,
            "KubeVirt (`--schema kubevirt` and `both`)",
        ),
    ] {
        write!(text, "\n## {title}\n\n| key | value | meaning | family | sources | example |\n| --- | --- | --- | --- | --- | --- |\n").unwrap();
        for (at, entry) in REFERENCE
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.schema == schema)
        {
            let (key, value) = examples
                .get(&at)
                .unwrap_or_else(|| panic!("no derived label for {}", entry.key));
            let sources: Vec<&str> = sources(key).iter().map(|source| source.as_str()).collect();
            writeln!(
                text,
                "| `{}` | {} | {} | {} | {} | `{key}={value}` |",
                entry.key,
                entry.value,
                entry.meaning,
                family(key),
                sources.join(", ")
            )
            .unwrap();
        }
    }
    text.push_str(
        "\n`family` and `sources` are label values of the metrics `virtnode_labels` and \
         `virtnode_probe_failures_total`. With libvirt before 9.0 the enlightenments come from KVM, which \
         requires permission to open /dev/kvm.\n",
    );
    compare_or_write("labels.md", &text);
}

/// Returns the documents for operators, with their names.
fn documents() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = vec![root.join("README.md")];
    let mut pending = vec![root.join("docs"), root.join("manifests")];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if path.is_dir() {
                pending.push(path);
            } else if matches!(extension, Some("md" | "yaml")) {
                found.push(path);
            }
        }
    }
    let read = |path: &PathBuf| {
        (
            path.display().to_string(),
            fs::read_to_string(path).unwrap(),
        )
    };
    found.iter().map(read).collect()
}

/// Returns the words of a document that have the form of a native label's key.
fn quoted_keys(text: &str) -> impl Iterator<Item = &str> {
    let is_outside = |c: char| !(c.is_ascii_alphanumeric() || "-_./".contains(c));
    text.split(is_outside).filter_map(|word| {
        let word = word.trim_end_matches(['.', '/', '-']);
        let (prefix, name) = word.split_once('/')?;
        let of_objects = ["domainhotplug.", "nodevirtualization."];
        let is_label = (prefix == "virtnode.io" || prefix.ends_with(".virtnode.io"))
            && !of_objects.iter().any(|kind| prefix.starts_with(kind))
            && !name.contains('/')
            // The group's version, and the label of a DomainHotplug.
            && !["v1alpha1", "node"].contains(&name);
        is_label.then_some(word)
    })
}

/// Labels in examples are those that a node of the fixtures publishes without any setting.
#[test]
fn labels_in_documents_are_published_by_default() {
    let facts = facts();
    let native = derive(&facts, &Policy::default()).labels;
    let both = Policy {
        schema: Schema::Both,
        ..Policy::default()
    };
    let both = derive(&facts, &both).labels;
    let value = |labels: &LabelSet, key: &str| {
        let mut all = labels.iter();
        let found = all.find(|(published, _)| published.to_string() == key);
        found.map(|(_, value)| value.to_string())
    };
    let mut wrong = Vec::new();
    let mut quoted = 0;
    for (file, text) in documents() {
        if file.ends_with("docs/labels.md") {
            for line in text.lines().filter(|line| line.starts_with("| `")) {
                let example = line.trim_end_matches(" |").rsplit('`').nth(1).unwrap();
                let (key, own) = example.split_once('=').unwrap();
                let is_setting = line.contains(".<architecture>.")
                    || key == "node-labeller.kubevirt.io/obsolete-host-model";
                if !is_setting && value(&both, key).as_deref() != Some(own) {
                    wrong.push(format!("{file}: {example}"));
                }
            }
            continue;
        }
        for key in quoted_keys(&text) {
            quoted += 1;
            if value(&native, key).is_none() {
                wrong.push(format!("{file}: {key}"));
            }
        }
        // `virtnode labels` prints keys with values.
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if let (Some(key), Some(own), None) = (words.next(), words.next(), words.next())
                && quoted_keys(key).next() == Some(key)
                && value(&native, key).is_some_and(|value| value != own)
            {
                wrong.push(format!("{file}: {line}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(quoted > 15, "{quoted}");
}

/// Maximum number of a metric label's values to list. For more, the document gives their number.
const MAX_LISTED_VALUES: usize = 14;

#[test]
fn metric_reference_matches_served_metrics() {
    let metrics = Metrics::new();
    let size = Bytes::new(1 << 30);
    metrics.inventory.replace(vec![DomainFigures {
        connection: virtnode::domain::ConnectionId::Host,
        name: "vm".to_owned(),
        namespace: None,
        virtual_machine_instance: None,
        uuid: None,
        state: DomainState::Running,
        vcpus: VcpuFigures {
            maximum: 4,
            plugged: 2,
            online: Some(1),
        },
        memory: MemoryFigures {
            maximum: size,
            requested: size,
            plugged: size,
            guest_total: Some(size),
        },
        as_of: Timestamp::from_millis(0),
    }]);
    let domain = DomainRef::on_host("web", "u");
    let not_taken = NotTaken {
        domain: domain.clone(),
        resource: ChangedResource::Vcpus,
        action: ExternalAction::Plug,
        device: None,
        verdict: Verdict::GuestRefused,
        message: String::new(),
        since: Timestamp::from_millis(0),
    };
    metrics.external.log.set_not_taken(&domain, vec![not_taken]);
    let served = metrics.registry.encode().unwrap();
    let (mut helps, mut types) = (BTreeMap::new(), BTreeMap::new());
    for line in served.lines() {
        if let Some((name, help)) = line
            .strip_prefix("# HELP ")
            .and_then(|rest| rest.split_once(' '))
        {
            helps.insert(name, help);
        } else if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.split_once(' '))
        {
            types.insert(name, kind);
        }
    }
    let mut text = String::from(
        "# Metrics\n\n\
         Generated from the served metrics by tests/it/references.rs; do not edit.\n\n\
         `:9478/metrics`, text format 0.0.4, served from memory: a scrape calls neither libvirt nor the API \
         server. Every series starts at 0, except those of a domain, which exist only while the domain \
         runs.\n\n\
         | metric | type | labels | |\n| --- | --- | --- | --- |\n",
    );
    for (name, kind) in &types {
        let mut labels: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        let of_metric = |series: &str| {
            series == *name
                || (*kind == "histogram"
                    && series
                        .strip_prefix(name)
                        .is_some_and(|end| end == "_bucket"))
        };
        for line in served.lines().filter(|line| !line.starts_with('#')) {
            let Some((_, rest)) = line.split_once('{').filter(|(series, _)| of_metric(series))
            else {
                continue;
            };
            let pairs = rest.rsplit_once('}').unwrap().0;
            for (label, value) in pairs.split(',').filter_map(|pair| pair.split_once('=')) {
                labels
                    .entry(label)
                    .or_default()
                    .insert(value.trim_matches('"'));
            }
        }
        labels.remove("le");
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, values)| match values.len() {
                _ if ["domain", "name", "namespace", "version", "commit"].contains(label) => {
                    format!("`{label}`")
                }
                1..=MAX_LISTED_VALUES => format!(
                    "`{label}`: {}",
                    values.iter().copied().collect::<Vec<_>>().join(", ")
                ),
                count => format!("`{label}` ({count} values)"),
            })
            .collect();
        writeln!(
            text,
            "| `{name}` | {kind} | {} | {} |",
            labels.join("<br>"),
            helps[name]
        )
        .unwrap();
    }
    compare_or_write("metrics.md", &text);
}
