//! `virtnode capabilities`.

use clap::Args;

use super::offline::OfflineDocuments;
use super::output::{OutputOption, table};
use super::{Exit, conclude, probe_labels, runtime};
use crate::capability::{CanonicalMachine, NodeFacts, Usable};
use crate::config::Config;

#[derive(Debug, Args)]
pub(super) struct CapabilitiesCommand {
    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    offline: OfflineDocuments,
}

impl CapabilitiesCommand {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        let (facts, exit) = match self.offline.read([])? {
            Some(facts) => (facts, Exit::Done),
            None => {
                let reading = runtime()?.block_on(probe_labels(config));
                let exit = conclude(&reading, config);
                (reading.facts, exit)
            }
        };
        if exit == Exit::Unreachable {
            return Ok(exit);
        }
        self.output.print(&facts, || show(&facts))?;
        Ok(exit)
    }
}

fn show(facts: &NodeFacts) -> String {
    let mut text = table(&["FACT", "VALUE"], overview(facts));
    let Some(arch) = facts.native_arch() else {
        return text;
    };
    let machines = facts.machines(arch);
    let canonical = facts.canonical_machines(arch, &machines);
    text.push('\n');
    text.push_str(&table(
        &["MACHINE", "ALIASES", "MAX VCPUS", "MAX HERE", "DEPRECATED"],
        canonical.iter().map(|machine| {
            let same = machines
                .iter()
                .filter(|m| m.canonical_name() == machine.name);
            let listed = same.clone().map(|m| m.max_vcpus.to_string()).next();
            let aliases: Vec<&str> = same
                .filter(|m| m.canonical.is_some())
                .map(|m| m.name.as_str())
                .collect();
            vec![
                machine.name.to_owned(),
                or_dash(aliases.join(",")),
                listed.unwrap_or_else(|| "unknown".to_owned()),
                machine.effective_max.to_string(),
                yes_or_dash(machine.deprecated),
            ]
        }),
    ));
    if let Some(document) = facts
        .primary_document()
        .filter(|d| !d.cpu.models.is_empty())
    {
        text.push('\n');
        text.push_str(&table(
            &[
                "CPU MODEL",
                "USABLE",
                "DEPRECATED",
                "ALIAS OF",
                "BLOCKED BY",
            ],
            document.cpu.models.iter().map(|model| {
                vec![
                    model.name.clone(),
                    model.usable.map_or("-", Usable::as_str).to_owned(),
                    yes_or_dash(model.deprecated),
                    or_dash(model.canonical.clone().unwrap_or_default()),
                    or_dash(model.blockers.join(",")),
                ]
            }),
        ));
    }
    text
}

fn overview(facts: &NodeFacts) -> Vec<Vec<String>> {
    let cpu = facts
        .capabilities
        .as_ref()
        .and_then(|c| c.host.cpu.as_ref());
    let document = facts.primary_document();
    let host_model = document.and_then(|d| d.cpu.host_model.as_ref());
    let arch = facts.native_arch();
    let max = arch.map(|arch| {
        let machines = facts.machines(arch);
        CanonicalMachine::largest_max(&facts.canonical_machines(arch, &machines)).to_string()
    });
    let text = |text: Option<&str>| text.map(str::to_owned);
    let rows: [(&str, Option<String>); 15] = [
        ("architecture", text(arch)),
        ("accelerator", text(facts.accelerator().map(|a| a.as_str()))),
        ("libvirt", facts.libvirt_version.map(|v| v.to_string())),
        ("qemu", facts.hypervisor_version.map(|v| v.to_string())),
        ("host CPU", text(cpu.and_then(|cpu| cpu.model.as_deref()))),
        (
            "host CPU vendor",
            text(cpu.and_then(|cpu| cpu.vendor.as_deref())),
        ),
        (
            "TSC",
            cpu.and_then(|cpu| cpu.tsc).map(|tsc| {
                let scaling = if tsc.scaling == Some(true) {
                    "scalable"
                } else {
                    "not scalable"
                };
                format!("{} Hz, {scaling}", tsc.frequency_hz)
            }),
        ),
        (
            "host-model CPU",
            text(host_model.and_then(|h| h.model.as_deref())),
        ),
        (
            "CPU features available to guests",
            Some(facts.cpu_features().len().to_string()),
        ),
        (
            "maximum vCPUs (KVM)",
            facts.kvm_max_vcpus.map(|max| max.to_string()),
        ),
        ("maximum vCPUs of a domain", max),
        (
            "more than 255 vCPUs on x86 (EIM)",
            text(facts.eim().map(|eim| eim.as_str())),
        ),
        (
            "IOMMU",
            facts
                .host
                .as_ref()
                .map(|h| format!("{}, {} groups", h.iommu, h.iommu_groups)),
        ),
        (
            "VFIO",
            facts.host.as_ref().map(|host| yes_or_dash(host.vfio)),
        ),
        (
            "nested virtualization",
            facts.host.as_ref().map(|host| yes_or_dash(host.nested)),
        ),
    ];
    rows.into_iter()
        .map(|(fact, value)| {
            vec![
                fact.to_owned(),
                value.unwrap_or_else(|| "unknown".to_owned()),
            ]
        })
        .collect()
}

fn yes_or_dash(yes: bool) -> String {
    if yes { "yes" } else { "-" }.to_owned()
}

fn or_dash(text: String) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}
