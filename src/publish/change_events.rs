//! Events about virtual machines whose guests have not taken a change by another client. Pure.

use k8s_openapi::api::core::v1::ObjectReference;

use crate::cluster::{EventKind, ObjectEvent};
use crate::hotplug::Verdict;
use crate::hotplug::external::ExternalChange;

/// Returns the event about a change: its verdict unless it is Verified.
///
/// `None` before the verdict and after its correction, for a domain that ended, and for a state that was
/// found when the domain was first seen, which a restart of the daemon would report again.
pub fn of_change(
    instance: ObjectReference,
    pod: ObjectReference,
    change: &ExternalChange,
) -> Option<ObjectEvent> {
    let verdict = change.verdict?;
    let is_silent = matches!(verdict, Verdict::Verified | Verdict::DomainNotRunning);
    if is_silent || change.corrected.is_some() || change.found {
        return None;
    }
    let message = change.message.as_deref().unwrap_or_default();
    let remedy = change.diagnosis.as_ref();
    let remedy = remedy.map_or_else(String::new, |diagnosis| {
        format!(". Remedy: {}", diagnosis.remedy)
    });
    Some(ObjectEvent {
        about: instance,
        related: Some(pod),
        kind: EventKind::Warning,
        reason: verdict.as_str().to_owned(),
        action: "VerifyChange",
        note: format!("{} {}: {message}{remedy}", change.action, change.resource),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(change: &serde_json::Value) -> Option<ObjectEvent> {
        let reference = |kind: &str| ObjectReference {
            kind: Some(kind.to_owned()),
            ..ObjectReference::default()
        };
        let change: ExternalChange = serde_json::from_value(change.clone()).unwrap();
        let instance = reference("VirtualMachineInstance");
        of_change(instance, reference("Pod"), &change)
    }

    #[test]
    fn only_the_first_verdict_against_a_guest_is_an_event() {
        let time = "2026-11-21T11:22:46Z";
        let mut change = json!({
            "resource": "vcpus",
            "action": "plug",
            "noticed": time,
            "verdict": "GuestRefused",
            "message": "it dropped the others",
            "diagnosis": {"code": "nr-cpus", "seen": "x", "remedy": "raise nr_cpus="},
        });
        let refused = event(&change).unwrap();
        assert_eq!(refused.reason, "GuestRefused");
        assert_eq!(
            refused.note,
            "plug vcpus: it dropped the others. Remedy: raise nr_cpus="
        );
        assert_eq!(refused.related.unwrap().kind.as_deref(), Some("Pod"));
        change["found"] = true.into();
        assert_eq!(event(&change), None);
        change["found"] = false.into();
        change["corrected"] = time.into();
        change["verdict"] = "Verified".into();
        assert_eq!(event(&change), None);
        change["verdict"] = serde_json::Value::Null;
        assert_eq!(event(&change), None);
    }
}
