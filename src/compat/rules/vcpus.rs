//! How many vCPUs, and how they are arranged.

use super::{MOST_WITHOUT_EIM, RuleInput, unsupported};
use crate::capability::{VcpuMax, Version};
use crate::compat::{RuleCode, RuleFinding, RuleSeverity};
use crate::domain::{CpuCheck, VcpuTopology};

/// The first APIC ID that a CPU without x2APIC cannot have (`apic_common_set_id`, QEMU
/// hw/intc/apic_common.c).
const FIRST_WIDE_APIC_ID: u128 = 255;
/// The CPU interfaces of a version 2 GIC (QEMU hw/arm/virt.c).
const MOST_WITH_GIC_V2: u64 = 8;
/// The first QEMU whose software emulation has x2APIC at all.
const TCG_HAS_X2APIC: Version = Version::new(9, 0, 0);
/// What every KVM of the last years has; above it, its number must be known.
const SURELY_IN_KVM: u64 = 255;

pub(super) fn check(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &case.domain.vcpus;
    let blocks = |code, message: String| RuleFinding::new(RuleSeverity::Blocks, code, message);
    if vcpus.maximum == 0 {
        let finding = blocks(RuleCode::Vcpus, "a domain needs at least 1 vCPU".to_owned());
        findings.push(finding.remedy("write <vcpu>1</vcpu> or more"));
        return;
    }
    if vcpus.current > vcpus.maximum {
        let (current, maximum) = (vcpus.current, vcpus.maximum);
        let message = format!("it is to start with {current} vCPUs of {maximum} at most");
        findings.push(
            blocks(RuleCode::Vcpus, message)
                .at_define(unsupported(
                    "maximum vCPU count must not be less than current vCPU count",
                ))
                .remedy(format!(
                    "raise <vcpu> to {current}, or lower current= to {maximum}"
                )),
        );
    }
    check_machine_limit(case, findings);
    check_topology(case, findings);
    check_granularity(case, findings);
    if case.needs_eim() && !case.is_q35() {
        let message = format!(
            "{} vCPUs are more than {MOST_WITHOUT_EIM}, which x86 has only with machine type \
             q35{}",
            vcpus.maximum,
            case.maximum_counts()
        );
        findings.push(
            blocks(RuleCode::VcpusQ35, message)
                .at_define(unsupported(
                    "more than 255 vCPUs are only supported on q35-based machine types",
                ))
                .remedy("use machine type q35, or lower <vcpu> to 255"),
        );
    }
    check_kvm(case, findings);
    check_gic(case, findings);
    check_apic_ids(case, findings);
}

fn check_machine_limit(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(name) = case.machine else { return };
    let machine = case.node.machines.as_ref().and_then(|m| m.get(name));
    let vcpus = &case.domain.vcpus;
    match machine.map(|machine| machine.max_vcpus) {
        Some(VcpuMax::AtMost(limit)) if vcpus.maximum > limit.into() => {
            let mut remedy = format!("lower <vcpu> to {limit}");
            if let Some((larger, more)) = larger_machine(case) {
                remedy.push_str(&format!(", or use {larger}, which has up to {more} here"));
            }
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Blocks,
                    RuleCode::VcpusMachine,
                    format!(
                        "machine type {name} has at most {limit} vCPUs, and <vcpu> asks for room \
                         for {}",
                        vcpus.maximum
                    ),
                )
                .at_define(unsupported(format!(
                    "Maximum CPUs greater than specified machine type limit {limit}"
                )))
                .remedy(remedy),
            );
        }
        Some(VcpuMax::Unknown) if vcpus.maximum > 1 => findings.push(RuleFinding::new(
            RuleSeverity::Unknown,
            RuleCode::VcpusMachine,
            format!("libvirt does not say how many vCPUs machine type {name} has"),
        )),
        _ => {}
    }
}

