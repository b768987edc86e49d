//! Results, their order, remedies, and the affinity.

use rstest::rstest;
use serde_json::json;

use super::*;
use crate::compat::{RuleCode, RuleSeverity};

mod properties;

/// The labels of a node with KVM in 2025.
const NODE_LABELS: [(&str, &str); 24] = [
    ("kubernetes.io/arch", "amd64"),
    ("cpu-feature.virtnode.io/sse4.2", "true"),
    ("cpu-feature.virtnode.io/x2apic", "true"),
    ("cpu-model.virtnode.io/EPYC", "true"),
    ("cpu-model.virtnode.io/Nehalem", "true"),
    ("hyperv.virtnode.io/spinlocks", "true"),
    ("hyperv.virtnode.io/vendor_id", "true"),
    ("hyperv.virtnode.io/vpindex", "true"),
    ("machine-alias.virtnode.io/pc", "pc-i440fx-10.0"),
    ("machine-alias.virtnode.io/q35", "pc-q35-10.0"),
    ("machine.virtnode.io/pc-i440fx-10.0", "255"),
    ("machine.virtnode.io/pc-q35-10.0", "1024"),
    ("machine.virtnode.io/pc-q35-7.2", "288"),
    ("virtnode.io/accelerator", "kvm"),
    ("virtnode.io/cpu-vendor", "AMD"),
    ("virtnode.io/eim", "auto"),
    ("virtnode.io/host-model", "EPYC"),
    ("virtnode.io/iommu", "amd-vi"),
    ("virtnode.io/iommu-groups", "20"),
    ("virtnode.io/libvirt-version", "11.3.0"),
    ("virtnode.io/max-vcpus", "1024"),
    ("virtnode.io/qemu-version", "10.0.2"),
    ("virtnode.io/sev", "true"),
    ("virtnode.io/vfio", "true"),
];

/// As a value, removes the label.
const GONE: &str = "(gone)";

fn labels(changes: &[(&str, &str)]) -> NodeLabels {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let mut labels: NodeLabels = NODE_LABELS.iter().chain(changes).map(owned).collect();
    labels.retain(|_, value| value != GONE);
    labels
}

fn node(name: &str, changes: &[(&str, &str)]) -> Candidate {
    Candidate {
        name: name.to_owned(),
        labels: labels(changes),
        ready: Some(true),
        ..Candidate::default()
    }
}

fn domain(machine: &str, vcpus: u32, rest: &str) -> Requirement {
    domain_of("type='kvm'", machine, vcpus, rest)
}

fn domain_of(attributes: &str, machine: &str, vcpus: u32, rest: &str) -> Requirement {
    parsed(&xml_of(attributes, machine, vcpus, rest))
}

fn parsed(xml: &str) -> Requirement {
    Requirement::parse("vm", xml.as_bytes()).unwrap()
}

fn xml_of(attributes: &str, machine: &str, vcpus: u32, rest: &str) -> String {
    let machine = match machine {
        "" => String::new(),
        named => format!(" machine='{named}'"),
    };
    format!(
        "<domain {attributes}><name>vm</name><memory unit='MiB'>512</memory><vcpu>{vcpus}</vcpu>\
         <os><type arch='x86_64'{machine}>hvm</type></os>{rest}</domain>"
    )
}

fn names(placement: &Placement) -> Vec<&str> {
    let nodes = placement.nodes.iter();
    nodes.map(|node| node.name.as_str()).collect()
}

use Feasibility::{Feasible, Infeasible, Unknown};

const HYPERV: &str = "<features><hyperv mode='custom'><relaxed state='on'/><vpindex state='on'/>\
                      <synic state='on'/><stimer state='off'/></hyperv></features>";
const PCI: &str = "<devices><hostdev mode='subsystem' type='pci'/></devices>";
const IOMMUFD: &str = "<devices><hostdev mode='subsystem' type='pci'><driver iommufd='yes'/>\
                       </hostdev></devices>";
const AVX: &str = "<cpu mode='host-model' check='partial'>\
                   <feature policy='require' name='avx512f'/></cpu>";
