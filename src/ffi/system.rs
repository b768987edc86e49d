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

/// Returns KVM's answer about a capability (`KVM_CHECK_EXTENSION`); 0 means unsupported.
///
/// # Errors
/// The kernel's error; `ENOTTY` if `kvm` is not /dev/kvm.
pub fn kvm_extension(kvm: BorrowedFd<'_>, capability: u32) -> nix::Result<u32> {
    let capability = c_int::try_from(capability).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the descriptor is open for as long as it is borrowed, and this ioctl takes a number.
    let answer = unsafe { ioctls::check_extension(kvm.as_raw_fd(), capability) }?;
    u32::try_from(answer).map_err(|_| Errno::EINVAL)
}

/// Returns the model-specific registers that guests can have on x86 (`KVM_GET_MSR_INDEX_LIST`).
///
/// # Errors
/// The kernel's error; `ENOTTY` if `kvm` is not /dev/kvm.
pub fn kvm_msr_indices(kvm: BorrowedFd<'_>) -> nix::Result<Vec<u32>> {
    // The kernel writes the number of registers to the first element.
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

/// Maximum number of groups of a process (`NGROUPS_MAX`, linux/limits.h).
const MOST: usize = 65_536;

/// Returns the supplementary groups of the process at the other end of a unix socket at the time of
/// its connection (`SO_PEERGROUPS`), from the kernel rather than a user database.
///
/// # Errors
/// The kernel's error; Linux has this option since 4.13.
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
        // The buffer was too short; the kernel returned the required length.
        if error.raw_os_error() != Some(libc::ERANGE) || found <= groups.len() || found > MOST {
            return Err(error);
        }
        groups.resize(found, 0);
    }
}

/// Tunes malloc for a long-lived, mostly idle process.
///
/// All threads share one arena: those of libvirt's calls mostly wait, and memory of an arena of their
/// own would be lost for other threads. Fixed thresholds return the memory of a probe to the system,
/// unlike glibc's default, growing ones (`mallopt(3)`). Without glibc this does nothing.
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

/// Flushes standard output and ends this process at once.
///
/// Unlike [`std::process::exit`] it does not run the destructors of C libraries: those of libvirt's
/// TLS libraries free memory that its threads still use, and a thread inside libvirt cannot be joined.
pub fn leave(status: u8) -> ! {
    // A closed pipe is not an error.
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
    fn peer_groups_are_those_of_the_process() {
        let (here, _there) = UnixStream::pair().unwrap();
        let own = nix::unistd::getgroups().unwrap();
        let mut own: Vec<u32> = own.into_iter().map(nix::unistd::Gid::as_raw).collect();
        let mut found = peer_groups(here.as_fd()).unwrap();
        own.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, own);
    }

    #[test]
    fn tcp_socket_has_no_peer_groups() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let groups = peer_groups(listener.as_fd());
        assert!(groups.is_err() || groups.is_ok_and(|groups| groups.is_empty()));
    }
}
