//! Compares the result of `virtnode check` with a real libvirt and a real QEMU, for hundreds of
//! generated domains without exception.

#![expect(clippy::print_stdout, reason = "a summary of the generated domains")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use virtnode::capability::{NodeFacts, Version};
use virtnode::compat::{
    Assessment, Confirmation, DefinitionCopy, DryRun, Feasibility, Offer, Requirement, RuleCode,
    RuleFinding, RuleSeverity, Stage, assess, confirm, dry_run_copy,
};
use virtnode::daemon::Metrics;
use virtnode::hypervisor::{CallError, Libvirt, LibvirtConfig, NodeSource};
use virtnode::probe::Prober;

use crate::support::domains::generate;
use crate::support::libvirtd::Libvirtd;

/// Number of domains compared with libvirt's dry run.
const GENERATED: u64 = 800;
/// Maximum number of domains to start per group.
const STARTED: usize = 14;
/// Maximum number of vCPUs of a started domain: with software emulation each costs memory and time.
const MAX_STARTED_VCPUS: u64 = 64;
/// First libvirt whose messages the expected ones are compared with.
const EXACT_MESSAGES_SINCE: Version = Version::new(11, 0, 0);

/// Up to 10.5, libvirt checks a named CPU model against its own list of features. The capabilities
/// report a model as usable by QEMU's list, which may differ (libvirt issue 608). No query reveals
/// that.
const USES_QEMU_LIST_SINCE: Version = Version::new(10, 6, 0);
const LIBVIRT_LIST_MESSAGE: &str = "the CPU is incompatible with host CPU: ";

/// A libvirt and the facts of its node.
pub(crate) struct LibvirtNode {
    libvirtd: Libvirtd,
    pub(crate) libvirt: Arc<Libvirt>,
    pub(crate) facts: NodeFacts,
}

impl LibvirtNode {
    pub(crate) async fn start() -> Self {
        let libvirtd = Libvirtd::start().unwrap();
        let metrics = Metrics::new();
        let config = LibvirtConfig::new(libvirtd.uri());
        let libvirt = Arc::new(Libvirt::start(config, metrics.hypervisor));
        let mut prober = Prober::new(
            Arc::clone(&libvirt),
            metrics.labeller.probe.clone(),
            Path::new("/").to_owned(),
        );
        let reading = prober.read().await;
        assert!(reading.failures.is_empty(), "{:?}", reading.failures);
        Self {
            libvirtd,
            libvirt,
            facts: reading.facts,
        }
    }

    fn compute(&self, xml: &str) -> Assessment {
        let domain = Requirement::parse("generated", xml.as_bytes()).unwrap();
        let arch = domain.arch.as_deref();
        let offer = Offer::from_facts(&self.facts, arch, domain.virt_type.as_deref());
        assess(&domain, &offer)
    }

    pub(crate) async fn dry_run(&self, xml: &str) -> DryRun {
        match self.libvirt.native_arguments(copy(xml).xml).await {
            Ok(_) => DryRun::Accepted,
            Err(CallError::Failed { text, .. }) => DryRun::Refused { words: text },
            Err(error) => panic!("{error}: {xml}"),
        }
    }
}

pub(crate) fn copy(xml: &str) -> DefinitionCopy {
    dry_run_copy(xml, None).unwrap()
}

/// True if libvirt, not QEMU, reports this problem.
fn is_reported_by_libvirt(finding: &&RuleFinding) -> bool {
    matches!(finding.stage, Some(Stage::Define | Stage::Start))
}

/// True if the message contains the expected one. For missing CPU features it is enough that one
/// matches: libvirt lists those of its own model definition, the capabilities those of QEMU's.
fn is_expected(words: Option<&str>, message: &str) -> bool {
    let Some(words) = words else { return true };
    match words.rsplit_once(": ") {
        Some((what, list)) if what.ends_with("features") => {
            message.contains(what)
                && list
                    .split([',', ' '])
                    .any(|feature| !feature.is_empty() && message.contains(feature))
        }
        _ => message.contains(words),
    }
}