const INTEL: &str = "<cpu><model>EPYC</model><vendor>Intel</vendor></cpu>";
const NO_X2APIC: &str = "<cpu mode='custom' check='partial'><model>EPYC</model>\
                         <feature policy='forbid' name='x2apic'/></cpu>";

/// The deviation of a node, the finding for it, and the remedy.
#[rstest]
#[case("pc-q35-10.0", 4, "", &[], Feasible, None, "")]
#[case("q35", 1024, "", &[], Feasible, None, "")]
#[case("pc-q35-10.0", 4, "", &[("machine.virtnode.io/pc-q35-10.0", GONE), ("virtnode.io/qemu-version", "9.2.1")],
    Infeasible, Some(RuleCode::Machine), "update QEMU there to 10.0 or later; or use q35")]
#[case("pc-q35-2.1", 4, "", &[], Infeasible, Some(RuleCode::Machine),
    "give the domain a newer machine type: QEMU 10.0.2 there has removed this one; or use q35")]
#[case("nonsense", 4, "", &[], Infeasible, Some(RuleCode::Machine), "use q35, which is \
                                                                     pc-q35-10.0 here")]
#[case("pc-q35-10.0", 4, "", &[("virtnode.io/accelerator", "tcg")],
    Infeasible, Some(RuleCode::DomainType), "see that libvirt's user may open /dev/kvm")]
#[case("pc-q35-10.0", 4, "", &[("kubernetes.io/arch", "arm64")],
    Infeasible, Some(RuleCode::Architecture), "")]
#[case("pc-q35-10.0", 4, "", &[("kubernetes.io/arch", GONE)],
    Unknown, Some(RuleCode::Architecture), "")]
#[case("pc-q35-10.0", 4, "", &[("virtnode.io/accelerator", GONE)],
    Unknown, Some(RuleCode::DomainType), "")]
#[case("pc-q35-10.0", 4, "", &[("machine.virtnode.io/pc-q35-10.0", GONE), ("machine.virtnode.io/pc-q35-7.2", GONE),
    ("machine.virtnode.io/pc-i440fx-10.0", GONE)], Unknown, Some(RuleCode::Machine), "")]
#[case("pc-q35-10.0", 2000, "", &[], Infeasible, Some(RuleCode::VcpusMachine),
    "see its NodeVirtualization for the individual limits; or lower <vcpu> to 1024")]
#[case("pc-q35-10.0", 300, "", &[("machine.virtnode.io/pc-q35-10.0", "255"), ("virtnode.io/eim", "explicit"),
    ("virtnode.io/libvirt-version", "9.0.0")], Infeasible, Some(RuleCode::Eim), "update libvirt \
                                                                                 there to 10.10.0 \
                                                                                 or later; or \
                                                                                 write <iommu")]
#[case("pc-q35-10.0", 1, "", &[("machine.virtnode.io/pc-q35-10.0", "unknown")], Feasible, None, "")]
#[case("pc-q35-10.0", 1, "<cpu><model>Denverton</model></cpu>", &[],
    Infeasible, Some(RuleCode::CpuModel), "use host-model, or choose a node")]
#[case("pc-q35-10.0", 1, "<cpu mode='host-model'/>", &[("virtnode.io/host-model", GONE)],
    Infeasible, Some(RuleCode::CpuMode), "name a <model>")]
#[case("pc-q35-10.0", 1, "<cpu mode='maximum'/>", &[("virtnode.io/libvirt-version", "7.0.0")],
    Infeasible, Some(RuleCode::CpuMode), "name a <model>")]
#[case("pc-q35-10.0", 1, AVX, &[], Infeasible, Some(RuleCode::CpuFeature), "choose a node that \
                                                                            has them")]
#[case("pc-q35-10.0", 1, AVX, &[("cpu-feature.virtnode.io/avx512f", "true")], Feasible, None, "")]
#[case("pc-q35-10.0", 1, NO_X2APIC, &[], Infeasible, Some(RuleCode::CpuFeature), "use \
                                                                                  policy='disable'")]
