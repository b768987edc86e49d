//! Whether a domain would run on a node, and why not. Pure.
//!
//! ```text
//! domain XML ─▶ Requirement ─┐
//!                            ├─ fits ─▶ Assessment: an answer, findings, headroom
//! NodeFacts ───▶ Offer ──────┘
//! ```
//!
//! [`Requirement`] is what one domain needs of any node; [`Offer`] is what one node has for
//! domains of one architecture and domain type, from whatever source: live facts, documents,
//! labels. [`assess`] compares the two. What is unknown of the node stays unknown in the answer.
//!
//! [`targets`] asks that of every node of a cluster, by their labels and what else is told of them,
//! and makes the [`Affinity`] that says the same to Kubernetes' scheduler.

mod affinity;
mod confirmation;
mod definition;
mod dry_run;
mod finding;
mod offer;
mod placement;
mod requirement;
mod rules;

pub use affinity::{Affinity, Expression, NodeLabels, Operator, Term};
pub use confirmation::{Confirmation, CpuComparison, DryRun, confirm};
pub use definition::MinimalDefinition;
pub use dry_run::dry_run_xml;
pub use finding::{Feasibility, RuleCode, RuleFinding, RuleSeverity, Stage};
pub use offer::{Offer, OfferedMachine};
pub use placement::{
    Candidate, CandidateState, NodeAssessment, Placement, ReportedOffer, find_targets,
};
pub use requirement::{Requirement, VcpuRequirement};
pub use rules::{Assessment, Headroom, MemoryRoom, VcpuRoom, assess};
