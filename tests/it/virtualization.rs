//! The status of a `NodeVirtualization` from real and from oversized documents.

use std::fs;
use std::path::Path;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use virtnode::capability::{
    Capabilities, CpuDefinition, CpuModel, DomainCapabilities, HostFacts, IommuKind, NodeFacts,
    PolicyFeature, Usable, Version,
};
use virtnode::cluster::objects::node_virtualization::{GuestStatus, HYPERVISOR_CONNECTED, PROBED};
use virtnode::cluster::objects::{Condition, NodeVirtualization, NodeVirtualizationStatus};
use virtnode::hypervisor::ConnectionState;
use virtnode::hypervisor::DomainRef;
use virtnode::label::{CapabilitiesInUse, FactSource, RetainedLabel, RetentionReason};
use virtnode::probe::{DomainUsage, Reading, SourceFailure};
use virtnode::publish::virtualization::Snapshot;

const UP: ConnectionState = ConnectionState::Up(1);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn reading() -> Reading {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0");
    let read = |file: &str| fs::read(directory.join(file)).unwrap();
    let document = DomainCapabilities::parse("dc", &read("dc-x86_64-q35-kvm.xml")).unwrap();
    Reading {
        facts: NodeFacts {
            libvirt_version: Some(Version::new(11, 3, 0)),
            hypervisor_version: Some(Version::new(10, 0, 2)),
            capabilities: Some(Capabilities::parse("caps", &read("capabilities.xml")).unwrap()),
            domain_capabilities: vec![document],
            host: Some(HostFacts {
                arch: "x86_64".to_owned(),
                iommu: IommuKind::VtD,
                iommu_groups: 42,
                vfio: true,
                ..HostFacts::default()
            }),
            ..NodeFacts::default()
        },
        ..Reading::default()
    }
}

fn status(reading: &Reading) -> NodeVirtualizationStatus {
    Snapshot::new(reading, &[], &[], at(0)).status(&NodeVirtualizationStatus::default(), UP, at(0))
}

fn size(status: &NodeVirtualizationStatus) -> usize {
    serde_json::to_vec(status).unwrap().len()
}

#[test]
fn real_node_is_described_completely() {
    let status = status(&reading());
    println!("Debian 13: {} bytes", size(&status));
    assert_eq!(status.omitted, Vec::<String>::new());
    assert_eq!(status.architecture.as_deref(), Some("x86_64"));
    assert_eq!(status.accelerator.as_deref(), Some("kvm"));
    assert_eq!(status.versions.qemu.as_deref(), Some("10.0.2"));
    assert_eq!(status.last_probe_time, Some(at(0).into()));
    let native = &status.guests[0];
    assert_eq!(native.architecture, "x86_64");
    assert_eq!(native.domain_types, ["kvm", "qemu"]);
    let q35 = native.machines.iter().find(|m| m.name == "pc-q35-10.0");
    let q35 = q35.unwrap();
    assert_eq!(q35.aliases, ["q35"]);
    assert_eq!(q35.max_vcpus, status.max_vcpus);
    assert!(!q35.deprecated);
    assert!(native.machines.iter().any(|machine| machine.deprecated));
    // Machine types of other architectures are listed only if configured.
    assert!(status.guests.len() > 1);
    assert!(
        status.guests[1..]
            .iter()
            .all(|guest| guest.machines.is_empty())
    );
    let wanted = ["aarch64".to_owned()];
    let snapshot = Snapshot::new(&reading(), &[], &wanted, at(0)).facts;
    let foreign =
        |guest: &&GuestStatus| guest.architecture != "x86_64" && !guest.machines.is_empty();
    let foreign: Vec<_> = snapshot.guests.iter().filter(foreign).collect();
    assert_eq!(foreign.len(), 1);
    assert_eq!(foreign[0].architecture, "aarch64");
    assert!(
        foreign[0]
            .machines
            .iter()
            .any(|machine| machine.name == "virt-10.0")
    );

    let model = |name: &str| {
        let found = status.cpu.models.iter().find(|model| model.name == name);
        found.unwrap_or_else(|| panic!("no {name}")).clone()
    };
    let blocked: Vec<_> = status
        .cpu
        .models
        .iter()
        .filter(|m| !m.blockers.is_empty())
        .collect();
    assert!(!blocked.is_empty());
    assert!(blocked.iter().all(|model| model.usable == "no"));
    // An alias omits blockers that its model has.
    let alias = model("EPYC-Genoa");
    assert_eq!(alias.alias_of.as_deref(), Some("EPYC-Genoa-v1"));
    assert!(alias.blockers.is_empty());
    let usable = status
        .cpu
        .models
        .iter()
        .filter(|m| m.usable == "yes")
        .count();
    assert_eq!(status.cpu.usable_models, u32::try_from(usable).ok());
    assert_eq!(
        model("EPYC-Genoa-v1").blockers.is_empty(),
        model("EPYC-Genoa-v1").usable == "yes"
    );
    assert!(Condition::find(&status.conditions, PROBED).unwrap().holds());
}

