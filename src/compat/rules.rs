//! Applies the rules of libvirt and QEMU to a domain and a node.
//!
//! Each file holds the rules of one subject and pushes its findings; no rule reads the findings of
//! another. [`assess`] calls them in the order in which libvirt checks, so that the first blocking
//! finding is the error that libvirt reports. A rule that needs an unknown property of the node
//! yields [`RuleSeverity::Unknown`] and never guesses.
//!
//! Messages of libvirt and QEMU are quoted verbatim from libvirt 11.3 with QEMU 10.0 unless another
//! version is named; tests/it/foretold.rs provokes each of them.

mod cpu;
mod cpu_match;
mod cpu_words;
mod devices;
mod enlightenments;
mod features;
mod firmware;
mod headroom;
mod host;
mod iommu;
mod machine;
mod memory;
mod node;
mod not_checked;
#[cfg(test)]
mod rules_tests;
mod vcpus;

use serde::Serialize;

pub use self::headroom::{Headroom, MemoryRoom, VcpuRoom, headroom};
pub(crate) use self::host::tsc_range;
use super::{Feasibility, NotChecked, Offer, Requirement, RuleFinding, RuleSeverity};
use crate::capability::{Version, is_q35, is_x86};

/// The result of all rules for one domain on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Assessment {
    pub answer: Feasibility,
    /// Ordered by severity, the worst first.
    pub findings: Vec<RuleFinding>,
    /// Never empty: a start depends on more than a check covers.
    pub not_checked: Vec<NotChecked>,
    /// `None` if the definition contradicts itself.
    pub headroom: Option<Headroom>,
}

impl Assessment {
    /// Adds findings and updates the answer.
    #[must_use]
    pub fn with(mut self, findings: impl IntoIterator<Item = RuleFinding>) -> Self {
        self.findings.extend(findings);
        self.findings.sort_by_key(|finding| finding.severity);
        self.answer = Feasibility::of(&self.findings);
        self
    }

    /// Returns the findings that keep the domain from running.
    pub fn blocking(&self) -> impl Iterator<Item = &RuleFinding> {
        self.findings
            .iter()
            .filter(|finding| finding.severity == RuleSeverity::Blocks)
    }
}

/// Returns the feasibility of a domain on a node, with every reason and remedy.
///
/// The offer must be for the domain's architecture and domain type.
pub fn assess(domain: &Requirement, node: &Offer) -> Assessment {
    let input = RuleInput::new(domain, node);
    let mut findings = Vec::new();
    machine::check(&input, &mut findings);
    firmware::check(&input, &mut findings);
    devices::check(&input, &mut findings);
    vcpus::check(&input, &mut findings);
    iommu::check(&input, &mut findings);
    cpu::check(&input, &mut findings);
    enlightenments::check(&input, &mut findings);
    memory::check(&input, &mut findings);
    node::check(&input, &mut findings);
    host::check(&input, &mut findings);
    let assessment = Assessment {
        answer: Feasibility::Feasible,
        findings: Vec::new(),
        not_checked: not_checked::list(&input),
        headroom: headroom::compute(&input),
    };
    assessment.with(findings)
}

/// The two sides, and properties that several rules derive from them.
struct RuleInput<'a> {
    domain: &'a Requirement,
    node: &'a Offer,
    /// The machine type by canonical name, if the alias is known.
    machine: Option<&'a str>,
    arch: Option<&'a str>,
}

/// Maximum number of vCPUs on x86 without extended interrupt mode (`QEMU_MAX_VCPUS_WITHOUT_EIM`,
/// libvirt src/qemu/qemu_validate.h).
const MAX_VCPUS_WITHOUT_EIM: u64 = 255;

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

    /// True for the machine type `virt` of Arm and RISC-V.
    fn is_virt(&self) -> bool {
        self.machine
            .is_some_and(|name| name == "virt" || name.starts_with("virt-"))
    }

    fn is_pseries(&self) -> bool {
        self.machine.is_some_and(|name| name.starts_with("pseries"))
    }

    /// Returns the forbidden CPU features that the host model does not add to its named model.
    fn forbidden_beyond_host_model(&self) -> impl Iterator<Item = &'a str> {
        let modes = self.node.cpu.as_ref();
        let adds = move |name: &str| modes.is_some_and(|modes| modes.adds_to_host_model(name));
        self.domain.cpu.forbidden().filter(move |name| !adds(name))
    }

    fn virt_type(&self) -> Option<&'a str> {
        let own = self.domain.virt_type.as_deref();
        own.or(self.node.virt_type.as_deref())
    }

    /// True for software emulation.
    fn is_tcg(&self) -> bool {
        self.virt_type() == Some("qemu")
    }

    fn needs_eim(&self) -> bool {
        self.is_x86() && self.domain.vcpus.maximum > MAX_VCPUS_WITHOUT_EIM
    }

    /// Returns a clause that reminds the reader that fewer vCPUs at start make no difference.
    fn maximum_counts(&self) -> String {
        let vcpus = &self.domain.vcpus;
        if vcpus.current < vcpus.maximum {
            format!("; the maximum counts, not the {} at start", vcpus.current)
        } else {
            String::new()
        }
    }

    /// True if libvirt has at least this version; `None` if its version is unknown.
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

/// Returns libvirt's message for `VIR_ERR_CONFIG_UNSUPPORTED`.
fn unsupported(text: impl std::fmt::Display) -> String {
    format!("unsupported configuration: {text}")
}

/// Returns a list for a sentence, truncated to 12 names.
fn named<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    const SHOWN: usize = 12;
    let names: Vec<&str> = names.into_iter().collect();
    match names.len().checked_sub(SHOWN) {
        Some(rest) if rest > 0 => format!("{} and {rest} more", names[..SHOWN].join(", ")),
        _ => names.join(", "),
    }
}
