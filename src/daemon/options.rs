//! Translates the configuration into the options of each adapter, for the daemon and the commands.

use anyhow::Context;
use thiserror::Error;

use crate::cluster::ClusterConfig;
use crate::config::Config;
use crate::hypervisor::LibvirtConfig;

/// The configuration says that this machine has no libvirt of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("this node has no libvirt of its own (connect: none in the configuration)")]
pub struct NoLibvirt;

/// Returns the options of the daemon's libvirt connection.
///
/// # Errors
/// The node has no libvirt.
pub(crate) fn libvirt_config(config: &Config) -> Result<LibvirtConfig, NoLibvirt> {
    let uri = config.connect.clone().ok_or(NoLibvirt)?;
    Ok(LibvirtConfig {
        call_deadline: config.call_deadline,
        ..LibvirtConfig::new(uri)
    })
}

/// Returns the options of a libvirt connection for a few questions, without events.
///
/// # Errors
/// The node has no libvirt.
pub(crate) fn one_shot_libvirt_config(config: &Config) -> Result<LibvirtConfig, NoLibvirt> {
    Ok(LibvirtConfig {
        events: false,
        ..libvirt_config(config)?
    })
}

/// Returns the cluster and Node that a configuration names.
///
/// # Errors
/// The configuration names no Node, and the machine's host name cannot be read.
pub(crate) fn cluster_config(config: &Config) -> anyhow::Result<ClusterConfig> {
    let node = match &config.node_name {
        Some(name) => name.clone(),
        // The kubelet registers under the host name in lower case (pkg/util/node: GetHostname).
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .context("cannot read the host name; set --node-name")?
            .trim()
            .to_lowercase(),
    };
    Ok(ClusterConfig {
        kubeconfig: config.kubeconfig.clone(),
        context: config.context.clone(),
        ..ClusterConfig::new(node)
    })
}
