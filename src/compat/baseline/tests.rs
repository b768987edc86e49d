//! Tests of baselines and comparisons on single hosts, and properties over generated ones.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::models::features_of;
use super::*;

/// The models of the generated hosts, of which the table knows the first ones.
const MODELS: [&str; 9] = [
    "qemu64",
    "Nehalem",
    "Skylake-Client-IBRS",
    "Cascadelake-Server-v2",
    "EPYC",
    "EPYC-Milan",
    "EPYC-Genoa",
    "EPYC-Milan-v1",
    "of-tomorrow",
];

/// A host that has all features of these models but those in `without`.
fn host(of: &[&str], without: &[&str]) -> NodeCpu {
    let own = |name: &str| -> BTreeSet<String> {
        let known = features_of("x86_64", name).map(|model| model.features.clone());
        let names = known.unwrap_or_else(|| ["fpu", "tomorrow"].into());
        names.into_iter().map(str::to_owned).collect()
    };
    let mut features: BTreeSet<String> = of.iter().flat_map(|name| own(name)).collect();
    features.insert("fpu".to_owned());
    features.retain(|name| !without.contains(&name.as_str()));
    let model = |name: &&str| {
        let blockers: Vec<String> = own(name).difference(&features).cloned().collect();
        NodeModel {
            name: (*name).to_owned(),
            usable: Some(blockers.is_empty()),
            deprecated: false,
            blockers,
        }
    };
    NodeCpu {
        architecture: "x86_64".to_owned(),
        accelerator: "kvm".to_owned(),
        vendor: Some("AMD".to_owned()),
        host_model: None,
        models: MODELS.iter().map(model).collect(),
        features,
    }
}

fn node(name: &str, cpu: NodeCpu) -> CpuCandidate {
    CpuCandidate {
        name: name.to_owned(),
        cpu: Ok(Arc::new(cpu)),
    }
}

/// Returns the features that a guest with the proposed CPU has.
fn guest(proposal: &CpuProposal) -> BTreeSet<String> {
    let known = features_of("x86_64", &proposal.model);
    let own = known.into_iter().flat_map(|model| &model.features);
    let mut features: BTreeSet<String> = own.map(|name| (*name).to_owned()).collect();
    features.extend(proposal.require.iter().cloned());
    features.retain(|name| !proposal.disable.contains(name));
    features
}

#[test]
fn richest_model_of_all_nodes_wins_and_costs_are_named() {
    let milan = host(&["EPYC-Milan"], &[]);
    let genoa = host(&["EPYC-Genoa", "EPYC-Milan"], &[]);
    let nodes = [node("b", genoa.clone()), node("a", milan), node("c", genoa)];
    let baseline = find_baseline(&nodes);
    let best = baseline.best.as_ref().unwrap();
    assert_eq!(
        (best.model.as_str(), best.kind),
        ("EPYC-Milan", ProposalKind::Usable)
    );
    assert_eq!((best.require.len(), best.disable.len()), (0, 0));
    let [cost] = &baseline.costs[..] else {
        panic!("{:?}", baseline.costs)
    };
    assert_eq!(
        (cost.nodes.as_slice(), cost.model.as_deref()),
        (&["a".to_owned()][..], Some("EPYC-Genoa"))
    );
    let avx512 = cost.lacking.iter().find(|it| it.name == "avx512f").unwrap();
    assert_eq!(avx512.origin, FeatureOrigin::Model);
    assert_eq!(baseline.classes[1].nodes, ["b", "c"]);
    // The alias and its versioned name are one.
    assert!(
        baseline
            .alternatives
            .iter()
            .all(|it| it.model != "EPYC-Milan-v1")
    );
}

#[test]
fn feature_of_every_node_that_the_model_lacks_is_required() {
    let mut cpu = host(&["EPYC-Milan"], &[]);
    cpu.features.extend(["invtsc", "vaes"].map(str::to_owned));
    let baseline = find_baseline(&[node("a", cpu.clone()), node("b", cpu)]);
    let best = baseline.best.unwrap();
    // The time stamp counter's feature prevents migration.
    assert_eq!(best.require, ["vaes"]);
    assert_eq!(
        best.to_libvirt_xml(),
        "<cpu mode='custom' match='exact' check='partial'>\n  <model fallback='forbid'>EPYC-Milan\
         </model>\n  <feature policy='require' name='vaes'/>\n</cpu>\n"
    );
    assert_eq!(best.to_kubevirt().features[0].policy, "require");
}

#[test]
fn model_of_another_vendor_is_left_out_and_a_deprecated_one_comes_last() {
    let mut cpu = host(&["EPYC-Milan", "Skylake-Client-IBRS"], &[]);
    let baseline = find_baseline(&[node("a", cpu.clone())]);
    let order: Vec<&str> = std::iter::once(baseline.best.as_ref().unwrap())
        .chain(&baseline.alternatives)
        .map(|it| it.model.as_str())
        .collect();
    let expected = ["EPYC-Milan", "EPYC", "qemu64", "EPYC-Genoa", "of-tomorrow"];
    assert_eq!(order, expected);
    for model in &mut cpu.models {
        model.deprecated = model.name.starts_with("EPYC-Milan");
    }
    let best = find_baseline(&[node("a", cpu)]).best.unwrap();
    assert_eq!(best.model, "EPYC");
}

