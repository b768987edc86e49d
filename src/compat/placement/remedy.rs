//! Remedies on the node's side.

use crate::capability::{VcpuMax, Version};
use crate::compat::{Offer, Requirement, RuleCode, RuleFinding, RuleSeverity};

/// First libvirt that adds extended interrupt mode (NEWS of 10.10.0).
const FIRST_TO_ADD_EIM: Version = Version::new(10, 10, 0);

/// Prepends a remedy on the node's side to the remedy of a blocking finding.
pub(super) fn add_node_remedy(finding: &mut RuleFinding, domain: &Requirement, offer: &Offer) {
    if finding.severity != RuleSeverity::Blocks {
        return;
    }
    let remedy = match finding.code {
        RuleCode::Machine => machine(domain, offer),
        RuleCode::Eim
            if offer
                .libvirt_version
                .is_some_and(|have| have < FIRST_TO_ADD_EIM) =>
        {
            Some(format!(
                "update libvirt there to {FIRST_TO_ADD_EIM} or later"
            ))
        }
        // A label's number is the lowest of several limits.
        RuleCode::VcpusMachine if offer.accelerator_max == VcpuMax::Unlimited => {
            Some("see its NodeVirtualization for the individual limits".to_owned())
        }
        _ => None,
    };
    if let Some(remedy) = remedy {
        let rest = finding.remedy.take().map(|rest| format!("; or {rest}"));
        finding.remedy = Some(remedy + &rest.unwrap_or_default());
    }
}

/// Returns the remedy for a missing machine type. The names of upstream's machine types contain the
/// version of the first QEMU that has them.
fn machine(domain: &Requirement, offer: &Offer) -> Option<String> {
    let name = offer.canonical(domain.machine_on(offer.arch.as_deref())?);
    let mut parts = name
        .rsplit_once('-')?
        .1
        .split('.')
        .map(|part| part.parse::<u32>().ok());
    let wanted = Version::new(parts.next()??, parts.next()??, 0);
    let have = offer.qemu_version?;
    Some(if have < wanted {
        format!(
            "update QEMU there to {}.{} or later",
            wanted.major, wanted.minor
        )
    } else {
        format!("give the domain a newer machine type: QEMU {have} there has removed this one")
    })
}