#[case("pc-q35-10.0", 1, NO_X2APIC, &[("cpu-feature.virtnode.io/x2apic", GONE)], Feasible, None, "")]
#[case("pc-q35-10.0", 1, "<cpu mode='host-model' check='none'><feature policy='forbid' \
                          name='x2apic'/></cpu>", &[], Feasible, None, "")]
#[case("pc-q35-10.0", 1, INTEL, &[], Infeasible, Some(RuleCode::CpuVendor), "leave <vendor> out")]
#[case("pc-q35-10.0", 1, HYPERV, &[], Infeasible, Some(RuleCode::Enlightenment), "leave them out \
                                                                                  of <hyperv>")]
#[case("pc-q35-10.0", 1, HYPERV, &[("hyperv.virtnode.io/synic", "true")], Feasible, None, "")]
#[case("pc-q35-10.0", 1, HYPERV, &[("hyperv.virtnode.io/spinlocks", GONE)],
    Unknown, Some(RuleCode::Enlightenment), "")]
#[case("pc-q35-10.0", 1, PCI, &[], Feasible, None, "")]
#[case("pc-q35-10.0", 1, PCI, &[("virtnode.io/vfio", GONE)], Infeasible, Some(RuleCode::HostDevice), "intel_iommu=on")]
#[case("pc-q35-10.0", 1, PCI, &[("virtnode.io/iommu-groups", "0")], Infeasible, Some(RuleCode::HostDevice), "vfio-pci")]
#[case("pc-q35-10.0", 1, PCI, &[("virtnode.io/iommu-groups", GONE)], Unknown, Some(RuleCode::HostDevice), "")]
#[case("pc-q35-10.0", 1, IOMMUFD, &[], Infeasible, Some(RuleCode::HostDevice), "load iommufd")]
#[case("pc-q35-10.0", 1, "<launchSecurity type='sev'/>", &[], Feasible, None, "")]
#[case("pc-q35-10.0", 1, "<launchSecurity type='tdx'/>", &[],
    Infeasible, Some(RuleCode::LaunchSecurity), "choose a node that has it")]
#[case("pc-q35-10.0", 1, "<launchSecurity type='tdx'/>", &[("virtnode.io/tdx", "true")], Feasible, None, "")]
fn unfit_node_has_a_finding_with_a_remedy(
    #[case] machine: &str,
    #[case] vcpus: u32,
    #[case] rest: &str,
    #[case] changes: &[(&str, &str)],
    #[case] answer: Feasibility,
    #[case] code: Option<RuleCode>,
    #[case] remedy: &str,
) {
    let placement = find_targets(&domain(machine, vcpus, rest), &[node("a", changes)]);
    let node = &placement.nodes[0];
    let first = node
        .findings
        .first()
        .filter(|f| f.severity <= RuleSeverity::Unknown);
    assert_eq!(
        (node.answer, first.map(|f| f.code)),
        (answer, code),
        "{node:#?}"
    );
    let shown = first
        .and_then(|first| first.remedy.as_deref())
        .unwrap_or_default();
    assert!(shown.contains(remedy), "{shown}");
    assert!(!remedy.is_empty() || shown.is_empty(), "{shown}");
}

#[test]
fn labels_do_not_describe_other_domain_types() {
    let soft = domain_of("type='qemu'", "pc-q35-10.0", 1, "");
    let answer =
        |changes: &[(&str, &str)]| find_targets(&soft, &[node("a", changes)]).nodes[0].answer;
    assert_eq!(answer(&[]), Unknown);
    assert_eq!(answer(&[("virtnode.io/accelerator", "tcg")]), Feasible);
    assert_eq!(answer(&[("kubernetes.io/arch", "arm64")]), Unknown);
}

