//! What an operator can set: a file, then `VIRTNODE_*`, then flags; later wins.
//!
//! [`Settings`] is one layer as written, every field optional. [`Config`] is the validated whole.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use thiserror::Error;

use crate::label::{Policy, Schema};

/// Where the configuration is read from unless told otherwise. It may be missing.
pub const DEFAULT_PATH: &str = "/etc/virtnode/config.yaml";

/// The longest configuration file that is read.
const MAX_BYTES: u64 = 1024 * 1024;

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too large to be meant.
    #[error("the configuration {0} is larger than 1 MiB")]
    TooLarge(PathBuf),
    /// The file is no YAML, or has a key or value that does not exist.
    #[error("the configuration {path} is wrong: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its place.
        problem: String,
    },
    /// Values that are right by themselves and not together.
    #[error("{0}")]
    Contradiction(String),
}

/// Where labels go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// `labels.json` in the state directory, and Node Feature Discovery's `features.d` if that
    /// is there.
    File,
    /// The Kubernetes Node.
    Node,
    /// Nowhere: metrics only.
    None,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// One layer of settings: the file's, or that of flags and environment.
#[derive(Debug, Clone, Default, Deserialize, Args)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// The libvirt connection [default: qemu:///system]
    #[arg(
        short = 'c',
        long,
        visible_alias = "uri",
        env = "VIRTNODE_CONNECT",
        value_name = "URI",
        global = true
    )]
    pub connect: Option<String>,

    /// Where labels go [default: node in a cluster, else file]
    #[arg(
        long,
        env = "VIRTNODE_PUBLISH",
        value_delimiter = ',',
        value_name = "TARGET",
        global = true
    )]
    pub publish: Option<Vec<Target>>,

    /// The keys that are written: native, kubevirt or both [default: native]
    #[arg(long, env = "VIRTNODE_SCHEMA", value_name = "SCHEMA", global = true)]
    pub schema: Option<Schema>,

    /// The name of this machine's Node [default: the host name]
    #[arg(long, env = "VIRTNODE_NODE_NAME", value_name = "NAME", global = true)]
    pub node_name: Option<String>,

    /// The kubeconfig, outside a pod [default: $KUBECONFIG if `publish` has node]
    #[arg(long, env = "VIRTNODE_KUBECONFIG", value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,

    /// The kubeconfig's context [default: its current one]
    #[arg(long, env = "VIRTNODE_CONTEXT", value_name = "NAME", global = true)]
    pub context: Option<String>,

    /// What is kept between runs [default: /var/lib/virtnode]
    #[arg(
        long,
        env = "VIRTNODE_STATE_DIRECTORY",
        value_name = "DIR",
        global = true
    )]
    pub state_directory: Option<PathBuf>,

    /// Node Feature Discovery's directory for feature files
    /// [default: /etc/kubernetes/node-feature-discovery/features.d]
    #[arg(
        long,
        env = "VIRTNODE_FEATURES_DIRECTORY",
        value_name = "DIR",
        global = true
    )]
    pub features_directory: Option<PathBuf>,

    /// Take a label over from another owner instead of giving it up
    #[arg(long, env = "VIRTNODE_FORCE_CONFLICTS", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", global = true)]
    pub force_conflicts: Option<bool>,

    /// Where metrics and health are served [default: :9478]
    #[arg(long, env = "VIRTNODE_LISTEN", value_name = "ADDRESS", global = true)]
    pub listen: Option<String>,

    /// The local API's socket [default: /run/virtnode/virtnode.sock]
    #[arg(long, env = "VIRTNODE_SOCKET", value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,

    /// Seconds between probes [default: 60]
    #[arg(
        long = "probe-interval",
        env = "VIRTNODE_PROBE_INTERVAL",
        value_name = "SECONDS",
        global = true
    )]
    pub probe_interval_seconds: Option<u64>,

    /// The longest random wait before the first write to the API server, in seconds [default: 10]
    #[arg(
        long = "start-jitter",
        env = "VIRTNODE_START_JITTER",
        value_name = "SECONDS",
        global = true
    )]
    pub start_jitter_seconds: Option<u64>,

    /// The longest wait for an answer of libvirt, in seconds [default: 30]
    #[arg(
        long = "call-deadline",
        env = "VIRTNODE_CALL_DEADLINE",
        value_name = "SECONDS",
        global = true
    )]
    pub call_deadline_seconds: Option<u64>,

    /// How log lines look [default: text]
    #[arg(
        long,
        env = "VIRTNODE_LOG_FORMAT",
        value_name = "FORMAT",
        global = true
    )]
    pub log_format: Option<LogFormat>,

    /// Which log lines are written, as LEVEL or TARGET=LEVEL, separated by commas [default: info]
    #[arg(long, env = "VIRTNODE_LOG", value_name = "FILTER", global = true)]
    pub log: Option<String>,

    /// What only the file can set.
    #[arg(skip)]
    pub labels: LabelSettings,

    /// What only the file can set.
    #[arg(skip)]
    pub api: ApiSettings,

    /// What only the file can set.
    #[arg(skip)]
    pub hotplug: HotplugSettings,
}

