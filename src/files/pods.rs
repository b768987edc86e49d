//! The sockets of launcher pods in a directory: the kubelet's pods directory, or the one that
//! `virtnode sockets` serves.
//!
//! ```text
//! /pods/<pod uid>/volumes/kubernetes.io~empty-dir/<volume>/<socket>     the kubelet's
//! /run/virtnode-launchers/<pod uid>.sock                                the broker's
//! ```
//! A pod owns the content of its volume, and may replace its socket by a symbolic link to the socket
//! of another pod. So each component is opened relative to its parent without following links, the last
//! one must be a socket, and a client connects by the descriptor that was checked: exchanging the name
//! later has no effect. The directories above the volume belong to the kubelet, and the volume itself
//! is a mount point, which the pod cannot replace.
//!
//! All calls are short and local: an emptyDir is a directory or a tmpfs of the node.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};

/// The kubelet's directory for the emptyDir volumes of a pod.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";
/// Suffix of a socket in the broker's directory.
pub const BROKER_SUFFIX: &str = ".sock";
/// Maximum length of a pod's UID, which is a UUID, or a hash for a static pod.
const MAXIMUM_UID: usize = 63;

/// A directory with the sockets of launcher pods.
#[derive(Debug, Clone)]
pub struct PodSockets {
    directory: PathBuf,
    /// Name of the pods' volume with the socket.
    volume: String,
    /// Names of the socket, the preferred first.
    names: Vec<String>,
}

/// Identifies a socket's file: a daemon that restarts creates another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SocketFile {
    pub device: u64,
    pub inode: u64,
    /// Time of its last change of status, in seconds and nanoseconds.
    pub changed: (i64, i64),
}

impl SocketFile {
    /// Returns the age: a newer socket has a greater number.
    pub fn age_rank(&self) -> u64 {
        let (seconds, nanos) = self.changed;
        let [seconds, nanos] = [seconds, nanos].map(|part| u64::try_from(part).unwrap_or(0));
        seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
    }
}

/// A file in the place of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OddFile {
    #[error("a symbolic link")]
    Link,
    #[error("not a socket")]
    Other,
}

/// The sockets in the directory at one time.
#[derive(Debug, Default)]
pub struct Scan {
    /// By pod UID, sorted. A pod without a socket is not listed.
    pub sockets: Vec<(String, Result<SocketFile, OddFile>)>,
    /// Pods with the volume and without a socket: the daemon starts, or ended.
    pub without_socket: Vec<String>,
    /// Pods whose directories cannot be opened, so that they may be launchers.
    pub unreadable: Vec<String>,
    /// Number of sockets beyond the maximum.
    pub omitted: usize,
}

/// The part of a launcher that exists.
enum Found {
    Socket(PodSocket),
    Odd(OddFile),
    /// The volume only.
    Volume,
    Nothing,
}

/// An open descriptor of a socket, by which clients connect.
#[derive(Debug)]
pub struct PodSocket {
    descriptor: OwnedFd,
    pub file: SocketFile,
}

impl PodSocket {
    /// Returns a path to the socket, valid in this process while `self` exists. It is short, whereas
    /// the path in the kubelet's directory may exceed the 107 bytes of a socket's address.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.descriptor.as_raw_fd()))
    }
}

impl PodSockets {
    pub fn new(directory: &Path, volume: &str, names: &[String]) -> Self {
        Self {
            directory: directory.to_owned(),
            volume: volume.to_owned(),
            names: names.to_vec(),
        }
    }

