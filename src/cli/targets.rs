//! `virtnode targets`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;

use super::check::{CheckedDomain, running};
use super::input::ensure_one_stdin;
use super::nodes::{NodesOption, WithoutObject, few};
use super::output::{OutputOption, complain, table};
use super::{Exit, Failure, no_libvirt, runtime};
use crate::compat::{
    Affinity, CandidateState, Feasibility, NodeAssessment, Placement, Requirement, RuleSeverity,
    find_targets,
};
use crate::config::{Config, heading};
use crate::daemon::Metrics;
use crate::daemon::{cluster_config, one_shot_libvirt_config};
use crate::domain::plain;
use crate::hypervisor::Libvirt;
use crate::targets::candidates;

/// Maximum number of nodes in the table, which fits on a terminal. The others are summarized.
const MAX_LISTED: usize = 40;

#[derive(Debug, Args)]
pub(super) struct TargetsCommand {
    /// Running domain of this node, by name or UUID
    domain: Option<String>,

    /// Domain definition instead, as `virsh dumpxml` prints it; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with = "domain")]
    domain_xml: Option<PathBuf>,

    #[command(flatten)]
    nodes: NodesOption,

    /// Print only the affinity, for the `spec:` of a pod
    #[arg(long, help_heading = heading::OUTPUT)]
    affinity: bool,

    #[command(flatten)]
    output: OutputOption,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct TargetsReport {
    domain: Option<String>,
    /// Number of nodes that fit.
    fitting: usize,
    #[serde(flatten)]
    answers: Placement,
}

impl TargetsCommand {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        if self.domain.is_none() && self.domain_xml.is_none() {
            return Err(Failure::new(
                Exit::Usage,
                "no domain given: name one that runs here, or use --domain-xml FILE (- for \
                 standard input)",
            )
            .into());
        }
        let definition = self.domain_xml.as_deref();
        let nodes = self.nodes.path();
        ensure_one_stdin(
            [("--domain-xml", definition), ("--nodes", nodes)]
                .into_iter()
                .filter_map(|(name, path)| Some((name, path?))),
        )?;
        let domain = self.requirement(config)?;
        // The age of a file's contents is unknown, so its objects are not checked for staleness.
        let (inventory, now) = self.nodes.read(config, WithoutObject::ByLabels)?;
        // Without a name in the configuration, this node counts only if the domain runs on it.
        let own = match (&self.domain, &config.node_name) {
            (Some(_), _) => cluster_config(config).ok().map(|config| config.node_name),
            (None, name) => name.clone(),
        };
        let nodes = candidates(inventory, &domain, own.as_deref(), now);
        if nodes.is_empty() {
            bail!("the list of nodes is empty");
        }
        let answers = find_targets(&domain, &nodes);
        let report = TargetsReport {
            domain: domain.name.clone(),
            fitting: answers.fitting(),
            answers,
        };
        match (&report.answers.affinity, self.affinity) {
            (Some(affinity), true) => {
                let snippet = snippet(affinity);
                let yaml = yaml(affinity)?;
                self.output.print(&snippet, || yaml)?;
            }
            (None, true) => complain(
                "virtnode: no affinity: no node fits, and labels cannot express the answer",
            ),
            (_, false) => {
                let text = show(&report)?;
                self.output.print(&report, || text)?;
            }
        }
        Ok(match report.answers.nodes.first().map(|best| best.answer) {
            Some(Feasibility::Feasible) => Exit::Done,
            Some(Feasibility::Infeasible) => Exit::Infeasible,
            // The exit code of an unknown answer of `virtnode check`.
            Some(Feasibility::Unknown) | None => Exit::Failed,
        })
    }

    fn requirement(&self, config: &Config) -> anyhow::Result<Requirement> {
        if let Some(path) = &self.domain_xml {
            return Ok(CheckedDomain::read(path)?.requirement);
        }
        let name = self.domain.as_deref().unwrap_or_default();
        runtime()?.block_on(async {
            let metrics = Metrics::new().hypervisor;
            let options = one_shot_libvirt_config(config).map_err(no_libvirt)?;
            let libvirt = Libvirt::start(options, metrics);
            Ok(running(name, &libvirt).await?.requirement)
        })
    }
}

fn snippet(affinity: &Affinity) -> BTreeMap<&str, BTreeMap<&str, &Affinity>> {
    BTreeMap::from([("affinity", BTreeMap::from([("nodeAffinity", affinity)]))])
}

fn yaml(affinity: &Affinity) -> anyhow::Result<String> {
    let text = serde_saphyr::to_string(&snippet(affinity)).context("cannot write YAML")?;
    Ok(format!("{}\n", text.trim_end()))
}

