//! Classifies libvirt's errors by number, by the part of libvirt that reported them
//! (`virErrorDomain`), by the call's duration and by the domain's state.
//!
//! Never by the message: libvirtd translates it (`LANGUAGE`), and releases reword it.

use std::time::Duration;

use virt::error::Error;
use virt::sys;

use crate::hypervisor::CallError;

/// libvirt's wait for its lock on a domain (`VIR_JOB_WAIT_TIME`, virdomainjob.c; before 8.8
/// `QEMU_JOB_WAIT_TIME`, qemu_domainjob.c). A lock's timeout cannot be reported earlier.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// The calls that go to the guest agent.
const AGENT_CALLS: [&str; 2] = ["guest-vcpus", "set-guest-vcpus"];

/// Returns the error's `virErrorNumber`, including one that the binding has no name for.
pub(super) fn number(error: &Error) -> u32 {
    error.code().to_raw()
}

/// Classifies an error of `call`. Any error on a connection that is no longer `alive` is about the
/// connection: libvirt reports 38, 39, and 1 ("client socket is closed") then.
pub(super) fn classify(call: &'static str, error: &Error, alive: bool) -> CallError {
    let text = error.message().to_owned();
    if !alive {
        return CallError::Unavailable(text);
    }
    let is_baseline = call == "baseline-cpu";
    let call = call.into();
    match number(error) {
        sys::VIR_ERR_NO_SUPPORT | sys::VIR_ERR_OPERATION_UNSUPPORTED => {
            CallError::Unsupported { call, text }
        }
        // "computing baseline hypervisor CPU is not supported for arch …" (qemu_driver.c). Other
        // calls use this number to reject the XML that they were given.
        sys::VIR_ERR_CONFIG_UNSUPPORTED if is_baseline => CallError::Unsupported { call, text },
        sys::VIR_ERR_ACCESS_DENIED
        | sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_CANCELLED
        | sys::VIR_ERR_AUTH_UNAVAILABLE => CallError::Denied { call, text },
        number => CallError::Failed {
            call,
            code: number.to_string(),
            text,
        },
    }
}

/// An error of a call about one domain, with everything that its classification depends on.
#[derive(Debug, Clone, Copy)]
struct Facts {
    call: &'static str,
    number: u32,
    /// The part of libvirt that reported the error (`virErrorDomain`).
    reported_by: u32,
    took: Duration,
}

/// Classifies an error of a call about one domain that took `took`. Calls `is_active` only where
/// libvirt's number leaves open whether the domain runs.
pub(super) fn classify_domain(
    call: &'static str,
    error: &Error,
    took: Duration,
    alive: bool,
    is_active: impl FnOnce() -> bool,
) -> CallError {
    if !alive {
        return classify(call, error, alive);
    }
    let facts = Facts {
        call,
        number: number(error),
        reported_by: error.domain().to_raw(),
        took,
    };
    domain_error(facts, error.message(), is_active).unwrap_or_else(|| classify(call, error, alive))
}

/// Returns the kind of error that only calls about a domain end with, if it is one.
fn domain_error(
    facts: Facts,
    message: &str,
    is_active: impl FnOnce() -> bool,
) -> Option<CallError> {
    let is_agent_call = AGENT_CALLS.contains(&facts.call);
    let call = facts.call.into();
    let text = message.to_owned();
    Some(match facts.number {
        sys::VIR_ERR_NO_DOMAIN => CallError::NotFound(text),
        sys::VIR_ERR_OPERATION_INVALID if !is_active() => CallError::NotRunning(text),
        // A domain without an agent's channel is an unsupported argument; for a paused domain,
        // whose agent cannot answer, libvirt reports an invalid operation
        // (qemuDomainAgentAvailable, qemu_domain.c).
        sys::VIR_ERR_ARGUMENT_UNSUPPORTED | sys::VIR_ERR_OPERATION_INVALID if is_agent_call => {
            CallError::AgentSilent { call, text }
        }
        sys::VIR_ERR_AGENT_UNRESPONSIVE
        | sys::VIR_ERR_AGENT_UNSYNCED
        | sys::VIR_ERR_AGENT_COMMAND_TIMEOUT => CallError::AgentSilent { call, text },
        // An error that the agent answers with, and an answer that libvirt cannot use
        // (qemuAgentCheckError, qemu_agent.c): until libvirt 11.2 both were internal errors.
        sys::VIR_ERR_AGENT_COMMAND_FAILED => CallError::AgentRefused { call, text },
        sys::VIR_ERR_INTERNAL_ERROR if is_agent_call => CallError::AgentRefused { call, text },
        sys::VIR_ERR_RESOURCE_BUSY => CallError::Busy { call, text },
        // More callers than qemu.conf's max_queued wait for the lock.
        sys::VIR_ERR_OPERATION_FAILED if facts.reported_by == sys::VIR_FROM_NONE => {
            CallError::Busy { call, text }
        }
        sys::VIR_ERR_OPERATION_TIMEOUT if is_unplug_timeout(facts) => {
            CallError::UnplugPending { call, text }
        }
        sys::VIR_ERR_OPERATION_TIMEOUT => CallError::Busy { call, text },
        _ => return None,
    })
}

/// True if libvirt sent the unplug to QEMU and stopped waiting for the guest, rather than for its
/// lock on the domain; both are `VIR_ERR_OPERATION_TIMEOUT`.
///
/// Among the calls made here only a change of the vCPUs waits for a guest. Its timeout comes from the
/// QEMU driver (qemuDomainHotplugDelVcpu, qemu_hotplug.c), after 5 s, or 10 s on pseries. The
/// lock's comes from no driver since libvirt 8.8 (virDomainObjBeginJobInternal, virdomainjob.c,
/// `VIR_FROM_NONE`); before, it came from the QEMU driver too (qemu_domainjob.c), but never before
/// [`LOCK_WAIT`] had passed.
fn is_unplug_timeout(facts: Facts) -> bool {
    facts.call == "set-vcpus" && facts.reported_by != sys::VIR_FROM_NONE && facts.took < LOCK_WAIT
}

