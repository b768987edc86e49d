//! Rules for the host's CPUs, NUMA nodes, pages and time stamp counter.

use super::{RuleInput, named, unsupported};
use crate::capability::TscCounter;
use crate::compat::{OfferedTsc, RuleCode, RuleFinding, Stage};
use crate::domain::{IdSet, parse_set};
use crate::units::Bytes;

/// Tolerance of the time stamp counter's frequency, in parts per million (`TSC_TOLERANCE`, libvirt
/// src/qemu/qemu_process.c).
const TSC_TOLERANCE_PPM: u128 = 250;

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_cpus(input, findings);
    check_nodes(input, findings);
    check_cells(input, findings);
    check_pages(input, findings);
    check_tsc(input, findings);
}

/// Checks the host CPUs. The kernel ignores those that do not exist, but needs one that does.
fn check_cpus(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(host) = &input.node.host_cpus else {
        return;
    };
    let placement = &input.domain.placement;
    let vcpus = input.domain.vcpus.maximum;
    let cpuset = placement
        .cpuset
        .iter()
        .map(|set| ("<vcpu cpuset=…>".to_owned(), set));
    // libvirt ignores pins of vCPUs that do not exist.
    let pins = placement.vcpu_pins.iter().filter(|(vcpu, _)| *vcpu < vcpus);
    let pins = pins.map(|(vcpu, set)| (format!("the pin of vCPU {vcpu}"), set));
    let others = placement.other_pins.iter();
    let others = others.map(|(name, set)| (format!("<{name}>"), set));
    for (what, text) in cpuset.chain(pins).chain(others) {
        let Some(wanted) = parse_set(text) else {
            continue;
        };
        let missing = wanted.without(host);
        if missing.is_empty() {
            continue;
        }
        let message = format!("{what} names host CPUs {missing}, but the host has {host}");
        let finding = if missing == wanted {
            RuleFinding::blocking(RuleCode::HostCpus, message)
        } else {
            RuleFinding::unknown(
                RuleCode::HostCpus,
                format!("{message}: the start fails if libvirt uses cgroups for them"),
            )
        };
        findings.push(
            finding
                .stage(Stage::Launch)
                .remedy(format!("name CPUs out of {host}")),
        );
    }
}

fn check_nodes(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(host) = &input.node.host_nodes else {
        return;
    };
    let placement = &input.domain.placement;
    let cells = placement.cell_nodesets.iter().map(|(_, nodes)| nodes);
    for text in placement.nodeset.iter().chain(cells) {
        let missing = parse_set(text).map(|wanted| wanted.without(host));
        let Some(first) = missing.as_ref().and_then(|missing| missing.iter().next()) else {
            continue;
        };
        findings.push(
            RuleFinding::blocking(
                RuleCode::HostNodes,
                format!("<numatune> names host NUMA nodes {text}, but the host has {host}"),
            )
            .at_start(unsupported(format!("NUMA node {first} is unavailable")))
            .remedy(format!("name nodes out of {host}")),
        );
    }
}

