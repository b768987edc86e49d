//! What people should see on the Node beside its labels: libvirt lost and back, and hotplug that
//! did not end well.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::events::EventRecorder;
use crate::cluster::{EventKind, ObjectEvent};
use crate::hotplug::Verdict;
use crate::hypervisor::Connection;
use crate::operation::Record;

/// libvirt may restart within this time without an event.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tells of the hypervisor on the Node until `token` is cancelled: that it is lost, after a moment
/// of patience, and then that it is back.
pub async fn report_hypervisor(
    events: EventRecorder,
    node: ObjectReference,
    connection: watch::Receiver<Connection>,
    token: CancellationToken,
) {
    token
        .run_until_cancelled(follow(connection, |lost| {
            events.record(hypervisor(&node, lost));
        }))
        .await;
}

/// Calls `tell` with `true` when the connection was down for [`PATIENCE`], and with `false` when
/// it is up again after that.
async fn follow(mut connection: watch::Receiver<Connection>, tell: impl Fn(bool)) {
    let mut lost = false;
    let mut down_since = Instant::now();
    loop {
        let is_down = *connection.borrow_and_update() == Connection::Down;
        if lost && !is_down {
            lost = false;
            tell(false);
        }
        tokio::select! {
            changed = connection.changed() => {
                if changed.is_err() {
                    return;
                }
                if !is_down {
                    down_since = Instant::now();
                }
            }
            () = sleep_until(down_since + PATIENCE), if is_down && !lost => {
                lost = true;
                tell(true);
            }
        }
    }
}

fn hypervisor(node: &ObjectReference, lost: bool) -> ObjectEvent {
    let (kind, reason, note) = match lost {
        true => (
            EventKind::Warning,
            "HypervisorLost",
            "There is no connection to libvirt. Labels stay as they are, hotplug is refused; virtnode goes on trying.",
        ),
        false => (
            EventKind::Normal,
            "HypervisorBack",
            "There is a connection to libvirt again.",
        ),
    };
    ObjectEvent {
        about: node.clone(),
        kind,
        reason: reason.to_owned(),
        action: "Connect",
        note: note.to_owned(),
    }
}

/// What is to be told on the Node of an operation: its verdict, unless all is proven.
///
/// `None` while there is no verdict, and for one that was put right later, which was told when it
/// was given.
pub fn of_operation(node: &ObjectReference, record: &Record) -> Option<ObjectEvent> {
    let verdict = record.verdict?;
    if verdict == Verdict::Verified || record.corrected.is_some() {
        return None;
    }
    let message = record.message.as_deref().unwrap_or_default();
    Some(ObjectEvent {
        about: node.clone(),
        kind: EventKind::Warning,
        reason: format!("Hotplug{verdict}"),
        action: "Hotplug",
        // A tenant's text.
        note: format!("domain {:?}: {message}", record.domain.name),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_restart_of_libvirt_is_no_news_and_a_loss_is() {
        let (sender, receiver) = watch::channel(Connection::Up(1));
        let told = Mutex::new(Vec::new());
        let follow = follow(receiver, |lost| told.lock().unwrap().push(lost));
        let story = async {
            let steps = [
                (Connection::Down, PATIENCE / 2, vec![]),
                (Connection::Up(2), PATIENCE * 2, vec![]),
                (Connection::Down, PATIENCE * 2, vec![true]),
                (Connection::Up(3), PATIENCE * 2, vec![true, false]),
                (Connection::Up(4), PATIENCE * 2, vec![true, false]),
            ];
            for (state, wait, expected) in steps {
                sender.send_replace(state);
                tokio::time::sleep(wait).await;
                assert_eq!(*told.lock().unwrap(), expected, "{state:?}");
            }
            drop(sender);
        };
        tokio::join!(follow, story);
    }

    #[tokio::test(start_paused = true)]
    async fn a_libvirt_that_never_came_is_lost_too() {
        let (sender, receiver) = watch::channel(Connection::Down);
        let told = Mutex::new(Vec::new());
        let follow = follow(receiver, |lost| told.lock().unwrap().push(lost));
        let story = async {
            tokio::time::sleep(PATIENCE * 5).await;
            drop(sender);
        };
        tokio::join!(follow, story);
        assert_eq!(told.into_inner().unwrap(), [true]);
    }
}
