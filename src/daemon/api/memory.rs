//! `POST /v1/domains/{name}/memory`.

use serde::Deserialize;

use super::body::{CommonFields, HotplugBody, level, not_null};
use crate::hotplug::{HotplugRequest, Require};
use crate::units::Bytes;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct MemoryBody {
    size: Bytes,
    #[serde(default)]
    force: bool,
    #[serde(default, deserialize_with = "level")]
    require: Require,
    #[serde(default)]
    persistent: bool,
    #[serde(default, deserialize_with = "not_null")]
    timeout_seconds: Option<u64>,
    #[serde(default, deserialize_with = "not_null")]
    idempotency_key: Option<String>,
}

impl HotplugBody for MemoryBody {
    const PATH: &'static str = "/v1/domains/{name}/memory";

    fn into_parts(self) -> (HotplugRequest, CommonFields) {
        let common = CommonFields {
            require: self.require,
            persistent: self.persistent,
            timeout_seconds: self.timeout_seconds,
            idempotency_key: self.idempotency_key,
        };
        let Self { size, force, .. } = self;
        (HotplugRequest::Memory { size, force }, common)
    }
}
