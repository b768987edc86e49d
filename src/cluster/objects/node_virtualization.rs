//! `NodeVirtualization`: the capabilities of a node that do not fit into labels.
//!
//! The facts are the object's `status`, which is not a subresource: one patch of the object writes
//! it, the daemon needs no right on `nodevirtualizations/status`, and `kubectl wait
//! --for=condition=Probed` works. The object has no `spec`, because it requests nothing.
//!
//! All fields are optional and unknown fields are ignored, so that daemons of other versions can read
//! the object. Words are strings, because their sets grow.

use kube::CustomResource;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};

use super::condition::{Condition, Time};
use crate::units::Timestamp;

/// Condition: the last probe could read every source.
pub const PROBED: &str = "Probed";
/// Condition: the daemon is connected to libvirt.
pub const HYPERVISOR_CONNECTED: &str = "HypervisorConnected";
/// Condition: the daemon watches the `DomainHotplug` objects of the node.
pub const HOTPLUG_OBJECTS_WATCHED: &str = "HotplugObjectsWatched";

/// The object without its metadata.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "virtnode.io",
    version = "v1alpha1",
    kind = "NodeVirtualization",
    plural = "nodevirtualizations",
    shortname = "nvirt",
    no_spec,
    derive = "PartialEq",
    doc = "The capabilities of the node of the same name as a hypervisor: machine types, CPU models, features, limits. The virtnode daemon of the node writes it when something has changed; it is deleted with the Node.",
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".metadata.name", "description": "The Node that the object describes; also the object's name."}"#,
    printcolumn = r#"{"name": "Accelerator", "type": "string", "jsonPath": ".status.accelerator", "description": "The accelerator of guests: kvm, hvf, mshv, or tcg for none."}"#,
    printcolumn = r#"{"name": "QEMU", "type": "string", "jsonPath": ".status.versions.qemu", "description": "The version of QEMU."}"#,
    printcolumn = r#"{"name": "libvirt", "type": "string", "jsonPath": ".status.versions.libvirt", "description": "The version of libvirt."}"#,
    printcolumn = r#"{"name": "Max-vCPUs", "type": "integer", "jsonPath": ".status.maxVcpus", "description": "The maximum number of vCPUs of a domain on a machine type that is not deprecated."}"#,
    printcolumn = r#"{"name": "IOMMU", "type": "string", "jsonPath": ".status.iommu.kind", "description": "The kind of the host's IOMMU."}"#,
    printcolumn = r#"{"name": "Models", "type": "integer", "jsonPath": ".status.cpu.usableModels", "description": "The number of named CPU models that are usable on the node."}"#,
    printcolumn = r#"{"name": "Probed", "type": "date", "jsonPath": ".status.lastProbeTime", "description": "Time since the last complete probe. Updated once an hour, and when something has changed."}"#
)]
#[serde(rename_all = "camelCase", default)]
#[schemars(transform = without_defaults)]
pub struct NodeVirtualizationFields {
    /// The probed facts. The node's daemon overwrites the changes of others.
    // A field named `status` would become a subresource.
    #[serde(rename = "status")]
    pub facts: NodeVirtualizationStatus,
}

/// The probed facts of a node. A missing field means unknown.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
// Atomic: managedFields of each single field would double the object's size.
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct NodeVirtualizationStatus {
    /// Time of the last complete probe. Facts whose source failed later are older. Updated once an
    /// hour, and when something has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_probe_time: Option<Timestamp>,
    /// `Probed`: the last probe could read every source; if False, the reason names the sources that
    /// failed. `HypervisorConnected`: the daemon is connected to libvirt. `HotplugObjectsWatched`: the
    /// daemon watches the `DomainHotplug` objects of this node; if False, the reason is the cause.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Parts that were omitted because the object would have exceeded 56 KiB, in the order of
    /// omission: `foreignMachines`, `blockers`, `unusableModels`, `features`, `domains`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub omitted: Vec<String>,
    /// The host's own architecture in libvirt's spelling, `x86_64`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// The accelerator of guests of that architecture: `kvm`, `hvf`, `mshv`, or `tcg` for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// The maximum number of vCPUs of a domain of that architecture, over all machine types that are
    /// not deprecated. 2147483647 means unlimited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// KVM's maximum number of vCPUs of one domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm_max_vcpus: Option<u32>,
    /// Availability of the extended interrupt mode, which x86 domains with more than 255 vCPUs
    /// require: `auto` (libvirt adds it), `explicit` (the domain's XML must request it) or `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eim: Option<String>,
    /// The versions of the software on the node.
    pub versions: VersionsStatus,
    /// The host's IOMMU and its support for device passthrough.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu: Option<IommuStatus>,
    /// True if guests can be hypervisors themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested: Option<bool>,
    /// The host's time stamp counter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tsc: Option<TscStatus>,
    /// Kinds of confidential guests and enclaves: `sev`, `sev-es`, `sev-snp`, `tdx`, `sgx`,
    /// `s390-pv`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub security: Vec<String>,
    /// The virtual CPUs that guests can have.
    pub cpu: CpuStatus,
    /// The guest architectures, the host's own first. Machine types are listed for the host's own,
    /// and for those in labels.guestArchitectures of the daemon's configuration.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<GuestStatus>,
    /// Running domains that depend on a label of the Node which the hypervisor no longer supports. The
    /// label is removed after they have stopped. At most 32 are listed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<LabelHolder>,
    /// Running domains whose guests have not taken a change that another client of libvirt made, such
    /// as KubeVirt or virsh. At most 32 are listed. Empty if the daemon's configuration does not enable
    /// externalChanges.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<DomainChangeStatus>,
}

