//! The custom resources on a real API server.

use std::time::Duration;

use ::kube::api::{Api, ListParams};
use serde_json::Value;
use virtnode::cluster::objects::{DomainHotplug, definitions};

use super::KubeServer;
use crate::support::eventually;

/// Applies all definitions, and waits until they are in force.
pub(crate) async fn define(server: &KubeServer) -> anyhow::Result<()> {
    let request = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    for definition in definitions() {
        // Untyped: the type would drop unknown fields.
        let request = http::Request::post(request)
            .header("content-type", "application/json")
            .body(serde_json::to_vec(&definition)?)?;
        let _made: Value = server.client().request(request).await?;
    }
    eventually(Duration::from_secs(60), async || {
        let objects: Api<DomainHotplug> = Api::all(server.client());
        objects.list(&ListParams::default()).await?;
        Ok(())
    })
    .await
}
