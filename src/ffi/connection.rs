//! The end of a connection, and a call that is about none of its domains.

use std::ffi::{CString, c_int, c_void};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{fmt, ptr};

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

/// Callback for the end of a connection.
type OnClose = Box<dyn Fn(CloseReason) + Send + Sync>;

/// A connection with libvirt's close callback, registered until this is dropped.
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

    /// A connection without a close callback, for drivers that do not support one.
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
    // SAFETY: it was allocated by malloc, and nothing refers to it from here on.
    unsafe { libc::free(answer.cast()) };
    Ok(copy)
}

/// `virConnectCompareHypervisorCPU`: whether this hypervisor can give a CPU definition.
/// `flags` are `VIR_CONNECT_COMPARE_CPU_*`; what is `None` libvirt chooses itself. The answer is
/// one of `VIR_CPU_COMPARE_*`.
///
/// # Errors
/// libvirt's own (`VIR_ERR_CPU_INCOMPATIBLE` with what is missing, if a flag asks for it), and
/// `VIR_ERR_INVALID_ARG` for a text with a NUL.
pub fn compare_hypervisor_cpu(
    connect: &Connect,
    arch: Option<&str>,
    machine: Option<&str>,
    virt_type: Option<&str>,
    cpu: &str,
    flags: u32,
) -> Result<i32, Error> {
    let text = |value: Option<&str>| value.map(CString::new).transpose();
    let (arch, machine, virt_type) = (text(arch)?, text(machine)?, text(virt_type)?);
    let cpu = CString::new(cpu)?;
    let pointer = |value: &Option<CString>| value.as_ref().map_or(ptr::null(), |v| v.as_ptr());
    // SAFETY: the connection is alive; every text is NUL-terminated or a null pointer, which the
    // call allows for all but the CPU, and outlives it.
    let answer = unsafe {
        sys::virConnectCompareHypervisorCPU(
            connect.as_ptr(),
            ptr::null(),
            pointer(&arch),
            pointer(&machine),
            pointer(&virt_type),
            cpu.as_ptr(),
            flags,
        )
    };
    match answer {
        0.. => Ok(answer),
        _ => Err(Error::last_error()),
    }
}
