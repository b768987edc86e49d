//! `DomainHotplug`: one verified hotplug operation, requested through an object of the cluster.
//!
//! `kubectl explain` shows the doc comments of the fields, so they address the author of an object.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each type inside a function"
)]
#![allow(
    clippy::duplicated_attributes,
    reason = "each printer column has a type"
)]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::condition::{Condition, Time};
use crate::hotplug::{Amount, Diagnosis, Evidence, Require};
use crate::units::Timestamp;

/// The requested change. It is made once, and the spec cannot be changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[kube(
    group = "virtnode.io",
    version = "v1alpha1",
    kind = "DomainHotplug",
    plural = "domainhotplugs",
    shortname = "dhp",
    status = "DomainHotplugStatus",
    selectable = ".spec.nodeName",
    doc = "A DomainHotplug changes the vCPUs or the memory of one running domain (virtual machine) on one \
        node, once, and reports whether the guest uses the change. The label virtnode.io/node with the \
        name of the node is required: the virtnode daemon of that node selects objects by this label \
        alone, and ignores an object without it (its status stays empty). Only for a node whose name has \
        more than 63 characters, the limit of a label value, does spec.nodeName suffice; this requires \
        Kubernetes 1.31 or newer. The condition HotplugObjectsWatched of the NodeVirtualization shows \
        whether the daemon can watch the objects of its node, and the reason if it cannot. To retry, \
        create another object. Deleting an object does not stop an operation that has started.",
    printcolumn(
        name = "NODE",
        type_ = "string",
        json_path = ".spec.nodeName",
        description = "The node on which the domain runs."
    ),
    printcolumn(
        name = "DOMAIN",
        type_ = "string",
        json_path = ".spec.domain['name','uuid']",
        description = "The name or UUID of the domain."
    ),
    printcolumn(
        name = "REQUEST",
        type_ = "string",
        json_path = ".status.request",
        description = "The request that the node's daemon has accepted; empty before that."
    ),
    printcolumn(
        name = "VERDICT",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason",
        description = "The verdict, the progress, or the reason of a rejection."
    ),
    printcolumn(
        name = "AGE",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "Time since the object was created."
    ),
    printcolumn(
        name = "MESSAGE",
        type_ = "string",
        json_path = ".status.message",
        description = "Explanation of the verdict.",
        priority = 1
    )
)]
#[x_kube(
    validation = Rule::new("self == oldSelf").message("the spec is immutable: create another object"),
    validation = Rule::new("has(self.vcpus) != has(self.memory)").message("exactly one of vcpus and memory must be given")
)]
pub struct DomainHotplugSpec {
    /// The name of the Node on which the domain runs. The object's label virtnode.io/node must have the
    /// same value: the daemon of that node selects the object by the label.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The domain: exactly one of name and uuid.
    pub domain: DomainReference,
    /// The requested number of vCPUs. Exactly one of vcpus and memory must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<VcpusTarget>,
    /// The requested amount of memory. Exactly one of vcpus and memory must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryTarget>,
    /// The level of evidence that the verdict Verified requires. Accepted: the hypervisor made the
    /// change. Acknowledged: the guest's firmware interface or driver confirmed it. Online: the guest
    /// uses the resource (for an unplug: the resource is removed everywhere). Default: Online.
    #[serde(default)]
    pub require: RequireLevel,
    /// If true, the domain's definition on its node is changed as well, for its next start. Default:
    /// false. Only the running domain is changed, and the change ends with it.
    #[serde(default)]
    pub persistent: bool,
    /// Deadline of the verdict in seconds after the daemon accepted the object (status.startTime),
    /// including the wait for other operations on the same domain. From 1 to 3600. Default: 120.
    #[serde(default = "deadline_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub deadline_seconds: u32,
    /// Seconds after the object's creation (metadata.creationTimestamp, by the clock of the node) in
    /// which the daemon may accept it. An older object that was never accepted, for example because
    /// the daemon did not run or hotplug was off, is not executed: the condition Accepted is False with
    /// the reason Expired. At least 1. Default: 600.
    #[serde(default = "starting_deadline_seconds")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub starting_deadline_seconds: u32,
    /// Seconds after its completion until the node's daemon deletes the object. If missing, the object
    /// is kept until someone deletes it. 0 deletes it at once: only clients with a watch see the
    /// verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub ttl_seconds_after_finished: Option<u32>,
}

fn deadline_seconds() -> u32 {
    120
}

fn starting_deadline_seconds() -> u32 {
    600
}

/// Identifies a domain by exactly one of its name and its UUID. A name may have a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("has(self.name) != has(self.uuid)").message("exactly one of name and uuid must be given"),
    validation = Rule::new("!has(self.__namespace__) || has(self.name)").message("a namespace needs a name")
)]
pub struct DomainReference {
    /// The namespace of a KubeVirt virtual machine with the name. Without it, name is the name that
    /// libvirt has for the domain, which for a KubeVirt virtual machine is namespace_name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub namespace: Option<String>,
    /// The name that `virsh list` shows, or with a namespace that of the virtual machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub name: Option<String>,
    /// The UUID that `virsh domuuid` shows. Safer than a name, which another domain may have later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 36),
        regex(pattern = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$")
    )]
    pub uuid: Option<String>,
}

