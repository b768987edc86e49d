//! Definitions of the custom resources, printed and on real API servers.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, ensure};
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use virtnode::cluster::objects::{DomainHotplug, definitions};

use crate::support::kube::KubeServer;
use crate::support::kube::objects::define;

fn printed() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .env_clear()
        .arg("crd")
        .output()
        .unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn committed_definitions_equal_the_printed_ones() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/base/crds.yaml");
    let committed = fs::read_to_string(path).unwrap();
    assert_eq!(
        committed,
        printed(),
        "run `virtnode crd >manifests/base/crds.yaml`"
    );
}

#[test]
fn each_field_has_a_description() {
    fn explained(path: &str, schema: &Value) {
        let text = schema["description"].as_str().unwrap_or_default();
        assert!(text.len() > 4 && text.ends_with('.'), "{path}: {text:?}");
        let fields = schema["properties"].as_object().into_iter().flatten();
        for (name, field) in fields {
            explained(&format!("{path}.{name}"), field);
        }
        if schema["items"]["properties"].is_object() {
            explained(&format!("{path}[]"), &schema["items"]);
        }
    }
    for definition in definitions() {
        let kind = definition["spec"]["names"]["kind"].as_str().unwrap();
        for version in definition["spec"]["versions"].as_array().unwrap() {
            explained(kind, &version["schema"]["openAPIV3Schema"]);
        }
    }
}

fn hotplug(name: &str, spec: Value) -> DomainHotplug {
    let mut object = json!({"apiVersion": "virtnode.io/v1alpha1", "kind": "DomainHotplug",
        "metadata": {"name": name, "labels": {"virtnode.io/node": "node-a"}}, "spec": {}});
    object["spec"] = spec;
    serde_json::from_value(object).unwrap()
}

fn vcpus() -> Value {
    json!({"nodeName": "node-a", "domain": {"name": "vm1"}, "vcpus": {"count": 4, "online": true}})
}

/// Creates an object from untyped JSON, because the type cannot represent all invalid specs.
async fn create(server: &KubeServer, name: &str, spec: Value) -> anyhow::Result<Value> {
    let object = json!({"apiVersion": "virtnode.io/v1alpha1", "kind": "DomainHotplug",
        "metadata": {"name": name}, "spec": spec});
    let request = http::Request::post("/apis/virtnode.io/v1alpha1/domainhotplugs")
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&object)?)?;
    Ok(server.client().request(request).await?)
}

#[tokio::test]
async fn api_server_rejects_invalid_specs() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    define(&server).await?;
    // x-kubernetes-validations: beta and enabled by default since 1.25.
    let knows_rules = server.version() >= (1, 25);

    let objects: Api<DomainHotplug> = Api::all(server.client());
    let post = PostParams::default();
    let made = objects.create(&post, &hotplug("sound", vcpus())).await?;
    assert_eq!(made.spec.deadline_seconds, 120);
    assert_eq!(made.spec.starting_deadline_seconds, 600);
    assert_eq!(serde_json::to_value(made.spec.require)?, "Online");

    let wrong = |change: fn(&mut Value)| {
        let mut spec = vcpus();
        change(&mut spec);
        spec
    };
    let everywhere = [
        ("zero", wrong(|spec| spec["vcpus"]["count"] = 0.into())),
        ("text", wrong(|spec| spec["vcpus"]["count"] = "4".into())),
        ("no-count", wrong(|spec| spec["vcpus"] = json!({}))),
        ("late", wrong(|spec| spec["deadlineSeconds"] = 3601.into())),
        (
            "no-start",
            wrong(|spec| spec["startingDeadlineSeconds"] = 0.into()),
        ),
        ("never", wrong(|spec| spec["deadlineSeconds"] = 0.into())),
        (
            "forever",
            wrong(|spec| spec["ttlSecondsAfterFinished"] = (-1).into()),
        ),
        ("level", wrong(|spec| spec["require"] = "online".into())),
        (
            "uuid",
            wrong(|spec| spec["domain"] = json!({"uuid": "vm1"})),
        ),
        ("nowhere", wrong(|spec| spec["nodeName"] = "".into())),
        (
            "no-domain",
            json!({"nodeName": "node-a", "vcpus": {"count": 4}}),
        ),
        (
            "bare",
            json!({"nodeName": "node-a", "domain": {"name": "vm1"}, "memory": {"size": "2147483648"}}),
        ),
        (
            "decimal",
            json!({"nodeName": "node-a", "domain": {"name": "vm1"}, "memory": {"size": "2G"}}),
        ),
    ];
    for (name, spec) in everywhere {
        let refused = create(&server, name, spec).await;
        let error = refused
            .err()
            .with_context(|| format!("{name} is accepted"))?;
        ensure!(error.to_string().contains("spec"), "{name}: {error}");
    }
    let by_rules = [
        (
            "two",
            wrong(|spec| spec["memory"] = json!({"size": "2Gi"})),
            "exactly one of vcpus and memory",
        ),
        (
            "none",
            wrong(|spec| drop(spec.as_object_mut().map(|spec| spec.remove("vcpus")))),
            "exactly one of vcpus and memory",
        ),
        (
            "nobody",
            wrong(|spec| spec["domain"] = json!({})),
            "exactly one of name and uuid",
        ),
        (
            "both",
            wrong(|spec| spec["domain"]["uuid"] = "2c298bd7-db31-43ec-8ced-225aa039f21b".into()),
            "exactly one of name and uuid",
        ),
        (
            "no-name",
            wrong(|spec| {
                let uuid = "2c298bd7-db31-43ec-8ced-225aa039f21b";
                spec["domain"] = json!({"namespace": "tenant-a", "uuid": uuid});
            }),
            "a namespace needs a name",
        ),
    ];
    for (name, spec, expected) in by_rules {
        match create(&server, name, spec).await {
            Ok(_) => ensure!(!knows_rules, "{name} is accepted"),
            Err(error) => ensure!(error.to_string().contains(expected), "{name}: {error}"),
        }
    }

    let change = Patch::Merge(json!({"spec": {"vcpus": {"count": 5}}}));
    let changed = objects
        .patch("sound", &PatchParams::default(), &change)
        .await;
    match changed {
        Ok(changed) => {
            ensure!(!knows_rules, "a spec was changed");
            // The daemon detects the change by the generation.
            assert_eq!(changed.metadata.generation, Some(2));
        }
        Err(error) => ensure!(
            error.to_string().contains("create another object"),
            "{error}"
        ),
    }
    Ok(())
}

