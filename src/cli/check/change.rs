//! `virtnode check --domain NAME --vcpus N`, `--memory SIZE`: checks if hotplug can give a running
//! domain that total now.
//!
//! The domain is observed once, and hotplug's own preflight answers. Nothing is changed, and neither
//! libvirt nor QEMU has a dry run of hotplug, so "Not checked" names what only the operation shows.

use std::sync::Arc;

use serde::Serialize;

use super::source::DomainSource;
use super::{live, show};
use crate::cli::output::{OutputOption, wrap};
use crate::cli::{Exit, Failure, conclude, probe, runtime};
use crate::compat::{Feasibility, Headroom, NotChecked, headroom};
use crate::config::Config;
use crate::domain::plain;
use crate::executor::observe_once;
use crate::hotplug::{
    Amount, Contact, Host, HotplugRequest, Observation, Preflight, Rejection, Scope, preflight,
};

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ChangeReport {
    domain: String,
    /// The worst of all changes.
    answer: Feasibility,
    changes: Vec<CheckedChange>,
    not_checked: Vec<NotChecked>,
    headroom: Option<Headroom>,
}

/// The answer to one requested total.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CheckedChange {
    answer: Feasibility,
    /// `None` if the domain could not be observed.
    before: Option<Amount>,
    requested: Amount,
    /// The limit's fixed word, if a limit rules the total out.
    code: Option<&'static str>,
    /// The obstacle, with its remedy.
    message: Option<String>,
}

/// Prints the answer and returns the exit code.
pub(super) fn check(
    source: &DomainSource,
    is_trial_requested: bool,
    output: &OutputOption,
    config: &Config,
) -> anyhow::Result<Exit> {
    if is_trial_requested {
        return Err(Failure::new(
            Exit::Usage,
            "--try starts a copy of a domain and cannot try hotplug: omit --vcpus and --memory",
        )
        .into());
    }
    let requests = source.changes();
    let report = runtime()?.block_on(async {
        let (reading, libvirt) = probe(config).await?;
        if conclude(&reading, config) == Exit::Unreachable {
            return Ok(Err(Exit::Unreachable));
        }
        let mut facts = reading.facts;
        let id = live::find_running(source.running().unwrap_or_default(), &libvirt).await?;
        let seen = match observe_once(Arc::clone(&libvirt), id.clone()).await {
            Ok(seen) => seen,
            Err(Contact::Held) => return Ok(Ok(held(id.name, &requests))),
            Err(Contact::Absent) => {
                let name = id.name.escape_debug().to_string();
                let message = format!("domain '{name}' ended meanwhile");
                return Err(Failure::new(Exit::Failed, message).into());
            }
            Err(Contact::Unreachable(why)) => {
                let message = format!("libvirt gives no answer: {why}");
                return Err(Failure::new(Exit::Unreachable, message).into());
            }
        };
        let host = live::host();
        let room = match live::read(&id, &libvirt).await {
            Ok(domain) => {
                let offer = live::offer(&domain.requirement, &mut facts, &libvirt).await;
                headroom(&domain.requirement, &offer, &seen, &host)
            }
            // The observation suffices for the answer.
            Err(_) => None,
        };
        anyhow::Ok(Ok(ChangeReport::new(
            id.name, &requests, &seen, &host, room,
        )))
    })?;
    let report = match report {
        Ok(report) => report,
        Err(exit) => return Ok(exit),
    };
    output.print(&report, || describe(&report))?;
    Ok(report.answer.into())
}

/// Returns the report on a domain that a job keeps from being read.
fn held(domain: String, requests: &[HotplugRequest]) -> ChangeReport {
    let changes = requests.iter().map(|request| CheckedChange {
        answer: Feasibility::Unknown,
        before: None,
        requested: request.amount(),
        code: None,
        message: Some("another job holds the domain: wait for it to end".to_owned()),
    });
    ChangeReport {
        domain,
        answer: Feasibility::Unknown,
        changes: changes.collect(),
        not_checked: vec![NotChecked::new(
            "the domain's limits",
            "the domain could not be read",
        )],
        headroom: None,
    }
}