/// Possible output of QEMU 11.1 on an old host: a third more models than QEMU 10, nearly all of them
/// with 50 % more blockers, and six more releases of machine types.
fn qemu_11() -> Reading {
    let mut reading = reading();
    let models = &mut reading.facts.domain_capabilities[0].cpu.models;
    let newer: Vec<CpuModel> = models
        .iter()
        .filter(|model| model.usable == Some(Usable::No))
        .take(models.len() / 3)
        .map(|model| CpuModel {
            name: format!("{}-v11", model.name),
            canonical: model.canonical.as_ref().map(|name| format!("{name}-v11")),
            blockers: [
                &model.blockers[..],
                &model.blockers[..model.blockers.len() / 2],
            ]
            .concat(),
            ..model.clone()
        })
        .collect();
    models.extend(newer);
    let capabilities = reading.facts.capabilities.as_mut().unwrap();
    for guest in &mut capabilities.guests {
        let newer: Vec<_> = guest.machines.iter().take(12).cloned().collect();
        guest.machines.extend(newer.into_iter().map(|mut machine| {
            machine.name.push_str("-11.1");
            machine
        }));
    }
    reading
}

#[test]
fn node_with_qemu_11_is_described_completely() {
    let status = status(&qemu_11());
    println!("QEMU 11.1: {} bytes", size(&status));
    assert!(size(&status) <= 56 * 1024);
    assert_eq!(status.omitted, Vec::<String>::new());
}

/// Larger than any real node.
fn large() -> Reading {
    let mut reading = reading();
    let features: Vec<String> = (0..70).map(|n| format!("some-feature-{n}")).collect();
    let models = (0..90).map(|n| CpuModel {
        name: format!("SomeServer-v{n}"),
        usable: Some(Usable::No),
        blockers: features.clone(),
        ..CpuModel::default()
    });
    reading.facts.domain_capabilities[0]
        .cpu
        .models
        .extend(models);
    let capabilities = reading.facts.capabilities.as_mut().unwrap();
    let guest = capabilities.guests[0].clone();
    for n in 0..30 {
        let mut other = guest.clone();
        other.arch = format!("arch{n}");
        capabilities.guests.push(other);
    }
    reading
}

#[test]
fn large_node_is_truncated_below_64_kib_and_lists_omissions() {
    let reading = large();
    let full = status(&self::reading());
    let wanted: Vec<String> = (0..30).map(|n| format!("arch{n}")).collect();
    let none = NodeVirtualizationStatus::default();
    let status = Snapshot::new(&reading, &[], &wanted, at(0)).status(&none, UP, at(0));
    println!(
        "a large one: {} bytes without {:?}",
        size(&status),
        status.omitted
    );
    assert!(size(&status) <= 56 * 1024);
    assert_eq!(status.omitted, ["foreignMachines", "blockers"]);
    // The facts that decide about placement are kept.
    assert_eq!(status.guests[0], full.guests[0]);
    assert!(status.guests.len() >= 30);
    assert_eq!(status.cpu.features, full.cpu.features);
    let usable = |status: &NodeVirtualizationStatus| -> Vec<String> {
        let usable = status.cpu.models.iter().filter(|m| m.usable == "yes");
        usable.map(|model| model.name.clone()).collect()
    };
    assert_eq!(usable(&status), usable(&full));
}

#[test]
fn oversized_node_keeps_machines_and_usable_models() {
    let mut reading = large();
    let models = &mut reading.facts.domain_capabilities[0].cpu.models;
    models.extend((0..3000).map(|n| CpuModel {
        name: format!("Unusable-{n}"),
        usable: Some(Usable::No),
        ..CpuModel::default()
    }));
    let feature = |n| PolicyFeature {
        name: format!("feature-{n}"),
        policy: None,
    };
    reading.facts.baseline_cpu = Some(CpuDefinition {
        features: (0..5000).map(feature).collect(),
        ..CpuDefinition::default()
    });
    let status = status(&reading);
    assert!(size(&status) <= 56 * 1024);
    let omitted = ["foreignMachines", "blockers", "unusableModels", "features"];
    assert_eq!(status.omitted, omitted);
    assert!(status.guests[0].machines.len() > 20);
    assert!(status.cpu.models.iter().all(|model| model.usable == "yes"));
}

