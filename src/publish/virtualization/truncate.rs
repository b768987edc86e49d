//! Size limit of a status: larger objects burden the API server and all clients that watch them.

use crate::cluster::objects::NodeVirtualizationStatus;

/// Maximum bytes of the status as JSON; the metadata has the rest of 64 KiB.
pub(super) const STATUS_MAX: usize = 56 * 1024;

/// Removes parts of a status in a fixed order until it fits, and lists them in `omitted`.
pub(super) fn truncate(status: &mut NodeVirtualizationStatus, max: usize) {
    for (name, remove) in OPTIONAL_PARTS {
        if size(status) <= max {
            return;
        }
        remove(status);
        if !status.omitted.iter().any(|omitted| omitted == name) {
            status.omitted.push(name.to_owned());
        }
    }
}

type OptionalPart = (&'static str, fn(&mut NodeVirtualizationStatus));

/// The parts that may be removed, least important first. The host's own machine types and the usable
/// models are always kept.
const OPTIONAL_PARTS: [OptionalPart; 5] = [
    ("foreignMachines", |status| {
        for guest in status.guests.iter_mut().skip(1) {
            guest.machines.clear();
        }
    }),
    ("blockers", |status| {
        for model in &mut status.cpu.models {
            model.blockers.clear();
        }
    }),
    ("unusableModels", |status| {
        status.cpu.models.retain(|model| model.usable == "yes");
    }),
    ("features", |status| status.cpu.features.clear()),
    ("domains", |status| status.domains.clear()),
];

fn size(status: &NodeVirtualizationStatus) -> usize {
    serde_json::to_vec(status).map_or(usize::MAX, |json| json.len())
}
