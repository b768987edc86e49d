//! Rules that no local libvirt can confirm: other versions, KVM, other architectures.

use rstest::rstest;

use super::*;
use crate::capability::{
    CpuModel, CpuModes, Eim, HostModel, PlainMode, PolicyFeature, Section, TscCounter, Usable,
    VcpuMax,
};
use crate::compat::{OfferedHostCpu, OfferedMachine, OfferedTsc};
use crate::compat::{RuleCode, Stage};
use crate::units::Bytes;

/// Returns a node with KVM, all of whose properties are known.
fn node() -> Offer {
    let machine = |max| OfferedMachine {
        max_vcpus: VcpuMax::AtMost(max),
        deprecated: false,
    };
    let model = |name: &str, usable, blockers: &[&str]| CpuModel {
        name: name.to_owned(),
        usable: Some(usable),
        vendor: Some("AMD".to_owned()),
        canonical: Some(format!("{name}-v1")),
        deprecated: name == "Opteron_G1",
        blockers: blockers.iter().map(|name| (*name).to_owned()).collect(),
    };
    Offer {
        arch: Some("x86_64".to_owned()),
        native_arch: Some("x86_64".to_owned()),
        virt_type: Some("kvm".to_owned()),
        virt_types: Some(vec!["qemu".to_owned(), "kvm".to_owned()]),
        libvirt_version: Some(Version::new(11, 3, 0)),
        qemu_version: Some(Version::new(10, 0, 2)),
        emulator: Some("/usr/bin/qemu-system-x86_64".to_owned()),
        machines: Some(
            [
                ("pc-q35-10.0".to_owned(), machine(4096)),
                ("pc-i440fx-10.0".to_owned(), machine(255)),
                (
                    "pc-q35-2.8".to_owned(),
                    OfferedMachine {
                        deprecated: true,
                        ..machine(288)
                    },
                ),
                ("virt-10.0".to_owned(), machine(512)),
                ("pseries-10.0".to_owned(), machine(4096)),
            ]
            .into(),
        ),
        aliases: [
            ("q35", "pc-q35-10.0"),
            ("pc", "pc-i440fx-10.0"),
            ("virt", "virt-10.0"),
        ]
        .map(|(alias, name)| (alias.to_owned(), name.to_owned()))
        .into(),
        accelerator_max: VcpuMax::AtMost(1024),
        eim: Some(Eim::Auto),
        gic_versions: Some(vec!["2".to_owned(), "3".to_owned()]),
        cpu: Some(CpuModes {
            host_passthrough: Some(PlainMode {
                supported: true,
                migratable: true,
            }),
            maximum: None,
            host_model: Some(HostModel {
                supported: true,
                vendor: Some("AMD".to_owned()),
                features: vec![PolicyFeature {
                    name: "x2apic".to_owned(),
                    policy: Some("require".to_owned()),
                }],
                ..HostModel::default()
            }),
            custom: Some(true),
            models: vec![
                model("EPYC", Usable::Yes, &[]),
                model("EPYC-Genoa", Usable::No, &["avx512f", "vaes"]),
                model("Opteron_G1", Usable::Yes, &[]),
            ],
        }),
        cpu_features: Some(["sse4.2", "x2apic"].map(str::to_owned).into()),
        enlightenments: Some(
            ["spinlocks", "vendor_id", "vpindex"]
                .map(str::to_owned)
                .into(),
        ),
        os: Some(Section {
            supported: Some(true),
            ..Section::default()
        }),
        memory_sources: Some(vec!["memfd".to_owned()]),
        launch_security: Some(vec!["sev".to_owned()]),
        memory: Some(Bytes::new(64 << 30)),
        pages: Some([(Bytes::new(4096), 1 << 24), (Bytes::new(2 << 20), 512)].into()),
        vfio: Some(false),
        iommufd: Some(false),
        described_machine: Some("pc-q35-10.0".to_owned()),
        host_cpu: Some(OfferedHostCpu {
            model: "EPYC".to_owned(),
            features: ["aes", "x2apic"].map(str::to_owned).into(),
        }),
        host_cpus: Some("0-3".parse().unwrap()),
        host_nodes: Some("0".parse().unwrap()),
        physical_address_bits: Some(48),
        tsc: OfferedTsc::Measured(TscCounter {
            frequency_hz: 2_596_120_000,
            scaling: Some(false),
        }),
        ..Offer::default()
    }
}