/// The machine type behind q35 (or virt), if it has room for the domain.
fn larger_machine<'c>(case: &'c RuleInput<'_>) -> Option<(&'c str, VcpuMax)> {
    let family = match case.is_x86() {
        true => "q35",
        false => "virt",
    };
    let name = case.node.aliases.get(family)?;
    let max = case.node.machines.as_ref()?.get(name)?.max_vcpus;
    let enough = max.number().map(u64::from) >= Some(case.domain.vcpus.maximum);
    enough.then_some((name, max))
}

fn check_topology(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &case.domain.vcpus;
    let Some(shape) = case.domain.cpu.topology else {
        return;
    };
    let parts = [
        ("sockets", shape.sockets),
        ("dies", shape.dies),
        ("clusters", shape.clusters),
        ("cores", shape.cores),
        ("threads", shape.threads),
    ];
    let blocks =
        |message: String| RuleFinding::new(RuleSeverity::Blocks, RuleCode::Topology, message);
    if let Some(name) = case.domain.cpu.missing_topology_attribute {
        let finding = blocks(format!("<topology> does not say how many {name} there are"));
        findings.push(
            finding
                .at_define(format!(
                    "XML error: Missing required attribute '{name}' in element 'topology'"
                ))
                .remedy("give sockets, cores and threads; their product is the maximum"),
        );
        return;
    }
    if let Some((name, _)) = parts.into_iter().find(|(_, count)| *count == 0) {
        findings.push(
            blocks(format!("<topology> has 0 {name}"))
                .at_define(format!(
                    "XML error: Invalid value for attribute '{name}' in element 'topology': Zero \
                     is not permitted"
                ))
                .remedy(format!("give {name} 1 or more, or leave <topology> out")),
        );
        return;
    }
    let product = shape.product();
    if product != u128::from(vcpus.maximum) {
        let spelt: Vec<String> = parts
            .into_iter()
            .filter(|(name, count)| *count != 1 || matches!(*name, "sockets" | "cores"))
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        findings.push(
            blocks(format!(
                "the topology multiplies out to {product} ({}), and <vcpu> says {}",
                spelt.join(" × "),
                vcpus.maximum
            ))
            .at_define(unsupported("CPU topology doesn't match maximum vcpu count"))
            .remedy(format!(
                "set <vcpu> to {product}, or change the topology; the number to start with goes \
                 into current="
            )),
        );
        return;
    }
    if case.is_x86() && shape.clusters > 1 {
        findings.push(
            blocks(format!(
                "x86 machines have no clusters, and the topology has {} in a die",
                shape.clusters
            ))
            .in_emulator("clusters > 1 not supported by this machine's CPU topology")
            .remedy("put them into dies or cores"),
        );
    }
}

/// pseries plugs whole cores (`qemuValidateDefGetVcpuHotplugGranularity`, libvirt 11.3).
fn check_granularity(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &case.domain.vcpus;
    let threads = match case.domain.cpu.topology {
        Some(shape) if case.is_pseries() => u64::from(shape.threads).max(1),
        _ => 1,
    };
    if !vcpus.maximum.is_multiple_of(threads) || !vcpus.current.is_multiple_of(threads) {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::Topology,
                format!("this machine type plugs whole cores of {threads} threads"),
            )
            .at_define(unsupported(format!(
                "vCPUs count must be a multiple of the vCPU hotplug granularity ({threads})"
            )))
            .remedy(format!(
                "make both numbers in <vcpu> multiples of {threads}"
            )),
        );
    }
}

