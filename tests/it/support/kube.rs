//! A real Kubernetes: etcd, kube-apiserver and, on demand, kube-scheduler.
//!
//! Without a kubelet: pods are bound and never run (delete them with grace period 0). Without a
//! controller manager: nothing is created or deleted besides the test's own objects, so there are no
//! default service accounts and no taints on nodes that are not ready.

mod access;
mod audit;
pub(crate) mod objects;
mod pki;
pub(super) mod process;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ::kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use ::kube::core::{GroupVersionKind, TypeMeta};
use ::kube::{Client, Error};
use anyhow::{Context as _, ensure};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::access::{Access, client_of};
use self::pki::Authority;
use self::process::{Process, free_ports, output_of};
use super::eventually;

/// The shipped manifest of the daemon's account and rights.
pub(crate) const RIGHTS: &str = concat!(
    include_str!("../../../manifests/base/namespace.yaml"),
    "---\n",
    include_str!("../../../manifests/base/serviceaccount.yaml"),
    "---\n",
    include_str!("../../../manifests/base/rbac.yaml"),
);

pub(crate) use self::audit::AuditEvent;

/// Timeout for the API server, which takes 4 to 6 s on two idle cores.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// A Kubernetes for one test on loopback ports, stopped when dropped.
pub(crate) struct KubeServer {
    // Drop order: clients before their server, and the files last.
    scheduler: Option<Process>,
    api_server: Option<Process>,
    etcd: Process,
    binaries: Binaries,
    etcd_url: String,
    access: Access,
    admin: Client,
    admin_config: PathBuf,
    dir: TempDir,
}

