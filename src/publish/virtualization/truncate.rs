//! Making a status fit: objects of more than 64 KiB are a burden for everybody who watches them.

use crate::cluster::objects::NodeVirtualizationStatus;

/// The most that a status may be, as JSON; the metadata has the rest of 64 KiB.
pub(super) const STATUS_MAX: usize = 56 * 1024;

/// Takes parts out of a status, in a fixed order, until it is small enough, and writes down which.
pub(super) fn truncate(status: &mut NodeVirtualizationStatus, max: usize) {
    for (name, drop) in PARTS {
        if size(status) <= max {
            return;
        }
        drop(status);
        if !status.omitted.iter().any(|omitted| omitted == name) {
            status.omitted.push(name.to_owned());
        }
    }
}

type Part = (&'static str, fn(&mut NodeVirtualizationStatus));

/// What is given up, the least missed first: the host's own machine types and the models that can
/// be used never are.
const PARTS: [Part; 4] = [
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
];

/// The length of its JSON.
pub(super) fn size(status: &NodeVirtualizationStatus) -> usize {
    serde_json::to_vec(status).map_or(usize::MAX, |json| json.len())
}
