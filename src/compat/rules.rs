//! A domain held against a node.
//!
//! The rules are those of libvirt and QEMU, in the order in which libvirt looks: the first finding
//! that blocks is what it will complain of. Words were taken down from libvirt 11.3 with QEMU 10.0
//! where no other version is named (tests/it/foretold.rs provokes them).

mod cpu;
mod enlightenments;
mod features;
mod headroom;
mod iommu;
mod machine;
mod memory;
mod node;
#[cfg(test)]
mod rules_tests;
mod vcpus;

use serde::Serialize;

pub use self::headroom::{Headroom, MemoryRoom, VcpuRoom};
use super::{Feasibility, Offer, Requirement, RuleFinding, RuleSeverity};
use crate::capability::{Version, is_q35, is_x86};

/// What came of holding a domain against a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Assessment {
    /// Whether the domain would run there.
    pub answer: Feasibility,
    /// All that was found, what blocks first.
    pub findings: Vec<RuleFinding>,
    /// What could be plugged into it while it runs; `None` where the definition contradicts
    /// itself.
    pub headroom: Option<Headroom>,
}

impl Assessment {
    /// Takes up more findings, and answers anew.
    #[must_use]
    pub fn with(mut self, findings: impl IntoIterator<Item = RuleFinding>) -> Self {
        self.findings.extend(findings);
        self.findings.sort_by_key(|finding| finding.severity);
        self.answer = match self.findings.first().map(|finding| finding.severity) {
            Some(RuleSeverity::Blocks) => Feasibility::Infeasible,
            Some(RuleSeverity::Unknown) => Feasibility::Unknown,
            _ => Feasibility::Feasible,
        };
        self
    }

    /// What keeps the domain from running there.
    pub fn blocking(&self) -> impl Iterator<Item = &RuleFinding> {
        self.findings
            .iter()
            .filter(|finding| finding.severity == RuleSeverity::Blocks)
    }
}

/// Whether a domain would run on a node, with every reason and remedy.
///
/// The offer has to be for the domain's architecture and domain type.
pub fn assess(domain: &Requirement, node: &Offer) -> Assessment {
    let case = RuleInput::new(domain, node);
    let mut findings = Vec::new();
    machine::check(&case, &mut findings);
    vcpus::check(&case, &mut findings);
    iommu::check(&case, &mut findings);
    cpu::check(&case, &mut findings);
    enlightenments::check(&case, &mut findings);
    memory::check(&case, &mut findings);
    node::check(&case, &mut findings);
    let headroom = headroom::of(&case);
    let fit = Assessment {
        answer: Feasibility::Feasible,
        findings: Vec::new(),
        headroom,
    };
    fit.with(findings)
}

/// The two sides, and what several rules want to know of them.
struct RuleInput<'a> {
    domain: &'a Requirement,
    node: &'a Offer,
    /// The machine type by canonical name, as far as it can be told.
    machine: Option<&'a str>,
    arch: Option<&'a str>,
}

/// More than so many vCPUs need extended interrupt mode on x86 (`QEMU_MAX_VCPUS_WITHOUT_EIM`,
/// libvirt src/qemu/qemu_validate.h).
const MOST_WITHOUT_EIM: u64 = 255;

impl<'a> RuleInput<'a> {
    fn new(domain: &'a Requirement, node: &'a Offer) -> Self {
        let arch = domain.arch.as_deref().or(node.arch.as_deref());
        Self {
            domain,
            node,
            machine: domain.machine_on(arch).map(|name| node.canonical(name)),
            arch,
        }
    }

    fn is_x86(&self) -> bool {
        self.arch.is_some_and(is_x86)
    }

    fn is_q35(&self) -> bool {
        self.machine.is_some_and(is_q35)
    }

    /// Arm's and RISC-V's `virt`.
    fn is_virt(&self) -> bool {
        self.machine
            .is_some_and(|name| name == "virt" || name.starts_with("virt-"))
    }

    fn is_pseries(&self) -> bool {
        self.machine.is_some_and(|name| name.starts_with("pseries"))
    }

    fn virt_type(&self) -> Option<&'a str> {
        let own = self.domain.virt_type.as_deref();
        own.or(self.node.virt_type.as_deref())
    }

    /// Whether QEMU translates every instruction.
    fn is_tcg(&self) -> bool {
        self.virt_type() == Some("qemu")
    }

    fn needs_eim(&self) -> bool {
        self.is_x86() && self.domain.vcpus.maximum > MOST_WITHOUT_EIM
    }

    /// The clause that people miss: with fewer vCPUs to start with it is no different.
    fn maximum_counts(&self) -> String {
        let vcpus = &self.domain.vcpus;
        match vcpus.current < vcpus.maximum {
            true => format!(
                "; the maximum counts, not the {} to start with",
                vcpus.current
            ),
            false => String::new(),
        }
    }

    /// Whether libvirt is at least this version; `None` if it is not known.
    fn libvirt_is(&self, version: Version) -> Option<bool> {
        self.node.libvirt_version.map(|have| have >= version)
    }

    fn emulator(&self) -> String {
        match (&self.node.emulator, self.arch) {
            (Some(path), _) => path.clone(),
            (None, arch) => format!("/usr/bin/qemu-system-{}", arch.unwrap_or("x86_64")),
        }
    }
}

/// `libvirt` prefixes most refusals so (`VIR_ERR_CONFIG_UNSUPPORTED`).
fn unsupported(text: impl std::fmt::Display) -> String {
    format!("unsupported configuration: {text}")
}

/// A list for a sentence, cut to what one can read.
fn named<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    const SHOWN: usize = 12;
    let names: Vec<&str> = names.into_iter().collect();
    match names.len().checked_sub(SHOWN) {
        Some(rest) if rest > 0 => format!("{} and {rest} more", names[..SHOWN].join(", ")),
        _ => names.join(", "),
    }
}
