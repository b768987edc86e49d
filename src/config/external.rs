//! The file's section `externalChanges`: verification of changes that other clients make.

use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, seconds};

/// The file's section `externalChanges`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ExternalChangesSettings {
    /// True to verify changes that other clients of libvirt make. Default: false.
    pub enabled: Option<bool>,
    /// Time for a guest to follow a change, in seconds. Default: 60.
    pub grace_seconds: Option<u64>,
}

/// The validated section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExternalChangesConfig {
    pub enabled: bool,
    pub grace: Duration,
}

impl ExternalChangesSettings {
    /// # Errors
    /// A value is out of range.
    pub(super) fn validate(self) -> Result<ExternalChangesConfig, ConfigError> {
        let grace = self.grace_seconds;
        Ok(ExternalChangesConfig {
            enabled: self.enabled.unwrap_or(false),
            grace: seconds("externalChanges.graceSeconds", grace, 60, 5..=600)?,
        })
    }
}
