//! Checks a domain against this node: computes the answer from its facts, and asks libvirt.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;

use super::CheckReport;
use super::source::{CheckedDomain, DomainSource};
use super::trial;
use crate::capability::{CpuDefinition, DomainCapabilities, NodeFacts};
use crate::cli::{Exit, Failure, conclude, probe, runtime};
use crate::compat::{
    Confirmation, CpuComparison, DefinitionCopy, DryRun, Offer, Requirement, assess, confirm,
    dry_run_copy, headroom,
};
use crate::config::Config;
use crate::executor::observe_once;
use crate::host::available_memory;
use crate::hotplug::Host;
use crate::hypervisor::{
    CallError, DomainCapabilitiesQuery, DomainRef, Libvirt, NodeSource, RunningDomain,
};

/// Returns the report, or the exit code if libvirt cannot be reached.
pub(super) fn check(
    source: &DomainSource,
    is_trial_requested: bool,
    config: &Config,
) -> anyhow::Result<Result<CheckReport, Exit>> {
    runtime()?.block_on(async {
        let (reading, libvirt) = probe(config).await?;
        // Facts that could not be read are unknown below. Without libvirt there is no answer.
        if conclude(&reading, config) == Exit::Unreachable {
            return Ok(Err(Exit::Unreachable));
        }
        let mut facts = reading.facts;
        let best = |arch: &str| facts.best_domain_type(arch).map(str::to_owned);
        let (domain, id) = match source.without_libvirt(facts.native_arch(), best)? {
            Some(domain) => (domain, None),
            None => {
                let id = find_running(source.running().unwrap_or_default(), &libvirt).await?;
                (read(&id, &libvirt).await?, Some(id))
            }
        };
        let offer = offer(&domain.requirement, &mut facts, &libvirt).await;
        let computed = assess(&domain.requirement, &offer);
        let emulator = offer.emulator.as_deref();
        let asked = dry_run_copy(&domain.xml, emulator).context("the definition is not valid")?;
        let dry_run = dry_run(&asked, &libvirt).await;
        let cpu = compare_cpu(&domain.requirement, &offer, &libvirt).await;
        let (trial, tried) = if is_trial_requested {
            let (trial, copy) = trial::start(&domain, &dry_run, emulator, &libvirt).await?;
            (Some(trial), Some(copy))
        } else {
            (None, None)
        };
        let confirmation = Confirmation {
            dry_run,
            cpu,
            trial,
        };
        let agrees = confirmation.agrees_with(&computed);
        let mut fit = confirm(computed, &confirmation, &asked, tried.as_ref());
        if let Some(id) = id
            && let Ok(seen) = observe_once(Arc::clone(&libvirt), id).await
        {
            fit.headroom = headroom(&domain.requirement, &offer, &seen, &host());
        }
        Ok(Ok(CheckReport::new(
            domain.is_described,
            &domain.requirement,
            fit,
            &offer,
            Some((confirmation, agrees)),
        )))
    })
}

/// Returns the live definition of a running domain.
pub(in crate::cli) async fn running(
    name: &str,
    libvirt: &Libvirt,
) -> anyhow::Result<CheckedDomain> {
    let id = find_running(name, libvirt).await?;
    read(&id, libvirt).await
}

/// Returns what hotplug asks the host for. vCPUs that were unplugged earlier are unknown to a command.
pub(super) fn host() -> Host {
    Host {
        available: available_memory(Path::new("/")),
        released_vcpus: 0,
    }
}

/// Finds a running domain by name or UUID.
pub(super) async fn find_running(name: &str, libvirt: &Libvirt) -> anyhow::Result<DomainRef> {
    let domains = libvirt.running_domains().await.map_err(no_answer)?.domains;
    let is_named = |domain: &&RunningDomain| domain.id.name == name || domain.id.uuid == name;
    let Some(domain) = domains.iter().find(is_named) else {
        let mut names: Vec<&str> = domains
            .iter()
            .map(|domain| domain.id.name.as_str())
            .collect();
        names.sort_unstable();
        let running = if names.is_empty() {
            "no domain is running".to_owned()
        } else {
            format!("running: {}", names.join(", ").escape_debug())
        };
        return Err(Failure::new(
            Exit::Failed,
            format!(
                "domain '{}' is not running here ({running}); for one that is shut off, give \
                 --domain-xml the output of `virsh dumpxml`",
                name.escape_debug()
            ),
        )
        .into());
    };
    Ok(domain.id.clone())
}

pub(super) async fn read(id: &DomainRef, libvirt: &Libvirt) -> anyhow::Result<CheckedDomain> {
    let xml = libvirt.live_xml(id).await.map_err(no_answer)?;
    CheckedDomain::parse(&format!("domain {}", id.uuid), xml)
}

fn no_answer(error: CallError) -> Failure {
    let exit = match error {
        CallError::Unavailable(_) | CallError::Overdue { .. } => Exit::Unreachable,
        _ => Exit::Failed,
    };
    Failure::new(exit, error)
}

/// Returns what the node offers to such a domain. The probe covers only the default machine type of
/// the native architecture; for others, libvirt is asked here.
pub(super) async fn offer(domain: &Requirement, facts: &mut NodeFacts, libvirt: &Libvirt) -> Offer {
    let plain = Offer::for_domain(facts, domain);
    if plain.cpu.is_some() && plain.cpu_features.is_some() && plain.describes(domain) {
        return plain;
    }
    let query = query(domain, &plain);
    let Ok(text) = libvirt.domain_capabilities(query.clone()).await else {
        return plain; // The rules report the missing emulator or machine type.
    };
    let name = "libvirt's domain capabilities";
    let Ok(document) = DomainCapabilities::parse(name, text.as_bytes()) else {
        return plain;
    };
    let host_model = document.cpu.host_model.as_ref();
    let cpu = host_model.and_then(|host_model| host_model.to_cpu_xml());
    facts.domain_capabilities.push(document);
    let mut offer = Offer::for_domain(facts, domain);
    if let Some(cpu) = cpu
        && let Ok(text) = libvirt.baseline_cpu(query, cpu).await
        && let Ok(baseline) = CpuDefinition::parse("libvirt's CPU baseline", text.as_bytes())
    {
        offer.set_features(&baseline);
    }
    offer
}

fn query(domain: &Requirement, offer: &Offer) -> DomainCapabilitiesQuery {
    DomainCapabilitiesQuery {
        arch: domain.arch.clone().or_else(|| offer.arch.clone()),
        machine: domain.machine.clone(),
        virt_type: domain.virt_type.clone(),
        expand_features: true,
        supported_features: false,
    }
}

async fn dry_run(asked: &DefinitionCopy, libvirt: &Libvirt) -> DryRun {
    match libvirt.native_arguments(asked.xml.clone()).await {
        Ok(_) => DryRun::Accepted,
        Err(CallError::Failed { text, .. }) => DryRun::Refused { words: text },
        Err(error) => DryRun::Failed {
            reason: error.to_string(),
        },
    }
}

async fn compare_cpu(
    domain: &Requirement,
    offer: &Offer,
    libvirt: &Libvirt,
) -> Option<CpuComparison> {
    let xml = domain.cpu.to_xml()?;
    let answer = libvirt.compare_cpu(query(domain, offer), xml).await;
    Some(answer.unwrap_or_else(|error| CpuComparison::Failed {
        reason: error.to_string(),
    }))
}
