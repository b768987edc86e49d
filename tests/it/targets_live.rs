//! `virtnode targets` for a running domain, and the command's exit codes.

use std::fs;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::support::libvirtd::Libvirtd;
use crate::targets::{domain, labels, virtnode};

/// Returns the output of `kubectl get nodes -o json` for nodes with these labels.
fn list(nodes: &[(&str, &Value)]) -> String {
    let items: Vec<Value> = nodes
        .iter()
        .map(|(name, labels)| {
            json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            })
        })
        .collect();
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}

fn without(labels: &Value, keys: &[&str]) -> Value {
    let mut labels = labels.clone();
    for key in keys {
        let labels = labels.as_object_mut().unwrap();
        labels.remove(*key).unwrap_or_else(|| panic!("{key}"));
    }
    labels
}

#[test]
fn running_domain_is_compared_by_its_live_xml() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let uri = libvirtd.uri();
    let (code, out, err) = virtnode(&["labels", "--connect", &uri, "--output", "json"], "");
    ensure!(code == 0, "{err}");
    let mut own = serde_json::from_str::<Value>(&out)?["labels"].take();
    own["kubernetes.io/arch"] = "amd64".into();
    let kind = match own["virtnode.io/accelerator"].as_str() {
        Some("kvm") => "kvm",
        _ => "qemu",
    };
    // libvirt resolves alias and host-model when it starts the domain.
    let xml = format!(
        "<domain type='{kind}'><name>web</name><memory unit='MiB'>32</memory>\
         <vcpu current='1'>4</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <features><acpi/></features><cpu mode='host-model'/></domain>"
    );
    let file = libvirtd.directory().join("web.xml");
    fs::write(&file, xml)?;
    libvirtd.virsh(&["create", &file.to_string_lossy()])?;
    let live = libvirtd.virsh(&["dumpxml", "web"])?;
    let machine = live
        .split("machine='")
        .nth(1)
        .and_then(|rest| rest.split('\'').next());
    let machine = machine.context("no machine type")?;
    ensure!(machine != "q35", "libvirt keeps the alias: {live}");
    let machine = format!("machine.virtnode.io/{machine}");
    let feature = live.split("<feature policy='require' name='").nth(1);
    let feature = feature
        .and_then(|rest| rest.split('\'').next())
        .context("no feature")?;
    let feature = format!("cpu-feature.virtnode.io/{feature}");

    let mut small = own.clone();
    small[&machine] = "3".into();
    let nodes = list(&[
        ("here", &own),
        ("like-it", &own),
        ("small", &small),
        ("without-feature", &without(&own, &[&feature])),
        ("without-machine", &without(&own, &[&machine])),
        ("without-anything", &json!({"kubernetes.io/arch": "amd64"})),
    ]);
    let of = [
        "targets",
        "web",
        "--connect",
        &uri,
        "--node-name",
        "here",
        "--nodes",
        "-",
    ];
    let (code, out, err) = virtnode(&[&of[..], &["--output", "json"]].concat(), &nodes);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let answer: Value = serde_json::from_str(&out)?;
    assert_eq!(answer["domain"], "web");
    assert_eq!(answer["fitting"], 2, "{answer:#}\n{live}");
    let rows: Vec<(&Value, &Value, &Value)> = answer["nodes"]
        .as_array()
        .context("nodes")?
        .iter()
        .map(|node| (&node["name"], &node["answer"], &node["findings"][0]["code"]))
        .collect();
    let there: Vec<(&Value, &Value)> = rows.iter().map(|row| (row.0, row.1)).collect();
    let [yes, no] = ["feasible", "infeasible"].map(Value::from);
    let names = [
        "like-it",
        "here",
        "small",
        "without-machine",
        "without-feature",
    ]
    .map(Value::from);
    let answers = [&yes, &yes, &no, &no, &no];
    assert_eq!(
        there,
        names.iter().zip(answers).collect::<Vec<_>>(),
        "{answer:#}\n{live}"
    );
    assert_eq!(answer["nodes"][1]["states"], json!(["runs-here"]));
    let codes: Vec<&Value> = rows[2..].iter().map(|row| row.2).collect();
    assert_eq!(
        codes,
        ["vcpus-machine", "machine", "cpu-feature"],
        "{answer:#}"
    );
    assert_eq!(
        (&answer["named"], &answer["untold"]),
        (&json!([]), &json!(["without-anything"]))
    );

    // The table shows the same, and --affinity prints only the affinity.
    let (code, out, _) = virtnode(&of, &nodes);
    assert_eq!(code, 0);
    assert!(
        out.starts_with("2 of 5 nodes fit domain web; best first:\n\nNODE "),
        "{out}"
    );
    assert!(out.contains("runs here now"), "{out}");
    let (code, out, err) = virtnode(&[&of[..], &["--affinity"]].concat(), &nodes);
    assert_eq!((code, err.as_str()), (0, ""));
    let alone: Value = serde_saphyr::from_str(&out)?;
    assert_eq!(
        alone,
        json!({"affinity": {"nodeAffinity": answer["affinity"]}})
    );

    // Without a fitting node the exit code is 4, even though the affinity may match later nodes.
    let (code, out, err) = virtnode(
        &of,
        &list(&[("without-machine", &without(&own, &[&machine]))]),
    );
    assert_eq!((code, err.as_str()), (4, ""), "{out}");
    assert!(
        out.starts_with("None of 1 nodes is known to fit domain web"),
        "{out}"
    );

    let (code, out, err) = virtnode(
        &["targets", "wep", "--connect", &uri, "--nodes", "-"],
        &nodes,
    );
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(
        err.contains("domain 'wep' is not running here (running: web)"),
        "{err}"
    );
    Ok(())
}

