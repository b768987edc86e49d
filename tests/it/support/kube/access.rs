//! Kubeconfig files for one API server.

use std::fs;
use std::path::{Path, PathBuf};

use ::kube::Client;
use ::kube::config::{Config, KubeConfigOptions, Kubeconfig};
use http::HeaderValue;
use http::header::USER_AGENT;
use serde_json::{Value, json};

use super::pki::Authority;

/// Writes kubeconfig files into the directory of the certificate authority.
pub(super) struct Access {
    pub(super) authority: Authority,
    pub(super) api_port: u16,
}

impl Access {
    /// Writes the kubeconfig of a user with a client certificate.
    pub(super) fn of_user(&self, name: &str, group: Option<&str>) -> anyhow::Result<PathBuf> {
        let credentials = self.authority.user(name, group)?;
        let credentials = json!({
            "client-certificate": credentials.certificate,
            "client-key": credentials.key,
        });
        self.write(name, credentials)
    }

    /// Writes the kubeconfig of a token.
    pub(super) fn of_token(&self, file_stem: &str, token: &str) -> anyhow::Result<PathBuf> {
        self.write(file_stem, json!({"token": token}))
    }

    fn write(&self, file_stem: &str, credentials: Value) -> anyhow::Result<PathBuf> {
        let authority = self.authority.certificate();
        let path = authority.with_file_name(format!("{file_stem}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.api_port),
                "certificate-authority": authority,
            }}],
            "users": [{"name": "test", "user": credentials}],
        });
        fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(path)
    }
}

/// Returns a client with the user agent `virtnode-test`.
pub(super) async fn client_of(kubeconfig: &Path) -> anyhow::Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
    // Without retries, because tests check failures and have their own timeouts.
    config.default_retry = false;
    config
        .headers
        .push((USER_AGENT, HeaderValue::from_static("virtnode-test")));
    Ok(Client::try_from(config)?)
}