fn check_kvm(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if case.virt_type() != Some("kvm") {
        return;
    }
    let vcpus = &case.domain.vcpus;
    match case.node.accelerator_max {
        VcpuMax::AtMost(limit) if vcpus.maximum > limit.into() => {
            let (which, count) = match vcpus.current > limit.into() {
                true => ("SMP", vcpus.current),
                false => ("hotpluggable", vcpus.maximum),
            };
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Blocks,
                    RuleCode::VcpusKvm,
                    format!(
                        "KVM here has at most {limit} vCPUs for a domain, and <vcpu> asks for \
                         room for {}; libvirt takes the definition all the same",
                        vcpus.maximum
                    ),
                )
                .in_emulator(format!(
                    "Number of {which} cpus requested ({count}) exceeds the maximum cpus \
                     supported by KVM ({limit})"
                ))
                .remedy(format!(
                    "lower <vcpu> to {limit}, or choose a node whose kernel has more \
                     (CONFIG_KVM_MAX_NR_VCPUS)"
                )),
            );
        }
        VcpuMax::Unknown if vcpus.maximum > SURELY_IN_KVM => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::VcpusKvm,
                "how many vCPUs KVM has here is not known",
            )
            .remedy("give --kvm-max-vcpus (KVM_CAP_MAX_VCPUS), or --domain-capabilities for kvm"),
        ),
        _ => {}
    }
}

fn check_gic(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &case.domain.vcpus;
    if !case.is_virt()
        || !matches!(case.arch, Some("aarch64" | "armv7l"))
        || vcpus.maximum <= MOST_WITH_GIC_V2
    {
        return;
    }
    let has = |version: &str| {
        let versions = case.node.gic_versions.as_ref()?;
        Some(versions.iter().any(|have| have == version))
    };
    // For software emulation libvirt takes version 2 where none is given, for KVM the newest
    // (`qemuDomainDefEnableDefaultFeatures`).
    let is_v2 = match case.domain.gic_version.as_deref() {
        Some("2") => Some(true),
        Some("host") | None if !case.is_tcg() => has("3").map(|has| !has),
        None => Some(true),
        Some(_) => Some(false),
    };
    let remedy = match has("3") {
        Some(false) => {
            "lower <vcpu> to 8, or choose a node whose interrupt controller has version 3"
        }
        _ => "write <features><gic version='3'/></features>, or lower <vcpu> to 8",
    };
    match is_v2 {
        Some(true) => findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::Gic,
                format!(
                    "a version 2 GIC, which this domain gets, has {MOST_WITH_GIC_V2} vCPUs at \
                     most, and <vcpu> asks for room for {}",
                    vcpus.maximum
                ),
            )
            .in_emulator(format!(
                "Number of SMP CPUs requested ({}) exceeds max CPUs supported by machine \
                 'mach-virt' ({MOST_WITH_GIC_V2})",
                vcpus.maximum
            ))
            .remedy(remedy),
        ),
        Some(false) => {}
        None => findings.push(RuleFinding::new(
            RuleSeverity::Unknown,
            RuleCode::Gic,
            format!(
                "which version the interrupt controller has here is not known; version 2 has \
                 {MOST_WITH_GIC_V2} vCPUs at most"
            ),
        )),
    }
}

/// APIC IDs have a field of bits for each level of the topology, so that one whose parts are no
/// powers of two has wide IDs even with few vCPUs.
fn check_apic_ids(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &case.domain.vcpus;
    // More than 255 without q35 are refused anyway.
    if !case.is_x86() || (case.needs_eim() && !case.is_q35()) {
        return;
    }
    let Some(highest) = highest_id(case, vcpus.maximum) else {
        return;
    };
    if highest < FIRST_WIDE_APIC_ID {
        return;
    }
    if !case.is_tcg() {
        // KVM gives every CPU model x2APIC. With remapping all is well; without, IDs above 255
        // get no interrupts from devices.
        if !case.needs_eim() {
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Warning,
                    RuleCode::ApicId,
                    format!(
                        "the topology has holes in its APIC IDs: the last of {} vCPUs has {highest}, \
                         and those above 254 cannot get interrupts from devices without interrupt \
                         remapping",
                        vcpus.maximum
                    ),
                )
                .remedy(
                    "use powers of two for cores and threads, or on q35 add <iommu \
                     model='intel'><driver intremap='on' eim='on'/></iommu>",
                ),
            );
        }
        return;
    }
    let first = first_wide(case).unwrap_or(vcpus.maximum);
    let words = |id: u128| format!("APIC ID {id} requires x2APIC feature in CPU");
    let remedy = "write <feature policy='require' name='x2apic'/> into <cpu> beside a model, or \
                  use <cpu mode='maximum'/>";
    let starts = first < vcpus.current;
    match (has_x2apic(case), starts) {
        (Some(true), _) => {}
        (Some(false), true) => findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::ApicId,
                format!(
                    "vCPU {first} gets APIC ID {}, and the guest's CPU has no x2APIC, which IDs \
                     above 254 need",
                    highest_id(case, first + 1).unwrap_or(highest)
                ),
            )
            .in_emulator(words(highest_id(case, first + 1).unwrap_or(highest)))
            .remedy(remedy),
        ),
        (Some(false), false) => findings.push(
            RuleFinding::new(
                RuleSeverity::Warning,
                RuleCode::ApicId,
                format!(
                    "vCPUs from number {first} on cannot be plugged: their APIC IDs are above 254, \
                     and the guest's CPU has no x2APIC"
                ),
            )
            .remedy(remedy),
        ),
        (None, true) => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::ApicId,
                format!(
                    "vCPU {first} needs x2APIC, and whether this CPU model has it is not known"
                ),
            )
            .in_emulator(words(highest_id(case, first + 1).unwrap_or(highest)))
            .remedy(remedy),
        ),
        (None, false) => {}
    }
}

