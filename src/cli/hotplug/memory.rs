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

    #[command(flatten)]
    options: HotplugOptions,
}

impl MemoryCommand {
    pub(super) fn into_submission(self) -> Submission {
        Submission {
            domain: self.domain,
            request: HotplugRequest::Memory { size: self.size },
            options: self.options,
        }
    }
}
