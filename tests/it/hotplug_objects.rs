//! DomainHotplug objects on a real API server, with an in-memory hypervisor, and with the daemon, a
//! real libvirtd and real Linux guests.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use virtnode::cluster::objects::{DomainHotplug, DomainHotplugStatus};
use virtnode::cluster::{Cluster, ClusterConfig, ClusterError, HotplugObjects, ObjectId};

use crate::support::controller::{HotplugNode, becomes, condition};
use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::fake_domains::{Cpus, FakeGuest};
use crate::support::guest::{Guest, GuestConfig};
use crate::support::kube::KubeServer;
use crate::support::kube::objects::define;
use crate::support::libvirtd::Libvirtd;

/// Timeout for fast actions; only a failing test waits this long.
const LONG: Duration = Duration::from_secs(90);

const NODE: &str = "node-a";

fn object(name: &str, domain: &str, count: u32) -> Value {
    json!({"apiVersion": "virtnode.io/v1alpha1", "kind": "DomainHotplug",
        "metadata": {"name": name, "labels": {"virtnode.io/node": NODE}},
        "spec": {"nodeName": NODE, "domain": {"name": domain}, "vcpus": {"count": count},
            "deadlineSeconds": 60}})
}

/// A Kubernetes with the definitions and a Node.
struct Lab {
    server: KubeServer,
    objects: Api<DynamicObject>,
}

impl Lab {
    async fn start() -> anyhow::Result<Self> {
        let server = KubeServer::start().await?;
        define(&server).await?;
        server.create_node(NODE).await?;
        let kind = kube::api::ApiResource::erase::<DomainHotplug>(&());
        let objects = Api::all_with(server.client(), &kind);
        Ok(Self { server, objects })
    }

    async fn cluster(&self, node: &str) -> anyhow::Result<Cluster> {
        let config = ClusterConfig {
            kubeconfig: Some(self.server.kubeconfig().to_owned()),
            ..ClusterConfig::new(node)
        };
        Ok(Cluster::connect(config).await?)
    }

    async fn make(&self, object: Value) -> anyhow::Result<Value> {
        let object = serde_json::from_value(object)?;
        let made = self.objects.create(&PostParams::default(), &object).await?;
        Ok(serde_json::to_value(made)?)
    }

    async fn get(&self, name: &str) -> anyhow::Result<Value> {
        Ok(serde_json::to_value(self.objects.get(name).await?)?)
    }

    async fn when(&self, name: &str, is: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        becomes(async || self.get(name).await, is).await
    }

    async fn finished(&self, name: &str) -> anyhow::Result<Value> {
        self.when(name, |it| it["status"]["verdict"].is_string())
            .await
    }

    async fn is_deleted(&self, name: &str) -> anyhow::Result<()> {
        eventually(LONG, async || {
            ensure!(
                self.objects.get_opt(name).await?.is_none(),
                "it is still there"
            );
            Ok(())
        })
        .await
    }

    /// Returns the event about one object.
    async fn event_about(&self, name: &str) -> anyhow::Result<Event> {
        let events: Api<Event> = Api::namespaced(self.server.client(), "default");
        eventually(LONG, async || {
            let all = events.list(&ListParams::default()).await?.items;
            let about = |event: &Event| {
                let about = event.regarding.as_ref();
                about.and_then(|about| about.name.as_deref()) == Some(name)
            };
            let mut ours = all.into_iter().filter(about);
            let event = ours
                .next()
                .with_context(|| format!("no event about {name}"))?;
            ensure!(ours.next().is_none(), "more than one about {name}");
            Ok(event)
        })
        .await
    }

    /// Returns verb and subresource of a client's calls about one object and its events.
    async fn calls(&self, name: &str, agent: &str) -> anyhow::Result<Vec<(String, String)>> {
        let events = self.server.audit_events().await?;
        let of_event = format!("{name}.");
        let ours = events.iter().filter(|event| {
            let is_event = event.resource == "events" && event.name.starts_with(&of_event);
            event.user_agent.starts_with(agent)
                && (event.name == name || is_event)
                && event.stage == "ResponseComplete"
        });
        Ok(ours
            .map(|event| (event.verb.clone(), event.subresource.clone()))
            .collect())
    }
}