#[tokio::test]
async fn libvirt_confirms_the_result_for_every_generated_domain() {
    let node = LibvirtNode::start().await;
    let exact = node.facts.libvirt_version >= Some(EXACT_MESSAGES_SINCE);
    let uses_qemu_list = node.facts.libvirt_version >= Some(USES_QEMU_LIST_SINCE);
    let mut wrong = Vec::new();
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    let mut to_start: BTreeMap<String, Vec<(String, Assessment)>> = BTreeMap::new();
    for seed in 0..GENERATED {
        let xml = generate(seed);
        let fit = node.compute(&xml);
        let dry_run = node.dry_run(&xml).await;
        let blocking: Vec<&RuleFinding> = fit.blocking().filter(is_reported_by_libvirt).collect();
        let unknown =
            |f: &&RuleFinding| f.severity == RuleSeverity::Unknown && is_reported_by_libvirt(f);
        let open: Vec<&RuleFinding> = fit.findings.iter().filter(unknown).collect();
        // Without a dry run, only names that libvirt's own lists decide on may be unknown.
        assert!(
            open.iter()
                .all(|f| matches!(f.code, RuleCode::CpuModel | RuleCode::CpuFeature)),
            "{open:?}: {xml}"
        );
        let complaint = match &dry_run {
            DryRun::Accepted if !blocking.is_empty() => Some("accepts"),
            DryRun::Refused { words }
                if !uses_qemu_list && words.starts_with(LIBVIRT_LIST_MESSAGE) =>
            {
                None
            }
            DryRun::Refused { .. } if blocking.is_empty() && open.is_empty() => Some("refuses"),
            DryRun::Refused { words } if exact => {
                let mut expected = blocking.iter().chain(&open);
                let says = expected.any(|f| is_expected(f.words.as_deref(), words));
                (!says).then_some("says something else")
            }
            _ => None,
        };
        if let Some(complaint) = complaint {
            wrong.push(format!(
                "{seed}: libvirt {complaint}\n  {xml}\n  computed: {blocking:?}\n  {dry_run:?}"
            ));
        }
        // After the dry run, nothing that libvirt decides may be unknown.
        let kind = match (&dry_run, blocking.is_empty()) {
            (DryRun::Accepted, _) => "accepted",
            (_, false) => "refused, as computed",
            (_, true) => "refused, unknown before",
        };
        *answers.entry(kind.to_owned()).or_default() += 1;
        let confirmed = confirm(
            fit,
            &Confirmation {
                dry_run: dry_run.clone(),
                cpu: None,
                trial: None,
            },
            &copy(&xml),
            None,
        );
        let open = confirmed.findings.iter().any(|f| unknown(&f));
        let unanswered = match dry_run {
            DryRun::Accepted => open,
            _ => confirmed.answer != Feasibility::Infeasible,
        };
        if unanswered {
            wrong.push(format!(
                "{seed}: unknown after the dry run\n  {xml}\n  {confirmed:?}"
            ));
        }
        if dry_run == DryRun::Accepted {
            let first = confirmed.findings.first();
            let group = match confirmed.answer {
                Feasibility::Feasible => "feasible".to_owned(),
                _ => format!("{:?}", first.map(|finding| finding.code)),
            };
            to_start.entry(group).or_default().push((xml, confirmed));
        }
    }
    println!("{GENERATED} generated domains: {answers:?}");
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    // Both results must be frequent for a meaningful comparison. An older libvirt accepts fewer.
    let count = |kind| answers.get(kind).copied().unwrap_or_default();
    let accepted = if exact { 50 } else { 25 };
    assert!(
        count("accepted") >= accepted && count("refused, as computed") >= 200,
        "{answers:?}"
    );
    start_some(&node, to_start);
}

/// Starts some of the accepted domains, because QEMU reports its problems only then.
fn start_some(node: &LibvirtNode, groups: BTreeMap<String, Vec<(String, Assessment)>>) {
    let mut tally: BTreeMap<String, usize> = BTreeMap::new();
    for (group, mut domains) in groups {
        let current = |xml: &str| {
            let domain = Requirement::parse("x", xml.as_bytes()).unwrap();
            domain.vcpus.current
        };
        domains.retain(|(xml, _)| current(xml) <= MAX_STARTED_VCPUS);
        domains.sort_by_key(|(xml, _)| current(xml));
        for (xml, fit) in domains.into_iter().take(STARTED) {
            let message = node.libvirtd.start_and_end(&copy(&xml).xml);
            let expected = |message: &str| {
                fit.findings.iter().any(|finding| {
                    finding.stage == Some(Stage::Emulator)
                        && is_expected(finding.words.as_deref(), message)
                })
            };
            match (fit.answer, &message) {
                (Feasibility::Feasible, Ok(())) => {}
                (Feasibility::Infeasible, Err(message)) if expected(message) => {}
                // With check='full' the outcome is open, which the result says.
                (Feasibility::Unknown, _) => {}
                _ => panic!("{fit:#?}\nQEMU: {message:?}\n{xml}"),
            }
            *tally.entry(group.clone()).or_default() += 1;
        }
    }
    println!("started: {tally:?}");
    assert!(
        tally.get("feasible").is_some_and(|count| *count == STARTED),
        "{tally:?}"
    );
    let exact = node.facts.libvirt_version >= Some(EXACT_MESSAGES_SINCE);
    let min_groups = if exact { 4 } else { 2 };
    assert!(tally.len() >= min_groups, "{tally:?}");
}
