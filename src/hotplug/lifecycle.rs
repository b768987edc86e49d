//! Ends that have nothing to do with the resource: the domain is gone, the call failed, nobody
//! answers.

use super::history::{Call, Contact, History, Return};
use super::outcome::{Diagnosis, Finding, Ruling};
use super::{Action, Event, Verdict};
use crate::domain::{DomainState, Job};
use crate::units::Timestamp;

/// libvirt's error numbers (virterror.h) that mean something here.
const NO_DOMAIN: u32 = 42;
const OPERATION_INVALID: u32 = 55;
const OPERATION_TIMEOUT: u32 = 68;

/// Whether the domain's life ended the operation, or made it pointless.
pub(super) fn ended(history: &History) -> Option<Finding> {
    let stopped = |message: String| Some(Finding::new(Verdict::DomainNotRunning, message));
    if history.contact() == Some(&Contact::Absent) {
        return match history.calls().is_empty() {
            true => Some(Finding::new(
                Verdict::DomainNotFound,
                "there is no such domain",
            )),
            false => stopped("the domain ended in the middle of the operation".to_owned()),
        };
    }
    let end = history.all_events().find_map(|(_, event)| match event {
        Event::Stopped(why) => Some(why),
        _ => None,
    });
    if let Some(why) = end {
        return stopped(format!(
            "the domain ended in the middle of the operation: {why}"
        ));
    }
    let (before, latest) = (&history.before.domain, &history.latest().domain);
    match latest.state {
        DomainState::ShutOff | DomainState::Crashed => {
            stopped(format!("the domain is {}", history.latest().state()))
        }
        _ if latest.id != before.id => {
            stopped("the domain was started anew in the middle of the operation".to_owned())
        }
        _ => None,
    }
}

/// What a failed call means for the operation.
pub(super) enum Failure {
    /// libvirt did not get hold of the domain: nothing was changed, ask again.
    Locked,
    /// libvirt waited for the guest to let a vCPU go, and gave up waiting; the request stands.
    UnplugTimedOut,
    /// The domain does not run.
    NotRunning,
    /// Anything else.
    Error,
}

/// What kind of failure it is. libvirt has one number for two time-outs, told apart by text
/// (reference: qemu_hotplug.c `qemuDomainHotplugDelVcpu`, virdomainjob.c).
pub(super) fn failure(number: u32, message: &str) -> Failure {
    match number {
        OPERATION_TIMEOUT if message.contains("state change lock") => Failure::Locked,
        OPERATION_TIMEOUT if message.contains("unplug") => Failure::UnplugTimedOut,
        NO_DOMAIN => Failure::NotRunning,
        OPERATION_INVALID if message.contains("not running") => Failure::NotRunning,
        _ => Failure::Error,
    }
}

/// What the last call leaves to be said before the guest is looked at; `None` to look at it.
/// `done` says whether the live XML shows what was asked for.
pub(super) fn after_call(history: &History, now: Timestamp, done: bool) -> Option<Ruling> {
    let over = history.is_over(now);
    // That an agent does not do as told is the guest's affair.
    let ours = |call: &&Call| !matches!(call.action, Action::OnlineVcpus { .. });
    let call = history.calls().last().filter(ours)?;
    let Some((at, how)) = &call.returned else {
        return (over && !done).then(|| still_running(history));
    };
    match how {
        Return::Done => None,
        Return::Failed { number, message } => match failure(*number, message) {
            Failure::UnplugTimedOut => None,
            Failure::Locked if over => Some(Ruling::Found(Finding::new(
                Verdict::Busy,
                format!(
                    "{} held the domain until the deadline: {message}",
                    holder(history)
                ),
            ))),
            Failure::Locked if history.may_call() => Some(Ruling::Call(call.action.clone())),
            Failure::Locked => None,
            Failure::NotRunning => Some(Ruling::Found(Finding::new(
                Verdict::DomainNotRunning,
                said(message),
            ))),
            // What was done before the error stays done: it is looked at first.
            Failure::Error if history.latest().at < *at && !over => {
                Some(Ruling::wait("a look at what the failed call left"))
            }
            // It was made again although the lost one before it had been carried out.
            Failure::Error
                if history.times_lost(&call.action) > 0
                    && call.action.is_shown(history.latest()) =>
            {
                None
            }
            // What was asked for was asked of the guest before; what it did is looked at.
            Failure::Error if not_told(history).is_some() => None,
            Failure::Error => Some(Ruling::Found(error(message))),
        },
        Return::Overdue if over && !done => Some(still_running(history)),
        Return::Overdue => None,
        Return::Lost => lost(history, call, *at, now),
    }
}