impl KubeServer {
    /// Starts etcd and the API server, and waits until the API server is ready.
    ///
    /// Builds the server if none is installed, which takes minutes once on a machine.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let binaries = Binaries::find()?;
        let mut attempts = 1..=3;
        loop {
            attempts.next();
            match Self::start_once(binaries.clone()).await {
                Err(error) if !attempts.is_empty() && is_port_taken(&error) => {}
                outcome => return outcome.context("no Kubernetes to test with"),
            }
        }
    }

    async fn start_once(binaries: Binaries) -> anyhow::Result<Self> {
        let dir = TempDir::with_prefix("virtnode-test-kube-")?;
        let [api_port, etcd_port, etcd_peer_port] = free_ports()?;
        fs::write(dir.path().join("audit-policy.yaml"), audit::POLICY)?;
        pki::write_token_keys(dir.path())?;
        let access = Access {
            authority: Authority::new(dir.path())?,
            api_port,
        };
        let admin_config = access.of_user("admin", Some("system:masters"))?;

        let mut server = Self {
            scheduler: None,
            api_server: None,
            etcd: spawn_etcd(&binaries, dir.path(), etcd_port, etcd_peer_port)?,
            binaries,
            etcd_url: format!("http://127.0.0.1:{etcd_port}"),
            access,
            admin: client_of(&admin_config).await?,
            admin_config,
            dir,
        };
        server.start_api().await?;
        Ok(server)
    }

    /// Returns the server's release, such as `(1, 33)`.
    pub(crate) fn version(&self) -> (u32, u32) {
        self.binaries.version
    }

    /// Returns the process IDs of the API server, if it runs, and of etcd.
    #[allow(dead_code, reason = "for the benchmark of a fleet")]
    pub(crate) fn processes(&self) -> (Option<u32>, u32) {
        (self.api_server.as_ref().map(Process::id), self.etcd.id())
    }

    /// Returns a client with all rights.
    pub(crate) fn client(&self) -> Client {
        self.admin.clone()
    }

    /// Returns the kubeconfig of a client with all rights.
    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.admin_config
    }

    /// Returns a kubectl with all rights, to be given arguments.
    pub(crate) fn kubectl(&self) -> anyhow::Result<Command> {
        let program = self.binaries.dir.join("kubectl");
        ensure!(
            program.exists(),
            "{} does not exist: put kubectl beside kube-apiserver, as setup-envtest does",
            program.display()
        );
        let mut command = Command::new(program);
        command
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", self.dir.path())
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Kills the API server: connections break and new ones are refused.
    pub(crate) fn stop_api(&mut self) {
        self.api_server = None;
    }

    /// Restarts the API server with the same data and port, and waits until it is ready.
    pub(crate) async fn start_api(&mut self) -> anyhow::Result<()> {
        if self.api_server.is_none() {
            self.api_server = Some(self.spawn_api_server()?);
        }
        eventually(READY_WITHIN, async || {
            // Outer result: continue waiting; inner result: the outcome.
            for process in self.api_server.iter_mut().chain([&mut self.etcd]) {
                if let Err(ended) = process.ensure_running() {
                    return Ok(Err(ended));
                }
            }
            get(&self.admin, "/readyz").await?;
            // Created by the server itself soon after it is ready.
            Api::<Namespace>::all(self.admin.clone())
                .get("default")
                .await?;
            Ok(Ok(()))
        })
        .await
        .context("the API server is not ready")?
        .context("it ended before it was ready")
    }

    /// Starts the scheduler unless it runs. It runs until the server is dropped.
    pub(crate) fn start_scheduler(&mut self) -> anyhow::Result<()> {
        if self.scheduler.is_none() {
            self.scheduler = Some(self.spawn_scheduler()?);
        }
        Ok(())
    }

    /// Creates a ready node with capacity for pods.
    pub(crate) async fn create_node(&self, name: &str) -> anyhow::Result<Node> {
        let nodes: Api<Node> = Api::all(self.client());
        let room = json!({"cpu": "8", "memory": "16Gi", "pods": "110"});
        let node = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {
                "capacity": room,
                "allocatable": room,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }))?;
        nodes.create(&PostParams::default(), &node).await?;
        // The server taints each new node as not ready; a controller would remove the taint.
        let untaint = Patch::Merge(json!({"spec": {"taints": null}}));
        Ok(nodes.patch(name, &PatchParams::default(), &untaint).await?)
    }

    /// Returns the kubeconfig of a service account's token. Creates the account and its namespace if
    /// they do not exist. Without a role, it has nearly no rights.
    pub(crate) async fn service_account_kubeconfig(
        &self,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<PathBuf> {
        let post = PostParams::default();
        let namespaces: Api<Namespace> = Api::all(self.client());
        let wanted = serde_json::from_value(json!({"metadata": {"name": namespace}}))?;
        unless_it_exists(namespaces.create(&post, &wanted).await)?;

        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), namespace);
        let wanted = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        unless_it_exists(accounts.create(&post, &wanted).await)?;

        let request = TokenRequest {
            spec: TokenRequestSpec {
                expiration_seconds: Some(3600),
                ..Default::default()
            },
            ..Default::default()
        };
        let answer = accounts.create_token_request(name, &post, &request).await?;
        let token = answer
            .status
            .context("a token request without a token")?
            .token;
        self.access.of_token(&format!("{namespace}-{name}"), &token)
    }

    /// Returns the kubeconfig of the token of a new pod on a node. Namespace and account must exist; the
    /// pod is created and never runs.
    pub(crate) async fn pod_kubeconfig(
        &self,
        namespace: &str,
        account: &str,
        node: &str,
    ) -> anyhow::Result<PathBuf> {
        let pods: Api<Pod> = Api::namespaced(self.client(), namespace);
        let pod = serde_json::from_value(json!({
            "metadata": {"generateName": format!("{account}-")},
            "spec": {
                "nodeName": node,
                "serviceAccountName": account,
                "containers": [{"name": account, "image": "example.com/virtnode"}],
            },
        }))?;
        let pod = pods.create(&PostParams::default(), &pod).await?;
        self.kubeconfig_of(&pod, account).await
    }

    /// Returns the kubeconfig of a pod's service account token.
    pub(crate) async fn kubeconfig_of(&self, pod: &Pod, account: &str) -> anyhow::Result<PathBuf> {
        let of_pod = |field: &Option<String>| field.clone().context("a pod that is not created");
        let namespace = of_pod(&pod.metadata.namespace)?;
        let name = of_pod(&pod.metadata.name)?;
        let request = TokenRequest {
            spec: TokenRequestSpec {
                expiration_seconds: Some(3600),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(name.clone()),
                    uid: pod.metadata.uid.clone(),
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), &namespace);
        let post = PostParams::default();
        let answer = accounts
            .create_token_request(account, &post, &request)
            .await?;
        let token = answer
            .status
            .context("a token request without a token")?
            .token;
        self.access.of_token(&name, &token)
    }

    /// Returns a client with [`Self::pod_kubeconfig`].
    pub(crate) async fn pod_client(
        &self,
        namespace: &str,
        account: &str,
        node: &str,
    ) -> anyhow::Result<Client> {
        client_of(&self.pod_kubeconfig(namespace, account, node).await?).await
    }

    /// Creates or updates all objects of a manifest, and waits until definitions are in force. Older
    /// servers drop unknown fields.
    pub(crate) async fn apply_manifest(&self, manifest: &str) -> anyhow::Result<()> {
        for object in documents(manifest)? {
            let name = object["metadata"]["name"].as_str().context("a name")?;
            let types: TypeMeta = serde_json::from_value(object.clone())?;
            let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
            let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
                Some(namespace) => Api::namespaced_with(self.client(), namespace, &resource),
                None => Api::all_with(self.client(), &resource),
            };
            let wanted: DynamicObject = serde_json::from_value(object.clone())?;
            let applied = match api.create(&PostParams::default(), &wanted).await {
                Err(Error::Api(status)) if status.is_already_exists() => {
                    let patch = Patch::Merge(&wanted);
                    api.patch(name, &PatchParams::default(), &patch).await
                }
                created => created,
            };
            applied.with_context(|| format!("{} {name}", types.kind))?;
            if types.kind == "CustomResourceDefinition" {
                let of = |field: &str| object["spec"][field].as_str().unwrap_or_default();
                let version = object["spec"]["versions"][0]["name"].as_str();
                let plural = object["spec"]["names"]["plural"].as_str();
                let path = format!(
                    "/apis/{}/{}/{}",
                    of("group"),
                    version.unwrap_or_default(),
                    plural.unwrap_or_default()
                );
                eventually(Duration::from_secs(60), async || {
                    get(&self.admin, &path).await
                })
                .await?;
            }
        }
        Ok(())
    }

    /// True if the server's discovery lists this resource.
    pub(crate) async fn has(&self, group_version: &str, plural: &str) -> anyhow::Result<bool> {
        let groups = self.admin.list_api_groups().await?;
        let mut versions = groups.groups.iter().flat_map(|group| &group.versions);
        if !versions.any(|version| version.group_version == group_version) {
            return Ok(false);
        }
        let resources = self.admin.list_api_group_resources(group_version).await?;
        Ok(resources
            .resources
            .iter()
            .any(|resource| resource.name == plural))
    }

    /// Returns a client with [`Self::service_account_kubeconfig`].
    pub(crate) async fn service_account_client(
        &self,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<Client> {
        client_of(&self.service_account_kubeconfig(namespace, name).await?).await
    }

    /// Returns all requests of all clients that were answered before this call. The server must be
    /// running.
    pub(crate) async fn audit_events(&self) -> anyhow::Result<Vec<AuditEvent>> {
        // The server logs a request just after its answer. Once the log has this function's own request,
        // it has all earlier ones.
        let marker = format!("/version?marker={:x}", fastrand::u64(..));
        get(&self.admin, &marker).await?;
        eventually(Duration::from_secs(10), async || {
            let mut events = audit::parse(&fs::read_to_string(self.audit_log())?)?;
            let end = events.iter().position(|event| event.uri == marker);
            events.truncate(end.context("a request is missing from the audit log")?);
            Ok(events)
        })
        .await
    }

    fn audit_log(&self) -> PathBuf {
        self.dir.path().join("audit.log")
    }

    // The flags are the same from 1.20 to 1.36.
    fn spawn_api_server(&self) -> anyhow::Result<Process> {
        let dir = self.dir.path();
        let certificate = self.access.authority.server()?;
        let authority = self.access.authority.certificate();
        let args = [
            format!("--secure-port={}", self.access.api_port),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            // Endpoints must not be loopback addresses, and this one is not needed.
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--etcd-servers={}", self.etcd_url),
            "--service-cluster-ip-range=10.0.0.0/24".to_owned(),
            format!("--tls-cert-file={}", certificate.certificate.display()),
            format!("--tls-private-key-file={}", certificate.key.display()),
            format!("--client-ca-file={}", authority.display()),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!(
                "--service-account-signing-key-file={}/service-accounts.key",
                dir.display()
            ),
            format!(
                "--service-account-key-file={}/service-accounts.pub",
                dir.display()
            ),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            // It requires a service account for each pod, which a controller would create.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--allow-privileged=true".to_owned(),
            format!("--audit-policy-file={}/audit-policy.yaml", dir.display()),
            format!("--audit-log-path={}", self.audit_log().display()),
        ];
        let program = self.binaries.dir.join("kube-apiserver");
        Process::start(&program, &args, dir.join("kube-apiserver.log"))
    }

    fn spawn_scheduler(&self) -> anyhow::Result<Process> {
        let (major, minor) = self.version();
        let program = self.binaries.dir.join("kube-scheduler");
        ensure!(
            program.exists(),
            "{} does not exist: put kube-scheduler {major}.{minor} beside kube-apiserver, which \
             setup-envtest does not, or unset KUBEBUILDER_ASSETS",
            program.display(),
        );
        let kubeconfig = self.access.of_user("system:kube-scheduler", None)?;
        let mut args = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--authentication-kubeconfig={}", kubeconfig.display()),
            format!("--authorization-kubeconfig={}", kubeconfig.display()),
            "--leader-elect=false".to_owned(),
            // Health and metrics are disabled: they would need a port.
            "--secure-port=0".to_owned(),
        ];
        if (major, minor) < (1, 23) {
            args.push("--port=0".to_owned()); // the same without TLS
        }
        Process::start(&program, &args, self.dir.path().join("kube-scheduler.log"))
    }
}