fn domain(machine: &str, vcpu: &str, rest: &str) -> Requirement {
    of_arch("kvm", "x86_64", machine, vcpu, rest)
}

fn of_arch(virt_type: &str, arch: &str, machine: &str, vcpu: &str, rest: &str) -> Requirement {
    let xml = format!(
        "<domain type='{virt_type}'><name>d</name><memory unit='MiB'>512</memory>{vcpu}<os>\
         <type arch='{arch}' machine='{machine}'>hvm</type></os>{rest}</domain>"
    );
    Requirement::parse("d", xml.as_bytes()).unwrap()
}

/// Returns the answer and the codes of blocking and unknown findings.
fn found(domain: &Requirement, node: &Offer) -> (Feasibility, Vec<RuleCode>) {
    let assessment = assess(domain, node);
    let serious = assessment
        .findings
        .iter()
        .filter(|f| f.severity <= RuleSeverity::Unknown);
    (
        assessment.answer,
        serious.map(|finding| finding.code).collect(),
    )
}

use Feasibility::{Feasible, Infeasible, Unknown};

const ONE: &str = "<vcpu>1</vcpu>";

#[rstest]
#[case("q35", "<vcpu>1024</vcpu>", Feasible, &[])]
#[case("q35", "<vcpu current='2'>1025</vcpu>", Infeasible, &[RuleCode::VcpusKvm])]
#[case("pc", "<vcpu>255</vcpu>", Feasible, &[])]
#[case("pc", "<vcpu current='1'>256</vcpu>", Infeasible, &[RuleCode::VcpusMachine, RuleCode::VcpusQ35])]
#[case("pc-q35-2.8", "<vcpu>288</vcpu>", Feasible, &[])]
#[case("pc-q35-2.8", "<vcpu>289</vcpu>", Infeasible, &[RuleCode::VcpusMachine])]
#[case("pc-q35-4.0", ONE, Infeasible, &[RuleCode::Machine])]
#[case("q35", "<vcpu>0</vcpu>", Infeasible, &[RuleCode::Vcpus])]
#[case("q35", "<vcpu current='3'>2</vcpu>", Infeasible, &[RuleCode::Vcpus])]
#[case("q35", "<vcpu>18446744073709551615</vcpu>", Infeasible, &[RuleCode::VcpusMachine, RuleCode::VcpusKvm])]
fn vcpus_are_limited_by_machine_type_kvm_and_q35(
    #[case] machine: &str,
    #[case] vcpu: &str,
    #[case] answer: Feasibility,
    #[case] codes: &[RuleCode],
) {
    let found = found(&domain(machine, vcpu, ""), &node());
    assert_eq!(found, (answer, codes.to_vec()));
}

#[test]
fn unknown_property_of_node_yields_unknown() {
    let nothing = Offer::default();
    let (answer, codes) = found(&domain("q35", "<vcpu>300</vcpu>", ""), &nothing);
    assert_eq!(answer, Unknown);
    assert_eq!(
        codes,
        [RuleCode::Machine, RuleCode::VcpusKvm, RuleCode::Eim]
    );
    let without_kvm = Offer {
        accelerator_max: VcpuMax::Unknown,
        ..node()
    };
    let ask = |vcpu| found(&domain("q35", vcpu, ""), &without_kvm).0;
    assert_eq!(ask("<vcpu>255</vcpu>"), Feasible);
    assert_eq!(ask("<vcpu>256</vcpu>"), Unknown);
    let without_cpus = Offer {
        cpu: None,
        ..node()
    };
    let model = "<cpu><model>EPYC</model></cpu>";
    assert_eq!(found(&domain("q35", ONE, model), &without_cpus).0, Unknown);
    // A blocking finding outweighs an unknown one.
    let (answer, _) = found(&domain("pc", "<vcpu>256</vcpu>", model), &without_cpus);
    assert_eq!(answer, Infeasible);
}

