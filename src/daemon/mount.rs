//! Detects that libvirt's directory was deleted and re-created on the host.
//!
//! A container's mount keeps the directory that existed when the container was started. If that
//! directory is deleted, the daemon could never connect to a libvirt that is started afterwards, and
//! only a restart of the container mounts the new one. Such a directory exists without a name: its
//! link count is 0. On the host itself a path never leads to a deleted directory.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::sleep;
use tracing::error;

use crate::doctor::socket_of;

/// The directory of `qemu:///system`.
const SYSTEM: &str = "/run/libvirt";
/// Interval between checks, which cost one system call.
const INTERVAL: Duration = Duration::from_secs(5);

/// Returns the directory with the socket of a connection, if the connection has one of its own.
pub(super) fn socket_directory(uri: &str) -> Option<PathBuf> {
    if uri == "qemu:///system" {
        return Some(SYSTEM.into());
    }
    socket_of(uri)?.parent().map(Path::to_owned)
}

/// Returns when the directory is deleted and still mounted here. A directory that does not exist is
/// waited for.
pub(super) async fn until_deleted(directory: PathBuf) {
    while !is_deleted(&directory) {
        sleep(INTERVAL).await;
    }
    error!(
        directory = %directory.display(),
        "the directory with libvirt's socket was deleted on the host, and this container has the old \
         one: ending, so that a restart mounts the new one"
    );
}

fn is_deleted(directory: &Path) -> bool {
    let metadata = std::fs::metadata(directory);
    metadata.is_ok_and(|metadata| metadata.is_dir() && metadata.nlink() == 0)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_a_directory_without_a_name_is_deleted() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("libvirt");
        assert!(!is_deleted(&directory), "missing");
        fs::create_dir(&directory).unwrap();
        let open = File::open(&directory).unwrap();
        // Leads to the directory like a mount, whatever its name.
        let mounted = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
        assert!(!is_deleted(&mounted));
        fs::remove_dir(&directory).unwrap();
        fs::create_dir(&directory).unwrap();
        assert!(is_deleted(&mounted));
        assert!(!is_deleted(&directory));
    }

    #[test]
    fn directory_is_that_of_the_uris_socket() {
        let of = |uri| socket_directory(uri);
        assert_eq!(of("qemu:///system"), Some("/run/libvirt".into()));
        assert_eq!(
            of("qemu+unix:///system?socket=/run/x/libvirt-sock"),
            Some("/run/x".into())
        );
        assert_eq!(of("qemu:///session"), None);
    }
}
