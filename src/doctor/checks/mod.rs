//! The checks of `virtnode doctor`: pure functions from observations to findings.
//!
//! Each check adds at least one finding, or an [`Unseen`] entry with the reason why it could not
//! decide. docs/doctor.md lists the checks; a test compares it with [`Check`].

mod accounts;
mod daemon;
mod device;
mod documents;
mod domains;
mod finding;
mod libvirt;
pub mod observed;
mod passthrough;
mod processor;
#[cfg(test)]
mod tests;

pub use finding::{Check, DoctorReport, Finding, Place, Remedy, Severity, Unseen};
pub use observed::{GIVEN_SOCKET, Observed};

/// Runs all checks.
pub fn diagnose(observed: &Observed) -> DoctorReport {
    let mut report = DoctorReport::default();
    processor::check_extensions(observed, &mut report);
    processor::check_module(observed, &mut report);
    device::check(observed, &mut report);
    processor::check_nested(observed, &mut report);
    passthrough::check_iommu(observed, &mut report);
    passthrough::check_vfio(observed, &mut report);
    passthrough::check_hugepages(observed, &mut report);
    libvirt::check_connection(observed, &mut report);
    libvirt::check_daemons(observed, &mut report);
    libvirt::check_versions(observed, &mut report);
    documents::check(observed, &mut report);
    daemon::check_probes(observed, &mut report);
    daemon::check_labels(observed, &mut report);
    domains::check(observed, &mut report);
    daemon::check_external_changes(observed, &mut report);
    for check in Check::ALL {
        if !report.covers(check) {
            report.unseen(check, "the check produced no result", None);
        }
    }
    report.sort();
    report
}
