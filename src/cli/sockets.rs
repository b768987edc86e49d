//! `virtnode sockets`: the broker between launchers and a daemon without rights.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::{Exit, runtime};
use crate::config::Settings;
use crate::sockets::{self, SocketsOptions};
use crate::{ffi, telemetry};

#[derive(Debug, Args)]
pub(super) struct SocketsCommand {
    /// The kubelet's pods directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet/pods")]
    directory: PathBuf,

    /// Directory for the served sockets, one per launcher: POD-UID.sock
    #[arg(long, value_name = "DIR", default_value = "/run/virtnode-launchers")]
    serve: PathBuf,

    /// Forward changes of the number of vCPUs as well
    #[arg(long)]
    allow_changes: bool,

    /// Volume with the socket in a launcher pod
    #[arg(long, value_name = "NAME", default_value = "libvirt-runtime")]
    volume: String,

    /// Names of the socket in that volume, the preferred first
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "virtqemud-sock,libvirt-sock"
    )]
    names: Vec<String>,
}

impl SocketsCommand {
    pub(super) fn run(self, settings: &Settings) -> anyhow::Result<Exit> {
        ffi::keep_little_memory();
        let filter = settings.log.as_deref().unwrap_or("info");
        telemetry::log::init(settings.log_format.unwrap_or_default(), filter)?;
        let options = SocketsOptions {
            directory: self.directory,
            serve: self.serve,
            volume: self.volume,
            names: self.names,
            allow_changes: self.allow_changes,
        };
        let directory = options.serve.display().to_string();
        runtime()?
            .block_on(sockets::run(options))
            .with_context(|| format!("cannot serve sockets in {directory}"))?;
        Ok(Exit::Done)
    }
}
