//! virtnode: says what a libvirt node can run, and changes running domains with proof.
//!
//! The arrows point down only; [ARCHITECTURE.md](../ARCHITECTURE.md) has the picture and the rules.
//!
//! * [`capability`]: libvirt's documents as facts; [`label`]: facts as labels. Pure: text and
//!   values in, values out.
//! * [`hypervisor`], [`host`], [`cluster`], [`publish`]: one adapter per outside system.
//! * [`probe`] and [`labeller`]: services that join the core and the adapters.
//! * [`daemon`] and [`cli`]: wiring.

pub mod capability;
pub mod cluster;
#[allow(unsafe_code)]
pub mod ffi;
pub mod host;
pub mod hypervisor;
pub mod label;
pub mod telemetry;
