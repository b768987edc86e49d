//! `virtnode cleanup`.

use super::output::print;
use super::{Exit, runtime};
use crate::cluster::Cluster;
use crate::config::{Config, PublishTarget};
use crate::daemon::cluster_config;
use crate::publish::file::{self, FilePublisher, NODE_LABELS_FILE};

/// Removes the labels of virtnode from the destinations in the configuration.
pub(super) fn run(config: &Config) -> anyhow::Result<Exit> {
    let mut report = String::new();
    if config.publishes_to(PublishTarget::Node) {
        let (node, removed, has_object) = runtime()?.block_on(async {
            let cluster = Cluster::connect(cluster_config(config)?).await?;
            let keys = cluster.clear().await?;
            // The definition may not be installed, or the user may not read the object.
            let object = cluster.virtualization().await.ok().flatten();
            anyhow::Ok((cluster.node().to_owned(), keys.len(), object.is_some()))
        })?;
        report.push_str(&match removed {
            0 => format!("Node {node}: no labels of virtnode.\n"),
            1 => format!("Node {node}: 1 label removed.\n"),
            count => format!("Node {node}: {count} labels removed.\n"),
        });
        if has_object {
            // The daemon's role does not allow deleting it: Kubernetes collects it with the Node.
            report.push_str(&format!(
                "NodeVirtualization {node}: kept. It is deleted with the Node, or by `kubectl delete \
                 nodevirtualization {node}`.\n"
            ));
        }
        file::remove(&config.state_directory.join(NODE_LABELS_FILE))?;
    }
    if config.publishes_to(PublishTarget::File) {
        let file = FilePublisher::new(&config.state_directory, &config.features_directory);
        let removed = file.remove()?;
        if removed.is_empty() {
            report.push_str(&format!("{}: does not exist.\n", file.path().display()));
        }
        for path in removed {
            report.push_str(&format!("{}: removed.\n", path.display()));
        }
    }
    if report.is_empty() {
        report.push_str("Nothing to remove: this configuration publishes nothing.\n");
    }
    print(&report)?;
    Ok(Exit::Done)
}