/// Classifies an error of opening a connection: denied, or there is no connection.
pub(super) fn classify_open(error: &Error) -> CallError {
    match classify("open", error, true) {
        denied @ CallError::Denied { .. } => denied,
        _ => CallError::Unavailable(error.message().to_owned()),
    }
}

/// True if the cause may be flags that this libvirt does not know (`virCheckFlags`).
pub(super) fn may_be_about_flags(error: &Error) -> bool {
    matches!(
        number(error),
        sys::VIR_ERR_INVALID_ARG | sys::VIR_ERR_NO_SUPPORT | sys::VIR_ERR_OPERATION_UNSUPPORTED
    )
}

/// True for an error that libvirt has no number for.
pub(super) fn is_internal(error: &Error) -> bool {
    number(error) == sys::VIR_ERR_INTERNAL_ERROR
}

/// True if an error of `virDomainGetJobStats` on a domain that runs means that the domain is
/// being migrated to this host: libvirt keeps the statistics of a migration on its source, and
/// rejects the question on the destination (qemuDomainGetJobStatsInternal, qemu_driver.c) as
/// invalid, or as unsupported in later releases.
pub(super) fn is_migration_in(error: &Error) -> bool {
    matches!(
        number(error),
        sys::VIR_ERR_OPERATION_INVALID | sys::VIR_ERR_OPERATION_UNSUPPORTED
    )
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Returns an error with libvirt's number 8, the only one that can be made without libvirt.
    fn invalid_argument() -> Error {
        std::ffi::CString::new("a\0b").unwrap_err().into()
    }

    #[test]
    fn error_on_dead_connection_is_unavailable() {
        let dead = classify("capabilities", &invalid_argument(), false);
        assert!(matches!(dead, CallError::Unavailable(_)), "{dead:?}");
        let alive = classify("capabilities", &invalid_argument(), true);
        assert!(
            matches!(&alive, CallError::Failed { code, .. } if code == "8"),
            "{alive:?}"
        );
    }

    /// `virErrorDomain` of no driver, of the QEMU driver, and of the guest agent.
    const NONE: u32 = sys::VIR_FROM_NONE;
    const QEMU: u32 = sys::VIR_FROM_QEMU;

    #[rstest]
    #[case::unknown_domain("domain", 42, QEMU, 0, true, "domain-not-found")]
    #[case::not_running("set-vcpus", 55, QEMU, 0, false, "domain-not-running")]
    #[case::invalid_for_running_domain("set-vcpus", 55, QEMU, 0, true, "")]
    #[case::agent_of_ended_domain("guest-vcpus", 55, QEMU, 0, false, "domain-not-running")]
    #[case::agent_of_paused_domain("guest-vcpus", 55, QEMU, 0, true, "agent-unavailable")]
    #[case::lock("set-vcpus", 68, NONE, 30, true, "busy")]
    #[case::lock_after_any_time("set-vcpus", 68, NONE, 1, true, "busy")]
    #[case::unplug("set-vcpus", 68, QEMU, 5, true, "unplug-pending")]
    #[case::lock_of_old_libvirt("set-vcpus", 68, QEMU, 30, true, "busy")]
    #[case::unplug_on_pseries("set-vcpus", 68, QEMU, 10, true, "unplug-pending")]
    #[case::lock_for_reading("domain", 68, QEMU, 30, true, "busy")]
    #[case::lock_of_agent("guest-vcpus", 68, NONE, 30, true, "busy")]
    #[case::too_many_wait("set-vcpus", 9, NONE, 0, true, "busy")]
    #[case::operation_failed("set-vcpus", 9, QEMU, 0, true, "")]
    #[case::agent_not_connected("guest-vcpus", 86, QEMU, 0, true, "agent-unavailable")]
    #[case::agent_unsynced("guest-vcpus", 97, QEMU, 0, true, "agent-unavailable")]
    #[case::agent_timeout("guest-vcpus", 112, QEMU, 5, true, "agent-unavailable")]
    #[case::agent_refuses("guest-vcpus", 113, QEMU, 0, true, "agent-refused")]
    #[case::agent_refuses_by_old_libvirt("set-guest-vcpus", 1, QEMU, 0, true, "agent-refused")]
    #[case::internal_error("set-vcpus", 1, QEMU, 0, true, "")]
    #[case::no_agent_channel("guest-vcpus", 74, QEMU, 0, true, "agent-unavailable")]
    #[case::unsupported_argument("attach-device", 74, QEMU, 0, true, "")]
    #[case::invalid_argument("set-vcpus", 8, QEMU, 0, true, "")]
    fn domain_error_is_classified_whatever_its_message(
        #[case] call: &'static str,
        #[case] number: u32,
        #[case] reported_by: u32,
        #[case] seconds: u64,
        #[case] active: bool,
        #[case] code: &str,
    ) {
        let took = Duration::from_secs(seconds);
        let facts = Facts {
            call,
            number,
            reported_by,
            took,
        };
        for message in [
            "",
            "vcpu unplug request timed out",
            "状態変更ロックを獲得できません",
        ] {
            let classified = domain_error(facts, message, || active);
            assert_eq!(classified.as_ref().map_or("", CallError::code), code);
        }
    }

    #[test]
    fn invalid_argument_may_be_a_flag() {
        assert!(may_be_about_flags(&invalid_argument()));
        assert!(!is_migration_in(&invalid_argument()));
    }
}
