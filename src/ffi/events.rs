//! libvirt's and QEMU's events.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_longlong, c_uint, c_ulonglong, c_void};
use std::mem::transmute;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virt::connect::Connect;
use virt::error::Error;
use virt::sys::{
    self, virConnectDomainEventAgentLifecycleCallback as AgentLifecycle,
    virConnectDomainEventDeviceRemovalFailedCallback as RemovalFailed,
    virConnectDomainEventDeviceRemovedCallback as Removed,
    virConnectDomainEventMemoryDeviceSizeChangeCallback as MemorySize,
    virConnectDomainEventVcpuRemovedCallback as VcpuRemoved,
};

use super::domain::identity;
use super::parameters::copied;

/// A change of a domain, in libvirt's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RawEventKind {
    /// A QEMU monitor event.
    Monitor {
        /// QEMU's name of the event.
        name: String,
        /// Its data in JSON, if any.
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
    /// `VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE`: true if the guest agent is connected.
    Agent(bool),
    /// `VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE` (libvirt 7.9).
    MemorySize {
        /// The device's alias.
        alias: String,
        /// Size plugged in the guest, in KiB.
        kib: u64,
    },
}

/// An event of libvirt with its domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawEvent {
    /// The domain's name: untrusted text.
    pub name: String,
    /// The domain's UUID in its usual spelling.
    pub uuid: String,
    pub what: RawEventKind,
}

type Listener = Arc<dyn Fn(RawEvent) + Send + Sync>;

/// The listeners of all subscriptions, by number.
///
/// libvirt receives the number and never a pointer: while it delivers an event, it may still call or
/// free after a registration failed or was removed (virObjectEventStateDeregisterID).
static LISTENERS: Mutex<(usize, BTreeMap<usize, Listener>)> = Mutex::new((0, BTreeMap::new()));

fn listeners() -> MutexGuard<'static, (usize, BTreeMap<usize, Listener>)> {
    LISTENERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A subscription to the events of all domains of a connection, which ends when it is dropped.
///
/// libvirt keeps a reference to a connection that has registrations, so this must be dropped
/// before the connection is closed. Creating and dropping it call libvirtd and may block.
pub struct Subscription {
    connect: Connect,
    listener: usize,
    events: Vec<c_int>,
    monitor: Option<c_int>,
    refused: Vec<(&'static str, Error)>,
}

impl Subscription {
    /// Subscribes `listener` to the domain events of [`RawEventKind`], and to the QEMU monitor events
    /// whose name matches `monitor`, a POSIX extended regular expression. The event loop's thread
    /// calls it; it must neither block nor call libvirt.
    ///
    /// Events that this libvirt or its driver does not support are omitted: see [`Subscription::refused`].
    ///
    /// # Errors
    /// `VIR_ERR_INVALID_ARG` for a text with a NUL.
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

    /// Returns the events that this libvirt does not support, each with its error.
    pub fn refused(&self) -> &[(&'static str, Error)] {
        &self.refused
    }

    /// Returns the number of the listener in the form of a pointer.
    fn opaque(&self) -> *mut c_void {
        ptr::without_provenance_mut(self.listener)
    }

    fn register_events(&mut self) {
        for (name, id, callback) in callbacks() {
            let id = c_int::try_from(id).unwrap_or(c_int::MAX);
            // SAFETY: the connection is alive; without a domain it is for all of them; the
            // callback has the signature of its event and `opaque` is not a pointer, so there
            // is nothing to free.
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
        // SAFETY: as for the other events; the text ends with a NUL and libvirt copies it.
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
        // Dropped outside the lock, because a listener's drop may run any code.
        drop(listener);
        // SAFETY: the connection is alive, and the numbers are of registrations that it has. On a
        // dead connection libvirt still removes its own side.
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

/// Calls the listener. A panic ends here: unwinding into C would abort the process.
///
/// # Safety
/// `domain` is alive for the time of the call.
unsafe fn emit(
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

/// Defines callbacks for libvirt. Each passes the event in its arguments, if any, to the listener.
macro_rules! callbacks {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? { $what:expr })+) => {
        $(unsafe extern "C" fn $name(
            _: sys::virConnectPtr,
            domain: sys::virDomainPtr,
            $($argument: $type,)*
            opaque: *mut c_void,
        ) $(-> $result)? {
            // SAFETY: libvirt holds the domain and the texts for as long as it calls.
            unsafe { emit(domain, opaque, || $what) };
            Default::default()
        })+
    };
}

callbacks! {
    fn on_lifecycle(event: c_int, detail: c_int) -> c_int {
        Some(RawEventKind::Lifecycle { event: number(event), detail: number(detail) })
    }
    fn on_reboot() { Some(RawEventKind::Reboot) }
    fn on_removed(alias: *const c_char) { copied(alias).map(RawEventKind::DeviceRemoved) }
    fn on_removal_failed(alias: *const c_char) {
        copied(alias).map(RawEventKind::DeviceRemovalFailed)
    }
    fn on_vcpu_removed(vcpu: c_uint) { Some(RawEventKind::VcpuRemoved(vcpu)) }
    fn on_agent(state: c_int, _reason: c_int) { agent(state).map(RawEventKind::Agent) }
    fn on_memory_size(alias: *const c_char, kib: c_ulonglong) {
        copied(alias).map(|alias| RawEventKind::MemorySize { alias, kib })
    }
    fn on_monitor(event: *const c_char, _s: c_longlong, _us: c_uint, details: *const c_char) {
        Some(RawEventKind::Monitor { name: copied(event)?, details: copied(details) })
    }
}

fn number(number: c_int) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Returns whether a state means that the agent is connected; `None` for an unknown one.
fn agent(state: c_int) -> Option<bool> {
    match number(state) {
        sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED => Some(true),
        sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_DISCONNECTED => Some(false),
        _ => None,
    }
}

type Callback = sys::virConnectDomainEventGenericCallback;

/// Returns each domain event with its callback. An old libvirt refuses those that it does not have.
fn callbacks() -> [(&'static str, sys::virDomainEventID, Callback); 7] {
    // SAFETY: libvirt takes every callback as this type and calls it as the type that belongs to
    // the event (virConnectDomainEventRegisterAny, VIR_DOMAIN_EVENT_CALLBACK).
    let (lifecycle, removed, failed, vcpu, agent, size) = unsafe {
        (
            transmute::<sys::virConnectDomainEventCallback, Callback>(Some(on_lifecycle)),
            transmute::<Removed, Callback>(Some(on_removed)),
            transmute::<RemovalFailed, Callback>(Some(on_removal_failed)),
            transmute::<VcpuRemoved, Callback>(Some(on_vcpu_removed)),
            transmute::<AgentLifecycle, Callback>(Some(on_agent)),
            transmute::<MemorySize, Callback>(Some(on_memory_size)),
        )
    };
    [
        ("lifecycle", sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
        ("reboot", sys::VIR_DOMAIN_EVENT_ID_REBOOT, Some(on_reboot)),
        (
            "device-removed",
            sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
            removed,
        ),
        (
            "device-removal-failed",
            sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED,
            failed,
        ),
        ("vcpu-removed", sys::VIR_DOMAIN_EVENT_ID_VCPU_REMOVED, vcpu),
        (
            "agent-lifecycle",
            sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
            agent,
        ),
        (
            "memory-device-size-change",
            sys::VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE,
            size,
        ),
    ]
}