#[test]
fn nodes_are_ordered_best_first() {
    let live = domain_of("type='kvm' id='3'", "pc-q35-7.2", 4, "");
    let no_machine = [("machine.virtnode.io/pc-q35-7.2", GONE)];
    let two_reasons = [no_machine[0], ("virtnode.io/accelerator", "tcg")];
    let nodes = [
        Candidate {
            here: true,
            ..node("source", &[])
        },
        node("two-reasons", &two_reasons),
        node("one-reason", &no_machine),
        node(
            "not-known",
            &[("machine.virtnode.io/pc-q35-7.2", "unknown")],
        ),
        Candidate {
            cut_off: true,
            ..node("cut-off", &[])
        },
        Candidate {
            ready: Some(false),
            ..node("not-ready", &[])
        },
        Candidate {
            cordoned: true,
            ..node("cordoned", &[])
        },
        node("older", &[("virtnode.io/qemu-version", "9.0.0")]),
        node(
            "deprecates",
            &[("machine-deprecated.virtnode.io/pc-q35-7.2", "true")],
        ),
        node("other-cpu", &[("virtnode.io/host-model", "EPYC-Genoa")]),
        node("b-same", &[]),
        node("a-same", &[]),
        node("roomy", &[("machine.virtnode.io/pc-q35-7.2", "289")]),
        Candidate {
            labels: NodeLabels::new(),
            ..node("without", &[])
        },
    ];
    let placement = find_targets(&live, &nodes);
    let order = [
        "roomy",
        "a-same",
        "b-same",
        "deprecates",
        "older",
        "other-cpu",
        "source",
        "cordoned",
        "cut-off",
        "not-ready",
        "not-known",
        "one-reason",
        "two-reasons",
    ];
    assert_eq!(names(&placement), order);
    assert_eq!(placement.unlabeled, ["without"]);
    assert_eq!(placement.fitting(), 10);
    let states = |name: &str| {
        let node = placement.nodes.iter().find(|node| node.name == name);
        node.unwrap().states.clone()
    };
    assert_eq!(states("source"), [CandidateState::RunsHere]);
    assert_eq!(states("cordoned"), [CandidateState::Cordoned]);
    assert_eq!(states("not-ready"), [CandidateState::NotReady]);
    assert_eq!(states("cut-off"), [CandidateState::CutOff]);
    assert_eq!(states("a-same"), []);
}

#[test]
fn alias_is_resolved_per_node() {
    let nodes = [
        node("new", &[]),
        node(
            "old",
            &[
                ("machine-alias.virtnode.io/q35", "pc-q35-7.2"),
                ("machine.virtnode.io/pc-q35-10.0", GONE),
            ],
        ),
        // The node has the machine type, but no alias for it.
        node("nameless", &[("machine-alias.virtnode.io/q35", GONE)]),
    ];
    let small = find_targets(&domain("q35", 200, ""), &nodes);
    assert_eq!(names(&small), ["new", "old", "nameless"]);
    assert_eq!(small.fitting(), 2);
    assert_eq!(small.named, [""; 0]);
    // pc-q35-7.2 allows at most 288.
    let large = find_targets(&domain("q35", 289, ""), &nodes);
    assert_eq!(large.fitting(), 1);
    let affinity = serde_json::to_value(&large.affinity).unwrap();
    let term = |means: &str| {
        json!({"matchExpressions": [
            {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]},
            {"key": "virtnode.io/accelerator", "operator": "In", "values": ["kvm"]},
            {"key": "machine-alias.virtnode.io/q35", "operator": "In", "values": [means]},
            {"key": format!("machine.virtnode.io/{means}"), "operator": "Gt", "values": ["288"]},
        ]})
    };
    let terms = json!({"nodeSelectorTerms": [term("pc-q35-10.0"), term("pc-q35-7.2")]});
    let expected = json!({"requiredDuringSchedulingIgnoredDuringExecution": terms});
    assert_eq!(affinity, expected);
}

#[test]
fn model_with_disabled_features_also_matches_the_host_model() {
    let cpu = "<cpu mode='custom' match='exact' check='partial'><model>EPYC-Genoa</model>\
               <feature policy='disable' name='avx512f'/>\
               <feature policy='require' name='sse4.2'/></cpu>";
    let nodes = [
        node("has-it", &[("cpu-model.virtnode.io/EPYC-Genoa", "true")]),
        node("is-it", &[("virtnode.io/host-model", "EPYC-Genoa")]),
        node("neither", &[]),
    ];
    let placement = find_targets(&domain("q35", 1, cpu), &nodes);
    let matched: Vec<&str> = placement
        .nodes
        .iter()
        .filter(|node| node.matched)
        .map(|node| node.name.as_str())
        .collect();
    assert_eq!(matched, ["has-it", "is-it"]);
}

