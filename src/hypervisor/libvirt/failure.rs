//! libvirt's error numbers as what they mean for a caller.

use virt::error::Error;
use virt::sys;

use crate::hypervisor::CallError;

/// libvirt's number of this error, known to the binding or not.
pub(super) fn number(error: &Error) -> u32 {
    error.code().to_raw()
}

/// What an error of `call` means. `alive` says whether the connection still is: an error of a
/// dead one is about the connection, whatever its number says (`38`, `39`, and `1` with "client
/// socket is closed" are seen).
pub(super) fn sort(call: &'static str, error: &Error, alive: bool) -> CallError {
    let message = error.message().to_owned();
    if !alive {
        return CallError::Unavailable(message);
    }
    match number(error) {
        sys::VIR_ERR_NO_SUPPORT | sys::VIR_ERR_OPERATION_UNSUPPORTED => {
            CallError::Unsupported { call, message }
        }
        // "computing baseline hypervisor CPU is not supported for arch …" (qemu_driver.c);
        // of other calls this number is a refusal of the XML they were given.
        sys::VIR_ERR_CONFIG_UNSUPPORTED if call == "baseline-cpu" => {
            CallError::Unsupported { call, message }
        }
        sys::VIR_ERR_ACCESS_DENIED
        | sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_CANCELLED
        | sys::VIR_ERR_AUTH_UNAVAILABLE => CallError::Denied { call, message },
        number => CallError::Failed {
            call,
            number,
            message,
        },
    }
}

/// What an error of a call about one domain means. `is_active` says whether the domain runs; it
/// is asked only where the error does not say so itself.
///
/// Numbers and texts as in libvirt 9.0 to 12.5: virDomainObjBeginJobInternal (virdomainjob.c),
/// qemuDomainHotplugDelVcpu (qemu_hotplug.c), qemuDomainAgentAvailable (qemu_domain.c).
pub(super) fn sort_domain(
    call: &'static str,
    error: &Error,
    alive: bool,
    is_active: impl FnOnce() -> bool,
) -> CallError {
    let meaning = match alive {
        true => domain_meaning(call, number(error), error.message(), is_active),
        false => None,
    };
    meaning.unwrap_or_else(|| sort(call, error, alive))
}

/// What a number and a text mean for a call about a domain; `None` for nothing special.
fn domain_meaning(
    call: &'static str,
    number: u32,
    message: &str,
    is_active: impl FnOnce() -> bool,
) -> Option<CallError> {
    let is_lock = message.contains("cannot acquire state change lock");
    let message = message.to_owned();
    Some(match number {
        sys::VIR_ERR_NO_DOMAIN => CallError::DomainNotFound(message),
        sys::VIR_ERR_OPERATION_INVALID if !is_active() => CallError::DomainNotRunning(message),
        // "QEMU guest agent is not configured" is an unsupported argument; of a domain that is
        // held, whose agent cannot answer, libvirt says that it is not running.
        sys::VIR_ERR_ARGUMENT_UNSUPPORTED | sys::VIR_ERR_OPERATION_INVALID
            if AGENT_CALLS.contains(&call) =>
        {
            CallError::AgentUnavailable { call, message }
        }
        sys::VIR_ERR_AGENT_UNRESPONSIVE
        | sys::VIR_ERR_AGENT_UNSYNCED
        | sys::VIR_ERR_AGENT_COMMAND_TIMEOUT
        | sys::VIR_ERR_AGENT_COMMAND_FAILED => CallError::AgentUnavailable { call, message },
        sys::VIR_ERR_RESOURCE_BUSY => CallError::Busy { call, message },
        // Also with the number of a failure, when too many wait for it (max_queued).
        _ if is_lock => CallError::Busy { call, message },
        // Of our calls only this one waits for the guest and says so when it stops.
        sys::VIR_ERR_OPERATION_TIMEOUT if call == "set-vcpus" => {
            CallError::UnplugPending { call, message }
        }
        sys::VIR_ERR_OPERATION_TIMEOUT => CallError::Busy { call, message },
        _ => return None,
    })
}

