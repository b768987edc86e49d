//! Events about the Node beside those of its labels: libvirt lost and reconnected, and hotplug
//! operations whose verdict is not Verified.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::events::EventRecorder;
use super::wait_until;
use crate::cluster::{EventKind, ObjectEvent};
use crate::hotplug::Verdict;
use crate::hypervisor::ConnectionState;
use crate::operation::Record;

/// Minimum duration of an outage that is reported: a restart of libvirt takes less.
const OUTAGE_MIN: Duration = Duration::from_secs(10);

/// Records an event when the hypervisor has been disconnected for [`OUTAGE_MIN`], and another when it
/// is connected again. Runs until `token` is cancelled.
pub async fn report_hypervisor(
    events: EventRecorder,
    node: ObjectReference,
    connection: watch::Receiver<ConnectionState>,
    token: CancellationToken,
) {
    let report = |lost| events.record(hypervisor_event(&node, lost));
    token.run_until_cancelled(follow(connection, report)).await;
}

/// Calls `report` with `true` at the start of an outage, and with `false` at its end.
async fn follow(mut connection: watch::Receiver<ConnectionState>, report: impl Fn(bool)) {
    let mut lost = false;
    let mut down_since = Instant::now();
    loop {
        let is_down = *connection.borrow_and_update() == ConnectionState::Down;
        if lost && !is_down {
            lost = false;
            report(false);
        }
        let lost_at = (is_down && !lost).then(|| down_since + OUTAGE_MIN);
        tokio::select! {
            changed = connection.changed() => {
                if changed.is_err() {
                    return;
                }
                if !is_down {
                    down_since = Instant::now();
                }
            }
            () = wait_until(lost_at) => {
                lost = true;
                report(true);
            }
        }
    }
}

fn hypervisor_event(node: &ObjectReference, lost: bool) -> ObjectEvent {
    let (kind, reason, note) = if lost {
        (
            EventKind::Warning,
            "HypervisorLost",
            "libvirt is not connected. Labels are kept, hotplug is rejected, and virtnode keeps reconnecting.",
        )
    } else {
        (
            EventKind::Normal,
            "HypervisorBack",
            "libvirt is connected again.",
        )
    };
    ObjectEvent {
        about: node.clone(),
        related: None,
        kind,
        reason: reason.to_owned(),
        action: "Connect",
        note: note.to_owned(),
    }
}

/// Returns the event about an operation: its verdict unless it is Verified.
///
/// `None` before the verdict, and after its correction: the first verdict has been reported.
pub fn of_operation(node: &ObjectReference, record: &Record) -> Option<ObjectEvent> {
    let verdict = record.verdict?;
    if verdict == Verdict::Verified || record.corrected.is_some() {
        return None;
    }
    let message = record.message.as_deref().unwrap_or_default();
    Some(ObjectEvent {
        about: node.clone(),
        related: None,
        kind: EventKind::Warning,
        reason: format!("Hotplug{verdict}"),
        action: "Hotplug",
        // Quoted, because the tenant chose the name.
        note: format!("domain {:?}: {message}", record.domain.display_name()),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_outages_of_ten_seconds_are_reported() {
        let (sender, receiver) = watch::channel(ConnectionState::Up(1));
        let reports = Mutex::new(Vec::new());
        let follow = follow(receiver, |lost| reports.lock().unwrap().push(lost));
        let connections = async {
            let steps = [
                (ConnectionState::Down, OUTAGE_MIN / 2, vec![]),
                (ConnectionState::Up(2), OUTAGE_MIN * 2, vec![]),
                (ConnectionState::Down, OUTAGE_MIN * 2, vec![true]),
                (ConnectionState::Up(3), OUTAGE_MIN * 2, vec![true, false]),
                (ConnectionState::Up(4), OUTAGE_MIN * 2, vec![true, false]),
            ];
            for (state, wait, expected) in steps {
                sender.send_replace(state);
                tokio::time::sleep(wait).await;
                assert_eq!(*reports.lock().unwrap(), expected, "{state:?}");
            }
            drop(sender);
        };
        tokio::join!(follow, connections);
    }

    #[tokio::test(start_paused = true)]
    async fn hypervisor_that_never_connects_is_reported() {
        let (sender, receiver) = watch::channel(ConnectionState::Down);
        let reports = Mutex::new(Vec::new());
        let follow = follow(receiver, |lost| reports.lock().unwrap().push(lost));
        let connections = async {
            tokio::time::sleep(OUTAGE_MIN * 5).await;
            drop(sender);
        };
        tokio::join!(follow, connections);
        assert_eq!(reports.into_inner().unwrap(), [true]);
    }
}
