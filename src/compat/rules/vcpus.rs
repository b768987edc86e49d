//! Rules for the number and topology of vCPUs.

use super::{MAX_VCPUS_WITHOUT_EIM, RuleInput, unsupported};
use crate::capability::{VcpuMax, Version};
use crate::compat::{RuleCode, RuleFinding, Stage};
use crate::domain::{CpuCheck, VcpuTopology};

/// The lowest APIC ID that requires x2APIC (`apic_common_set_id`, QEMU
/// hw/intc/apic_common.c).
const FIRST_WIDE_APIC_ID: u128 = 255;
/// Maximum number of vCPUs with a version 2 GIC, which has 8 CPU interfaces (QEMU hw/arm/virt.c).
const MAX_VCPUS_WITH_GIC_V2: u64 = 8;
/// First QEMU with x2APIC in software emulation.
const FIRST_TCG_WITH_X2APIC: Version = Version::new(9, 0, 0);
/// Number of vCPUs that every KVM of recent years supports. A larger number needs KVM's limit.
const SAFE_KVM_VCPUS: u64 = 255;

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &input.domain.vcpus;
    if vcpus.maximum == 0 {
        let finding = RuleFinding::blocking(RuleCode::Vcpus, "a domain needs at least 1 vCPU");
        findings.push(finding.remedy("write <vcpu>1</vcpu> or more"));
        return;
    }
    if vcpus.current > vcpus.maximum {
        let (current, maximum) = (vcpus.current, vcpus.maximum);
        let message =
            format!("the domain has {current} vCPUs at start, but a maximum of {maximum}");
        findings.push(
            RuleFinding::blocking(RuleCode::Vcpus, message)
                .at_define(unsupported(
                    "maximum vCPU count must not be less than current vCPU count",
                ))
                .remedy(format!(
                    "raise <vcpu> to {current}, or lower current= to {maximum}"
                )),
        );
    }
    check_machine_limit(input, findings);
    check_topology(input, findings);
    check_granularity(input, findings);
    if input.needs_eim() && !input.is_q35() {
        let message = format!(
            "{} vCPUs exceed {MAX_VCPUS_WITHOUT_EIM}, the maximum on x86 without machine type \
             q35{}",
            vcpus.maximum,
            input.maximum_counts()
        );
        findings.push(
            RuleFinding::blocking(RuleCode::VcpusQ35, message)
                .at_define(unsupported(
                    "more than 255 vCPUs are only supported on q35-based machine types",
                ))
                .remedy("use machine type q35, or lower <vcpu> to 255"),
        );
    }
    check_kvm(input, findings);
    check_gic(input, findings);
    check_apic_ids(input, findings);
}

fn check_machine_limit(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(name) = input.machine else { return };
    let machine = input.node.machines.as_ref().and_then(|m| m.get(name));
    let vcpus = &input.domain.vcpus;
    match machine.map(|machine| machine.max_vcpus) {
        Some(VcpuMax::AtMost(limit)) if vcpus.maximum > limit.into() => {
            let mut remedy = format!("lower <vcpu> to {limit}");
            if let Some((larger, more)) = larger_machine(input) {
                remedy.push_str(&format!(", or use {larger}, which allows {more} here"));
            }
            findings.push(
                RuleFinding::blocking(
                    RuleCode::VcpusMachine,
                    format!(
                        "machine type {name} allows at most {limit} vCPUs, but <vcpu> requests {}",
                        vcpus.maximum
                    ),
                )
                .at_define(unsupported(format!(
                    "Maximum CPUs greater than specified machine type limit {limit}"
                )))
                .remedy(remedy),
            );
        }
        Some(VcpuMax::Unknown) if vcpus.maximum > 1 => findings.push(RuleFinding::unknown(
            RuleCode::VcpusMachine,
            format!("libvirt does not report how many vCPUs machine type {name} allows"),
        )),
        _ => {}
    }
}

/// Returns the machine type behind q35 (or virt) if it allows enough vCPUs.
fn larger_machine<'i>(input: &'i RuleInput<'_>) -> Option<(&'i str, VcpuMax)> {
    let family = if input.is_x86() { "q35" } else { "virt" };
    let name = input.node.aliases.get(family)?;
    let max = input.node.machines.as_ref()?.get(name)?.max_vcpus;
    let enough = max.number().map(u64::from) >= Some(input.domain.vcpus.maximum);
    enough.then_some((name, max))
}

