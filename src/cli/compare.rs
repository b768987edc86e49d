//! `virtnode compare`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::baseline::by_origin;
use super::check::{CheckedDomain, running};
use super::input::ensure_one_stdin;
use super::nodes::{NodesOption, WithoutObject, few};
use super::output::{OutputOption, wrap};
use super::{Exit, Failure, no_libvirt, runtime};
use crate::compat::{
    CpuDifference, CpuDirection, CpuExclusion, CpuRelation, ExcludedNode, Feasibility,
    NodeAssessment, Requirement, RuleSeverity, find_targets,
};
use crate::config::Config;
use crate::daemon::{Metrics, one_shot_libvirt_config};
use crate::domain::plain;
use crate::hypervisor::Libvirt;
use crate::targets::{ChosenNodes, candidates, cpu_candidates};

#[derive(Debug, Args)]
pub(super) struct CompareCommand {
    /// Two nodes; with a domain one or more
    #[arg(value_name = "NODE", required = true)]
    names: Vec<String>,

    /// Domain whose needs are compared with each node, as `virsh dumpxml` prints it; - reads standard
    /// input
    #[arg(long, value_name = "FILE", help_heading = "Domain")]
    domain_xml: Option<PathBuf>,

    /// Running domain of this node instead, by name or UUID
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "domain_xml",
        help_heading = "Domain"
    )]
    domain: Option<String>,

    #[command(flatten)]
    nodes: NodesOption,

    #[command(flatten)]
    output: OutputOption,
}

/// The comparison of two nodes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CompareReport<'r> {
    nodes: &'r [String],
    /// The relation of the second node's CPU to the first's.
    relation: CpuRelation,
    /// Empty if a node's CPU is not known.
    directions: Vec<CpuDirection>,
    /// The nodes whose CPU is not known.
    unknown: Vec<ExcludedNode>,
}

/// The comparison of a domain with nodes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DomainReport {
    domain: Option<String>,
    /// In the order of the command line.
    nodes: Vec<NodeAssessment>,
    unknown: Vec<ExcludedNode>,
}

impl CompareCommand {
    pub(super) fn run(mut self, config: &Config) -> anyhow::Result<Exit> {
        let has_domain = self.domain.is_some() || self.domain_xml.is_some();
        if !has_domain && self.names.len() != 2 {
            return Err(Failure::new(
                Exit::Usage,
                "name two nodes, or a node and a domain with --domain-xml FILE or --domain NAME",
            )
            .into());
        }
        ensure_one_stdin(
            [
                ("--domain-xml", self.domain_xml.as_deref()),
                ("--nodes", self.nodes.path()),
            ]
            .into_iter()
            .filter_map(|(name, path)| Some((name, path?))),
        )?;
        if has_domain {
            let mut seen = std::collections::BTreeSet::new();
            self.names.retain(|name| seen.insert(name.clone()));
            let domain = self.requirement(config)?;
            self.compare_domain(config, &domain)
        } else {
            self.compare_nodes(config)
        }
    }

    fn requirement(&self, config: &Config) -> anyhow::Result<Requirement> {
        if let Some(path) = &self.domain_xml {
            return Ok(CheckedDomain::read(path)?.requirement);
        }
        let name = self.domain.as_deref().unwrap_or_default();
        runtime()?.block_on(async {
            let metrics = Metrics::new().hypervisor;
            let options = one_shot_libvirt_config(config).map_err(no_libvirt)?;
            let libvirt = Libvirt::start(options, metrics);
            Ok(running(name, &libvirt).await?.requirement)
        })
    }

    fn compare_nodes(&self, config: &Config) -> anyhow::Result<Exit> {
        let (inventory, now) = self.nodes.read(config, WithoutObject::Unknown)?;
        let chosen = ChosenNodes {
            names: &self.names,
            selector: None,
        };
        let found = cpu_candidates(inventory, chosen, now);
        let cpu_of = |name: &String| found.candidates.iter().find(|it| it.name == *name);
        let mut unknown: Vec<ExcludedNode> = Vec::new();
        let mut known = Vec::new();
        for candidate in self.names.iter().filter_map(cpu_of) {
            match &candidate.cpu {
                Ok(cpu) => known.push((candidate.name.as_str(), &**cpu)),
                Err(reason) => unknown.push(ExcludedNode {
                    name: candidate.name.clone(),
                    reason: *reason,
                    found: None,
                }),
            }
        }
        if let [(_, first), (name, second)] = known[..] {
            let differs = |reason, found: &str| ExcludedNode {
                name: name.to_owned(),
                reason,
                found: Some(found.to_owned()),
            };
            if first.architecture != second.architecture {
                unknown.push(differs(
                    CpuExclusion::OtherArchitecture,
                    &second.architecture,
                ));
            } else if first.accelerator != second.accelerator {
                unknown.push(differs(CpuExclusion::OtherAccelerator, &second.accelerator));
            }
        }
        unknown.dedup();
        let difference = match known[..] {
            [first, second] if unknown.is_empty() => Some(CpuDifference::new(first, second)),
            _ => None,
        };
        let report = CompareReport {
            nodes: &self.names,
            relation: difference
                .as_ref()
                .map_or(CpuRelation::Unknown, |difference| difference.relation),
            directions: difference.map_or(Vec::new(), |it| it.directions.into()),
            unknown,
        };
        self.output.print(&report, || show_nodes(&report))?;
        Ok(match report.relation {
            CpuRelation::Unknown => Exit::Unknown,
            _ => Exit::Done,
        })
    }