/// The calls that go to the guest agent.
const AGENT_CALLS: [&str; 3] = ["guest-vcpus", "set-guest-vcpus", "agent-timeout"];

/// What an error of opening a connection means: there is none, unless libvirt said who may.
pub(super) fn sort_open(error: &Error) -> CallError {
    match sort("open", error, true) {
        denied @ CallError::Denied { .. } => denied,
        _ => CallError::Unavailable(error.message().to_owned()),
    }
}

/// Whether an error may be about flags that this libvirt does not know (`virCheckFlags`).
pub(super) fn may_be_about_flags(error: &Error) -> bool {
    matches!(
        number(error),
        sys::VIR_ERR_INVALID_ARG | sys::VIR_ERR_NO_SUPPORT | sys::VIR_ERR_OPERATION_UNSUPPORTED
    )
}

/// Whether an error says that a domain ended meanwhile.
pub(super) fn is_gone(error: &Error) -> bool {
    matches!(
        number(error),
        sys::VIR_ERR_NO_DOMAIN | sys::VIR_ERR_OPERATION_INVALID
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error with libvirt's number 8, the only one that can be made without libvirt.
    fn invalid_argument() -> Error {
        std::ffi::CString::new("a\0b").unwrap_err().into()
    }

    #[test]
    fn an_error_of_a_dead_connection_is_the_connections() {
        let dead = sort("capabilities", &invalid_argument(), false);
        assert!(matches!(dead, CallError::Unavailable(_)), "{dead:?}");
        let alive = sort("capabilities", &invalid_argument(), true);
        assert!(
            matches!(alive, CallError::Failed { number: 8, .. }),
            "{alive:?}"
        );
    }

    /// As libvirt 11.3 words them.
    #[test]
    fn an_error_of_a_domain_says_what_to_do() {
        let lock = "Timed out during operation: cannot acquire state change lock (held by \
                    monitor=remoteDispatchDomainSetVcpusFlags)";
        let unplug = "Timed out during operation: vcpu unplug request timed out. Unplug result \
                      must be manually inspected in the domain";
        let not_running = "Requested operation is not valid: domain is not running";
        for (call, number, message, active, code) in [
            ("domain", 42, "Domain not found", true, "domain-not-found"),
            ("set-vcpus", 55, not_running, false, "domain-not-running"),
            ("set-vcpus", 55, "not a state for it", true, ""),
            ("guest-vcpus", 55, not_running, false, "domain-not-running"),
            ("guest-vcpus", 55, not_running, true, "agent-unavailable"),
            ("set-vcpus", 68, lock, true, "busy"),
            ("set-vcpus", 68, unplug, true, "unplug-pending"),
            ("memory-stats", 68, lock, true, "busy"),
            ("guest-vcpus", 68, "another wording", true, "busy"),
            (
                "set-vcpus",
                9,
                "cannot acquire state change lock due to max_queued",
                true,
                "busy",
            ),
            (
                "guest-vcpus",
                86,
                "not connected",
                true,
                "agent-unavailable",
            ),
            ("guest-vcpus", 97, "unsynced", true, "agent-unavailable"),
            ("guest-vcpus", 112, "timed out", true, "agent-unavailable"),
            ("set-guest-vcpus", 113, "no", true, "agent-unavailable"),
            (
                "guest-vcpus",
                74,
                "not configured",
                true,
                "agent-unavailable",
            ),
            ("attach-device", 74, "not for us", true, ""),
            ("set-vcpus", 8, "too many", true, ""),
        ] {
            let meaning = domain_meaning(call, number, message, || active);
            let found = meaning.as_ref().map_or("", CallError::code);
            assert_eq!(found, code, "{call} {number} {message}");
        }
    }

    #[test]
    fn an_invalid_argument_may_be_a_flag() {
        assert!(may_be_about_flags(&invalid_argument()));
        assert!(!is_gone(&invalid_argument()));
    }
}
