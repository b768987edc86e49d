//! Domains that a real libvirt printed, and documents that no libvirt would.

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
fn a_domain_with_everything_plugged() {
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
    let serial = Device {
        kind: "serial".to_owned(),
        alias: "serial0".to_owned(),
    };
    assert!(domain.devices.contains(&serial));
}

#[test]
fn a_domain_before_its_first_change_does_not_list_its_vcpus() {
    let domain = parse(fixture!("q35-fresh.xml")).unwrap();
    assert_eq!(domain.vcpus.plugged_ids().to_string(), "0");
    assert_eq!((domain.vcpus.fixed(), domain.vcpus.free()), (1, 3));
    assert_eq!(domain.memory.asked(), mib(512));
}

#[test]
fn a_dimm_is_part_of_the_total() {
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
fn a_domain_that_cannot_grow() {
    let domain = parse(fixture!("q35-plain.xml")).unwrap();
    assert_eq!((domain.memory.maximum, domain.memory.slots), (None, 0));
    assert_eq!(domain.memory.boot, mib(512));
    assert_eq!(domain.agent, AgentChannel::Disconnected);
}

#[test]
fn the_statistics_of_a_real_domain() {
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
fn what_is_left_out_has_libvirts_meaning() {
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
fn a_malformed_known_value_is_an_error_with_its_path() {
    for (inner, error) in [
        (SMALL.to_owned(), "vm: /domain: has no <name>"),
        ("<name>x</name>".to_owned(), "vm: /domain: has no <memory>"),
        (
            format!("<name>x</name>{SMALL}<vcpu current='5'>4</vcpu>"),
            "vm: /domain: has 5 vCPUs of 4 at most",
        ),
        (
            format!("<name>x</name>{SMALL}<vcpu>many</vcpu>"),
            "vm: /domain/vcpu: 'many' is no number of vCPUs",
        ),
        (
            format!("<name>x</name>{SMALL}<vcpu>4000000000</vcpu>"),
            "vm: /domain/vcpu: 4000000000 vCPUs are more than there can be",
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
            "vm: /domain/memory: 99 EiB are more than there can be",
        ),
        (
            format!(
                "<name>x</name>{SMALL}<devices><memory model='dimm'><target>\
                 <size unit='MiB'>2</size></target></memory></devices>"
            ),
            "vm: /domain: has 1MiB of memory, and devices of 2MiB in it",
        ),
    ] {
        assert_eq!(
            parse(&format!("<domain>{inner}</domain>")).unwrap_err(),
            error
        );
    }
}

#[test]
fn names_are_kept_as_they_are() {
    let domain = parse(&format!(
        "<domain><name>a&lt;b&quot;/&#10;c</name>{SMALL}</domain>"
    ));
    assert_eq!(domain.unwrap().name, "a<b\"/\nc");
}

proptest! {
    /// A real document, cut off or with a piece replaced, is read or refused.
    #[test]
    fn no_document_panics(at in 0..PLUGGED.len(), len in 0_usize..40, with in "[<>/a-z0-9'= -]{0,20}") {
        let bytes = PLUGGED.as_bytes();
        let end = (at + len).min(bytes.len());
        let mut changed = bytes[..at].to_vec();
        changed.extend(with.bytes());
        changed.extend(&bytes[end..]);
        drop(Domain::parse("vm", &changed, DomainState::Running));
        drop(Domain::parse("vm", &bytes[..at], DomainState::Running));
    }

    /// Any numbers at all.
    #[test]
    fn no_number_panics(size: u64, requested: u64, cell: u64, maximum: u64, current: u32, vcpus: u32) {
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
