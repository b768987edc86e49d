//! What a diagnosis is made from: what was seen, as it was seen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::capability::NodeFacts;
use crate::domain::{Domain, DomainState, Stats};
use crate::hotplug::GuestVcpus;
use crate::label::RejectedLabel;
use crate::units::Bytes;

/// All that was seen.
#[derive(Debug, Clone)]
pub struct Observed {
    /// This machine.
    pub host: HostSurvey,
    /// libvirt.
    pub libvirt: LibvirtStatus,
    /// What libvirt and the host say of what the node can run.
    pub facts: Arc<NodeFacts>,
    /// Labels that were left out.
    pub rejected: Vec<RejectedLabel>,
    /// The running domains, or why they could not be listed.
    pub domains: Result<Vec<ObservedDomain>, String>,
    /// The daemon of this node.
    pub daemon: Daemon,
}

/// This machine, as far as it shows without being touched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostSurvey {
    /// The kernel's name of the architecture.
    pub arch: String,
    /// Whether who looked is root.
    pub is_root: bool,
    /// Whether who looked is in a container, which hides devices, mounts and sockets.
    pub in_container: bool,
    /// Whether systemd runs the machine.
    pub systemd: bool,
    /// Whether udev takes rules (/etc/udev/rules.d).
    pub udev: bool,
    /// `ID` and `ID_LIKE` of os-release.
    pub distribution: Vec<String>,
    /// The CPU; `None` if /proc/cpuinfo cannot be read.
    pub cpu: Option<CpuInfo>,
    /// What this machine is a guest of, if it shows that it is one.
    pub guest_of: Option<String>,
    /// KVM.
    pub kvm: Kvm,
    /// The words of the kernel command line; `None` if it cannot be read.
    pub kernel_arguments: Option<Vec<String>>,
    /// How words are put on the kernel command line here.
    pub boot_loader: BootLoader,
    /// The IOMMU.
    pub iommu: IommuSurvey,
    /// Passing devices through.
    pub vfio: Vfio,
    /// Each size of huge pages that the kernel knows.
    pub huge_pages: Vec<HugePages>,
    /// libvirt's sockets, by name.
    pub sockets: BTreeMap<String, Socket>,
    /// libvirt's daemons that are installed: `libvirtd`, `virtqemud`, `virtlogd`.
    pub daemons: BTreeSet<String>,
    /// The sockets of those that systemd knows: `libvirtd.socket` …
    pub units: BTreeSet<String>,
    /// Whether polkit is installed.
    pub polkit: bool,
    /// Whether qemu.conf says that QEMU's output goes to a file, so that virtlogd is not needed;
    /// `None` if it cannot be read.
    pub logs_to_file: Option<bool>,
    /// Whether the unit virtnode.service is installed.
    pub virtnode_unit: bool,
    /// The users and groups that matter, by what the machine's files say.
    pub accounts: Accounts,
}

/// `/proc/cpuinfo`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuInfo {
    /// `flags`, `Features`, `features` or `isa`: the words of the first processor.
    pub flags: BTreeSet<String>,
    /// `vendor_id`.
    pub vendor: Option<String>,
    /// `platform`, on Power.
    pub platform: Option<String>,
}

/// What shows of KVM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kvm {
    /// /dev/kvm.
    pub device: DeviceNode,
    /// Whether the kernel has KVM's device, node or not (/sys/class/misc/kvm).
    pub registered: bool,
    /// KVM's modules that are loaded, or built in with parameters.
    pub modules: BTreeSet<String>,
    /// KVM's answer: the most vCPUs of a domain. `None` if it could not be asked.
    pub max_vcpus: Option<u32>,
    /// The module's parameter; `None` if there is none.
    pub nested: Option<bool>,
}

/// A device's node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceNode {
    /// There is none.
    #[default]
    Missing,
    /// It cannot be looked at, for this reason.
    Hidden(String),
    /// Something of this name that is no character device.
    NoDevice,
    /// A character device.
    Node {
        /// Major and minor number.
        number: (u64, u64),
        /// Permission bits.
        mode: u32,
        /// The owner.
        uid: u32,
        /// The group.
        gid: u32,
        /// What opening it for reading and writing says to who looked.
        open: Result<(), OpenError>,
    },
}

/// Why a device cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// `EACCES`, `EPERM`.
    NotAllowed,
    /// `ENODEV`, `ENXIO`: no driver is behind it.
    NoDriver,
    /// Another one.
    Other,
}