/// Checks the guest's NUMA cells against its vCPUs and against `<numatune>`.
fn check_cells(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let cells = input
        .domain
        .domain
        .as_ref()
        .map(|domain| &domain.memory.cells);
    let cells = cells.map(Vec::as_slice).unwrap_or_default();
    let vcpus = input.domain.vcpus.maximum;
    let blocks = |message: String, words: String, remedy: &str| {
        RuleFinding::blocking(RuleCode::Topology, message)
            .at_define(words)
            .remedy(remedy)
    };
    let count: u64 = cells.iter().map(|cell| u64::from(cell.cpus.len())).sum();
    let highest = cells.iter().flat_map(|cell| cell.cpus.iter()).max();
    if let Some((at, first)) = overlapping(cells.iter().map(|cell| &cell.cpus)) {
        findings.push(blocks(
            format!("NUMA cells {first} and {at} of the guest share vCPUs"),
            unsupported(format!(
                "NUMA cells {at} and {first} have overlapping vCPU ids"
            )),
            "give each vCPU to one <cell>",
        ));
    } else if count > vcpus {
        findings.push(blocks(
            format!("the guest's NUMA cells have {count} vCPUs, but <vcpu> says {vcpus}"),
            "internal error: Number of CPUs in <numa> exceeds the <vcpu> count".to_owned(),
            "lower the numbers in <cell cpus=…>, or raise <vcpu>",
        ));
    } else if let Some(highest) = highest.filter(|highest| u64::from(*highest) >= vcpus) {
        findings.push(blocks(
            format!("a NUMA cell of the guest has vCPU {highest}, but <vcpu> says {vcpus}"),
            "internal error: CPU IDs in <numa> exceed the <vcpu> count".to_owned(),
            "number the vCPUs in <cell cpus=…> from 0",
        ));
    }
    for (cell, _) in &input.domain.placement.cell_nodesets {
        if cells.is_empty() {
            findings.push(blocks(
                "<memnode> needs NUMA cells of the guest, of which there are none".to_owned(),
                "XML error: Element 'memnode' is invalid without any guest NUMA cells".to_owned(),
                "use <memory> in <numatune>, or add <numa> to <cpu>",
            ));
        } else if cells.iter().all(|have| u64::from(have.id) != *cell) {
            findings.push(blocks(
                format!("<memnode> names NUMA cell {cell}, which the guest lacks"),
                "XML error: Argument 'cellid' in memnode element must correspond to existing \
                 guest's NUMA cell"
                    .to_owned(),
                "name a cell of <numa>",
            ));
        }
    }
}

/// Returns the positions of the first two sets with a common number, the later one first.
fn overlapping<'s>(sets: impl Iterator<Item = &'s IdSet>) -> Option<(usize, usize)> {
    let sets: Vec<&IdSet> = sets.collect();
    (0..sets.len()).find_map(|at| {
        let earlier = sets.get(..at)?;
        let this = sets.get(at)?;
        let first = earlier
            .iter()
            .position(|set| this.without(set).len() < this.len())?;
        Some((at, first))
    })
}

fn check_pages(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let backing = &input.domain.backing;
    if !backing.huge_pages {
        return;
    }
    let conflicts = [
        (
            backing.on_demand,
            "huge pages cannot be allocated on demand",
            "hugepages are not allowed with memory allocation ondemand",
            "leave <allocation mode='ondemand'/> out",
        ),
        (
            backing.source.as_deref() == Some("anonymous"),
            "huge pages cannot be anonymous memory",
            "hugepages are not allowed with anonymous memory source",
            "write <source type='memfd'/> or leave <source> out",
        ),
    ];
    for (_, message, words, remedy) in conflicts.into_iter().filter(|(holds, ..)| *holds) {
        findings.push(
            RuleFinding::blocking(RuleCode::MemoryBacking, message)
                .at_define(unsupported(words))
                .remedy(remedy),
        );
    }
    let Some(pages) = &input.node.pages else {
        findings.push(
            RuleFinding::unknown(RuleCode::MemoryBacking, "the node's huge pages are unknown")
                .stage(Stage::Start)
                .remedy("give --capabilities of the node"),
        );
        return;
    };
    // The smallest size is that of ordinary pages, which libvirt accepts here too.
    let ordinary = pages.keys().next().copied().unwrap_or_default();
    let huge = || pages.iter().skip(1);
    let wants = input.domain.domain.as_ref();
    let wants = wants
        .map(|domain| domain.memory.asked())
        .unwrap_or_default();
    let sizes: Vec<Bytes> = match backing.page_sizes.as_slice() {
        [] => huge().take(1).map(|(size, _)| *size).collect(),
        sizes => sizes.to_vec(),
    };
    for size in sizes.into_iter().filter(|size| *size != ordinary) {
        let count = huge().find(|(have, _)| **have == size);
        let needed = wants.get().div_ceil(size.get().max(1));
        let Some((_, count)) = count else {
            let listed: Vec<String> = huge().map(|(size, _)| size.to_string()).collect();
            let remedy = if listed.is_empty() {
                "leave <hugepages> out".to_owned()
            } else {
                format!("use one of {}", named(listed.iter().map(String::as_str)))
            };
            findings.push(
                RuleFinding::blocking(
                    RuleCode::MemoryBacking,
                    format!("the host has no pages of {size}"),
                )
                .stage(Stage::Start)
                .remedy(remedy),
            );
            continue;
        };
        if *count < needed && backing.page_sizes.len() < 2 {
            findings.push(
                RuleFinding::unknown(
                    RuleCode::MemoryBacking,
                    format!(
                        "{wants} need {needed} pages of {size}, and the host has reserved {count} \
                         so far; more may be reserved before the start"
                    ),
                )
                .stage(Stage::Launch)
                .remedy(format!(
                    "reserve more: echo {needed} > \
                     /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
                    size.get() / 1024
                )),
            );
        } else {
            findings.push(RuleFinding::note(
                RuleCode::MemoryBacking,
                format!("{wants} use {needed} pages of {size}, which must be free at the start"),
            ));
        }
    }
}

