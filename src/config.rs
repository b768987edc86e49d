//! Configuration, from three layers: a YAML file, then `VIRTNODE_*`, then flags. Later layers win.
//!
//! [`Settings`] is one layer as written, with every field optional. [`Config`] is the validated
//! merge of all layers.

mod external;
mod launchers;
mod messages;

pub use self::external::{ExternalChangesConfig, ExternalChangesSettings};
pub use self::launchers::{LauncherConfig, LauncherSettings};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use thiserror::Error;

use self::messages::Messages;
use crate::label::{Policy, Schema};
use crate::units::whole_number;

/// The configuration file that is read if no other is named. It may be missing.
pub const DEFAULT_PATH: &str = "/etc/virtnode/config.yaml";

/// The word for `connect` on a machine without a libvirt of its own: an empty URI has another meaning.
const NO_LIBVIRT: &str = "none";

/// Maximum size of a configuration file.
const MAX_BYTES: u64 = 1024 * 1024;

/// Maximum of settings in seconds: a day.
const DAY: u64 = 86_400;

/// Headings of `--help`, in one place so that every command groups its options alike.
pub(crate) mod heading {
    pub(crate) const CONNECTION: &str = "Connection";
    pub(crate) const KUBERNETES: &str = "Kubernetes";
    pub(crate) const PUBLISHING: &str = "Publishing";
    pub(crate) const SERVING: &str = "Serving";
    pub(crate) const OUTPUT: &str = "Output";
    pub(crate) const LOGGING: &str = "Logging";
    pub(crate) const FILES: &str = "Files";
}

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}: {source}")]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the configuration {0} is larger than 1 MiB")]
    TooLarge(PathBuf),
    /// The file is not YAML, or has an unknown key or an invalid value.
    #[error("the configuration {path} is not valid: {problem}")]
    Malformed {
        path: PathBuf,
        /// The parser's message, with line and column.
        problem: String,
    },
    /// A value out of range, or values that contradict each other.
    #[error("{0}")]
    Invalid(String),
}

/// Destination of labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PublishTarget {
    /// `labels.json` in the state directory, and Node Feature Discovery's `features.d` if it
    /// exists
    File,
    /// The Kubernetes Node
    Node,
    /// Nowhere: metrics only
    None,
}

/// Origin of the documents that labels are derived from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelOrigin {
    /// The documents of KubeVirt's node-labeller if there are any, else the libvirt of the host
    #[default]
    Auto,
    /// The libvirt of the host
    Libvirt,
    /// The documents of KubeVirt's node-labeller
    Files,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// One layer of settings: the file's, or that of flags and environment.
