//! `virtnode targets`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::check::{Asked, read_definition, running};
use super::output::{Output, complain, print, print_value, table};
use super::report::plain;
use super::{Exit, Failure, runtime};
use crate::cluster::{Cluster, ClusterError, NodeInventory, Virtualizations};
use crate::compat::{
    Affinity, CandidateState, Feasibility, NodeAssessment, Placement, Requirement, RuleSeverity,
    find_targets,
};
use crate::config::Config;
use crate::daemon::cluster_config;
use crate::hypervisor::{Libvirt, LibvirtConfig};
use crate::targets::candidates;
use crate::telemetry::Metrics;

/// The largest list of nodes that is read: 5,000 whole Nodes are a quarter of it.
const LIST_MAX_BYTES: u64 = 1024 * 1024 * 1024;

/// A terminal holds that many; the rest is summed up.
const MOST_LISTED: usize = 40;

/// The arguments of `virtnode targets`.
#[derive(Debug, Args)]
pub(super) struct Targets {
    /// A running domain of this node, by name or UUID
    domain: Option<String>,

    /// A definition instead, as `virsh dumpxml` prints it; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with = "domain")]
    domain_xml: Option<PathBuf>,

    /// The nodes from a file instead of the cluster: what `kubectl get
    /// nodes,nodevirtualizations -o json` prints; - reads standard input
    #[arg(long, value_name = "FILE")]
    nodes: Option<PathBuf>,

    /// Print only the affinity, for `spec:` of a pod
    #[arg(long)]
    affinity: bool,

    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// All that is printed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    domain: Option<String>,
    /// How many nodes fit.
    fitting: usize,
    #[serde(flatten)]
    answers: Placement,
}

impl Targets {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        if self.domain.is_none() && self.domain_xml.is_none() {
            return Err(Failure::new(
                Exit::Usage,
                "which domain? Give the name of one that runs here, or --domain-xml FILE (- for \
                 standard input)",
            )
            .into());
        }
        let stdin = Some(Path::new("-"));
        if self.domain_xml.as_deref() == stdin && self.nodes.as_deref() == stdin {
            return Err(Failure::new(
                Exit::Usage,
                "standard input can be the definition or the nodes, not both",
            )
            .into());
        }
        let domain = self.requirement(config)?;
        // What is in a file was true when it was written, and nobody knows when that was.
        let (inventory, now) = match &self.nodes {
            Some(path) => (read_nodes(path)?, None),
            None => (list(config)?, Some(Timestamp::now())),
        };
        complain_of(&inventory.virtualizations);
        // Which node this is counts where the domain is known to run on it.
        let own = match (&self.domain, &config.node_name) {
            (Some(_), _) => cluster_config(config).ok().map(|config| config.node_name),
            (None, name) => name.clone(),
        };
        let nodes = candidates(inventory, &domain, own.as_deref(), now);
        if nodes.is_empty() {
            bail!("there are no nodes to choose from");
        }
        let answers = find_targets(&domain, &nodes);
        let report = Report {
            domain: domain.name.clone(),
            fitting: answers.fitting(),
            answers,
        };
        match (&report.answers.affinity, self.affinity, self.output) {
            (Some(affinity), true, Output::Table) => print(&pod(affinity)?)?,
            (Some(affinity), true, output) => print_value(&snippet(affinity), output)?,
            (None, true, _) => {
                complain("virtnode: no affinity: no node fits, and labels cannot say so")
            }
            (_, false, Output::Table) => print(&show(&report)?)?,
            (_, false, output) => print_value(&report, output)?,
        }
        Ok(match report.answers.nodes.first().map(|best| best.answer) {
            Some(Feasibility::Feasible) => Exit::Done,
            Some(Feasibility::Infeasible) => Exit::Infeasible,
            // As `check` ends when it does not know.
            Some(Feasibility::Unknown) | None => Exit::Failed,
        })
    }

    fn requirement(&self, config: &Config) -> anyhow::Result<Requirement> {
        if let Some(path) = &self.domain_xml {
            let (name, xml) = read_definition(path)?;
            return Ok(Asked::parse(&name, xml, false)?.requirement);
        }
        let name = self.domain.as_deref().unwrap_or_default();
        runtime()?.block_on(async {
            let libvirt = LibvirtConfig {
                call_deadline: config.call_deadline,
                ..LibvirtConfig::without_events(config.connect.clone())
            };
            let libvirt = Libvirt::start(libvirt, Arc::new(Metrics::new()));
            Ok(running(name, &libvirt).await?.requirement)
        })
    }
}

