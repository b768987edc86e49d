//! `NodeVirtualization`: what labels cannot carry of what a node can run.
//!
//! The facts are its `status`, without a subresource for it: one patch of the object writes them,
//! the daemon needs no right on `nodevirtualizations/status`, and `kubectl wait
//! --for=condition=Probed` finds the conditions where it looks for them. There is no `spec`,
//! because nobody wishes anything here.
//!
//! Every field may be missing and unknown ones are passed over, so that the object of a newer or
//! older daemon can be read. Words are strings, because their sets grow.

use kube::CustomResource;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};

use super::condition::{Condition, Time};
use crate::units::Timestamp;

/// The condition that says whether the last probe could read every source.
pub const PROBED: &str = "Probed";
/// The condition that says whether there is a connection to libvirt.
pub const HYPERVISOR_CONNECTED: &str = "HypervisorConnected";
/// The condition that says whether the `DomainHotplug` objects for the node are seen.
pub const HOTPLUG_OBJECTS_WATCHED: &str = "HotplugObjectsWatched";

/// The root of the object beside its metadata.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "virtnode.io",
    version = "v1alpha1",
    kind = "NodeVirtualization",
    plural = "nodevirtualizations",
    shortname = "nvirt",
    no_spec,
    derive = "PartialEq",
    doc = "What the node of the same name can run as a hypervisor, as its virtnode daemon found out: machine types, CPU models, features, limits. Written by that daemon only, when something changed; it goes away with the Node.",
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".metadata.name", "description": "The Node that this is about; also the object's name."}"#,
    printcolumn = r#"{"name": "Accelerator", "type": "string", "jsonPath": ".status.accelerator", "description": "What makes guests fast there: kvm, hvf, mshv, or tcg for nothing."}"#,
    printcolumn = r#"{"name": "QEMU", "type": "string", "jsonPath": ".status.versions.qemu", "description": "The version of QEMU."}"#,
    printcolumn = r#"{"name": "libvirt", "type": "string", "jsonPath": ".status.versions.libvirt", "description": "The version of libvirt."}"#,
    printcolumn = r#"{"name": "Max-vCPUs", "type": "integer", "jsonPath": ".status.maxVcpus", "description": "The most vCPUs that a domain can have there on a machine type that is not deprecated."}"#,
    printcolumn = r#"{"name": "IOMMU", "type": "string", "jsonPath": ".status.iommu.kind", "description": "The kind of the host's IOMMU."}"#,
    printcolumn = r#"{"name": "Models", "type": "integer", "jsonPath": ".status.cpu.usableModels", "description": "How many named CPU models can be used there as they are."}"#,
    printcolumn = r#"{"name": "Probed", "type": "date", "jsonPath": ".status.lastProbeTime", "description": "How long ago everything was last read. Brought up to date once an hour, and when something changed."}"#
)]
#[serde(rename_all = "camelCase", default)]
#[schemars(transform = without_defaults)]
pub struct NodeVirtualizationFields {
    /// What was found out. Written by the node's daemon; what others write is put back.
    // The name `status` belongs to the derive, which would make a subresource of it.
    #[serde(rename = "status")]
    pub facts: NodeVirtualizationStatus,
}

