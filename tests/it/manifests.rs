//! `manifests/`: the API server accepts every overlay, a daemon runs under its account, and the
//! DaemonSet refers only to paths, variables and ports that the program has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::Client;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams,
};
use kube::core::discovery::Scope;
use serde_json::{Value, json};
use virtnode::config::{Config, DEFAULT_PATH, Settings};

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::kube::KubeServer;
use crate::support::kustomize::{only, render};
use crate::support::libvirtd::Libvirtd;

const LONG: Duration = Duration::from_secs(60);
/// The first API server version with them.
const ADMISSION_POLICIES: (u32, u32) = (1, 30);
/// The first API server version with them: before, kubectl rejects the definitions unless told not to.
const SELECTABLE_FIELDS: (u32, u32) = (1, 30);
/// The first version of kubectl that takes directories as bases.
const KUSTOMIZE_OF_DIRECTORIES: (u32, u32) = (1, 21);
const OVERLAYS: [&str; 4] = [
    ".",
    "overlays/kubevirt-labels",
    "overlays/labels-only",
    KUBEVIRT,
];
pub(crate) const KUBEVIRT: &str = "overlays/kubevirt";
/// The directory that the two containers of that overlay share.
const SERVED: &str = "/run/virtnode-launchers";

pub(crate) fn manifests(overlay: &str) -> anyhow::Result<Vec<Value>> {
    render(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("manifests")
            .join(overlay),
    )
}

/// Returns the daemon's container.
fn container(objects: &[Value]) -> anyhow::Result<&Value> {
    let mut named = containers(objects)?.iter();
    let container = named.find(|container| container["name"] == "virtnode");
    container.context("no container virtnode")
}

fn containers(objects: &[Value]) -> anyhow::Result<&Vec<Value>> {
    let daemonset = only(objects, "DaemonSet")?;
    let containers = &daemonset["spec"]["template"]["spec"]["containers"];
    containers.as_array().context("no containers")
}

fn texts(list: &Value) -> Vec<&str> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).collect()
}

/// Applies an object by server-side apply, or only as a dry run.
async fn apply(client: &Client, object: &Value, dry: bool) -> anyhow::Result<()> {
    let what: DynamicObject = serde_json::from_value(object.clone())?;
    let types = what.types.as_ref().context("an object without a kind")?;
    let kind = GroupVersionKind::try_from(types)?;
    let name = what
        .metadata
        .name
        .clone()
        .context("an object without a name")?;
    let params = PatchParams {
        dry_run: dry,
        ..PatchParams::apply("kubectl").force()
    };
    // A custom resource becomes available shortly after its definition.
    let (resource, capabilities) = eventually(LONG, async || {
        Ok(kube::discovery::pinned_kind(client, &kind).await?)
    })
    .await?;
    let api = api(client, &resource, capabilities.scope, &what);
    if kind.kind == "CustomResourceDefinition" {
        // Old servers reject an apply with unknown fields, but ignore them on create.
        let params = PostParams {
            dry_run: dry,
            ..PostParams::default()
        };
        return match api.create(&params, &what).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            created => created.map(drop).with_context(|| name.clone()),
        };
    }
    let applied = api.patch(&name, &params, &Patch::Apply(&what)).await;
    applied.with_context(|| format!("{} {name}", kind.kind))?;
    Ok(())
}

fn api(
    client: &Client,
    resource: &ApiResource,
    scope: Scope,
    object: &DynamicObject,
) -> Api<DynamicObject> {
    match (scope, object.metadata.namespace.as_deref()) {
        (Scope::Namespaced, Some(namespace)) => {
            Api::namespaced_with(client.clone(), namespace, resource)
        }
        _ => Api::all_with(client.clone(), resource),
    }
}

/// Creates the pod that the DaemonSet's controller would create for the node.
async fn pod(client: &Client, objects: &[Value], node: &str, name: &str) -> anyhow::Result<Pod> {
    let mut template = only(objects, "DaemonSet")?["spec"]["template"].clone();
    template["metadata"]["name"] = name.into();
    template["spec"]["nodeName"] = node.into();
    let pods: Api<Pod> = Api::namespaced(client.clone(), "virtnode");
    Ok(pods
        .create(&PostParams::default(), &serde_json::from_value(template)?)
        .await?)
}

