//! Provokes each x86 error message of libvirt and QEMU that a user may meet, and checks that
//! `virtnode check` predicts it with a remedy.
//!
//! Two of QEMU's messages are missing, because no kernel since 4.7 provokes them: "current -smp configuration
//! requires kernel irqchip and X2APIC API support." and "eim=on requires support on the KVM side".

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use virtnode::capability::{Capabilities, DomainCapabilities, Eim, NodeFacts, Version};
use virtnode::compat::{Feasibility, Offer, Requirement, RuleCode, RuleFinding, assess};

use crate::support::libvirtd::Libvirtd;

const DEBIAN_13: &str = "tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0";

/// The way to provoke a message.
enum Provoked<'a> {
    /// libvirt rejects the definition.
    Define,
    /// libvirt rejects the start, or QEMU exits.
    Start,
    /// QEMU itself is started with these arguments, because libvirt rejects the definition earlier
    /// or lacks the element. `-accel kvm` needs a usable /dev/kvm.
    Qemu(&'a [&'a str]),
}
use Provoked::{Define, Qemu, Start};

/// Domain, message, way to provoke it, part of the remedy.
type Row<'a> = (Domain, &'a str, Provoked<'a>, &'a str);

#[derive(Default, Clone, Copy)]
struct Domain {
    virt_type: Option<&'static str>,
    machine: &'static str,
    vcpu: &'static str,
    features: &'static str,
    cpu: &'static str,
    devices: &'static str,
    /// Properties of the node.
    libvirt: Option<Version>,
    eim: Option<Eim>,
}

impl Domain {
    fn xml(self) -> String {
        format!(
            "<domain type='{}'><name>provoked</name><memory unit='MiB'>64</memory>{}<os>\
             <type arch='x86_64' machine='{}'>hvm</type></os><features>{}</features>{}\
             <devices>{}</devices></domain>",
            self.virt_type.unwrap_or("qemu"),
            self.vcpu,
            self.machine,
            self.features,
            self.cpu,
            self.devices
        )
    }
}

const NONE: &str = "<controller type='usb' model='none'/><memballoon model='none'/>";
const D: Domain = Domain {
    virt_type: None,
    machine: "q35",
    vcpu: "<vcpu>2</vcpu>",
    features: "",
    cpu: "",
    devices: "",
    libvirt: None,
    eim: None,
};