/// libvirt's words when it was told again of an unplug that it had taken for one that timed out,
/// and failed otherwise this time.
///
/// libvirt 9.0 cannot be told that QEMU has dropped a vCPU: it asks QEMU to drop it, QEMU has no
/// such device, and libvirt gives up with "An error occurred, but the cause is unknown" (measured;
/// 11.3 takes it for done).
pub(super) fn not_told(history: &History) -> Option<&str> {
    let failed = |call: &'_ Call| match &call.returned {
        Some((_, Return::Failed { number, message })) => Some(failure(*number, message)),
        _ => None,
    };
    let (last, earlier) = history.calls().split_last()?;
    let timed_out = |call: &Call| {
        call.action == last.action && matches!(failed(call), Some(Failure::UnplugTimedOut))
    };
    match (&last.returned, failed(last)) {
        (Some((_, Return::Failed { message, .. })), Some(Failure::Error))
            if earlier.iter().any(timed_out) =>
        {
            Some(message)
        }
        _ => None,
    }
}

/// How often a call is made at most whose answer was lost each time.
const MOST_LOST: usize = 3;

/// Whether libvirt got the call is not known: the domain shows what became of it.
fn lost(history: &History, call: &Call, at: Timestamp, now: Timestamp) -> Option<Ruling> {
    let over = history.is_over(now);
    if let (Some(Contact::Unreachable(why)), true) = (history.contact(), over) {
        return Some(Ruling::Found(unreachable(why)));
    }
    if is_unsettled(history, call) {
        let moment = at.after(history.terms.patience.appear);
        return Some(match now < moment {
            true => Ruling::wait_until("a sign that libvirt got the request", moment),
            false => Ruling::wait("a look at what became of the lost call"),
        });
    }
    let latest = history.latest();
    if call.action.is_shown(latest) {
        return None;
    }
    let is_open = call.action.is_open(&history.before, latest);
    if is_open && !over && history.times_lost(&call.action) < MOST_LOST && history.may_call() {
        return Some(Ruling::Call(call.action.clone()));
    }
    // A guest may have been asked to let a vCPU go, which the live XML does not show.
    let may_stand = is_open && matches!(call.action, Action::SetVcpus { .. });
    match may_stand && call.action.is_unplug(&history.before) {
        true => None,
        false => Some(Ruling::Found(Finding::new(
            Verdict::HypervisorError,
            match is_open {
                true => {
                    "the connection or this program ended during the call, and the domain shows \
                     nothing of it: ask again"
                }
                false => {
                    "the connection or this program ended during the call, and the domain is \
                     neither as it was nor as it was to be: something else changed it; look at it \
                     and ask again"
                }
            },
        ))),
    }
}

/// Whether it is too early to tell what became of a call whose answer was lost.
///
/// libvirt reads its clients' requests in the order in which they came and takes them up in that
/// order (rpc/virnetserver.c: one queue of jobs), and a client that is gone is still read to the
/// end. So an answer to a look that was begun after the loss comes after the lost call was taken
/// up, if it reached libvirt at all; a second one, a moment later, finds it carried out.
pub(super) fn is_unsettled(history: &History, call: &Call) -> bool {
    let Some((at, Return::Lost)) = &call.returned else {
        return false;
    };
    let latest = history.latest();
    let shown = latest.at >= call.started && call.action.is_shown(latest);
    let settled = at.after(history.terms.patience.appear);
    !shown && (latest.at < settled || history.looks_since(*at) < 2)
}

