//! What `virtnode check` computes, held against what a real libvirt and a real QEMU say: hundreds
//! of generated domains, and none left out.

#![expect(
    clippy::print_stdout,
    reason = "how much was tried, for people to read"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use virtnode::capability::{NodeFacts, Version};
use virtnode::compat::{
    Assessment, Confirmation, DryRun, Feasibility, Offer, Requirement, RuleCode, RuleFinding,
    RuleSeverity, Stage, assess, confirm, dry_run_xml,
};
use virtnode::hypervisor::{CallError, Libvirt, LibvirtConfig, NodeSource};
use virtnode::probe::Prober;
use virtnode::telemetry::Metrics;

use crate::support::domains::generate;
use crate::support::libvirtd::Libvirtd;

/// How many are held against libvirt's dry run.
const GENERATED: u64 = 800;
/// How many of each kind are really started.
const STARTED: usize = 14;
/// No more vCPUs than this are really started: each costs software emulation megabytes and time.
const MOST_STARTED: u64 = 64;
/// Words are compared with those of the libvirts that they were taken down from.
const SPEAKS_SO: Version = Version::new(11, 0, 0);

/// Up to 10.5 libvirt holds every named CPU model against its own list of features, which may differ
/// from QEMU's, by which the capabilities call a model usable (its issue 608). Nothing that can be
/// asked beforehand shows it.
const TRUSTS_QEMU: Version = Version::new(10, 6, 0);
const OWN_LIST: &str = "the CPU is incompatible with host CPU: ";

/// A libvirt, and what a node with it has.
struct Node {
    libvirtd: Libvirtd,
    libvirt: Arc<Libvirt>,
    facts: NodeFacts,
}

impl Node {
    async fn start() -> Self {
        let libvirtd = Libvirtd::start().unwrap();
        let metrics = Arc::new(Metrics::new());
        let config = LibvirtConfig::new(libvirtd.uri());
        let libvirt = Arc::new(Libvirt::start(config, Arc::clone(&metrics)));
        let mut prober = Prober::new(Arc::clone(&libvirt), metrics, Path::new("/").to_owned());
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

    /// libvirt's own words, if it refuses.
    async fn dry_run(&self, xml: &str) -> DryRun {
        let asked = dry_run_xml(xml).unwrap();
        match self.libvirt.native_arguments(asked).await {
            Ok(_) => DryRun::Accepted,
            Err(CallError::Failed { text, .. }) => DryRun::Refused { words: text },
            Err(error) => panic!("{error}: {xml}"),
        }
    }
}

/// Whether libvirt itself is to say this.
fn is_libvirts(finding: &&RuleFinding) -> bool {
    matches!(finding.stage, Some(Stage::Define | Stage::Start))
}

/// Whether these words were foretold. Of a model's missing features libvirt names those of its
/// own definition, in its own order, and the capabilities those of QEMU's.
fn is_foretold(words: Option<&str>, said: &str) -> bool {
    let Some(words) = words else { return true };
    match words.rsplit_once(": ") {
        Some((what, list)) if what.ends_with("features") => {
            said.contains(what)
                && list
                    .split([',', ' '])
                    .any(|feature| !feature.is_empty() && said.contains(feature))
        }
        _ => said.contains(words),
    }
}

#[tokio::test]
async fn libvirt_says_what_was_computed_of_every_generated_domain() {
    let node = Node::start().await;
    let exact = node.facts.libvirt_version >= Some(SPEAKS_SO);
    let trusts_qemu = node.facts.libvirt_version >= Some(TRUSTS_QEMU);
    let mut wrong = Vec::new();
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    let mut to_start: BTreeMap<String, Vec<(String, Assessment)>> = BTreeMap::new();
    for seed in 0..GENERATED {
        let xml = generate(seed);
        let fit = node.compute(&xml);
        let dry_run = node.dry_run(&xml).await;
        let blocking: Vec<&RuleFinding> = fit.blocking().filter(is_libvirts).collect();
        let unknown = |f: &&RuleFinding| f.severity == RuleSeverity::Unknown && is_libvirts(f);
        let open: Vec<&RuleFinding> = fit.findings.iter().filter(unknown).collect();
        // What may be left open without asking: names that only libvirt's own lists decide on.
        assert!(
            open.iter()
                .all(|f| matches!(f.code, RuleCode::CpuModel | RuleCode::CpuFeature)),
            "{open:?}: {xml}"
        );
        let complaint = match &dry_run {
            DryRun::Accepted if !blocking.is_empty() => Some("accepts"),
            DryRun::Refused { words } if !trusts_qemu && words.starts_with(OWN_LIST) => None,
            DryRun::Refused { .. } if blocking.is_empty() && open.is_empty() => Some("refuses"),
            DryRun::Refused { words } if exact => {
                let mut foretold = blocking.iter().chain(&open);
                let says = foretold.any(|f| is_foretold(f.words.as_deref(), words));
                (!says).then_some("says something else")
            }
            _ => None,
        };
        if let Some(complaint) = complaint {
            wrong.push(format!(
                "{seed}: libvirt {complaint}\n  {xml}\n  computed: {blocking:?}\n  {dry_run:?}"
            ));
        }
        // With its word beside ours nothing that it decides is open.
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
            },
        );
        let open = confirmed.findings.iter().any(|f| unknown(&f));
        let unanswered = match dry_run {
            DryRun::Accepted => open,
            _ => confirmed.answer != Feasibility::Infeasible,
        };
        if unanswered {
            wrong.push(format!(
                "{seed}: open after libvirt's word\n  {xml}\n  {confirmed:?}"
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
    // Both happen often, else little was tried. An older libvirt takes fewer.
    let count = |kind| answers.get(kind).copied().unwrap_or_default();
    let accepted = if exact { 50 } else { 25 };
    assert!(
        count("accepted") >= accepted && count("refused, as computed") >= 200,
        "{answers:?}"
    );
    start_some(&node, to_start);
}

/// Starts some of those that libvirt would start: what QEMU says only a start shows.
fn start_some(node: &Node, groups: BTreeMap<String, Vec<(String, Assessment)>>) {
    let mut tally: BTreeMap<String, usize> = BTreeMap::new();
    for (group, mut domains) in groups {
        let current = |xml: &str| {
            let domain = Requirement::parse("x", xml.as_bytes()).unwrap();
            domain.vcpus.current
        };
        domains.retain(|(xml, _)| current(xml) <= MOST_STARTED);
        domains.sort_by_key(|(xml, _)| current(xml));
        for (xml, fit) in domains.into_iter().take(STARTED) {
            let said = node.libvirtd.start_and_end(&dry_run_xml(&xml).unwrap());
            let foretold = |said: &str| {
                fit.findings.iter().any(|finding| {
                    finding.stage == Some(Stage::Emulator)
                        && is_foretold(finding.words.as_deref(), said)
                })
            };
            match (fit.answer, &said) {
                (Feasibility::Feasible, Ok(())) => {}
                (Feasibility::Infeasible, Err(said)) if foretold(said) => {}
                // check='full' may go either way, and is said to.
                (Feasibility::Unknown, _) => {}
                _ => panic!("{fit:#?}\nQEMU: {said:?}\n{xml}"),
            }
            *tally.entry(group.clone()).or_default() += 1;
        }
    }
    println!("started: {tally:?}");
    assert!(
        tally.get("feasible").is_some_and(|count| *count == STARTED),
        "{tally:?}"
    );
    let kinds = match node.facts.libvirt_version >= Some(SPEAKS_SO) {
        true => 4,
        false => 2,
    };
    assert!(tally.len() >= kinds, "{tally:?}");
}
