//! `virtnode baseline` and `virtnode compare` on lists of nodes: choice, bad input, formats, exit codes.

use serde_json::{Value, json};

use crate::targets::virtnode;

/// Returns a NodeVirtualization with these usable models. Nehalem has what it takes.
fn object(name: &str, models: &[&str], features: &[&str]) -> Value {
    let nehalem = "apic clflush cmov cx16 cx8 de fpu fxsr lahf_lm lm mca mce mmx msr mtrr nx pae pat pge pni \
                   popcnt pse pse36 sep sse sse2 sse4.1 sse4.2 ssse3 syscall tsc";
    let features: Vec<&str> = nehalem.split(' ').chain(features.iter().copied()).collect();
    let models: Vec<Value> = models
        .iter()
        .map(|name| json!({"name": name, "usable": "yes"}))
        .collect();
    json!({
        "kind": "NodeVirtualization", "metadata": {"name": name},
        "status": {
            "lastProbeTime": "2026-01-01T00:00:00Z", "architecture": "x86_64", "accelerator": "kvm",
            "cpu": {"vendor": "Intel", "models": models, "features": features},
        },
    })
}

fn node(name: &str, pool: &str) -> Value {
    json!({"kind": "Node", "metadata": {"name": name, "labels": {"pool": pool}}})
}

fn list(items: &[Value]) -> String {
    json!({"kind": "List", "items": items}).to_string()
}

fn two() -> Vec<Value> {
    vec![
        node("a", "old"),
        node("b", "new"),
        object("a", &["Nehalem"], &["aes"]),
        object(
            "b",
            &["Nehalem", "Westmere"],
            &["aes", "pclmuldq", "md-clear"],
        ),
    ]
}

fn ask(arguments: &[&str], input: &str) -> (i32, Value, String) {
    let arguments = [arguments, &["--output", "json", "--nodes", "-"]].concat();
    let (code, out, err) = virtnode(&arguments, input);
    let answer = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    (code, answer, err)
}

/// Returns name and reason of each node that is left out.
fn excluded(answer: &Value) -> Vec<(&str, &str)> {
    let nodes = answer["excluded"].as_array().into_iter().flatten();
    nodes
        .map(|node| {
            (
                node["name"].as_str().unwrap(),
                node["reason"].as_str().unwrap(),
            )
        })
        .collect()
}

#[test]
fn best_model_of_all_nodes_has_the_common_features_and_costs() {
    let (code, answer, err) = ask(&["baseline"], &list(&two()));
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(answer["nodes"], 2);
    assert_eq!(answer["best"]["model"], "Nehalem");
    assert_eq!(answer["best"]["kind"], "usable");
    assert_eq!(answer["best"]["require"], json!(["aes"]));
    assert_eq!(answer["costs"][0]["nodes"], json!(["a"]));
    assert_eq!(answer["costs"][0]["model"], "Westmere");
    assert_eq!(
        answer["costs"][0]["lacking"],
        json!([
            {"name": "pclmuldq", "origin": "model"},
            {"name": "md-clear", "origin": "microcode"},
        ])
    );
    let (code, text, _) = virtnode(&["baseline", "--nodes", "-"], &list(&two()));
    assert_eq!(code, 0);
    assert!(
        text.starts_with("Best CPU for 2 nodes (x86_64, kvm): Nehalem\n"),
        "{text}"
    );
    let cost = "without a: Westmere; it lacks pclmuldq (CPU generation); md-clear (microcode)";
    assert!(text.contains(cost), "{text}");
    let (code, yaml, _) = virtnode(
        &["baseline", "--output", "yaml", "--nodes", "-"],
        &list(&two()),
    );
    assert_eq!(code, 0);
    assert!(yaml.contains("\n  model: Nehalem\n"), "{yaml}");
}

