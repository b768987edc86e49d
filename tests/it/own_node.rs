//! The daemon's rights: it uses all of them, needs no others, and its token is restricted to its own
//! node.

#![expect(clippy::print_stdout, reason = "refusals, for people to read")]

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use nix::unistd::Pid;
use serde_json::{Value, json};
use virtnode::cluster::objects::NodeVirtualization;
use virtnode::label::{KUBEVIRT_KEYS, KUBEVIRT_PREFIXES};

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::kube::{KubeServer, RIGHTS, documents};
use crate::support::libvirtd::Libvirtd;

const CRDS: &str = include_str!("../../manifests/base/crds.yaml");
const ADMISSION: &str = include_str!("../../manifests/base/admission.yaml");
const KUBEVIRT: &str = include_str!("../../manifests/overlays/kubevirt-labels/admission.yaml");

const USER: &str = "system:serviceaccount:virtnode:virtnode";
const Q35: &str = "machine-alias.virtnode.io/q35";
/// Timeout for fast actions; only a failing test waits this long.
const LONG: Duration = Duration::from_secs(90);

/// Verb, group, and resource with its subresource.
type Right = (String, String, String);

/// Returns the rights that the manifest grants to the daemon.
fn granted() -> anyhow::Result<BTreeSet<Right>> {
    let mut rights = BTreeSet::new();
    for role in documents(RIGHTS)? {
        let name = role["metadata"]["name"].as_str().unwrap_or_default();
        if !["virtnode", "virtnode-events"].contains(&name) {
            continue;
        }
        let texts = |rule: &Value, field: &str| -> Vec<String> {
            let texts = rule[field].as_array().into_iter().flatten();
            texts
                .filter_map(|text| text.as_str().map(str::to_owned))
                .collect()
        };
        for rule in role["rules"].as_array().into_iter().flatten() {
            for group in texts(rule, "apiGroups") {
                for resource in texts(rule, "resources") {
                    for verb in texts(rule, "verbs") {
                        rights.insert((verb, group.clone(), resource.clone()));
                    }
                }
            }
        }
    }
    Ok(rights)
}

/// Returns the rights that the daemon's requests needed so far, and the refused requests.
async fn used(server: &KubeServer) -> anyhow::Result<(BTreeSet<Right>, Vec<String>)> {
    let events = server.audit_events().await?;
    let mut rights = BTreeSet::new();
    let mut refused = Vec::new();
    for event in events.iter().filter(|event| event.user == USER) {
        let right = |verb: &str| {
            let resource = match event.subresource.as_str() {
                "" => event.resource.clone(),
                subresource => format!("{}/{subresource}", event.resource),
            };
            (verb.to_owned(), event.group.clone(), resource)
        };
        // A policy denies with 422. Up to 1.20.5 the first event about a Node yields 422 too.
        let is_first_try = event.resource == "events" && server.version() < (1, 21);
        let is_denied = event.code == 422 && !is_first_try;
        if matches!(event.code, 401 | 403) || is_denied {
            refused.push(format!("{} {}", event.verb, event.uri));
        } else {
            rights.insert(right(&event.verb));
        }
        // An apply may create the object.
        if event.verb == "patch" && event.code == 201 {
            rights.insert(right("create"));
        }
    }
    Ok((rights, refused))
}

/// Returns for each connection of a process to a local port whether TCP keepalive is active (timer 2
/// in `proc_net_tcp.rst`).
fn kept_alive(pid: Pid, port: &str) -> anyhow::Result<Vec<bool>> {
    let mut sockets = BTreeSet::new();
    for file in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // The file may have been closed in the meantime.
        if let Ok(target) = fs::read_link(file?.path()) {
            sockets.insert(target.to_string_lossy().into_owned());
        }
    }
    let remote = format!(":{:04X}", port.parse::<u16>()?);
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
    let connections = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = connections.filter(|fields| {
        let is_open = fields.get(3) == Some(&"01");
        let inode = fields.get(9).map(|inode| format!("socket:[{inode}]"));
        is_open && fields[2].ends_with(&remote) && inode.is_some_and(|it| sockets.contains(&it))
    });
    Ok(ours.map(|fields| fields[5].starts_with("02:")).collect())
}

