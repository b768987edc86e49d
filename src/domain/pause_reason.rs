//! Why a domain does not run.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::DomainState;

/// Why a domain is paused (`virDomainPausedReason`, libvirt-domain.h) or shut off
/// (`virDomainShutoffReason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PauseReason {
    /// Paused: somebody asked for it.
    User,
    /// Paused: it goes to another node, or comes from there.
    Migration,
    /// Paused: its state is being written to a file.
    Save,
    /// Paused: its memory is being written to a file, to be looked into.
    Dump,
    /// Paused: a disk cannot be read or written.
    IoError,
    /// Paused: the guest left its watchdog alone.
    Watchdog,
    /// Paused: it went back to a snapshot, which was of a paused domain or asked to be.
    FromSnapshot,
    /// Paused: its guest has shut down, and it is about to end or to be started anew.
    ShuttingDown,
    /// Paused: a snapshot is being taken.
    Snapshot,
    /// Paused: its guest crashed.
    Crashed,
    /// Paused: it is being started.
    StartingUp,
    /// Paused: it runs on another node already, which still fetches its memory from here.
    PostCopy,
    /// Paused: that failed.
    PostCopyFailed,
    /// Paused: libvirt could not let it run again after a migration, a snapshot and the like.
    ResumeFailed,
    /// Paused: libvirt does not know why, or it is newer than this list.
    Unknown,
    /// Shut off: it went to another node.
    Migrated,
    /// Shut off: its state was written to a file.
    Saved,
}

impl PauseReason {
    /// From libvirt's number, which means another thing in each state. Of the reasons for which a
    /// domain is shut off only those are told for which it must not be just started.
    pub fn from_libvirt(state: DomainState, number: u32) -> Option<Self> {
        Some(match (state, number) {
            (DomainState::Paused, 1) => Self::User,
            (DomainState::Paused, 2) => Self::Migration,
            (DomainState::Paused, 3) => Self::Save,
            (DomainState::Paused, 4) => Self::Dump,
            (DomainState::Paused, 5) => Self::IoError,
            (DomainState::Paused, 6) => Self::Watchdog,
            (DomainState::Paused, 7) => Self::FromSnapshot,
            (DomainState::Paused, 8) => Self::ShuttingDown,
            (DomainState::Paused, 9) => Self::Snapshot,
            (DomainState::Paused, 10) => Self::Crashed,
            (DomainState::Paused, 11) => Self::StartingUp,
            (DomainState::Paused, 12) => Self::PostCopy,
            (DomainState::Paused, 13) => Self::PostCopyFailed,
            (DomainState::Paused, 14) => Self::ResumeFailed,
            (DomainState::Paused, _) => Self::Unknown,
            (DomainState::ShutOff, 4) => Self::Migrated,
            (DomainState::ShutOff, 5) => Self::Saved,
            _ => return None,
        })
    }

    /// Whether it is over by itself when what is being done to the domain is done: then the domain
    /// runs on, or ends.
    pub fn ends_by_itself(self) -> bool {
        match self {
            Self::Migration
            | Self::Save
            | Self::Dump
            | Self::ShuttingDown
            | Self::Snapshot
            | Self::StartingUp
            | Self::PostCopy => true,
            Self::User
            | Self::IoError
            | Self::Watchdog
            | Self::FromSnapshot
            | Self::Crashed
            | Self::PostCopyFailed
            | Self::ResumeFailed
            | Self::Unknown
            | Self::Migrated
            | Self::Saved => false,
        }
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::User | Self::FromSnapshot | Self::Unknown => "resume it first",
            Self::IoError => {
                "see which disk it is (virsh domblkerror), put its storage right, and resume the \
                 domain"
            }
            Self::Watchdog | Self::Crashed => {
                "see what its guest's console says last, and reset it or start it anew"
            }
            Self::PostCopyFailed => "take the migration up again (virsh migrate --postcopy-resume)",
            Self::ResumeFailed => "see libvirt's log for why, and resume it",
            Self::Migrated => "ask the node that it runs on now",
            Self::Saved => "restore it first",
            Self::Migration
            | Self::Save
            | Self::Dump
            | Self::ShuttingDown
            | Self::Snapshot
            | Self::StartingUp
            | Self::PostCopy => {
                "wait until that is over; if nothing is being done to it any more, resume it"
            }
        }
    }
}

impl fmt::Display for PauseReason {
    /// As it goes on after "the domain is paused" or "the domain is shut off".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "by a user",
            Self::Migration => "by a migration",
            Self::Save => "by a save to a file",
            Self::Dump => "by a dump of its memory",
            Self::IoError => "by an I/O error of one of its disks",
            Self::Watchdog => "by its watchdog",
            Self::FromSnapshot => "since it went back to a snapshot",
            Self::ShuttingDown => "by its own shutdown",
            Self::Snapshot => "by a snapshot that is being taken",
            Self::Crashed => "by a crash of its guest",
            Self::StartingUp => "by its start",
            Self::PostCopy => "by a post-copy migration",
            Self::PostCopyFailed => "by a post-copy migration that failed",
            Self::ResumeFailed => "since libvirt could not let it run again",
            Self::Unknown => "for a reason that libvirt does not tell",
            Self::Migrated => "since it went to another node",
            Self::Saved => "since it was saved to a file",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_means_another_thing_in_each_state() {
        let reason = PauseReason::from_libvirt;
        assert_eq!(reason(DomainState::Paused, 5), Some(PauseReason::IoError));
        assert_eq!(reason(DomainState::ShutOff, 5), Some(PauseReason::Saved));
        assert_eq!(reason(DomainState::ShutOff, 1), None);
        assert_eq!(reason(DomainState::Running, 5), None);
        assert_eq!(reason(DomainState::Paused, 99), Some(PauseReason::Unknown));
    }

    #[test]
    fn only_what_is_being_done_ends_by_itself() {
        let by_itself = (0..=15)
            .filter_map(|number| PauseReason::from_libvirt(DomainState::Paused, number))
            .filter(|reason| reason.ends_by_itself());
        let texts: Vec<_> = by_itself.map(|reason| reason.to_string()).collect();
        assert_eq!(
            texts,
            [
                "by a migration",
                "by a save to a file",
                "by a dump of its memory",
                "by its own shutdown",
                "by a snapshot that is being taken",
                "by its start",
                "by a post-copy migration",
            ]
        );
    }
}
