//! How the API server is found.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use http::HeaderValue;
use http::header::USER_AGENT;
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

use super::{Cluster, ClusterError};
use crate::label::LabelKey;

const AGENT: &str = concat!("virtnode/", env!("CARGO_PKG_VERSION"));

/// A connection that was silent for so long is asked for a sign of life, …
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
/// … and again so long after each that was not answered, …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// … so many times. Then it is broken: a minute after the last word. That also keeps alive what
/// routers and load balancers remember of it, which is minutes.
const KEEPALIVE_RETRIES: u32 = 3;

/// Which cluster and which Node.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// A kubeconfig file. Without one: `$KUBECONFIG`, `~/.kube/config`, and in a pod its service
    /// account.
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig other than its current one.
    pub context: Option<String>,
    /// The name of the Node that this daemon runs on.
    pub node_name: String,
    /// How long one call may take.
    pub call_deadline: Duration,
}

impl ClusterConfig {
    /// The default of [`Self::call_deadline`].
    pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

    /// The Node `node_name` of the cluster that is found without being named.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            kubeconfig: None,
            context: None,
            node_name: node_name.into(),
            call_deadline: Self::CALL_DEADLINE,
        }
    }
}

impl Cluster {
    /// Reads the configuration of the client. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ClusterError::Configuration`] if there is none or it is of no use.
    pub async fn connect(config: ClusterConfig) -> Result<Self, ClusterError> {
        let mut client = client_config(&config)
            .await
            .map_err(ClusterError::Configuration)?;
        // For whoever reads the API server's audit log.
        client
            .headers
            .push((USER_AGENT, HeaderValue::from_static(AGENT)));
        let client = client_of(client, config.call_deadline)
            .map_err(|error| ClusterError::Configuration(error.into()))?;
        Self::with_client(client, config.node_name, config.call_deadline)
    }
}

async fn client_config(config: &ClusterConfig) -> Result<Config, Box<dyn Error + Send + Sync>> {
    let options = KubeConfigOptions {
        context: config.context.clone(),
        ..Default::default()
    };
    Ok(match (&config.kubeconfig, &config.context) {
        (Some(path), _) => {
            Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &options).await?
        }
        (None, Some(_)) => Config::from_kubeconfig(&options).await?,
        (None, None) => Config::infer().await?,
    })
}

/// A client as kube makes it, but for two things. It makes a call once: kube's would make it 15
/// times, with delays of up to 1000 s. And the kernel finds out whether there is still somebody at
/// the other end of a connection that nothing comes from, as that of a watch at rest.
fn client_of(config: Config, deadline: Duration) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        // It has the words for what is not built in.
        return Client::try_from(config);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(deadline));
    tcp.set_keepalive(Some(KEEPALIVE_AFTER));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http = legacy::Client::builder(TokioExecutor::new()).build(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// A DNS-1123 subdomain of at most 253 characters (Kubernetes: `ValidateNodeName`).
pub(super) fn is_node_name(name: &str) -> bool {
    LabelKey::new(name, "x").is_ok()
}
