//! Every call that Rust cannot check, and nothing else: the one file with `unsafe`.
//!
//! * libvirt's functions that the crate `virt` lacks ([`Watched`], [`baseline_hypervisor_cpu`]);
//! * KVM's ioctls ([`kvm_extension`], [`kvm_msr_indices`]).
//!
//! All of it is safe to call. What libvirt hands out is copied and freed here; what libvirt calls
//! back cannot unwind into it.

use std::ffi::{CString, c_int, c_void};
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{fmt, ptr};

use nix::errno::Errno;
use nix::libc;
use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

/// Why libvirt ended a connection (`virConnectCloseReason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The socket failed.
    Error,
    /// The other side closed it: libvirtd ended.
    EndOfFile,
    /// Keepalive messages stayed without an answer.
    Keepalive,
    /// We closed it ourselves, or a reason newer than this list.
    Other,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "the socket failed",
            Self::EndOfFile => "libvirt closed it",
            Self::Keepalive => "libvirt stopped answering keepalive messages",
            Self::Other => "it was closed",
        })
    }
}

/// What is called when a connection ends.
type OnClose = Box<dyn Fn(CloseReason) + Send + Sync>;

/// A connection whose end is told: libvirt's close callback, registered for as long as this lives.
///
/// libvirt keeps a reference to a connection that has a callback, so the callback is taken off
/// before the connection is closed. Both may ask libvirtd and so may block.
pub struct Watched(Connect);

impl Watched {
    /// Has `on_close` called when the connection ends, at most once, on the event loop's thread
    /// or on one that is just making a call: it must neither block nor call libvirt.
    ///
    /// # Errors
    /// libvirt's own; `VIR_ERR_NO_SUPPORT` from drivers that live in this process.
    pub fn new(
        connect: Connect,
        on_close: impl Fn(CloseReason) + Send + Sync + 'static,
    ) -> Result<Self, (Connect, Error)> {
        let opaque = Box::into_raw(Box::new(Box::new(on_close) as OnClose)).cast::<c_void>();
        // SAFETY: the pointer is of a live connection that `connect` owns. `opaque` is an
        // `OnClose` on the heap that stays until libvirt calls `free_on_close` once: when the
        // callback was called or taken off.
        let result = unsafe {
            sys::virConnectRegisterCloseCallback(
                connect.as_ptr(),
                Some(call_on_close),
                opaque,
                Some(free_on_close),
            )
        };
        if result == 0 {
            return Ok(Self(connect));
        }
        let error = Error::last_error();
        // SAFETY: libvirt did not take `opaque`: it stores the callback as its last step, after
        // all that can fail (virConnectRegisterCloseCallback and remoteConnectRegisterCloseCallback).
        unsafe { free_on_close(opaque) };
        Err((connect, error))
    }

    /// A connection whose end cannot be told, for drivers that know none.
    pub fn unwatched(connect: Connect) -> Self {
        Self(connect)
    }
}

impl Deref for Watched {
    type Target = Connect;

    fn deref(&self) -> &Connect {
        &self.0
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // SAFETY: the connection is alive until the field is dropped after this. Taking off what
        // was called already or never registered is an error without consequence.
        unsafe { sys::virConnectUnregisterCloseCallback(self.0.as_ptr(), Some(call_on_close)) };
    }
}

/// libvirt's side of [`OnClose`].
unsafe extern "C" fn call_on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: `opaque` is the `OnClose` of `Watched::new`, which libvirt frees only after this.
    let on_close = unsafe { &*opaque.cast::<OnClose>() };
    let reason = match u32::try_from(reason) {
        Ok(sys::VIR_CONNECT_CLOSE_REASON_ERROR) => CloseReason::Error,
        Ok(sys::VIR_CONNECT_CLOSE_REASON_EOF) => CloseReason::EndOfFile,
        Ok(sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE) => CloseReason::Keepalive,
        _ => CloseReason::Other,
    };
    // Unwinding into C aborts the process. The panic itself was printed by the panic hook.
    drop(catch_unwind(AssertUnwindSafe(|| on_close(reason))));
}

/// Frees what [`Watched::new`] put on the heap.
unsafe extern "C" fn free_on_close(opaque: *mut c_void) {
    // SAFETY: `opaque` came from `Box::into_raw` of a `Box<OnClose>` and is given up here, once.
    let on_close = unsafe { Box::from_raw(opaque.cast::<OnClose>()) };
    drop(catch_unwind(AssertUnwindSafe(|| drop(on_close))));
}

/// `virConnectBaselineHypervisorCPU` for one CPU definition: what this hypervisor can give of it.
/// `flags` are `VIR_CONNECT_BASELINE_CPU_*`; what is `None` libvirt chooses itself.
///
/// # Errors
/// libvirt's own (`VIR_ERR_CONFIG_UNSUPPORTED` where the architecture has no such call), and
/// `VIR_ERR_INVALID_ARG` for a text with a NUL.
pub fn baseline_hypervisor_cpu(
    connect: &Connect,
    arch: Option<&str>,
    machine: Option<&str>,
    virt_type: Option<&str>,
    cpu: &str,
    flags: u32,
) -> Result<String, Error> {
    let text = |value: Option<&str>| value.map(CString::new).transpose();
    let (arch, machine, virt_type) = (text(arch)?, text(machine)?, text(virt_type)?);
    let cpu = CString::new(cpu)?;
    let pointer = |value: &Option<CString>| value.as_ref().map_or(ptr::null(), |v| v.as_ptr());
    let mut cpus = [cpu.as_ptr()];
    // SAFETY: the connection is alive; every text is NUL-terminated or a null pointer, which the
    // call allows, and outlives it; `cpus` holds as many as said.
    let answer = unsafe {
        sys::virConnectBaselineHypervisorCPU(
            connect.as_ptr(),
            ptr::null(),
            pointer(&arch),
            pointer(&machine),
            pointer(&virt_type),
            cpus.as_mut_ptr(),
            1,
            flags,
        )
    };
    if answer.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: libvirt answers with a NUL-terminated text that is ours to free.
    let copy = unsafe { std::ffi::CStr::from_ptr(answer) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: it was allocated by malloc, and nothing refers to it any more.
    unsafe { libc::free(answer.cast()) };
    Ok(copy)
}

/// The ioctls of /dev/kvm (`linux/kvm.h`), whose group is 0xAE.
mod kvm {
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
    let answer = unsafe { kvm::check_extension(kvm.as_raw_fd(), capability) }?;
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
    match unsafe { kvm::get_msr_index_list(kvm.as_raw_fd(), list.as_mut_ptr()) } {
        Ok(_) => return Ok(Vec::new()),
        Err(Errno::E2BIG) => {}
        Err(other) => return Err(other),
    }
    let length = usize::try_from(list[0]).map_err(|_| Errno::EOVERFLOW)?;
    list.resize(1 + length, 0);
    // SAFETY: as above; the head was set by the first call and that many follow it.
    unsafe { kvm::get_msr_index_list(kvm.as_raw_fd(), list.as_mut_ptr()) }?;
    let length = usize::try_from(list[0]).map_err(|_| Errno::EOVERFLOW)?;
    Ok(list.drain(1..).take(length).collect())
}
