//! KVM's ioctls.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

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