#[test]
fn without_usable_model_one_is_reduced_by_its_blockers() {
    let cpu = host(&["EPYC-Milan"], &["cx16", "sse2", "tsc"]);
    let best = find_baseline(&[node("a", cpu)]).best.unwrap();
    assert_eq!(
        (best.model.as_str(), best.kind),
        ("EPYC-Milan", ProposalKind::Reduced)
    );
    assert_eq!(best.disable, ["cx16", "sse2", "tsc"]);
}

#[test]
fn node_that_reports_no_features_adds_none_and_is_not_compatible_by_silence() {
    let mut silent = host(&["EPYC-Milan"], &[]);
    silent.features.clear();
    let mut open = host(&["EPYC-Milan"], &[]);
    open.features.insert("vaes".to_owned());
    let baseline = find_baseline(&[node("a", silent.clone()), node("b", open.clone())]);
    assert_eq!(baseline.best.unwrap().require, Vec::<String>::new());
    assert!(!baseline.classes[0].complete && baseline.classes[1].complete);
    let difference = CpuDifference::new(("b", &open), ("a", &silent));
    assert_eq!(difference.relation, CpuRelation::Unknown);
    // A model that it does not list is not usable there.
    silent
        .models
        .retain(|model| !model.name.starts_with("EPYC-Milan"));
    let best = find_baseline(&[node("a", silent), node("b", open)])
        .best
        .unwrap();
    assert_eq!(best.model, "EPYC");
}

#[test]
fn feature_that_an_old_libvirt_may_not_know_is_not_disabled() {
    let old = host(&["Nehalem"], &[]);
    let mut nested = host(&["Cascadelake-Server-v2"], &[]);
    nested.vendor = Some("Intel".to_owned());
    let mut claims = old;
    for model in &mut claims.models {
        if model.name == "Cascadelake-Server-v2" {
            (model.usable, model.blockers) = (Some(true), Vec::new());
        }
    }
    let baseline = find_baseline(&[node("a", claims), node("b", nested)]);
    let models = baseline.best.iter().chain(&baseline.alternatives);
    assert!(
        models
            .into_iter()
            .all(|it| it.model != "Cascadelake-Server-v2")
    );
}

#[test]
fn other_architecture_and_accelerator_are_left_out_with_the_reason() {
    let cpu = host(&["EPYC"], &[]);
    let arm = NodeCpu {
        architecture: "aarch64".to_owned(),
        ..cpu.clone()
    };
    let soft = NodeCpu {
        accelerator: "tcg".to_owned(),
        ..cpu.clone()
    };
    let nodes = [
        node("a", cpu.clone()),
        node("b", cpu),
        node("c", arm),
        node("d", soft),
        CpuCandidate {
            name: "e".to_owned(),
            cpu: Err(CpuExclusion::Stale),
        },
    ];
    let baseline = find_baseline(&nodes);
    assert_eq!(baseline.nodes(), 2);
    let reasons = baseline
        .excluded
        .iter()
        .map(|it| (it.name.as_str(), it.reason));
    assert_eq!(
        reasons.collect::<Vec<_>>(),
        [
            ("c", CpuExclusion::OtherArchitecture),
            ("d", CpuExclusion::OtherAccelerator),
            ("e", CpuExclusion::Stale)
        ]
    );
}

#[test]
fn base_model_of_the_newest_common_generation_wins_on_s390x() {
    let mainframe = |models: &[&str], features: &[&str]| NodeCpu {
        architecture: "s390x".to_owned(),
        accelerator: "kvm".to_owned(),
        models: models
            .iter()
            .map(|name| NodeModel {
                name: (*name).to_owned(),
                usable: Some(true),
                ..NodeModel::default()
            })
            .collect(),
        features: features.iter().map(|name| (*name).to_owned()).collect(),
        ..NodeCpu::default()
    };
    let old = mainframe(
        &["z14", "z14-base", "gen15a-base", "qemu"],
        &["sie", "te", "vx"],
    );
    let new = mainframe(
        &["z14", "z14-base", "gen15a-base", "gen16a-base"],
        &["sie", "vx", "nnpa"],
    );
    let best = find_baseline(&[node("a", old), node("b", new)])
        .best
        .unwrap();
    assert_eq!(best.model, "gen15a-base");
    assert_eq!(best.require, ["sie", "vx"]);
    assert_eq!(best.features, None);
}

