//! libvirt's error numbers as what they mean for a caller.

use virt::error::Error;
use virt::sys;

use crate::hypervisor::HypervisorError;

/// libvirt's number of this error, known to the binding or not.
pub(super) fn number(error: &Error) -> u32 {
    error.code().to_raw()
}

/// What an error of `call` means. `alive` says whether the connection still is: an error of a
/// dead one is about the connection, whatever its number says (`38`, `39`, and `1` with "client
/// socket is closed" are seen).
pub(super) fn sort(call: &'static str, error: &Error, alive: bool) -> HypervisorError {
    let message = error.message().to_owned();
    if !alive {
        return HypervisorError::Unavailable(message);
    }
    match number(error) {
        sys::VIR_ERR_NO_SUPPORT | sys::VIR_ERR_OPERATION_UNSUPPORTED => {
            HypervisorError::Unsupported { call, message }
        }
        // "computing baseline hypervisor CPU is not supported for arch …" (qemu_driver.c);
        // of other calls this number is a refusal of the XML they were given.
        sys::VIR_ERR_CONFIG_UNSUPPORTED if call == "baseline-cpu" => {
            HypervisorError::Unsupported { call, message }
        }
        sys::VIR_ERR_ACCESS_DENIED
        | sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_CANCELLED
        | sys::VIR_ERR_AUTH_UNAVAILABLE => HypervisorError::Denied { call, message },
        number => HypervisorError::Failed {
            call,
            number,
            message,
        },
    }
}

/// What an error of opening a connection means: there is none, unless libvirt said who may.
pub(super) fn sort_open(error: &Error) -> HypervisorError {
    match sort("open", error, true) {
        denied @ HypervisorError::Denied { .. } => denied,
        _ => HypervisorError::Unavailable(error.message().to_owned()),
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
        assert!(matches!(dead, HypervisorError::Unavailable(_)), "{dead:?}");
        let alive = sort("capabilities", &invalid_argument(), true);
        assert!(
            matches!(alive, HypervisorError::Failed { number: 8, .. }),
            "{alive:?}"
        );
    }

    #[test]
    fn an_invalid_argument_may_be_a_flag() {
        assert!(may_be_about_flags(&invalid_argument()));
        assert!(!is_gone(&invalid_argument()));
    }
}