#[rustfmt::skip]
fn rows() -> Vec<Row<'static>> {
    vec![
        // machine limit
        (Domain { vcpu: "<vcpu>4097</vcpu>", ..D },
            "unsupported configuration: Maximum CPUs greater than specified machine type limit 4096", Define, "lower <vcpu> to 4096"),
        (Domain { machine: "pc", vcpu: "<vcpu current='1'>256</vcpu>", ..D },
            "unsupported configuration: Maximum CPUs greater than specified machine type limit 255", Define, "use pc-q35-"),
        // not q35
        (Domain { machine: "microvm", vcpu: "<vcpu current='1'>256</vcpu>", devices: NONE, ..D },
            "unsupported configuration: more than 255 vCPUs are only supported on q35-based machine types", Define, "use machine type q35"),
        // no EIM
        (Domain { vcpu: "<vcpu current='1'>256</vcpu>", devices: "<iommu model='intel'><driver intremap='on' eim='off'/></iommu>", ..D },
            "unsupported configuration: more than 255 vCPUs require extended interrupt mode enabled on the iommu device", Define, "eim='on'"),
        (Domain { vcpu: "<vcpu current='1'>256</vcpu>", devices: "<iommu model='virtio'/>", ..D },
            "unsupported configuration: more than 255 vCPUs require extended interrupt mode enabled on the iommu device", Define, "eim='on'"),
        // topology
        (Domain { vcpu: "<vcpu current='1'>8</vcpu>", cpu: "<cpu><topology sockets='2' cores='2' threads='1'/></cpu>", ..D },
            "unsupported configuration: CPU topology doesn't match maximum vcpu count", Define, "set <vcpu> to 4"),
        (Domain { vcpu: "<vcpu current='3'>2</vcpu>", ..D },
            "unsupported configuration: maximum vCPU count must not be less than current vCPU count", Define, "raise <vcpu> to 3"),
        // remapping without a split I/O APIC
        (Domain { features: "<ioapic driver='kvm'/>", devices: "<iommu model='intel'><driver intremap='on'/></iommu>", ..D },
            "unsupported configuration: IOMMU interrupt remapping requires split I/O APIC (ioapic driver='qemu')", Define, "<ioapic driver='qemu'/>"),
        (Domain { features: "<ioapic driver='kvm'/>", vcpu: "<vcpu current='1'>300</vcpu>", ..D },
            "unsupported configuration: IOMMU interrupt remapping requires split I/O APIC (ioapic driver='qemu')", Define, "<ioapic driver='qemu'/>"),
        // EIM without remapping
        (Domain { devices: "<iommu model='intel'><driver eim='on'/></iommu>", ..D },
            "unsupported configuration: IOMMU eim requires interrupt remapping to be enabled", Define, "intremap='on'"),
        (Domain { devices: "<iommu model='intel'><driver intremap='off' eim='on'/></iommu>", ..D },
            "eim=on cannot be selected without intremap=on", Qemu(&["-accel", "tcg", "-M", "q35", "-device", "intel-iommu,intremap=off,eim=on"]), "intremap='on'"),
        // IOMMU and machine
        (Domain { machine: "pc", devices: "<iommu model='intel'/>", ..D },
            "unsupported configuration: IOMMU device: 'intel' is only supported with Q35 machines", Define, "q35"),
        (Domain { machine: "pc", devices: "<iommu model='virtio'/>", ..D },
            "unsupported configuration: IOMMU device: 'virtio' is only supported with Q35 and ARM Virt machines", Define, "q35"),
        // KVM, at the start
        (Domain { virt_type: Some("kvm"), vcpu: "<vcpu>2000</vcpu>", ..D },
            "Number of SMP cpus requested (2000) exceeds the maximum cpus supported by KVM (1024)", Qemu(&["-accel", "kvm", "-M", "q35", "-smp", "2000"]), "lower <vcpu> to 1024"),
        (Domain { virt_type: Some("kvm"), vcpu: "<vcpu current='1'>2000</vcpu>", ..D },
            "Number of hotpluggable cpus requested (2000) exceeds the maximum cpus supported by KVM (1024)", Qemu(&["-accel", "kvm", "-M", "q35", "-smp", "1,maxcpus=2000"]), "lower <vcpu> to 1024"),
        // QEMU's machine, for which libvirt has its own words
        (Domain { vcpu: "<vcpu current='1'>5000</vcpu>", ..D },
            "Invalid SMP CPUs 5000. The max CPUs supported by machine", Qemu(&["-accel", "tcg", "-M", "q35", "-smp", "1,maxcpus=5000"]), "lower <vcpu>"),
        // APIC IDs
        (Domain { vcpu: "<vcpu>257</vcpu>", ..D },
            "APIC ID 255 requires x2APIC feature in CPU", Start, "x2apic"),
        (Domain { vcpu: "<vcpu current='133'>165</vcpu>", cpu: "<cpu><topology sockets='5' cores='33' threads='1'/></cpu>", ..D },
            "APIC ID 256 requires x2APIC feature in CPU", Start, "x2apic"),
        // amd-iommu: libvirt 12.2 lets it carry them, with xtsup
        (Domain { virt_type: Some("kvm"), vcpu: "<vcpu current='1'>300</vcpu>", devices: "<iommu model='amd'><driver xtsup='off'/></iommu>", libvirt: Some(Version::new(12, 2, 0)), ..D },
            "AMD IOMMU with x2APIC configuration requires xtsup=on", Qemu(&["-accel", "kvm", "-M", "q35,kernel_irqchip=split", "-smp", "1,maxcpus=300", "-device", "amd-iommu,intremap=on"]), "xtsup='on'"),
        (Domain { devices: "<iommu model='amd'/>", ..D },
            "XML error: Invalid value for attribute 'model' in element 'iommu': 'amd'.", Define, "model='intel'"),
        // topology that QEMU does not have
        (Domain { vcpu: "<vcpu>4</vcpu>", cpu: "<cpu><topology sockets='2' clusters='2' cores='1' threads='1'/></cpu>", ..D },
            "clusters > 1 not supported by this machine's CPU topology", Start, "dies or cores"),
        // CPU
        (Domain { cpu: "<cpu mode='host-passthrough'/>", ..D },
            "unsupported configuration: CPU mode 'host-passthrough' for x86_64 qemu domain on x86_64 host is not supported by hypervisor", Start, "maximum"),
        (Domain { cpu: "<cpu mode='custom' check='partial'><model>qemu64</model><feature policy='require' name='avx512f'/></cpu>", ..D },
            "Host CPU does not provide required features: avx512f", Start, "optional"),
        (Domain { cpu: "<cpu mode='custom' check='partial'><model>qemu64</model><feature policy='forbid' name='sse2'/></cpu>", ..D },
            "the CPU is incompatible with host CPU: Host CPU provides forbidden features: sse2", Start, "disable"),
        (Domain { cpu: "<cpu mode='custom' check='full'><model>qemu64</model><feature policy='require' name='avx512f'/></cpu>", ..D },
            "missing features: avx512f", Start, "optional"),
        (Domain { cpu: "<cpu mode='custom'><model fallback='forbid'>Nonsense</model></cpu>", ..D },
            "internal error: Unknown CPU model Nonsense", Start, "host-model"),
        (Domain { features: "<hyperv mode='custom'><nonsense state='on'/></hyperv>", ..D },
            "unsupported configuration: unsupported HyperV Enlightenment feature: nonsense", Define, "spelling"),
        // machine and domain type
        (Domain { machine: "pc-q35-99.0", ..D },
            "does not support machine type 'pc-q35-99.0'", Define, "q35"),
        (Domain { machine: "pc-q35", ..D }, "XML error: No PCI buses available", Define, "q35"),
        (Domain { machine: "pcx", ..D }, "XML error: No PCI buses available", Define, "q35"),
        (Domain { machine: "isapc", vcpu: "<vcpu>1</vcpu>", ..D },
            "XML error: No PCI buses available", Define, "model='none'"),
        (Domain { virt_type: Some("xen"), ..D },
            "does not support virt type 'xen'", Define, "domain type"),
    ]
}

