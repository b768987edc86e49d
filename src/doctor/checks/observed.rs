//! Input of the checks: observations of host, libvirt, domains and daemon, without judgment.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::capability::NodeFacts;
use crate::domain::{ConnectionId, Domain, DomainState, Stats};
use crate::hotplug::Agent;
use crate::label::RejectedLabel;
use crate::units::Bytes;

/// Key in [`HostSurvey::sockets`] of the socket named by the connection's URI.
pub const GIVEN_SOCKET: &str = "given";

#[derive(Debug, Clone)]
pub struct Observed {
    pub host: HostSurvey,
    pub libvirt: LibvirtStatus,
    pub facts: Arc<NodeFacts>,
    pub documents: ObservedDocuments,
    pub rejected: Vec<RejectedLabel>,
    /// The running domains, or the reason why they could not be listed.
    pub domains: Result<Vec<ObservedDomain>, String>,
    pub daemon: Daemon,
}

/// The documents of KubeVirt's node-labeller.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ObservedDocuments {
    pub directory: String,
    /// True if the directory has any of them.
    pub exist: bool,
    /// True if labels are derived from them.
    pub used: bool,
    /// Documents that cannot be used, with the reason.
    pub problems: Vec<String>,
    /// Facts from the documents; `None` if they were not read.
    pub facts: Option<Arc<NodeFacts>>,
}

/// This machine, observed without changing or starting anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostSurvey {
    /// The kernel's name for the architecture.
    pub arch: String,
    /// True if the observing process runs as root.
    pub is_root: bool,
    /// True if the observing process is in a container, which hides devices, mounts and sockets.
    pub in_container: bool,
    /// True if systemd is the init system.
    pub systemd: bool,
    /// True if udev reads rules from /etc/udev/rules.d.
    pub udev: bool,
    /// `ID` and `ID_LIKE` of os-release.
    pub distribution: Vec<String>,
    /// `None` if /proc/cpuinfo cannot be read.
    pub cpu: Option<CpuInfo>,
    /// The hypervisor that this machine is a guest of, if any.
    pub guest_of: Option<String>,
    pub kvm: Kvm,
    /// Words of the kernel command line; `None` if it cannot be read.
    pub kernel_arguments: Option<Vec<String>>,
    pub boot_loader: BootLoader,
    pub iommu: IommuSurvey,
    pub vfio: Vfio,
    /// One entry for each size that the kernel supports.
    pub huge_pages: Vec<HugePages>,
    /// libvirt's sockets, by name.
    pub sockets: BTreeMap<String, Socket>,
    /// Installed daemons of libvirt: `libvirtd`, `virtqemud`, `virtlogd`.
    pub daemons: BTreeSet<String>,
    /// Their socket units, such as `libvirtd.socket`.
    pub units: BTreeSet<String>,
    /// True if polkit is installed.
    pub polkit: bool,
    /// True if qemu.conf sends QEMU's output to a file, so that virtlogd is not needed; `None` if it
    /// cannot be read.
    pub logs_to_file: Option<bool>,
    /// True if the unit virtnode.service is installed.
    pub virtnode_unit: bool,
    pub accounts: Accounts,
}

/// `/proc/cpuinfo`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuInfo {
    /// `flags`, `Features`, `features` or `isa` of the first processor.
    pub flags: BTreeSet<String>,
    /// `vendor_id`.
    pub vendor: Option<String>,
    /// `platform`, on Power.
    pub platform: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kvm {
    /// /dev/kvm.
    pub device: DeviceNode,
    /// True if the kernel has registered the device, with or without a node (/sys/class/misc/kvm).
    pub registered: bool,
    /// Modules that are loaded, or built in with parameters.
    pub modules: BTreeSet<String>,
    /// Maximum number of vCPUs in a domain, from KVM; `None` if KVM could not be queried.
    pub max_vcpus: Option<u32>,
    /// Module parameter; `None` if it does not exist.
    pub nested: Option<bool>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceNode {
    #[default]
    Missing,
    /// Cannot be inspected, with the reason.
    Hidden(String),
    /// Exists but is not a character device.
    NoDevice,
    Node {
        /// Major and minor number.
        number: (u64, u64),
        mode: u32,
        uid: u32,
        gid: u32,
        /// Result of opening it for reading and writing.
        open: Result<(), OpenError>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// `EACCES`, `EPERM`.
    NotAllowed,
    /// `ENODEV`, `ENXIO`.
    NoDriver,
    Other,
}

/// The way to change the kernel command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BootLoader {
    Grubby,
    /// /etc/default/grub, with GRUB_CMDLINE_LINUX in double quotes, and update-grub.
    UpdateGrub,
    #[default]
    Unknown,
}

/// The IOMMU according to sysfs and the firmware.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IommuSurvey {
    /// `/sys/class/iommu`.
    pub devices: Vec<String>,
    /// `/sys/kernel/iommu_groups`.
    pub groups: usize,
    /// Groups of type `identity`: their devices use physical addresses.
    pub identity: usize,
    /// Groups whose type could be read.
    pub typed: usize,
    /// Firmware tables that describe IOMMUs (DMAR, IVRS); `None` if the firmware shows no tables.
    pub tables: Option<BTreeSet<String>>,
}