///
/// `cli::options` makes every flag global, so that scripts can put it before or after the command,
/// and hides it from the help of the commands on which it has no effect.
#[derive(Debug, Clone, Default, Deserialize, Args)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// libvirt connection URI, or none [default: qemu:///system]
    #[arg(
        short = 'c',
        long,
        visible_alias = "uri",
        env = "VIRTNODE_CONNECT",
        value_name = "URI"
    )]
    pub connect: Option<String>,

    /// Timeout of a libvirt call, in seconds [default: 30]
    #[arg(
        long = "call-deadline",
        env = "VIRTNODE_CALL_DEADLINE",
        value_name = "SECONDS",
        value_parser = whole_number(0..=DAY)
    )]
    pub call_deadline_seconds: Option<u64>,

    /// Unix socket of the daemon's local API [default: /run/virtnode/virtnode.sock]
    #[arg(long, env = "VIRTNODE_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Name of this machine's Node [default: the host name]
    #[arg(long, env = "VIRTNODE_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,

    /// Kubeconfig file, for use outside a pod [default: $KUBECONFIG if labels go to the Node]
    #[arg(long, env = "VIRTNODE_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Context in the kubeconfig [default: its current context]
    #[arg(long, env = "VIRTNODE_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,

    /// Destinations of labels [default: node in a cluster, else file]
    #[arg(
        long,
        env = "VIRTNODE_PUBLISH",
        value_delimiter = ',',
        value_name = "TARGET"
    )]
    pub publish: Option<Vec<PublishTarget>>,

    /// Label keys to use: native, kubevirt or both [default: native]
    #[arg(long, env = "VIRTNODE_SCHEMA", value_name = "SCHEMA")]
    pub schema: Option<Schema>,

    /// Take over labels that another field manager owns, instead of leaving them to it
    #[arg(
        long,
        env = "VIRTNODE_FORCE_CONFLICTS",
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub force_conflicts: Option<bool>,

    /// Node Feature Discovery's directory for feature files
    /// [default: /etc/kubernetes/node-feature-discovery/features.d]
    #[arg(long, env = "VIRTNODE_FEATURES_DIRECTORY", value_name = "DIR")]
    pub features_directory: Option<PathBuf>,

    /// Interval between probes of libvirt and the host, in seconds [default: 60]
    #[arg(
        long = "probe-interval",
        env = "VIRTNODE_PROBE_INTERVAL",
        value_name = "SECONDS",
        value_parser = whole_number(0..=DAY)
    )]
    pub probe_interval_seconds: Option<u64>,

    /// Maximum random delay before the first write to the API server, in seconds [default: 10]
    #[arg(
        long = "start-jitter",
        env = "VIRTNODE_START_JITTER",
        value_name = "SECONDS",
        value_parser = whole_number(0..=DAY)
    )]
    pub start_jitter_seconds: Option<u64>,

    /// Address of the daemon's metrics and health endpoints [default: :9478]
    #[arg(long, env = "VIRTNODE_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<String>,

    /// Format of log lines [default: text]
    #[arg(long, env = "VIRTNODE_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Log filter: LEVEL or TARGET=LEVEL, separated by commas [default: info]
    #[arg(long, env = "VIRTNODE_LOG", value_name = "FILTER")]
    pub log: Option<String>,

    /// State directory: published labels and the operation journal [default: /var/lib/virtnode]
    #[arg(long, env = "VIRTNODE_STATE_DIRECTORY", value_name = "DIR")]
    pub state_directory: Option<PathBuf>,

    // The sections below have no flags: only the file can set them.
    #[arg(skip)]
    pub labels: LabelSettings,

    #[arg(skip)]
    pub api: ApiSettings,

    #[arg(skip)]
    pub hotplug: HotplugSettings,

    #[arg(skip)]
    pub launchers: LauncherSettings,

    #[arg(skip)]
    pub external_changes: ExternalChangesSettings,
}

/// The file's section `labels`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LabelSettings {
    /// CPU models that new guests should not use.
    pub obsolete_cpu_models: Option<Vec<String>>,
    /// Guest architectures in addition to the host's own.
    pub guest_architectures: Vec<String>,
    /// Origin of the documents: `auto`, `libvirt`, `files`. Default: `auto`.
    pub source: Option<LabelOrigin>,
    /// Directory of KubeVirt's node-labeller. Default: `/var/lib/kubevirt-node-labeller`.
    pub documents: Option<PathBuf>,
}

/// The file's section `api`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ApiSettings {
    /// Users that may use the local API. Default: root and the daemon's own user.
    pub allowed_uids: Option<Vec<u32>>,
    /// Groups whose members may use the local API. The socket belongs to the first of them.
    pub allowed_gids: Vec<u32>,
}

/// The file's section `hotplug`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HotplugSettings {
    /// False disables hotplug on this node. Default: true.
    pub enabled: Option<bool>,
    /// False ignores the cluster's DomainHotplug objects. Default: true.
    pub objects: Option<bool>,
    /// True also queries QEMU directly, bypassing libvirt, for the guest's ACPI answers. libvirt
    /// then marks the domain as tainted. Default: false.
    pub deep_verify: Option<bool>,
}