#[rstest]
// 5 sockets of 33 cores: 6 bits per core, so the last socket begins at 256.
#[case(5, 33, 1, 165, 288)]
#[case(4, 64, 1, 256, 255)]
#[case(1, 3, 2, 6, 5)]
#[case(3, 3, 1, 9, 10)]
#[case(165, 1, 1, 165, 164)]
fn apic_ids_have_a_bit_field_for_each_level(
    #[case] sockets: u32,
    #[case] cores: u32,
    #[case] threads: u32,
    #[case] vcpus: u64,
    #[case] highest: u128,
) {
    let topology = crate::domain::VcpuTopology {
        sockets,
        cores,
        threads,
        ..Default::default()
    };
    assert_eq!(topology.product(), u128::from(vcpus));
    assert_eq!(topology.highest_apic_id(vcpus), Some(highest));
}

#[test]
fn holes_in_apic_ids_yield_warning() {
    let cpu = "<cpu><topology sockets='5' cores='33' threads='1'/></cpu>";
    let assessment = assess(&domain("q35", "<vcpu>165</vcpu>", cpu), &node());
    assert_eq!(assessment.answer, Feasible);
    let warned = assessment
        .findings
        .iter()
        .find(|f| f.code == RuleCode::ApicId)
        .unwrap();
    assert_eq!(warned.severity, RuleSeverity::Warning);
    assert!(
        warned.message.contains("the last of 165 vCPUs has 288"),
        "{}",
        warned.message
    );
}

#[rstest]
#[case("qemu", "", "<vcpu>8</vcpu>", Feasible)]
#[case("qemu", "", "<vcpu current='1'>9</vcpu>", Infeasible)]
#[case(
    "qemu",
    "<features><gic version='3'/></features>",
    "<vcpu>9</vcpu>",
    Feasible
)]
#[case("kvm", "", "<vcpu>9</vcpu>", Feasible)]
#[case(
    "kvm",
    "<features><gic version='2'/></features>",
    "<vcpu>9</vcpu>",
    Infeasible
)]
fn gic_version_2_limits_vcpus_to_8(
    #[case] virt_type: &str,
    #[case] rest: &str,
    #[case] vcpu: &str,
    #[case] answer: Feasibility,
) {
    let domain = of_arch(virt_type, "aarch64", "virt", vcpu, rest);
    assert_eq!(found(&domain, &node()).0, answer);
}

/// Measured with 11.3 and 12.8; NEWS of 12.2.0 describes the earlier behavior.
#[rstest]
#[case("9.0.0", Infeasible)]
#[case("11.3.0", Infeasible)]
#[case("12.1.0", Infeasible)]
#[case("12.2.0", Unknown)]
#[case("12.8.0", Feasible)]
fn iommu_without_eim_with_256_vcpus_depends_on_libvirt(
    #[case] libvirt: &str,
    #[case] answer: Feasibility,
) {
    let node = Offer {
        libvirt_version: Some(libvirt.parse().unwrap()),
        ..node()
    };
    for iommu in [
        "<iommu model='intel'><driver intremap='on' eim='off'/></iommu>",
        "<iommu model='virtio'/>",
    ] {
        let rest = format!(
            "<features><acpi/><ioapic driver='qemu'/></features><devices>{iommu}</devices>"
        );
        let domain = domain("q35", "<vcpu>300</vcpu>", &rest);
        assert_eq!(found(&domain, &node).0, answer, "{iommu}");
        let said = assess(&domain, &node);
        let eim = said.findings.iter().find(|f| f.code == RuleCode::Eim);
        assert!(eim.unwrap().remedy.is_some(), "{iommu}");
    }
}

