//! `virtnode hotplug vcpus`.

use clap::Args;

use super::{HotplugOptions, Submission};
use crate::hotplug::HotplugRequest;
use crate::operation::DomainName;
use crate::units::whole_number;

#[derive(Debug, Args)]
pub(super) struct VcpusCommand {
    /// Name or UUID of the domain
    domain: DomainName,

    /// Total number of vCPUs
    #[arg(allow_negative_numbers = true, value_parser = whole_number(0..=u32::MAX))]
    count: u32,

    /// Bring vCPUs that the guest leaves offline online, through the guest agent
    #[arg(long)]
    online: bool,

    #[command(flatten)]
    options: HotplugOptions,
}

impl VcpusCommand {
    pub(super) fn into_submission(self) -> Submission {
        Submission {
            domain: self.domain,
            request: HotplugRequest::Vcpus {
                count: self.count,
                online: self.online,
            },
            options: self.options,
        }
    }
}