fn read_nodes(path: &Path) -> anyhow::Result<NodeInventory> {
    let (name, size, input): (_, _, Box<dyn Read>) = match path == Path::new("-") {
        true => ("standard input".to_owned(), 0, Box::new(std::io::stdin())),
        false => {
            let name = path.display().to_string();
            let file = std::fs::File::open(path).with_context(|| format!("cannot read {name}"))?;
            let size = file.metadata().map_or(0, |metadata| metadata.len());
            (name, size, Box::new(file))
        }
    };
    // A list of whole Nodes is moved about no more than it must be; one byte more shows its end.
    let size = usize::try_from(size.min(LIST_MAX_BYTES) + 1).unwrap_or_default();
    let mut bytes = Vec::with_capacity(size);
    input
        .take(LIST_MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {name}"))?;
    if bytes.len() as u64 > LIST_MAX_BYTES {
        bail!("{name}: is larger than {} MiB", LIST_MAX_BYTES >> 20);
    }
    let inventory = NodeInventory::parse(&bytes)
        .with_context(|| format!("{name}: is not what `kubectl get nodes -o json` prints"))?;
    if inventory.nodes.is_empty() {
        bail!("{name}: has no objects of the kind Node; `kubectl get nodes -o json` prints some");
    }
    Ok(inventory)
}

/// All nodes of the cluster. Without their `NodeVirtualization` the labels alone decide.
fn list(config: &Config) -> anyhow::Result<NodeInventory> {
    runtime()?.block_on(async {
        let cluster = Cluster::connect(cluster_config(config)?).await?;
        let (nodes, virtualizations) =
            tokio::join!(cluster.list_nodes(), cluster.list_virtualizations());
        let nodes = nodes?;
        let virtualizations = match virtualizations {
            Ok(virtualizations) => virtualizations,
            Err(error @ (ClusterError::NotFound { .. } | ClusterError::Forbidden { .. })) => {
                complain(&format!("virtnode: the labels alone decide: {error}"));
                BTreeMap::new()
            }
            Err(error) => return Err(error.into()),
        };
        Ok(NodeInventory {
            nodes,
            virtualizations,
        })
    })
}

/// Says of objects that cannot be read what is wrong with them.
fn complain_of(virtualizations: &Virtualizations) {
    const SHOWN: usize = 3;
    let bad = virtualizations
        .iter()
        .filter_map(|(name, facts)| Some((name, facts.as_ref().err()?)));
    for (name, problem) in bad.clone().take(SHOWN) {
        let name = plain(name);
        complain(&format!(
            "virtnode: the NodeVirtualization {name} cannot be read, so its labels alone decide: \
             {}",
            plain(problem)
        ));
    }
    let rest = bad.count().saturating_sub(SHOWN);
    if rest > 0 {
        complain(&format!("virtnode: nor can those of {rest} more nodes"));
    }
}

fn snippet(affinity: &Affinity) -> BTreeMap<&str, BTreeMap<&str, &Affinity>> {
    BTreeMap::from([("affinity", BTreeMap::from([("nodeAffinity", affinity)]))])
}

fn pod(affinity: &Affinity) -> anyhow::Result<String> {
    let text = serde_saphyr::to_string(&snippet(affinity)).context("cannot write YAML")?;
    Ok(format!("{}\n", text.trim_end()))
}

fn show(report: &Report) -> anyhow::Result<String> {
    let answers = &report.answers;
    let name = report.domain.as_deref().map(plain).unwrap_or_default();
    let mut text = match (report.fitting, answers.nodes.len()) {
        (_, 0) => format!("No node has virtnode's labels: nothing is known for domain {name}.\n"),
        (0, all) => {
            format!("None of {all} nodes is known to fit domain {name}; the nearest first:\n\n")
        }
        (fitting, all) => {
            format!("{fitting} of {all} nodes fit domain {name}, the best first:\n\n")
        }
    };
    let (listed, rest) = answers.nodes.split_at(answers.nodes.len().min(MOST_LISTED));
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
        text.push_str("\nWhat would make those fit that do not:\n");
        for (remedy, nodes) in remedies {
            text.push_str(&format!("  {}: {}\n", few(&nodes), plain(remedy)));
        }
    }
    if !answers.unlabeled.is_empty() {
        let names: Vec<&str> = answers.unlabeled.iter().map(String::as_str).collect();
        text.push_str(&format!(
            "\nWithout virtnode's labels, so nothing is known of them: {}\n",
            few(&names)
        ));
    }
    if !answers.unverified.is_empty() {
        text.push_str("\nNot told of any node, so not looked at:\n");
        for what in &answers.unverified {
            text.push_str(&format!("  * {}\n", plain(what)));
        }
    }
    match &answers.affinity {
        Some(affinity) => {
            text.push_str("\nThe same for the scheduler, in a pod's spec:\n\n");
            text.push_str(&pod(affinity)?);
        }
        None => text.push_str("\nNo affinity: no node fits, and labels cannot say so.\n"),
    }
    if !answers.named.is_empty() {
        let names: Vec<&str> = answers.named.iter().map(String::as_str).collect();
        text.push_str(&format!(
            "\nLabels alone say otherwise of {}, so the affinity names them; that holds for now \
             only.\n",
            few(&names)
        ));
    }
    if answers.unnamed > 0 {
        text.push_str(&format!(
            "The labels of {} more say otherwise, which is too many to name: there the scheduler \
             does not go by this answer.\n",
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

/// The nodes that are not listed one by one: how many for which reason, the most first.
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

/// The first reasons, behind what marks the node.
fn why(node: &NodeAssessment) -> String {
    let marks = node.states.iter().map(|state| match state {
        CandidateState::Cordoned => "cordoned",
        CandidateState::NotReady => "not ready",
        CandidateState::RunsHere => "runs here now",
        CandidateState::CutOff => "its daemon has no connection to libvirt",
        CandidateState::Stale => "its NodeVirtualization is out of date and not gone by",
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

fn few(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    match names.len().checked_sub(SHOWN) {
        Some(rest) if rest > 0 => format!("{} and {rest} more", names[..SHOWN].join(", ")),
        _ => names.join(", "),
    }
}