#[test]
fn comparison_uses_the_words_of_libvirt_in_both_directions() {
    let milan = host(&["EPYC-Milan"], &["svm"]);
    let genoa = host(&["EPYC-Genoa", "EPYC-Milan"], &[]);
    let difference = CpuDifference::new(("a", &milan), ("b", &genoa));
    assert_eq!(difference.relation, CpuRelation::Superset);
    let [onward, back] = &difference.directions;
    assert_eq!(
        (onward.answer, back.answer),
        (CpuRelation::Superset, CpuRelation::Incompatible)
    );
    assert_eq!(
        onward.words,
        "The CPU provided by hypervisor on b is a superset of CPU described in a"
    );
    let svm = back.missing.iter().find(|it| it.name == "svm").unwrap();
    assert_eq!(svm.origin, FeatureOrigin::Bios);
    assert!(back.models.contains(&"EPYC-Genoa".to_owned()));
    let same = CpuDifference::new(("a", &milan), ("c", &milan));
    assert_eq!(same.relation, CpuRelation::Identical);
    let intel = NodeCpu {
        vendor: Some("Intel".to_owned()),
        ..milan.clone()
    };
    let vendors = CpuDifference::new(("a", &milan), ("i", &intel));
    assert_eq!(vendors.relation, CpuRelation::Incompatible);
}

/// Generates hosts that have some of the models, without some features, some with an incomplete report.
fn hosts() -> impl Strategy<Value = Vec<NodeCpu>> {
    let without = prop::collection::vec(
        prop::sample::select(vec![
            "svm",
            "monitor",
            "vme",
            "avx2",
            "pku",
            "spec-ctrl",
            "ibpb",
            "cx16",
            "vmx-ept",
            "sse4.2",
        ]),
        0..4,
    );
    let of = prop::collection::vec(prop::sample::select(MODELS.to_vec()), 1..4);
    let host = (of, without, 0..10_u8).prop_map(|(of, without, damage)| {
        let mut cpu = host(&of, &without);
        match damage {
            0 => cpu.features.clear(),
            1 => cpu
                .models
                .iter_mut()
                .for_each(|model| model.blockers.clear()),
            2 => cpu.models.retain(|model| model.usable == Some(true)),
            _ => {}
        }
        cpu
    });
    prop::collection::vec(host, 1..7)
}

fn named(hosts: &[NodeCpu]) -> Vec<CpuCandidate> {
    let numbered = hosts.iter().enumerate();
    numbered
        .map(|(number, cpu)| node(&format!("node-{number}"), cpu.clone()))
        .collect()
}

proptest! {
    #[test]
    fn every_proposal_is_usable_on_every_node(hosts in hosts()) {
        let baseline = find_baseline(&named(&hosts));
        for proposal in baseline.best.iter().chain(&baseline.alternatives) {
            let guest = guest(proposal);
            for cpu in &hosts {
                let model = cpu.models.iter().find(|model| model.name == proposal.model).unwrap();
                let disabled = |name: &String| proposal.disable.contains(name);
                let reduced = !model.blockers.is_empty() && model.blockers.iter().all(disabled);
                prop_assert!(model.usable == Some(true) || reduced, "{proposal:?}");
                let view = cpu.view();
                for name in &guest {
                    prop_assert!(view.gives(name) == Some(true), "{name} of {proposal:?}");
                }
            }
        }
    }

    #[test]
    fn added_node_never_makes_the_result_larger(hosts in hosts()) {
        let with = find_baseline(&named(&hosts));
        let without = find_baseline(&named(&hosts[..hosts.len() - 1]));
        let common: BTreeSet<&String> = without.common.iter().collect();
        if hosts.len() > 1 {
            prop_assert!(with.common.iter().all(|name| common.contains(name)));
            prop_assert!(with.best.is_none() || without.best.is_some());
            let wider: BTreeSet<String> = without.common.iter().cloned().collect();
            for proposal in with.best.iter().chain(&with.alternatives) {
                prop_assert!(guest(proposal).is_subset(&wider), "{proposal:?}");
            }
        }
    }

    #[test]
    fn order_of_nodes_does_not_matter(hosts in hosts(), seed in any::<u64>()) {
        let nodes = named(&hosts);
        let mut shuffled = nodes.clone();
        fastrand::Rng::with_seed(seed).shuffle(&mut shuffled);
        prop_assert_eq!(find_baseline(&nodes), find_baseline(&shuffled));
    }

    #[test]
    fn comparison_is_the_same_from_both_sides(hosts in hosts()) {
        let (a, b) = (&hosts[0], &hosts[hosts.len() - 1]);
        let onward = CpuDifference::new(("a", a), ("b", b));
        let back = CpuDifference::new(("b", b), ("a", a));
        let mut turned = back.directions.clone();
        turned.reverse();
        prop_assert_eq!(onward.directions, turned);
        let reversed = match back.relation {
            CpuRelation::Subset => CpuRelation::Superset,
            CpuRelation::Superset => CpuRelation::Subset,
            other => other,
        };
        prop_assert_eq!(onward.relation, reversed);
    }
}