fn check_topology(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &input.domain.vcpus;
    let Some(shape) = input.domain.cpu.topology else {
        return;
    };
    let parts = [
        ("sockets", shape.sockets),
        ("dies", shape.dies),
        ("clusters", shape.clusters),
        ("cores", shape.cores),
        ("threads", shape.threads),
    ];
    let blocks = |message: String| RuleFinding::blocking(RuleCode::Topology, message);
    if let Some(name) = input.domain.cpu.missing_topology_attribute {
        let finding = blocks(format!("<topology> lacks the attribute {name}"));
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
        let factors: Vec<String> = parts
            .into_iter()
            .filter(|(name, count)| *count != 1 || matches!(*name, "sockets" | "cores"))
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        findings.push(
            blocks(format!(
                "the topology yields {product} vCPUs ({}), but <vcpu> says {}",
                factors.join(" × "),
                vcpus.maximum
            ))
            .at_define(unsupported("CPU topology doesn't match maximum vcpu count"))
            .remedy(format!(
                "set <vcpu> to {product}, or change the topology; write the number at start into \
                 current="
            )),
        );
        return;
    }
    if input.is_x86() && shape.clusters > 1 {
        findings.push(
            blocks(format!(
                "x86 machines have no clusters, but the topology has {} in each die",
                shape.clusters
            ))
            .in_emulator("clusters > 1 not supported by this machine's CPU topology")
            .remedy("use dies or cores instead"),
        );
    }
}

