//! Decides if a domain can run on a node, and explains why not. Pure.
//!
//! ```text
//! domain XML ─▶ Requirement ─┐
//!                            ├─ assess ─▶ Assessment: feasibility, findings, headroom
//! NodeFacts ───▶ Offer ──────┘                │
//!                                             ▼ confirm: libvirt's own answer decides (live only)
//! ```
//!
//! [`Requirement`] lists the needs of one domain. [`Offer`] lists what one node has for domains of
//! one architecture and domain type; it is built from live facts, from documents, from labels or
//! from a `NodeVirtualization`. [`assess`] applies the rules of libvirt and QEMU to the two, one
//! after another ([`rules`]). A value of the node that is unknown never blocks: the rule that needs
//! it yields an unknown finding. The feasibility follows from the worst finding alone.
//!
//! [`find_targets`] assesses every node of a cluster ([`placement`]) and builds the [`Affinity`]
//! that makes Kubernetes' scheduler choose the same nodes.

mod affinity;
mod baseline;
mod confirmation;
mod definition;
mod dry_run;
mod finding;
mod offer;
mod placement;
mod requirement;
mod rules;
mod tree;

pub use affinity::{Affinity, Expression, Operator, Term};
pub use baseline::{
    CpuBaseline, CpuCandidate, CpuClass, CpuCost, CpuDifference, CpuDirection, CpuExclusion,
    CpuProposal, CpuRelation, ExcludedNode, FeatureOrigin, KubevirtCpu, KubevirtFeature, NodeCpu,
    NodeModel, OriginatedFeature, ProposalKind, UncommonFeature, find_baseline,
};
pub use confirmation::{Confirmation, CpuComparison, DryRun, Trial, confirm};
pub use definition::MinimalDefinition;
pub use dry_run::{DefinitionCopy, dry_run_copy, trial_copy};
pub use finding::{Feasibility, NotChecked, RuleCode, RuleFinding, RuleSeverity, Stage};
pub use offer::{NodeLabels, Offer, OfferedHostCpu, OfferedMachine, OfferedTsc};
pub use placement::{
    Candidate, CandidateState, NodeAssessment, Placement, ReportedOffer, find_targets,
};
pub use requirement::{Requirement, VcpuRequirement};
pub use rules::{Assessment, Headroom, MemoryRoom, VcpuRoom, assess, headroom};