/// The validated merge of all layers. Fields are documented where [`Settings`] has them.
#[derive(Debug, Clone)]
pub struct Config {
    /// `None` if this machine has no libvirt of its own. An empty URI is libvirt's own choice.
    pub connect: Option<String>,
    /// Empty if labels are published nowhere.
    pub publish: Vec<PublishTarget>,
    pub policy: Policy,
    pub label_origin: LabelOrigin,
    /// The directory of KubeVirt's documents.
    pub documents: PathBuf,
    pub force_conflicts: bool,
    pub node_name: Option<String>,
    pub kubeconfig: Option<PathBuf>,
    pub context: Option<String>,
    pub state_directory: PathBuf,
    pub features_directory: PathBuf,
    pub listen: SocketAddr,
    pub socket: PathBuf,
    /// `None` means root and the daemon's own user.
    pub allowed_uids: Option<Vec<u32>>,
    pub allowed_gids: Vec<u32>,
    pub hotplug: bool,
    pub hotplug_objects: bool,
    pub deep_verify: bool,
    pub launchers: LauncherConfig,
    pub external_changes: ExternalChangesConfig,
    pub probe_interval: Duration,
    pub start_jitter: Duration,
    pub call_deadline: Duration,
    pub log_format: LogFormat,
    pub log: String,
}

impl Config {
    /// Merges the file at `path`, or else the default file if it exists, with a later layer.
    ///
    /// `in_cluster` is true in a pod. It decides where labels go unless a layer does.
    ///
    /// # Errors
    /// The file cannot be read or parsed, or a value is out of range.
    pub fn load(
        path: Option<&Path>,
        later: &Settings,
        in_cluster: bool,
    ) -> Result<Self, ConfigError> {
        let file = match path {
            Some(path) => read(path)?,
            None if Path::new(DEFAULT_PATH).exists() => read(Path::new(DEFAULT_PATH))?,
            None => Settings::default(),
        };
        Self::merge(file, later.clone(), in_cluster)
    }

    fn merge(file: Settings, later: Settings, in_cluster: bool) -> Result<Self, ConfigError> {
        let kubeconfig = later.kubeconfig.or(file.kubeconfig);
        let default_target = if in_cluster || kubeconfig.is_some() {
            PublishTarget::Node
        } else {
            PublishTarget::File
        };
        macro_rules! chosen {
            ($field:ident) => {
                later.$field.or(file.$field)
            };
        }
        let path = |chosen: Option<PathBuf>, default: &str| chosen.unwrap_or(default.into());
        let text = |chosen: Option<String>, default: &str| chosen.unwrap_or(default.to_owned());
        let probe_interval = chosen!(probe_interval_seconds);
        let features = "/etc/kubernetes/node-feature-discovery/features.d";
        let obsolete_cpu_models = file.labels.obsolete_cpu_models;
        Ok(Self {
            connect: Some(text(chosen!(connect), "qemu:///system")).filter(|uri| uri != NO_LIBVIRT),
            publish: publish_targets(chosen!(publish), default_target)?,
            policy: Policy {
                schema: chosen!(schema).unwrap_or_default(),
                obsolete_cpu_models: obsolete_cpu_models.map(BTreeSet::from_iter),
                guest_architectures: file.labels.guest_architectures,
            },
            label_origin: file.labels.source.unwrap_or_default(),
            documents: path(file.labels.documents, "/var/lib/kubevirt-node-labeller"),
            force_conflicts: chosen!(force_conflicts).unwrap_or(false),
            node_name: chosen!(node_name),
            kubeconfig,
            context: chosen!(context),
            state_directory: path(chosen!(state_directory), "/var/lib/virtnode"),
            features_directory: path(chosen!(features_directory), features),
            listen: parse_listen(&text(chosen!(listen), ":9478"))?,
            socket: path(chosen!(socket), "/run/virtnode/virtnode.sock"),
            allowed_uids: file.api.allowed_uids,
            allowed_gids: file.api.allowed_gids,
            hotplug: file.hotplug.enabled.unwrap_or(true),
            hotplug_objects: file.hotplug.objects.unwrap_or(true),
            deep_verify: file.hotplug.deep_verify.unwrap_or(false),
            launchers: file.launchers.validate()?,
            external_changes: file.external_changes.validate()?,
            probe_interval: seconds("probeIntervalSeconds", probe_interval, 60, 1..=86_400)?,
            start_jitter: seconds(
                "startJitterSeconds",
                chosen!(start_jitter_seconds),
                10,
                0..=3_600,
            )?,
            call_deadline: seconds(
                "callDeadlineSeconds",
                chosen!(call_deadline_seconds),
                30,
                1..=600,
            )?,
            log_format: chosen!(log_format).unwrap_or_default(),
            log: text(chosen!(log), "info"),
        })
    }

