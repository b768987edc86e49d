//! Limits on the number of vCPUs, and the call.

use crate::domain::Domain;
use crate::hotplug::{Action, Infeasible, Observation, Plan};

/// Plans the call for a total of `count` vCPUs.
///
/// # Errors
/// The first limit that rules the request out.
pub(super) fn preflight(count: u32, seen: &Observation) -> Result<Plan, Infeasible> {
    let domain = &seen.domain;
    let vcpus = &domain.vcpus;
    let (plugged, maximum) = (vcpus.plugged(), vcpus.maximum);
    if count == 0 {
        return Err(Infeasible::NoVcpus);
    }
    if count > maximum {
        return Err(Infeasible::AboveMaximumVcpus {
            asked: count,
            maximum,
        });
    }
    if count == plugged {
        return Ok(Plan::default());
    }
    let granularity = domain.vcpu_granularity();
    if !count.is_multiple_of(granularity) {
        let below = count - count % granularity;
        return Err(Infeasible::VcpuGranularity {
            asked: count,
            granularity,
            below,
            above: below.saturating_add(granularity),
        });
    }
    check_machine(domain, count < plugged)?;
    if count < vcpus.fixed() {
        return Err(Infeasible::FixedVcpus {
            asked: count,
            fixed: vcpus.fixed(),
        });
    }
    if count.saturating_sub(plugged) > vcpus.free() {
        return Err(Infeasible::TooFewHotpluggableVcpus {
            asked: count,
            plugged,
            free: vcpus.free(),
        });
    }
    Ok(Plan {
        actions: vec![Action::SetVcpus {
            count,
            persist: seen.persistent,
        }],
    })
}

/// Rejects machine types that cannot plug vCPUs. Those that can are pc, q35, pseries and
/// loongarch's virt; s390 only adds (`has_hotpluggable_cpus`, QEMU 10.0). Unknown machine types are
/// left to libvirt.
fn check_machine(domain: &Domain, unplug: bool) -> Result<(), Infeasible> {
    let machine = domain.machine.as_deref().unwrap_or_default();
    let arch = domain.arch.as_deref().unwrap_or_default();
    let named = |names: &[&str]| names.iter().any(|name| machine.starts_with(name));
    let is_virt = named(&["virt"]) && matches!(arch, "aarch64" | "armv7l" | "riscv64" | "riscv32");
    if named(&["microvm", "isapc"]) || is_virt || machine == "none" {
        return Err(Infeasible::MachineWithoutVcpuHotplug {
            machine: machine.to_owned(),
            instead: match arch {
                "x86_64" | "i686" => ", or use q35",
                _ => "",
            },
        });
    }
    if unplug && named(&["s390-ccw"]) {
        return Err(Infeasible::MachineWithoutVcpuUnplug {
            machine: machine.to_owned(),
        });
    }
    // Without ACPI, QEMU plugs the CPU and cannot notify the guest.
    if !domain.acpi && matches!(arch, "x86_64" | "i686") {
        return Err(Infeasible::NoAcpi);
    }
    Ok(())
}