#[test]
fn definitions_are_printed_for_libvirt_and_kubevirt() {
    let print = |format: &str| {
        virtnode(
            &["baseline", "--format", format, "--nodes", "-"],
            &list(&two()),
        )
    };
    let libvirt = "<cpu mode='custom' match='exact' check='partial'>\n  <model fallback='forbid'>Nehalem\
                   </model>\n  <feature policy='require' name='aes'/>\n</cpu>\n";
    assert_eq!(print("libvirt"), (0, libvirt.to_owned(), String::new()));
    let kubevirt = "spec:\n  domain:\n    cpu:\n      model: Nehalem\n      features:\n      - name: aes\n        \
                    policy: require\n";
    assert_eq!(print("kubevirt"), (0, kubevirt.to_owned(), String::new()));
}

#[test]
fn nodes_are_chosen_by_name_and_by_selector() {
    let input = list(&two());
    for arguments in [
        &["baseline", "b"][..],
        &["baseline", "--selector", "pool=new"],
    ] {
        let (code, answer, _) = ask(arguments, &input);
        assert_eq!(
            (code, &answer["best"]["model"]),
            (0, &json!("Westmere")),
            "{arguments:?}"
        );
        assert_eq!(answer["nodes"], 1);
    }
}

#[test]
fn empty_selection_exits_with_unknown_and_a_sentence() {
    let (code, out, err) = virtnode(
        &["baseline", "-l", "pool=none", "--nodes", "-"],
        &list(&two()),
    );
    assert_eq!((code, out.as_str()), (6, ""));
    assert_eq!(
        err,
        "virtnode: none of 2 nodes has labels that match 'pool=none'\n"
    );
    let (code, _, err) = virtnode(
        &["baseline", "-l", "pool in", "--nodes", "-"],
        &list(&two()),
    );
    assert_eq!(code, 2);
    assert!(err.contains("'pool in' is not a valid selector"), "{err}");
    // Objects alone have no labels of nodes.
    let objects = list(&two()[2..]);
    let (code, _, err) = virtnode(&["baseline", "-l", "pool=old", "--nodes", "-"], &objects);
    assert_eq!(code, 1);
    assert!(
        err.contains("--selector needs the labels of Node objects"),
        "{err}"
    );
    assert_eq!(ask(&["baseline"], &objects).1["nodes"], 2);
}

#[test]
fn nodes_that_are_not_known_are_named_and_never_compatible() {
    let mut stale = object("stale", &["Nehalem"], &[]);
    stale["status"]["lastProbeTime"] = "2025-12-31T12:00:00Z".into();
    let mut arm = object("arm", &["cortex-a57"], &[]);
    arm["status"]["architecture"] = "aarch64".into();
    let mut soft = object("soft", &["Nehalem"], &[]);
    soft["status"]["accelerator"] = "tcg".into();
    let empty = json!({"kind": "NodeVirtualization", "metadata": {"name": "empty"}, "status": {}});
    let bad = json!({"kind": "NodeVirtualization", "metadata": {"name": "bad"},
        "status": {"cpu": {"models": 7}}});
    let mut items = two();
    let names = ["stale", "arm", "soft", "empty", "bad", "plain"];
    items.extend(names.map(|name| node(name, "odd")));
    items.extend([
        stale,
        arm,
        soft,
        empty,
        bad,
        object("removed", &["Nehalem"], &[]),
    ]);
    let input = list(&items);
    let (code, answer, err) = ask(&["baseline"], &input);
    assert_eq!(code, 0);
    let problem = "virtnode: cannot read NodeVirtualization bad, so the node's CPU is not known: ";
    assert!(err.starts_with(problem), "{err}");
    assert_eq!(
        (&answer["nodes"], &answer["best"]["model"]),
        (&json!(2), &json!("Nehalem"))
    );
    let expected = [
        ("arm", "other-architecture"),
        ("bad", "unreadable"),
        ("empty", "no-models"),
        ("plain", "no-object"),
        ("removed", "not-found"),
        ("soft", "other-accelerator"),
        ("stale", "stale"),
    ];
    assert_eq!(excluded(&answer), expected);
    let (_, text, _) = virtnode(&["baseline", "--nodes", "-"], &input);
    assert!(
        text.contains("\nLeft out, and not known to give this CPU:\n"),
        "{text}"
    );
    assert!(
        text.contains("  arm: has another architecture: aarch64\n"),
        "{text}"
    );

    // No node is left.
    let unknown = ["baseline", "bad", "empty", "plain", "nowhere"];
    let (code, answer, _) = ask(&unknown, &input);
    assert_eq!((code, answer.get("best")), (6, None));
    assert_eq!(excluded(&answer).len(), 4);
    let (code, text, _) = virtnode(&[&unknown[..], &["--nodes", "-"]].concat(), &input);
    assert_eq!(code, 6);
    assert!(
        text.starts_with("the CPU of no node is known: 1 does not exist; "),
        "{text}"
    );
    let formatted = [&unknown[..], &["--format", "libvirt", "--nodes", "-"]].concat();
    let (code, out, err) = virtnode(&formatted, &input);
    assert_eq!((code, out.as_str()), (6, ""));
    assert!(err.contains("virtnode: nowhere: does not exist\n"), "{err}");

    // Each of them is not known in a comparison.
    for name in [
        "bad", "empty", "plain", "nowhere", "stale", "arm", "soft", "removed",
    ] {
        let (code, answer, _) = ask(&["compare", "a", name], &input);
        assert_eq!(
            (code, &answer["relation"]),
            (6, &json!("unknown")),
            "{name}"
        );
        assert_eq!(answer["unknown"][0]["name"], name);
        assert_eq!(answer["directions"], json!([]));
    }
}