fn verdict(object: &Value) -> &str {
    object["status"]["verdict"].as_str().unwrap_or_default()
}

fn running(object: &Value) -> bool {
    let (_, reason) = condition(object, "Succeeded").unwrap_or_default();
    reason == "Running"
}

fn guest(cpus: Cpus) -> FakeGuest {
    FakeGuest {
        cpus,
        ..FakeGuest::default()
    }
}

#[tokio::test]
async fn object_costs_few_calls_and_is_owned_by_the_node() -> anyhow::Result<()> {
    let lab = Lab::start().await?;
    let node = HotplugNode::start(lab.cluster(NODE).await?);
    node.control.add("accepts", guest(Cpus::Onlines));
    node.control.add("refuses", guest(Cpus::ThrowsAway));
    node.control.add("waits", guest(Cpus::LeavesOffline));

    lab.make(object("accepts", "accepts", 3)).await?;
    lab.make(object("refuses", "refuses", 3)).await?;
    lab.make(object("infeasible", "accepts", 99)).await?;
    lab.make(object("waits", "waits", 3)).await?;
    let mut short = object("short", "accepts", 3);
    short["spec"]["ttlSecondsAfterFinished"] = 1.into();
    lab.make(short).await?;
    // Objects of another node, by label or spec.
    let mut unlabelled = object("unlabelled", "accepts", 4);
    unlabelled["metadata"]["labels"] = json!({});
    lab.make(unlabelled).await?;
    let mut theirs = object("theirs", "accepts", 4);
    theirs["metadata"]["labels"]["virtnode.io/node"] = "node-b".into();
    theirs["spec"]["nodeName"] = "node-b".into();
    lab.make(theirs).await?;
    let mut mismatch = object("mismatch", "accepts", 4);
    mismatch["spec"]["nodeName"] = "node-b".into();
    lab.make(mismatch).await?;

    for (name, expected) in [
        ("accepts", "Verified"),
        ("refuses", "GuestRefused"),
        ("infeasible", "Infeasible"),
        ("waits", "GuestOffline"),
    ] {
        let ended = lab.finished(name).await?;
        assert_eq!(verdict(&ended), expected, "{ended:#}");
        assert_eq!(condition(&ended, "Succeeded").unwrap().1, expected);
        assert_eq!(ended["status"]["observedGeneration"], 1);
    }
    let found = lab
        .when("mismatch", |it| condition(it, "Accepted").is_some())
        .await?;
    let refused = ("False".to_owned(), "WrongNode".to_owned());
    assert_eq!(condition(&found, "Accepted"), Some(refused));
    lab.is_deleted("short").await?;

    let nodes: Api<Node> = Api::all(lab.server.client());
    let uid = nodes.get(NODE).await?.metadata.uid;
    let owned =
        |it: &Value| it["metadata"]["ownerReferences"][0]["uid"] == uid.clone().unwrap_or_default();
    lab.when("accepts", owned).await?;
    for name in ["unlabelled", "theirs"] {
        let untouched = lab.get(name).await?;
        assert!(untouched["status"].is_null(), "{untouched:#}");
        assert!(
            untouched["metadata"]["ownerReferences"].is_null(),
            "{untouched:#}"
        );
    }

    for (name, expected) in [
        ("accepts", "Verified"),
        ("refuses", "GuestRefused"),
        ("infeasible", "Infeasible"),
        ("waits", "GuestOffline"),
        ("short", "Verified"),
        ("mismatch", "WrongNode"),
    ] {
        let kind = match expected {
            "Verified" => "Normal",
            _ => "Warning",
        };
        let event = lab.event_about(name).await?;
        assert_eq!(event.type_.as_deref(), Some(kind), "{event:#?}");
        assert_eq!(event.reason.as_deref(), Some(expected), "{event:#?}");
        assert!(event.note.is_some_and(|note| note.len() > 10));

        let calls = lab.calls(name, "virtnode/").await?;
        assert!(
            calls.contains(&("patch".into(), "status".into())),
            "{name}: {calls:?}"
        );
        // The requester's creation, and the event about the Node.
        let others = 1 + usize::from(!["Verified", "WrongNode"].contains(&expected));
        assert!(calls.len() + others <= 8, "{name}: {calls:?}");
    }
    // The start of a bookmark's line, by which dead watches are detected. A bookmark takes a minute,
    // but servers with watch lists send one at once.
    if lab.server.version() >= (1, 34) {
        let watch = "/apis/virtnode.io/v1alpha1/domainhotplugs?watch=true&allowWatchBookmarks=true\
             &sendInitialEvents=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=2";
        let request = http::Request::get(watch).body(Vec::new())?;
        let heard = lab.server.client().request_text(request).await?;
        let is_bookmark = |line: &str| line.starts_with("{\"type\":\"BOOKMARK\",");
        assert!(heard.lines().any(is_bookmark), "{heard}");
    }

    let events = lab.server.audit_events().await?;
    let asked = events.iter().filter(|event| {
        event.user_agent.starts_with("virtnode/") && event.resource == "domainhotplugs"
    });
    for event in asked.filter(|event| ["list", "watch"].contains(&event.verb.as_str())) {
        assert!(
            event
                .uri
                .contains("labelSelector=virtnode.io%2Fnode%3Dnode-a"),
            "{}",
            event.uri
        );
    }
    Ok(())
}

