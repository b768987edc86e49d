//! `virtnode check`.

mod change;
mod live;
mod show;
mod source;
mod trial;

use std::path::Path;

use clap::Args;
use serde::Serialize;

pub(super) use self::live::running;
pub(super) use self::source::CheckedDomain;
use self::source::DomainSource;
use super::offline::OfflineDocuments;
use super::output::OutputOption;
use super::{Exit, Failure};
use crate::capability::Version;
use crate::compat::{Assessment, Confirmation, Feasibility, Offer, Requirement, assess};
use crate::config::Config;

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct CheckCommand {
    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    source: DomainSource,

    /// Also start a copy of the domain, paused, without disks, networks, host devices and firmware,
    /// and destroy it at once: the answer of cgroups, KVM, huge pages and QEMU itself
    #[arg(long = "try")]
    is_trial_requested: bool,

    #[command(flatten)]
    offline: OfflineDocuments,
}

const EXIT_CODES: &str = "Exit codes: 0 feasible, 4 not feasible, 6 not known, 1 failed, 2 \
                          invalid command line, 5 libvirt unreachable. \
                          \"Not checked\" lists what an answer does not cover.";

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CheckReport {
    /// `None` for a domain described on the command line.
    domain: Option<String>,
    #[serde(flatten)]
    fit: Assessment,
    /// The hypervisor's own answer. `None` offline.
    confirmation: Option<Confirmation>,
    /// True if the hypervisor's answer is the computed one. `None` without its answer.
    agrees: Option<bool>,
    node: CheckedNode,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CheckedNode {
    live: bool,
    arch: Option<String>,
    domain_type: Option<String>,
    libvirt_version: Option<Version>,
    qemu_version: Option<Version>,
}

impl CheckCommand {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        self.source.validate()?;
        let document = self.source.document();
        let document = document.map(|path: &Path| ("--domain-xml", path));
        let report = match self.offline.read(document)? {
            Some(_) if self.is_trial_requested => {
                return Err(Failure::new(
                    Exit::Usage,
                    "--try needs this node's libvirt, which the offline options exclude",
                )
                .into());
            }
            Some(facts) => {
                let best = |arch: &str| facts.best_domain_type(arch).map(str::to_owned);
                let Some(domain) = self.source.without_libvirt(facts.native_arch(), best)? else {
                    return Err(Failure::new(
                        Exit::Usage,
                        "--domain needs this node's libvirt, which the offline options exclude: \
                         give the domain's XML with --domain-xml (virsh dumpxml prints it)",
                    )
                    .into());
                };
                let offer = Offer::for_domain(&facts, &domain.requirement);
                let fit = assess(&domain.requirement, &offer);
                CheckReport::new(domain.is_described, &domain.requirement, fit, &offer, None)
            }
            None if !self.source.changes().is_empty() => {
                return change::check(&self.source, self.is_trial_requested, &self.output, config);
            }
            None => match live::check(&self.source, self.is_trial_requested, config)? {
                Ok(report) => report,
                Err(exit) => return Ok(exit),
            },
        };
        self.output.print(&report, || show::report(&report))?;
        Ok(report.fit.answer.into())
    }
}

impl From<Feasibility> for Exit {
    fn from(answer: Feasibility) -> Self {
        match answer {
            Feasibility::Feasible => Self::Done,
            Feasibility::Infeasible => Self::Infeasible,
            Feasibility::Unknown => Self::Unknown,
        }
    }
}

impl CheckReport {
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
            node: CheckedNode {
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
