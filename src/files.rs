//! Files in directories that the daemon does not have for itself.
//!
//! Only regular files are opened: a FIFO would block the process, and a symbolic link would lead
//! out of the directory. Modes are set explicitly, so they do not depend on the umask.

pub mod pods;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Mode of a directory that everyone may read.
pub const PUBLIC_DIRECTORY: u32 = 0o755;
/// Mode of a file that everyone may read.
pub const PUBLIC_FILE: u32 = 0o644;
/// Mode of a directory for the daemon's user only.
pub const PRIVATE_DIRECTORY: u32 = 0o700;
/// Mode of a file for the daemon's user only.
pub const PRIVATE_FILE: u32 = 0o600;

/// Opens a regular file for reading.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] if it is not a regular file; otherwise those of the file system.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let problem = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path);
    match opened {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(problem()),
        // A symbolic link, or a socket.
        Err(error) if is(&error, Errno::ELOOP) || is(&error, Errno::ENXIO) => Err(problem()),
        Err(error) => Err(error),
    }
}

/// Creates a file for writing. A file with the same name is removed first.
///
/// # Errors
/// Those of the file system.
pub fn create(path: &Path, mode: u32) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    // The umask may have removed permissions.
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}

/// Creates a directory, and those above it, if it does not exist.
///
/// # Errors
/// Those of the file system.
pub fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Raises the soft limit of open descriptors to the hard limit. Both stay as they are on failure.
///
/// # Errors
/// The kernel's own.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn is(error: &io::Error, number: Errno) -> bool {
    error.raw_os_error() == Some(number as i32)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_none_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        create(&path("file"), PRIVATE_FILE)
            .unwrap()
            .write_all(b"x")
            .unwrap();
        assert!(open_regular(&path("file")).is_ok());
        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        symlink(path("file"), path("link")).unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        fs::create_dir(path("directory")).unwrap();
        for name in ["fifo", "link", "socket", "directory"] {
            let error = open_regular(&path(name)).unwrap_err();
            assert_eq!(error.to_string(), "not a regular file", "{name}");
        }
        assert_eq!(
            open_regular(&path("nothing")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn created_files_replace_links_and_fifos_and_have_their_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("target"), "kept").unwrap();
        symlink(path("target"), path("link")).unwrap();
        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        for name in ["link", "fifo", "new"] {
            let file = create(&path(name), PUBLIC_FILE).unwrap();
            let mode = file.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, PUBLIC_FILE, "{name}");
        }
        assert_eq!(fs::read_to_string(path("target")).unwrap(), "kept");
        create_directory(&path("a/b"), PRIVATE_DIRECTORY).unwrap();
        let mode = fs::metadata(path("a/b")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, PRIVATE_DIRECTORY);
    }
}
