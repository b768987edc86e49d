//! libvirt's and QEMU's events.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_longlong, c_uint, c_ulonglong, c_void};
use std::mem::transmute;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

use super::domain::identity;
use super::parameters::copied;

/// Something that happened to a domain, in libvirt's own terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RawEventKind {
    /// A QEMU monitor event.
    Monitor {
        /// QEMU's name of it.
        name: String,
        /// Its data, JSON; `None` if it has none.
        details: Option<String>,
    },
    /// `VIR_DOMAIN_EVENT_ID_LIFECYCLE`: `virDomainEventType` and the number of its detail.
    Lifecycle { event: u32, detail: u32 },
    /// `VIR_DOMAIN_EVENT_ID_REBOOT`.
    Reboot,
    /// `VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED`, with the alias.
    DeviceRemoved(String),
    /// `VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED`, with the alias.
    DeviceRemovalFailed(String),
    /// `VIR_DOMAIN_EVENT_ID_VCPU_REMOVED` (libvirt 12.4), with the number.
    VcpuRemoved(u32),
    /// `VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE`: whether the guest agent is connected.
    Agent(bool),
    /// `VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE` (libvirt 7.9).
    MemorySize {
        /// The device's alias.
        alias: String,
        /// Size plugged in the guest, in KiB.
        kib: u64,
    },
}

/// An event of libvirt with the domain that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawEvent {
    /// The domain's name: tenants' text.
    pub name: String,
    /// The domain's UUID in its usual spelling.
    pub uuid: String,
    pub what: RawEventKind,
}

type Listener = Arc<dyn Fn(RawEvent) + Send + Sync>;

/// The listeners of the subscriptions that are alive, by number.
///
/// libvirt is given the number and never a pointer, as it may still deliver, or free, after a
/// registration failed or was taken off, if it is just delivering (virObjectEventStateDeregisterID).
static LISTENERS: Mutex<(usize, BTreeMap<usize, Listener>)> = Mutex::new((0, BTreeMap::new()));

fn listeners() -> MutexGuard<'static, (usize, BTreeMap<usize, Listener>)> {
    LISTENERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The events of all domains of a connection, for as long as this lives.
///
/// libvirt keeps a reference to a connection that has registrations, so this is to be dropped
/// before the connection is closed. Making and dropping it ask libvirtd and so may block.
pub struct Subscription {
    connect: Connect,
    listener: usize,
    events: Vec<c_int>,
    monitor: Option<c_int>,
    refused: Vec<(&'static str, Error)>,
}

impl Subscription {
    /// Has `listener` called with the domain events of [`RawEventKind`], and with the QEMU monitor
    /// events whose name matches `monitor`, a POSIX extended regular expression. It is called on
    /// the event loop's thread and must neither block nor call libvirt.
    ///
    /// Events that this libvirt or its driver does not support are omitted: see [`Subscription::refused`].
    ///
    /// # Errors
    /// Only if the connection cannot be held, or for a text with a NUL.
    pub fn new(
        connect: &Connect,
        monitor: &str,
        listener: impl Fn(RawEvent) + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let monitor = CString::new(monitor)?;
        let mut all = listeners();
        all.0 += 1;
        let number = all.0;
        all.1.insert(number, Arc::new(listener));
        drop(all);
        let mut subscription = Self {
            connect: connect.clone(),
            listener: number,
            events: Vec::new(),
            monitor: None,
            refused: Vec::new(),
        };
        subscription.register_events();
        subscription.register_monitor(&monitor);
        Ok(subscription)
    }