/// Software versions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VersionsStatus {
    /// The virtnode daemon that wrote the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtnode: Option<String>,
    /// libvirt's daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub libvirt: Option<String>,
    /// QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<String>,
}

/// The host's IOMMU and its support for device passthrough.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct IommuStatus {
    /// `vt-d`, `amd-vi`, `smmu`, `other` or `none`.
    pub kind: String,
    /// The number of IOMMU groups; the devices of a group can only be passed to a guest together.
    pub groups: u32,
    /// True if VFIO is available.
    pub vfio: bool,
    /// True if iommufd is available.
    pub iommufd: bool,
}

/// The host's time stamp counter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TscStatus {
    /// Its frequency, in Hz.
    pub frequency_hz: u64,
    /// True if guests can have another frequency.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<bool>,
}

/// The virtual CPUs of guests of the host's architecture, with the best accelerator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CpuStatus {
    /// The CPU's vendor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// The named model closest to the host's CPU, which the mode `host-model` selects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_model: Option<String>,
    /// The number of named models that are usable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usable_models: Option<u32>,
    /// The named models of the hypervisor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<CpuModelStatus>,
    /// The available CPU features in libvirt's spelling.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// The available Hyper-V enlightenments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hyperv: Vec<String>,
}

/// A named CPU model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CpuModelStatus {
    /// libvirt's name of the model.
    pub name: String,
    /// Usability of the model on the node: `yes`, `no` or `unknown`.
    pub usable: String,
    /// The versioned name for which this name is an alias on the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias_of: Option<String>,
    /// True if a future version of the hypervisor will remove the model.
    #[serde(skip_serializing_if = "is_false")]
    pub deprecated: bool,
    /// The features whose absence makes the model unusable. Omitted for an alias with the same
    /// blockers as its model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blockers: Vec<String>,
}

/// One guest architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestStatus {
    /// The architecture in libvirt's spelling.
    pub architecture: String,
    /// The domain types of guests of this architecture, the best one first: `kvm`, `qemu`.
    pub domain_types: Vec<String>,
    /// The machine types by canonical name, with the limits for the best domain type.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<MachineStatus>,
}

/// A machine type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MachineStatus {
    /// The canonical name, which means the same on every node: `pc-q35-10.0`.
    pub name: String,
    /// The effective maximum number of vCPUs of a domain; 2147483647 means unlimited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// QEMU's own maximum if it is greater, which applies to domains of other types than the best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu_max_vcpus: Option<u32>,
    /// Aliases of the machine type on the node: `q35`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// True if a future version of QEMU will remove the machine type.
    #[serde(skip_serializing_if = "is_false")]
    pub deprecated: bool,
}

/// A running domain that depends on labels of the Node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelHolder {
    /// The domain's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// The keys of these labels.
    pub labels: Vec<String>,
}

/// A change that the guest of a running domain has not taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DomainChangeStatus {
    /// The namespace of the virtual machine, as the domain's name says; absent for a domain of the
    /// node's own libvirt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The name of the virtual machine, or of the domain.
    pub name: String,
    /// The domain's UUID.
    pub uuid: String,
    /// `vcpus`, `memory`, `disk` or `interface`.
    pub resource: String,
    /// `plug`, `unplug` or `detach`.
    pub action: String,
    /// The device, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The verdict about the guest, such as `GuestRefused` or `GuestOffline`.
    pub verdict: String,
    /// The reason for the verdict.
    pub message: String,
    /// Time of the verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub since: Option<Timestamp>,
}

/// Removes the default values from a schema: a missing field means unknown, and the API server must
/// not replace it with zero.
fn without_defaults(schema: &mut Schema) {
    schemars::transform::transform_subschemas(&mut without_defaults, schema);
    schema.remove("default");
}

fn is_false(value: &bool) -> bool {
    !value
}