/// Support for device passthrough.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Vfio {
    pub vfio: bool,
    pub iommufd: bool,
    /// `vfio_iommu_type1.allow_unsafe_interrupts`.
    pub unsafe_interrupts: bool,
    /// `vfio.enable_unsafe_noiommu_mode`.
    pub no_iommu: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    pub size: Bytes,
    pub reserved: u64,
    /// Free ones among the reserved.
    pub free: u64,
    /// True if a hugetlbfs of this size is mounted; `None` if the mounts cannot be read.
    pub mounted: Option<bool>,
}

/// A socket of libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub state: SocketState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketState {
    Listens,
    /// Stale: no process listens.
    Refused,
    NotAllowed,
    /// Undecided in time, or another error.
    Unknown,
}

/// Users and groups from the machine's passwd and group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    /// By name: user ID and primary group.
    pub users: BTreeMap<String, (u32, u32)>,
    /// By name: group ID and members.
    pub groups: BTreeMap<String, (u32, BTreeSet<String>)>,
    /// `user` and `group` of qemu.conf; `None` if it cannot be read.
    pub configured: Option<(Option<String>, Option<String>)>,
    /// User of the observing process.
    pub own_uid: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LibvirtStatus {
    pub uri: String,
    /// True if the configuration says that this machine has no libvirt of its own.
    pub is_absent: bool,
    /// `None` if libvirt answers.
    pub failure: Option<LibvirtFailure>,
    /// Queries that failed although libvirt is connected, each with the reason.
    pub unanswered: Vec<(String, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtFailure {
    pub code: &'static str,
    pub message: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ObservedDomain {
    pub connection: ConnectionId,
    /// Chosen by a tenant; `namespace/name` for the domain of a launcher.
    pub name: String,
    pub uuid: String,
    pub state: DomainState,
    pub stats: Stats,
    pub details: Result<Arc<DomainDetails>, Undetailed>,
    /// Plugged size of each virtio-mem device at an earlier observation, by alias.
    pub earlier: BTreeMap<String, Bytes>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DomainDetails {
    pub domain: Domain,
    /// True if the domain also has a persistent definition.
    pub persistent: bool,
    pub agent: Agent,
}

/// The reason why a domain has no details.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undetailed {
    /// Not observed so far, or the domain just ended.
    NotYet(String),
    /// libvirt did not answer in time: the domain is locked.
    Unanswered(String),
    /// libvirt answered with an error, or its definition cannot be parsed.
    Unreadable(String),
}

impl fmt::Display for Undetailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotYet(reason) | Self::Unanswered(reason) | Self::Unreadable(reason) => {
                f.write_str(reason)
            }
        }
    }
}

impl DomainDetails {
    /// Returns the number of CPUs online in the guest, if the agent answered.
    pub fn online(&self) -> Option<u32> {
        match &self.agent {
            Agent::Answered(vcpus) => Some(vcpus.online.len()),
            Agent::NotAsked | Agent::NotQueried(_) | Agent::Silent(_) | Agent::Refused(_) => None,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
pub enum Daemon {
    /// No daemon answers.
    #[default]
    None,
    /// Running, but its metrics could not be read, with the reason.
    Unreadable(String),
    Runs {
        /// In the text format.
        metrics: String,
        /// Current time in seconds since 1970.
        now: f64,
        /// Time between probes.
        interval: Duration,
    },
}