#[rstest]
#[case("11.3.0", Infeasible, Some("No PCI buses available"))]
#[case("11.4.0", Unknown, None)]
#[case("11.9.0", Feasible, Some("supports PCI but no PCI controller added"))]
fn machine_type_without_pci_depends_on_libvirt(
    #[case] libvirt: &str,
    #[case] answer: Feasibility,
    #[case] words: Option<&str>,
) {
    let mut node = Offer {
        libvirt_version: Some(libvirt.parse().unwrap()),
        ..node()
    };
    let machine = OfferedMachine {
        max_vcpus: VcpuMax::AtMost(288),
        deprecated: false,
    };
    node.machines
        .as_mut()
        .unwrap()
        .insert("microvm".to_owned(), machine);
    assert_eq!(found(&domain("microvm", ONE, ""), &node).0, answer);
    // The message for a machine type that does not exist.
    let strange = assess(&domain("nonsense", ONE, ""), &node);
    assert_eq!(strange.answer, Infeasible);
    let said = strange
        .findings
        .iter()
        .find(|f| f.code == RuleCode::Machine);
    let said = said.unwrap().words.as_deref();
    assert_eq!(said.is_some(), words.is_some(), "{said:?}");
    assert!(words.is_none_or(|words| said.unwrap().contains(words)));
}

#[test]
fn host_with_only_gic_version_2_blocks_9_vcpus() {
    let old = Offer {
        gic_versions: Some(vec!["2".to_owned()]),
        ..node()
    };
    let domain = of_arch("kvm", "aarch64", "virt", "<vcpu>9</vcpu>", "");
    assert_eq!(found(&domain, &old), (Infeasible, vec![RuleCode::Gic]));
}

#[test]
fn pseries_with_partial_core_is_infeasible() {
    let cpu = "<cpu><topology sockets='1' cores='2' threads='4'/></cpu>";
    let ask = |vcpu| {
        found(
            &of_arch("kvm", "ppc64le", "pseries-10.0", vcpu, cpu),
            &node(),
        )
        .0
    };
    assert_eq!(ask("<vcpu current='4'>8</vcpu>"), Feasible);
    assert_eq!(ask("<vcpu current='3'>8</vcpu>"), Infeasible);
}

#[rstest]
#[case("<cpu><model>EPYC</model></cpu>", Feasible, &[])]
#[case("<cpu><model>EPYC-Genoa</model></cpu>", Infeasible, &[RuleCode::CpuModel])]
#[case("<cpu check='none'><model>EPYC-Genoa</model></cpu>", Feasible, &[])]
#[case("<cpu check='full'><model>EPYC</model></cpu>", Unknown, &[RuleCode::CpuModel])]
#[case("<cpu><model>Strange</model></cpu>", Unknown, &[RuleCode::CpuModel])]
#[case("<cpu><model fallback='forbid'>Strange</model></cpu>", Infeasible, &[RuleCode::CpuModel])]
#[case("<cpu><model>EPYC</model><vendor>Intel</vendor></cpu>", Feasible, &[])]
#[case("<cpu><model>EPYC</model><vendor>Intel</vendor><feature policy='require' name='sse4.2'/></cpu>", Infeasible, &[RuleCode::CpuVendor])]
#[case("<cpu check='none'><model>EPYC-Genoa</model><vendor>Intel</vendor></cpu>", Feasible, &[])]
#[case("<cpu><model>EPYC</model><feature policy='require' name='sse4.2'/></cpu>", Feasible, &[])]
#[case("<cpu><model>EPYC</model><feature policy='require' name='amx'/></cpu>", Infeasible, &[RuleCode::CpuFeature, RuleCode::CpuFeature])]
#[case("<cpu><model>EPYC</model><feature policy='optional' name='amx'/></cpu>", Unknown, &[RuleCode::CpuFeature])]
#[case("<cpu mode='host-model'/>", Feasible, &[])]
#[case("<cpu mode='host-passthrough'/>", Feasible, &[])]
#[case("<cpu mode='maximum'/>", Infeasible, &[RuleCode::CpuMode])]
fn cpu_mode_model_and_features_decide(
    #[case] cpu: &str,
    #[case] answer: Feasibility,
    #[case] codes: &[RuleCode],
) {
    assert_eq!(
        found(&domain("q35", ONE, cpu), &node()),
        (answer, codes.to_vec())
    );
}

