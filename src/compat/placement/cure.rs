//! What would make a node fit, where that is not changing the domain.

use crate::capability::{VcpuMax, Version};
use crate::compat::{Offer, Requirement, RuleCode, RuleFinding, RuleSeverity};

/// libvirt adds extended interrupt mode by itself since then (NEWS of 10.10.0).
const ADDS_EIM: Version = Version::new(10, 10, 0);

/// Gives a finding that blocks the remedy on the node's side, in front of the one on the domain's.
pub(super) fn for_node(finding: &mut RuleFinding, domain: &Requirement, offer: &Offer) {
    if finding.severity != RuleSeverity::Blocks {
        return;
    }
    let cure = match finding.code {
        RuleCode::Machine => machine(domain, offer),
        RuleCode::Eim if offer.libvirt_version.is_some_and(|have| have < ADDS_EIM) => {
            Some(format!("update libvirt there to {ADDS_EIM} or later"))
        }
        // A label's number is the lowest of all limits.
        RuleCode::VcpusMachine if offer.accelerator_max == VcpuMax::Unlimited => {
            Some("see its NodeVirtualization for which limit it is".to_owned())
        }
        _ => None,
    };
    if let Some(cure) = cure {
        let rest = finding.remedy.take().map(|rest| format!("; or {rest}"));
        finding.remedy = Some(cure + &rest.unwrap_or_default());
    }
}

/// Upstream's machine types carry the version of the QEMU that brought them.
fn machine(domain: &Requirement, offer: &Offer) -> Option<String> {
    let name = offer.canonical(domain.machine_on(offer.arch.as_deref())?);
    let mut parts = name
        .rsplit_once('-')?
        .1
        .split('.')
        .map(|part| part.parse::<u32>().ok());
    let wanted = Version::new(parts.next()??, parts.next()??, 0);
    let have = offer.qemu_version?;
    Some(match have < wanted {
        true => format!(
            "update QEMU there to {}.{} or later",
            wanted.major, wanted.minor
        ),
        false => {
            format!("give the domain a newer machine type: QEMU {have} there has dropped this one")
        }
    })
}