#[test]
fn nodes_without_common_model_exit_with_unknown() {
    let items = [object("a", &["Nehalem"], &[]), object("b", &["EPYC"], &[])];
    let (code, text, _) = virtnode(&["baseline", "--nodes", "-"], &list(&items));
    assert_eq!(code, 6);
    assert!(
        text.starts_with("no CPU model is known to run on each of 2 nodes"),
        "{text}"
    );
    let mut arm = object("a", &[], &[]);
    arm["status"]["architecture"] = "aarch64".into();
    arm["status"]["cpu"]["models"] = json!([{"name": "cortex-a57", "usable": "unknown"}]);
    let (code, text, _) = virtnode(&["baseline", "--nodes", "-"], &list(&[arm]));
    assert_eq!(code, 6);
    assert!(text.contains("host-passthrough"), "{text}");
}

#[test]
fn unreadable_lists_are_rejected_with_a_sentence() {
    for (input, problem) in [
        ("", "contains no Node objects"),
        (
            "{\"kind\": \"List\"",
            "is not the output of `kubectl get nodes -o json`",
        ),
        (
            "NAME  STATUS\n",
            "is not the output of `kubectl get nodes -o json`",
        ),
        (
            "{\"kind\": \"List\", \"items\": []}",
            "contains no Node objects",
        ),
    ] {
        for command in [&["baseline"][..], &["compare", "a", "b"]] {
            let arguments = [command, &["--nodes", "-"]].concat();
            let (code, out, err) = virtnode(&arguments, input);
            assert_eq!((code, out.as_str()), (1, ""), "{command:?} {input}: {err}");
            assert!(err.contains(problem), "{err}");
        }
    }
}

#[test]
fn one_broken_object_in_a_list_of_5000_does_not_affect_the_rest() {
    let mut items: Vec<Value> = (0..5000)
        .map(|number| object(&format!("node-{number:04}"), &["Nehalem"], &["aes"]))
        .collect();
    items[1234] =
        json!({"kind": "NodeVirtualization", "metadata": {"name": {"of": "another kind"}}});
    let (code, answer, err) = ask(&["baseline"], &list(&items));
    assert_eq!((code, &answer["nodes"]), (0, &json!(4999)));
    assert_eq!(answer["best"]["require"], json!(["aes"]));
    assert!(
        err.starts_with("virtnode: skipping item 1234 of the list: "),
        "{err}"
    );
    assert_eq!(answer["classes"].as_array().map(Vec::len), Some(1));
}

