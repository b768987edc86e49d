//! `virtnode baseline`.

use std::collections::BTreeMap;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::nodes::{NodesOption, WithoutObject, few};
use super::output::{OutputOption, complain, print, table, wrap};
use super::{Exit, Failure};
use crate::compat::{
    CpuBaseline, CpuCost, CpuProposal, ExcludedNode, FeatureOrigin, OriginatedFeature,
    ProposalKind, UncommonFeature, find_baseline,
};
use crate::config::{Config, heading};
use crate::domain::plain;
use crate::targets::{ChosenNodes, CpuInventory, Selector, cpu_candidates};

/// Maximum number of rows of a table for people.
const MAX_LISTED: usize = 10;

#[derive(Debug, Args)]
pub(super) struct BaselineCommand {
    /// Nodes that the CPU is for [default: all]
    #[arg(value_name = "NODE")]
    names: Vec<String>,

    /// Choose nodes by their labels, as `kubectl get --selector` does
    #[arg(short = 'l', long, value_name = "LABELS", conflicts_with = "names")]
    selector: Option<String>,

    #[command(flatten)]
    nodes: NodesOption,

    /// Print only the best CPU: `<cpu>` of a domain's definition, or `spec.domain.cpu` of a virtual
    /// machine
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        conflicts_with = "output",
        help_heading = heading::OUTPUT
    )]
    format: Option<CpuFormat>,

    #[command(flatten)]
    output: OutputOption,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CpuFormat {
    /// XML for a domain
    Libvirt,
    /// YAML for a VirtualMachineInstance
    Kubevirt,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct BaselineReport<'r> {
    /// Number of nodes that can give the CPU.
    nodes: usize,
    #[serde(flatten)]
    baseline: &'r CpuBaseline,
    /// Nodes whose daemon has no connection to libvirt.
    cut_off: &'r [String],
    /// Parts that objects omit because of their size, by node.
    omitted: &'r BTreeMap<String, Vec<String>>,
}

impl BaselineCommand {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        let selector = self.selector.as_deref().map(str::parse::<Selector>);
        let selector = selector
            .transpose()
            .map_err(|error| Failure::new(Exit::Usage, format!("--selector: {error}")))?;
        let (inventory, now) = self.nodes.read(config, WithoutObject::Unknown)?;
        let all = inventory.nodes.len();
        if selector.is_some() && all == 0 {
            return Err(Failure::new(
                Exit::Failed,
                "--selector needs the labels of Node objects; the list contains none: `kubectl get \
                 nodes,nodevirtualizations -o json` prints them",
            )
            .into());
        }
        let chosen = ChosenNodes {
            names: &self.names,
            selector: selector.as_ref(),
        };
        let found = cpu_candidates(inventory, chosen, now);
        if found.candidates.is_empty() {
            let reason = match &selector {
                Some(selector) => format!(
                    "none of {all} nodes has labels that match '{}'",
                    plain(selector.as_str())
                ),
                None => "the cluster has no nodes".to_owned(),
            };
            return Err(Failure::new(Exit::Unknown, reason).into());
        }
        let baseline = find_baseline(&found.candidates);
        match self.format {
            Some(format) => self.print_definition(format, &baseline),
            None => self.print_report(&found, &baseline),
        }
    }

    fn print_definition(&self, format: CpuFormat, baseline: &CpuBaseline) -> anyhow::Result<Exit> {
        let mut lines = String::new();
        explain_excluded(&mut lines, &baseline.excluded);
        for line in lines.lines() {
            complain(&format!("virtnode: {}", line.trim_start()));
        }
        if let Some(warning) = vendor_warning(baseline) {
            complain(&format!("virtnode: {warning}"));
        }
        let Some(best) = &baseline.best else {
            return Err(Failure::new(Exit::Unknown, without_cpu(baseline)).into());
        };
        match format {
            CpuFormat::Libvirt => print(&best.to_libvirt_xml())?,
            CpuFormat::Kubevirt => {
                let mut proposals = std::iter::once(best).chain(&baseline.alternatives);
                let usable = proposals.find(|proposal| proposal.kind == ProposalKind::Usable);
                let Some(usable) = usable else {
                    let reason = format!(
                        "no model is usable on every node, and KubeVirt schedules by the label of a \
                         usable model; for libvirt {} without some of its features would do",
                        best.model
                    );
                    return Err(Failure::new(Exit::Unknown, reason).into());
                };
                let cpu = BTreeMap::from([("cpu", usable.to_kubevirt())]);
                let spec = BTreeMap::from([("spec", BTreeMap::from([("domain", cpu)]))]);
                print(&serde_saphyr::to_string(&spec).context("cannot write YAML")?)?;
            }
        }
        Ok(Exit::Done)
    }

    fn print_report(&self, found: &CpuInventory, baseline: &CpuBaseline) -> anyhow::Result<Exit> {
        let report = BaselineReport {
            nodes: baseline.nodes(),
            baseline,
            cut_off: &found.cut_off,
            omitted: &found.omitted,
        };
        self.output.print(&report, || show(found, baseline))?;
        Ok(match baseline.best {
            Some(_) => Exit::Done,
            None => Exit::Unknown,
        })
    }
}