/// Returns the container's environment on a node.
fn environment(container: &Value, node: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let variables = container["env"].as_array().into_iter().flatten();
    variables
        .map(|variable| {
            let name = variable["name"].as_str().context("no name")?.to_owned();
            let field = variable["valueFrom"]["fieldRef"]["fieldPath"].as_str();
            let value = match (variable["value"].as_str(), field) {
                (Some(value), None) => value,
                (None, Some("spec.nodeName")) => node,
                other => anyhow::bail!("{name}: {other:?}"),
            };
            Ok((name, value.to_owned()))
        })
        .collect()
}

/// Applies all overlays in turn, as an operator who changes the overlay.
#[tokio::test]
async fn every_overlay_applies_and_the_daemon_runs_under_its_account() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let server = KubeServer::start().await?;
    server.create_node("n1").await?;
    let nodes: Api<Node> = Api::all(server.client());
    for (number, overlay) in OVERLAYS.into_iter().enumerate() {
        let mut objects = manifests(overlay)?;
        if server.version() < ADMISSION_POLICIES {
            let kind = |object: &Value| object["kind"].to_string();
            objects.retain(|object| !kind(object).contains("ValidatingAdmissionPolicy"));
        }
        let started = Instant::now();
        // A dry run requires an existing namespace.
        apply(&server.client(), only(&objects, "Namespace")?, false).await?;
        for dry in [true, false] {
            for object in &objects {
                apply(&server.client(), object, dry)
                    .await
                    .context(overlay)?;
            }
        }
        let pod = pod(
            &server.client(),
            &objects,
            "n1",
            &format!("virtnode-{number}"),
        )
        .await?;
        let account = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.clone());
        let account = account.context("a pod without an account")?;
        let kubeconfig = server.kubeconfig_of(&pod, &account).await?;

        let container = container(&objects)?;
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("config.yaml");
        let map = only(&objects, "ConfigMap")?;
        let text = map["data"]["config.yaml"].as_str().context("no file")?;
        fs::write(&config, text.replace(SERVED, path(directory.path())?))?;
        // Settings that differ from those in a pod.
        let elsewhere = [
            "--kubeconfig",
            path(&kubeconfig)?,
            "--config",
            path(&config)?,
            "--start-jitter",
            "0",
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
        command
            .env_clear()
            .envs(environment(container, "n1")?)
            .args(texts(&container["args"]));
        let daemon = Daemon::spawn(directory, command, &libvirtd.uri(), &elsewhere).await?;
        daemon
            .ready()
            .await
            .with_context(|| format!("{overlay}: {:#?}", daemon.log()))?;
        println!(
            "{overlay}: from apply to labels on the Node {:.1} s",
            started.elapsed().as_secs_f64()
        );

        for probe in ["livenessProbe", "readinessProbe"] {
            let request = &container[probe]["httpGet"];
            assert_eq!(
                daemon
                    .get(request["path"].as_str().context("no path")?)?
                    .status,
                200
            );
        }
        let labels = nodes.get("n1").await?.metadata.labels.unwrap_or_default();
        assert!(
            labels.contains_key("machine-alias.virtnode.io/q35"),
            "{labels:?}"
        );
        let of_kubevirt = labels.contains_key("machine-type.node.kubevirt.io/q35");
        // They are removed after two probes without them; labels-only does not wait for that.
        assert!(
            of_kubevirt || overlay != "overlays/kubevirt-labels",
            "{labels:?}"
        );
        let hotplug = overlay != "overlays/labels-only";
        let log = daemon.log();
        assert!(log.iter().any(|line| line["hotplug"] == hotplug), "{log:?}");
        // A changed policy takes effect with a delay, during which the old one denies the labels. By now
        // they have been written, as checked above.
        let refused = log.iter().find(|line| {
            let line = line.to_string();
            line.contains("forbidden")
                && !line.contains("ValidatingAdmissionPolicy 'virtnode-nodes'")
        });
        assert_eq!(refused, None, "{overlay}");
        daemon.stop().await?;
        let pods: Api<Pod> = Api::namespaced(server.client(), "virtnode");
        let at_once = DeleteParams::default().grace_period(0);
        pods.delete(&format!("virtnode-{number}"), &at_once).await?;
    }
    Ok(())
}

