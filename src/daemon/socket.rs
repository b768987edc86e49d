//! The Unix socket of the local API: its permissions, and the identity of its clients.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::{error, warn};

use super::listener::Accept;
use crate::ffi::peer_groups;

/// Allows the owner and the group to connect.
const SOCKET_MODE: u32 = 0o660;
/// Hides the directory from other users.
const DIRECTORY_MODE: u32 = 0o750;

/// Identity of a client when it connected, according to the kernel (`SO_PEERCRED`,
/// `SO_PEERGROUPS`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Arc<[u32]>,
}

/// Interval between checks that the socket's file still exists.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// A listening socket. If its file is removed or replaced while it listens, it is bound again.
/// Dropping it removes its file.
pub struct LocalSocket {
    listener: UnixListener,
    path: PathBuf,
    gid: Option<u32>,
    inode: u64,
    check: Interval,
    /// True after a failure to bind again was logged.
    is_lost: bool,
}

impl LocalSocket {
    /// Creates the socket, and its directory if that does not exist. A socket without a listener is
    /// replaced; any other file is an error. `gid` becomes the group of the socket and directory.
    pub fn bind(path: &Path, gid: Option<u32>) -> io::Result<Self> {
        if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(DIRECTORY_MODE)
                .create(directory)?;
            // The umask may have removed the group's permissions.
            fs::set_permissions(directory, Permissions::from_mode(DIRECTORY_MODE))?;
            if gid.is_some() {
                chown(directory, None, gid)?;
            }
        }
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
        if gid.is_some() {
            chown(path, None, gid)?;
        }
        let mut check = interval(CHECK_INTERVAL);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            listener,
            path: path.to_owned(),
            gid,
            inode: fs::symlink_metadata(path)?.ino(),
            check,
            is_lost: false,
        })
    }

    /// True if the path leads to this socket.
    fn is_reachable(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode)
    }

    /// Binds the path again if it no longer leads to this socket. Open connections stay open.
    fn restore(&mut self) {
        if self.is_reachable() {
            return;
        }
        let path = self.path.display();
        match Self::bind(&self.path, self.gid) {
            Ok(socket) => {
                warn!(socket = %path, "the local API's socket was removed; bound it again");
                *self = socket;
            }
            Err(error) if !self.is_lost => {
                error!(
                    socket = %path, %error,
                    "the local API's socket was removed or replaced and cannot be bound again, \
                     retrying: commands do not reach this daemon"
                );
                self.is_lost = true;
            }
            Err(_) => {}
        }
    }
}

/// Removes a socket without a listener.
fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !found.file_type().is_socket() {
        let problem = "the file exists and is not a socket; remove it";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, problem));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => {
            let problem = "another daemon listens on it";
            Err(io::Error::new(io::ErrorKind::AddrInUse, problem))
        }
    }
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        // Another daemon may have created its own since.
        if self.is_reachable() {
            fs::remove_file(&self.path).ok();
        }
    }
}

impl Accept for LocalSocket {
    type Stream = UnixStream;
    type Peer = Peer;

    async fn accept(&mut self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = loop {
            tokio::select! {
                accepted = self.listener.accept() => break accepted?,
                _ = self.check.tick() => self.restore(),
            }
        };
        let credentials = stream.peer_cred()?;
        let peer = Peer {
            uid: credentials.uid(),
            gid: credentials.gid(),
            // Without support in the kernel (4.13), only the primary group counts.
            groups: peer_groups(stream.as_fd()).unwrap_or_default().into(),
        };
        Ok((stream, peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[tokio::test]
    async fn stale_socket_is_replaced_and_live_one_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/here.sock");
        let socket = LocalSocket::bind(&path, None).unwrap();
        assert_eq!(mode(&path), SOCKET_MODE);
        assert_eq!(mode(path.parent().unwrap()), DIRECTORY_MODE);

        let second = LocalSocket::bind(&path, None).err().unwrap();
        assert_eq!(second.to_string(), "another daemon listens on it");
        drop(socket);
        assert!(!path.exists());

        // As a killed daemon leaves it.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(LocalSocket::bind(&path, None).unwrap());

        fs::write(&path, "kept").unwrap();
        assert!(LocalSocket::bind(&path, None).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }

    #[tokio::test(start_paused = true)]
    async fn removed_socket_is_bound_again_and_a_replaced_one_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/here.sock");
        let mut socket = LocalSocket::bind(&path, None).unwrap();
        let restored = async |socket: &mut LocalSocket| {
            let accepted = tokio::time::timeout(2 * CHECK_INTERVAL, socket.accept());
            assert!(accepted.await.is_err(), "nobody connects");
        };
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        restored(&mut socket).await;
        assert!(socket.is_reachable());
        let (accepted, connected) = tokio::join!(socket.accept(), UnixStream::connect(&path));
        assert!(accepted.is_ok() && connected.is_ok());

        fs::remove_file(&path).unwrap();
        let other = LocalSocket::bind(&path, None).unwrap();
        restored(&mut socket).await;
        assert!(!socket.is_reachable() && other.is_reachable());
        drop(other);
        restored(&mut socket).await;
        assert!(socket.is_reachable());
    }

    #[tokio::test]
    async fn existing_directory_keeps_its_permissions() {
        let directory = tempfile::tempdir().unwrap();
        let before = mode(directory.path());
        let _socket = LocalSocket::bind(&directory.path().join("a.sock"), None).unwrap();
        assert_eq!(mode(directory.path()), before);
    }
}
