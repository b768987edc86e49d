//! Bodies of hotplug requests: the common fields, and their validation.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};

use super::error::ApiError;
use crate::hotplug::{HotplugRequest, Require};
use crate::operation::{AskedBy, DomainName, Order};

/// Default timeout of an operation, in seconds.
const TIMEOUT_SECONDS: u64 = 60;
/// Maximum timeout of an operation, in seconds.
const MAX_TIMEOUT_SECONDS: u64 = 3600;
const KEY_MAX_CHARS: usize = 128;

/// Body of a request that changes one kind of resource.
pub(super) trait HotplugBody: DeserializeOwned {
    const PATH: &'static str;

    fn into_parts(self) -> (HotplugRequest, CommonFields);
}

/// The fields that every kind has. Each body repeats them, because serde cannot flatten a struct
/// into one that rejects unknown fields.
pub(super) struct CommonFields {
    pub(super) require: Require,
    pub(super) persistent: bool,
    pub(super) timeout_seconds: Option<u64>,
    pub(super) idempotency_key: Option<String>,
}

/// Parses and validates a request.
pub(super) fn order<B: HotplugBody>(
    domain: String,
    body: &[u8],
    asked_by: AskedBy,
) -> Result<Order, ApiError> {
    let domain = domain_name(domain)?;
    let (request, common) = read::<B>(body)?.into_parts();
    let seconds = common.timeout_seconds.unwrap_or(TIMEOUT_SECONDS);
    if !(1..=MAX_TIMEOUT_SECONDS).contains(&seconds) {
        return Err(ApiError::bad_request(
            "bad-timeout",
            format!("timeoutSeconds is {seconds}; it must be from 1 to {MAX_TIMEOUT_SECONDS}"),
        ));
    }
    let key = common.idempotency_key;
    let is_valid = |key: &String| (1..=KEY_MAX_CHARS).contains(&key.chars().count());
    if !key.as_ref().is_none_or(is_valid) {
        return Err(ApiError::bad_request(
            "bad-idempotency-key",
            format!("idempotencyKey must have from 1 to {KEY_MAX_CHARS} characters"),
        ));
    }
    Ok(Order {
        domain,
        request,
        require: common.require,
        persistent: common.persistent,
        timeout: Duration::from_secs(seconds),
        asked_by,
        idempotency_key: key,
    })
}

/// Accepts `Online`, and `online` as on the command line.
pub(super) fn level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Require, D::Error> {
    let text = String::deserialize(deserializer)?;
    Require::from_str(&text).map_err(D::Error::custom)
}

/// Rejects null: a field that is not given is absent.
pub(super) fn not_null<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    T::deserialize(deserializer).map(Some)
}

pub(super) fn domain_name(name: String) -> Result<DomainName, ApiError> {
    DomainName::try_from(name).map_err(|error| ApiError::bad_request("bad-name", error.to_string()))
}

/// Parses a body. The error names the field and the place.
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if bytes.is_empty() {
        return Err(malformed("the body is empty: send a JSON object"));
    }
    // serde also accepts an array, with the fields in order.
    let first = bytes.trim_ascii_start().first();
    if first.is_some_and(|first| matches!(first, b'[')) {
        return Err(malformed("invalid type: an array; send a JSON object"));
    }
    serde_json::from_slice(bytes).map_err(malformed)
}

fn malformed(problem: impl fmt::Display) -> ApiError {
    ApiError::bad_request("malformed", format!("the body is not valid: {problem}"))
}
