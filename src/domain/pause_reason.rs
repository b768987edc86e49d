//! Reasons for which a domain is paused or shut off.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::DomainState;

/// libvirt's reason for a paused domain (`virDomainPausedReason`, libvirt-domain.h) or a shut-off
/// one (`virDomainShutoffReason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PauseReason {
    /// Paused: a user suspended it.
    User,
    /// Paused: it is migrating to or from another node.
    Migration,
    /// Paused: its state is being written to a file.
    Save,
    /// Paused: its memory is being written to a file for analysis.
    Dump,
    /// Paused: a disk cannot be read or written.
    IoError,
    /// Paused: the guest's watchdog expired.
    Watchdog,
    /// Paused: it was reverted to a snapshot of a paused domain, or paused on request.
    FromSnapshot,
    /// Paused: its guest has shut down, and libvirt is about to stop or restart it.
    ShuttingDown,
    /// Paused: a snapshot is being taken.
    Snapshot,
    /// Paused: its guest crashed.
    Crashed,
    /// Paused: it is being started.
    StartingUp,
    /// Paused: it already runs on another node, which still fetches memory from here.
    PostCopy,
    /// Paused: the post-copy migration failed.
    PostCopyFailed,
    /// Paused: libvirt failed to resume it after a migration, a snapshot or the like.
    ResumeFailed,
    /// Paused: unknown to libvirt, or newer than this list.
    Unknown,
    /// Shut off: it migrated to another node.
    Migrated,
    /// Shut off: its state was written to a file.
    Saved,
}

impl PauseReason {
    /// Converts libvirt's number, whose meaning depends on the state. Of the reasons for a shut-off
    /// domain, only those are returned for which starting it would be wrong.
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

    /// True if the pause ends without intervention when a job on the domain ends: the domain then
    /// resumes or stops.
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

    pub fn remedy(self) -> &'static str {
        match self {
            Self::User | Self::FromSnapshot | Self::Unknown => "resume it first",
            Self::IoError => {
                "see which disk it is (virsh domblkerror), repair its storage, and resume the \
                 domain"
            }
            Self::Watchdog | Self::Crashed => {
                "see the last messages on the guest's console, and reset or restart it"
            }
            Self::PostCopyFailed => "resume the migration (virsh migrate --postcopy-resume)",
            Self::ResumeFailed => "see libvirt's log for the cause, and resume it",
            Self::Migrated => "ask the node that it runs on now",
            Self::Saved => "restore it first",
            Self::Migration
            | Self::Save
            | Self::Dump
            | Self::ShuttingDown
            | Self::Snapshot
            | Self::StartingUp
            | Self::PostCopy => "wait until that is over; if no job on it is left, resume it",
        }
    }
}

impl fmt::Display for PauseReason {
    /// Continues "the domain is paused" or "the domain is shut off".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "by a user",
            Self::Migration => "by a migration",
            Self::Save => "by a save to a file",
            Self::Dump => "by a dump of its memory",
            Self::IoError => "by an I/O error of one of its disks",
            Self::Watchdog => "by its watchdog",
            Self::FromSnapshot => "since its revert to a snapshot",
            Self::ShuttingDown => "by its own shutdown",
            Self::Snapshot => "by a snapshot in progress",
            Self::Crashed => "by a crash of its guest",
            Self::StartingUp => "by its start",
            Self::PostCopy => "by a post-copy migration",
            Self::PostCopyFailed => "by a post-copy migration that failed",
            Self::ResumeFailed => "since libvirt failed to resume it",
            Self::Unknown => "for a reason that libvirt does not report",
            Self::Migrated => "since it migrated to another node",
            Self::Saved => "since it was saved to a file",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meaning_of_number_depends_on_state() {
        let reason = PauseReason::from_libvirt;
        assert_eq!(reason(DomainState::Paused, 5), Some(PauseReason::IoError));
        assert_eq!(reason(DomainState::ShutOff, 5), Some(PauseReason::Saved));
        assert_eq!(reason(DomainState::ShutOff, 1), None);
        assert_eq!(reason(DomainState::Running, 5), None);
        assert_eq!(reason(DomainState::Paused, 99), Some(PauseReason::Unknown));
    }

    #[test]
    fn only_jobs_end_by_themselves() {
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
                "by a snapshot in progress",
                "by its start",
                "by a post-copy migration",
            ]
        );
    }
}