/// How the kernel command line is changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BootLoader {
    /// With grubby.
    Grubby,
    /// In /etc/default/grub, whose GRUB_CMDLINE_LINUX is in double quotes, and update-grub.
    UpdateGrub,
    /// Some other way.
    #[default]
    Unknown,
}

/// The IOMMU as sysfs and the firmware show it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IommuSurvey {
    /// `/sys/class/iommu`.
    pub devices: Vec<String>,
    /// `/sys/kernel/iommu_groups`.
    pub groups: usize,
    /// Those of them whose type is `identity`: devices see the machine's own addresses.
    pub identity: usize,
    /// Those whose type could be read.
    pub typed: usize,
    /// The firmware's tables by name, of those that describe IOMMUs (DMAR, IVRS); `None` if
    /// the firmware shows no tables.
    pub tables: Option<BTreeSet<String>>,
}

/// What is there to pass devices through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Vfio {
    /// VFIO.
    pub vfio: bool,
    /// iommufd.
    pub iommufd: bool,
    /// `vfio_iommu_type1.allow_unsafe_interrupts`.
    pub unsafe_interrupts: bool,
    /// `vfio.enable_unsafe_noiommu_mode`.
    pub no_iommu: bool,
}

/// Huge pages of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// The size.
    pub size: Bytes,
    /// How many are reserved.
    pub reserved: u64,
    /// How many of those are free.
    pub free: u64,
    /// Whether a hugetlbfs for this size is mounted; `None` if the mounts cannot be read.
    pub mounted: Option<bool>,
}

/// A socket of libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// Permission bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// What connecting to it says to who looked.
    pub state: SocketState,
}

/// How connecting to a socket ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketState {
    /// Somebody listens.
    Listens,
    /// Nobody does: what is there is left over.
    Refused,
    /// Who looked may not.
    NotAllowed,
    /// It was not known in time, or another error.
    Unknown,
}

/// Users and groups, from passwd and group of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    /// Users by name: number and first group.
    pub users: BTreeMap<String, (u32, u32)>,
    /// Groups by name: number and members.
    pub groups: BTreeMap<String, (u32, BTreeSet<String>)>,
    /// `user` and `group` of qemu.conf, if it says; `None` if it cannot be read.
    pub configured: Option<(Option<String>, Option<String>)>,
    /// Who looked.
    pub own_uid: u32,
}

/// libvirt, as it answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LibvirtStatus {
    /// The connection.
    pub uri: String,
    /// Why there is none; `None` if libvirt answers.
    pub failure: Option<LibvirtFailure>,
    /// What it did not answer though there is a connection: the question and why.
    pub unanswered: Vec<(String, String)>,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtFailure {
    /// The bounded word.
    pub code: &'static str,
    /// libvirt's text.
    pub message: String,
}

/// A running domain.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedDomain {
    /// Its name: tenants' text.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Its state.
    pub state: DomainState,
    /// Its statistics.
    pub stats: Stats,
    /// What a closer look showed, or why there was none.
    pub details: Result<Arc<DomainDetails>, String>,
    /// What each virtio-mem device had, by alias, when it was looked at some time before.
    pub earlier: BTreeMap<String, Bytes>,
}

/// A closer look at a domain.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainDetails {
    /// The live definition.
    pub domain: Domain,
    /// Whether it has a definition that outlives it.
    pub persistent: bool,
    /// The guest agent.
    pub agent: AgentAnswer,
}

/// What came of asking a guest agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAnswer {
    /// It answered.
    Answered(GuestVcpus),
    /// It did not, for this reason.
    Silent(String),
    /// There was no use in asking: no channel, nobody at its end, or the domain is held.
    NotAsked,
}

impl DomainDetails {
    /// How many CPUs the guest uses, if its agent said.
    pub fn online(&self) -> Option<u32> {
        match &self.agent {
            AgentAnswer::Answered(vcpus) => Some(vcpus.online.len()),
            AgentAnswer::Silent(_) | AgentAnswer::NotAsked => None,
        }
    }
}

/// The daemon of this node.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Daemon {
    /// None answers.
    #[default]
    None,
    /// One runs, and its metrics could not be read, for this reason.
    Unreadable(String),
    /// One runs.
    Runs {
        /// Its metrics, in the text format.
        metrics: String,
        /// The time, in seconds since 1970.
        now: f64,
        /// The time between its probes.
        interval: Duration,
    },
}
