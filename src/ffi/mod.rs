//! Every call that Rust cannot check, and nothing else: the one directory with `unsafe`.
//!
//! * libvirt's functions that the crate `virt` lacks: of a connection ([`Watched`],
//!   [`baseline_hypervisor_cpu`], [`compare_hypervisor_cpu`]), of its domains, their statistics and their events
//!   ([`Subscription`]);
//! * the groups of who connects to a local socket ([`peer_groups`]);
//! * KVM's ioctls ([`kvm_extension`], [`kvm_msr_indices`]);
//! * what the allocator keeps ([`keep_little_memory`]), and the end of the process ([`leave()`]).
//!
//! All of it is safe to call. What libvirt hands out is copied and freed here; what libvirt calls
//! back cannot unwind into it.

mod connection;
mod domain;
mod events;
mod parameters;
mod system;

pub use self::connection::{CloseReason, Watched, baseline_hypervisor_cpu, compare_hypervisor_cpu};
pub use self::domain::{
    DomainRecord, all_domain_stats, domain_stats, guest_vcpus, job, set_guest_vcpus, state,
};
pub use self::events::{RawEvent, RawEventKind, Subscription};
pub use self::parameters::{Parameter, Value};
pub use self::system::{keep_little_memory, kvm_extension, kvm_msr_indices, leave, peer_groups};