fn show(report: &TargetsReport) -> anyhow::Result<String> {
    let answers = &report.answers;
    let name = report.domain.as_deref().map(plain).unwrap_or_default();
    let mut text = match (report.fitting, answers.nodes.len()) {
        (_, 0) => {
            format!("No node has virtnode's labels, so the answer for domain {name} is unknown.\n")
        }
        (0, all) => {
            format!("None of {all} nodes is known to fit domain {name}; closest first:\n\n")
        }
        (fitting, all) => {
            format!("{fitting} of {all} nodes fit domain {name}; best first:\n\n")
        }
    };
    let (listed, rest) = answers.nodes.split_at(answers.nodes.len().min(MAX_LISTED));
    let rows = listed.iter().map(|node| {
        let fits = fits(node.answer).to_owned();
        vec![plain(&node.name), fits, why(node)]
    });
    if !listed.is_empty() {
        text.push_str(&table(&["NODE", "FITS", "WHY"], rows));
    }
    text.push_str(&summary(rest));
    let mut remedies: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in &answers.nodes {
        let blocking = node
            .findings
            .iter()
            .find(|f| f.severity == RuleSeverity::Blocks);
        if let Some(remedy) = blocking.and_then(|finding| finding.remedy.as_deref()) {
            remedies.entry(remedy).or_default().push(&node.name);
        }
    }
    if !remedies.is_empty() {
        text.push_str("\nRemedies for nodes that do not fit:\n");
        for (remedy, nodes) in remedies {
            text.push_str(&format!("  {}: {}\n", few(&nodes), plain(remedy)));
        }
    }
    if !answers.unlabeled.is_empty() {
        let names: Vec<&str> = answers.unlabeled.iter().map(String::as_str).collect();
        text.push_str(&format!(
            "\nUnknown, because they have no labels of virtnode: {}\n",
            few(&names)
        ));
    }
    if !answers.unverified.is_empty() {
        text.push_str("\nNot checked, because no node publishes it:\n");
        for what in &answers.unverified {
            text.push_str(&format!("  * {}\n", plain(what)));
        }
    }
    match &answers.affinity {
        Some(affinity) => {
            text.push_str("\nNode affinity for the pod's spec:\n\n");
            text.push_str(&yaml(affinity)?);
        }
        None => {
            text.push_str("\nNo affinity: no node fits, and labels cannot express the answer.\n")
        }
    }
    if !answers.named.is_empty() {
        let names: Vec<&str> = answers.named.iter().map(String::as_str).collect();
        text.push_str(&format!(
            "\nFor {} the labels give another answer, so the affinity names the nodes. It is valid \
             only as long as they do not change.\n",
            few(&names)
        ));
    }
    if answers.unnamed > 0 {
        text.push_str(&format!(
            "For {} more nodes the labels give another answer, too many to name: there the \
             scheduler decides by the labels.\n",
            answers.unnamed
        ));
    }
    Ok(text)
}

fn fits(answer: Feasibility) -> &'static str {
    match answer {
        Feasibility::Feasible => "yes",
        Feasibility::Infeasible => "no",
        Feasibility::Unknown => "unknown",
    }
}

/// Summarizes the nodes beyond the table: the number of nodes per reason, most first.
fn summary(rest: &[NodeAssessment]) -> String {
    const SHOWN: usize = 5;
    let mut reasons: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for node in rest {
        let first = node
            .findings
            .first()
            .map(|finding| finding.message.as_str());
        let reason = match node.answer {
            Feasibility::Feasible => "",
            _ => first.unwrap_or_default(),
        };
        *reasons.entry((fits(node.answer), reason)).or_default() += 1;
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let mut text = String::new();
    if !rest.is_empty() {
        text = format!(
            "\nAnd {} more (--output json lists them all):\n",
            rest.len()
        );
    }
    for ((fits, reason), count) in reasons.iter().take(SHOWN) {
        let line = format!("  {count} {fits} {}", plain(reason));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    let others = reasons
        .iter()
        .skip(SHOWN)
        .map(|(_, count)| count)
        .sum::<usize>();
    if others > 0 {
        text.push_str(&format!("  {others} for other reasons\n"));
    }
    text
}

/// Returns the node's states and the first reasons against it.
fn why(node: &NodeAssessment) -> String {
    let marks = node.states.iter().map(|state| match state {
        CandidateState::Cordoned => "cordoned",
        CandidateState::NotReady => "not ready",
        CandidateState::RunsHere => "runs here now",
        CandidateState::CutOff => "its daemon has no connection to libvirt",
        CandidateState::Stale => "its NodeVirtualization is stale and ignored",
        CandidateState::Unreadable => "its NodeVirtualization cannot be read",
    });
    let reasons = node
        .findings
        .iter()
        .filter(|finding| finding.severity < RuleSeverity::Note)
        .map(|finding| finding.message.as_str())
        .take(2);
    let words: Vec<String> = marks.chain(reasons).map(|w| plain(w).to_string()).collect();
    words.join("; ")
}