async fn conflicts(server: &KubeServer) -> anyhow::Result<Vec<Event>> {
    let events: Api<Event> = Api::namespaced(server.client(), "default");
    let all = events.list(&ListParams::default()).await?.items;
    let is = |event: &Event| event.reason.as_deref() == Some("LabelConflict");
    Ok(all.into_iter().filter(is).collect())
}

fn hotplugs(client: kube::Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("virtnode.io", "v1alpha1", "DomainHotplug");
    Api::all_with(client, &ApiResource::from_gvk(&kind))
}

/// Creates an object that requests vCPUs for a domain that does not exist.
async fn create_hotplug(server: &KubeServer, name: &str, node: &Node) -> anyhow::Result<()> {
    let meta = &node.metadata;
    let object = serde_json::from_value(json!({
        "apiVersion": "virtnode.io/v1alpha1", "kind": "DomainHotplug",
        "metadata": {
            "name": name,
            "labels": {"virtnode.io/node": meta.name},
        },
        "spec": {
            "nodeName": meta.name,
            "domain": {"name": "nobody"},
            "vcpus": {"count": 2},
            // Long enough for the daemon to set the owner before it deletes the object.
            "ttlSecondsAfterFinished": 3,
        },
    }))?;
    hotplugs(server.client())
        .create(&PostParams::default(), &object)
        .await?;
    Ok(())
}

