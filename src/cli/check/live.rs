//! Against this node: its facts, and its libvirt's own word.

use std::path::Path;
use std::sync::Arc;

use super::Report;
use super::question::{Asked, Question};
use crate::capability::{CpuDefinition, DomainCapabilities, NodeFacts};
use crate::cli::{Exit, Failure, conclude, runtime};
use crate::compat::{
    Confirmation, CpuComparison, DryRun, Offer, Requirement, assess, confirm, dry_run_xml,
};
use crate::config::Config;
use crate::hypervisor::{
    CallError, DomainCapabilitiesQuery, Libvirt, LibvirtConfig, NodeSource, RunningDomain,
};
use crate::probe::Prober;
use crate::telemetry::Metrics;

/// The answer, or how the command ends without one.
pub(super) fn ask(question: &Question, config: &Config) -> anyhow::Result<Result<Report, Exit>> {
    let metrics = Arc::new(Metrics::new());
    runtime()?.block_on(async {
        let libvirt = LibvirtConfig {
            call_deadline: config.call_deadline,
            ..LibvirtConfig::without_events(config.connect.clone())
        };
        let libvirt = Arc::new(Libvirt::start(libvirt, Arc::clone(&metrics)));
        let mut prober = Prober::new(Arc::clone(&libvirt), metrics, Path::new("/").to_owned());
        let reading = prober.read().await;
        // What could not be read is unknown below; only without libvirt there is nothing to say.
        if conclude(&reading, config) == Exit::Unreachable {
            return Ok(Err(Exit::Unreachable));
        }
        let mut facts = reading.facts;
        let best = |arch: &str| facts.best_domain_type(arch).map(str::to_owned);
        let asked = match question.offline(facts.native_arch(), best)? {
            Some(asked) => asked,
            None => running(question.running().unwrap_or_default(), &libvirt).await?,
        };
        let offer = offer(&asked.requirement, &mut facts, &libvirt).await;
        let computed = assess(&asked.requirement, &offer);
        let confirmation = ask_hypervisor(&asked, &offer, &libvirt).await;
        let agrees = confirmation.agrees_with(&computed);
        let fit = confirm(computed, &confirmation);
        let confirmation = Some((confirmation, agrees));
        Ok(Ok(Report::new(
            asked.is_described,
            &asked.requirement,
            fit,
            &offer,
            confirmation,
        )))
    })
}

/// The live definition of a running domain.
pub(in crate::cli) async fn running(name: &str, libvirt: &Libvirt) -> anyhow::Result<Asked> {
    let domains = libvirt.running_domains().await.map_err(|error| {
        let exit = match error {
            CallError::Unavailable(_) | CallError::Overdue { .. } => Exit::Unreachable,
            _ => Exit::Failed,
        };
        Failure::new(exit, error)
    })?;
    let is_asked = |domain: &&RunningDomain| domain.name == name || domain.uuid == name;
    let Some(domain) = domains.iter().find(is_asked) else {
        let mut names: Vec<&str> = domains.iter().map(|domain| domain.name.as_str()).collect();
        names.sort_unstable();
        let running = match names.is_empty() {
            true => "none is".to_owned(),
            false => format!("running are {}", names.join(", ").escape_debug()),
        };
        return Err(Failure::new(
            Exit::Failed,
            format!(
                "no domain '{}' is running here ({running}); for one that is shut off give \
                 --domain-xml with what `virsh dumpxml` prints",
                name.escape_debug()
            ),
        )
        .into());
    };
    Asked::parse(
        &format!("domain {}", domain.uuid),
        domain.xml.clone(),
        false,
    )
}

/// What the node has for such a domain. The probe asked about the usual one only.
async fn offer(domain: &Requirement, facts: &mut NodeFacts, libvirt: &Libvirt) -> Offer {
    let plain = Offer::from_facts(facts, domain.arch.as_deref(), domain.virt_type.as_deref());
    let known = plain.cpu.is_some() && plain.cpu_features.is_some();
    if known {
        return plain;
    }
    let query = query(domain, &plain);
    let Ok(text) = libvirt.domain_capabilities(query.clone()).await else {
        return plain; // no such emulator or machine type: the rules say so
    };
    let name = "libvirt's domain capabilities";
    let Ok(document) = DomainCapabilities::parse(name, text.as_bytes()) else {
        return plain;
    };
    let host_model = document.cpu.host_model.as_ref();
    let cpu = host_model.and_then(|host_model| host_model.to_cpu_xml());
    facts.domain_capabilities.push(document);
    let mut offer = Offer::from_facts(facts, domain.arch.as_deref(), domain.virt_type.as_deref());
    if let Some(cpu) = cpu
        && let Ok(text) = libvirt.baseline_cpu(query, cpu).await
        && let Ok(baseline) = CpuDefinition::parse("libvirt's CPU baseline", text.as_bytes())
    {
        offer.take_features(&baseline);
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

async fn ask_hypervisor(asked: &Asked, offer: &Offer, libvirt: &Libvirt) -> Confirmation {
    let dry_run = match dry_run_xml(&asked.xml) {
        Some(xml) => match libvirt.native_arguments(xml).await {
            Ok(_) => DryRun::Accepted,
            Err(CallError::Failed { text, .. }) => DryRun::Refused { words: text },
            Err(error) => DryRun::Failed {
                reason: error.to_string(),
            },
        },
        None => DryRun::Failed {
            reason: "the definition is not well-formed".to_owned(),
        },
    };
    let cpu = match asked.requirement.cpu.to_xml() {
        Some(xml) => {
            let answer = libvirt
                .compare_cpu(query(&asked.requirement, offer), xml)
                .await;
            Some(answer.unwrap_or_else(|error| CpuComparison::Failed {
                reason: error.to_string(),
            }))
        }
        None => None,
    };
    Confirmation { dry_run, cpu }
}