    fn compare_domain(&self, config: &Config, domain: &Requirement) -> anyhow::Result<Exit> {
        let (inventory, now) = self.nodes.read(config, WithoutObject::ByLabels)?;
        let mut nodes = candidates(inventory, domain, None, now);
        let missing = |name: &&String| !nodes.iter().any(|node| node.name == **name);
        let exclude = |name: &String, reason| ExcludedNode {
            name: name.clone(),
            reason,
            found: None,
        };
        let mut unknown: Vec<ExcludedNode> = self
            .names
            .iter()
            .filter(missing)
            .map(|name| exclude(name, CpuExclusion::NotFound))
            .collect();
        nodes.retain(|node| self.names.contains(&node.name));
        let placement = find_targets(domain, &nodes);
        for name in &placement.unlabeled {
            unknown.push(exclude(name, CpuExclusion::NoObject));
        }
        let mut assessed = placement.nodes;
        assessed.sort_by_key(|node| self.names.iter().position(|name| *name == node.name));
        let report = DomainReport {
            domain: domain.name.clone(),
            nodes: assessed,
            unknown,
        };
        self.output.print(&report, || show_domain(&report))?;
        let answers = || report.nodes.iter().map(|node| node.answer);
        Ok(
            if answers().any(|answer| answer == Feasibility::Infeasible) {
                Exit::Infeasible
            } else if !report.unknown.is_empty() || answers().any(|it| it == Feasibility::Unknown) {
                Exit::Unknown
            } else {
                Exit::Done
            },
        )
    }
}

fn show_nodes(report: &CompareReport<'_>) -> String {
    let name = |at: usize| report.nodes.get(at).map(|it| plain(it)).unwrap_or_default();
    let (first, second) = (name(0), name(1));
    let mut text = String::new();
    let sentence = match report.relation {
        CpuRelation::Identical => format!("{first} and {second} give the same CPU (identical)."),
        CpuRelation::Superset => {
            format!("{second} gives all of {first}'s CPU, and more (superset).")
        }
        CpuRelation::Subset => {
            format!("{second} gives only a part of {first}'s CPU, and nothing more (subset).")
        }
        CpuRelation::Incompatible => {
            format!("Each of {first} and {second} lacks something of the other (incompatible).")
        }
        CpuRelation::Unknown => format!("{first} and {second} cannot be compared (unknown)."),
    };
    wrap(&mut text, "", "", &sentence);
    for node in &report.unknown {
        let found = node
            .found
            .as_deref()
            .map_or(String::new(), |it| format!(": {}", plain(it)));
        let line = format!("{} {}{found}", plain(&node.name), node.reason.describe());
        wrap(&mut text, "  ", "    ", &line);
    }
    for direction in &report.directions {
        show_direction(&mut text, direction);
    }
    text
}

fn show_direction(text: &mut String, direction: &CpuDirection) {
    let (from, to) = (plain(&direction.from), plain(&direction.to));
    text.push_str(&format!(
        "\nA domain with the CPU of {from} on {to}: {}\n",
        direction.answer
    ));
    if let Some([own, other]) = &direction.vendors {
        let line = format!("the vendors differ: {} and {}", plain(own), plain(other));
        wrap(text, "  ", "    ", &line);
    }
    if !direction.missing.is_empty() {
        let line = format!("{to} lacks {}", by_origin(&direction.missing));
        wrap(text, "  ", "    ", &line);
    }
    if !direction.unknown.is_empty() {
        let line = format!("{to} does not report {}", few(&direction.unknown));
        wrap(text, "  ", "    ", &line);
    }
    if !direction.models.is_empty() {
        let line = format!("models that only {from} gives: {}", few(&direction.models));
        wrap(text, "  ", "    ", &line);
    }
    wrap(text, "  libvirt: ", "    ", &plain(&direction.words));
}

fn show_domain(report: &DomainReport) -> String {
    let domain = report.domain.as_deref().map(plain).unwrap_or_default();
    let mut text = String::new();
    for node in &report.nodes {
        let name = plain(&node.name);
        text.push_str(&match node.answer {
            Feasibility::Feasible => format!("{name} has all that domain {domain} needs.\n"),
            Feasibility::Infeasible => format!("{name} lacks what domain {domain} needs:\n"),
            Feasibility::Unknown => {
                format!("It is not known if {name} has all that domain {domain} needs:\n")
            }
        });
        let relevant = node
            .findings
            .iter()
            .filter(|it| it.severity < RuleSeverity::Note);
        for finding in relevant {
            wrap(&mut text, "  * ", "    ", &plain(&finding.message));
            if let Some(words) = &finding.words {
                wrap(&mut text, "    libvirt: ", "      ", &plain(words));
            }
            if let Some(remedy) = &finding.remedy {
                wrap(&mut text, "    remedy: ", "      ", &plain(remedy));
            }
        }
    }
    for node in &report.unknown {
        let line = format!(
            "{} {}: it is not known what it gives.",
            plain(&node.name),
            node.reason.describe()
        );
        wrap(&mut text, "", "  ", &line);
    }
    text
}
