//! Compares the answers of `virtnode check` without libvirt with those of a real libvirt, for
//! devices, firmware, host CPUs and NUMA nodes, pages and the time stamp counter.
//!
//! The documents are those of Debian 13 on a host whose KVM gives guests fewer features than the
//! CPU has. The CPUs of KVM guests were tried there once (libvirt 11.3.0, QEMU 10.0.2), because no
//! other machine gives the same answers; everything else is asked here again.

use virtnode::capability::{Capabilities, DomainCapabilities, NodeFacts, Version};
use virtnode::compat::{Assessment, Feasibility, Offer, Requirement, assess};

use crate::support::libvirtd::Libvirtd;

const DEBIAN_13: &str = "tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0";

/// Returns the facts of the documents with these names, in this order.
fn facts(documents: &[&str]) -> NodeFacts {
    let read = |name: &str| std::fs::read(format!("{DEBIAN_13}/{name}")).unwrap();
    let capabilities = Capabilities::parse("capabilities", &read("capabilities.xml"));
    let documents = documents
        .iter()
        .map(|name| DomainCapabilities::parse(name, &read(name)).unwrap());
    NodeFacts {
        libvirt_version: Some(Version::new(11, 3, 0)),
        hypervisor_version: Some(Version::new(10, 0, 2)),
        capabilities: Some(capabilities.unwrap()),
        domain_capabilities: documents.collect(),
        ..NodeFacts::default()
    }
}

fn check(xml: &str, facts: &NodeFacts) -> Assessment {
    let domain = Requirement::parse("row", xml.as_bytes()).unwrap();
    assess(&domain, &Offer::for_domain(facts, &domain))
}