/// Runs a command of the documents, such as `kubectl apply -k manifests`. Returns whether it succeeded,
/// and what it printed.
async fn documented(
    server: &KubeServer,
    page: &str,
    command: &str,
) -> anyhow::Result<(bool, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(directory.join("docs").join(page))?;
    anyhow::ensure!(
        text.contains(command),
        "docs/{page} does not have: {command}"
    );
    // Its kustomize does not read them: the documents require a newer one. It is beside the old server.
    let rendered = tempfile::NamedTempFile::with_suffix(".json")?;
    let mut command = command.to_owned();
    if server.version() < KUSTOMIZE_OF_DIRECTORIES {
        let mut items = manifests(".")?;
        items.sort_by_key(|object| object["kind"] != "Namespace");
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        fs::write(&rendered, list.to_string())?;
        let file = format!("-f {}", path(rendered.path())?);
        command = command.replace("-k manifests", &file);
    }
    let arguments = command.split_whitespace().skip(1).map(str::to_owned);
    let mut kubectl = server.kubectl()?;
    kubectl.current_dir(directory).args(arguments);
    let output = tokio::task::spawn_blocking(move || kubectl.output()).await??;
    let printed = [output.stdout, output.stderr].concat();
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&printed).into_owned(),
    ))
}

/// Deletes the namespace when that is asked for, as its controller would.
async fn finalize_namespace(client: Client) -> anyhow::Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    eventually(LONG, async || {
        let mut namespace = namespaces.get("virtnode").await?;
        anyhow::ensure!(namespace.metadata.deletion_timestamp.is_some(), "it exists");
        namespace.spec = None;
        let request = http::Request::put("/api/v1/namespaces/virtnode/finalize")
            .header("content-type", "application/json")
            .body(serde_json::to_vec(&namespace)?)?;
        client.request_text(request).await?;
        Ok(())
    })
    .await
}

/// On an API server without admission policies everything else is applied by the documented command,
/// which names them.
#[tokio::test]
async fn documented_commands_install_and_uninstall() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    let has_policies = server.version() >= ADMISSION_POLICIES;
    let apply = if server.version() >= SELECTABLE_FIELDS {
        "kubectl apply -k manifests"
    } else {
        "kubectl apply -k manifests --validate=false"
    };
    let (succeeded, printed) = documented(&server, "kubernetes.md", apply).await?;
    assert_eq!(succeeded, has_policies, "{printed}");
    for object in manifests(".")? {
        let kind = object["kind"].as_str().context("no kind")?;
        let name = object["metadata"]["name"].as_str().context("no name")?;
        let is_policy = kind.starts_with("ValidatingAdmissionPolicy");
        let is_created = printed.lines().any(|line| {
            let line = line.to_lowercase();
            line.starts_with(&kind.to_lowercase()) && line.ends_with(&format!("/{name} created"))
        });
        assert_eq!(
            is_created,
            has_policies || !is_policy,
            "{kind} {name}: {printed}"
        );
    }

    let page = "upgrade.md";
    let stop = "kubectl -n virtnode delete daemonset virtnode";
    let (succeeded, printed) = documented(&server, page, stop).await?;
    assert!(succeeded, "{printed}");
    let delete = "kubectl delete -k manifests --ignore-not-found";
    let (deleted, ()) = tokio::try_join!(
        documented(&server, page, delete),
        finalize_namespace(server.client())
    )?;
    let (succeeded, printed) = deleted;
    assert_eq!(succeeded, has_policies, "{printed}");
    assert!(!printed.contains("NotFound"), "{printed}");
    let mut left = server.kubectl()?;
    left.args(["get", "crd,clusterrole,namespace", "-o", "name"]);
    let left = tokio::task::spawn_blocking(move || left.output()).await??;
    let left = String::from_utf8(left.stdout)?;
    assert!(!left.contains("virtnode"), "{left}");
    Ok(())
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

