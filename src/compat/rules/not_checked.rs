//! Lists the parts of a domain and of a node that no rule covers.

use super::{RuleInput, devices};
use crate::compat::NotChecked;
use crate::compat::offer::family_of;
use crate::domain::{DeviceSpec, parse_set};

/// Returns the subjects that the computed answer does not cover.
pub(super) fn list(input: &RuleInput<'_>) -> Vec<NotChecked> {
    let mut list = devices::not_checked(input);
    list.extend(other_machine(input));
    list.extend(helpers(input));
    list.extend(host(input));
    list.extend([
        NotChecked::new(
            "files, images, networks and host devices that the definition names",
            "no document describes them",
        ),
        NotChecked::new(
            "the start itself (free memory, cgroups, KVM, permissions)",
            "only a start shows it",
        ),
    ]);
    list
}

/// Returns the entries for programs and devices of the host that devices need.
fn helpers(input: &RuleInput<'_>) -> Vec<NotChecked> {
    let has = |is: fn(&DeviceSpec) -> bool| input.domain.devices.iter().any(is);
    let mut list = Vec::new();
    if has(|it| it.kind == "filesystem" && it.driver.as_deref() == Some("virtiofs")) {
        list.push(NotChecked::new(
            "virtiofsd of a filesystem",
            "no document lists it",
        ));
    }
    if has(|it| it.kind == "graphics" && it.device_type.as_deref() == Some("egl-headless")) {
        list.push(NotChecked::new(
            "render node of graphics",
            "no document lists it",
        ));
    }
    list
}

/// Returns the entry for domain capabilities of another family of machine types.
fn other_machine(input: &RuleInput<'_>) -> Option<NotChecked> {
    let (wanted, have) = (input.machine?, input.node.described_machine.as_deref()?);
    (family_of(wanted) != family_of(have)).then(|| {
        NotChecked::new(
            format!("devices that only machine type {wanted} lacks"),
            format!("the given domain capabilities describe {have}"),
        )
    })
}

/// Returns the entries for host CPUs, NUMA nodes and passthrough.
fn host(input: &RuleInput<'_>) -> Vec<NotChecked> {
    let placement = &input.domain.placement;
    let mut list = Vec::new();
    let pins = placement.vcpu_pins.iter().map(|(_, set)| set);
    let others = placement.other_pins.iter().map(|(_, set)| set);
    let mut cpus = placement.cpuset.iter().chain(pins).chain(others).peekable();
    let nodes = placement.cell_nodesets.iter().map(|(_, set)| set);
    let mut nodes = placement.nodeset.iter().chain(nodes).peekable();
    let unknown = "no capabilities of the node are known";
    if cpus.peek().is_some() && input.node.host_cpus.is_none() {
        list.push(NotChecked::new("host CPUs of cpusets and pins", unknown));
    }
    if nodes.peek().is_some() && input.node.host_nodes.is_none() {
        list.push(NotChecked::new("host NUMA nodes of <numatune>", unknown));
    }
    if cpus.chain(nodes).any(|set| parse_set(set).is_none()) {
        list.push(NotChecked::new(
            "a set of host CPUs or NUMA nodes",
            "it is not in libvirt's notation of sets",
        ));
    }
    if placement.automatic {
        list.push(NotChecked::new(
            "automatic placement on host CPUs and NUMA nodes",
            "it needs numad, which no document mentions",
        ));
    }
    let firmware = &input.domain.firmware;
    let loader = firmware.loader.as_ref();
    if firmware.automatic.is_some() && loader.is_some_and(|it| it.stateless == Some(true)) {
        list.push(NotChecked::new(
            "stateless firmware",
            "no document lists which firmware is stateless",
        ));
    }
    list
}