#[test]
fn nodes_whose_objects_contradict_their_labels_are_named() {
    let asked = domain("pc-q35-10.0", 4, "");
    let reported = |changes: &[(&str, &str)]| {
        ReportedOffer::Offer(Box::new(Offer::from_labels(&labels(changes), &asked)))
    };
    let without = [("machine.virtnode.io/pc-q35-10.0", GONE)];
    let nodes = [
        node("plain", &[]),
        Candidate {
            reported: reported(&without),
            ..node("taken-back", &[])
        },
        Candidate {
            reported: reported(&[]),
            ..node("not-labelled", &without)
        },
        Candidate {
            reported: reported(&[]),
            labels: NodeLabels::new(),
            ..node("object-only", &[])
        },
        Candidate {
            reported: ReportedOffer::Stale,
            ..node("stale", &[])
        },
        Candidate {
            reported: ReportedOffer::Unreadable,
            ..node("unreadable", &[])
        },
        Candidate {
            reported: ReportedOffer::Stale,
            labels: NodeLabels::new(),
            ..node("forgotten", &[])
        },
    ];
    let placement = find_targets(&asked, &nodes);
    let answers: Vec<(&str, Feasibility, bool)> = placement
        .nodes
        .iter()
        .map(|node| (node.name.as_str(), node.answer, node.matched))
        .collect();
    let expected = [
        ("object-only", Feasible, false),
        ("plain", Feasible, true),
        ("stale", Feasible, true),
        ("unreadable", Feasible, true),
        ("not-labelled", Infeasible, false),
        ("taken-back", Infeasible, true),
    ];
    assert_eq!(answers, expected);
    assert_eq!(placement.named, ["taken-back", "object-only"]);
    assert_eq!(placement.unlabeled, ["forgotten"]);
    let affinity = placement.affinity.unwrap();
    for node in &nodes {
        let fits = ["plain", "object-only", "stale", "unreadable"].contains(&node.name.as_str());
        assert_eq!(
            affinity.matches(&node.name, &node.labels),
            fits,
            "{}",
            node.name
        );
    }
}

#[test]
fn number_of_named_nodes_is_bounded() {
    let asked = domain("pc-q35-10.0", 4, "");
    let without = labels(&[("machine.virtnode.io/pc-q35-10.0", GONE)]);
    let nodes: Vec<Candidate> = (0..60)
        .map(|number| Candidate {
            reported: ReportedOffer::Offer(Box::new(Offer::from_labels(&without, &asked))),
            ..node(&format!("node-{number:02}"), &[])
        })
        .chain([node("fits", &[])])
        .collect();
    let placement = find_targets(&asked, &nodes);
    assert_eq!(placement.fitting(), 1);
    assert_eq!((placement.named.len(), placement.unnamed), (50, 10));
}

/// No node has an invalid label, and the API server rejects one.
#[rstest]
#[case("q35 mit Schlag", "")]
#[case(
    "q35",
    "<cpu mode='host-model' check='partial'><feature policy='require' name='a b'/></cpu>"
)]
#[case("q35", "<launchSecurity type='-'/>")]
#[case("q35", "<cpu><model>über</model></cpu>")]
fn invalid_label_names_yield_no_affinity(#[case] machine: &str, #[case] rest: &str) {
    let placement = find_targets(&domain(machine, 1, rest), &[node("a", &[]), node("b", &[])]);
    assert_eq!(placement.fitting(), 0);
    assert_eq!(placement.affinity, None);
}

#[test]
fn matching_labels_without_a_fitting_node_yield_no_affinity() {
    // Labels do not reveal that the topology contradicts the number of vCPUs.
    let asked = domain(
        "q35",
        4,
        "<cpu><topology sockets='3' cores='1' threads='1'/></cpu>",
    );
    let placement = find_targets(&asked, &[node("a", &[])]);
    assert_eq!((placement.fitting(), &placement.affinity), (0, &None));
    assert!(placement.nodes[0].matched);
}
