//! The domains whose guests have not taken a change, for the status. Pure.

use crate::cluster::objects::node_virtualization::DomainChangeStatus;
use crate::external::NotTaken;
use crate::units::bounded;

/// Maximum number of listed changes.
const CHANGES_MAX: usize = 32;
/// Maximum bytes in JSON of each text that a tenant or a guest chooses.
const TEXT_MAX: usize = 100;
/// Maximum bytes in JSON of a message.
const MESSAGE_MAX: usize = 160;

/// Returns the status of some changes, in the order of the domains' names.
pub(super) fn domain_changes(not_taken: &[NotTaken]) -> Vec<DomainChangeStatus> {
    let mut changes: Vec<DomainChangeStatus> = not_taken.iter().map(status).collect();
    changes.sort_by(|a, b| {
        let key = |change: &DomainChangeStatus| {
            let name = (change.namespace.clone(), change.name.clone());
            (name, change.uuid.clone(), change.resource.clone())
        };
        key(a).cmp(&key(b))
    });
    changes.truncate(CHANGES_MAX);
    changes
}

fn status(change: &NotTaken) -> DomainChangeStatus {
    let domain = &change.domain;
    let text = |text: &str| bounded(text, TEXT_MAX);
    let (namespace, name) = match domain.namespace_and_name() {
        Some((namespace, name)) => (Some(text(namespace)), name),
        None => (None, domain.name.as_str()),
    };
    DomainChangeStatus {
        namespace,
        name: text(name),
        uuid: text(&domain.uuid),
        resource: change.resource.as_str().to_owned(),
        action: change.action.as_str().to_owned(),
        device: change.device.as_deref().map(text),
        verdict: change.verdict.as_str().to_owned(),
        message: bounded(&change.message, MESSAGE_MAX),
        since: Some(change.since),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{ConnectionId, DomainRef};
    use crate::hotplug::Verdict;
    use crate::hotplug::external::{ChangedResource, ExternalAction};
    use crate::units::Timestamp;

    #[test]
    fn hostile_domains_stay_within_their_share_of_the_object() {
        let long = |c: &str| c.repeat(5_000);
        let hostile = |number: usize| NotTaken {
            domain: DomainRef {
                connection: ConnectionId::launcher("p"),
                uuid: long("u"),
                name: format!("{}{number}_{}", long("\u{1}"), long("\u{1}")),
            },
            resource: ChangedResource::Interface,
            action: ExternalAction::Detach,
            device: Some(long("\"")),
            verdict: Verdict::PartiallyApplied,
            message: long("\n"),
            since: Timestamp::from_millis(0),
        };
        let all: Vec<NotTaken> = (0..100).map(hostile).collect();
        let changes = domain_changes(&all);
        assert_eq!(changes.len(), CHANGES_MAX);
        let bytes = serde_json::to_vec(&changes).unwrap().len();
        assert!(bytes < 26 << 10, "{bytes}");
    }
}
