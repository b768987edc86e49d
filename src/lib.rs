//! virtnode publishes the capabilities of a libvirt node as labels, and verifies hotplug in its guests.
//!
//! ```text
//! main → cli → daemon                                   wiring, supervision, exit codes
//!          │
//! probe · labeller · executor · monitor · doctor · controller · launchers        services
//!          │
//! hypervisor · host · cluster · publish · journal                    adapters
//!          │
//! xml · units · capability · domain · label · compat · hotplug · operation · doctor::checks
//!                                                                    pure core
//! ```
//! Dependencies point down only; ARCHITECTURE.md has the rules and the reasons.
//!
//! * The **pure core** turns documents into facts, facts into labels, and evidence into verdicts.
//!   It takes values and returns values: no I/O, no clock, no async.
//! * Each **adapter** talks to one outside system, and hides its types and errors from the rest.
//!   Adapters do not depend on each other. [`ffi`] holds the calls that need `unsafe`.
//! * **Services** are the tasks that feed the core from the adapters and act on its decisions.
//! * **Wiring** ([`config`], [`daemon`], [`cli`]) builds the services and supervises them.
//!   [`telemetry`] and [`files`] are available to all layers but the core.

pub mod capability;
pub mod cli;
pub mod cluster;
pub mod compat;
pub mod config;
pub mod connections;
pub mod controller;
pub mod daemon;
pub mod doctor;
pub mod documents;
pub mod domain;
pub mod executor;
pub mod external;
#[allow(unsafe_code)]
pub mod ffi;
pub mod files;
pub mod host;
pub mod hotplug;
pub mod hypervisor;
pub mod journal;
pub mod label;
pub mod labeller;
pub mod launchers;
pub mod monitor;
pub mod operation;
pub mod probe;
pub mod publish;
pub mod sockets;
pub mod targets;
pub mod telemetry;
pub mod units;
pub mod xml;
