//! Which numbers of vCPUs can be had, and the call for it.

use crate::domain::Domain;
use crate::hotplug::{Action, Infeasible, Observation, Plan};

/// What to call for `count` vCPUs in all; nothing if so many are plugged.
///
/// # Errors
/// The first limit in the way.
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

/// Which machine types plug vCPUs (`has_hotpluggable_cpus`, QEMU 10.0): pc, q35, pseries,
/// loongarch's virt; s390 only adds. Those that do not are named here; of others libvirt knows.
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
    // With ACPI off QEMU plugs the CPU and has no one to tell.
    if !domain.acpi && matches!(arch, "x86_64" | "i686") {
        return Err(Infeasible::NoAcpi);
    }
    Ok(())
}
