//! `virtnode check`.

mod live;
mod question;
mod show;

use clap::Args;
use serde::Serialize;

pub(super) use self::live::running;
use self::question::Question;
pub(super) use self::question::{Asked, read as read_definition};
use super::offline::Offline;
use super::output::{Output, print, print_value};
use super::{Exit, Failure};
use crate::capability::Version;
use crate::compat::{Assessment, Confirmation, Feasibility, Offer, Requirement, assess};
use crate::config::Config;

/// The arguments of `virtnode check`.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,

    #[command(flatten)]
    question: Question,

    #[command(flatten)]
    offline: Offline,
}

/// All that is printed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// The domain's name, or none for one that was only described.
    domain: Option<String>,
    #[serde(flatten)]
    fit: Assessment,
    /// What the hypervisor itself says; none offline.
    confirmation: Option<Confirmation>,
    /// Whether it says the same as was computed; none if it said nothing.
    agrees: Option<bool>,
    node: Node,
}

/// What the domain was held against.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    live: bool,
    arch: Option<String>,
    domain_type: Option<String>,
    libvirt_version: Option<Version>,
    qemu_version: Option<Version>,
}

impl Check {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        self.question.validate()?;
        let report = match self.offline.read()? {
            Some(facts) => {
                let best = |arch: &str| facts.best_domain_type(arch).map(str::to_owned);
                let Some(domain) = self.question.offline(facts.native_arch(), best)? else {
                    return Err(Failure::new(
                        Exit::Usage,
                        "--domain asks this node's libvirt, and the other flags say to ask nothing \
                         local: give the domain's XML with --domain-xml (virsh dumpxml prints it)",
                    )
                    .into());
                };
                let (arch, virt_type) = (
                    domain.requirement.arch.as_deref(),
                    domain.requirement.virt_type.as_deref(),
                );
                let offer = Offer::from_facts(&facts, arch, virt_type);
                let fit = assess(&domain.requirement, &offer);
                Report::new(domain.is_described, &domain.requirement, fit, &offer, None)
            }
            None => match live::ask(&self.question, config)? {
                Ok(report) => report,
                Err(exit) => return Ok(exit),
            },
        };
        match self.output {
            Output::Table => print(&show::report(&report))?,
            output => print_value(&report, output)?,
        }
        Ok(match report.fit.answer {
            Feasibility::Feasible => Exit::Done,
            Feasibility::Infeasible => Exit::Infeasible,
            Feasibility::Unknown => Exit::Failed,
        })
    }
}

impl Report {
    fn new(
        is_described: bool,
        domain: &Requirement,
        fit: Assessment,
        offer: &Offer,
        confirmation: Option<(Confirmation, Option<bool>)>,
    ) -> Self {
        let (confirmation, agrees) = confirmation.unzip();
        Self {
            domain: domain.name.clone().filter(|_| !is_described),
            fit,
            agrees: agrees.flatten(),
            node: Node {
                live: confirmation.is_some(),
                arch: offer.arch.clone(),
                domain_type: offer.virt_type.clone(),
                libvirt_version: offer.libvirt_version,
                qemu_version: offer.qemu_version,
            },
            confirmation,
        }
    }
}