/// Checks that pseries, which plugs whole cores, gets whole ones
/// (`qemuValidateDefGetVcpuHotplugGranularity`, libvirt 11.3).
fn check_granularity(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &input.domain.vcpus;
    let threads = match input.domain.cpu.topology {
        Some(shape) if input.is_pseries() => u64::from(shape.threads).max(1),
        _ => 1,
    };
    if !vcpus.maximum.is_multiple_of(threads) || !vcpus.current.is_multiple_of(threads) {
        findings.push(
            RuleFinding::blocking(
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

fn check_kvm(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if input.virt_type() != Some("kvm") {
        return;
    }
    let vcpus = &input.domain.vcpus;
    match input.node.accelerator_max {
        VcpuMax::AtMost(limit) if vcpus.maximum > limit.into() => {
            let (which, count) = if vcpus.current > limit.into() {
                ("SMP", vcpus.current)
            } else {
                ("hotpluggable", vcpus.maximum)
            };
            findings.push(
                RuleFinding::blocking(
                    RuleCode::VcpusKvm,
                    format!(
                        "KVM on this node allows at most {limit} vCPUs per domain, but <vcpu> \
                         requests {}; libvirt accepts the definition nevertheless",
                        vcpus.maximum
                    ),
                )
                .in_emulator(format!(
                    "Number of {which} cpus requested ({count}) exceeds the maximum cpus supported \
                     by KVM ({limit})"
                ))
                .remedy(format!(
                    "lower <vcpu> to {limit}, or choose a node whose kernel allows more \
                     (CONFIG_KVM_MAX_NR_VCPUS)"
                )),
            );
        }
        VcpuMax::Unknown
            if vcpus.maximum > SAFE_KVM_VCPUS
                && vcpus.maximum > input.node.accelerator_supports.unwrap_or(0).into() =>
        {
            findings.push(
                RuleFinding::unknown(
                    RuleCode::VcpusKvm,
                    "KVM's maximum number of vCPUs on this node is unknown",
                )
                .remedy(
                    "give --kvm-max-vcpus (KVM_CAP_MAX_VCPUS), or --domain-capabilities for kvm",
                ),
            );
        }
        _ => {}
    }
}

fn check_gic(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &input.domain.vcpus;
    check_gic_version(input, findings);
    if !input.is_virt()
        || !matches!(input.arch, Some("aarch64" | "armv7l"))
        || vcpus.maximum <= MAX_VCPUS_WITH_GIC_V2
    {
        return;
    }
    let has = |version: &str| {
        let versions = input.node.gic_versions.as_ref()?;
        Some(versions.iter().any(|have| have == version))
    };
    // libvirt's default is version 2 for software emulation and the newest for KVM
    // (`qemuDomainDefEnableDefaultFeatures`).
    let wanted = input
        .domain
        .gic
        .as_ref()
        .and_then(|gic| gic.version.as_deref());
    let is_v2 = match wanted {
        Some("2") => Some(true),
        Some("host") | None if !input.is_tcg() => has("3").map(|has| !has),
        None => Some(true),
        Some(_) => Some(false),
    };
    let remedy = match has("3") {
        Some(false) => "lower <vcpu> to 8, or choose a node with a version 3 interrupt controller",
        _ => "write <features><gic version='3'/></features>, or lower <vcpu> to 8",
    };
    match is_v2 {
        Some(true) => findings.push(
            RuleFinding::blocking(
                RuleCode::Gic,
                format!(
                    "the domain gets a version 2 GIC, which allows at most {MAX_VCPUS_WITH_GIC_V2} \
                     vCPUs, but <vcpu> requests {}",
                    vcpus.maximum
                ),
            )
            .in_emulator(format!(
                "Number of SMP CPUs requested ({}) exceeds max CPUs supported by machine \
                 'mach-virt' ({MAX_VCPUS_WITH_GIC_V2})",
                vcpus.maximum
            ))
            .remedy(remedy),
        ),
        Some(false) => {}
        None => findings.push(RuleFinding::unknown(
            RuleCode::Gic,
            format!(
                "the version of the node's interrupt controller is unknown; version 2 allows at \
                 most {MAX_VCPUS_WITH_GIC_V2} vCPUs"
            ),
        )),
    }
}

/// Checks that the machine type has an interrupt controller of Arm, in the version that KVM supports.
fn check_gic_version(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(gic) = &input.domain.gic else { return };
    let is_arm = matches!(input.arch, Some("aarch64" | "armv7l"));
    if input.arch.is_some() && input.machine.is_some() && !(is_arm && input.is_virt()) {
        let (arch, machine) = (
            input.arch.unwrap_or_default(),
            input.machine.unwrap_or_default(),
        );
        findings.push(
            RuleFinding::blocking(
                RuleCode::Gic,
                format!("machine type {machine} of {arch} has no GIC"),
            )
            .at_define(unsupported(format!(
                "The 'gic' feature is not supported for architecture '{arch}' or machine type \
                 '{machine}'"
            )))
            .remedy("leave <gic> out of <features>"),
        );
        return;
    }
    let Some(version @ ("2" | "3")) = gic.version.as_deref() else {
        return;
    };
    // Software emulation has both.
    if let Some(has) = &input.node.gic_versions
        && !input.is_tcg()
        && !has.iter().any(|have| have == version)
    {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Gic,
                format!("KVM on this node does not support a version {version} GIC"),
            )
            .stage(Stage::Emulator)
            .remedy("write <gic version='host'/>, or leave <gic> out of <features>"),
        );
    }
}

/// Checks APIC IDs. They have a bit field for each level of the topology, so counts that are not
/// powers of two yield wide IDs even with few vCPUs.
fn check_apic_ids(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &input.domain.vcpus;
    // `check` has already reported more than 255 vCPUs without q35.
    if !input.is_x86() || (input.needs_eim() && !input.is_q35()) {
        return;
    }
    let Some(highest) = highest_id(input, vcpus.maximum) else {
        return;
    };
    if highest < FIRST_WIDE_APIC_ID {
        return;
    }
    if !input.is_tcg() {
        // KVM gives every CPU model x2APIC. Without interrupt remapping, devices cannot interrupt
        // vCPUs with wide IDs.
        if !input.needs_eim() {
            findings.push(
                RuleFinding::warning(
                    RuleCode::ApicId,
                    format!(
                        "the topology leaves holes in the APIC IDs: the last of {} vCPUs has \
                         {highest}, and devices cannot interrupt vCPUs above 254 without interrupt \
                         remapping",
                        vcpus.maximum
                    ),
                )
                .remedy(
                    "use powers of two for cores and threads, or add on q35 <iommu \
                     model='intel'><driver intremap='on' eim='on'/></iommu>",
                ),
            );
        }
        return;
    }
    let first = first_wide(input).unwrap_or(vcpus.maximum);
    let words = |id: u128| format!("APIC ID {id} requires x2APIC feature in CPU");
    let remedy = "write <feature policy='require' name='x2apic'/> into <cpu> beside a model, or \
                  use <cpu mode='maximum'/>";
    let is_at_start = first < vcpus.current;
    match (has_x2apic(input), is_at_start) {
        (Some(true), _) => {}
        (Some(false), true) => findings.push(
            RuleFinding::blocking(
                RuleCode::ApicId,
                format!(
                    "vCPU {first} gets APIC ID {}, but the guest's CPU lacks x2APIC, which IDs \
                     above 254 require",
                    highest_id(input, first + 1).unwrap_or(highest)
                ),
            )
            .in_emulator(words(highest_id(input, first + 1).unwrap_or(highest)))
            .remedy(remedy),
        ),
        (Some(false), false) => findings.push(
            RuleFinding::warning(
                RuleCode::ApicId,
                format!(
                    "vCPUs from number {first} on cannot be plugged: their APIC IDs are above 254, \
                     and the guest's CPU lacks x2APIC"
                ),
            )
            .remedy(remedy),
        ),
        (None, true) => findings.push(
            RuleFinding::unknown(
                RuleCode::ApicId,
                format!("vCPU {first} requires x2APIC, and it is unknown if this CPU model has it"),
            )
            .in_emulator(words(highest_id(input, first + 1).unwrap_or(highest)))
            .remedy(remedy),
        ),
        (None, false) => {}
    }
}

/// Returns the highest APIC ID of the first `count` vCPUs. Without a topology each vCPU is a
/// socket.
fn highest_id(input: &RuleInput<'_>, count: u64) -> Option<u128> {
    match input.domain.cpu.topology {
        Some(shape) if shape.product() == u128::from(input.domain.vcpus.maximum) => {
            shape.highest_apic_id(count)
        }
        Some(_) => None,
        None => VcpuTopology::default().highest_apic_id(count),
    }
}

/// Returns the first vCPU with a wide APIC ID by bisection: IDs increase with the vCPU's number.
pub(super) fn first_wide(input: &RuleInput<'_>) -> Option<u64> {
    let (mut low, mut high) = (0, input.domain.vcpus.maximum);
    while low < high {
        let middle = low + (high - low) / 2;
        if highest_id(input, middle + 1)? < FIRST_WIDE_APIC_ID {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    (low < input.domain.vcpus.maximum).then_some(low)
}

/// True if the guest's CPU has x2APIC; `None` if that is unknown, which happens only with software
/// emulation.
pub(super) fn has_x2apic(input: &RuleInput<'_>) -> Option<bool> {
    const FEATURE: &str = "x2apic";
    if !input.is_tcg() {
        return Some(true);
    }
    match input.node.qemu_version {
        Some(version) if version < FIRST_TCG_WITH_X2APIC => return Some(false),
        None => return None,
        Some(_) => {}
    }
    let cpu = &input.domain.cpu;
    let listed = cpu.features.iter().rev().find(|f| f.name == FEATURE);
    if let Some(feature) = listed {
        return match feature.policy.as_deref() {
            Some("require" | "force") | None => Some(true),
            Some("disable" | "forbid") => Some(false),
            Some(_) => None,
        };
    }
    match (cpu.mode.as_deref(), cpu.model.as_deref()) {
        (Some("maximum"), _) => Some(true),
        (Some("host-model"), _) => {
            let host_model = input.node.cpu.as_ref()?.host_model.as_ref()?;
            let feature = host_model.features.iter().find(|f| f.name == FEATURE)?;
            Some(matches!(
                feature.policy.as_deref(),
                Some("require" | "force") | None
            ))
        }
        // The defaults of libvirt and QEMU, without x2APIC (QEMU target/i386/cpu.c).
        (None | Some("custom"), None | Some("qemu64" | "qemu32")) => {
            match cpu.matching.as_deref() {
                Some("minimum") => None,
                _ => Some(false),
            }
        }
        _ => None,
    }
}

/// Returns libvirt's check of the CPU, with its default.
pub(super) fn effective_check(input: &RuleInput<'_>) -> CpuCheck {
    input.domain.cpu.effective_check(input.is_tcg())
}
