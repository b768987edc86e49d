//! Checks results against the affinity on generated domains and nodes.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::RngSeed;
use serde_json::Value;

use super::*;

/// Evaluates a pod's node affinity like Kubernetes
/// (`component-helpers/scheduling/corev1/nodeaffinity`).
fn scheduler_accepts(affinity: &Value, name: &str, labels: &NodeLabels) -> bool {
    let required = &affinity["requiredDuringSchedulingIgnoredDuringExecution"];
    let terms = required["nodeSelectorTerms"].as_array().unwrap();
    assert!(!terms.is_empty(), "the API server requires at least one");
    let holds = |expression: &Value, have: Option<&str>| {
        let values: Vec<&str> = expression["values"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|value| value.as_str().unwrap())
            .collect();
        match expression["operator"].as_str().unwrap() {
            "In" => have.is_some_and(|have| values.contains(&have)),
            "NotIn" => !have.is_some_and(|have| values.contains(&have)),
            "Exists" => have.is_some(),
            "DoesNotExist" => have.is_none(),
            "Gt" => match (have.map(str::parse::<i64>), values[0].parse::<i64>()) {
                (Some(Ok(have)), Ok(than)) => have > than,
                _ => false,
            },
            other => panic!("not an operator of Kubernetes: {other}"),
        }
    };
    let list = |term: &Value, field: &str| term[field].as_array().cloned().unwrap_or_default();
    terms.iter().any(|term| {
        let (expressions, fields) = (list(term, "matchExpressions"), list(term, "matchFields"));
        let key = |expression: &Value| expression["key"].as_str().unwrap().to_owned();
        !(expressions.is_empty() && fields.is_empty())
            && expressions
                .iter()
                .all(|one| holds(one, labels.get(&key(one)).map(String::as_str)))
            && fields.iter().all(|one| {
                assert_eq!(key(one), "metadata.name");
                holds(one, Some(name))
            })
    })
}

fn any_cpu() -> impl Strategy<Value = String> {
    let model = select(&["EPYC", "Nehalem", "EPYC-Genoa", "Strange"][..]);
    let check = select(&["", " check='none'", " check='partial'", " check='full'"][..]);
    let matching = select(&["", " match='minimum'", " match='exact'"][..]);
    let fallback = select(&["", " fallback='forbid'"][..]);
    let vendor = select(&["", "<vendor>AMD</vendor>", "<vendor>Intel</vendor>"][..]);
    let policy = select(&["require", "optional", "disable", "forbid", "force"][..]);
    let name = select(&["sse4.2", "x2apic", "avx512f", "a b"][..]);
    let feature = (policy, name)
        .prop_map(|(policy, name)| format!("<feature policy='{policy}' name='{name}'/>"));
    let feature = prop_oneof![2 => Just(String::new()), 3 => feature];
    let custom =
        (model, matching, fallback, vendor).prop_map(|(model, matching, fallback, vendor)| {
            (
                format!("mode='custom'{matching}"),
                format!("<model{fallback}>{model}</model>{vendor}"),
            )
        });
    let plain = select(&["host-model", "host-passthrough", "maximum"][..])
        .prop_map(|mode| (format!("mode='{mode}'"), String::new()));
    let cpu = (prop_oneof![custom, plain], check, feature).prop_map(
        |((attributes, model), check, feature)| {
            format!("<cpu {attributes}{check}>{model}{feature}</cpu>")
        },
    );
    prop_oneof![1 => Just(String::new()), 4 => cpu]
}

/// Generates XML, which is easier to read in a failure than a value.
fn any_domain() -> impl Strategy<Value = String> {
    let kind = select(
        &[
            "type='kvm'",
            "type='kvm'",
            "type='qemu'",
            "type='kvm' id='1'",
        ][..],
    );
    let machine = select(&["q35", "pc", "", "pc-q35-10.0", "pc-q35-7.2", "nonsense"][..]);
    let vcpus = select(&[1_u32, 2, 255, 256, 288, 289, 1024, 1025][..]);
    let rest = select(
        &[
            "",
            "",
            HYPERV,
            PCI,
            IOMMUFD,
            "<launchSecurity type='sev'/>",
            "<launchSecurity type='tdx'/>",
        ][..],
    );
    (kind, machine, vcpus, any_cpu(), rest).prop_map(|(kind, machine, vcpus, cpu, rest)| {
        xml_of(kind, machine, vcpus, &format!("{cpu}{rest}"))
    })
}

