//! The local socket: where it lies, who may open it, and who is at its other end.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};

use super::listener::Listener;
use crate::ffi::peer_groups;

/// The owner and the group may connect.
const SOCKET_MODE: u32 = 0o660;
/// Nobody else may even look.
const DIRECTORY_MODE: u32 = 0o750;

/// Who is at the other end, as the kernel says (`SO_PEERCRED`, `SO_PEERGROUPS`): what it was when it
/// connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The user.
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    /// The further groups.
    pub groups: Arc<[u32]>,
}

/// The socket, taken away when dropped.
pub struct LocalSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl LocalSocket {
    /// Listens there. A directory that is missing is made. A socket that nobody answers on is
    /// replaced; anything else in its place is left alone. `gid` becomes the group of what is made.
    pub fn bind(path: &Path, gid: Option<u32>) -> io::Result<Self> {
        if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(DIRECTORY_MODE)
                .create(directory)?;
            // The umask may have taken the group's rights.
            fs::set_permissions(directory, Permissions::from_mode(DIRECTORY_MODE))?;
            if gid.is_some() {
                chown(directory, None, gid)?;
            }
        }
        clear(path)?;
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

/// Takes a stale socket away.
fn clear(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !found.file_type().is_socket() {
        let problem = "there is something that is no socket, which is left alone";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, problem));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => {
            let problem = "another daemon answers there";
            Err(io::Error::new(io::ErrorKind::AddrInUse, problem))
        }
    }
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        // Not one that another daemon has put there since.
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode);
        if ours {
            fs::remove_file(&self.path).ok();
        }
    }
}

impl Listener for LocalSocket {
    type Stream = UnixStream;
    type Peer = Peer;

    async fn accept(&self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.listener.accept().await?;
        let credentials = stream.peer_cred()?;
        let peer = Peer {
            uid: credentials.uid(),
            gid: credentials.gid(),
            // A kernel that does not tell them: then only the primary one counts.
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
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/here.sock");
        let socket = LocalSocket::bind(&path, None).unwrap();
        assert_eq!(mode(&path), SOCKET_MODE);
        assert_eq!(mode(path.parent().unwrap()), DIRECTORY_MODE);

        let second = LocalSocket::bind(&path, None).err().unwrap();
        assert_eq!(second.to_string(), "another daemon answers there");
        drop(socket);
        assert!(!path.exists());

        // What a killed daemon leaves behind.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(LocalSocket::bind(&path, None).unwrap());

        fs::write(&path, "kept").unwrap();
        assert!(LocalSocket::bind(&path, None).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }

    #[tokio::test]
    async fn a_directory_that_was_there_keeps_its_rights() {
        let directory = tempfile::tempdir().unwrap();
        let before = mode(directory.path());
        let _socket = LocalSocket::bind(&directory.path().join("a.sock"), None).unwrap();
        assert_eq!(mode(directory.path()), before);
    }
}