#[test]
fn each_outcome_has_its_exit_code() {
    let new = labels("new");
    let nodes = list(&[("new", &new), ("old", &labels("old"))]);
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = directory.path().join(name);
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let nodes = write("nodes.json", &nodes);
    let unknown = write(
        "unknown.json",
        &list(&[("new", &without(&new, &["virtnode.io/accelerator"]))]),
    );
    let unlabeled = write(
        "unlabeled.json",
        &list(&[("new", &json!({"kubernetes.io/arch": "amd64"}))]),
    );
    let fits = write("fits.xml", &domain("kvm", "pc-q35-10.0", 2, ""));
    let fits_not = write("fits-not.xml", &domain("kvm", "pc-q35-99.0", 2, ""));
    let no_label = write("no-label.xml", &domain("kvm", "q35 with cream", 2, ""));
    let gone = "qemu+unix:///system?socket=/nonexistent";
    let no_config = directory
        .path()
        .join("no-kubeconfig")
        .to_str()
        .unwrap()
        .to_owned();
    for (code, arguments, says) in [
        (
            0,
            vec!["--domain-xml", &fits, "--nodes", &nodes],
            "1 of 2 nodes fit domain vm",
        ),
        (
            4,
            vec!["--domain-xml", &fits_not, "--nodes", &nodes],
            "None of 2 nodes is known to fit domain vm",
        ),
        (
            1,
            vec!["--domain-xml", &fits, "--nodes", &unknown],
            "None of 1 nodes is known to fit domain vm",
        ),
        (
            1,
            vec!["--domain-xml", &fits, "--nodes", &unlabeled],
            "No node has virtnode's labels",
        ),
        (
            4,
            vec!["--domain-xml", &no_label, "--nodes", &nodes],
            "No affinity: ",
        ),
        (
            4,
            vec!["--domain-xml", &no_label, "--nodes", &nodes, "--affinity"],
            "no affinity: no node fits",
        ),
        (
            5,
            vec!["web", "--connect", gone, "--nodes", &nodes],
            "/nonexistent",
        ),
        (
            1,
            vec!["--domain-xml", &fits, "--kubeconfig", &no_config],
            "no-kubeconfig",
        ),
        (2, vec![], "no domain given: name one that runs here"),
        (2, vec!["web", "--domain-xml", &fits], "cannot be used with"),
        (2, vec!["--domain-xml", "-", "--nodes", "-"], "not both"),
    ] {
        let (ended, out, err) = virtnode(&[&["targets"], &arguments[..]].concat(), "");
        assert_eq!(ended, code, "{arguments:?}\n{out}{err}");
        assert!(
            out.contains(says) || err.contains(says),
            "{arguments:?}\n{out}{err}"
        );
        let repeated = err.matches("No such file or directory").count();
        assert!(repeated < 2, "repeated {repeated} times: {err}");
    }
}

#[test]
fn bad_list_of_nodes_yields_one_error_line() {
    let directory = tempfile::tempdir().unwrap();
    let xml = directory.path().join("domain.xml");
    fs::write(&xml, domain("kvm", "q35", 2, "")).unwrap();
    let xml = xml.to_str().unwrap();
    for (text, sentence) in [
        (
            "",
            "standard input: contains no Node objects; `kubectl get nodes -o json` prints them",
        ),
        ("{}", "contains no Node objects"),
        (
            "NAME   STATUS\n",
            "standard input: is not the output of `kubectl get nodes -o json`: expected value at line 1 column 1",
        ),
        (r#"{"kind": "Node"}"#, "a Node has no metadata.name"),
        (
            r#"{"kind": "Node", "metadata": {"name": "a", "labels": {"x": 1}}}"#,
            "invalid type: integer `1`, expected a string",
        ),
        (
            r#"{"kind": "List", "items": [{"kind": "No"#,
            "EOF while parsing a string",
        ),
        ("\u{feff}{}", "expected value at line 1 column 1"),
    ] {
        let arguments = ["targets", "--domain-xml", xml, "--nodes", "-"];
        let (code, out, err) = virtnode(&arguments, text);
        assert_eq!((code, out.as_str()), (1, ""), "{text}");
        assert!(err.contains(sentence), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
    let (code, _, err) = virtnode(
        &["targets", "--domain-xml", xml, "--nodes", "/nonexistent"],
        "",
    );
    assert_eq!(code, 1);
    assert!(
        err.contains("cannot read /nonexistent: No such file"),
        "{err}"
    );
}
