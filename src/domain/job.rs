//! Background jobs on a domain.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A job on a domain that may take minutes or hours (`virDomainJobOperation`, libvirt-domain.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    Start,
    /// Writes the domain's state to a file and stops the domain.
    Save,
    /// Starts the domain from such a file.
    Restore,
    MigrationIn,
    MigrationOut,
    Snapshot,
    SnapshotRevert,
    /// Writes the domain's memory to a file for analysis.
    Dump,
    /// Copies the domain's disks.
    Backup,
    SnapshotDelete,
    /// Not reported by libvirt, or newer than this list.
    Other,
}

impl Job {
    /// Converts libvirt's number.
    pub fn from_libvirt(operation: u64) -> Self {
        match operation {
            1 => Self::Start,
            2 => Self::Save,
            3 => Self::Restore,
            4 => Self::MigrationIn,
            5 => Self::MigrationOut,
            6 => Self::Snapshot,
            7 => Self::SnapshotRevert,
            8 => Self::Dump,
            9 => Self::Backup,
            10 => Self::SnapshotDelete,
            _ => Self::Other,
        }
    }

    /// True if libvirt rejects changes to the domain until the job ends. It allows them during a
    /// backup, which may take hours (`qemuBackupBegin`, libvirt 11.3).
    pub fn holds_changes(self) -> bool {
        self != Self::Backup
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "the start of the domain",
            Self::Save => "a save of the domain to a file",
            Self::Restore => "a restore of the domain from a file",
            Self::MigrationIn => "a migration of the domain to this node",
            Self::MigrationOut => "a migration of the domain to another node",
            Self::Snapshot => "a snapshot of the domain",
            Self::SnapshotRevert => "a revert of the domain to a snapshot",
            Self::Dump => "a dump of the domain's memory",
            Self::Backup => "a backup of the domain's disks",
            Self::SnapshotDelete => "the removal of a snapshot of the domain",
            Self::Other => "a libvirt job on the domain",
        })
    }
}