fn still_running(history: &History) -> Ruling {
    Ruling::Found(match history.contact() {
        Some(Contact::Unreachable(why)) => unreachable(why),
        _ if was_locked(history) => Finding::new(
            Verdict::Busy,
            format!(
                "{} held the domain until the deadline; the last try is still outstanding",
                holder(history)
            ),
        ),
        _ if history.latest().job.is_some_and(Job::holds_changes) => Finding::new(
            Verdict::Busy,
            format!(
                "{} held the domain until the deadline; libvirt may still carry the call out",
                holder(history)
            ),
        ),
        _ => Finding::new(
            Verdict::Pending,
            "libvirt has not answered the call by the deadline: it may still carry it out",
        ),
    })
}

/// What else is being done to the domain.
fn holder(history: &History) -> String {
    let job = history.latest().job;
    job.map_or("something else".to_owned(), |job| job.to_string())
}

/// Whether libvirt could not get hold of the domain before.
fn was_locked(history: &History) -> bool {
    history.calls().iter().any(|call| match &call.returned {
        Some((_, Return::Failed { number, message })) => {
            matches!(failure(*number, message), Failure::Locked)
        }
        _ => false,
    })
}

fn unreachable(why: &str) -> Finding {
    Finding::new(
        Verdict::HypervisorUnavailable,
        format!("the hypervisor could not be asked: {why}"),
    )
}

/// What is to be said at the deadline before anything about the guest.
pub(super) fn at_deadline(history: &History) -> Option<Finding> {
    match history.contact() {
        Some(Contact::Unreachable(why)) => Some(unreachable(why)),
        _ if !history.latest().domain.state.runs() => {
            let latest = history.latest();
            Some(Finding::new(
                Verdict::DomainNotRunning,
                format!(
                    "the domain is {}, so its guest cannot take anything: {}",
                    latest.state(),
                    latest.remedy()
                ),
            ))
        }
        _ => None,
    }
}

/// libvirt's text, which may be none at all.
fn said(message: &str) -> &str {
    match message.trim() {
        "" => "libvirt failed without saying why",
        message => message,
    }
}

/// libvirt's or QEMU's own error, with what is known about it.
pub(super) fn error(message: &str) -> Finding {
    let finding = Finding::new(Verdict::HypervisorError, said(message));
    let known = KNOWN.iter().find(|(text, ..)| message.contains(text));
    match known {
        Some((_, code, seen, remedy)) => finding.because(Diagnosis::new(code, *seen, *remedy)),
        None => finding,
    }
}

/// What makes libvirt count the vCPUs that QEMU has (measured: 9.0).
pub(super) const COUNT_ANEW: &str = "start libvirt's daemon anew (systemctl restart libvirtd, or virtqemud): domains run on, and it \
     then counts what QEMU has. Until then it plugs no vCPU that it believes to be there. A newer \
     libvirt (11.3 does) takes note by itself";

/// Errors whose text does not say what to do: text, code, what it means, what to do.
const KNOWN: [(&str, &str, &str, &str); 7] = [
    (
        "An error occurred, but the cause is unknown",
        "libvirt-miscounts",
        "libvirt 9.0 says no more than that when it is to unplug a vCPU that QEMU has no more: the \
         guest let it go before, and libvirt did not notice",
        COUNT_ANEW,
    ),
    (
        "with SMI wasn't enabled by firmware",
        "firmware-smi",
        "the guest was started by a firmware with Secure Boot that does not take part in CPU \
         hotplug",
        "use a machine type newer than pc-q35-5.1 and an OVMF that negotiates CPU hotplug, and \
         start the domain again",
    ),
    (
        "unplug request for not supported device type",
        "guest-without-cpu-eject",
        "the guest's operating system has not taken over ACPI's CPU hotplug: it is still in its \
         firmware, runs with acpi=off, or could not, as under the software emulation of QEMU 5.1 to \
         7.1",
        "wait until the guest has booted, boot it with ACPI, or use a newer QEMU",
    ),
    (
        "Discarding RAM is disabled",
        "vfio-without-coordinated-discard",
        "an assigned device pins all of the guest's memory, which virtio-mem cannot work with",
        "detach the device, or use a QEMU and a kernel with coordinated discarding of RAM",
    ),
    (
        "Incompatible with mlock",
        "memory-locked",
        "the domain's memory is locked, which virtio-mem cannot work with",
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
        "the vCPUs that would have to go were there when the domain was started",
        "start the domain with fewer vCPUs, or with hotpluggable='yes' in <vcpus>",
    ),
];
