//! Whether a domain would run on a node, and why not. Pure.
//!
//! ```text
//! domain XML ─▶ Requirement ─┐
//!                            ├─ fits ─▶ Fit: an answer, findings, headroom
//! NodeFacts ───▶ Offer ──────┘
//! ```
//!
//! [`Requirement`] is what one domain needs of any node; [`Offer`] is what one node has for
//! domains of one architecture and domain type, from whatever source: live facts, documents,
//! labels. [`fits`] compares the two. What is unknown of the node stays unknown in the answer.

mod confirmation;
mod definition;
mod dry_run;
mod finding;
mod fit;
mod offer;
mod requirement;

pub use confirmation::{Confirmation, CpuComparison, DryRun, confirm};
pub use definition::Definition;
pub use dry_run::dry_run_xml;
pub use finding::{Answer, Code, Finding, Severity, Stage};
pub use fit::{Fit, Headroom, MemoryRoom, VcpuRoom, fits};
pub use offer::{Offer, OfferedMachine};
pub use requirement::{
    Check, CpuRequirement, HostDevices, IoApic, Iommu, IommuModel, PciControllers, Requirement,
    Shape, VcpuRequirement,
};
