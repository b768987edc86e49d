//! Limits on the number of vCPUs, and the call.

use crate::domain::Domain;
use crate::hotplug::{Action, Host, Infeasible, Observation, Plan, Scope};

/// Plans the call for a total of `count` vCPUs.
///
/// # Errors
/// The first limit that rules the request out.
pub(super) fn preflight(
    count: u32,
    seen: &Observation,
    host: &Host,
    scope: Scope,
) -> Result<Plan, Infeasible> {
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
    let plan = Plan {
        actions: vec![Action::SetVcpus {
            count,
            persist: scope.persists(),
        }],
    };
    if count == plugged {
        // The definition may have another number.
        return Ok(if scope.persists() {
            plan
        } else {
            Plan::default()
        });
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
            fixed: vcpus.fixed_ids(),
            remedy: fixed_remedy(count, seen),
        });
    }
    if count.saturating_sub(plugged) > vcpus.free() {
        return Err(Infeasible::TooFewHotpluggableVcpus {
            asked: count,
            plugged,
            free: vcpus.free(),
        });
    }
    check_emulator(domain, count, host.released_vcpus)?;
    Ok(plan)
}

/// Returns the commands that make fixed vCPUs unpluggable (tried with libvirt 11.3). The UUID stands for
/// the domain's name, which may be anything.
fn fixed_remedy(count: u32, seen: &Observation) -> String {
    let vcpus = &seen.domain.vcpus;
    match &seen.domain.uuid {
        Some(uuid) if seen.persistent => format!(
            "`virsh setvcpus {uuid} {count} --config` starts it with {count} next time; to start it with \
             {plugged} that can be unplugged, run `virsh setvcpus {uuid} {plugged} --config \
             --hotpluggable` as well; then shut it down and start it",
            plugged = vcpus.plugged(),
        ),
        _ => "start it with fewer, or with hotpluggable='yes' in <vcpus>".to_owned(),
    }
}

/// Rejects a plug that would make an emulator without KVM abort, and the guest with it: it cannot start
/// more vCPU threads in its life than the maximum, and those of released vCPUs count.
fn check_emulator(domain: &Domain, count: u32, released: u32) -> Result<(), Infeasible> {
    let vcpus = &domain.vcpus;
    let plugged = vcpus.plugged();
    let reachable = vcpus.maximum.saturating_sub(released).max(plugged);
    if domain.virt_type != "qemu" || count <= reachable {
        return Ok(());
    }
    Err(Infeasible::EmulatedVcpus {
        asked: count,
        maximum: vcpus.maximum,
        released,
        reachable,
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
