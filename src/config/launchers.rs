//! The file's section `launchers`: connections to the libvirt of each KubeVirt launcher pod.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, seconds};

/// Maximum number of socket names that are looked for in a launcher.
const MAX_SOCKETS: usize = 8;
/// Maximum of `launchers.most`: each connection has two file descriptors and some memory.
const MAX_LAUNCHERS: usize = 4096;

/// The file's section `launchers`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LauncherSettings {
    /// True to connect to the libvirt of each launcher pod. Default: false.
    pub enabled: Option<bool>,
    /// The kubelet's directory of pods, or the broker's directory of sockets. Default:
    /// /var/lib/kubelet/pods.
    pub directory: Option<PathBuf>,
    /// Name of the volume with the socket in a launcher. Default: libvirt-runtime.
    pub volume: Option<String>,
    /// Names of the socket, the preferred first. Default: virtqemud-sock, libvirt-sock.
    pub sockets: Option<Vec<String>>,
    /// Interval between scans of the directory, in seconds. Default: 2.
    pub scan_seconds: Option<u64>,
    /// Maximum number of launchers. Default: 512.
    pub most: Option<usize>,
    /// True to execute vCPU hotplug in launchers. Default: false.
    pub hotplug: Option<bool>,
    /// True to verify a launcher's namespace and name by its Pod. Default: false.
    pub verify_pods: Option<bool>,
}

/// The validated section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LauncherConfig {
    pub enabled: bool,
    pub directory: PathBuf,
    pub volume: String,
    pub sockets: Vec<String>,
    pub scan_interval: Duration,
    pub most: usize,
    pub hotplug: bool,
    pub verify_pods: bool,
}

impl LauncherSettings {
    /// # Errors
    /// A value is out of range, or values contradict each other.
    pub(super) fn validate(self) -> Result<LauncherConfig, ConfigError> {
        let invalid = |problem: String| Err(ConfigError::Invalid(problem));
        let default = || "/var/lib/kubelet/pods".into();
        let directory: PathBuf = self.directory.unwrap_or_else(default);
        if !directory.is_absolute() {
            return invalid(format!(
                "launchers.directory is {}; it must be an absolute path",
                directory.display()
            ));
        }
        let volume = self.volume.unwrap_or_else(|| "libvirt-runtime".to_owned());
        let default = || ["virtqemud-sock", "libvirt-sock"].map(str::to_owned).into();
        let sockets: Vec<String> = self.sockets.unwrap_or_else(default);
        if sockets.is_empty() || sockets.len() > MAX_SOCKETS {
            return invalid(format!(
                "launchers.sockets has {} names; it must have from 1 to {MAX_SOCKETS}",
                sockets.len()
            ));
        }
        let named = [("volume", &volume)].into_iter();
        let named = named.chain(sockets.iter().map(|socket| ("sockets", socket)));
        for (key, name) in named {
            if !is_file_name(name) {
                return invalid(format!(
                    "launchers.{key}: {name:?} is not a valid file name"
                ));
            }
        }
        let most = self.most.unwrap_or(512);
        if !(1..=MAX_LAUNCHERS).contains(&most) {
            return invalid(format!(
                "launchers.most is {most}; it must be from 1 to {MAX_LAUNCHERS}"
            ));
        }
        let config = LauncherConfig {
            enabled: self.enabled.unwrap_or(false),
            directory,
            volume,
            sockets,
            scan_interval: seconds("launchers.scanSeconds", self.scan_seconds, 2, 1..=60)?,
            most,
            hotplug: self.hotplug.unwrap_or(false),
            verify_pods: self.verify_pods.unwrap_or(false),
        };
        if config.hotplug && !config.verify_pods {
            return invalid(
                "launchers.hotplug: true needs launchers.verifyPods: true, since a launcher could \
                 claim the name of another tenant's virtual machine"
                    .to_owned(),
            );
        }
        Ok(config)
    }
}

/// True for the name of a file in a directory.
fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validate(text: &str) -> Result<LauncherConfig, String> {
        let settings: LauncherSettings = serde_saphyr::from_str(text).unwrap();
        settings.validate().map_err(|error| error.to_string())
    }

    #[test]
    fn launchers_are_off_by_default() {
        let config = LauncherSettings::default().validate().unwrap();
        assert!(!config.enabled && !config.hotplug && !config.verify_pods);
        assert_eq!(config.scan_interval, Duration::from_secs(2));
        assert_eq!(config.sockets, ["virtqemud-sock", "libvirt-sock"]);
        assert_eq!(config.most, 512);
    }

    #[test]
    fn invalid_values_are_named() {
        for (text, problem) in [
            ("directory: pods", "absolute path"),
            ("volume: a/b", "launchers.volume: \"a/b\""),
            ("volume: ..", "not a valid file name"),
            ("sockets: []", "from 1 to 8"),
            ("sockets: [x, '']", "launchers.sockets: \"\""),
            ("scanSeconds: 0", "from 1 to 60 seconds"),
            ("scanSeconds: 61", "from 1 to 60 seconds"),
            ("most: 0", "from 1 to 4096"),
            ("hotplug: true", "needs launchers.verifyPods"),
        ] {
            let error = validate(text).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
        assert!(
            validate("{hotplug: true, verifyPods: true}")
                .unwrap()
                .hotplug
        );
    }
}