fn show(found: &CpuInventory, baseline: &CpuBaseline) -> String {
    let mut text = String::new();
    match &baseline.best {
        Some(best) => show_best(&mut text, found, baseline, best),
        None => wrap(&mut text, "", "", &format!("{}.", without_cpu(baseline))),
    }
    if !baseline.alternatives.is_empty() {
        text.push_str("\nOther models, the best first:\n\n");
        let rows = baseline.alternatives.iter().map(|proposal| {
            let count = proposal
                .features
                .map_or("unknown".to_owned(), |n| n.to_string());
            let remark = match (proposal.kind, proposal.deprecated) {
                (ProposalKind::Reduced, _) => "not usable as it is",
                (_, true) => "deprecated",
                _ => "",
            };
            let (require, disable) = (proposal.require.len(), proposal.disable.len());
            let model = proposal.model.clone();
            vec![
                model,
                count,
                require.to_string(),
                disable.to_string(),
                remark.to_owned(),
            ]
        });
        let header = ["MODEL", "FEATURES", "REQUIRE", "DISABLE", "REMARK"];
        text.push_str(&table(&header, rows));
    }
    if let Some(warning) = vendor_warning(baseline) {
        text.push('\n');
        wrap(&mut text, "", "", &format!("{warning}."));
    }
    show_costs(&mut text, baseline);
    show_uncommon(&mut text, &baseline.uncommon);
    if !baseline.excluded.is_empty() {
        text.push_str("\nLeft out, and not known to give this CPU:\n");
        explain_excluded(&mut text, &baseline.excluded);
    }
    let incomplete = baseline.classes.iter().filter(|class| !class.complete);
    let incomplete: Vec<String> = incomplete.flat_map(|class| class.nodes.clone()).collect();
    if !incomplete.is_empty() {
        text.push('\n');
        wrap(
            &mut text,
            "",
            "",
            &format!(
                "Not all features of {} are known, so only those of usable models count there.",
                plain(&few(&incomplete))
            ),
        );
    }
    if !found.cut_off.is_empty() {
        text.push('\n');
        wrap(
            &mut text,
            "",
            "",
            &format!(
                "The daemon of {} has no connection to libvirt; its last facts are used.",
                plain(&few(&found.cut_off))
            ),
        );
    }
    text
}

fn show_best(text: &mut String, found: &CpuInventory, baseline: &CpuBaseline, best: &CpuProposal) {
    let nodes = baseline.nodes();
    let (arch, accelerator) = (
        platform(&baseline.architecture),
        platform(&baseline.accelerator),
    );
    let of = match found.candidates.len() {
        all if all == nodes => format!("{nodes}"),
        all => format!("{nodes} of {all}"),
    };
    let noun = if found.candidates.len() == 1 {
        "node"
    } else {
        "nodes"
    };
    text.push_str(&format!(
        "Best CPU for {of} {noun} ({arch}, {accelerator}): {}\n\n",
        best.model
    ));
    let usable = match (best.kind, best.deprecated) {
        (ProposalKind::Reduced, _) => "on some nodes only without the features to disable",
        (_, true) => "as it is on every node; deprecated: a newer QEMU will remove it",
        _ => "as it is on every node",
    };
    text.push_str(&format!("  usable    {usable}\n"));
    if let Some(features) = best.features {
        text.push_str(&format!("  features  {features} in the guest\n"));
    }
    for (word, names) in [("require", &best.require), ("disable", &best.disable)] {
        if !names.is_empty() {
            let list = names.join(", ");
            wrap(text, &format!("  {word:<10}"), "            ", &list);
        }
    }
    text.push_str(
        "\n`virtnode baseline` with --format libvirt or --format kubevirt prints its definition.\n",
    );
}

/// Returns the warning about nodes of several vendors.
fn vendor_warning(baseline: &CpuBaseline) -> Option<String> {
    (baseline.vendors.len() > 1).then(|| {
        format!(
            "the CPUs are of different vendors ({}): libvirt calls them incompatible, and a live \
             migration between them may stop the guest; choose the nodes of one vendor",
            plain(&baseline.vendors.join(", "))
        )
    })
}

fn platform(word: &Option<String>) -> String {
    word.as_deref().map(plain).unwrap_or_default()
}

