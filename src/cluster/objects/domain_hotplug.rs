//! DomainHotplug: one verified hotplug operation, asked for by an object of the cluster.
//!
//! The doc comments of fields are what `kubectl explain` shows, so they speak to whoever writes
//! such an object.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each type inside a function"
)]
#![allow(
    clippy::duplicated_attributes,
    reason = "each column of the table says of what type it is"
)]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::condition::{Condition, Time};
use crate::hotplug::{Amount, Diagnosis, Evidence, Require};
use crate::units::Timestamp;

/// What is asked for. The object is one-shot: it is done once, and its spec cannot be changed.
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
        node, once, and says what its guest made of it. The label virtnode.io/node with the name of the \
        node is required: the virtnode daemon of that node looks for objects by this label alone, and an \
        object without it is never picked up (its status stays empty). Only for a node whose name is \
        longer than 63 characters, which no label can hold, spec.nodeName is enough; that needs \
        Kubernetes 1.31 or newer. Whether a node's objects are seen at all, and if not, why, is in the \
        condition HotplugObjectsWatched of its NodeVirtualization. To try again, make another object; to give up an object, delete it: an \
        operation that has begun is brought to its end all the same.",
    printcolumn(
        name = "NODE",
        type_ = "string",
        json_path = ".spec.nodeName",
        description = "The node on which the domain runs."
    ),
    printcolumn(
        name = "DOMAIN",
        type_ = "string",
        json_path = ".spec.domain.*",
        description = "The name or UUID of the domain."
    ),
    printcolumn(
        name = "REQUEST",
        type_ = "string",
        json_path = ".status.request",
        description = "What the node's daemon took on; empty as long as it did not."
    ),
    printcolumn(
        name = "VERDICT",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason",
        description = "The verdict, or how far it is, or why it was not taken on."
    ),
    printcolumn(
        name = "AGE",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "How long ago the object was made."
    ),
    printcolumn(
        name = "MESSAGE",
        type_ = "string",
        json_path = ".status.message",
        description = "The verdict's reason.",
        priority = 1
    )
)]
#[x_kube(
    validation = Rule::new("self == oldSelf").message("the spec cannot be changed: make another object"),
    validation = Rule::new("has(self.vcpus) != has(self.memory)").message("exactly one of vcpus and memory must be given")
)]
pub struct DomainHotplugSpec {
    /// The name of the Node on which the domain runs. The object's label virtnode.io/node must have the
    /// same value: the daemon of that node finds the object by the label.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The domain: exactly one of name and uuid.
    pub domain: DomainReference,
    /// So many vCPUs in all. Exactly one of vcpus and memory must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<VcpusTarget>,
    /// So much memory in all. Exactly one of vcpus and memory must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryTarget>,
    /// How much proof the verdict Verified needs. Accepted: the hypervisor did it. Acknowledged: the
    /// guest's firmware interface or driver confirmed it. Online: the guest uses it (for an unplug: it
    /// is gone everywhere). Online unless given.
    #[serde(default)]
    pub require: RequireLevel,
    /// How long after it was taken on (status.startTime) there must be a verdict. Waiting for other
    /// operations on the same domain counts. From 1 to 3600; 120 unless given.
    #[serde(default = "deadline_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub deadline_seconds: u32,
    /// How long after its completion the object is kept; then the node's daemon deletes it. Without it
    /// the object stays until somebody deletes it. 0 deletes it at once, so that nobody sees a verdict
    /// who does not watch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub ttl_seconds_after_finished: Option<u32>,
}

fn deadline_seconds() -> u32 {
    120
}

/// A domain, by exactly one of its name and its UUID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.name) != has(self.uuid)").message("exactly one of name and uuid must be given"))]
pub struct DomainReference {
    /// The name that `virsh list` shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub name: Option<String>,
    /// The UUID that `virsh domuuid` shows. Safer than a name, which another domain may get.
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
    /// How many vCPUs the domain is to have in all, not how many to add; at least 1. More than its maximum is
    /// Infeasible, never a smaller success.
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub count: u32,
    /// Whether vCPUs that the guest takes and leaves offline are brought online through its agent; no
    /// unless given.
    #[serde(default)]
    pub online: bool,
}

/// An amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryTarget {
    /// How much memory the domain is to have in all, what it booted with included: a number with a
    /// binary unit, such as 2Gi or 1536Mi. A bare number is refused.
    #[schemars(
        length(max = 40),
        regex(pattern = r"^[0-9]+([.][0-9]+)?(Ki|Mi|Gi|Ti|Pi|Ei)B?$")
    )]
    pub size: String,
}

/// A level of proof.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RequireLevel {
    // No doc comments: the schema would become one of three objects instead of three words.
    #[allow(missing_docs)]
    Accepted,
    #[allow(missing_docs)]
    Acknowledged,
    #[allow(missing_docs)]
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

/// What came of it, written by the daemon of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DomainHotplugStatus {
    /// The generation of the object that was taken on. A greater metadata.generation means that the
    /// spec was changed afterwards; that has no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The operation's identifier in the node's journal, as `virtnode operations` shows it there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// What was taken on, in a few words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// When it was taken on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub start_time: Option<Timestamp>,
    /// When there was a verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub completion_time: Option<Timestamp>,
    /// The verdict, once there is one. Verified: everything asked for is proven at the required level.
    /// PartiallyApplied: the guest took some of it. GuestOffline: the guest has it and does not use it.
    /// GuestRefused: the guest said no, or provably threw it away. GuestSilent: the guest gave no sign
    /// before the deadline. Unverifiable: accepted, and the domain offers no proof at the required
    /// level. Pending: still outstanding in the hypervisor at the deadline. Infeasible: nothing was
    /// changed; the limit and the remedy are in the message. Busy: something else held the domain until
    /// the deadline. DomainNotFound, DomainNotRunning, HypervisorError, HypervisorUnavailable: as named.
    /// A verdict other than Verified may become Verified later, if the guest follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// One sentence for people: the verdict's reason, or what is waited for, or what is wrong with the
    /// object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What the domain had before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<AmountStatus>,
    /// What was asked for, in the same terms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requested: Option<AmountStatus>,
    /// What the domain had when it was last looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<AmountStatus>,
    /// What was seen, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<EvidenceStatus>,
    /// The hypervisor's own error, if it had one, whether or not it was the last word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisor_error: Option<String>,
    /// What is wrong with the guest and what to do, if it is the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<DiagnosisStatus>,
    /// Accepted: whether the object is sound and was taken on; if not, the reason is InvalidSpec or
    /// WrongNode. Progressing: whether it is being done. Succeeded: whether it was, Unknown until there
    /// is a verdict. The reason is the verdict, once there is one; before, Queued or Running.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How much of the resource there is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AmountStatus {
    /// vCPUs that are plugged, or asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// vCPUs that the guest uses, where its agent tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<u32>,
    /// Memory that the domain booted with and what the guest took of what was plugged, or that is asked
    /// for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Memory that the guest sees in all, where its balloon driver tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_total: Option<String>,
}

impl From<Amount> for AmountStatus {
    fn from(extent: Amount) -> Self {
        match extent {
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
    /// Where it comes from: hypervisor-call, live-xml, acpi-ost, device-event, guest-agent, vcpu-time,
    /// virtio-mem, balloon-stats or lifecycle.
    pub source: String,
    /// What was seen, in a few words.
    pub detail: String,
    /// When.
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

/// What is wrong with the guest, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiagnosisStatus {
    /// A short word for programs.
    pub code: String,
    /// What was seen.
    pub seen: String,
    /// What to do.
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