/// Returns the facts of Debian 13's documents, with the libvirt version of the row.
fn facts_of_files(domain: &Domain) -> NodeFacts {
    let read = |name: &str| std::fs::read(format!("{DEBIAN_13}/{name}")).unwrap();
    let capabilities = Capabilities::parse("capabilities", &read("capabilities.xml"));
    let documents = ["dc-x86_64-q35-kvm.xml", "dc-x86_64-q35-qemu.xml"]
        .map(|name| DomainCapabilities::parse(name, &read(name)).unwrap());
    NodeFacts {
        libvirt_version: Some(domain.libvirt.unwrap_or(Version::new(11, 3, 0))),
        hypervisor_version: Some(Version::new(10, 0, 2)),
        capabilities: Some(capabilities.unwrap()),
        domain_capabilities: documents.to_vec(),
        eim: domain.eim,
        kvm_max_vcpus: Some(1024),
        ..NodeFacts::default()
    }
}

#[test]
fn every_error_message_is_predicted_with_a_remedy() {
    let libvirtd = Libvirtd::start().unwrap();
    let mut not_provoked = Vec::new();
    for (domain, words, provoked, remedy) in rows() {
        let xml = domain.xml();
        let actual = match provoked {
            Define => libvirtd.define(&xml).expect_err(words),
            Start => libvirtd.start_and_end(&xml).expect_err(words),
            Qemu(arguments) if arguments.contains(&"kvm") && !can_use_kvm() => {
                not_provoked.push(words);
                words.to_owned()
            }
            Qemu(arguments) => qemu(arguments),
        };
        // KVM's limit may differ on this machine.
        let constant = words
            .split_once(" (1024)")
            .map_or(words, |(before, _)| before);
        assert!(
            actual.contains(constant),
            "{xml}\nexpected: {words}\nactual: {actual}"
        );

        let mut facts = facts_of_files(&domain);
        let requirement = Requirement::parse("row", xml.as_bytes()).unwrap();
        let mut offer =
            Offer::from_facts(&facts, Some("x86_64"), domain.virt_type.or(Some("qemu")));
        // The features of an emulated CPU without AVX-512.
        offer.cpu_features = Some(["sse2".to_owned()].into());
        facts.eim = domain.eim;
        let assessment = assess(&requirement, &offer);
        assert_eq!(
            assessment.answer,
            Feasibility::Infeasible,
            "{xml}\n{assessment:#?}"
        );
        let predicts = |finding: &&RuleFinding| {
            let has = finding
                .words
                .as_deref()
                .is_some_and(|own| own.contains(words));
            // libvirt's message precedes QEMU's.
            let is_preceded = words.starts_with("eim=on") || words.starts_with("Invalid SMP");
            (has || is_preceded)
                && finding
                    .remedy
                    .as_deref()
                    .is_some_and(|r| r.contains(remedy))
        };
        assert!(
            assessment.blocking().any(|finding| predicts(&finding)),
            "{words}\n{xml}\n{assessment:#?}"
        );
    }
    if !not_provoked.is_empty() {
        println!("predicted, but not provoked without a usable /dev/kvm: {not_provoked:#?}");
    }
}

