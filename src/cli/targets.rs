//! `virtnode targets`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;

use super::check::{Asked, read_definition, running};
use super::output::{Output, complain, print, print_value, table};
use super::report::plain;
use super::{Exit, Failure, runtime};
use crate::cluster::{Cluster, ClusterError, Inventory};
use crate::compat::{
    Affinity, Answer, NodeAnswer, Requirement, Severity, State, Targets as Answers, targets,
};
use crate::config::Config;
use crate::daemon::cluster_config;
use crate::hypervisor::{Libvirt, LibvirtConfig};
use crate::targets::candidates;
use crate::telemetry::Metrics;

/// The largest list of nodes that is read: 5,000 whole Nodes are a quarter of it.
const LIST_MAX_BYTES: u64 = 1024 * 1024 * 1024;

/// The arguments of `virtnode targets`.
#[derive(Debug, Args)]
pub(super) struct Targets {
    /// A running domain of this node, by name or UUID
    #[arg(required_unless_present = "domain_xml")]
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
    answers: Answers,
}

impl Targets {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        let stdin = Some(Path::new("-"));
        if self.domain_xml.as_deref() == stdin && self.nodes.as_deref() == stdin {
            return Err(Failure::new(
                Exit::Usage,
                "standard input can be the definition or the nodes, not both",
            )
            .into());
        }
        let domain = self.requirement(config)?;
        let inventory = match &self.nodes {
            Some(path) => read_nodes(path)?,
            None => list(config)?,
        };
        // Which node this is counts where the domain is known to run on it.
        let own = match (&self.domain, &config.node_name) {
            (Some(_), _) => cluster_config(config).ok().map(|config| config.node_name),
            (None, name) => name.clone(),
        };
        let nodes = candidates(inventory, &domain, own.as_deref());
        if nodes.is_empty() {
            bail!("there are no nodes to choose from");
        }
        let answers = targets(&domain, &nodes);
        let report = Report {
            domain: domain.name.clone(),
            fitting: answers.fitting(),
            answers,
        };
        match (&report.answers.affinity, self.affinity, self.output) {
            (Some(affinity), true, Output::Table) => print(&pod(affinity)?)?,
            (Some(affinity), true, output) => print_value(&snippet(affinity), output)?,
            (None, true, _) => complain("virtnode: no node fits, and labels cannot say so"),
            (_, false, Output::Table) => print(&show(&report)?)?,
            (_, false, output) => print_value(&report, output)?,
        }
        Ok(match report.fitting {
            0 => Exit::Infeasible,
            _ => Exit::Done,
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
                ..LibvirtConfig::new(config.connect.clone())
            };
            let libvirt = Libvirt::start(libvirt, Arc::new(Metrics::new()));
            Ok(running(name, &libvirt).await?.requirement)
        })
    }
}

fn read_nodes(path: &Path) -> anyhow::Result<Inventory> {
    let mut bytes = Vec::new();
    let (name, input): (_, Box<dyn Read>) = match path == Path::new("-") {
        true => ("standard input".to_owned(), Box::new(std::io::stdin())),
        false => {
            let name = path.display().to_string();
            let file = std::fs::File::open(path).with_context(|| format!("cannot read {name}"))?;
            (name, Box::new(file))
        }
    };
    input
        .take(LIST_MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {name}"))?;
    if bytes.len() as u64 > LIST_MAX_BYTES {
        bail!("{name}: is larger than {} MiB", LIST_MAX_BYTES >> 20);
    }
    let inventory = Inventory::parse(&bytes)
        .with_context(|| format!("{name}: is not what `kubectl get nodes -o json` prints"))?;
    if inventory.nodes.is_empty() {
        bail!("{name}: has no objects of the kind Node; `kubectl get nodes -o json` prints some");
    }
    Ok(inventory)
}

/// All nodes of the cluster. Without their `NodeVirtualization` the labels alone decide.
fn list(config: &Config) -> anyhow::Result<Inventory> {
    runtime()?.block_on(async {
        let cluster = Cluster::connect(cluster_config(config)?).await?;
        let nodes = cluster.list_nodes().await?;
        let virtualizations = match cluster.list_virtualizations().await {
            Ok(virtualizations) => virtualizations,
            Err(error @ (ClusterError::NotFound { .. } | ClusterError::Forbidden { .. })) => {
                complain(&format!("virtnode: the labels alone decide: {error}"));
                BTreeMap::new()
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Inventory {
            nodes,
            virtualizations,
        })
    })
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
    let mut text = format!(
        "{} of {} nodes fit domain {name}, the best first:\n\n",
        report.fitting,
        answers.nodes.len()
    );
    let rows = answers.nodes.iter().map(|node| {
        let fits = match node.answer {
            Answer::Feasible => "yes",
            Answer::Infeasible => "no",
            Answer::Unknown => "unknown",
        };
        vec![plain(&node.name).to_string(), fits.to_owned(), why(node)]
    });
    text.push_str(&table(&["NODE", "FITS", "WHY"], rows));
    let mut remedies: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in &answers.nodes {
        let blocking = node
            .findings
            .iter()
            .find(|f| f.severity == Severity::Blocks);
        if let Some(remedy) = blocking.and_then(|finding| finding.remedy.as_deref()) {
            remedies.entry(remedy).or_default().push(&node.name);
        }
    }
    if !remedies.is_empty() {
        text.push_str("\nWhat would make others fit:\n");
        for (remedy, nodes) in remedies {
            text.push_str(&format!("  {}: {}\n", few(&nodes), plain(remedy)));
        }
    }
    if !answers.untold.is_empty() {
        let names: Vec<&str> = answers.untold.iter().map(String::as_str).collect();
        text.push_str(&format!(
            "\nWithout virtnode's labels, so nothing is known of them: {}\n",
            few(&names)
        ));
    }
    if !answers.unsaid.is_empty() {
        text.push_str("\nNot told of any node, so not looked at:\n");
        for what in &answers.unsaid {
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

/// The first reasons, behind what marks the node.
fn why(node: &NodeAnswer) -> String {
    let marks = node.states.iter().map(|state| match state {
        State::Cordoned => "cordoned",
        State::NotReady => "not ready",
        State::RunsHere => "runs here now",
    });
    let reasons = node
        .findings
        .iter()
        .filter(|finding| finding.severity < Severity::Note)
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
