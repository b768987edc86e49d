//! Captured domains of a real libvirt, and malformed documents.

use proptest::prelude::*;

use super::*;
use crate::units::Bytes;

macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!(
            "../../tests/lab/captured/debian12-backports-libvirt-11.3.0-qemu-10.0/domain-",
            $name
        ))
    };
}

const PLUGGED: &str = fixture!("q35-plugged.xml");

fn parse(xml: &str) -> Result<Domain, String> {
    Domain::parse("vm", xml.as_bytes(), DomainState::Running).map_err(|error| error.to_string())
}

fn mib(mib: u64) -> Bytes {
    Bytes::from_mib(mib).unwrap()
}

#[test]
fn plugged_domain_is_read_completely() {
    let domain = parse(PLUGGED).unwrap();
    assert_eq!((domain.name.as_str(), domain.id), ("p1", Some(67)));
    assert_eq!(domain.machine.as_deref(), Some("pc-q35-10.0"));
    assert_eq!((domain.virt_type.as_str(), domain.acpi), ("qemu", true));
    assert_eq!(domain.cpu.model.as_deref(), Some("qemu64"));
    assert_eq!(domain.cpu.topology.unwrap().sockets, 4);
    assert_eq!(domain.vcpu_granularity(), 1);

    let vcpus = &domain.vcpus;
    assert_eq!((vcpus.maximum, vcpus.plugged()), (4, 3));
    assert_eq!(vcpus.plugged_ids().to_string(), "0-2");
    assert_eq!((vcpus.fixed(), vcpus.free()), (1, 1));
    assert_eq!(vcpus.each[2].order, Some(3));

    let memory = &domain.memory;
    assert_eq!(
        (memory.boot, memory.maximum, memory.slots),
        (mib(512), Some(mib(4096)), 4)
    );
    assert_eq!((memory.asked(), memory.plugged()), (mib(1024), mib(1024)));
    assert_eq!(memory.balloon, Some(mib(1024)));
    assert_eq!(memory.cells[0].cpus.to_string(), "0-3");
    let device = memory.device("ua-mem0").unwrap();
    assert_eq!(device.model, MemoryModel::VirtioMem);
    assert_eq!((device.size, device.block), (mib(2048), Some(mib(2))));
    assert_eq!((device.node, device.slot), (Some(0), None));

    assert_eq!(domain.agent, AgentChannel::Connected);
    assert_eq!(
        domain.balloon,
        Balloon {
            present: true,
            stats_period: Some(1)
        }
    );
    let serial = AliasedDevice {
        kind: "serial".to_owned(),
        alias: "serial0".to_owned(),
    };
    assert!(domain.devices.contains(&serial));
}

#[test]
fn domain_without_vcpus_element_has_current_plugged_and_rest_free() {
    let domain = parse(fixture!("q35-fresh.xml")).unwrap();
    assert_eq!(domain.vcpus.plugged_ids().to_string(), "0");
    assert_eq!((domain.vcpus.fixed(), domain.vcpus.free()), (1, 3));
    assert_eq!(domain.memory.asked(), mib(512));
}

#[test]
fn dimm_is_part_of_total_memory() {
    let domain = parse(fixture!("q35-dimm.xml")).unwrap();
    let dimm = domain.memory.dimms().next().unwrap();
    assert_eq!(
        (dimm.size, dimm.slot, dimm.node),
        (mib(512), Some(0), Some(0))
    );
    assert_eq!(
        (domain.memory.boot, domain.memory.plugged()),
        (mib(512), mib(1024))
    );
}

#[test]
fn domain_without_max_memory_has_no_room() {
    let domain = parse(fixture!("q35-plain.xml")).unwrap();
    assert_eq!((domain.memory.maximum, domain.memory.slots), (None, 0));
    assert_eq!(domain.memory.boot, mib(512));
    assert_eq!(domain.agent, AgentChannel::Disconnected);
}

#[test]
fn captured_statistics_are_parsed() {
    let text = fixture!("q35-plugged.stats");
    let stats = Stats::from_parameters(text.lines().filter_map(|line| {
        let (name, value) = line.trim().split_once('=')?;
        Some((name, value.parse().ok()?))
    }));
    assert_eq!(stats.vcpus.len(), 3);
    assert_eq!(stats.vcpus[&2].time, Some(310_000_000));
    assert_eq!(stats.balloon.total, Some(Bytes::new(938_512 << 10)));
}

const SMALL: &str = "<memory unit='KiB'>1024</memory>";

#[test]
fn missing_elements_take_libvirts_defaults() {
    let domain = parse(&format!("<domain><name>x</name>{SMALL}</domain>")).unwrap();
    assert_eq!(
        (domain.vcpus.maximum, domain.id, domain.acpi),
        (0, None, false)
    );
    let domain = parse(&format!(
        "<domain><name>x</name>{SMALL}<vcpu>4</vcpu></domain>"
    ))
    .unwrap();
    assert_eq!(domain.vcpus.plugged(), 4);
    let pseries = format!(
        "<domain><name>x</name>{SMALL}<os><type machine='pseries-9.2'/></os>\
         <cpu><topology sockets='1' cores='2' threads='8'/></cpu></domain>"
    );
    assert_eq!(parse(&pseries).unwrap().vcpu_granularity(), 8);
    let huge = format!(
        "<domain><name>x</name>{SMALL}<memoryBacking><hugepages/></memoryBacking></domain>"
    );
    assert!(parse(&huge).unwrap().memory.huge_pages);
}