#[test]
fn unusable_model_lists_its_missing_features() {
    let assessment = assess(
        &domain("q35", ONE, "<cpu><model>EPYC-Genoa</model></cpu>"),
        &node(),
    );
    let finding = assessment.blocking().next().unwrap();
    assert!(
        finding.message.ends_with("missing are avx512f, vaes"),
        "{}",
        finding.message
    );
    assert!(
        finding
            .remedy
            .as_deref()
            .unwrap()
            .ends_with("usable here: EPYC"),
        "{finding:?}"
    );
    assert_eq!(finding.stage, Some(Stage::Start));
}

#[test]
fn full_check_of_running_domain_is_feasible() {
    let xml = "<domain type='kvm' id='3'><name>d</name><memory>524288</memory><vcpu>1</vcpu><os>\
               <type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>\
               <cpu mode='custom' match='exact' check='full'><model fallback='forbid'>EPYC</model>\
               <feature policy='require' name='x2apic'/></cpu></domain>";
    let domain = Requirement::parse("d", xml.as_bytes()).unwrap();
    assert_eq!(found(&domain, &node()).0, Feasible);
}

/// With libvirt's list, with KVM's list for an old libvirt, and without a list.
#[rstest]
#[case("kvm", "<vpindex state='on'/><relaxed state='on'/>", Some(&["spinlocks", "vpindex"][..]), Feasible)]
#[case("kvm", "<vpindex state='on'/><synic state='on'/>", Some(&["spinlocks", "vpindex"][..]), Infeasible)]
#[case("kvm", "<synic state='off'/><vendor_id state='on' value='x'/>", Some(&["spinlocks"][..]), Feasible)]
#[case("kvm", "<synic state='on'/>", Some(&["synic"][..]), Feasible)]
#[case("kvm", "<evmcs state='on'/>", Some(&["synic"][..]), Unknown)]
#[case("kvm", "<evmcs state='on'/>", None, Unknown)]
#[case("kvm", "<nonsense state='on'/>", None, Infeasible)]
#[case("kvm", "<of_tomorrow state='on'/>", Some(&["spinlocks", "of_tomorrow"][..]), Feasible)]
#[case("qemu", "<synic state='on'/>", Some(&["spinlocks"][..]), Feasible)]
fn enlightenment_depends_on_list_and_accelerator(
    #[case] virt_type: &str,
    #[case] wanted: &str,
    #[case] listed: Option<&[&str]>,
    #[case] answer: Feasibility,
) {
    let node = Offer {
        enlightenments: listed.map(|names| names.iter().map(|&name| name.to_owned()).collect()),
        ..node()
    };
    let features = format!("<features><hyperv mode='custom'>{wanted}</hyperv></features>");
    let (is, codes) = found(&of_arch(virt_type, "x86_64", "q35", ONE, &features), &node);
    let blamed = answer != Feasible;
    assert_eq!(
        (is, codes),
        (answer, vec![RuleCode::Enlightenment; usize::from(blamed)])
    );
}

#[test]
fn missing_list_of_machine_types_yields_unknown() {
    for machines in [None, Some(std::collections::BTreeMap::new())] {
        let node = Offer { machines, ..node() };
        let found = found(&domain("pc-q35-10.0", ONE, ""), &node);
        assert_eq!(found, (Unknown, vec![RuleCode::Machine]));
    }
}