impl ChangeReport {
    fn new(
        domain: String,
        requests: &[HotplugRequest],
        seen: &Observation,
        host: &Host,
        headroom: Option<Headroom>,
    ) -> Self {
        let changes: Vec<CheckedChange> = requests
            .iter()
            .map(|request| CheckedChange::new(request, seen, host))
            .collect();
        let has = |answer| changes.iter().any(|change| change.answer == answer);
        let answer = if has(Feasibility::Infeasible) {
            Feasibility::Infeasible
        } else if has(Feasibility::Unknown) {
            Feasibility::Unknown
        } else {
            Feasibility::Feasible
        };
        Self {
            domain,
            answer,
            changes,
            not_checked: not_checked(requests, seen),
            headroom,
        }
    }
}

impl CheckedChange {
    fn new(request: &HotplugRequest, seen: &Observation, host: &Host) -> Self {
        let (answer, code, message) = match preflight(request, Scope::Live, seen, host) {
            Preflight::Ready(_) => (Feasibility::Feasible, None, None),
            Preflight::Blocked(awaited) => (
                Feasibility::Unknown,
                None,
                Some(format!("not at present: wait for {awaited}")),
            ),
            Preflight::Unexplained(rejection) => {
                (Feasibility::Unknown, None, Some(rejection.to_string()))
            }
            Preflight::Rejected(rejection) => {
                let code = match &rejection {
                    Rejection::Infeasible(limit) => Some(limit.code()),
                    Rejection::NotRunning(..) | Rejection::Migrating => None,
                };
                (Feasibility::Infeasible, code, Some(rejection.to_string()))
            }
        };
        Self {
            answer,
            before: Some(request.amount_of(seen)),
            requested: request.amount(),
            code,
            message,
        }
    }
}

/// Returns what the preflight cannot know.
fn not_checked(requests: &[HotplugRequest], seen: &Observation) -> Vec<NotChecked> {
    let mut list = vec![
        NotChecked::new(
            "the guest",
            "only the operation shows if it uses what is plugged, or releases what is unplugged",
        ),
        NotChecked::new(
            "the calls of libvirt and QEMU",
            "neither has a dry run of hotplug (cgroups, other clients, other jobs)",
        ),
    ];
    for request in requests {
        match *request {
            HotplugRequest::Vcpus { count, .. }
                if seen.domain.virt_type == "qemu" && count > seen.domain.vcpus.plugged() =>
            {
                list.push(NotChecked::new(
                    "vCPUs that were unplugged since the domain started",
                    "without KVM each counts against the maximum, and only the daemon's journal \
                     knows them",
                ));
            }
            HotplugRequest::Memory { size, .. }
                if size < seen.domain.memory.plugged() && seen.guest_total().is_none() =>
            {
                list.push(NotChecked::new(
                    "the memory that the guest uses",
                    "its balloon driver reports nothing at present; the operation asks it first",
                ));
            }
            _ => {}
        }
    }
    list
}

fn describe(report: &ChangeReport) -> String {
    let mut text = String::new();
    let domain = plain(&report.domain);
    for change in &report.changes {
        let requested = amount(&change.requested);
        let headline = match change.answer {
            Feasibility::Feasible => {
                format!("Feasible: hotplug can give domain {domain} {requested} now")
            }
            Feasibility::Infeasible => {
                format!("Not feasible: hotplug cannot give domain {domain} {requested} now")
            }
            Feasibility::Unknown => format!(
                "Unknown: no limit of domain {domain} is known that rules out {requested}, but \
                 hotplug cannot begin at present"
            ),
        };
        let before = change.before.as_ref().map(amount);
        let before = before.map_or(String::new(), |before| format!(" (it has {before})"));
        show::line(&mut text, &format!("{headline}{before}"));
        if let Some(message) = &change.message {
            wrap(&mut text, "  * ", "    ", &plain(message));
        }
    }
    if let Some(room) = &report.headroom {
        show::show_headroom(&mut text, room);
    }
    show::show_not_checked(&mut text, &report.not_checked);
    text
}

fn amount(amount: &Amount) -> String {
    match amount {
        Amount::Vcpus { vcpus: 1, .. } => "1 vCPU".to_owned(),
        Amount::Vcpus { vcpus, .. } => format!("{vcpus} vCPUs"),
        Amount::Memory { memory, .. } => format!("{memory} of memory"),
    }
}
