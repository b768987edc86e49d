//! Turns the nodes of a cluster into candidates for a domain, for `virtnode targets`;
//! [`crate::compat::find_targets`] assesses them. [`cpus`] does so for one CPU.

mod cpus;
mod selector;

pub use self::cpus::{ChosenNodes, CpuInventory, cpu_candidates};
pub use self::selector::Selector;

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::capability::{Accelerator, CpuModel, CpuModes, TscCounter, Usable, VcpuMax};
use crate::cluster::objects::node_virtualization::{
    CpuModelStatus, GuestStatus, HYPERVISOR_CONNECTED, MachineStatus,
};
use crate::cluster::objects::{Condition, NodeVirtualizationStatus};
use crate::cluster::{NodeInventory, NodeSummary};
use crate::compat::{Candidate, Offer, OfferedMachine, OfferedTsc, ReportedOffer, Requirement};

/// Maximum age of a `NodeVirtualization`: three of the hourly writes of its daemon, which otherwise
/// does not run or lacks the right to write.
const STALE: SignedDuration = SignedDuration::from_hours(3);

/// Returns the nodes as candidates for a domain. `here` is the node where the domain runs, if
/// known. `now` is the time of the inventory; without it no object counts as stale.
pub fn candidates(
    inventory: NodeInventory,
    domain: &Requirement,
    here: Option<&str>,
    now: Option<Timestamp>,
) -> Vec<Candidate> {
    let NodeInventory {
        nodes,
        mut virtualizations,
        ..
    } = inventory;
    let candidate = |node: NodeSummary| {
        let status = virtualizations.remove(&node.name);
        let cut_off = matches!(&status, Some(Ok(status)) if is_cut_off(status));
        let reported = match status {
            None => ReportedOffer::None,
            Some(Err(_)) => ReportedOffer::Unreadable,
            Some(Ok(status)) if is_stale(&status, now) => ReportedOffer::Stale,
            Some(Ok(status)) => offer(&status, domain).map_or(ReportedOffer::None, |offer| {
                ReportedOffer::Offer(Box::new(offer))
            }),
        };
        Candidate {
            here: here == Some(node.name.as_str()),
            name: node.name,
            labels: node.labels,
            ready: node.ready,
            cordoned: node.cordoned,
            cut_off,
            reported,
        }
    };
    nodes.into_iter().map(candidate).collect()
}

/// True if the node's daemon reports that it has no connection to libvirt.
fn is_cut_off(status: &NodeVirtualizationStatus) -> bool {
    let connected = Condition::find(&status.conditions, HYPERVISOR_CONNECTED);
    connected.is_some_and(|condition| condition.status == "False")
}

/// An object that was never completed has no time, and no facts that could be stale.
fn is_stale(status: &NodeVirtualizationStatus, now: Option<Timestamp>) -> bool {
    match (status.last_probe_time, now) {
        (Some(probed), Some(now)) => now.duration_since(probed.into()) > STALE,
        _ => false,
    }
}