#[test]
fn devices_security_and_backing_depend_on_node() {
    let ask = |rest: &str| found(&domain("q35", ONE, rest), &node());
    let device = "<devices><hostdev mode='subsystem' type='pci'/></devices>";
    assert_eq!(ask(device), (Infeasible, vec![RuleCode::HostDevice]));
    assert_eq!(ask("<launchSecurity type='sev'/>").0, Feasible);
    assert_eq!(
        ask("<launchSecurity type='tdx'/>"),
        (Infeasible, vec![RuleCode::LaunchSecurity])
    );
    let pages = "<memoryBacking><hugepages/></memoryBacking>";
    assert_eq!(ask(pages).0, Feasible); // 256 of 512 pages
    let few = Offer {
        pages: Some([(Bytes::new(4096), 9), (Bytes::new(2 << 20), 255)].into()),
        ..node()
    };
    // More may be reserved before the start.
    let answer = found(&domain("q35", ONE, pages), &few);
    assert_eq!(answer, (Unknown, vec![RuleCode::MemoryBacking]));
    let file = "<memoryBacking><source type='file'/></memoryBacking>";
    assert_eq!(ask(file), (Infeasible, vec![RuleCode::MemoryBacking]));
    let raw = "<qemu:commandline xmlns:qemu='x'><qemu:arg value='-x'/></qemu:commandline>";
    assert_eq!(ask(raw), (Unknown, vec![RuleCode::RawArguments]));
}

#[test]
fn more_memory_than_node_yields_unknown() {
    let xml = "<domain type='kvm'><name>d</name><memory unit='TiB'>1</memory><os>\
               <type arch='x86_64' machine='q35'>hvm</type></os></domain>";
    let domain = Requirement::parse("d", xml.as_bytes()).unwrap();
    assert_eq!(found(&domain, &node()), (Unknown, vec![RuleCode::Memory]));
}

#[test]
fn headroom_lists_pluggable_resources() {
    let xml = "<domain type='kvm'><name>d</name>
  <maxMemory slots='4' unit='GiB'>8</maxMemory><memory unit='GiB'>4</memory>
  <vcpu current='2'>8</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
  <cpu><numa><cell id='0' cpus='0-7' memory='1' unit='GiB'/></numa></cpu>
  <devices>
    <controller type='pci' index='1' model='pcie-root-port'>
      <address type='pci' bus='0x00' slot='0x01' function='0x0'/></controller>
    <controller type='pci' index='2' model='pcie-root-port'>
      <address type='pci' bus='0x00' slot='0x01' function='0x1'/></controller>
    <interface type='user'><address type='pci' bus='0x01' slot='0x00' function='0x0'/></interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memory model='dimm'><target><size unit='GiB'>1</size><node>0</node></target></memory>
    <memory model='virtio-mem'><target><size unit='GiB'>2</size><node>0</node>
      <block unit='MiB'>2</block><requested unit='MiB'>512</requested></target></memory>
  </devices></domain>";
    let domain = Requirement::parse("d", xml.as_bytes()).unwrap();
    let assessment = assess(&domain, &node());
    assert_eq!(assessment.answer, Feasible, "{assessment:#?}");
    let room = assessment.headroom.unwrap();
    assert_eq!((room.vcpus.plugged, room.vcpus.maximum), (2, 8));
    assert_eq!(room.vcpus.pluggable.to_string(), "2-7");
    assert_eq!(room.memory.virtio_mem, Bytes::new(1536 << 20));
    assert_eq!(room.memory.for_devices, Bytes::new(4 << 30));
    assert_eq!(room.memory.free_slots, 3);
    assert_eq!(room.free_root_ports, Some(1));
    assert_eq!(room.hints, Vec::<String>::new());
}

#[test]
fn without_acpi_no_vcpu_can_be_plugged() {
    let room = assess(&domain("q35", "<vcpu current='1'>2</vcpu>", ""), &node())
        .headroom
        .unwrap();
    assert!(room.vcpus.pluggable.is_empty());
    assert!(room.hints[0].contains("<acpi/>"), "{:?}", room.hints);
}
