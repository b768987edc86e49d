//! `virtnode hotplug memory`.

use clap::Args;

use super::{HotplugOptions, Submission};
use crate::hotplug::HotplugRequest;
use crate::operation::DomainName;
use crate::units::Bytes;

#[derive(Debug, Args)]
pub(super) struct MemoryCommand {
    /// Name or UUID of the domain
    domain: DomainName,

    /// Total memory, with a binary unit: 2GiB, 1536MiB, 2Gi
    #[arg(allow_hyphen_values = true)]
    size: Bytes,

    /// Take memory away even if the guest uses more than is left to it: it may kill programs or
    /// crash
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    options: HotplugOptions,
}

impl MemoryCommand {
    pub(super) fn into_submission(self) -> Submission {
        Submission {
            domain: self.domain,
            request: HotplugRequest::Memory {
                size: self.size,
                force: self.force,
            },
            options: self.options,
        }
    }
}
