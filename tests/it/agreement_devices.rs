//! Compares `virtnode check` with a real libvirt for domains with devices and firmware: what libvirt
//! does is the verdict, and the rules, as used offline, do not contradict it.

use std::collections::BTreeMap;

use virtnode::capability::DomainCapabilities;
use virtnode::compat::{
    Assessment, Confirmation, DryRun, Feasibility, Offer, Requirement, RuleFinding, RuleSeverity,
    Stage, assess, confirm,
};
use virtnode::hypervisor::{DomainCapabilitiesQuery, NodeSource as _};

use crate::agreement::{LibvirtNode, copy};
use crate::support::device_domains::{self, DeviceDomain};

/// Minimum number of domains that are compared.
const AT_LEAST: usize = 60;

impl LibvirtNode {
    /// Returns the offline answer, with the documents of the domain's own machine type.
    async fn compute_with_own_documents(&self, domain: &DeviceDomain) -> Assessment {
        let query = DomainCapabilitiesQuery {
            arch: Some(domain.arch.to_owned()),
            machine: Some(domain.machine.to_owned()),
            virt_type: Some("qemu".to_owned()),
            expand_features: true,
            supported_features: false,
        };
        let text = self.libvirt.domain_capabilities(query).await.unwrap();
        let document = DomainCapabilities::parse("its own", text.as_bytes()).unwrap();
        let mut facts = self.facts.clone();
        facts.domain_capabilities = vec![document];
        let requirement = Requirement::parse("device", domain.xml.as_bytes()).unwrap();
        let offer = Offer::for_domain(&facts, &requirement);
        assess(&requirement, &offer)
    }

    fn has_emulator(&self, arch: &str) -> bool {
        let capabilities = self.facts.capabilities.as_ref().unwrap();
        capabilities.guests.iter().any(|guest| guest.arch == arch)
    }
}

/// True for findings that a dry run confirms or disproves.
fn is_in_dry_run(finding: &&RuleFinding) -> bool {
    !matches!(finding.stage, Some(Stage::Launch | Stage::Emulator))
}

#[tokio::test]
async fn libvirt_confirms_the_result_for_every_device() {
    let node = LibvirtNode::start().await;
    let domains = device_domains::all(|arch| node.has_emulator(arch));
    assert!(domains.len() >= AT_LEAST, "{}", domains.len());
    let mut contradictions = Vec::new();
    let mut tally: BTreeMap<&str, usize> = BTreeMap::new();
    for domain in &domains {
        let computed = node.compute_with_own_documents(domain).await;
        let dry_run = node.dry_run(&domain.xml).await;
        let has = |severity| {
            let mut findings = computed.findings.iter().filter(is_in_dry_run);
            findings.any(|finding| finding.severity == severity)
        };
        let (blocks, unknown) = (has(RuleSeverity::Blocks), has(RuleSeverity::Unknown));
        let not_checked = &computed.not_checked;
        let is_named = not_checked
            .iter()
            .any(|entry| entry.what.contains(domain.kind) || entry.what.contains("other devices"));
        let kind = match (&dry_run, blocks) {
            (DryRun::Accepted, false) => "accepted, as computed",
            (DryRun::Refused { .. }, true) => "refused, as computed",
            (DryRun::Refused { .. }, false) if unknown => "refused, unknown offline",
            (DryRun::Refused { .. }, false) if is_named => "refused, not checked offline",
            _ => "contradiction",
        };
        *tally.entry(kind).or_default() += 1;
        if kind == "contradiction" {
            contradictions.push(format!(
                "{}: {dry_run:?}\n  {:?}\n  {not_checked:?}",
                domain.name, computed.findings
            ));
        }
        // libvirt's answer is the verdict.
        let confirmation = Confirmation {
            dry_run: dry_run.clone(),
            cpu: None,
            trial: None,
        };
        let verdict = confirm(computed, &confirmation, &copy(&domain.xml), None);
        match dry_run {
            DryRun::Accepted => assert!(
                !verdict
                    .findings
                    .iter()
                    .filter(is_in_dry_run)
                    .any(|finding| {
                        matches!(
                            finding.severity,
                            RuleSeverity::Blocks | RuleSeverity::Unknown
                        )
                    }),
                "{}: {verdict:#?}",
                domain.name
            ),
            _ => assert_eq!(
                verdict.answer,
                Feasibility::Infeasible,
                "{}: {verdict:#?}",
                domain.name
            ),
        }
        assert!(!verdict.not_checked.is_empty(), "{}", domain.name);
    }
    println!("{} domains with devices: {tally:?}", domains.len());
    assert!(
        contradictions.is_empty(),
        "{} contradictions:\n{}",
        contradictions.len(),
        contradictions.join("\n")
    );
    assert!(tally.len() >= 2, "{tally:?}");
}