/// Returns the offer of a `NodeVirtualization` for this domain; `None` if it lacks the domain's
/// architecture.
fn offer(status: &NodeVirtualizationStatus, domain: &Requirement) -> Option<Offer> {
    let native = status.architecture.clone()?;
    let arch = domain.arch.clone().unwrap_or_else(|| native.clone());
    let guest = status
        .guests
        .iter()
        .find(|guest| guest.architecture == arch)?;
    let best = status.accelerator.as_deref();
    let wanted = domain
        .virt_type
        .as_deref()
        .and_then(Accelerator::of_domain_type);
    let is_best = arch == native && best == wanted.map(Accelerator::as_str);
    let version = |text: &Option<String>| text.as_deref()?.parse().ok();
    let libvirt_version = version(&status.versions.libvirt);
    let machines = machines(guest);
    let largest = machines
        .values()
        .filter_map(|machine| machine.max_vcpus.number());
    // The maximum includes the limit of a version 2 controller on Arm.
    let has_gic_v3 = largest.max() > Some(8);
    let aliases = guest.machines.iter().flat_map(|machine| {
        let meant = machine.name.clone();
        let alias = move |alias: &String| (alias.clone(), meant.clone());
        machine.aliases.iter().map(alias)
    });
    let iommu = status.iommu.as_ref();
    let cpu = is_best.then(|| {
        CpuModes::of_summary(
            status.cpu.host_model.clone(),
            status.cpu.vendor.clone(),
            models(status, domain),
            wanted != Some(Accelerator::Tcg),
            libvirt_version,
        )
    });
    let features = Some(&status.cpu.features).filter(|features| is_best && !features.is_empty());
    Some(Offer {
        virt_type: domain.virt_type.clone(),
        virt_types: Some(guest.domain_types.clone()),
        libvirt_version,
        qemu_version: version(&status.versions.qemu),
        aliases: aliases.collect(),
        machines: Some(machines).filter(|machines| !machines.is_empty()),
        accelerator_max: match status.kvm_max_vcpus {
            Some(max) if wanted == Some(Accelerator::Kvm) => VcpuMax::from_number(max),
            _ => VcpuMax::Unknown,
        },
        eim: status.eim.as_deref().and_then(|eim| eim.parse().ok()),
        gic_versions: has_gic_v3.then(|| vec!["2".to_owned(), "3".to_owned()]),
        cpu,
        cpu_features: features.map(|features| features.iter().cloned().collect()),
        enlightenments: Some(&status.cpu.hyperv)
            .filter(|names| is_best && !names.is_empty())
            .map(|names| names.iter().cloned().collect()),
        launch_security: is_best.then(|| status.security.clone()),
        vfio: iommu.map(|iommu| iommu.vfio && iommu.groups > 0),
        iommufd: iommu.map(|iommu| iommu.iommufd),
        tsc: match &status.tsc {
            Some(tsc) => OfferedTsc::Measured(TscCounter {
                frequency_hz: tsc.frequency_hz,
                // libvirt accepts any frequency unless it knows that scaling is impossible.
                scaling: Some(tsc.scaling != Some(false)),
            }),
            None => OfferedTsc::Unmeasured,
        },
        native_arch: Some(native),
        arch: Some(arch),
        ..Offer::default()
    })
}

fn machines(guest: &GuestStatus) -> BTreeMap<String, OfferedMachine> {
    let machine = |machine: &MachineStatus| {
        let own = machine.qemu_max_vcpus.or(machine.max_vcpus);
        let offered = OfferedMachine {
            max_vcpus: own.map_or(VcpuMax::Unknown, VcpuMax::from_number),
            deprecated: machine.deprecated,
        };
        (machine.name.clone(), offered)
    };
    guest.machines.iter().map(machine).collect()
}

fn models(status: &NodeVirtualizationStatus, domain: &Requirement) -> Vec<CpuModel> {
    let all = &status.cpu.models;
    // The object lists blockers only for the model behind an alias.
    let blockers = |model: &CpuModelStatus| -> Vec<String> {
        let meant = model.alias_of.as_deref();
        let meant = meant.and_then(|name| all.iter().find(|other| other.name == name));
        match meant {
            Some(meant) if model.blockers.is_empty() => meant.blockers.clone(),
            _ => model.blockers.clone(),
        }
    };
    let is_requested = |name: &str| domain.cpu.model.as_deref() == Some(name);
    all.iter()
        .map(|model| {
            // The rules read only the blockers of the requested model.
            let blockers = if is_requested(&model.name) {
                blockers(model)
            } else {
                Vec::new()
            };
            let usable = match model.usable.as_str() {
                "yes" => Usable::Yes,
                // libvirt before 10.9 does not list the missing features, which the domain may
                // tolerate.
                "no" if blockers.is_empty() && domain.cpu.tolerates_missing_features() => {
                    Usable::Unknown
                }
                "no" => Usable::No,
                _ => Usable::Unknown,
            };
            CpuModel {
                name: model.name.clone(),
                usable: Some(usable),
                canonical: model.alias_of.clone(),
                deprecated: model.deprecated,
                blockers,
                ..CpuModel::default()
            }
        })
        .collect()
}
