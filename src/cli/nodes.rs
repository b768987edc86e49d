//! The nodes of a cluster, from the API server or from a file, for `targets`, `baseline` and `compare`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::jiff::Timestamp;

use super::input::DocumentInput;
use super::output::complain;
use super::runtime;
use crate::cluster::{Cluster, ClusterError, NodeInventory, Virtualizations};
use crate::config::Config;
use crate::daemon::cluster_config;
use crate::domain::plain;

/// Maximum size of a list of nodes: four times that of 5,000 Nodes.
const LIST_MAX_BYTES: u64 = 1024 * 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct NodesOption {
    /// Nodes from a file instead of the cluster: the output of `kubectl get
    /// nodes,nodevirtualizations -o json`; - reads standard input
    #[arg(long, value_name = "FILE")]
    nodes: Option<PathBuf>,
}

/// The treatment of nodes without a `NodeVirtualization`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WithoutObject {
    /// They are judged by their labels.
    ByLabels,
    /// Nothing is known about them.
    Unknown,
}

impl WithoutObject {
    fn consequence(self) -> &'static str {
        match self {
            Self::ByLabels => "using the node's labels alone",
            Self::Unknown => "so the node's CPU is not known",
        }
    }
}

impl NodesOption {
    pub(super) fn path(&self) -> Option<&Path> {
        self.nodes.as_deref()
    }

    /// Reads the nodes, and prints what of them cannot be read. The time is that of the list; the age of
    /// a file's contents is unknown.
    pub(super) fn read(
        &self,
        config: &Config,
        without: WithoutObject,
    ) -> anyhow::Result<(NodeInventory, Option<Timestamp>)> {
        let (inventory, now) = match &self.nodes {
            Some(path) => (read_nodes(path, without)?, None),
            None => (list(config, without)?, Some(Timestamp::now())),
        };
        complain_of(&inventory, without);
        Ok((inventory, now))
    }
}

fn read_nodes(path: &Path, without: WithoutObject) -> anyhow::Result<NodeInventory> {
    let DocumentInput { name, bytes } = DocumentInput::read(path, LIST_MAX_BYTES)?;
    let inventory = NodeInventory::parse(&bytes)
        .with_context(|| format!("{name}: is not the output of `kubectl get nodes -o json`"))?;
    let (is_empty, wanted) = match without {
        WithoutObject::ByLabels => (inventory.nodes.is_empty(), "nodes"),
        WithoutObject::Unknown => (
            inventory.nodes.is_empty() && inventory.virtualizations.is_empty(),
            "nodes,nodevirtualizations",
        ),
    };
    if is_empty {
        bail!("{name}: contains no Node objects; `kubectl get {wanted} -o json` prints them");
    }
    Ok(inventory)
}

/// Lists all nodes of the cluster.
fn list(config: &Config, without: WithoutObject) -> anyhow::Result<NodeInventory> {
    runtime()?.block_on(async {
        let cluster = Cluster::connect(cluster_config(config)?).await?;
        let (nodes, virtualizations) =
            tokio::join!(cluster.list_nodes(), cluster.list_virtualizations());
        let nodes = nodes?;
        let virtualizations = match virtualizations {
            Ok(virtualizations) => virtualizations,
            Err(error @ (ClusterError::NotFound { .. } | ClusterError::Forbidden { .. }))
                if without == WithoutObject::ByLabels =>
            {
                complain(&format!("virtnode: using labels alone: {error}"));
                BTreeMap::new()
            }
            Err(error) => return Err(error.into()),
        };
        Ok(NodeInventory {
            nodes,
            virtualizations,
            skipped: Vec::new(),
        })
    })
}

/// Prints why objects cannot be read.
fn complain_of(inventory: &NodeInventory, without: WithoutObject) {
    const SHOWN: usize = 3;
    for problem in inventory.skipped.iter().take(SHOWN) {
        complain(&format!("virtnode: skipping {}", plain(problem)));
    }
    let rest = inventory.skipped.len().saturating_sub(SHOWN);
    if rest > 0 {
        complain(&format!("virtnode: and {rest} more items"));
    }
    let virtualizations: &Virtualizations = &inventory.virtualizations;
    let unreadable = virtualizations
        .iter()
        .filter_map(|(name, facts)| Some((name, facts.as_ref().err()?)));
    for (name, problem) in unreadable.clone().take(SHOWN) {
        complain(&format!(
            "virtnode: cannot read NodeVirtualization {}, {}: {}",
            plain(name),
            without.consequence(),
            plain(problem)
        ));
    }
    let rest = unreadable.count().saturating_sub(SHOWN);
    if rest > 0 {
        complain(&format!("virtnode: nor those of {rest} more nodes"));
    }
}

/// Returns the first names, and the number of the others.
pub(super) fn few<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 5;
    let (shown, rest) = names.split_at(names.len().min(SHOWN));
    let shown: Vec<&str> = shown.iter().map(AsRef::as_ref).collect();
    let list = shown.join(", ");
    if rest.is_empty() {
        list
    } else {
        format!("{list} and {} more", rest.len())
    }
}