#[test]
fn daemonset_refers_only_to_settings_of_the_program() -> anyhow::Result<()> {
    let help = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .args(["run", "--help"])
        .output()?;
    let help = String::from_utf8(help.stdout)?;
    let defaults = Config::load(None, &Settings::default(), true)?;
    let parent = |path: &Path| path.parent().map(Path::to_owned).context("no directory");
    // libvirt's own default is qemu:///system, which is a socket in this directory.
    let expected: BTreeSet<PathBuf> = [
        parent(Path::new(DEFAULT_PATH))?,
        parent(&defaults.socket)?,
        defaults.state_directory.clone(),
        "/run/libvirt".into(),
    ]
    .into();
    for overlay in OVERLAYS {
        let mut expected = expected.clone();
        if overlay == KUBEVIRT {
            expected.remove(Path::new("/run/libvirt"));
            expected.extend([
                SERVED.into(),
                defaults.documents.clone(),
                "/var/run/secrets/kubernetes.io/serviceaccount".into(),
            ]);
        }
        let objects = manifests(overlay)?;
        let pod = &only(&objects, "DaemonSet")?["spec"]["template"]["spec"];
        let container = container(&objects)?;
        for name in environment(container, "n1")?.keys() {
            assert!(help.contains(&format!("[env: {name}=")), "{name}");
        }
        let port = &container["ports"][0];
        assert_eq!(port["containerPort"], defaults.listen.port());
        let service = &only(&objects, "Service")?["spec"]["ports"][0];
        assert_eq!(
            (&service["port"], &service["targetPort"]),
            (&port["containerPort"], &port["name"])
        );
        for probe in ["livenessProbe", "readinessProbe"] {
            assert_eq!(container[probe]["httpGet"]["port"], port["name"]);
        }
        assert_eq!(
            container["image"],
            format!("localhost/virtnode:{}", env!("CARGO_PKG_VERSION"))
        );

        // Every volume is mounted, at the paths that the program reads and writes.
        let mounts = container["volumeMounts"].as_array().context("no mounts")?;
        let at: BTreeSet<PathBuf> = mounts
            .iter()
            .filter_map(|mount| mount["mountPath"].as_str().map(PathBuf::from))
            .collect();
        assert_eq!(at, expected, "{overlay}");
        let named = |list: &Value| -> BTreeSet<String> {
            let list = list.as_array().into_iter().flatten();
            list.filter_map(|value| value["name"].as_str().map(str::to_owned))
                .collect()
        };
        let mounted = containers(&objects)?.iter();
        let mounted: BTreeSet<String> = mounted
            .flat_map(|container| named(&container["volumeMounts"]))
            .collect();
        assert_eq!(named(&pod["volumes"]), mounted);
        let writable: BTreeSet<&str> = mounts
            .iter()
            .filter(|mount| mount["readOnly"] != true)
            .filter_map(|mount| mount["name"].as_str())
            .collect();
        assert_eq!(writable, ["run", "state"].into());
    }
    Ok(())
}

#[test]
fn pod_has_no_more_permissions_than_documented() -> anyhow::Result<()> {
    for overlay in OVERLAYS {
        let objects = manifests(overlay)?;
        let pod = &only(&objects, "DaemonSet")?["spec"]["template"]["spec"];
        for container in containers(&objects)? {
            let security = &container["securityContext"];
            assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
            assert_eq!(security["readOnlyRootFilesystem"], true);
            assert_eq!(security["allowPrivilegeEscalation"], false);
            assert_eq!(security["privileged"], Value::Null);
        }
        let roles: Vec<&str> = objects
            .iter()
            .filter(|object| object["kind"] == "ClusterRoleBinding")
            .filter_map(|object| object["roleRef"]["name"].as_str())
            .collect();
        if overlay == KUBEVIRT {
            assert_eq!(roles, ["virtnode", "virtnode-launchers"]);
        } else {
            assert_eq!(roles, ["virtnode"], "{overlay}");
        }
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        for field in ["hostNetwork", "hostPID", "hostIPC"] {
            assert_eq!(pod[field], Value::Null, "{field}");
        }
        let rules = &daemons_role(&objects)?["rules"];
        for rule in rules.as_array().context("no rules")? {
            let verbs: &[&str] = match (&*texts(&rule["apiGroups"]), &*texts(&rule["resources"])) {
                ([""], ["nodes"]) => &["get", "list", "watch", "patch"],
                (["virtnode.io"], ["domainhotplugs"]) => {
                    &["get", "list", "watch", "patch", "delete"]
                }
                (["virtnode.io"], ["domainhotplugs/status"]) => &["patch"],
                (["virtnode.io"], ["nodevirtualizations"]) => {
                    &["get", "list", "watch", "create", "patch"]
                }
                (["events.k8s.io"], ["events"]) => &["create", "patch"],
                other => anyhow::bail!("{overlay}: permission on {other:?}"),
            };
            assert!(
                texts(&rule["verbs"])
                    .iter()
                    .all(|verb| verbs.contains(verb)),
                "{rule}"
            );
        }
        let hotplugs = rules.to_string().contains("domainhotplugs");
        assert!(!(hotplugs && overlay == "overlays/labels-only"));
    }
    Ok(())
}