/// What was found out of a node. What is missing is unknown; nothing is made up for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
// One owner, one piece: account of every single field would double its size.
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct NodeVirtualizationStatus {
    /// When everything was last read. Facts whose source could not be read since are older.
    /// Brought up to date once an hour, and when something changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_probe_time: Option<Timestamp>,
    /// `Probed`: whether the last probe could read every source, and if not, which ones.
    /// `HypervisorConnected`: whether there is a connection to libvirt. `HotplugObjectsWatched`:
    /// whether `DomainHotplug` objects for this node are seen, and if not, why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Parts that were left out because the object would have been larger than 56 KiB, in the
    /// order in which they are given up: `foreignMachines`, `blockers`, `unusableModels`,
    /// `features`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub omitted: Vec<String>,
    /// The host's own architecture in libvirt's spelling, `x86_64`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// What makes guests of that architecture fast: `kvm`, `hvf`, `mshv`, or `tcg` for nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// The most vCPUs that a domain of that architecture can have, over all machine types that
    /// are not deprecated. 2147483647 means that there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// The most vCPUs that KVM gives one domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm_max_vcpus: Option<u32>,
    /// How a domain on x86 gets the extended interrupt mode that more than 255 vCPUs need:
    /// `auto` (libvirt adds it), `explicit` (only if the domain's XML asks for it) or `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eim: Option<String>,
    /// The versions of what runs there.
    pub versions: VersionsStatus,
    /// The host's IOMMU and what devices can be handed to guests with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu: Option<IommuStatus>,
    /// Whether guests can be hypervisors themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested: Option<bool>,
    /// The host's time stamp counter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tsc: Option<TscStatus>,
    /// Kinds of confidential guests and enclaves: `sev`, `sev-es`, `sev-snp`, `tdx`, `sgx`,
    /// `s390-pv`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub security: Vec<String>,
    /// What guests can have of a CPU.
    pub cpu: CpuStatus,
    /// The guest architectures, the host's own first. Machine types are listed for that one, and
    /// for those that the daemon's configuration names in labels.guestArchitectures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<GuestStatus>,
    /// Running domains that keep a label on the Node that the hypervisor no longer stands for.
    /// When they have ended, the label goes. At most 32 are listed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<LabelHolder>,
}

/// The versions of what runs on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VersionsStatus {
    /// The daemon that wrote this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtnode: Option<String>,
    /// libvirt's daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub libvirt: Option<String>,
    /// QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<String>,
}

/// The host's IOMMU, and what of it can be used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct IommuStatus {
    /// `vt-d`, `amd-vi`, `smmu`, `other` or `none`.
    pub kind: String,
    /// How many groups of devices there are that can be handed to a guest each.
    pub groups: u32,
    /// Whether VFIO is there.
    pub vfio: bool,
    /// Whether iommufd is there.
    pub iommufd: bool,
}

/// The host's time stamp counter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TscStatus {
    /// Its frequency, in Hz.
    pub frequency_hz: u64,
    /// Whether guests can have another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<bool>,
}

/// What guests of the host's architecture can have of a CPU, with the best accelerator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CpuStatus {
    /// The CPU's vendor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// The named model closest to the host's CPU: what the mode `host-model` gives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_model: Option<String>,
    /// How many of the named models can be used as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usable_models: Option<u32>,
    /// The named models that the hypervisor knows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<CpuModelStatus>,
    /// The CPU features that the hypervisor can give, in libvirt's spelling.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// The Hyper-V enlightenments that it can give.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hyperv: Vec<String>,
}

/// A named CPU model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CpuModelStatus {
    /// libvirt's name of it.
    pub name: String,
    /// Whether it runs there as it is: `yes`, `no` or `unknown`.
    pub usable: String,
    /// The versioned name that this one means there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias_of: Option<String>,
    /// Whether the hypervisor is going to drop it.
    #[serde(skip_serializing_if = "is_false")]
    pub deprecated: bool,
    /// The features that keep it from running there. An alias has those of the model that it
    /// means.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blockers: Vec<String>,
}

/// One guest architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestStatus {
    /// The architecture in libvirt's spelling.
    pub architecture: String,
    /// The domain types that such a guest can have, the best one first: `kvm`, `qemu`.
    pub domain_types: Vec<String>,
    /// The machine types by canonical name, with what a domain of the best type can have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<MachineStatus>,
}

/// A machine type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MachineStatus {
    /// The canonical name, which means the same on every node with it: `pc-q35-10.0`.
    pub name: String,
    /// The most vCPUs that a domain of it can really have there; unknown if missing,
    /// 2147483647 means that there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// The most that QEMU itself would allow, where that is more: what a domain of another type
    /// than the best one can have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu_max_vcpus: Option<u32>,
    /// Other names that mean it there: `q35`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Whether QEMU is going to drop it.
    #[serde(skip_serializing_if = "is_false")]
    pub deprecated: bool,
}

/// A running domain that keeps labels on the Node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelHolder {
    /// The domain's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// The keys of the labels.
    pub labels: Vec<String>,
}

/// Takes the default values out of a schema: what is missing is unknown, and the API server is not
/// to put zeros there.
fn without_defaults(schema: &mut Schema) {
    schemars::transform::transform_subschemas(&mut without_defaults, schema);
    schema.remove("default");
}

fn is_false(value: &bool) -> bool {
    !value
}
