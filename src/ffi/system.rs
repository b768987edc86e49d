//! Calls to the kernel and the C library, independent of libvirt.

use std::ffi::c_int;
use std::io::{self, Write, stdout};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;

/// The ioctls of /dev/kvm (`linux/kvm.h`), whose group is 0xAE.
mod ioctls {
    nix::ioctl_write_int_bad!(check_extension, nix::request_code_none!(0xAE, 0x03));
    nix::ioctl_readwrite_bad!(
        get_msr_index_list,
        // The size in the number is that of `struct kvm_msr_list` without its open-ended array.
        nix::request_code_readwrite!(0xAE, 0x02, size_of::<u32>()),
        u32
    );
}

/// `KVM_CHECK_EXTENSION`: what KVM says of a capability; 0 is no.
///
/// # Errors
/// The kernel's own; `ENOTTY` if `kvm` is not /dev/kvm.
pub fn kvm_extension(kvm: BorrowedFd<'_>, capability: u32) -> nix::Result<u32> {
    let capability = c_int::try_from(capability).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the descriptor is open for as long as it is borrowed, and this ioctl takes a number.
    let answer = unsafe { ioctls::check_extension(kvm.as_raw_fd(), capability) }?;
    u32::try_from(answer).map_err(|_| Errno::EINVAL)
}

/// `KVM_GET_MSR_INDEX_LIST`: the model-specific registers that guests can have (x86).
///
/// # Errors
/// The kernel's own; `ENOTTY` if `kvm` is not /dev/kvm.
pub fn kvm_msr_indices(kvm: BorrowedFd<'_>) -> nix::Result<Vec<u32>> {
    // The first element is the number of those that follow, for the kernel to fill in.
    let mut list = vec![0_u32];
    // SAFETY: the descriptor is open, and the list has room for as many as its head says: none.
    match unsafe { ioctls::get_msr_index_list(kvm.as_raw_fd(), list.as_mut_ptr()) } {
        Ok(_) => return Ok(Vec::new()),
        Err(Errno::E2BIG) => {}
        Err(other) => return Err(other),
    }
    let length = usize::try_from(list[0]).map_err(|_| Errno::EOVERFLOW)?;
    list.resize(1 + length, 0);
    // SAFETY: as above; the head was set by the first call and that many follow it.
    unsafe { ioctls::get_msr_index_list(kvm.as_raw_fd(), list.as_mut_ptr()) }?;
    let length = usize::try_from(list[0]).map_err(|_| Errno::EOVERFLOW)?;
    Ok(list.drain(1..).take(length).collect())
}

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
        // SAFETY: the socket is open; the kernel writes at most `bytes` bytes and returns
        // their number.
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

/// Tunes malloc for a long-lived, mostly idle process.
///
/// One arena for all threads: those of libvirt's calls wait far more than they allocate, and an
/// arena each is memory that only they can use again. And what a probe needed for a moment goes
/// back to the system, which with glibc's own, growing thresholds it would not (`mallopt(3)`).
/// Without glibc nothing is done.
pub fn keep_little_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, 64 * 1024),
        (libc::M_TRIM_THRESHOLD, 64 * 1024),
    ] {
        // SAFETY: it only sets a number, before there are other threads. If glibc does not know
        // the parameter, it changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Ends this process at once, with what was printed written out.
///
/// Without the destructors of C libraries, which [`std::process::exit`] runs: those of libvirt's
/// TLS libraries free what its threads still use, and a thread inside libvirt cannot be waited for.
pub fn leave(status: u8) -> ! {
    // A closed pipe is the reader's wish.
    let _closed = stdout().flush();
    // SAFETY: it does not return and runs no destructor.
    unsafe { libc::_exit(status.into()) }
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