/// Returns the reason why there is no proposal.
fn without_cpu(baseline: &CpuBaseline) -> String {
    let nodes = baseline.nodes();
    let Some(arch) = &baseline.architecture else {
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for node in &baseline.excluded {
            *reasons.entry(node.reason.describe()).or_default() += 1;
        }
        let reasons: Vec<String> = reasons
            .into_iter()
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        return format!("the CPU of no node is known: {}", reasons.join("; "));
    };
    let advice = match arch.as_str() {
        "x86_64" | "i686" | "s390x" => "choose fewer nodes, for instance by --selector",
        _ => {
            "on this architecture libvirt does not report usable models; use host-passthrough among \
             nodes with the same CPU, microcode and kernel"
        }
    };
    format!(
        "no CPU model is known to run on each of {nodes} nodes ({}): {advice}",
        plain(arch)
    )
}

fn show_costs(text: &mut String, baseline: &CpuBaseline) {
    if baseline.costs.is_empty() {
        if baseline.classes.len() > 1 {
            text.push_str(
                "\nNo kind of node stands in the way alone: at least two lack each other feature.\n",
            );
        }
        return;
    }
    text.push_str("\nWithout these nodes the others could have more:\n");
    let best = baseline.best.as_ref().map(|best| best.model.as_str());
    for cost in baseline.costs.iter().take(MAX_LISTED) {
        wrap(text, "  ", "    ", &describe_cost(cost, best));
    }
    let rest = baseline.costs.len().saturating_sub(MAX_LISTED);
    if rest > 0 {
        text.push_str(&format!(
            "  and {rest} more kinds of nodes (--output json lists them)\n"
        ));
    }
}

fn describe_cost(cost: &CpuCost, best: Option<&str>) -> String {
    let model = match cost.model.as_deref() {
        Some(model) if Some(model) == best => format!("{model} with more features"),
        Some(model) => model.to_owned(),
        None => "no better model".to_owned(),
    };
    let nodes = plain(&few(&cost.nodes));
    let lacks = if cost.nodes.len() == 1 {
        "it lacks"
    } else {
        "they lack"
    };
    if cost.lacking.is_empty() {
        return format!(
            "without {nodes}: {model}; {lacks} the model, but none of the known features"
        );
    }
    format!(
        "without {nodes}: {model}; {lacks} {}",
        by_origin(&cost.lacking)
    )
}

/// Lists features by origin: `BIOS: svm; CPU generation: avx512bw, avx512cd and 9 more`.
pub(super) fn by_origin(features: &[OriginatedFeature]) -> String {
    let mut origins: BTreeMap<FeatureOrigin, Vec<&str>> = BTreeMap::new();
    for feature in features {
        let names = origins.entry(feature.origin).or_default();
        names.push(&feature.name);
    }
    let parts = origins
        .into_iter()
        .map(|(origin, names)| format!("{} ({})", few(&names), origin.describe()));
    parts.collect::<Vec<_>>().join("; ")
}

fn show_uncommon(text: &mut String, features: &[UncommonFeature]) {
    if features.is_empty() {
        return;
    }
    // Features that the same nodes lack are one row.
    let mut rows: Vec<(&UncommonFeature, Vec<OriginatedFeature>)> = Vec::new();
    for feature in features {
        let same = rows
            .iter_mut()
            .find(|(first, _)| (first.lacking, &first.nodes) == (feature.lacking, &feature.nodes));
        match same {
            Some((_, names)) => names.push(feature.feature.clone()),
            None => rows.push((feature, vec![feature.feature.clone()])),
        }
    }
    text.push_str("\nFeatures that only some of the nodes have, by the nodes that lack them:\n");
    for (first, names) in rows.iter().take(MAX_LISTED) {
        let (shown, more) = (
            &first.nodes,
            first.lacking.saturating_sub(first.nodes.len()),
        );
        let nodes = match (shown.len() > 5, more) {
            (false, 0) => few(shown),
            _ => format!(
                "{} and {} more",
                shown[..shown.len().min(5)].join(", "),
                first.lacking.saturating_sub(5)
            ),
        };
        wrap(
            text,
            "  ",
            "    ",
            &format!("{}: {}", plain(&nodes), by_origin(names)),
        );
    }
    let rest = rows.len().saturating_sub(MAX_LISTED);
    if rest > 0 {
        text.push_str(&format!(
            "  and {rest} more groups (--output json lists them)\n"
        ));
    }
}

/// Writes a line for each reason and its nodes.
fn explain_excluded(text: &mut String, excluded: &[ExcludedNode]) {
    let mut reasons: BTreeMap<(&str, Option<&str>), Vec<&str>> = BTreeMap::new();
    for node in excluded {
        let reason = (node.reason.describe(), node.found.as_deref());
        reasons.entry(reason).or_default().push(&node.name);
    }
    for ((reason, found), nodes) in reasons {
        let found = found.map_or(String::new(), |found| format!(": {}", plain(found)));
        wrap(
            text,
            "  ",
            "    ",
            &format!("{}: {reason}{found}", plain(&few(&nodes))),
        );
    }
}