    /// The events that libvirt does not tell here, and what it said.
    pub fn refused(&self) -> &[(&'static str, Error)] {
        &self.refused
    }

    /// Not a pointer to anything: the number of the listener.
    fn opaque(&self) -> *mut c_void {
        ptr::without_provenance_mut(self.listener)
    }

    fn register_events(&mut self) {
        for (name, id, callback) in callbacks() {
            // SAFETY: the connection is alive; without a domain it is for all of them; the
            // callback has the signature of its event and `opaque` is no pointer, so there is
            // nothing to free.
            let registration = unsafe {
                sys::virConnectDomainEventRegisterAny(
                    self.connect.as_ptr(),
                    ptr::null_mut(),
                    id,
                    callback,
                    self.opaque(),
                    None,
                )
            };
            match registration {
                0.. => self.events.push(registration),
                _ => self.refused.push((name, Error::last_error())),
            }
        }
    }

    fn register_monitor(&mut self, names: &CString) {
        // SAFETY: as of the other events; the text ends with a NUL and libvirt copies it.
        let registration = unsafe {
            sys::virConnectDomainQemuMonitorEventRegister(
                self.connect.as_ptr(),
                ptr::null_mut(),
                names.as_ptr(),
                Some(on_monitor),
                self.opaque(),
                None,
                sys::VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
            )
        };
        match registration {
            0.. => self.monitor = Some(registration),
            _ => self.refused.push(("monitor", Error::last_error())),
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let listener = listeners().1.remove(&self.listener);
        // Not under the lock: it may do anything.
        drop(listener);
        // SAFETY: the connection is alive, and the numbers are of registrations that it has. On a
        // dead connection libvirt takes off its own side all the same.
        unsafe {
            if let Some(registration) = self.monitor {
                sys::virConnectDomainQemuMonitorEventDeregister(
                    self.connect.as_ptr(),
                    registration,
                );
            }
            for registration in &self.events {
                sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), *registration);
            }
        }
    }
}

type Callback = sys::virConnectDomainEventGenericCallback;

/// Each domain event with its callback. Those that a libvirt is too old for it refuses.
fn callbacks() -> [(&'static str, c_int, Callback); 7] {
    let id = |id: sys::virDomainEventID| c_int::try_from(id).unwrap_or(c_int::MAX);
    // SAFETY: libvirt takes every callback as this type and calls it as the type that belongs to
    // the event (virConnectDomainEventRegisterAny, VIR_DOMAIN_EVENT_CALLBACK).
    unsafe {
        [
            (
                "lifecycle",
                id(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE),
                transmute::<sys::virConnectDomainEventCallback, Callback>(Some(on_lifecycle)),
            ),
            (
                "reboot",
                id(sys::VIR_DOMAIN_EVENT_ID_REBOOT),
                Some(on_reboot),
            ),
            (
                "device-removed",
                id(sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED),
                transmute::<sys::virConnectDomainEventDeviceRemovedCallback, Callback>(Some(
                    on_removed,
                )),
            ),
            (
                "device-removal-failed",
                id(sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED),
                transmute::<sys::virConnectDomainEventDeviceRemovalFailedCallback, Callback>(Some(
                    on_removal_failed,
                )),
            ),
            (
                "vcpu-removed",
                id(sys::VIR_DOMAIN_EVENT_ID_VCPU_REMOVED),
                transmute::<sys::virConnectDomainEventVcpuRemovedCallback, Callback>(Some(
                    on_vcpu_removed,
                )),
            ),
            (
                "agent-lifecycle",
                id(sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE),
                transmute::<sys::virConnectDomainEventAgentLifecycleCallback, Callback>(Some(
                    on_agent,
                )),
            ),
            (
                "memory-device-size-change",
                id(sys::VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE),
                transmute::<sys::virConnectDomainEventMemoryDeviceSizeChangeCallback, Callback>(
                    Some(on_memory_size),
                ),
            ),
        ]
    }
}

/// Calls the listener. A panic ends here: unwinding into C would abort the process.
///
/// # Safety
/// `domain` is alive for the time of the call.
unsafe fn tell(
    domain: sys::virDomainPtr,
    opaque: *mut c_void,
    what: impl FnOnce() -> Option<RawEventKind>,
) {
    drop(catch_unwind(AssertUnwindSafe(|| {
        let listener = listeners().1.get(&opaque.addr()).map(Arc::clone);
        let (Some(listener), Some(what)) = (listener, what()) else {
            return;
        };
        // SAFETY: by this function's own condition.
        let (name, uuid) = unsafe { identity(domain) };
        listener(RawEvent { name, uuid, what });
    })));
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let number = |number| u32::try_from(number).unwrap_or(u32::MAX);
    let (event, detail) = (number(event), number(detail));
    // SAFETY: libvirt holds the domain for as long as it calls.
    unsafe {
        tell(domain, opaque, || {
            Some(RawEventKind::Lifecycle { event, detail })
        })
    };
    0
}

unsafe extern "C" fn on_reboot(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt holds the domain for as long as it calls.
    unsafe { tell(domain, opaque, || Some(RawEventKind::Reboot)) };
}

unsafe extern "C" fn on_removed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt holds the domain and the text for as long as it calls.
    unsafe {
        tell(domain, opaque, || {
            copied(alias).map(RawEventKind::DeviceRemoved)
        });
    }
}

unsafe extern "C" fn on_removal_failed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt holds the domain and the text for as long as it calls.
    unsafe {
        tell(domain, opaque, || {
            copied(alias).map(RawEventKind::DeviceRemovalFailed)
        });
    }
}

unsafe extern "C" fn on_vcpu_removed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    vcpu: c_uint,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt holds the domain for as long as it calls.
    unsafe { tell(domain, opaque, || Some(RawEventKind::VcpuRemoved(vcpu))) };
}

unsafe extern "C" fn on_agent(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    let connected = match u32::try_from(state) {
        Ok(sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED) => Some(true),
        Ok(sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_DISCONNECTED) => Some(false),
        _ => None,
    };
    // SAFETY: libvirt holds the domain for as long as it calls.
    unsafe { tell(domain, opaque, || connected.map(RawEventKind::Agent)) };
}

unsafe extern "C" fn on_memory_size(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    kib: c_ulonglong,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt holds the domain and the text for as long as it calls.
    unsafe {
        tell(domain, opaque, || {
            copied(alias).map(|alias| RawEventKind::MemorySize { alias, kib })
        });
    }
}

unsafe extern "C" fn on_monitor(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: *const c_char,
    _seconds: c_longlong,
    _micros: c_uint,
    details: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt holds the domain and the texts for as long as it calls.
    unsafe {
        tell(domain, opaque, || {
            Some(RawEventKind::Monitor {
                name: copied(event)?,
                details: copied(details),
            })
        });
    }
}