/// Returns the daemon's own role; the others are for users.
fn daemons_role(objects: &[Value]) -> anyhow::Result<&Value> {
    objects
        .iter()
        .find(|object| object["kind"] == "ClusterRole" && object["metadata"]["name"] == "virtnode")
        .context("no ClusterRole virtnode")
}

/// The container that can enter every pod's volumes has nothing else, and the one with the token cannot
/// enter them.
#[test]
fn broker_has_the_pods_directory_and_no_token_and_the_daemon_the_reverse() -> anyhow::Result<()> {
    let objects = manifests(KUBEVIRT)?;
    let pod = &only(&objects, "DaemonSet")?["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    let volumes = pod["volumes"].as_array().context("no volumes")?;
    assert!(volumes.iter().all(|volume| volume["name"] != "libvirt"));
    let [broker, daemon] = &containers(&objects)?[..] else {
        anyhow::bail!("two containers");
    };
    let mounts = |container: &Value| -> BTreeMap<String, (String, bool)> {
        let mounts = container["volumeMounts"].as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        mounts
            .map(|mount| {
                let is_read_only = mount["readOnly"] == true;
                (
                    text(&mount["name"]),
                    (text(&mount["mountPath"]), is_read_only),
                )
            })
            .collect()
    };
    let expected = [
        ("launchers".to_owned(), (SERVED.to_owned(), false)),
        ("pods".to_owned(), ("/pods".to_owned(), true)),
    ];
    assert_eq!(mounts(broker), expected.into());
    let pods = &broker["volumeMounts"][0];
    assert_eq!(pods["mountPropagation"], "HostToContainer");
    assert!(!mounts(daemon).contains_key("pods"));
    assert_eq!(mounts(daemon)["launchers"], (SERVED.to_owned(), true));

    let security = &broker["securityContext"];
    assert_eq!(
        (&security["runAsUser"], &security["runAsGroup"]),
        (&json!(107), &json!(0))
    );
    assert_eq!(daemon["securityContext"]["runAsUser"], 65534);
    assert_eq!(broker["image"], daemon["image"]);
    assert_eq!(broker["ports"], Value::Null);
    // The program accepts these arguments, and no change is allowed by default.
    let arguments = texts(&broker["args"]);
    assert!(!arguments.contains(&"--allow-changes"));
    let help = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .args(&arguments)
        .arg("--help")
        .output()?;
    assert!(help.status.success(), "{help:?}");
    Ok(())
}

/// The overlay replaces the last validation of the policy, and only adds to it.
#[test]
fn kubevirt_overlay_allows_events_about_instances_in_addition() -> anyhow::Result<()> {
    let validations = |overlay| -> anyhow::Result<Vec<String>> {
        let objects = manifests(overlay)?;
        let policy = objects.iter().find(|object| {
            object["kind"] == "ValidatingAdmissionPolicy"
                && object["metadata"]["name"] == "virtnode-events"
        });
        let validations = &policy.context("no policy")?["spec"]["validations"];
        let validations = validations.as_array().context("no validations")?.iter();
        let expression = |validation: &Value| validation["expression"].as_str().map(str::to_owned);
        Ok(validations.filter_map(expression).collect())
    };
    let (base, kubevirt) = (validations(".")?, validations(KUBEVIRT)?);
    assert_eq!(base.len(), kubevirt.len());
    let (last, others) = base.split_last().context("none")?;
    assert_eq!(others, &kubevirt[..others.len()]);
    let added = kubevirt[others.len()].strip_prefix(last.trim_end());
    let added = added.context("it allows less than the base")?;
    assert!(added.contains("'VirtualMachineInstance'") && added.contains("'kubevirt.io/'"));
    Ok(())
}
