//! All calls that Rust cannot check, and only those: the only directory with `unsafe`.
//!
//! * libvirt's functions that the crate `virt` lacks: of a connection ([`Watched`],
//!   [`baseline_hypervisor_cpu`], [`compare_hypervisor_cpu`]), of its domains, their statistics and their events
//!   ([`Subscription`]);
//! * the groups of the peer of a local socket ([`peer_groups`]);
//! * KVM's ioctls ([`kvm_extension`], [`kvm_msr_indices`]);
//! * tuning of malloc ([`keep_little_memory`]), and the end of the process ([`leave()`]).
//!
//! All functions are safe. They copy and free what libvirt returns, and their callbacks do not unwind
//! into libvirt.

mod connection;
mod domain;
mod events;
mod parameters;
mod system;

pub use self::connection::{
    CloseReason, CpuTarget, Watched, baseline_hypervisor_cpu, compare_hypervisor_cpu,
};
pub use self::domain::{
    DomainRecord, all_domain_stats, domain_stats, guest_vcpus, job, set_agent_timeout,
    set_guest_vcpus, set_stats_period, state,
};
pub use self::events::{RawEvent, RawEventKind, Subscription};
pub use self::parameters::{Parameter, Value};
pub use self::system::{keep_little_memory, kvm_extension, kvm_msr_indices, leave, peer_groups};