#[tokio::test]
async fn daemon_uses_exactly_its_rights() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let server = KubeServer::start().await?;
    server.apply_manifest(CRDS).await?;
    server.apply_manifest(RIGHTS).await?;
    if has_policies(&server).await? {
        server.apply_manifest(ADMISSION).await?;
    }
    let node = server.create_node("n1").await?;
    let kubeconfig = server.pod_kubeconfig("virtnode", "virtnode", "n1").await?;
    let kubeconfig = kubeconfig.to_str().context("a path")?;
    let arguments = [
        "--publish",
        "node",
        "--kubeconfig",
        kubeconfig,
        "--node-name",
        "n1",
        "--start-jitter",
        "0",
    ];
    let daemon = Daemon::start(&libvirtd.uri(), &arguments).await?;
    daemon.ready().await?;
    let objects: Api<NodeVirtualization> = Api::all(server.client());
    let object = eventually(LONG, async || Ok(objects.get("n1").await?)).await?;
    let facts = &object.spec.facts;
    ensure!(
        facts.conditions.iter().all(|condition| condition.holds()),
        "{facts:?}"
    );
    ensure!(facts.guests[0].machines.len() > 10);
    let size = serde_json::to_vec(&object)?.len();
    println!("the NodeVirtualization of this machine: {size} bytes");
    assert!(size < 64 * 1024);
    assert_eq!(facts.omitted, Vec::<String>::new());

    // TCP keepalive detects a dead peer on the connection of an idle watch.
    let config: Value = serde_json::from_slice(&fs::read(server.kubeconfig())?)?;
    let url = config["clusters"][0]["cluster"]["server"].as_str();
    let (_, port) = url.and_then(|url| url.rsplit_once(':')).context("a port")?;
    eventually(LONG, async || {
        let kept = kept_alive(daemon.pid()?, port)?;
        ensure!(kept.len() >= 3 && kept.iter().all(|kept| *kept), "{kept:?}");
        Ok(())
    })
    .await?;

    // A conflict, its end, and the same conflict again: an event, and its count of two.
    let nodes: Api<Node> = Api::all(server.client());
    let claim = async |labels: Value| {
        let patch = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"labels": labels}});
        let params = PatchParams::apply("gitops").force();
        nodes.patch("n1", &params, &Patch::Apply(patch)).await
    };
    claim(json!({Q35: "theirs"})).await?;
    eventually(LONG, async || {
        ensure!(conflicts(&server).await?.len() == 1, "no event yet");
        Ok(())
    })
    .await?;
    claim(json!({})).await?;
    eventually(LONG, async || {
        let labels = nodes.get("n1").await?.metadata.labels.unwrap_or_default();
        ensure!(
            labels.get(Q35).is_some_and(|value| value != "theirs"),
            "not back yet"
        );
        Ok(())
    })
    .await?;
    claim(json!({Q35: "theirs"})).await?;
    eventually(LONG, async || {
        let events = conflicts(&server).await?;
        let count = events[0].series.as_ref().map_or(1, |series| series.count);
        ensure!((events.len(), count) == (1, 2), "{events:?}");
        Ok(())
    })
    .await?;

    // An object that finishes and is deleted at once.
    create_hotplug(&server, "vcpus", &node).await?;
    // The daemon reads single objects only after a conflict, so the test does it.
    let pod = Pod::new(server.pod_client("virtnode", "virtnode", "n1").await?);
    pod.hotplugs.get_opt("vcpus").await?;
    eventually(LONG, async || {
        let left = hotplugs(server.client()).get_opt("vcpus").await?;
        ensure!(left.is_none(), "{left:?}");
        Ok(())
    })
    .await?;
    // Its verdict yields events about the Node and about the deleted object.
    let events: Api<Event> = Api::namespaced(server.client(), "default");
    eventually(LONG, async || {
        let all = events.list(&ListParams::default()).await?.items;
        let verdict = |event: &&Event| event.reason.as_deref() == Some("HotplugDomainNotFound");
        let event = all.iter().find(verdict).context("no event")?;
        let note = event.note.as_deref().unwrap_or_default();
        ensure!(note.starts_with("domain \"nobody\": "), "{note}");
        let about = |event: &&Event| {
            let about = event.regarding.as_ref();
            about.and_then(|about| about.name.as_deref()) == Some("vcpus")
        };
        let event = all
            .iter()
            .find(about)
            .context("no event about the object")?;
        ensure!(
            event.reason.as_deref() == Some("DomainNotFound"),
            "{event:?}"
        );
        Ok(())
    })
    .await?;
    daemon.stop().await?;

    let (used, refused) = used(&server).await?;
    assert_eq!(
        refused,
        Vec::<String>::new(),
        "what was asked for and is not granted"
    );
    let granted = granted()?;
    let beyond: Vec<_> = used.difference(&granted).collect();
    assert!(
        beyond.is_empty(),
        "used and not in the manifest: {beyond:?}"
    );
    let unused: Vec<_> = granted.difference(&used).collect();
    assert!(unused.is_empty(), "granted and not used: {unused:?}");
    Ok(())
}

pub(crate) async fn has_policies(server: &KubeServer) -> anyhow::Result<bool> {
    let version = "admissionregistration.k8s.io/v1";
    server.has(version, "validatingadmissionpolicies").await
}

/// Returns the denial of one of virtnode's policies; any other answer is an error.
pub(crate) fn is_denied<T: std::fmt::Debug>(answer: kube::Result<T>) -> anyhow::Result<String> {
    match answer {
        Err(kube::Error::Api(status))
            if status
                .message
                .contains("ValidatingAdmissionPolicy 'virtnode-") =>
        {
            println!("{}", status.message);
            Ok(status.message)
        }
        other => anyhow::bail!("not denied: {other:?}"),
    }
}

fn event(name: &str, controller: &str, instance: &str, about: Value) -> Event {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default"},
        "eventTime": "2026-11-21T12:00:00.000000Z",
        "type": "Warning", "reason": "Test", "action": "Test", "note": "a test",
        "reportingController": controller, "reportingInstance": instance, "regarding": about,
    }))
    .expect("an event")
}

/// A client with the token of the daemon's pod on a node.
struct Pod {
    nodes: Api<Node>,
    objects: Api<NodeVirtualization>,
    hotplugs: Api<DynamicObject>,
    events: Api<Event>,
}