/// A number of vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VcpusTarget {
    /// The total number of vCPUs, not the number to add; at least 1. A number above the domain's
    /// maximum yields Infeasible, never a smaller success.
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub count: u32,
    /// If true, the guest agent brings vCPUs online that the guest has accepted and left offline.
    /// Default: false.
    #[serde(default)]
    pub online: bool,
}

/// An amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryTarget {
    /// The total amount of memory, boot memory included: a number with a binary unit, such as 2Gi or
    /// 1536Mi. A number without a unit is rejected.
    #[schemars(
        length(max = 40),
        regex(pattern = r"^[0-9]+([.][0-9]+)?(Ki|Mi|Gi|Ti|Pi|Ei)B?$")
    )]
    pub size: String,
    /// If true, memory is taken away even if the guest uses more than is left to it, at the risk that
    /// it kills programs or crashes. Default: false.
    #[serde(default)]
    pub force: bool,
}

/// A level of evidence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RequireLevel {
    // Doc comments here would turn the schema's three words into one of three objects.
    Accepted,
    Acknowledged,
    #[default]
    Online,
}

impl From<RequireLevel> for Require {
    fn from(level: RequireLevel) -> Self {
        match level {
            RequireLevel::Accepted => Self::Accepted,
            RequireLevel::Acknowledged => Self::Acknowledged,
            RequireLevel::Online => Self::Online,
        }
    }
}

/// The state of the operation, written by the daemon of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DomainHotplugStatus {
    /// The generation of the object that the daemon accepted. A greater metadata.generation means that
    /// the spec was changed afterwards, which has no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The operation's identifier in the node's journal, as shown by `virtnode operations`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// The accepted request in short form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// Time at which the daemon accepted the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub start_time: Option<Timestamp>,
    /// Time of the verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub completion_time: Option<Timestamp>,
    /// The verdict, at the end of the operation. Verified: the whole request is proven at the required
    /// level. PartiallyApplied: the guest accepted a part of it. GuestOffline: the guest has the
    /// resource and does not use it. GuestRefused: the guest refused the change or provably reverted
    /// it. GuestSilent: the guest did not respond before the deadline. Unverifiable: the hypervisor
    /// made the change, and the domain offers no evidence at the required level. Pending: the
    /// hypervisor had not completed the change at the deadline. Infeasible: nothing was changed; the
    /// message has the limit and the remedy. Busy: another job occupied the domain until the deadline.
    /// DomainNotFound, DomainNotRunning, HypervisorError, HypervisorUnavailable: as named. A verdict
    /// other than Verified may become Verified later, if the guest responds late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// One sentence for people: the explanation of the verdict, the event that the operation waits
    /// for, or the error in the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The domain's amount before the operation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<AmountStatus>,
    /// The requested amount.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requested: Option<AmountStatus>,
    /// The domain's amount at the last observation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<AmountStatus>,
    /// The observed evidence, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<EvidenceStatus>,
    /// The hypervisor's own error message, if a call failed, even if a later call succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisor_error: Option<String>,
    /// The problem in the guest and its remedy, if the guest is the cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<DiagnosisStatus>,
    /// Accepted: the object is valid and the daemon has accepted it; if False, the reason is InvalidSpec,
    /// WrongNode or Expired. Progressing: the operation has no verdict yet. Succeeded: the verdict is Verified;
    /// Unknown before the verdict. The reason is the verdict, or Queued or Running before it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// An amount of the resource.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AmountStatus {
    /// vCPUs that are plugged or requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// vCPUs that are online in the guest, if the guest agent reports them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<u32>,
    /// Boot memory plus the plugged memory that the guest has accepted, or the requested memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Total memory seen by the guest, if its balloon driver reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_total: Option<String>,
}

impl From<Amount> for AmountStatus {
    fn from(amount: Amount) -> Self {
        match amount {
            Amount::Vcpus { vcpus, online } => Self {
                vcpus: Some(vcpus),
                online,
                ..Self::default()
            },
            Amount::Memory {
                memory,
                guest_total,
            } => Self {
                memory: Some(memory.quantity()),
                guest_total: guest_total.map(|total| total.quantity()),
                ..Self::default()
            },
        }
    }
}

/// One piece of evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EvidenceStatus {
    /// The source: hypervisor-call, live-xml, acpi-ost, device-event, guest-agent, vcpu-time,
    /// virtio-mem, balloon-stats or lifecycle.
    pub source: String,
    /// The observation in a few words.
    pub detail: String,
    /// Time of the observation.
    #[schemars(with = "Time")]
    pub time: Timestamp,
}

impl From<Evidence> for EvidenceStatus {
    fn from(evidence: Evidence) -> Self {
        Self {
            source: evidence.source.as_str().to_owned(),
            detail: evidence.detail,
            time: evidence.time,
        }
    }
}

/// A problem in the guest, and its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiagnosisStatus {
    /// A short identifier, for programs.
    pub code: String,
    /// The observation.
    pub seen: String,
    /// The remedy.
    pub remedy: String,
}

impl From<Diagnosis> for DiagnosisStatus {
    fn from(diagnosis: Diagnosis) -> Self {
        Self {
            code: diagnosis.code,
            seen: diagnosis.seen,
            remedy: diagnosis.remedy,
        }
    }
}