/// The file's section `labels`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LabelSettings {
    /// CPU models that no new guest should use.
    pub obsolete_cpu_models: Option<Vec<String>>,
    /// Guest architectures beside the host's own.
    pub guest_architectures: Vec<String>,
}

/// The file's section `api`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ApiSettings {
    /// The users that may use the local API; without them root and the daemon's own user.
    pub allowed_uids: Option<Vec<u32>>,
    /// The groups whose members may. The socket belongs to the first of them.
    pub allowed_gids: Vec<u32>,
}

/// The file's section `hotplug`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HotplugSettings {
    /// Whether domains are changed here; yes unless it says no.
    pub enabled: Option<bool>,
    /// Whether DomainHotplug objects of the cluster are taken on; yes unless it says no.
    pub objects: Option<bool>,
    /// Whether QEMU is also asked past libvirt for what the guest answered, which taints the
    /// domains that are changed; no unless it says yes.
    pub deep_verify: Option<bool>,
}

/// The validated whole.
#[derive(Debug, Clone)]
pub struct Config {
    /// The libvirt connection.
    pub connect: String,
    /// Where labels go; empty for nowhere.
    pub publish: Vec<Target>,
    /// What an operator decides about labels.
    pub policy: Policy,
    /// Whether a label is taken over from another owner.
    pub force_conflicts: bool,
    /// The name of this machine's Node.
    pub node_name: Option<String>,
    /// The kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context.
    pub context: Option<String>,
    /// What is kept between runs.
    pub state_directory: PathBuf,
    /// Node Feature Discovery's directory.
    pub features_directory: PathBuf,
    /// Where metrics and health are served.
    pub listen: SocketAddr,
    /// The local API's socket.
    pub socket: PathBuf,
    /// The users that may use the local API; `None` for root and the daemon's own.
    pub allowed_uids: Option<Vec<u32>>,
    /// The groups whose members may.
    pub allowed_gids: Vec<u32>,
    /// Whether domains are changed here.
    pub hotplug: bool,
    /// Whether DomainHotplug objects are taken on, where there is a cluster.
    pub hotplug_objects: bool,
    /// Whether QEMU is asked past libvirt, which taints domains.
    pub deep_verify: bool,
    /// The time between probes.
    pub probe_interval: Duration,
    /// The longest random wait before the first write to the API server.
    pub start_jitter: Duration,
    /// The longest wait for an answer of libvirt.
    pub call_deadline: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines are written.
    pub log: String,
}

impl Config {
    /// Joins the file at `path` (or the default one, which may be missing) with a later layer.
    ///
    /// `in_cluster` says whether this is a pod: it decides where labels go if nothing else does.
    ///
    /// # Errors
    /// What [`ConfigError`] says.
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
        Self::join(file, later.clone(), in_cluster)
    }

    fn join(file: Settings, later: Settings, in_cluster: bool) -> Result<Self, ConfigError> {
        let seconds = |name: &str, chosen: Option<u64>, default: u64, range: (u64, u64)| {
            let seconds = chosen.unwrap_or(default);
            if (range.0..=range.1).contains(&seconds) {
                Ok(Duration::from_secs(seconds))
            } else {
                let (least, most) = range;
                Err(ConfigError::Contradiction(format!(
                    "{name} is {seconds}; it must be from {least} to {most} seconds"
                )))
            }
        };
        let kubeconfig = later.kubeconfig.or(file.kubeconfig);
        let default_target = if in_cluster || kubeconfig.is_some() {
            Target::Node
        } else {
            Target::File
        };
        let listen = later
            .listen
            .or(file.listen)
            .unwrap_or_else(|| ":9478".to_owned());
        Ok(Self {
            connect: later
                .connect
                .or(file.connect)
                .unwrap_or_else(|| "qemu:///system".to_owned()),
            publish: targets(later.publish.or(file.publish), default_target)?,
            policy: Policy {
                schema: later.schema.or(file.schema).unwrap_or_default(),
                obsolete_cpu_models: file
                    .labels
                    .obsolete_cpu_models
                    .map(|models| models.into_iter().collect()),
                guest_architectures: file.labels.guest_architectures,
            },
            force_conflicts: later
                .force_conflicts
                .or(file.force_conflicts)
                .unwrap_or(false),
            node_name: later.node_name.or(file.node_name),
            kubeconfig,
            context: later.context.or(file.context),
            state_directory: later
                .state_directory
                .or(file.state_directory)
                .unwrap_or_else(|| PathBuf::from("/var/lib/virtnode")),
            features_directory: later
                .features_directory
                .or(file.features_directory)
                .unwrap_or_else(|| {
                    PathBuf::from("/etc/kubernetes/node-feature-discovery/features.d")
                }),
            listen: parse_listen(&listen)?,
            socket: later
                .socket
                .or(file.socket)
                .unwrap_or_else(|| PathBuf::from("/run/virtnode/virtnode.sock")),
            allowed_uids: file.api.allowed_uids,
            allowed_gids: file.api.allowed_gids,
            hotplug: file.hotplug.enabled.unwrap_or(true),
            hotplug_objects: file.hotplug.objects.unwrap_or(true),
            deep_verify: file.hotplug.deep_verify.unwrap_or(false),
            probe_interval: seconds(
                "probeIntervalSeconds",
                later.probe_interval_seconds.or(file.probe_interval_seconds),
                60,
                (1, 86_400),
            )?,
            start_jitter: seconds(
                "startJitterSeconds",
                later.start_jitter_seconds.or(file.start_jitter_seconds),
                10,
                (0, 3_600),
            )?,
            call_deadline: seconds(
                "callDeadlineSeconds",
                later.call_deadline_seconds.or(file.call_deadline_seconds),
                30,
                (1, 600),
            )?,
            log_format: later.log_format.or(file.log_format).unwrap_or_default(),
            log: later.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
        })
    }

    /// Whether labels go there.
    pub fn publishes_to(&self, target: Target) -> bool {
        self.publish.contains(&target)
    }
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
    // An empty file is no YAML mapping, and no mistake.
    if text
        .lines()
        .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
    {
        return Ok(Settings::default());
    }
    serde_saphyr::from_str(text).map_err(|error| error.to_string())
}