impl Pod {
    fn new(client: kube::Client) -> Self {
        Self {
            nodes: Api::all(client.clone()),
            objects: Api::all(client.clone()),
            events: Api::namespaced(client.clone(), "default"),
            hotplugs: hotplugs(client),
        }
    }

    async fn merge(&self, node: &str, patch: Value) -> kube::Result<Node> {
        let patch = Patch::Merge(patch);
        self.nodes
            .patch(node, &PatchParams::default(), &patch)
            .await
    }

    async fn label(&self, node: &str, key: &str, value: Option<&str>) -> kube::Result<Node> {
        self.merge(node, json!({"metadata": {"labels": {key: value}}}))
            .await
    }

    async fn describe(&self, name: &str, owner: &Value) -> kube::Result<NodeVirtualization> {
        let object = json!({
            "apiVersion": "virtnode.io/v1alpha1", "kind": "NodeVirtualization",
            "metadata": {"name": name, "ownerReferences": [owner]},
            "status": {"accelerator": "kvm"},
        });
        let params = PatchParams::apply("virtnode").force();
        self.objects
            .patch(name, &params, &Patch::Apply(object))
            .await
    }

    /// Writes an event as the daemon of a node.
    async fn create_event(&self, name: &str, instance: &str, about: Value) -> kube::Result<Event> {
        let event = event(name, "virtnode", instance, about);
        self.events.create(&PostParams::default(), &event).await
    }

    /// Increments the count of an event.
    async fn count(&self, name: &str) -> kube::Result<Event> {
        let series =
            json!({"series": {"count": 2, "lastObservedTime": "2026-11-21T12:00:01.000000Z"}});
        let params = PatchParams::default();
        let patch = Patch::Merge(series);
        self.events.patch(name, &params, &patch).await
    }

    async fn report(&self, name: &str) -> kube::Result<DynamicObject> {
        let patch = Patch::Merge(json!({"status": {"message": "done"}}));
        self.hotplugs
            .patch_status(name, &PatchParams::default(), &patch)
            .await
    }
}