/// Generates labels with some deviations.
fn any_labels() -> impl Strategy<Value = NodeLabels> {
    let changes: Vec<(&str, &str)> = vec![
        ("kubernetes.io/arch", "arm64"),
        ("kubernetes.io/arch", GONE),
        ("cpu-feature.virtnode.io/avx512f", "true"),
        ("cpu-feature.virtnode.io/sse4.2", GONE),
        ("cpu-feature.virtnode.io/x2apic", GONE),
        ("cpu-model.virtnode.io/EPYC", GONE),
        ("cpu-model.virtnode.io/EPYC-Genoa", "true"),
        ("hyperv.virtnode.io/spinlocks", GONE),
        ("hyperv.virtnode.io/synic", "true"),
        ("machine-alias.virtnode.io/q35", "pc-q35-7.2"),
        ("machine-alias.virtnode.io/q35", GONE),
        ("machine.virtnode.io/pc-i440fx-10.0", GONE),
        ("machine.virtnode.io/pc-q35-10.0", "255"),
        ("machine.virtnode.io/pc-q35-10.0", "unknown"),
        ("machine.virtnode.io/pc-q35-7.2", GONE),
        ("machine-deprecated.virtnode.io/pc-q35-7.2", "true"),
        ("virtnode.io/accelerator", "tcg"),
        ("virtnode.io/accelerator", GONE),
        ("virtnode.io/cpu-vendor", "Intel"),
        ("virtnode.io/eim", "explicit"),
        ("virtnode.io/eim", GONE),
        ("virtnode.io/host-model", "EPYC-Genoa"),
        ("virtnode.io/host-model", GONE),
        ("virtnode.io/iommu-groups", "0"),
        ("virtnode.io/iommu-groups", GONE),
        ("virtnode.io/libvirt-version", "9.0.0"),
        ("virtnode.io/libvirt-version", "7.0.0"),
        ("virtnode.io/qemu-version", GONE),
        ("virtnode.io/sev", GONE),
        ("virtnode.io/tdx", "true"),
        ("virtnode.io/vfio", GONE),
    ];
    subsequence(changes, 0..5).prop_map(|changes| {
        let mut labels = labels(&changes);
        // A daemon's labels never exceed what libvirt configures by default.
        if labels
            .get("virtnode.io/eim")
            .is_none_or(|eim| eim != "auto")
        {
            let machines = labels
                .iter_mut()
                .filter(|(key, _)| key.starts_with(MACHINE));
            for (_, most) in
                machines.filter(|(_, most)| most.parse().is_ok_and(|most: u32| most > 255))
            {
                "255".clone_into(most);
            }
        }
        labels
    })
}

fn any_nodes(xml: &str) -> impl Strategy<Value = Vec<Candidate>> + use<> {
    let asked = parsed(xml);
    let node = (
        any_labels(),
        proptest::option::weighted(0.3, any_labels()),
        any::<[bool; 3]>(),
    );
    proptest::collection::vec(node, 1..6).prop_map(move |nodes| {
        let candidate = |(number, node): (usize, (NodeLabels, Option<NodeLabels>, [bool; 3]))| {
            let (labels, other, [closed, ready, here]) = node;
            let other = other.map(|labels| Offer::from_labels(&labels, &asked));
            Candidate {
                name: format!("node-{number}"),
                labels,
                ready: Some(ready),
                cordoned: closed,
                here: here && number == 0,
                cut_off: false,
                reported: other.map_or(ReportedOffer::None, |offer| {
                    ReportedOffer::Offer(Box::new(offer))
                }),
            }
        };
        nodes.into_iter().enumerate().map(candidate).collect()
    })
}

proptest! {
    // A fixed seed: a failure is due to the change at hand.
    #![proptest_config(ProptestConfig {
        rng_seed: RngSeed::Fixed(31),
        ..ProptestConfig::with_cases(1000)
    })]

    #[test]
    fn scheduler_accepts_exactly_the_fitting_nodes(
        (xml, nodes) in any_domain().prop_flat_map(|xml| {
            let nodes = any_nodes(&xml);
            (Just(xml), nodes)
        })
    ) {
        let targets = find_targets(&parsed(&xml), &nodes);
        prop_assert_eq!(targets.nodes.len() + targets.unlabeled.len(), nodes.len());
        let weights = targets.nodes.iter().map(|node| match node.answer {
            Feasible => 0,
            Unknown => 1,
            Infeasible => 2,
        });
        prop_assert!(weights.is_sorted());
        let fits = |name: &str| {
            let node = targets.nodes.iter().find(|node| node.name == name);
            node.is_some_and(|node| node.answer == Feasible)
        };
        match &targets.affinity {
            None => prop_assert_eq!(targets.fitting(), 0),
            Some(affinity) => {
                let affinity = serde_json::to_value(affinity).unwrap();
                for node in &nodes {
                    let is_accepted = scheduler_accepts(&affinity, &node.name, &node.labels);
                    prop_assert_eq!(is_accepted, fits(&node.name), "{} {}", &node.name, &affinity);
                }
            }
        }
    }

    /// Without a `NodeVirtualization`, the affinity needs no node names: its expressions match the
    /// fitting nodes and no unfit one, except for properties that labels do not carry.
    #[test]
    fn affinity_of_labels_alone_matches_the_results(
        xml in any_domain(), all in proptest::collection::vec(any_labels(), 1..4)
    ) {
        let nodes: Vec<Candidate> = all
            .into_iter()
            .enumerate()
            .map(|(number, labels)| Candidate {
                name: format!("node-{number}"),
                labels,
                ..Candidate::default()
            })
            .collect();
        for node in find_targets(&parsed(&xml), &nodes).nodes {
            match node.answer {
                Feasible => prop_assert!(node.matched, "{:#?}", node),
                // The scheduler cannot compare versions; and APIC IDs are the same on every node.
                Infeasible if matches!(node.findings[0].code, RuleCode::CpuMode | RuleCode::ApicId) => {}
                Infeasible => prop_assert!(!node.matched, "{:#?}", node),
                Unknown => {}
            }
        }
    }
}
