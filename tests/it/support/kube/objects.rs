//! The custom resources on a real API server.

use std::time::Duration;

use ::kube::api::{Api, ListParams};
use serde_json::Value;
use virtnode::cluster::objects::{DomainHotplug, definitions};

use super::KubeServer;
use crate::support::eventually;

/// Defines them all, and waits until the server knows them.
pub(crate) async fn define(server: &KubeServer) -> anyhow::Result<()> {
    let request = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    for definition in definitions() {
        // As it is printed: the type would leave out what it does not know.
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