/// Returns the lowest and the highest frequency that libvirt accepts without scaling.
pub(crate) fn tsc_range(frequency_hz: u64) -> (u64, u64) {
    let tolerance = u128::from(frequency_hz) * TSC_TOLERANCE_PPM / 1_000_000;
    let tolerance = u64::try_from(tolerance).unwrap_or(u64::MAX);
    (
        frequency_hz.saturating_sub(tolerance),
        frequency_hz.saturating_add(tolerance),
    )
}

/// Checks the frequency like libvirt, for every domain type (`qemuProcessStartValidateTSC`).
fn check_tsc(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(wanted) = input.domain.tsc_frequency else {
        return;
    };
    let tsc = match input.node.tsc {
        OfferedTsc::Measured(tsc) => tsc,
        OfferedTsc::Unmeasured => return,
        OfferedTsc::Unknown => {
            findings.push(
                RuleFinding::unknown(
                    RuleCode::Tsc,
                    format!(
                        "it is unknown if the node supports a time stamp counter of {wanted} Hz"
                    ),
                )
                .stage(Stage::Start)
                .remedy("give --capabilities of the node"),
            );
            return;
        }
    };
    let TscCounter {
        frequency_hz,
        scaling,
    } = tsc;
    let (lowest, highest) = tsc_range(frequency_hz);
    if (lowest..=highest).contains(&wanted) || scaling == Some(true) {
        return;
    }
    if scaling.is_none() {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Tsc,
                format!(
                    "the domain requires a time stamp counter of {wanted} Hz, the host's has \
                     {frequency_hz} Hz, and libvirt does not report if it can be scaled"
                ),
            )
            .stage(Stage::Emulator),
        );
        return;
    }
    findings.push(
        RuleFinding::blocking(
            RuleCode::Tsc,
            format!(
                "the domain requires a time stamp counter of {wanted} Hz, but the host's has \
                 {frequency_hz} Hz and cannot be scaled"
            ),
        )
        .at_start(unsupported(format!(
            "Requested TSC frequency {wanted} Hz is outside tolerance range ([{lowest}, \
             {highest}] Hz) around host frequency {frequency_hz} Hz and TSC scaling is not \
             supported by the host CPU"
        )))
        .remedy(format!(
            "leave frequency= out of <timer name='tsc'>, request {lowest} to {highest} Hz, or \
             choose a node of that frequency or with scaling"
        )),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measured with libvirt 11.3.
    #[test]
    fn tolerance_is_250_parts_per_million_of_the_host() {
        assert_eq!(tsc_range(2_596_120_000), (2_595_470_970, 2_596_769_030));
    }

    #[test]
    fn first_common_number_decides_which_cells_overlap() {
        let sets: Vec<IdSet> = ["0-1", "2", "1-3"]
            .iter()
            .map(|s| s.parse().unwrap())
            .collect();
        assert_eq!(overlapping(sets.iter()), Some((2, 0)));
        assert_eq!(overlapping(sets[..2].iter()), None);
    }
}