/// libvirt's list for software emulation has none of them, but it rejects none either.
#[test]
fn enlightenments_with_software_emulation_are_feasible() {
    let libvirtd = Libvirtd::start().unwrap();
    let domain = Domain {
        features: "<hyperv mode='custom'><relaxed state='on'/><vpindex state='on'/>\
                   <synic state='on'/><spinlocks state='on' retries='8191'/></hyperv>",
        ..D
    };
    let xml = domain.xml();
    libvirtd.start_and_end(&xml).unwrap();
    let offer = Offer::from_facts(&facts_of_files(&domain), Some("x86_64"), Some("qemu"));
    assert_eq!(offer.enlightens("synic"), Some(false));
    let assessment = assess(&Requirement::parse("d", xml.as_bytes()).unwrap(), &offer);
    assert_eq!(assessment.answer, Feasibility::Feasible, "{assessment:#?}");
    let mut findings = assessment.findings.iter();
    let warning = findings.find(|finding| finding.code == RuleCode::Enlightenment);
    assert!(
        warning
            .unwrap()
            .message
            .ends_with("does not see vpindex, synic"),
        "{warning:?}"
    );
}

/// Versions that this machine does not have.
#[test]
fn libvirt_before_10_10_does_not_add_an_iommu() {
    let domain = Domain {
        virt_type: Some("kvm"),
        vcpu: "<vcpu current='4'>256</vcpu>",
        ..D
    };
    let explicit = Domain {
        features: "<ioapic driver='qemu'/>",
        devices: "<iommu model='intel'><driver intremap='on' eim='on'/></iommu>",
        ..domain
    };
    let bare = Domain {
        devices: "<iommu model='intel'/>",
        ..domain
    };
    let amd = Domain {
        devices: "<iommu model='amd'/>",
        ..domain
    };
    let answer = |domain: Domain, version: &str| {
        let facts = facts_of_files(&Domain {
            libvirt: Some(version.parse().unwrap()),
            ..domain
        });
        let requirement = Requirement::parse("row", domain.xml().as_bytes()).unwrap();
        let offer = Offer::from_facts(&facts, Some("x86_64"), Some("kvm"));
        assess(&requirement, &offer).answer
    };
    use Feasibility::{Feasible, Infeasible, Unknown};
    for (domain, version, expected) in [
        (domain, "10.9.0", Infeasible),
        (domain, "10.10.0", Feasible),
        (explicit, "10.9.0", Feasible),
        (explicit, "3.4.0", Feasible),
        (bare, "10.9.0", Infeasible),
        (bare, "10.10.0", Unknown),
        (bare, "11.0.0", Feasible),
        (amd, "11.4.0", Infeasible),
        (amd, "12.1.0", Infeasible),
        (amd, "12.2.0", Feasible),
    ] {
        assert_eq!(
            answer(domain, version),
            expected,
            "{version}: {}",
            domain.xml()
        );
    }
}

fn can_use_kvm() -> bool {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}

/// Returns QEMU's messages on exit.
fn qemu(arguments: &[&str]) -> String {
    let mut child = Command::new("qemu-system-x86_64")
        .args(arguments)
        .args([
            "-m",
            "64",
            "-S",
            "-display",
            "none",
            "-monitor",
            "none",
            "-nodefaults",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this test needs qemu-system-x86_64");
    let until = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stderr).into_owned()
}
