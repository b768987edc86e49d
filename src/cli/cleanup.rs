//! `virtnode cleanup`.

use super::output::print;
use super::{Exit, runtime};
use crate::cluster::Cluster;
use crate::config::{Config, Target};
use crate::daemon::cluster_config;
use crate::publish::file::{self, FilePublisher, NODE_LABELS_FILE};

/// Removes what this program published where the configuration says that it publishes.
pub(super) fn run(config: &Config) -> anyhow::Result<Exit> {
    let mut told = String::new();
    if config.publishes_to(Target::Node) {
        let gone = runtime()?.block_on(async {
            let cluster = Cluster::connect(cluster_config(config)?).await?;
            let keys = cluster.clear().await?;
            // Not everybody has the definition, or the right to look.
            let object = cluster.virtualization().await.ok().flatten();
            anyhow::Ok((cluster.node().to_owned(), keys, object.is_some()))
        })?;
        let (node, keys, has_object) = gone;
        told.push_str(&match keys.len() {
            0 => format!("Node {node}: no label there is ours.\n"),
            1 => format!("Node {node}: 1 label removed.\n"),
            count => format!("Node {node}: {count} labels removed.\n"),
        });
        if has_object {
            // The daemon has no right to delete it, and needs none.
            told.push_str(&format!(
                "NodeVirtualization {node}: left; it goes with the Node, or by `kubectl delete nodevirtualization {node}`.\n"
            ));
        }
        file::remove(&config.state_directory.join(NODE_LABELS_FILE))?;
    }
    if config.publishes_to(Target::File) {
        let file = FilePublisher::new(&config.state_directory, &config.features_directory);
        let removed = file.remove()?;
        if removed.is_empty() {
            told.push_str(&format!("{}: not there.\n", file.path().display()));
        }
        for path in removed {
            told.push_str(&format!("{}: removed.\n", path.display()));
        }
    }
    if told.is_empty() {
        told.push_str("Nothing is published by this configuration, so nothing was removed.\n");
    }
    print(&told)?;
    Ok(Exit::Done)
}
