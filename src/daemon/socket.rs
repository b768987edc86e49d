//! The Unix socket of the local API: its permissions, and the identity of its clients.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};

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

/// A listening socket. Dropping it removes its file.
pub struct LocalSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
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
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode: fs::symlink_metadata(path)?.ino(),
        })
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
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode);
        if ours {
            fs::remove_file(&self.path).ok();
        }
    }
}

impl Accept for LocalSocket {
    type Stream = UnixStream;
    type Peer = Peer;

    async fn accept(&self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.listener.accept().await?;
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

    #[tokio::test]
    async fn existing_directory_keeps_its_permissions() {
        let directory = tempfile::tempdir().unwrap();
        let before = mode(directory.path());
        let _socket = LocalSocket::bind(&directory.path().join("a.sock"), None).unwrap();
        assert_eq!(mode(directory.path()), before);
    }
}