    /// Returns true if labels are published to `target`.
    pub fn publishes_to(&self, target: PublishTarget) -> bool {
        self.publish.contains(&target)
    }
}

fn seconds(
    name: &str,
    chosen: Option<u64>,
    default: u64,
    range: RangeInclusive<u64>,
) -> Result<Duration, ConfigError> {
    let seconds = chosen.unwrap_or(default);
    if range.contains(&seconds) {
        return Ok(Duration::from_secs(seconds));
    }
    let (minimum, maximum) = range.into_inner();
    Err(ConfigError::Invalid(format!(
        "{name} is {seconds}; it must be from {minimum} to {maximum} seconds"
    )))
}

fn read(path: &Path) -> Result<Settings, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_BYTES {
        return Err(ConfigError::TooLarge(path.to_owned()));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    parse(&text).map_err(|problem| ConfigError::Malformed {
        path: path.to_owned(),
        problem,
    })
}

fn parse(text: &str) -> Result<Settings, String> {
    // A file without a setting is valid, though it is not a YAML mapping.
    if text
        .lines()
        .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
    {
        return Ok(Settings::default());
    }
    serde_saphyr::from_str(text).map_err(|error| error.render_with_formatter(&Messages))
}

fn publish_targets(
    chosen: Option<Vec<PublishTarget>>,
    default: PublishTarget,
) -> Result<Vec<PublishTarget>, ConfigError> {
    let mut targets = chosen.unwrap_or_else(|| vec![default]);
    targets.dedup();
    match targets[..] {
        [PublishTarget::None] => Ok(Vec::new()),
        _ if targets.contains(&PublishTarget::None) => Err(ConfigError::Invalid(
            "publish: 'none' cannot be combined with another target".to_owned(),
        )),
        [] => Err(ConfigError::Invalid(
            "publish: name at least one of file, node and none".to_owned(),
        )),
        _ => Ok(targets),
    }
}

