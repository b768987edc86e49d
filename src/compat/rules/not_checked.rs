//! Lists the parts of a domain and of a node that no rule covers.

use super::RuleInput;
use crate::compat::NotChecked;

/// Returns the subjects that the computed answer does not cover.
pub(super) fn list(_input: &RuleInput<'_>) -> Vec<NotChecked> {
    vec![
        NotChecked::new(
            "disks, networks, graphics and other devices",
            "no rule compares them with the node",
        ),
        NotChecked::new(
            "files, images, networks and host devices that the definition names",
            "no document describes them",
        ),
        NotChecked::new(
            "the start itself (free memory, cgroups, KVM, permissions)",
            "only a start shows it",
        ),
    ]
}
