//! `POST /v1/domains/{name}/memory`.

use serde::Deserialize;

use super::body::{CommonFields, HotplugBody, level};
use crate::hotplug::{HotplugRequest, Require};
use crate::units::Bytes;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct MemoryBody {
    size: Bytes,
    #[serde(default, deserialize_with = "level")]
    require: Require,
    timeout_seconds: Option<u64>,
    idempotency_key: Option<String>,
}

impl HotplugBody for MemoryBody {
    const PATH: &'static str = "/v1/domains/{name}/memory";

    fn into_parts(self) -> (HotplugRequest, CommonFields) {
        let common = CommonFields {
            require: self.require,
            timeout_seconds: self.timeout_seconds,
            idempotency_key: self.idempotency_key,
        };
        (HotplugRequest::Memory { size: self.size }, common)
    }
}