fn spawn_etcd(
    binaries: &Binaries,
    dir: &Path,
    port: u16,
    peer_port: u16,
) -> anyhow::Result<Process> {
    let client_url = format!("http://127.0.0.1:{port}");
    let peer_url = format!("http://127.0.0.1:{peer_port}");
    let args = [
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={client_url}"),
        format!("--advertise-client-urls={client_url}"),
        format!("--listen-peer-urls={peer_url}"),
        format!("--initial-advertise-peer-urls={peer_url}"),
        format!("--initial-cluster=default={peer_url}"),
    ];
    Process::start(&binaries.dir.join("etcd"), &args, dir.join("etcd.log"))
}

/// Returns the documents of a manifest.
pub(crate) fn documents(manifest: &str) -> anyhow::Result<Vec<Value>> {
    let documents = manifest.split("\n---\n");
    let is_empty = |text: &&str| {
        text.lines()
            .all(|line| line.trim().is_empty() || line.starts_with('#') || line == "---")
    };
    documents
        .filter(|text| !is_empty(text))
        .map(|text| Ok(serde_saphyr::from_str(text)?))
        .collect()
}

/// The paths and release of the programs.
#[derive(Clone)]
struct Binaries {
    dir: PathBuf,
    version: (u32, u32),
}

impl Binaries {
    fn find() -> anyhow::Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kube/build-server.sh");
        let output = Command::new(&script)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}", script.display()))?;
        ensure!(
            output.status.success(),
            "no Kubernetes API server to test with, for the reason given above by {}: set \
             KUBEBUILDER_ASSETS to a directory with kube-apiserver and etcd, as setup-envtest \
             makes it",
            script.display()
        );
        let dir = PathBuf::from(String::from_utf8(output.stdout)?.trim_end());
        let version = output_of(&dir.join("kube-apiserver"), "--version")?;
        let version = parse_version(&version)
            .with_context(|| format!("kube-apiserver --version said {version:?}"))?;
        Ok(Self { dir, version })
    }
}

/// `Kubernetes v1.20.2` → `(1, 20)`
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().strip_prefix("Kubernetes v")?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// True if another process took a port first, which is worth a retry with other ports.
fn is_port_taken(error: &anyhow::Error) -> bool {
    format!("{error:#}").contains("address already in use")
}

async fn get(client: &Client, uri: &str) -> anyhow::Result<String> {
    Ok(client
        .request_text(http::Request::get(uri).body(Vec::new())?)
        .await?)
}

fn unless_it_exists<T>(created: Result<T, Error>) -> anyhow::Result<()> {
    match created {
        Err(Error::Api(status)) if status.is_already_exists() => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Ok(()),
    }
}