#[test]
fn malformed_known_value_is_an_error_with_its_path() {
    for (inner, error) in [
        (SMALL.to_owned(), "vm: /domain: has no <name>"),
        ("<name>x</name>".to_owned(), "vm: /domain: has no <memory>"),
        (
            format!("<name>x</name>{SMALL}<vcpu current='5'>4</vcpu>"),
            "vm: /domain: has 5 vCPUs at start, more than its maximum of 4",
        ),
        (
            format!("<name>x</name>{SMALL}<vcpu>many</vcpu>"),
            "vm: /domain/vcpu: 'many' is not a valid number of vCPUs",
        ),
        (
            format!("<name>x</name>{SMALL}<vcpu>4000000000</vcpu>"),
            "vm: /domain: has 4000000000 vCPUs, more than the limit of 65536",
        ),
        (
            format!("<name>x</name>{SMALL}<vcpu>1</vcpu><vcpus><vcpu id='7'/></vcpus>"),
            "vm: /domain: has a vCPU whose number is not below the maximum of 1",
        ),
        (
            "<name>x</name><memory unit='stone'>1</memory>".to_owned(),
            "vm: /domain/memory: has an unknown unit of size",
        ),
        (
            "<name>x</name><memory unit='EiB'>99</memory>".to_owned(),
            "vm: /domain/memory: 99 EiB exceed the largest size",
        ),
        (
            format!(
                "<name>x</name>{SMALL}<devices><memory model='dimm'><target>\
                 <size unit='MiB'>2</size></target></memory></devices>"
            ),
            "vm: /domain: has 1MiB of memory, which is less than its memory devices of 2MiB",
        ),
    ] {
        assert_eq!(
            parse(&format!("<domain>{inner}</domain>")).unwrap_err(),
            error
        );
    }
}

#[test]
fn name_with_markup_and_line_break_is_kept() {
    let domain = parse(&format!(
        "<domain><name>a&lt;b&quot;/&#10;c</name>{SMALL}</domain>"
    ));
    assert_eq!(domain.unwrap().name, "a<b\"/\nc");
}

/// Tenants write `<metadata>`; [`crate::xml::MAX_DEPTH`] bounds everything else.
#[test]
fn deeply_nested_metadata_is_skipped() {
    let deep = |element: &str| {
        let (open, close) = ("<t:a>".repeat(70), "</t:a>".repeat(70));
        format!(
            "<domain><name>x</name><{element}>{open}text{close}</{element}><metadata/>{SMALL}\
             <vcpu>2</vcpu></domain>"
        )
    };
    assert_eq!(parse(&deep("metadata")).unwrap().vcpus.maximum, 2);
    let error = parse(&deep("sysinfo")).unwrap_err();
    assert!(
        error.ends_with("is nested deeper than 64 elements"),
        "{error}"
    );
    let unclosed = parse("<domain><metadata><a></metadata></domain>").unwrap_err();
    assert!(
        unclosed.contains("/domain/metadata: is not well-formed"),
        "{unclosed}"
    );
}

/// Journal version 1 holds this form.
#[test]
fn journal_form_of_a_domain_is_stable() {
    let json = serde_json::to_value(parse(PLUGGED).unwrap()).unwrap();
    let keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
    assert_eq!(
        keys,
        [
            "acpi", "agent", "arch", "balloon", "cpu", "devices", "id", "machine", "memory",
            "name", "state", "uuid", "vcpus", "virtType"
        ]
    );
    let read: Domain = serde_json::from_value(json).unwrap();
    assert_eq!(read, parse(PLUGGED).unwrap());
}

proptest! {
    #[test]
    fn damaged_document_does_not_panic(at in 0..PLUGGED.len(), len in 0_usize..40, with in "[<>/a-z0-9'= -]{0,20}") {
        let bytes = PLUGGED.as_bytes();
        let end = (at + len).min(bytes.len());
        let mut changed = bytes[..at].to_vec();
        changed.extend(with.bytes());
        changed.extend(&bytes[end..]);
        drop(Domain::parse("vm", &changed, DomainState::Running));
        drop(Domain::parse("vm", &bytes[..at], DomainState::Running));
    }

    #[test]
    fn arbitrary_numbers_do_not_panic(size: u64, requested: u64, cell: u64, maximum: u64, current: u32, vcpus: u32) {
        let xml = format!(
            "<domain><name>x</name><maxMemory slots='{current}'>{maximum}</maxMemory>\
             <memory>{size}</memory><vcpu current='{current}'>{vcpus}</vcpu>\
             <cpu><numa><cell cpus='0-{vcpus}' memory='{cell}'/></numa></cpu><devices>\
             <memory model='virtio-mem'><target><size>{size}</size>\
             <requested>{requested}</requested><current>{requested}</current></target></memory>\
             </devices></domain>"
        );
        if let Ok(domain) = parse(&xml) {
            prop_assert!(domain.memory.asked() >= domain.memory.boot);
            prop_assert!(domain.vcpus.plugged() <= domain.vcpus.maximum);
        }
    }
}