#[tokio::test]
async fn restarts_and_outages_lose_nothing() -> anyhow::Result<()> {
    let mut lab = Lab::start().await?;
    let mut node = HotplugNode::start(lab.cluster(NODE).await?);
    node.control.add("vm", guest(Cpus::LeavesOffline));

    // The daemon stops during the operation.
    lab.make(object("restart", "vm", 2)).await?;
    lab.when("restart", running).await?;
    node.stop().await;
    node.start_again();
    let ended = lab.finished("restart").await?;
    assert_eq!(verdict(&ended), "GuestOffline", "{ended:#}");
    assert_eq!(node.operations_of("restart").len(), 1);

    // The API server stops during the operation, then the daemon.
    lab.make(object("away", "vm", 3)).await?;
    lab.make(object("away-too", "vm", 4)).await?;
    lab.when("away", running).await?;
    lab.server.stop_api();
    eventually(LONG, async || {
        let done = |name| {
            node.operations_of(name)
                .iter()
                .any(|record| record.is_done())
        };
        ensure!(done("away"), "not done yet");
        Ok(())
    })
    .await?;
    node.stop().await;
    node.start_again();
    lab.server.start_api().await?;
    let ended = lab.finished("away").await?;
    assert_eq!(
        ended["status"]["operation"],
        node.operations_of("away")[0].id.as_str()
    );
    lab.finished("away-too").await?;
    let set = |count: u32| format!("set-vcpus vm {count}");
    assert_eq!(
        node.control.calls(),
        [2, 3, 4].map(set),
        "each done once, in order"
    );

    // The object is deleted during the operation.
    node.control.add("other", guest(Cpus::LeavesOffline));
    lab.make(object("deleted", "other", 3)).await?;
    lab.when("deleted", running).await?;
    lab.objects
        .delete("deleted", &DeleteParams::default())
        .await?;
    eventually(LONG, async || {
        let record = &node.operations_of("deleted")[0];
        ensure!(record.is_done(), "not done yet: {record:#?}");
        Ok(())
    })
    .await?;
    let deleted = lab.objects.get_opt("deleted").await?;
    assert!(
        deleted.is_none(),
        "the deleted object is not recreated: {deleted:#?}"
    );

    // The spec is changed, where the API server allows it.
    lab.make(object("changed", "other", 4)).await?;
    let change = Patch::Merge(json!({"spec": {"vcpus": {"count": 2}}}));
    let changed = lab
        .objects
        .patch("changed", &PatchParams::default(), &change)
        .await;
    let ended = lab.finished("changed").await?;
    if changed.is_ok() {
        let found = lab
            .when("changed", |it| {
                condition(it, "Accepted").is_some_and(|(_, reason)| reason == "SpecChanged")
            })
            .await;
        // The change may come before the daemon accepts the object.
        ensure!(
            found.is_ok() || ended["status"]["observedGeneration"] == 2,
            "{ended:#}"
        );
    } else {
        assert_eq!(ended["status"]["requested"]["vcpus"], 4);
    }
    Ok(())
}