#[test]
fn names_that_are_no_names_reach_no_definition() {
    let mut item = object(
        "a",
        &["Nehalem", "x'/><evil/>"],
        &["aes", "\u{1b}[31m", "b'/><evil"],
    );
    item["status"]["cpu"]["models"][1]["usable"] = "yes".into();
    let (code, out, _) = virtnode(
        &["baseline", "--format", "libvirt", "--nodes", "-"],
        &list(&[item]),
    );
    assert_eq!(code, 0);
    assert!(!out.contains("evil") && !out.contains('\u{1b}'), "{out}");
}

#[test]
fn several_vendors_are_warned_of() {
    let mut items = two();
    items[3]["status"]["cpu"]["vendor"] = "AMD".into();
    let (code, out, err) = virtnode(
        &["baseline", "--format", "libvirt", "--nodes", "-"],
        &list(&items),
    );
    assert_eq!(code, 0);
    assert!(out.starts_with("<cpu"), "{out}");
    assert!(
        err.contains("the CPUs are of different vendors (AMD, Intel)"),
        "{err}"
    );
    assert_eq!(
        ask(&["compare", "a", "b"], &list(&items)).1["relation"],
        "incompatible"
    );
}

#[test]
fn comparison_names_what_is_missing_and_where_it_comes_from() {
    let input = list(&two());
    let (code, answer, _) = ask(&["compare", "a", "b"], &input);
    assert_eq!((code, &answer["relation"]), (0, &json!("superset")));
    let words = "The CPU provided by hypervisor on b is a superset of CPU described in a";
    assert_eq!(answer["directions"][0]["words"], words);
    assert_eq!(answer["directions"][1]["answer"], "incompatible");
    assert_eq!(answer["directions"][1]["models"], json!(["Westmere"]));
    let (_, text, _) = virtnode(&["compare", "b", "a", "--nodes", "-"], &input);
    assert!(
        text.starts_with("a gives only a part of b's CPU, and nothing more (subset).\n"),
        "{text}"
    );
    assert!(
        text.contains("  a lacks pclmuldq (CPU generation); md-clear (microcode)\n"),
        "{text}"
    );
    for (pair, relation) in [(["a", "a"], "identical"), (["b", "a"], "subset")] {
        let (code, answer, _) = ask(&["compare", pair[0], pair[1]], &input);
        assert_eq!((code, &answer["relation"]), (0, &json!(relation)));
    }
    let (code, _, err) = virtnode(&["compare", "a", "--nodes", "-"], &input);
    assert_eq!(code, 2);
    assert!(err.contains("name two nodes"), "{err}");
}

#[test]
fn domain_is_compared_with_what_a_node_gives() {
    let mut items = two();
    let guests = json!([{"architecture": "x86_64", "domainTypes": ["kvm"],
        "machines": [{"name": "pc-q35-10.0", "maxVcpus": 255}]}]);
    for item in &mut items[2..] {
        item["status"]["guests"] = guests.clone();
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("nodes.json");
    std::fs::write(&file, list(&items)).unwrap();
    let file = file.to_str().unwrap();
    let domain = "<domain type='kvm'><name>vm</name><memory unit='GiB'>1</memory><vcpu>2</vcpu>\
                  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>\
                  <cpu mode='custom' match='exact' check='partial'><model>Nehalem</model>\
                  <feature policy='require' name='md-clear'/></cpu></domain>";
    let ask = |names: &[&str]| {
        let rest = ["--nodes", file, "--domain-xml", "-"];
        virtnode(&[&["compare"], names, &rest].concat(), domain)
    };
    let (code, out, err) = ask(&["b"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(
        out.starts_with("b has all that domain vm needs.\n"),
        "{out}"
    );
    let (code, out, err) = ask(&["b", "a"]);
    assert_eq!(code, 4, "{out}{err}");
    assert!(out.contains("a lacks what domain vm needs:\n"), "{out}");
    assert!(out.contains("md-clear"), "{out}");
    let (code, out, _) = ask(&["nowhere"]);
    assert_eq!(code, 6);
    assert!(
        out.contains("nowhere does not exist: it is not known what it gives."),
        "{out}"
    );
}
