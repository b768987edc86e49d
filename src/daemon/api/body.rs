//! The bodies of requests.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};

use super::error::ApiError;
use crate::hotplug::{HotplugRequest, Require};
use crate::operation::{AskedBy, DomainName, Order};
use crate::units::Bytes;

/// How long an operation may take that does not say.
const TIMEOUT_SECONDS: u64 = 60;
/// The longest that can be asked for.
const MOST_SECONDS: u64 = 3600;
/// The longest key.
const KEY_MAX_BYTES: usize = 128;

/// `POST …/vcpus`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct VcpusBody {
    count: u32,
    #[serde(default)]
    online: bool,
    #[serde(default, deserialize_with = "level")]
    require: Require,
    timeout_seconds: Option<u64>,
    idempotency_key: Option<String>,
}

/// `POST …/memory`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct MemoryBody {
    size: Bytes,
    #[serde(default, deserialize_with = "level")]
    require: Require,
    timeout_seconds: Option<u64>,
    idempotency_key: Option<String>,
}

/// `Online`, or `online` as on the command line.
fn level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Require, D::Error> {
    let text = String::deserialize(deserializer)?;
    Require::from_str(&text).map_err(D::Error::custom)
}

/// What a body asks for.
pub(super) trait IntoOrder: DeserializeOwned {
    fn into_order(self, domain: DomainName, asked_by: AskedBy) -> Result<Order, ApiError>;
}

impl IntoOrder for VcpusBody {
    fn into_order(self, domain: DomainName, asked_by: AskedBy) -> Result<Order, ApiError> {
        let request = HotplugRequest::Vcpus {
            count: self.count,
            online: self.online,
        };
        order(
            domain,
            asked_by,
            request,
            self.require,
            self.timeout_seconds,
            self.idempotency_key,
        )
    }
}

impl IntoOrder for MemoryBody {
    fn into_order(self, domain: DomainName, asked_by: AskedBy) -> Result<Order, ApiError> {
        let request = HotplugRequest::Memory { size: self.size };
        order(
            domain,
            asked_by,
            request,
            self.require,
            self.timeout_seconds,
            self.idempotency_key,
        )
    }
}

fn order(
    domain: DomainName,
    asked_by: AskedBy,
    request: HotplugRequest,
    require: Require,
    timeout_seconds: Option<u64>,
    idempotency_key: Option<String>,
) -> Result<Order, ApiError> {
    let seconds = timeout_seconds.unwrap_or(TIMEOUT_SECONDS);
    if !(1..=MOST_SECONDS).contains(&seconds) {
        return Err(ApiError::bad_request(
            "bad-timeout",
            format!("timeoutSeconds is {seconds}: it must be from 1 to {MOST_SECONDS}"),
        ));
    }
    let is_key = |key: &str| (1..=KEY_MAX_BYTES).contains(&key.len());
    if idempotency_key.as_deref().is_some_and(|key| !is_key(key)) {
        return Err(ApiError::bad_request(
            "bad-idempotency-key",
            format!("idempotencyKey must have from 1 to {KEY_MAX_BYTES} bytes"),
        ));
    }
    Ok(Order {
        domain,
        request,
        require,
        timeout: Duration::from_secs(seconds),
        asked_by,
        idempotency_key,
    })
}

/// A name that a domain can have.
pub(super) fn domain_name(name: String) -> Result<DomainName, ApiError> {
    DomainName::try_from(name).map_err(|error| ApiError::bad_request("bad-name", error.to_string()))
}

/// Reads a body; the error says what is wrong and where.
pub(super) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if bytes.is_empty() {
        return Err(malformed("the body is empty: send a JSON object"));
    }
    serde_json::from_slice(bytes).map_err(malformed)
}

fn malformed(problem: impl fmt::Display) -> ApiError {
    ApiError::bad_request("malformed", format!("the body is wrong: {problem}"))
}