    /// Lists the sockets, at most `maximum`.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn scan(&self, maximum: usize) -> io::Result<Scan> {
        let directory = open_directory(&self.directory)?;
        let mut pods = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            if let Some(uid) = name.to_str().map(without_suffix).filter(|uid| is_uid(uid)) {
                pods.push(uid.to_owned());
            }
        }
        pods.sort_unstable();
        pods.dedup();
        let mut scan = Scan::default();
        for pod in pods {
            let file = match self.open_in(&directory, &pod) {
                Ok(Found::Socket(socket)) => Ok(socket.file),
                Ok(Found::Odd(odd)) => Err(odd),
                Ok(Found::Volume) => {
                    scan.without_socket.push(pod);
                    continue;
                }
                Ok(Found::Nothing) => continue,
                Err(_) => {
                    scan.unreadable.push(pod);
                    continue;
                }
            };
            if scan.sockets.len() < maximum {
                scan.sockets.push((pod, file));
            } else {
                scan.omitted += 1;
            }
        }
        Ok(scan)
    }

    /// Opens the socket of a pod for connecting to it.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if the pod has none, [`io::ErrorKind::InvalidInput`] with an
    /// [`OddFile`] for another file in its place; otherwise those of the file system.
    pub fn open(&self, pod: &str) -> io::Result<PodSocket> {
        if !is_uid(pod) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let directory = open_directory(&self.directory)?;
        match self.open_in(&directory, pod)? {
            Found::Socket(socket) => Ok(socket),
            Found::Odd(odd) => Err(io::Error::new(io::ErrorKind::InvalidInput, odd)),
            Found::Volume | Found::Nothing => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Opens the socket of a pod in the directory, if it has one.
    fn open_in(&self, directory: &OwnedFd, pod: &str) -> io::Result<Found> {
        let served = format!("{pod}{BROKER_SUFFIX}");
        match open_socket(directory, &served)? {
            Found::Volume | Found::Nothing => {}
            found => return Ok(found),
        }
        let mut parent = None;
        for part in [pod, "volumes", EMPTY_DIRS, &self.volume] {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let opened = openat(
                parent.as_ref().unwrap_or(directory),
                part,
                flags,
                Mode::empty(),
            );
            match opened {
                Ok(opened) => parent = Some(opened),
                // A link, or another pod than a launcher.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(Found::Nothing),
                Err(error) => return Err(error.into()),
            }
        }
        let volume = parent.as_ref().unwrap_or(directory);
        let mut found = Found::Volume;
        for name in &self.names {
            match open_socket(volume, name)? {
                socket @ Found::Socket(_) => return Ok(socket),
                odd @ Found::Odd(_) => found = odd,
                Found::Volume | Found::Nothing => {}
            }
        }
        Ok(found)
    }
}

/// Opens the configured directory, which may be a link: its path is trusted.
fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

fn open_socket(directory: &OwnedFd, name: &str) -> io::Result<Found> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let descriptor = match openat(directory, name, flags, Mode::empty()) {
        Ok(descriptor) => descriptor,
        Err(Errno::ENOENT) => return Ok(Found::Nothing),
        Err(error) => return Err(error.into()),
    };
    let status = fstat(&descriptor)?;
    Ok(match kind(&status) {
        SFlag::S_IFSOCK => Found::Socket(PodSocket {
            descriptor,
            file: SocketFile {
                device: status.st_dev,
                inode: status.st_ino,
                changed: (status.st_ctime, status.st_ctime_nsec),
            },
        }),
        SFlag::S_IFLNK => Found::Odd(OddFile::Link),
        _ => Found::Odd(OddFile::Other),
    })
}