#[tokio::test]
async fn printer_columns_show_request_and_verdict() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    define(&server).await?;
    let objects: Api<DomainHotplug> = Api::all(server.client());
    let post = PostParams::default();
    let mut by_name = vcpus();
    by_name["domain"]["namespace"] = "tenant-a".into();
    objects.create(&post, &hotplug("a", by_name)).await?;
    let uuid = "2c298bd7-db31-43ec-8ced-225aa039f21b";
    let by_uuid =
        json!({"nodeName": "node-b", "domain": {"uuid": uuid}, "memory": {"size": "2Gi"}});
    objects.create(&post, &hotplug("b", by_uuid)).await?;
    let status = json!({"status": {"request": "vcpus=4", "verdict": "GuestRefused", "conditions": [
        {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "m", "lastTransitionTime": "2026-11-21T11:22:46Z"},
        {"type": "Succeeded", "status": "False", "reason": "GuestRefused", "message": "m", "lastTransitionTime": "2026-11-21T11:22:46Z"}]}});
    let params = PatchParams::default();
    objects
        .patch_status("a", &params, &Patch::Merge(status))
        .await?;

    let request = http::Request::get("/apis/virtnode.io/v1alpha1/domainhotplugs")
        .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
        .body(Vec::new())?;
    let table: Value = server.client().request(request).await?;
    let shown = |column: &&Value| column["priority"] == 0;
    let columns = table["columnDefinitions"]
        .as_array()
        .context("no columns")?;
    let names: Vec<_> = columns
        .iter()
        .filter(shown)
        .map(|it| it["name"].clone())
        .collect();
    assert_eq!(
        names,
        ["Name", "NODE", "DOMAIN", "REQUEST", "VERDICT", "AGE"]
    );
    let cells = |row: usize| table["rows"][row]["cells"].as_array().unwrap()[..5].to_vec();
    assert_eq!(cells(0), ["a", "node-a", "vm1", "vcpus=4", "GuestRefused"]);
    let empty = Value::Null;
    assert_eq!(
        cells(1),
        [
            json!("b"),
            json!("node-b"),
            json!(uuid),
            empty.clone(),
            empty
        ]
    );

    let by_node = ListParams::default().fields("spec.nodeName=node-b");
    match objects.list(&by_node).await {
        Ok(found) => {
            let names: Vec<_> = found
                .items
                .iter()
                .map(|it| it.metadata.name.clone())
                .collect();
            assert_eq!(names, [Some("b".to_owned())]);
        }
        // selectableFields: beta and enabled by default since 1.31.
        Err(error) => ensure!(server.version() < (1, 31), "{error}"),
    }
    Ok(())
}