#[tokio::test]
async fn writes_never_reach_another_object_of_the_same_name() -> anyhow::Result<()> {
    let lab = Lab::start().await?;
    let objects = HotplugObjects::new(&lab.cluster(NODE).await?);
    let status = DomainHotplugStatus {
        message: Some("of another".to_owned()),
        ..DomainHotplugStatus::default()
    };
    let is_gone = |call: &str, result: Result<(), ClusterError>| match result {
        Err(ClusterError::NotFound { .. }) => Ok(()),
        Err(ClusterError::Conflict { message, .. }) => {
            let by_version = call.starts_with("status") && message.contains("modified");
            let by_uid = message.to_lowercase().contains("uid");
            ensure!(by_version || by_uid, "{call}: {message}");
            Ok(())
        }
        other => Err(anyhow::anyhow!("{call}: {other:?}")),
    };
    let uid = "0b9f2f3c-0000-4000-8000-000000000001";
    let target = ObjectId { name: "x", uid };
    let is_refused = async |when: &str, version: &str| {
        let status = objects.write_status(target, version, &status).await;
        is_gone(&format!("status {when}"), status.map(drop))?;
        let own = objects.set_owner(target, uid).await;
        is_gone(&format!("own {when}"), own.map(drop))?;
        is_gone(&format!("delete {when}"), objects.delete(target).await)
    };
    is_refused("of nothing", "1").await?;
    let nothing = lab.objects.get_opt("x").await?;
    assert!(nothing.is_none(), "no object is created");
    let made = lab.make(object("x", "vm", 3)).await?;
    is_refused("of another", "1").await?;
    let left = lab.get("x").await?;
    assert_eq!(
        left["metadata"]["resourceVersion"],
        made["metadata"]["resourceVersion"]
    );
    Ok(())
}

fn pair(status: &str, reason: &str) -> Option<(String, String)> {
    Some((status.to_owned(), reason.to_owned()))
}

#[tokio::test]
async fn long_node_name_selects_objects_by_field_where_supported() -> anyhow::Result<()> {
    let lab = Lab::start().await?;
    let long = format!("node-{}.example.org", "x".repeat(60));
    // Without the host name label, whose value would be too long.
    let nodes: Api<Node> = Api::all(lab.server.client());
    let wanted = serde_json::from_value(json!({"metadata": {"name": long}}))?;
    nodes.create(&PostParams::default(), &wanted).await?;
    let node = HotplugNode::start(lab.cluster(&long).await?);
    node.control.add("vm", guest(Cpus::Onlines));
    let mut wanted = object("long", "vm", 3);
    wanted["metadata"]["labels"] = json!({});
    wanted["spec"]["nodeName"] = long.clone().into();
    lab.make(wanted).await?;
    // selectableFields: beta and enabled by default since 1.31.
    if lab.server.version() >= (1, 31) {
        let ended = lab.finished("long").await?;
        assert_eq!(verdict(&ended), "Verified", "{ended:#}");
        assert_eq!(node.metric("virtnode_hotplug_objects_watched"), 1.0);
        assert_eq!(node.watch_condition(), pair("True", "Watched"));
        return Ok(());
    }
    let failures =
        "virtnode_hotplug_object_call_failures_total{call=\"watch\",reason=\"api-rejected\"}";
    eventually(LONG, async || {
        ensure!(node.metric(failures) >= 1.0, "not asked yet");
        let found = node.watch_condition();
        ensure!(found == pair("False", "NodeNameTooLong"), "{found:?}");
        Ok(())
    })
    .await?;
    assert_eq!(node.metric("virtnode_hotplug_objects_watched"), 0.0);
    assert!(lab.get("long").await?["status"].is_null());
    Ok(())
}