#[tokio::test]
async fn token_is_restricted_to_its_own_node() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    if !has_policies(&server).await? {
        // The API server has no policies, so the manifest cannot apply.
        server
            .apply_manifest(ADMISSION)
            .await
            .expect_err("no such kind");
        println!(
            "Kubernetes {:?} has no admission policies",
            server.version()
        );
        return Ok(());
    }
    for manifest in [CRDS, RIGHTS, ADMISSION] {
        server.apply_manifest(manifest).await?;
    }
    let n1 = server.create_node("n1").await?;
    let n2 = server.create_node("n2").await?;
    let admin: Api<Node> = Api::all(server.client());
    let foreign = json!({"metadata": {"labels": {"example.com/theirs": "1"}, "annotations": {"example.com/note": "1"}}});
    admin
        .patch("n1", &PatchParams::default(), &Patch::Merge(foreign))
        .await?;
    let pod = Pod::new(server.pod_client("virtnode", "virtnode", "n1").await?);
    // Each right and policy takes effect a moment after its creation, so the test waits for the first
    // denial of each.
    eventually(LONG, async || {
        pod.label("n1", "virtnode.io/eim", Some("auto")).await?;
        is_denied(pod.label("n2", "virtnode.io/eim", Some("auto")).await)
    })
    .await?;

    // Its own labels and annotations, also by server-side apply and by a removing patch.
    for key in [
        "virtnode.io/x",
        "machine.virtnode.io/pc-q35-10.0",
        "machine.aarch64.virtnode.io/virt",
    ] {
        pod.label("n1", key, Some("1")).await?;
        pod.label("n1", key, Some("2")).await?;
        pod.label("n1", key, None).await?;
    }
    pod.merge(
        "n1",
        json!({"metadata": {"annotations": {"virtnode.io/note": "x"}}}),
    )
    .await?;

    // Not the keys of others, including similar ones.
    for key in [
        "other",
        "example.com/new",
        "notvirtnode.io/x",
        "virtnode.io.example.com/x",
        "example.com/virtnode.io",
        "x-virtnode.io/x",
        "node-role.kubernetes.io/control-plane",
        "virtnode.iox/x",
        "machine-type.node.kubevirt.io/q35",
        "kubevirt.io/sev",
    ] {
        let message = is_denied(pod.label("n1", key, Some("1")).await)?;
        assert!(message.contains(key), "{message}");
        let annotation = json!({"metadata": {"annotations": {key: "1"}}});
        is_denied(pod.merge("n1", annotation).await).context(key)?;
    }
    for value in [None, Some("2")] {
        is_denied(pod.label("n1", "example.com/theirs", value).await)?;
        let annotation = json!({"metadata": {"annotations": {"example.com/note": value}}});
        is_denied(pod.merge("n1", annotation).await)?;
    }
    // No other field of the Node, not even together with allowed ones.
    let owner = |node: &Node, kind: &str| {
        let meta = &node.metadata;
        json!({"apiVersion": "v1", "kind": kind, "name": meta.name, "uid": meta.uid})
    };
    for other in [
        json!({"spec": {"unschedulable": true}}),
        json!({"spec": {"taints": [{"key": "a", "effect": "NoExecute"}]}}),
        json!({"spec": {"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24"]}}),
        json!({"metadata": {"finalizers": ["example.com/stay"]}}),
        json!({"metadata": {"ownerReferences": [owner(&n2, "Node")]}}),
        json!({"metadata": {"labels": {"virtnode.io/x": "1"}}, "spec": {"unschedulable": true}}),
    ] {
        is_denied(pod.merge("n1", other.clone()).await).with_context(|| other.to_string())?;
    }

    // The objects of its own node only.
    pod.describe("n1", &owner(&n1, "Node")).await?;
    pod.describe("n1", &owner(&n1, "Node")).await?;
    eventually(LONG, async || {
        is_denied(pod.describe("n2", &owner(&n2, "Node")).await)
    })
    .await?;
    is_denied(pod.describe("n1", &owner(&n2, "Node")).await)?;
    is_denied(pod.describe("n1", &owner(&n1, "Pod")).await)?;
    create_hotplug(&server, "on-n1", &n1).await?;
    create_hotplug(&server, "on-n2", &n2).await?;
    eventually(LONG, async || is_denied(pod.report("on-n2").await)).await?;
    is_denied(pod.hotplugs.delete("on-n2", &DeleteParams::default()).await)?;
    // The status of an object with its label and another node in the spec may only be WrongNode.
    let lie = Patch::Merge(json!({"metadata": {"labels": {"virtnode.io/node": "n1"}}}));
    hotplugs(server.client())
        .patch("on-n2", &PatchParams::default(), &lie)
        .await?;
    pod.report("on-n2").await?;
    is_denied(pod.hotplugs.delete("on-n2", &DeleteParams::default()).await)?;
    pod.report("on-n1").await?;
    pod.hotplugs
        .delete("on-n1", &DeleteParams::default())
        .await?;

    // Events with its own instance, about its Node and about objects for it.
    let about = |version: &str, kind: &str, name: &str| json!({"apiVersion": version, "kind": kind, "name": name});
    let own = about("v1", "Node", "n1");
    pod.create_event("own", "n1", own.clone()).await?;
    pod.count("own").await?;
    let hotplug = about("virtnode.io/v1alpha1", "DomainHotplug", "on-n1");
    pod.create_event("hotplug", "n1", hotplug.clone()).await?;
    eventually(LONG, async || {
        let name = format!("others-{:x}", fastrand::u64(..));
        is_denied(pod.create_event(&name, "n2", own.clone()).await)
    })
    .await?;
    for other in [
        about("v1", "Node", "n2"),
        about("example.com/v1", "DomainHotplug", "on-n1"),
        about("virtnode.io/v1alpha1", "NodeVirtualization", "n2"),
        about("v1", "Namespace", "default"),
    ] {
        is_denied(pod.create_event("other", "n1", other.clone()).await)
            .with_context(|| other.to_string())?;
    }
    let theirs: Api<Event> = Api::namespaced(server.client(), "default");
    for (name, controller, instance) in [
        ("kubelets", "kubelet", "n1"),
        ("neighbours", "virtnode", "n2"),
    ] {
        let event = event(name, controller, instance, own.clone());
        theirs.create(&PostParams::default(), &event).await?;
        is_denied(pod.count(name).await).context(name)?;
    }

    // A token without a node allows nothing.
    let unbound = Pod::new(
        server
            .service_account_client("virtnode", "virtnode")
            .await?,
    );
    is_denied(unbound.label("n1", "virtnode.io/x", Some("1")).await)?;
    is_denied(unbound.describe("n1", &owner(&n1, "Node")).await)?;
    is_denied(unbound.report("on-n2").await)?;
    is_denied(unbound.create_event("unbound", "n1", own).await)?;
    is_denied(unbound.count("own").await)?;
    // The policies do not apply to others.
    let label = Patch::Merge(json!({"metadata": {"labels": {"virtnode.io/eim": "theirs"}}}));
    admin.patch("n2", &PatchParams::default(), &label).await?;

    // With the overlay, KubeVirt's published keys and no others.
    let policy = with_kubevirt()?;
    server.apply_manifest(&policy.to_string()).await?;
    eventually(LONG, async || {
        pod.label("n1", "machine-type.node.kubevirt.io/q35", Some("true"))
            .await?;
        Ok(())
    })
    .await?;
    for prefix in KUBEVIRT_PREFIXES {
        pod.label("n1", &format!("{prefix}/x"), Some("true"))
            .await?;
    }
    for key in KUBEVIRT_KEYS {
        pod.label("n1", key, Some("true")).await?;
    }
    for key in [
        "kubevirt.io/schedulable",
        "node-labeller.kubevirt.io/skip-node",
        "scheduling.node.kubevirt.io/x",
        "evil.cpu-model.node.kubevirt.io/x",
        "cpu-model.node.kubevirt.io.example.com/x",
        "kubevirt.io/sev-x",
    ] {
        is_denied(pod.label("n1", key, Some("true")).await).context(key)?;
    }
    Ok(())
}

