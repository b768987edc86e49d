//! virtnode: says what a libvirt node can run, and changes running domains with proof.
//!
//! The arrows point down only; ARCHITECTURE.md has the snapshot and the rules.
//!
//! * [`xml`], [`units`], [`capability`], [`domain`], [`label`], [`compat`], [`doctor::checks`],
//!   [`hotplug`], [`operation`]: the pure core. libvirt's documents as facts, facts as labels, evidence as verdicts; text and values in,
//!   values out.
//! * [`hypervisor`], [`host`], [`cluster`], [`publish`], [`journal`]: adapters, one for each outside
//!   system;
//!   [`ffi`] holds the calls that need `unsafe`.
//! * [`probe`], [`labeller`], [`executor`], [`controller`], [`monitor`] and [`doctor`]: services
//!   that join the core and the adapters.
//! * [`config`], [`telemetry`], [`daemon`] and [`cli`]: wiring.

pub mod capability;
pub mod cli;
pub mod cluster;
pub mod compat;
pub mod config;
pub mod controller;
pub mod daemon;

pub mod doctor;
pub mod domain;
pub mod executor;
#[allow(unsafe_code)]
pub mod ffi;
pub mod host;
pub mod hotplug;
pub mod hypervisor;
pub mod journal;
pub mod label;
pub mod labeller;
pub mod monitor;
pub mod operation;
pub mod probe;
pub mod publish;
pub mod targets;
pub mod telemetry;
pub mod units;
pub mod xml;
