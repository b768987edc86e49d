//! Connects the verifier of external changes with the Events of virtual machines.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::LauncherPods;
use crate::domain::ConnectionId;
use crate::external::ChangeListener;
use crate::publish::change_events::of_change;
use crate::publish::events::EventRecorder;

/// Minimum time between two Events of one launcher, which can make up as many changes as it likes.
const EVENT_INTERVAL: Duration = Duration::from_secs(5);

/// Returns a listener that records an Event on the VirtualMachineInstance of each change that a guest
/// has not taken, if the API server confirms the launcher's identity.
pub(super) fn record_events(events: EventRecorder, pods: LauncherPods) -> ChangeListener {
    let last: Mutex<HashMap<String, Instant>> = Mutex::default();
    Box::new(move |domain, change| {
        let ConnectionId::Launcher { pod: uid } = &domain.connection else {
            return;
        };
        let Ok(pod) = pods.verify(uid, domain.namespace_and_name()) else {
            return;
        };
        let event = of_change(pod.instance_reference(), pod.pod_reference(), change);
        let Some(event) = event else { return };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|_, at| at.elapsed() < EVENT_INTERVAL);
        if last.insert(uid.clone(), Instant::now()).is_none() {
            events.record(event);
        }
    })
}