/// Parses an address. `:9478` means every address, IPv4 and IPv6.
fn parse_listen(text: &str) -> Result<SocketAddr, ConfigError> {
    let every = text
        .strip_prefix(':')
        .and_then(|port| port.parse().ok())
        .map(|port| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
    every.or_else(|| text.parse().ok()).ok_or_else(|| {
        ConfigError::Invalid(format!(
            "listen: '{text}' is not a valid address: write it like 127.0.0.1:9478, [::1]:9478 or \
             :9478"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(file: &str, later: Settings) -> Result<Config, String> {
        Config::merge(parse(file)?, later, false).map_err(|error| error.to_string())
    }

    #[test]
    fn later_layer_overrides_file() {
        let later = Settings {
            connect: Some("test:///default".into()),
            ..Settings::default()
        };
        let config = merge("connect: qemu:///session\nnodeName: a\n", later).unwrap();
        assert_eq!(config.connect.as_deref(), Some("test:///default"));
        assert_eq!(config.node_name.as_deref(), Some("a"));
        assert_eq!(config.publish, [PublishTarget::File]);
        assert!(config.hotplug && !config.deep_verify);
        assert_eq!(config.listen.port(), 9478);
    }

    #[test]
    fn empty_file_yields_defaults() {
        let connect = |file| merge(file, Settings::default()).unwrap().connect;
        assert_eq!(connect("").as_deref(), Some("qemu:///system"));
        assert_eq!(connect("connect: none"), None);
        assert_eq!(connect("connect: ''").as_deref(), Some(""));
        assert_eq!(
            merge("# nothing\n\n", Settings::default()).unwrap().publish,
            [PublishTarget::File]
        );
    }

    #[test]
    fn file_sets_every_section() {
        let text = "
publish: [file, node]
schema: both
startJitterSeconds: 0
listen: 127.0.0.1:1
labels:
  obsoleteCpuModels: [qemu64]
  guestArchitectures: [aarch64]
  source: files
  documents: /documents
socket: /run/x.sock
api:
  allowedUids: [0, 107]
  allowedGids: [36]
hotplug:
  enabled: false
  objects: false
  deepVerify: true
launchers:
  enabled: true
  directory: /pods
externalChanges:
  enabled: true
  graceSeconds: 30
";
        let config = merge(text, Settings::default()).unwrap();
        assert_eq!(config.publish, [PublishTarget::File, PublishTarget::Node]);
        assert_eq!(config.policy.schema, Schema::Both);
        assert_eq!(config.allowed_uids, Some(vec![0, 107]));
        assert_eq!(config.allowed_gids, [36]);
        assert_eq!(config.socket, Path::new("/run/x.sock"));
        assert!(!config.hotplug && !config.hotplug_objects);
        assert!(!config.hotplug && config.deep_verify);
        assert!(config.launchers.enabled);
        assert!(config.external_changes.enabled);
        assert_eq!(config.external_changes.grace.as_secs(), 30);
        assert_eq!(config.launchers.directory, Path::new("/pods"));
        assert_eq!(config.policy.guest_architectures, ["aarch64"]);
        assert_eq!(config.label_origin, LabelOrigin::Files);
        assert_eq!(config.documents, Path::new("/documents"));
        assert!(
            config
                .policy
                .obsolete_cpu_models
                .unwrap()
                .contains("qemu64")
        );
    }

    #[test]
    fn errors_name_the_wrong_key_or_value() {
        let error = |file: &str| merge(file, Settings::default()).unwrap_err();
        assert!(
            error("conect: x").contains("conect"),
            "{}",
            error("conect: x")
        );
        assert!(error("labels: {schema: native}").contains("schema"));
        assert!(error("labels: {source: qemu}").contains("qemu"));
        assert!(error("api: {allowedUsers: [0]}").contains("allowedUsers"));
        assert!(error("hotplug: {enable: false}").contains("enable"));
        assert!(error("externalChanges: {graceSeconds: 4}").contains("from 5 to 600"));
        assert!(error("launchers: {scanSeconds: 61}").contains("from 1 to 60"));
        assert!(error("publish: [none, file]").contains("'none' cannot be combined"));
        assert!(error("publish: []").contains("at least one"));
        assert!(error("probeIntervalSeconds: 0").contains("from 1 to 86400"));
        assert!(error("listen: nowhere").contains("'nowhere' is not a valid address"));
        for (file, words) in [
            (
                "conect: x",
                "'conect' is not a setting; the settings here are connect, ",
            ),
            (
                "schema: x",
                "'x' is not a valid value; write one of native, kubevirt, both",
            ),
            ("hotplug: {enabled: maybe}", "write true or false here"),
            ("hotplug: 5", "write settings here, each as `name: value`"),
            ("- a", "write settings here, each as `name: value`"),
            ("api: {allowedUids: 1}", "write a list here, like [a, b]"),
            (
                "api: {allowedUids: [-1]}",
                "write a whole number here, 0 or more",
            ),
            ("connect: [a]", "write a single value here"),
            (
                "schema: both\nschema: both",
                "the setting 'schema' is given twice",
            ),
        ] {
            assert!(error(file).contains(words), "{file}: {}", error(file));
        }
        assert!(!error("{").is_empty());
        assert!(!error("- a").is_empty());
    }
}