fn targets(chosen: Option<Vec<Target>>, default: Target) -> Result<Vec<Target>, ConfigError> {
    let mut targets = chosen.unwrap_or_else(|| vec![default]);
    targets.dedup();
    match targets[..] {
        [Target::None] => Ok(Vec::new()),
        _ if targets.contains(&Target::None) => Err(ConfigError::Contradiction(
            "publish: 'none' cannot stand beside another target".to_owned(),
        )),
        [] => Err(ConfigError::Contradiction(
            "publish: name at least one of file, node and none".to_owned(),
        )),
        _ => Ok(targets),
    }
}

/// `:9478` is every address, IPv4 and IPv6.
fn parse_listen(text: &str) -> Result<SocketAddr, ConfigError> {
    let every = text
        .strip_prefix(':')
        .and_then(|port| port.parse().ok())
        .map(|port| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
    every.or_else(|| text.parse().ok()).ok_or_else(|| {
        ConfigError::Contradiction(format!(
            "listen: '{text}' is no address: write it like 127.0.0.1:9478, [::1]:9478 or :9478"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(file: &str, later: Settings) -> Result<Config, String> {
        Config::join(parse(file)?, later, false).map_err(|error| error.to_string())
    }

    #[test]
    fn later_layers_win() {
        let later = Settings {
            connect: Some("test:///default".into()),
            ..Settings::default()
        };
        let config = join("connect: qemu:///session\nnodeName: a\n", later).unwrap();
        assert_eq!(config.connect, "test:///default");
        assert_eq!(config.node_name.as_deref(), Some("a"));
        assert_eq!(config.publish, [Target::File]);
        assert!(config.hotplug && !config.deep_verify);
        assert_eq!(config.listen.port(), 9478);
    }

    #[test]
    fn an_empty_file_is_no_mistake() {
        assert_eq!(
            join("", Settings::default()).unwrap().connect,
            "qemu:///system"
        );
        assert_eq!(
            join("# nothing\n\n", Settings::default()).unwrap().publish,
            [Target::File]
        );
    }

    #[test]
    fn the_file_can_set_everything() {
        let text = "
publish: [file, node]
schema: both
startJitterSeconds: 0
listen: 127.0.0.1:1
labels:
  obsoleteCpuModels: [qemu64]
  guestArchitectures: [aarch64]
socket: /run/x.sock
api:
  allowedUids: [0, 107]
  allowedGids: [36]
hotplug:
  enabled: false
  objects: false
  deepVerify: true
";
        let config = join(text, Settings::default()).unwrap();
        assert_eq!(config.publish, [Target::File, Target::Node]);
        assert_eq!(config.policy.schema, Schema::Both);
        assert_eq!(config.allowed_uids, Some(vec![0, 107]));
        assert_eq!(config.allowed_gids, [36]);
        assert_eq!(config.socket, Path::new("/run/x.sock"));
        assert!(!config.hotplug && !config.hotplug_objects);
        assert!(!config.hotplug && config.deep_verify);
        assert_eq!(config.policy.guest_architectures, ["aarch64"]);
        assert!(
            config
                .policy
                .obsolete_cpu_models
                .unwrap()
                .contains("qemu64")
        );
    }

    #[test]
    fn mistakes_are_named() {
        let error = |file: &str| join(file, Settings::default()).unwrap_err();
        assert!(
            error("conect: x").contains("conect"),
            "{}",
            error("conect: x")
        );
        assert!(error("labels: {schema: native}").contains("schema"));
        assert!(error("api: {allowedUsers: [0]}").contains("allowedUsers"));
        assert!(error("hotplug: {enable: false}").contains("enable"));
        assert!(error("publish: [none, file]").contains("'none' cannot stand beside"));
        assert!(error("publish: []").contains("at least one"));
        assert!(error("probeIntervalSeconds: 0").contains("from 1 to 86400"));
        assert!(error("listen: nowhere").contains("'nowhere' is no address"));
        assert!(!error("{").is_empty());
        assert!(!error("- a").is_empty());
    }
}