/// The highest APIC ID of the first `count` vCPUs. Without a topology each vCPU is a socket.
fn highest_id(case: &RuleInput<'_>, count: u64) -> Option<u128> {
    match case.domain.cpu.topology {
        Some(shape) if shape.product() == u128::from(case.domain.vcpus.maximum) => {
            shape.highest_apic_id(count)
        }
        Some(_) => None,
        None => VcpuTopology::default().highest_apic_id(count),
    }
}

/// The first vCPU with a wide APIC ID: they grow with the number.
pub(super) fn first_wide(case: &RuleInput<'_>) -> Option<u64> {
    let (mut low, mut high) = (0, case.domain.vcpus.maximum);
    while low < high {
        let middle = low + (high - low) / 2;
        match highest_id(case, middle + 1)? < FIRST_WIDE_APIC_ID {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    (low < case.domain.vcpus.maximum).then_some(low)
}

/// Whether the guest's CPU has x2APIC under software emulation; `None` if it cannot be told.
pub(super) fn has_x2apic(case: &RuleInput<'_>) -> Option<bool> {
    const FEATURE: &str = "x2apic";
    if !case.is_tcg() {
        return Some(true);
    }
    match case.node.qemu_version {
        Some(version) if version < TCG_HAS_X2APIC => return Some(false),
        None => return None,
        Some(_) => {}
    }
    let cpu = &case.domain.cpu;
    let asked = cpu.features.iter().rev().find(|f| f.name == FEATURE);
    if let Some(feature) = asked {
        return match feature.policy.as_deref() {
            Some("require" | "force") | None => Some(true),
            Some("disable" | "forbid") => Some(false),
            Some(_) => None,
        };
    }
    match (cpu.mode.as_deref(), cpu.model.as_deref()) {
        (Some("maximum"), _) => Some(true),
        (Some("host-model"), _) => {
            let host_model = case.node.cpu.as_ref()?.host_model.as_ref()?;
            let feature = host_model.features.iter().find(|f| f.name == FEATURE)?;
            Some(matches!(
                feature.policy.as_deref(),
                Some("require" | "force") | None
            ))
        }
        // What libvirt and QEMU take by themselves, without x2APIC (QEMU target/i386/cpu.c).
        (None | Some("custom"), None | Some("qemu64" | "qemu32")) => {
            match cpu.matching.as_deref() {
                Some("minimum") => None,
                _ => Some(false),
            }
        }
        _ => None,
    }
}

/// What libvirt verifies, also where the definition leaves it to libvirt.
pub(super) fn effective_check(case: &RuleInput<'_>) -> CpuCheck {
    case.domain.cpu.effective_check(case.is_tcg())
}
