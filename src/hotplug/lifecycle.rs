//! Rules that are the same for every kind of resource: ended domains, failed calls, lost answers.

use super::history::{Call, Contact, History, Return};
use super::outcome::{Conclusion, Diagnosis, Ruling};
use super::{Action, Event, Verdict};
use crate::domain::{CallError, DomainState, Job};
use crate::units::Timestamp;

/// Returns a finding if the domain ended during the operation or no longer exists.
pub(super) fn ended(history: &History) -> Option<Conclusion> {
    let stopped = |message: String| Some(Conclusion::new(Verdict::DomainNotRunning, message));
    if history.contact() == Some(&Contact::Absent) {
        return if history.calls().is_empty() && !history.by_another {
            Some(Conclusion::new(
                Verdict::DomainNotFound,
                "there is no such domain",
            ))
        } else {
            stopped(format!("the domain ended {}", during(history)))
        };
    }
    let end = history.all_events().find_map(|(_, event)| match event {
        Event::Stopped(why) => Some(why),
        _ => None,
    });
    if let Some(why) = end {
        return stopped(format!("the domain ended {}: {why}", during(history)));
    }
    let (before, latest) = (&history.before.domain, &history.latest().domain);
    match latest.state {
        DomainState::ShutOff | DomainState::Crashed => {
            stopped(format!("the domain is {}", history.latest().state()))
        }
        _ if latest.id != before.id => {
            stopped(format!("the domain was restarted {}", during(history)))
        }
        _ => None,
    }
}

/// Returns the time of an event in words.
fn during(history: &History) -> &'static str {
    if history.by_another {
        "before its guest could be judged"
    } else {
        "during the operation"
    }
}

/// Returns the ruling that the last call requires before any evidence about the guest counts;
/// `None` if it requires none. `done` is true if the live XML shows the requested state.
pub(super) fn after_call(history: &History, now: Timestamp, done: bool) -> Option<Ruling> {
    let over = history.is_over(now);
    // A failed call to the agent is evidence about the guest, not an error of the hypervisor.
    let ours = |call: &&Call| !matches!(call.action, Action::OnlineVcpus { .. });
    let call = history.changes().next_back().filter(ours)?;
    let (at, error) = match &call.returned {
        None => return (over && !done).then(|| still_running(history)),
        Some((_, Return::Done)) => return None,
        Some((at, Return::Failed(error))) => (*at, error),
    };
    match error {
        CallError::UnplugPending { .. } => None,
        CallError::Busy { text, .. } if over => Some(Ruling::Conclude(Conclusion::new(
            Verdict::Busy,
            format!(
                "{} held the domain until the deadline: {text}",
                job_name(history)
            ),
        ))),
        CallError::Busy { .. } if history.may_call() => Some(Ruling::Call(call.action.clone())),
        CallError::Busy { .. } => None,
        CallError::NotFound(text) | CallError::NotRunning(text) => Some(Ruling::Conclude(
            Conclusion::new(Verdict::DomainNotRunning, text_or_default(text)),
        )),
        CallError::Overdue { .. } if over && !done => Some(still_running(history)),
        CallError::Overdue { .. } => None,
        CallError::Lost(_) | CallError::Unavailable(_) => lost(history, call, at, now),
        // Parts of the call may have been carried out before the error, so observe first.
        CallError::AgentSilent { text, .. }
        | CallError::AgentRefused { text, .. }
        | CallError::Denied { text, .. }
        | CallError::Unsupported { text, .. }
        | CallError::Unreadable { text, .. }
        | CallError::Ambiguous(text)
        | CallError::Failed { text, .. } => {
            if history.latest().at < at && !over {
                return Some(Ruling::wait("an observation after the failed call"));
            }
            // The call repeats a lost one that had been carried out.
            let was_done =
                history.times_lost(&call.action) > 0 && call.action.is_shown(history.latest());
            // The guest was asked before, and its reaction decides.
            let was_asked = repeated_unplug_error(history).is_some();
            (!was_done && !was_asked).then(|| Ruling::Conclude(error_finding(history, call, text)))
        }
    }
}

/// Returns the last call and libvirt's text if that call repeated an unplug that had timed out, and
/// failed for another reason.
///
/// libvirt 9.0 cannot be informed that QEMU has removed a vCPU: it asks QEMU to remove it, QEMU has no
/// such device, and libvirt fails without a cause (measured). libvirt 11.3 succeeds.
pub(super) fn repeated_unplug_error(history: &History) -> Option<(&Call, &str)> {
    let (last, earlier) = history.calls().split_last()?;
    let text = match last.error()? {
        CallError::AgentSilent { text, .. }
        | CallError::AgentRefused { text, .. }
        | CallError::Denied { text, .. }
        | CallError::Unsupported { text, .. }
        | CallError::Unreadable { text, .. }
        | CallError::Ambiguous(text)
        | CallError::Failed { text, .. } => text,
        _ => return None,
    };
    let timed_out = |call: &Call| call.action == last.action && call.is_pending_unplug();
    let is_repeated = earlier.iter().any(timed_out);
    is_repeated.then_some((last, text.as_str()))
}