#[test]
fn facts_of_failed_sources_are_kept() {
    let before = status(&reading());
    let failure = |source, message: &str| SourceFailure {
        source,
        code: "unavailable",
        message: message.to_owned(),
        is_partial: false,
    };
    let lost = Reading {
        facts: NodeFacts {
            host: Some(HostFacts::default()),
            ..NodeFacts::default()
        },
        failures: FactSource::ALL
            .into_iter()
            .filter(|source| *source != FactSource::Host)
            .map(|source| failure(source, "no connection after 7 s"))
            .collect(),
        ..Reading::default()
    };
    let snapshot = Snapshot::new(&lost, &[], &[], at(100));
    let after = snapshot.status(&before, ConnectionState::Down, at(100));
    assert_eq!(after.guests, before.guests);
    assert_eq!(after.cpu, before.cpu);
    assert_eq!(after.max_vcpus, before.max_vcpus);
    assert_eq!(after.versions, before.versions);
    assert_eq!(after.accelerator, before.accelerator);
    assert_eq!(after.last_probe_time, before.last_probe_time);
    // The source Host was read.
    assert_eq!(after.iommu.as_ref().unwrap().kind, "none");

    let probed = Condition::find(&after.conditions, PROBED).unwrap();
    assert!(!probed.holds());
    let reason = "Versions:Unavailable,Capabilities:Unavailable,DomainCapabilities:Unavailable,\
                  CpuBaseline:Unavailable,Domains:Unavailable";
    assert_eq!(probed.reason, reason);
    assert!(
        probed
            .message
            .ends_with("their facts are kept: no connection after 7 s"),
        "{}",
        probed.message
    );
    assert_eq!(probed.last_transition_time, at(100).into());
    let connected = Condition::find(&after.conditions, HYPERVISOR_CONNECTED).unwrap();
    assert!(!connected.holds());

    // The same failure with another message is not a change.
    let mut again = lost.clone();
    for failure in &mut again.failures {
        failure.message = "no connection after 8 s".to_owned();
    }
    let again =
        Snapshot::new(&again, &[], &[], at(200)).status(&after, ConnectionState::Down, at(200));
    assert_eq!(again, after);

    // All sources recover.
    let back = Snapshot::new(&reading(), &[], &[], at(300)).status(&after, UP, at(300));
    assert!(back.conditions.iter().all(Condition::holds));
    assert_eq!(back.last_probe_time, Some(at(300).into()));
    assert_eq!(back.iommu, before.iommu);
}

#[test]
fn domain_that_depends_on_labels_is_listed() {
    let mut reading = reading();
    let domain = |name: &str, machine: &str| DomainUsage {
        id: DomainRef::on_host(name, "1b4e28ba-2fa1-11d2-883f-b9a761bde3fb"),
        in_use: CapabilitiesInUse {
            machines: [machine.to_owned()].into(),
            ..CapabilitiesInUse::default()
        },
    };
    reading.domains = vec![domain("old", "pc-q35-2.4"), domain("new", "pc-q35-10.0")];
    let kept = RetainedLabel {
        key: "machine.virtnode.io/pc-q35-2.4".parse().unwrap(),
        value: "255".parse().unwrap(),
        reason: RetentionReason::DomainUsesIt,
    };
    let snapshot = Snapshot::new(&reading, &[kept], &[], at(0));
    let holds = snapshot.facts.holds;
    assert_eq!(holds.len(), 1);
    assert_eq!(holds[0].domain, "old");
    assert_eq!(holds[0].labels, ["machine.virtnode.io/pc-q35-2.4"]);
}

#[test]
fn object_of_another_version_is_parsed() {
    let newer: NodeVirtualization = serde_json::from_value(json!({
        "apiVersion": "virtnode.io/v1alpha1", "kind": "NodeVirtualization",
        "metadata": {"name": "node-a"},
        "status": {"accelerator": "new-one", "some": {"new": "part"},
            "guests": [{"architecture": "x86_64", "machines": [{"name": "q36"}]}]},
    }))
    .unwrap();
    let facts = &newer.spec.facts;
    assert_eq!(facts.accelerator.as_deref(), Some("new-one"));
    assert_eq!(facts.guests[0].machines[0].max_vcpus, None);
    let empty: NodeVirtualization = serde_json::from_value(json!({
        "apiVersion": "virtnode.io/v1alpha1", "kind": "NodeVirtualization",
        "metadata": {"name": "node-a"},
    }))
    .unwrap();
    assert_eq!(empty.spec.facts, NodeVirtualizationStatus::default());
    // Unknown fields are not written.
    let json = serde_json::to_value(&empty).unwrap();
    assert_eq!(json["status"], json!({"versions": {}, "cpu": {}}));
}

#[test]
fn each_field_has_a_description() {
    use kube::CustomResourceExt;
    fn check(path: &str, schema: &Value) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            assert!(
                field["description"].is_string(),
                "{path} has no description"
            );
            assert!(field.get("default").is_none(), "{path} has a default");
            check(&path, field);
            check(&path, &field["items"]);
        }
    }
    let crd = serde_json::to_value(NodeVirtualization::crd()).unwrap();
    let version = &crd["spec"]["versions"][0];
    let schema = &version["schema"]["openAPIV3Schema"];
    assert!(schema["properties"]["status"]["properties"]["guests"].is_object());
    check("", schema);
    let columns = version["additionalPrinterColumns"].as_array().unwrap();
    let columns: Vec<_> = columns
        .iter()
        .map(|column| column["name"].as_str().unwrap())
        .collect();
    let wanted = [
        "Node",
        "Accelerator",
        "QEMU",
        "libvirt",
        "Max-vCPUs",
        "IOMMU",
        "Models",
        "Probed",
    ];
    assert_eq!(columns, wanted);
    assert!(
        version
            .get("subresources")
            .is_none_or(|s| s.as_object().is_none_or(|s| s.is_empty()))
    );
}
