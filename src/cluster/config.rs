//! How the API server is found.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use http::HeaderValue;
use http::header::USER_AGENT;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::{Cluster, ClusterError};
use crate::label::LabelKey;

const AGENT: &str = concat!("virtnode/", env!("CARGO_PKG_VERSION"));

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
        // 15 times by default, with delays of up to 1000 s.
        client.default_retry = false;
        client.connect_timeout = Some(config.call_deadline);
        // For whoever reads the API server's audit log.
        client
            .headers
            .push((USER_AGENT, HeaderValue::from_static(AGENT)));
        let client =
            Client::try_from(client).map_err(|error| ClusterError::Configuration(error.into()))?;
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

/// A DNS-1123 subdomain of at most 253 characters (Kubernetes: `ValidateNodeName`).
pub(super) fn is_node_name(name: &str) -> bool {
    LabelKey::new(name, "x").is_ok()
}
