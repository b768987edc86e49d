//! Conditions for the arguments of a procedure, in XDR: words are big-endian, a text has its length
//! before it and zeros after it up to a multiple of four bytes, an optional text a word before it that
//! is 1 if it exists.
//!
//! A body whose form is not known is not allowed.

use crate::capability::eim::dry_run_domain;
use crate::sockets::procedures::Arguments;

/// The URI of a launcher's daemon, which a privileged one accepts as well.
const SESSION: &str = "qemu:///session";
/// `VIR_CONNECT_RO`, and two by which the client library notes its own choice of a socket
/// (`VIR_DRV_OPEN_REMOTE_USER`, `_AUTOSTART`).
const CONNECT_FLAGS: u32 = 1 | 2 | 4;
/// `VIR_DOMAIN_XML_INACTIVE` and `VIR_DOMAIN_XML_UPDATE_CPU`. The others show secrets, or the
/// definition for a migration.
const XML_FLAGS: u32 = 2 | 4;
/// `VIR_DOMAIN_AFFECT_LIVE`.
const LIVE: u32 = 1;
/// `VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK`, libvirt's default, as the word of -2.
const DEFAULT_TIMEOUT: u32 = u32::MAX - 1;
/// Maximum timeout of a guest agent, in seconds.
const MAX_TIMEOUT: u32 = 60;
/// The format of virtnode's dry run.
const QEMU_ARGUMENTS: &str = "qemu-argv";
/// Length of a UUID and an ID, which follow the name in the XDR of a domain.
const UUID_AND_ID: usize = 16 + 4;

/// True if a call with this body meets the condition.
pub(super) fn are_allowed(condition: Arguments, body: &[u8]) -> bool {
    let holds = match condition {
        Arguments::Any => Some(true),
        Arguments::SessionUri => session_uri(body),
        Arguments::NoEmulator => Reader(body).word().map(|exists| exists == 0),
        Arguments::WithoutSecrets => of_domain(body, |[flags]| flags & !XML_FLAGS == 0),
        Arguments::DryRun => dry_run(body),
        Arguments::AgentTimeout => of_domain(body, |[timeout, flags]| {
            flags == 0 && (timeout == DEFAULT_TIMEOUT || (1..=MAX_TIMEOUT).contains(&timeout))
        }),
        Arguments::LiveOnly => of_domain(body, |[_count, flags]| flags == LIVE),
    };
    holds.unwrap_or(false)
}

/// Reads XDR from the beginning of a body. `None` if the body ends before.
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn bytes(&mut self, length: usize) -> Option<&'b [u8]> {
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    fn word(&mut self) -> Option<u32> {
        let word = self.bytes(4)?;
        Some(u32::from_be_bytes(word.try_into().ok()?))
    }

    fn text(&mut self) -> Option<&'b [u8]> {
        let length = usize::try_from(self.word()?).ok()?;
        let text = self.bytes(length)?;
        self.bytes(length.next_multiple_of(4) - length)?;
        Some(text)
    }
}

fn session_uri(body: &[u8]) -> Option<bool> {
    let mut reader = Reader(body);
    let exists = reader.word()? == 1;
    let uri = reader.text()?;
    let flags = reader.word()?;
    let is_all = reader.0.is_empty();
    Some(exists && uri == SESSION.as_bytes() && flags & !CONNECT_FLAGS == 0 && is_all)
}

fn dry_run(body: &[u8]) -> Option<bool> {
    let mut reader = Reader(body);
    let format = reader.text()?;
    let domain = reader.text()?;
    let flags = reader.word()?;
    let is_all = reader.0.is_empty();
    Some(format == QEMU_ARGUMENTS.as_bytes() && flags == 0 && is_all && is_dry_run(domain))
}

/// True for a domain of [`dry_run_domain`] with any plain machine type.
fn is_dry_run(domain: &[u8]) -> bool {
    let Ok(domain) = std::str::from_utf8(domain) else {
        return false;
    };
    let machine = domain.split_once("machine=\"");
    let machine = machine.and_then(|(_, rest)| rest.split_once('"'));
    let Some((machine, _)) = machine else {
        return false;
    };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    machine.chars().all(is_plain)
        && ["kvm", "qemu"].iter().any(|virt_type| {
            [false, true]
                .iter()
                .any(|explicit| dry_run_domain(virt_type, machine, *explicit) == domain)
        })
}

/// Checks the words after the domain that is the first argument.
fn of_domain<const N: usize>(body: &[u8], holds: impl Fn([u32; N]) -> bool) -> Option<bool> {
    let mut reader = Reader(body);
    reader.text()?;
    reader.bytes(UUID_AND_ID)?;
    let mut words = [0; N];
    for word in &mut words {
        *word = reader.word()?;
    }
    Some(reader.0.is_empty() && holds(words))
}
