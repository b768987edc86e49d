//! `POST /v1/domains/{name}/vcpus`.

use serde::Deserialize;

use super::body::{CommonFields, HotplugBody, level, not_null};
use crate::hotplug::{HotplugRequest, Require};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct VcpusBody {
    count: u32,
    #[serde(default)]
    online: bool,
    #[serde(default, deserialize_with = "level")]
    require: Require,
    #[serde(default)]
    persistent: bool,
    #[serde(default, deserialize_with = "not_null")]
    timeout_seconds: Option<u64>,
    #[serde(default, deserialize_with = "not_null")]
    idempotency_key: Option<String>,
}

impl HotplugBody for VcpusBody {
    const PATH: &'static str = "/v1/domains/{name}/vcpus";

    fn into_parts(self) -> (HotplugRequest, CommonFields) {
        let request = HotplugRequest::Vcpus {
            count: self.count,
            online: self.online,
        };
        let common = CommonFields {
            require: self.require,
            persistent: self.persistent,
            timeout_seconds: self.timeout_seconds,
            idempotency_key: self.idempotency_key,
        };
        (request, common)
    }
}
