//! Making the calls that the core asks for.

use crate::domain::device_xml;
use crate::hotplug::{Action, Return};
use crate::hypervisor::{CallError, DomainBackend, DomainRef, Scope};

/// libvirt's error numbers (virterror.h), for errors that carry none here.
const NO_SUPPORT: u32 = 3;
const NO_DOMAIN: u32 = 42;
const OPERATION_INVALID: u32 = 55;
const OPERATION_TIMEOUT: u32 = 68;
const AGENT_UNRESPONSIVE: u32 = 86;
const ACCESS_DENIED: u32 = 88;

/// What libvirt says, in [`OPERATION_TIMEOUT`], when something else is being done to a domain.
const LOCKED: &str = "state change lock";

/// Makes a call and says how it came back.
pub(super) async fn make<C: DomainBackend>(
    control: &C,
    domain: &DomainRef,
    action: &Action,
) -> Return {
    let result = match action {
        Action::SetVcpus { count, persist } => {
            control.set_vcpus(domain, *count, Scope::of(*persist)).await
        }
        Action::OnlineVcpus { ids } => control.set_guest_vcpus(domain, ids, true).await,
        Action::ResizeVirtioMem { alias, requested } => {
            control.resize_virtio_mem(domain, alias, *requested).await
        }
        Action::AttachDimm { alias, size, node } => {
            let xml = device_xml::dimm(alias, *size, *node);
            control.attach_device(domain, &xml, Scope::Live).await
        }
    };
    match result {
        Ok(()) => Return::Done,
        Err(error) => returned(error),
    }
}

fn returned(error: CallError) -> Return {
    let failed = |number, message| Return::Failed { number, message };
    match error {
        CallError::Unavailable(_) => Return::Lost,
        CallError::Timeout { .. } => Return::Overdue,
        CallError::Unsupported { message, .. } => failed(NO_SUPPORT, message),
        CallError::Denied { message, .. } => failed(ACCESS_DENIED, message),
        CallError::DomainNotFound(message) => failed(NO_DOMAIN, message),
        CallError::DomainNotRunning(message) => failed(
            OPERATION_INVALID,
            with_words(message, "domain is not running"),
        ),
        CallError::AgentUnavailable { message, .. } => failed(AGENT_UNRESPONSIVE, message),
        CallError::UnplugPending { message, .. } => {
            failed(OPERATION_TIMEOUT, with_words(message, "unplug timed out"))
        }
        CallError::Busy { message, .. } => failed(OPERATION_TIMEOUT, with_words(message, LOCKED)),
        CallError::Failed {
            number, message, ..
        } => failed(number, message),
    }
}

/// The core tells errors apart by libvirt's words; an adapter that knows the kind may have others.
fn with_words(message: String, words: &str) -> String {
    let word = words.split(' ').next_back().unwrap_or(words);
    match message.contains(words) || (words != LOCKED && message.contains(word)) {
        true => message,
        false => format!("{message} ({words})"),
    }
}
