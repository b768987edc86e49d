//! Who is at the other end of a local socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// The groups that a process may be in (`NGROUPS_MAX`, linux/limits.h).
const MOST: usize = 65_536;

/// `SO_PEERGROUPS`: the further groups that the process at the other end of a unix socket was in
/// when it connected. The kernel's own word: no user database is asked.
///
/// # Errors
/// The kernel's own; Linux has this since 4.13.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 32];
    loop {
        let mut bytes = libc::socklen_t::try_from(size_of_val(&groups[..])).unwrap_or(0);
        // SAFETY: the socket is open; the kernel writes at most as many bytes as it is told that
        // there are, and says how many there were.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let found = usize::try_from(bytes).unwrap_or(0) / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(found);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // Too short: it said how long it must be.
        if error.raw_os_error() != Some(libc::ERANGE) || found <= groups.len() || found > MOST {
            return Err(error);
        }
        groups.resize(found, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_groups_of_who_connects_are_the_kernels() {
        let (here, _there) = UnixStream::pair().unwrap();
        let own = nix::unistd::getgroups().unwrap();
        let mut own: Vec<u32> = own.into_iter().map(nix::unistd::Gid::as_raw).collect();
        let mut found = peer_groups(here.as_fd()).unwrap();
        own.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, own);
    }

    #[test]
    fn what_is_no_local_socket_has_none() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let groups = peer_groups(listener.as_fd());
        assert!(groups.is_err() || groups.is_ok_and(|groups| groups.is_empty()));
    }
}