/// Maximum number of times that a call is made whose answer is lost every time.
const MAX_LOST_CALLS: usize = 3;

/// Rules on a call that may or may not have reached libvirt: the domain shows what became of it.
fn lost(history: &History, call: &Call, at: Timestamp, now: Timestamp) -> Option<Ruling> {
    let over = history.is_over(now);
    if let (Some(Contact::Unreachable(why)), true) = (history.contact(), over) {
        return Some(Ruling::Conclude(unreachable(why)));
    }
    if is_unsettled(history, call) {
        let moment = at.after(history.terms.patience.appear);
        return Some(if now < moment {
            Ruling::wait_until("evidence that libvirt received the request", moment)
        } else {
            Ruling::wait("an observation after the lost call")
        });
    }
    let latest = history.latest();
    if call.action.is_shown(latest) {
        return None;
    }
    let is_open = call.action.is_open(&history.before, latest);
    if is_open && !over && history.times_lost(&call.action) < MAX_LOST_CALLS && history.may_call() {
        return Some(Ruling::Call(call.action.clone()));
    }
    // A pending unplug of a vCPU does not show in the live XML.
    let may_be_pending = is_open && matches!(call.action, Action::SetVcpus { .. });
    if may_be_pending && call.action.is_unplug(&history.before) {
        None
    } else {
        Some(Ruling::Conclude(Conclusion::new(
            Verdict::HypervisorError,
            if is_open {
                "the connection or virtnode ended during the call, and the domain is unchanged: \
                 ask again"
            } else {
                "the connection or virtnode ended during the call, and the domain is in neither \
                 the old nor the requested state: something else changed it; check it and ask again"
            },
        )))
    }
}

/// True if it is too early to know what became of a call whose answer was lost.
///
/// libvirt reads and serves its clients' requests in the order of arrival (rpc/virnetserver.c: one
/// queue of jobs), and reads a disconnected client to the end. So the answer to an observation that
/// was started after the loss comes after libvirt has started the lost call, if that reached
/// libvirt at all. A second observation, a moment later, finds the call carried out.
pub(super) fn is_unsettled(history: &History, call: &Call) -> bool {
    let Some((at, _)) = call.returned.as_ref().filter(|_| call.is_lost()) else {
        return false;
    };
    let latest = history.latest();
    let shown = latest.at >= call.started && call.action.is_shown(latest);
    let settled = at.after(history.terms.patience.appear);
    !shown && (latest.at < settled || history.observations_since(*at) < 2)
}

fn still_running(history: &History) -> Ruling {
    Ruling::Conclude(match history.contact() {
        Some(Contact::Unreachable(why)) => unreachable(why),
        _ if was_locked(history) => Conclusion::new(
            Verdict::Busy,
            format!(
                "{} held the domain until the deadline; the last try is still outstanding",
                job_name(history)
            ),
        ),
        _ if history.latest().job.is_some_and(Job::holds_changes) => Conclusion::new(
            Verdict::Busy,
            format!(
                "{} held the domain until the deadline; libvirt may still carry the call out",
                job_name(history)
            ),
        ),
        _ => Conclusion::new(
            Verdict::Pending,
            "libvirt has not answered the call by the deadline: it may still carry it out",
        ),
    })
}

/// Returns the name of the job that holds the domain.
fn job_name(history: &History) -> String {
    let job = history.latest().job;
    job.map_or("something else".to_owned(), |job| job.to_string())
}

/// True if an earlier call found the domain locked.
fn was_locked(history: &History) -> bool {
    let is_busy = |call: &Call| matches!(call.error(), Some(CallError::Busy { .. }));
    history.calls().iter().any(is_busy)
}

fn unreachable(why: &str) -> Conclusion {
    Conclusion::new(
        Verdict::HypervisorUnavailable,
        format!("the hypervisor did not answer: {why}"),
    )
}

/// Returns the finding at the deadline if the guest cannot be judged.
pub(super) fn at_deadline(history: &History) -> Option<Conclusion> {
    match history.contact() {
        Some(Contact::Unreachable(why)) => Some(unreachable(why)),
        _ if !history.latest().domain.state.runs() => {
            let latest = history.latest();
            Some(Conclusion::new(
                Verdict::DomainNotRunning,
                format!(
                    "the domain is {}, so its guest cannot react: {}",
                    latest.state(),
                    latest.remedy()
                ),
            ))
        }
        _ => None,
    }
}

/// Maximum number of times that a call is made which has to change the definition as well.
const MAX_DEFINITION_CALLS: usize = 3;