#[tokio::test]
async fn verdicts_match_the_state_of_real_guests() -> anyhow::Result<()> {
    let lab = Lab::start().await?;
    let libvirtd = Libvirtd::start()?;
    let accepts = GuestConfig {
        name: "accepts",
        words: "lab.cpus=online lab.blocks=online",
        ..GuestConfig::default()
    };
    let refuses = GuestConfig {
        name: "refuses",
        words: "nr_cpus=1",
        ..GuestConfig::default()
    };
    let (accepts, refuses) = tokio::join!(
        Guest::start(&libvirtd, &accepts),
        Guest::start(&libvirtd, &refuses)
    );
    let (accepts, refuses) = (accepts?, refuses?);

    let kubeconfig = lab
        .server
        .kubeconfig()
        .to_str()
        .context("a path")?
        .to_owned();
    let arguments = [
        "--publish",
        "node",
        "--kubeconfig",
        &kubeconfig,
        "--node-name",
        NODE,
        "--start-jitter",
        "0",
    ];
    let daemon = Daemon::start(&libvirtd.uri(), &arguments).await?;
    daemon.ready().await?;

    lab.make(object("cpus", "accepts", 3)).await?;
    lab.make(object("too-many", "accepts", 99)).await?;
    lab.make(object("refused", "refuses", 3)).await?;
    let cpus = lab.finished("cpus").await?;
    assert_eq!(verdict(&cpus), "Verified", "{cpus:#}");
    // Its console is later than its agent.
    accepts.sees(|sees| sees.online == "0-2").await?;
    assert_eq!(cpus["status"]["after"]["vcpus"], 3);
    let refused = lab.finished("refused").await?;
    assert_eq!(verdict(&refused), "GuestRefused", "{refused:#}");
    assert_eq!(refuses.witness()?.online, "0");
    let remedy = refused["status"]["diagnosis"]["remedy"].as_str();
    assert!(
        remedy.is_some_and(|remedy| remedy.contains("nr_cpus")),
        "{refused:#}"
    );
    let too_many = lab.finished("too-many").await?;
    assert_eq!(verdict(&too_many), "Infeasible", "{too_many:#}");
    let message = too_many["status"]["message"].as_str();
    assert!(
        message.is_some_and(|message| message.contains('4')),
        "the maximum: {message:?}"
    );
    for (name, reason) in [
        ("cpus", "Verified"),
        ("refused", "GuestRefused"),
        ("too-many", "Infeasible"),
    ] {
        let event = lab.event_about(name).await?;
        assert_eq!(event.reason.as_deref(), Some(reason), "{event:#?}");
    }

    // The next daemon finds all operations finished.
    let (status, directory) = daemon.stop().await?;
    assert!(status.success());
    let daemon = Daemon::start_in(directory, &libvirtd.uri(), &arguments).await?;
    daemon.ready().await?;
    let mut memory = object("memory", "accepts", 1);
    memory["spec"]["vcpus"] = Value::Null;
    memory["spec"]["memory"] = json!({"size": "1Gi"});
    lab.make(memory).await?;
    let memory = lab.finished("memory").await?;
    assert_eq!(verdict(&memory), "Verified", "{memory:#}");
    assert_eq!(memory["status"]["requested"], json!({"memory": "1Gi"}));
    assert_eq!(lab.get("cpus").await?["status"], cpus["status"]);
    let plugged =
        "virtnode_hotplug_results_total{action=\"plug\",resource=\"vcpus\",verdict=\"Verified\"}";
    assert_eq!(daemon.metric(plugged)?, 0.0, "no operation was repeated");
    Ok(())
}
