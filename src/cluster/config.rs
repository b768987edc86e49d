//! Configuration of the client of the API server, and construction of the client.

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

// TCP keepalive: a connection whose peer has disappeared is closed a minute after its last byte.
// The probes also keep the entries of NAT gateways and load balancers, which expire after minutes.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

/// The cluster to connect to, and the Node that this daemon runs on.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// A kubeconfig file. Default: `$KUBECONFIG`, `~/.kube/config`, or the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig other than its current one.
    pub context: Option<String>,
    pub node_name: String,
    /// Timeout for each call.
    pub call_deadline: Duration,
}

impl ClusterConfig {
    /// Default of [`Self::call_deadline`].
    pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

    /// Returns the configuration for a Node of the default cluster.
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
    /// Reads the client configuration. Sends nothing.
    ///
    /// # Errors
    /// [`ClusterError::Configuration`] if the configuration is missing or invalid.
    pub async fn connect(config: ClusterConfig) -> Result<Self, ClusterError> {
        let mut client = client_config(&config)
            .await
            .map_err(ClusterError::Configuration)?;
        // The audit log of the API server shows it.
        client
            .headers
            .push((USER_AGENT, HeaderValue::from_static(AGENT)));
        let client = build_client(client, config.call_deadline)
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

/// Builds kube's own client with two differences. It sends each request once: kube's client retries
/// up to 15 times, with delays of up to 1000 s. And it enables TCP keepalive, so that the kernel
/// detects that the peer of an idle watch has disappeared.
fn build_client(config: Config, deadline: Duration) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        // Returns kube's own error if support for this proxy is not compiled in.
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

/// True for a DNS-1123 subdomain of at most 253 characters (Kubernetes: `ValidateNodeName`).
pub(super) fn is_node_name(name: &str) -> bool {
    LabelKey::new(name, "x").is_ok()
}