/// Adds to a proof what became of the domain's definition, and withholds the proof until a requested
/// change of it was made: a call that libvirt gives up, as it does with a slow unplug, changes the
/// running domain at most.
pub(super) fn with_definition(history: &History, ruling: Ruling, now: Timestamp) -> Ruling {
    let finding = match ruling {
        // The definition is the other client's.
        Ruling::Conclude(finding)
            if finding.verdict == Verdict::Verified && !history.by_another =>
        {
            finding
        }
        other => return other,
    };
    let persistent = history.before.persistent && !history.plan.actions.is_empty();
    let mut planned = history.plan.actions.iter();
    let Some(action) = planned.find(|action| action.persists() && !history.is_done(action)) else {
        let note = if history.plan.actions.iter().any(Action::persists) {
            "; the definition was changed as well"
        } else if persistent {
            "; the definition is unchanged"
        } else {
            ""
        };
        return Ruling::Conclude(Conclusion::new(
            Verdict::Verified,
            format!("{}{note}", finding.message),
        ));
    };
    if history.running_call().is_some() && !history.is_over(now) {
        return Ruling::wait("libvirt to change the definition");
    }
    let calls = history.calls().iter();
    let calls = calls.filter(|call| call.action == *action).count();
    if calls < MAX_DEFINITION_CALLS && history.may_call() && !history.is_over(now) {
        return Ruling::Call(action.clone());
    }
    Ruling::Conclude(Conclusion::new(
        Verdict::PartiallyApplied,
        format!(
            "{}; libvirt did not confirm the change of the definition: see virsh dumpxml --inactive",
            finding.message
        ),
    ))
}

/// Returns libvirt's text or, if that is empty, a substitute.
fn text_or_default(message: &str) -> &str {
    match message.trim() {
        "" => "libvirt failed without a reason",
        message => message,
    }
}

/// Returns a finding for the hypervisor's own error, with an explanation if one is known.
pub(super) fn error_finding(history: &History, call: &Call, text: &str) -> Conclusion {
    let finding = Conclusion::new(Verdict::HypervisorError, text_or_default(text));
    let known = KNOWN.iter().find(|(known, ..)| text.contains(known));
    match known {
        Some((_, code, seen, remedy)) => finding.because(Diagnosis::new(code, *seen, *remedy)),
        None if is_miscounted_unplug(history, call) => finding.because(Diagnosis::new(
            "libvirt-miscounts",
            "libvirt 9.0 fails like this when it unplugs a vCPU that QEMU no longer has: the guest \
             released it before, and libvirt did not notice",
            RECOUNT_REMEDY,
        )),
        None => finding,
    }
}

/// True if an unplug of vCPUs failed after it had timed out, or although the guest's agent sees
/// fewer than libvirt counts.
fn is_miscounted_unplug(history: &History, call: &Call) -> bool {
    let latest = history.latest();
    let counted = latest.domain.vcpus.plugged();
    let guest_has_fewer = latest
        .guest()
        .is_some_and(|guest| guest.vcpus.len() < counted);
    matches!(call.action, Action::SetVcpus { .. })
        && call.action.is_unplug(&history.before)
        && (guest_has_fewer || repeated_unplug_error(history).is_some())
}

/// The remedy that makes libvirt count the vCPUs that QEMU has (measured with 9.0).
pub(super) const RECOUNT_REMEDY: &str = "restart libvirt's daemon (systemctl restart libvirtd, or virtqemud): domains keep running, and \
     libvirt then counts the vCPUs that QEMU has. Until then it cannot plug the vCPU that it still \
     counts. A newer libvirt (11.3 does) notices by itself";

/// Explanations of English error texts of QEMU and libvirt: text, code, meaning, remedy. They only
/// explain: no verdict and no step depends on them.
const KNOWN: [(&str, &str, &str, &str); 6] = [
    (
        "with SMI wasn't enabled by firmware",
        "firmware-smi",
        "the guest was started by a firmware with Secure Boot that does not negotiate CPU \
         hotplug",
        "use a machine type newer than pc-q35-5.1 and an OVMF that negotiates CPU hotplug, and \
         start the domain again",
    ),
    (
        "unplug request for not supported device type",
        "guest-without-cpu-eject",
        "the guest's operating system does not handle ACPI's CPU hotplug: it is still in its \
         firmware, runs with acpi=off, or could not, as under the software emulation of QEMU 5.1 to \
         7.1",
        "wait until the guest has booted, boot it with ACPI, or use a newer QEMU",
    ),
    (
        "Discarding RAM is disabled",
        "vfio-without-coordinated-discard",
        "an assigned device pins all of the guest's memory, which is incompatible with virtio-mem",
        "detach the device, or use a QEMU and a kernel with coordinated discarding of RAM",
    ),
    (
        "Incompatible with mlock",
        "memory-locked",
        "the domain's memory is locked, which is incompatible with virtio-mem",
        "remove <locked/> from <memoryBacking> and start the domain again",
    ),
    (
        "not enough free memory slots left",
        "vhost-slots",
        "vhost or KVM has no slot left for another range of memory",
        "raise the vhost module's max_mem_regions, or use fewer and larger memory devices",
    ),
    (
        "failed to find appropriate hotpluggable vcpus",
        "cold-plugged-vcpus",
        "the vCPUs that would be unplugged were plugged at the domain's start",
        "start the domain with fewer vCPUs, or with hotpluggable='yes' in <vcpus>",
    ),
];
