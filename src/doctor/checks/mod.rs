//! What is wrong with this node, why it matters, and what cures it. Pure: what was seen in,
//! findings out.
//!
//! docs/doctor.md lists the checks; [`Check`] is what it is held equal to.

mod accounts;
mod daemon;
mod device;
mod domains;
mod finding;
mod libvirt;
pub mod observed;
mod passthrough;
mod processor;
#[cfg(test)]
mod tests;

pub use finding::{Check, DoctorReport, Finding, Place, Remedy, Severity, Unseen};
pub use observed::Observed;

/// The name under which [`observed::Host::sockets`] has the socket that the connection's URI names.
pub const GIVEN_SOCKET: &str = "given";

/// Looks over all that was seen. Each check says something, if only that it could not look.
pub fn diagnose(observed: &Observed) -> DoctorReport {
    let mut diagnosis = DoctorReport::default();
    processor::check_extensions(observed, &mut diagnosis);
    processor::check_module(observed, &mut diagnosis);
    device::check(observed, &mut diagnosis);
    processor::check_nested(observed, &mut diagnosis);
    passthrough::check_iommu(observed, &mut diagnosis);
    passthrough::check_vfio(observed, &mut diagnosis);
    passthrough::check_hugepages(observed, &mut diagnosis);
    libvirt::check_connection(observed, &mut diagnosis);
    libvirt::check_daemons(observed, &mut diagnosis);
    libvirt::check_versions(observed, &mut diagnosis);
    daemon::check_probes(observed, &mut diagnosis);
    daemon::check_labels(observed, &mut diagnosis);
    domains::check(observed, &mut diagnosis);
    for check in Check::ALL
        .iter()
        .filter(|check| !diagnosis.knows(**check))
        .copied()
        .collect::<Vec<_>>()
    {
        diagnosis.unseen(check, "nothing was seen of it", None);
    }
    diagnosis.sort();
    diagnosis
}
