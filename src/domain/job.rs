//! What is being done to a domain in the background.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A job that libvirt does to a domain, for minutes or hours (`virDomainJobOperation`,
/// libvirt-domain.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// It is being started.
    Start,
    /// Its state is being written to a file; it ends with that.
    Save,
    /// It is being started from such a file.
    Restore,
    /// It comes from another node.
    MigrationIn,
    /// It goes to another node, or a copy of it.
    MigrationOut,
    /// A snapshot is being taken.
    Snapshot,
    /// It goes back to a snapshot.
    SnapshotRevert,
    /// Its memory is being written to a file, to be looked into.
    Dump,
    /// Its disks are being backed up.
    Backup,
    /// A snapshot is being removed.
    SnapshotDelete,
    /// libvirt did not say what, or it is newer than this list.
    Other,
}

impl Job {
    /// From libvirt's number.
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

    /// Whether libvirt changes nothing of the domain until the job is over. It lets changes in
    /// during a backup, which may take hours (`qemuBackupBegin`, libvirt 11.3).
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
            Self::SnapshotRevert => "a return of the domain to a snapshot",
            Self::Dump => "a dump of the domain's memory",
            Self::Backup => "a backup of the domain's disks",
            Self::SnapshotDelete => "the removal of a snapshot of the domain",
            Self::Other => "a job of libvirt's on the domain",
        })
    }
}
