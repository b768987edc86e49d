//! The procedures of libvirt's protocol that the broker forwards: those that virtnode reads with, and
//! a few that `virsh list`, `domstate` and `vcpucount` need.
//!
//! The numbers are fixed by the protocol's compatibility (libvirt's src/remote/remote_protocol.x and
//! qemu_protocol.x). Reading is no guarantee of harmlessness: several of these calls become commands,
//! changes or secrets with certain arguments, and those arguments are checked as well.

/// libvirt's main program.
pub const REMOTE: u32 = 0x2000_8086;
/// libvirt's program for QEMU.
pub const QEMU: u32 = 0x2000_8087;
/// The program that detects a dead peer.
pub const KEEPALIVE: u32 = 0x6b65_6570;

/// The only version of each of the programs.
pub const VERSION: u32 = 1;

/// A condition for the arguments of a procedure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arguments {
    Any,
    /// The URI is `qemu:///session`. libvirt opens others as a client, and executes the command in
    /// `qemu+ext://host/session?command=…`.
    SessionUri,
    /// No emulator is named: libvirt would execute it for its capabilities.
    NoEmulator,
    /// The definition without secrets, and not the one for migration.
    WithoutSecrets,
    /// The domain of virtnode's own dry run. Another one could name an emulator.
    DryRun,
    /// A timeout that ends, or libvirt's default.
    AgentTimeout,
    /// The running domain only.
    LiveOnly,
}

/// A procedure that clients may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Procedure {
    pub program: u32,
    pub number: u32,
    /// The name in libvirt's source.
    pub name: &'static str,
    pub arguments: Arguments,
}

const fn remote(number: u32, name: &'static str) -> Procedure {
    checked(number, name, Arguments::Any)
}

const fn checked(number: u32, name: &'static str, arguments: Arguments) -> Procedure {
    Procedure {
        program: REMOTE,
        number,
        name,
        arguments,
    }
}

const fn qemu(number: u32, name: &'static str) -> Procedure {
    Procedure {
        program: QEMU,
        number,
        name,
        arguments: Arguments::Any,
    }
}

/// Procedures that read.
pub const READ: &[Procedure] = &[
    checked(1, "CONNECT_OPEN", Arguments::SessionUri),
    remote(2, "CONNECT_CLOSE"),
    remote(3, "CONNECT_GET_TYPE"),
    remote(4, "CONNECT_GET_VERSION"),
    remote(7, "CONNECT_GET_CAPABILITIES"),
    checked(14, "DOMAIN_GET_XML_DESC", Arguments::WithoutSecrets),
    remote(16, "DOMAIN_GET_INFO"),
    remote(22, "DOMAIN_LOOKUP_BY_ID"),
    remote(23, "DOMAIN_LOOKUP_BY_NAME"),
    remote(24, "DOMAIN_LOOKUP_BY_UUID"),
    remote(59, "CONNECT_GET_HOSTNAME"),
    remote(60, "CONNECT_SUPPORTS_FEATURE"),
    remote(66, "AUTH_LIST"),
    remote(110, "CONNECT_GET_URI"),
    checked(136, "CONNECT_DOMAIN_XML_TO_NATIVE", Arguments::DryRun),
    remote(149, "CONNECT_IS_SECURE"),
    remote(150, "DOMAIN_IS_ACTIVE"),
    remote(151, "DOMAIN_IS_PERSISTENT"),
    remote(157, "CONNECT_GET_LIB_VERSION"),
    remote(200, "DOMAIN_GET_VCPUS_FLAGS"),
    remote(202, "DOMAIN_IS_UPDATED"),
    remote(212, "DOMAIN_GET_STATE"),
    remote(273, "CONNECT_LIST_ALL_DOMAINS"),
    remote(298, "DOMAIN_GET_JOB_STATS"),
    remote(316, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"),
    remote(317, "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY"),
    checked(
        342,
        "CONNECT_GET_DOMAIN_CAPABILITIES",
        Arguments::NoEmulator,
    ),
    remote(344, "CONNECT_GET_ALL_DOMAIN_STATS"),
    remote(360, "CONNECT_REGISTER_CLOSE_CALLBACK"),
    remote(361, "CONNECT_UNREGISTER_CLOSE_CALLBACK"),
    // One fixed question of libvirt to the guest agent; clients send no agent command of their own.
    remote(371, "DOMAIN_GET_GUEST_VCPUS"),
    checked(
        394,
        "CONNECT_BASELINE_HYPERVISOR_CPU",
        Arguments::NoEmulator,
    ),
    // Bounds the question before, without which a guest could occupy its domain in libvirt forever.
    checked(
        420,
        "DOMAIN_AGENT_SET_RESPONSE_TIMEOUT",
        Arguments::AgentTimeout,
    ),
    qemu(4, "CONNECT_DOMAIN_MONITOR_EVENT_REGISTER"),
    qemu(5, "CONNECT_DOMAIN_MONITOR_EVENT_DEREGISTER"),
];

/// Procedures that change something, for `--allow-changes`.
pub const CHANGE: &[Procedure] = &[checked(199, "DOMAIN_SET_VCPUS_FLAGS", Arguments::LiveOnly)];

/// Messages that the daemon sends without a call.
pub const EVENTS: &[Procedure] = &[
    remote(318, "DOMAIN_EVENT_CALLBACK_LIFECYCLE"),
    remote(319, "DOMAIN_EVENT_CALLBACK_REBOOT"),
    remote(320, "DOMAIN_EVENT_CALLBACK_RTC_CHANGE"),
    remote(321, "DOMAIN_EVENT_CALLBACK_WATCHDOG"),
    remote(322, "DOMAIN_EVENT_CALLBACK_IO_ERROR"),
    remote(324, "DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON"),
    remote(325, "DOMAIN_EVENT_CALLBACK_CONTROL_ERROR"),
    remote(326, "DOMAIN_EVENT_CALLBACK_BLOCK_JOB"),
    remote(327, "DOMAIN_EVENT_CALLBACK_DISK_CHANGE"),
    remote(328, "DOMAIN_EVENT_CALLBACK_TRAY_CHANGE"),
    remote(329, "DOMAIN_EVENT_CALLBACK_PMWAKEUP"),
    remote(330, "DOMAIN_EVENT_CALLBACK_PMSUSPEND"),
    remote(331, "DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE"),
    remote(332, "DOMAIN_EVENT_CALLBACK_PMSUSPEND_DISK"),
    remote(333, "DOMAIN_EVENT_CALLBACK_DEVICE_REMOVED"),
    remote(346, "DOMAIN_EVENT_CALLBACK_TUNABLE"),
    remote(348, "DOMAIN_EVENT_CALLBACK_AGENT_LIFECYCLE"),
    remote(354, "DOMAIN_EVENT_CALLBACK_DEVICE_ADDED"),
    remote(359, "DOMAIN_EVENT_CALLBACK_MIGRATION_ITERATION"),
    remote(362, "CONNECT_EVENT_CONNECTION_CLOSED"),
    remote(363, "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED"),
    remote(367, "DOMAIN_EVENT_CALLBACK_DEVICE_REMOVAL_FAILED"),
    remote(438, "DOMAIN_EVENT_MEMORY_DEVICE_SIZE_CHANGE"),
    qemu(6, "DOMAIN_MONITOR_EVENT"),
];

/// Returns the procedure with a number, if it is in the list.
pub fn find(list: &'static [Procedure], program: u32, number: u32) -> Option<&'static Procedure> {
    list.iter()
        .find(|procedure| procedure.program == program && procedure.number == number)
}