fn kind(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

fn without_suffix(name: &str) -> &str {
    name.strip_suffix(BROKER_SUFFIX).unwrap_or(name)
}

/// True for a text that the kubelet uses as a pod's UID, and that is a single component of a path.
fn is_uid(text: &str) -> bool {
    (1..=MAXIMUM_UID).contains(&text.len())
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixListener, UnixStream};

    use tempfile::TempDir;

    use super::*;

    const VOLUME: &str = "libvirt-runtime";

    struct Node(TempDir);

    impl Node {
        fn new() -> Self {
            Self(tempfile::Builder::new().tempdir_in("/tmp").unwrap())
        }

        fn volume(&self, pod: &str) -> PathBuf {
            let volume = self.0.path().join(pod).join("volumes").join(EMPTY_DIRS);
            let volume = volume.join(VOLUME);
            fs::create_dir_all(&volume).unwrap();
            volume
        }

        fn sockets(&self) -> PodSockets {
            let names = ["virtqemud-sock".to_owned(), "libvirt-sock".to_owned()];
            PodSockets::new(self.0.path(), VOLUME, &names)
        }
    }

    #[test]
    fn each_pod_with_a_socket_is_listed_once_up_to_the_maximum() {
        let node = Node::new();
        let mut listeners = Vec::new();
        for (pod, name) in [("b", "libvirt-sock"), ("a", "virtqemud-sock")] {
            listeners.push(UnixListener::bind(node.volume(pod).join(name)).unwrap());
        }
        let both = UnixListener::bind(node.volume("a").join("libvirt-sock")).unwrap();
        let served = node.0.path().join("c.sock");
        listeners.push(UnixListener::bind(served).unwrap());
        node.volume("without-a-socket");
        fs::create_dir(node.0.path().join("no-volumes")).unwrap();
        fs::write(node.0.path().join("file"), "").unwrap();

        let scan = node.sockets().scan(9).unwrap();
        let pods: Vec<&str> = scan.sockets.iter().map(|(pod, _)| pod.as_str()).collect();
        assert_eq!(pods, ["a", "b", "c"]);
        assert_eq!(scan.without_socket, ["without-a-socket"]);
        assert!(scan.sockets.iter().all(|(_, file)| file.is_ok()));
        let scan = node.sockets().scan(1).unwrap();
        assert_eq!((scan.sockets.len(), scan.omitted), (1, 2));

        drop(both);
        let socket = node.sockets().open("a").unwrap();
        UnixStream::connect(socket.path()).unwrap();
        let missing = node.sockets().open("without-a-socket").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(node.sockets().open("../a").is_err());
    }

    #[test]
    fn links_to_the_socket_of_another_pod_are_refused() {
        let node = Node::new();
        let theirs = node.volume("theirs").join("virtqemud-sock");
        let _listener = UnixListener::bind(&theirs).unwrap();
        symlink(&theirs, node.volume("mine").join("virtqemud-sock")).unwrap();
        // The volume itself, if a pod could replace it.
        let volumes = node.0.path().join("other/volumes").join(EMPTY_DIRS);
        fs::create_dir_all(&volumes).unwrap();
        symlink(theirs.parent().unwrap(), volumes.join(VOLUME)).unwrap();
        fs::write(node.volume("file").join("virtqemud-sock"), "").unwrap();
        symlink(&theirs, node.0.path().join("served.sock")).unwrap();

        let scan = node.sockets().scan(9).unwrap();
        let [file, mine, served, theirs] = &scan.sockets[..] else {
            panic!("{scan:?}");
        };
        assert_eq!(*file, ("file".to_owned(), Err(OddFile::Other)));
        assert_eq!(*mine, ("mine".to_owned(), Err(OddFile::Link)));
        assert_eq!(*served, ("served".to_owned(), Err(OddFile::Link)));
        assert!(theirs.1.is_ok());
        let refused = node.sockets().open("mine").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn exchanged_name_does_not_change_an_opened_socket() {
        let node = Node::new();
        let path = node.volume("mine").join("virtqemud-sock");
        let mine = UnixListener::bind(&path).unwrap();
        let theirs = node.volume("theirs").join("virtqemud-sock");
        let others = UnixListener::bind(&theirs).unwrap();
        others.set_nonblocking(true).unwrap();
        let socket = node.sockets().open("mine").unwrap();

        fs::remove_file(&path).unwrap();
        symlink(&theirs, &path).unwrap();
        UnixStream::connect(socket.path()).unwrap();
        mine.accept().unwrap();
        assert!(others.accept().is_err());

        // A restarted daemon has another socket.
        fs::remove_file(&path).unwrap();
        let _mine = UnixListener::bind(&path).unwrap();
        assert_ne!(node.sockets().open("mine").unwrap().file, socket.file);
    }
}