/// Returns the policy for Nodes with the overlay's patch.
fn with_kubevirt() -> anyhow::Result<Value> {
    let mut policy = documents(ADMISSION)?
        .into_iter()
        .next()
        .context("no policy")?;
    let patch: Value = serde_saphyr::from_str(KUBEVIRT)?;
    for operation in patch.as_array().context("operations")? {
        assert_eq!(operation["op"], "replace");
        let path = operation["path"].as_str().context("a path")?;
        let place = policy
            .pointer_mut(path)
            .with_context(|| format!("no {path}"))?;
        // The replaced variable has the same name.
        assert_eq!(place["name"], operation["value"]["name"]);
        *place = operation["value"].clone();
    }
    Ok(policy)
}

#[test]
fn overlay_allows_exactly_the_published_keys() -> anyhow::Result<()> {
    let policy = with_kubevirt()?;
    let listed = |n: usize| -> anyhow::Result<Vec<String>> {
        let list = policy["spec"]["variables"][n]["expression"]
            .as_str()
            .context("a list")?;
        let list = list
            .trim()
            .strip_prefix('[')
            .and_then(|list| list.strip_suffix(']'));
        let items = list.context("a list")?.split(',');
        Ok(items
            .map(|item| item.trim().trim_matches('\'').to_owned())
            .collect())
    };
    assert_eq!(listed(0)?, KUBEVIRT_PREFIXES);
    assert_eq!(listed(1)?, KUBEVIRT_KEYS);
    Ok(())
}