/// A part of a definition.
enum Part {
    Devices(&'static str),
    /// Content of `<features>`; without the others' `<acpi/>`.
    Features(&'static str),
    /// Attributes and content of `<os>`, and content of `<features>`.
    Os(&'static str, &'static str, &'static str),
    /// Any elements of `<domain>`.
    Other(&'static str),
    /// `<vcpu>`, and `<cpu>`.
    Vcpu(&'static str, &'static str),
}
use Part::{Devices, Features, Os, Other, Vcpu};

impl Part {
    fn xml(&self, virt_type: &str, machine: &str) -> String {
        let mut devices = "";
        let (mut os, mut loader, mut features) = ("", "", "<acpi/>");
        let (mut other, mut vcpu, mut cpu) = ("", "<vcpu>1</vcpu>", "");
        match *self {
            Devices(text) => devices = text,
            Features(text) => features = text,
            Os(attributes, text, rest) => (os, loader, features) = (attributes, text, rest),
            Other(text) => other = text,
            Vcpu(count, text) => (vcpu, cpu) = (count, text),
        }
        format!(
            "<domain type='{virt_type}'><name>foretold</name><memory unit='MiB'>64</memory>{vcpu}\
             <os{os}><type arch='x86_64' machine='{machine}'>hvm</type>{loader}</os>\
             <features>{features}</features>{cpu}{other}<devices>{devices}</devices></domain>"
        )
    }
}

/// Machine type, part, libvirt's message; without a message libvirt accepts the definition.
type Row = (&'static str, Part, Option<&'static str>);

const EFI: &str = " firmware='efi'";
const NO_EFI: &str =
    "Unable to find 'efi' firmware that is compatible with the current configuration";
const NO_IDE: &str = "IDE controllers are unsupported for this QEMU binary or machine type";
const SECURE_PFLASH: &str = "<loader readonly='yes' secure='yes' type='pflash'>/no/image</loader>";

#[rustfmt::skip]
fn rows() -> Vec<Row> {
    vec![
        // devices that the emulator lacks
        ("q35", Devices("<video><model type='qxl'/></video>"), Some("domain configuration does not support video model 'qxl'")),
        ("q35", Devices("<video><model type='xen'/></video>"), Some("domain configuration does not support video model 'xen'")),
        ("q35", Devices("<video><model type='vga'/></video>"), None),
        ("pc", Devices("<video><model type='bochs'/></video>"), None),
        ("q35", Devices("<video/>"), None),
        ("q35", Devices("<graphics type='spice'/>"), Some("spice graphics are not supported with this QEMU")),
        ("q35", Devices("<graphics type='rdp'/>"), Some("rdp graphics are not supported with this QEMU")),
        ("q35", Devices("<graphics type='vnc'/>"), None),
        ("q35", Devices("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"), Some("TPM version '2.0' is not supported")),
        ("q35", Devices("<tpm model='tpm-tis'><backend type='emulator' version='1.2'/></tpm>"), Some("TPM version '1.2' is not supported")),
        ("q35", Devices("<tpm model='tpm-crb'><backend type='external'><source type='unix' mode='connect' path='/x'/></backend></tpm>"), Some("does not support TPM backend type external")),
        ("q35", Devices("<tpm model='tpm-spapr'><backend type='passthrough'><device path='/dev/null'/></backend></tpm>"), Some("does not support TPM model tpm-spapr")),
        ("q35", Devices("<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/null'/></backend></tpm>"), None),
        ("q35", Devices("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"), None),
        ("q35", Devices("<crypto model='virtio' type='qemu'><backend model='lkcf'/></crypto>"), Some("crypto backend lkcf is not supported")),
        ("q35", Devices("<crypto model='virtio' type='qemu'><backend model='builtin'/></crypto>"), None),
        ("q35", Devices("<filesystem type='mount' accessmode='passthrough'><driver type='virtiofs'/><source dir='/tmp'/><target dir='t'/></filesystem>"), Some("'virtiofs' requires shared memory")),
        ("q35", Devices("<filesystem type='mount' accessmode='passthrough'><source dir='/tmp'/><target dir='t'/></filesystem>"), None),
        ("q35", Devices("<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>"), Some("chardev 'spicevmc' not supported without spice graphics")),
        ("q35", Devices("<redirdev bus='usb' type='spicevmc'/>"), Some("chardev 'spicevmc' not supported without spice graphics")),
        // Not in libvirt's list of channels, but accepted.
        ("q35", Devices("<channel type='null'><target type='virtio' name='a'/></channel>"), None),
        ("q35", Devices("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"), None),
        ("q35", Devices("<hostdev mode='capabilities' type='misc'><source><char>/dev/null</char></source></hostdev>"), Some("hostdev mode 'capabilities' is not supported in qemu")),
        ("q35", Devices("<panic model='pseries'/>"), Some("only pSeries guests support panic device of model 'pseries'")),
        ("q35", Devices("<panic model='s390'/>"), Some("only S390 guests support panic device of model 's390'")),
        ("q35", Devices("<panic model='isa'/>"), None),
        ("q35", Devices("<input type='keyboard' bus='xen'/>"), Some("unsupported input bus xen")),
        ("q35", Devices("<input type='tablet' bus='ps2'/>"), Some("ps2 bus does not support tablet input device")),
        // buses and controllers that the machine type lacks
        ("q35", Devices("<disk type='file' device='disk'><source file='/dev/null'/><target dev='hda' bus='ide'/></disk>"), Some(NO_IDE)),
        ("q35", Devices("<disk type='file' device='cdrom'><target dev='hda'/></disk>"), Some(NO_IDE)),
        ("q35", Devices("<controller type='ide'/>"), Some(NO_IDE)),
        ("pc", Devices("<disk type='file' device='disk'><source file='/dev/null'/><target dev='hda' bus='ide'/></disk>"), None),
        ("q35", Devices("<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>"), None),
        ("q35", Devices("<disk type='file' device='cdrom'><target dev='vda' bus='virtio'/></disk>"), Some("disk type of 'vda' does not support ejectable media")),
        ("q35", Devices("<disk type='file' device='disk'><source file='/dev/null'/><target dev='xvda' bus='xen'/></disk>"), Some("unsupported disk bus 'xen' with device setup")),
        ("q35", Devices("<disk type='file' device='floppy'><target dev='fda' bus='usb'/></disk>"), Some("Invalid bus type 'usb' for floppy disk")),
        ("q35", Devices("<disk type='block' device='lun'><source dev='/dev/null'/><target dev='sda' bus='sata'/></disk>"), Some("disk device='lun' is not supported for bus='sata'")),
        ("pc", Devices("<controller type='pci' index='1' model='pcie-root-port'/>"), Some("a PCI slot is needed to connect a PCI controller model='pcie-root-port', but none is available, and it cannot be automatically added")),
        ("pc", Devices("<controller type='pci' index='1' model='dmi-to-pci-bridge'/>"), Some("a PCI slot is needed to connect a PCI controller model='dmi-to-pci-bridge', but none is available, and it cannot be automatically added")),
        ("pc", Devices("<controller type='pci' index='1' model='pcie-switch-upstream-port'/>"), Some("a PCI slot is needed to connect a PCI controller model='pcie-root-port', but none is available, and it cannot be automatically added")),
        ("pc", Devices("<controller type='pci' index='0' model='pcie-root'/>"), Some("The PCI controller with index='0' must be model='pci-root' for this machine type, but model='pcie-root' was found instead")),
        ("q35", Devices("<controller type='pci' index='0' model='pci-root'/>"), Some("The PCI controller with index='0' must be model='pcie-root' for this machine type, but model='pci-root' was found instead")),
        ("q35", Devices("<controller type='pci' index='1' model='pci-expander-bus'/>"), Some("pci-expander-bus controllers are only supported on 440fx-based machinetypes")),
        ("pc", Devices("<controller type='pci' index='1' model='pcie-expander-bus'/>"), Some("pcie-expander-bus controllers are not supported with this machine type")),
        ("q35", Devices("<controller type='pci' index='1' model='pcie-root-port'/>"), None),
        ("pc", Devices("<controller type='pci' index='1' model='pci-bridge'/>"), None),
        ("q35", Devices("<controller type='usb' model='qusb1'/>"), Some("USB controller model type 'qusb1' or 'qusb2' is not supported in qemu")),
        ("pc", Devices("<watchdog model='itco'/>"), Some("itco model of watchdog is only part of q35 machine")),
        ("q35", Devices("<watchdog model='ib700'/>"), Some("ib700 model of watchdog cannot be used with this machine type")),
        ("q35", Devices("<watchdog model='diag288'/>"), Some("diag288 model of watchdog is allowed for s390 and s390x only")),
        ("q35", Devices("<watchdog model='i6300esb'/>"), None),
        ("q35", Features("<acpi/><gic version='2'/>"), Some("The 'gic' feature is not supported for architecture 'x86_64' or machine type 'pc-q35-10.0'")),
        ("q35", Features("<acpi/><ps2 state='off'/>"), None),
        // firmware: this host has none
        ("q35", Os(EFI, "", "<acpi/>"), Some(NO_EFI)),
        ("q35", Os(EFI, "<loader readonly='yes' type='pflash'>/usr/share/edk2/x64/OVMF_CODE.fd</loader>", "<acpi/>"), Some(NO_EFI)),
        ("q35", Os(EFI, "<loader secure='yes'/>", "<acpi/><smm state='off'/>"), Some(NO_EFI)),
        ("pc", Os(" firmware='bios'", "", "<acpi/>"), Some("Unable to find 'bios' firmware")),
        ("q35", Os("", "<loader readonly='yes' type='pflash'>/no/image</loader>", ""), Some("UEFI requires ACPI on this architecture")),
        ("q35", Os("", "<loader readonly='yes' type='pflash'>/no/image</loader>", "<acpi/>"), None),
        ("q35", Os("", SECURE_PFLASH, "<acpi/>"), Some("Secure boot requires SMM feature enabled")),
        ("q35", Os("", SECURE_PFLASH, "<acpi/><smm state='on'/>"), None),
        ("pc", Os("", SECURE_PFLASH, "<acpi/><smm state='on'/>"), Some("Secure boot is supported with q35 machine types only")),
        // confidential guests, memory
        ("q35", Other("<launchSecurity type='sev'><cbitpos>47</cbitpos><reducedPhysBits>1</reducedPhysBits><policy>0x3</policy></launchSecurity>"), Some("'sev' launch security is not supported with this QEMU binary")),
        ("q35", Other("<launchSecurity type='s390-pv'/>"), Some("'s390-pv' launch security is not supported with this QEMU binary")),
        ("q35", Other("<memoryBacking><hugepages/><source type='anonymous'/></memoryBacking>"), Some("hugepages are not allowed with anonymous memory source")),
        ("q35", Other("<memoryBacking><hugepages/><allocation mode='ondemand'/></memoryBacking>"), Some("hugepages are not allowed with memory allocation ondemand")),
        ("q35", Other("<memoryBacking><hugepages><page size='4' unit='KiB'/></hugepages></memoryBacking>"), None),
        ("q35", Other("<memoryBacking><source type='nonsense'/></memoryBacking>"), Some("unknown memoryBacking/source/type 'nonsense'")),
        ("q35", Other("<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"), None),
        // host CPUs, NUMA nodes and cells, time stamp counter
        ("q35", Other("<numatune><memory mode='strict' nodeset='300'/></numatune>"), Some("NUMA node 300 is unavailable")),
        ("q35", Other("<numatune><memory mode='preferred' nodeset='300'/></numatune>"), Some("NUMA node 300 is unavailable")),
        ("q35", Other("<numatune><memory mode='strict' nodeset='0'/></numatune>"), None),
        ("q35", Other("<numatune><memnode cellid='0' mode='strict' nodeset='0'/></numatune>"), Some("Element 'memnode' is invalid without any guest NUMA cells")),
        ("q35", Vcpu("<vcpu>2</vcpu>", "<cpu><numa><cell id='0' cpus='0-3' memory='64' unit='MiB'/></numa></cpu>"), Some("Number of CPUs in <numa> exceeds the <vcpu> count")),
        ("q35", Vcpu("<vcpu>2</vcpu>", "<cpu><numa><cell id='0' cpus='2-3' memory='64' unit='MiB'/></numa></cpu>"), Some("CPU IDs in <numa> exceed the <vcpu> count")),
        ("q35", Vcpu("<vcpu>2</vcpu>", "<cpu><numa><cell id='0' cpus='0-1' memory='32' unit='MiB'/><cell id='1' cpus='1' memory='32' unit='MiB'/></numa></cpu>"), Some("NUMA cells 1 and 0 have overlapping vCPU ids")),
        ("q35", Vcpu("<vcpu>4</vcpu>", "<cpu><numa><cell id='0' cpus='0-1' memory='64' unit='MiB'/></numa></cpu>"), None),
        ("q35", Vcpu("<vcpu cpuset='0'>1</vcpu>", ""), None),
        ("q35", Vcpu("<vcpu>1</vcpu>", "<cpu mode='maximum'><maxphysaddr mode='emulate' bits='64'/></cpu>"), Some("The number of virtual CPU address bits cannot exceed the number supported by the host CPU")),
        ("q35", Vcpu("<vcpu>1</vcpu>", "<cpu mode='maximum'><maxphysaddr mode='passthrough' bits='40'/></cpu>"), Some("CPU maximum physical address bits number specification cannot be used with mode='passthrough'")),
        ("q35", Vcpu("<vcpu>1</vcpu>", "<cpu mode='maximum'><maxphysaddr mode='emulate' bits='40' limit='39'/></cpu>"), Some("attribute 'limit' is only supported for maxphysaddr mode 'passthrough'")),
    ]
}

/// The order of the documents makes no difference: the one of the machine type counts.
#[test]
fn answer_of_libvirt_is_foretold_for_every_part() {
    let libvirtd = Libvirtd::start().unwrap();
    let mut documents = ["dc-x86_64-q35-qemu.xml", "dc-x86_64-pc-qemu.xml"];
    let forward = facts(&documents);
    documents.reverse();
    let backward = facts(&documents);
    let mut wrong = Vec::new();
    for (machine, part, words) in rows() {
        let xml = part.xml("qemu", machine);
        // Only a start, and libvirt's dry run of it, compares with the host.
        let is_late = words.is_some_and(|words| {
            words.starts_with("NUMA node") || words.starts_with("unsupported disk bus")
        });
        let actual = match (words, is_late) {
            (Some(_), true) => libvirtd.start_and_end(&xml),
            _ => libvirtd.define(&xml),
        };
        let is_expected = match (&actual, words) {
            (Ok(()), None) => true,
            (Err(actual), Some(words)) => actual.contains(words),
            _ => false,
        };
        if !is_expected {
            wrong.push(format!(
                "libvirt: {actual:?}\n  instead of {words:?}\n  {xml}"
            ));
        }
        for facts in [&forward, &backward] {
            let assessment = check(&xml, facts);
            let foretold = match words {
                None => assessment.answer == Feasibility::Feasible,
                Some(words) => assessment.blocking().any(|finding| {
                    let own = finding.words.as_deref();
                    own.is_some_and(|own| own.contains(words)) && finding.remedy.is_some()
                }),
            };
            if !foretold {
                wrong.push(format!(
                    "computed: {assessment:#?}\n  instead of {words:?}\n  {xml}"
                ));
            }
            assert!(!assessment.not_checked.is_empty());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Rows that need KVM, tried once on the host of the documents: `<cpu>`, other elements, answer, a
/// part of libvirt's message.
#[rustfmt::skip]
const OF_KVM: &[(&str, &str, Feasibility, &str)] = {
    use Feasibility::{Feasible, Infeasible, Unknown};
    const MISSING: &str = "Host CPU does not provide required features: ";
    &[
        // The CPU has what KVM does not give: libvirt starts models without a version.
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem</model></cpu>", "", Feasible, ""),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>IvyBridge</model></cpu>", "", Feasible, ""),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem-v1</model></cpu>", "", Infeasible, "Host CPU does not provide required features: pni"),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Denverton</model></cpu>", "", Infeasible, MISSING),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Skylake-Client</model></cpu>", "", Infeasible, "Host CPU does not provide required features: hle, rtm"),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Skylake-Client</model><feature policy='disable' name='hle'/><feature policy='disable' name='rtm'/></cpu>", "", Feasible, ""),
        // SVM is in libvirt's model, but never a blocker.
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>EPYC</model></cpu>", "", Infeasible, "Host CPU does not provide required features: svm"),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>EPYC</model><feature policy='disable' name='svm'/></cpu>", "", Feasible, ""),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>qemu64</model></cpu>", "", Infeasible, "Host CPU does not provide required features: svm"),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem-v1</model><feature policy='optional' name='pni'/><feature policy='optional' name='popcnt'/><feature policy='optional' name='sse4.1'/><feature policy='optional' name='sse4.2'/><feature policy='optional' name='ssse3'/></cpu>", "", Infeasible, MISSING),
        ("<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem-v1</model><feature policy='disable' name='pni'/><feature policy='disable' name='popcnt'/><feature policy='disable' name='sse4.1'/><feature policy='disable' name='sse4.2'/><feature policy='disable' name='ssse3'/></cpu>", "", Feasible, ""),
        // required and forbidden features
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>pentium</model><feature policy='require' name='pni'/></cpu>", "", Feasible, ""),
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>pentium</model><feature policy='require' name='svm'/></cpu>", "", Infeasible, "Host CPU does not provide required features: svm"),
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>pentium-v1</model><feature policy='require' name='pni'/></cpu>", "", Infeasible, "Host CPU does not provide required features: pni"),
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>pentium</model><feature policy='forbid' name='pni'/></cpu>", "", Infeasible, "Host CPU provides forbidden features: pni"),
        ("<cpu mode='host-model'><feature policy='require' name='pni'/></cpu>", "", Feasible, ""),
        ("<cpu mode='host-model'><feature policy='require' name='svm'/></cpu>", "", Infeasible, "Host CPU does not provide required features: svm"),
        // The vendor is compared only where the model is.
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>pentium</model><vendor>Intel</vendor></cpu>", "", Feasible, ""),
        ("<cpu mode='custom' check='full'><model fallback='forbid'>pentium</model><vendor>Intel</vendor></cpu>", "", Unknown, ""),
        ("<cpu mode='custom' check='none'><model fallback='forbid'>Nehalem</model><vendor>Intel</vendor></cpu>", "", Feasible, ""),
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>Nehalem</model><vendor>Intel</vendor></cpu>", "", Infeasible, "host CPU vendor does not match required CPU vendor Intel"),
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>pentium</model><vendor>Intel</vendor><feature policy='require' name='pni'/></cpu>", "", Infeasible, "host CPU vendor does not match required CPU vendor Intel"),
        ("<cpu mode='custom' check='partial'><model fallback='forbid'>pentium</model><vendor>Intel</vendor><feature policy='disable' name='vme'/></cpu>", "", Feasible, ""),
        ("<cpu mode='custom' match='strict' check='partial'><model fallback='forbid'>Nehalem</model></cpu>", "", Infeasible, "Host CPU does not strictly match guest CPU"),
        // time stamp counter: 250 ppm around 2596136000 Hz
        ("", "<clock offset='utc'><timer name='tsc' frequency='1000000000'/></clock>", Infeasible, "Requested TSC frequency 1000000000 Hz is outside tolerance range ([2595486966, 2596785034] Hz) around host frequency 2596136000 Hz and TSC scaling is not supported by the host CPU"),
        ("", "<clock offset='utc'><timer name='tsc' present='no' frequency='1000000000'/></clock>", Infeasible, "Requested TSC frequency"),
        ("", "<clock offset='utc'><timer name='tsc' frequency='2596785034'/></clock>", Feasible, ""),
        ("", "<clock offset='utc'><timer name='tsc' frequency='2596785035'/></clock>", Infeasible, "Requested TSC frequency"),
        // host CPUs
        ("", "<cputune><vcpupin vcpu='0' cpuset='9'/></cputune>", Infeasible, ""),
        ("", "<cputune><vcpupin vcpu='3' cpuset='9'/></cputune>", Feasible, ""),
        ("", "<cputune><emulatorpin cpuset='9'/></cputune>", Infeasible, ""),
        ("", "<cputune><vcpupin vcpu='0' cpuset='0-9'/></cputune>", Unknown, ""),
        ("", "<cputune><vcpupin vcpu='0' cpuset='0-9,^2-9'/></cputune>", Feasible, ""),
        // pages: an empty pool may be filled before the start
        ("", "<memoryBacking><hugepages><page size='2' unit='MiB'/></hugepages></memoryBacking>", Unknown, ""),
        ("", "<memoryBacking><hugepages><page size='64' unit='KiB'/></hugepages></memoryBacking>", Infeasible, ""),
    ]
};

#[test]
fn answer_for_kvm_is_that_of_the_host_of_the_documents() {
    let facts = facts(&["dc-x86_64-pc-kvm.xml", "dc-x86_64-q35-kvm.xml"]);
    let mut wrong = Vec::new();
    for (cpu, other, answer, words) in OF_KVM {
        let xml = format!(
            "<domain type='kvm'><name>d</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os>\
             <type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>{cpu}\
             {other}</domain>"
        );
        let assessment = check(&xml, &facts);
        let says = assessment
            .blocking()
            .any(|finding| finding.words.as_deref().unwrap_or_default().contains(words));
        if assessment.answer != *answer || (!words.is_empty() && !says) {
            wrong.push(format!("{xml}\n{answer:?}: {words}\n{assessment:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// libvirt 9.0 rejects it (tried), 11.3 starts it.
#[test]
fn usable_model_of_another_vendor_is_compared_before_libvirt_10_2() {
    let xml = "<domain type='kvm'><name>d</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os>\
               <type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
               <cpu mode='custom' match='exact' check='partial'>\
               <model fallback='forbid'>pentium</model><vendor>Intel</vendor></cpu></domain>";
    for (version, answer) in [
        (Version::new(9, 0, 0), Feasibility::Infeasible),
        (Version::new(10, 2, 0), Feasibility::Feasible),
        (Version::new(11, 3, 0), Feasibility::Feasible),
    ] {
        let mut facts = facts(&["dc-x86_64-q35-kvm.xml"]);
        facts.libvirt_version = Some(version);
        assert_eq!(check(xml, &facts).answer, answer, "{version}");
    }
}

/// A KVM without Hyper-V support: QEMU ignores some enlightenments and exits for others.
#[test]
fn enlightenments_without_support_in_kvm_are_ignored_or_fatal() {
    let facts = facts(&["dc-x86_64-q35-kvm.xml"]);
    let ask = |names: &[&str]| {
        let enlightenments: String = names
            .iter()
            .map(|name| format!("<{name} state='on'/>"))
            .collect();
        let features = format!("<hyperv mode='custom'>{enlightenments}</hyperv>");
        let xml = format!(
            "<domain type='kvm'><name>d</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os>\
             <type arch='x86_64' machine='q35'>hvm</type></os><features>{features}</features>\
             </domain>"
        );
        check(&xml, &facts).answer
    };
    for ignored in [
        "relaxed",
        "stimer",
        "tlbflush",
        "ipi",
        "frequencies",
        "runtime",
        "reset",
    ] {
        assert_eq!(ask(&[ignored]), Feasibility::Feasible, "{ignored}");
    }
    for fatal in ["vpindex", "synic", "reenlightenment", "vapic"] {
        assert_eq!(ask(&[fatal]), Feasibility::Infeasible, "{fatal}");
    }
}
