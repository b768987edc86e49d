//! Close callback of a connection, and its calls about CPU definitions.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{fmt, ptr};

use nix::libc;
use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

use super::parameters::copied;

/// Reason for the end of a connection (`virConnectCloseReason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The socket failed.
    Error,
    /// libvirtd ended.
    EndOfFile,
    /// libvirtd did not answer keepalive messages.
    Keepalive,
    /// This program closed the connection, or a reason newer than this list.
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
/// libvirt keeps a reference to a connection that has a callback, so the callback is removed before
/// the connection is closed. Both may call libvirtd and block.
pub struct Watched(Connect);

impl Watched {
    /// Registers `on_close`, which libvirt calls at most once when the connection ends, on the event
    /// loop's thread or on one that is making a call. It must neither block nor call libvirt.
    ///
    /// # Errors
    /// libvirt's error; `VIR_ERR_NO_SUPPORT` from drivers within this process.
    pub fn new(
        connect: Connect,
        on_close: impl Fn(CloseReason) + Send + Sync + 'static,
    ) -> Result<Self, (Connect, Error)> {
        let opaque = Box::into_raw(Box::new(Box::new(on_close) as OnClose)).cast::<c_void>();
        // SAFETY: the pointer is of a live connection that `connect` owns. `opaque` is an
        // `OnClose` on the heap that stays until libvirt calls `free_on_close` once: when the
        // callback was called or removed.
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
        // everything that can fail (virConnectRegisterCloseCallback and remoteConnectRegisterCloseCallback).
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
        // SAFETY: the connection is alive until the field is dropped after this. Removing a
        // callback that was called already or never registered is an error without consequence.
        unsafe { sys::virConnectUnregisterCloseCallback(self.0.as_ptr(), Some(call_on_close)) };
    }
}

/// Calls the [`OnClose`] for libvirt.
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

/// Frees the [`OnClose`] of [`Watched::new`].
unsafe extern "C" fn free_on_close(opaque: *mut c_void) {
    // SAFETY: `opaque` came from `Box::into_raw` of a `Box<OnClose>` and is given up here, once.
    let on_close = unsafe { Box::from_raw(opaque.cast::<OnClose>()) };
    drop(catch_unwind(AssertUnwindSafe(|| drop(on_close))));
}

/// Architecture, machine type and domain type. libvirt chooses each that is `None`.
pub type CpuTarget<'t> = [Option<&'t str>; 3];

/// Returns the part of a CPU definition that this hypervisor can provide
/// (`virConnectBaselineHypervisorCPU`).
/// `flags` are `VIR_CONNECT_BASELINE_CPU_*`.
///
/// # Errors
/// libvirt's error (`VIR_ERR_CONFIG_UNSUPPORTED` if the architecture does not have the call), and
/// `VIR_ERR_INVALID_ARG` for a text with a NUL.
pub fn baseline_hypervisor_cpu(
    connect: &Connect,
    target: CpuTarget<'_>,
    cpu: &str,
    flags: u32,
) -> Result<String, Error> {
    // SAFETY: the connection is alive; every text is NUL-terminated or a null pointer, which the
    // call takes for the emulator, the architecture, the machine and the type; the list has one
    // text. The answer is NUL-terminated, ours to free, and not used after that.
    with_texts(target, cpu, |arch, machine, virt_type, cpu| unsafe {
        let (connect, mut cpus, emulator) = (connect.as_ptr(), [cpu], ptr::null());
        let cpus = cpus.as_mut_ptr();
        let answer = sys::virConnectBaselineHypervisorCPU(
            connect, emulator, arch, machine, virt_type, cpus, 1, flags,
        );
        let copy = copied(answer).ok_or_else(Error::last_error)?;
        libc::free(answer.cast());
        Ok(copy)
    })
}

/// Compares a CPU definition with what this hypervisor can provide
/// (`virConnectCompareHypervisorCPU`).
/// `flags` are `VIR_CONNECT_COMPARE_CPU_*`. The answer is one of `VIR_CPU_COMPARE_*`.
///
/// # Errors
/// libvirt's error (`VIR_ERR_CPU_INCOMPATIBLE` with the difference, if a flag requests it), and
/// `VIR_ERR_INVALID_ARG` for a text with a NUL.
pub fn compare_hypervisor_cpu(
    connect: &Connect,
    target: CpuTarget<'_>,
    cpu: &str,
    flags: u32,
) -> Result<i32, Error> {
    // SAFETY: as in the baseline.
    let answer = with_texts(target, cpu, |arch, machine, virt_type, cpu| unsafe {
        let (connect, emulator) = (connect.as_ptr(), ptr::null());
        Ok(sys::virConnectCompareHypervisorCPU(
            connect, emulator, arch, machine, virt_type, cpu, flags,
        ))
    })?;
    match answer {
        0.. => Ok(answer),
        _ => Err(Error::last_error()),
    }
}

type Text = *const c_char;

/// Makes a call with C strings, which live as long as the call.
fn with_texts<T>(
    target: CpuTarget<'_>,
    cpu: &str,
    call: impl FnOnce(Text, Text, Text, Text) -> Result<T, Error>,
) -> Result<T, Error> {
    let text = |value: Option<&str>| value.map(CString::new).transpose();
    let (arch, machine, virt_type) = (text(target[0])?, text(target[1])?, text(target[2])?);
    let pointer = |text: &Option<CString>| text.as_ref().map_or(ptr::null(), |text| text.as_ptr());
    let cpu = CString::new(cpu)?;
    call(
        pointer(&arch),
        pointer(&machine),
        pointer(&virt_type),
        cpu.as_ptr(),
    )
}
