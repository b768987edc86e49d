//! The identity of a domain.
//!
//! UUIDs are unique within one hypervisor connection, not on a node: a node may run a libvirt of
//! its own, one libvirt in each KubeVirt launcher pod, and QEMU processes with bare QMP sockets.
//! So the connection is part of the identity.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::{ParseError, string_conversions};

/// One of the hypervisor connections of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ConnectionId {
    /// The libvirt of the node itself.
    #[default]
    Host,
    /// The libvirt in a KubeVirt launcher pod, by the pod's UID.
    Launcher { pod: String },
    /// A QEMU process without libvirt, by the name of its QMP socket.
    Qmp { socket: String },
}

impl ConnectionId {
    /// Returns the connection to the libvirt in a launcher pod.
    pub fn launcher(pod: impl Into<String>) -> Self {
        Self::Launcher { pod: pod.into() }
    }

    /// True for the libvirt of a launcher pod.
    pub fn is_launcher(&self) -> bool {
        matches!(self, Self::Launcher { .. })
    }

    /// True for the connection that records do not mention.
    pub fn is_host(&self) -> bool {
        *self == Self::Host
    }

    /// Returns the kind of connection: the metrics label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Launcher { .. } => "launcher",
            Self::Qmp { .. } => "qmp",
        }
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.pad("host"),
            Self::Launcher { pod } => write!(f, "launcher:{pod}"),
            Self::Qmp { socket } => write!(f, "qmp:{socket}"),
        }
    }
}

impl FromStr for ConnectionId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text.split_once(':') {
            None if text == "host" => Ok(Self::Host),
            Some(("launcher", pod)) if !pod.is_empty() => Ok(Self::Launcher { pod: pod.into() }),
            Some(("qmp", socket)) if !socket.is_empty() => Ok(Self::Qmp {
                socket: socket.into(),
            }),
            _ => Err(ParseError::new(
                text,
                "is not a connection: use host, launcher:<pod uid> or qmp:<socket>",
            )),
        }
    }
}

string_conversions!(ConnectionId);

/// Identifies a domain. Equality, order and hash use [`DomainRef::key`]: the name may change.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DomainRef {
    #[serde(default, skip_serializing_if = "ConnectionId::is_host")]
    pub connection: ConnectionId,
    /// The UUID in lower case with hyphens.
    pub uuid: String,
    /// The name at the last lookup: untrusted text.
    pub name: String,
}

impl DomainRef {
    /// Returns a domain of the node's own libvirt.
    pub fn on_host(name: impl Into<String>, uuid: impl Into<String>) -> Self {
        Self {
            connection: ConnectionId::Host,
            uuid: uuid.into(),
            name: name.into(),
        }
    }

    /// Returns the namespace and the name of the virtual machine that a launcher's domain belongs
    /// to; `None` for any other domain. KubeVirt names the domain `namespace_name`, and neither part
    /// can have an underscore. A launcher can choose any name, so this is a claim.
    pub fn namespace_and_name(&self) -> Option<(&str, &str)> {
        match self.connection {
            ConnectionId::Launcher { .. } => split_namespace(&self.name),
            ConnectionId::Host | ConnectionId::Qmp { .. } => None,
        }
    }

    /// Returns the name for people: `namespace/name` for a launcher's domain.
    pub fn display_name(&self) -> Cow<'_, str> {
        match self.namespace_and_name() {
            Some((namespace, name)) => format!("{namespace}/{name}").into(),
            None => self.name.as_str().into(),
        }
    }

    /// Returns the identity: the connection and the UUID.
    pub fn key(&self) -> (&ConnectionId, &str) {
        (&self.connection, &self.uuid)
    }
}

fn split_namespace(domain: &str) -> Option<(&str, &str)> {
    let parts = domain.split_once('_');
    parts.filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
}

/// True if a text is spelled like a UUID. A domain's name may be, too.
pub fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.char_indices().all(|(at, c)| match at {
            8 | 13 | 18 | 23 => c == '-',
            _ => c.is_ascii_hexdigit(),
        })
}

impl PartialEq for DomainRef {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for DomainRef {}

impl PartialOrd for DomainRef {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for DomainRef {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Hash for DomainRef {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl fmt::Display for DomainRef {
    /// Writes the name with unprintable characters escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_is_written_and_read_as_one_string() {
        let launcher = ConnectionId::Launcher {
            pod: "6f9f6bcb-5d8e".to_owned(),
        };
        let qmp = ConnectionId::Qmp {
            socket: "vm:1".to_owned(),
        };
        for (id, text) in [
            (ConnectionId::Host, "host"),
            (launcher, "launcher:6f9f6bcb-5d8e"),
            (qmp, "qmp:vm:1"),
        ] {
            assert_eq!(id.to_string(), text);
            assert_eq!(text.parse(), Ok(id));
        }
        for bad in ["", "Host", "launcher", "launcher:", "qmp:", "tcp:x"] {
            assert!(bad.parse::<ConnectionId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn renamed_domain_is_the_same_and_other_connection_is_not() {
        let domain = DomainRef::on_host("a", "u");
        let renamed = DomainRef::on_host("b", "u");
        let elsewhere = DomainRef {
            connection: "qmp:a".parse().unwrap(),
            ..domain.clone()
        };
        assert_eq!(domain, renamed);
        assert_ne!(domain, elsewhere);
        let json = serde_json::to_string(&domain).unwrap();
        assert_eq!(json, r#"{"uuid":"u","name":"a"}"#);
        let json = serde_json::to_string(&elsewhere).unwrap();
        let read: DomainRef = serde_json::from_str(&json).unwrap();
        assert_eq!(read, elsewhere);
    }

    #[test]
    fn namespace_is_split_off_a_launchers_domain_only() {
        let split = |connection: &str, name: &str| {
            let domain = DomainRef {
                connection: connection.parse().unwrap(),
                ..DomainRef::on_host(name, "u")
            };
            let parts = domain.namespace_and_name();
            let parts = parts.map(|(namespace, name)| (namespace.to_owned(), name.to_owned()));
            (parts, domain.display_name().into_owned())
        };
        let (parts, shown) = split("launcher:p", "tenant-a_web");
        assert_eq!(parts, Some(("tenant-a".to_owned(), "web".to_owned())));
        assert_eq!(shown, "tenant-a/web");
        assert_eq!(split("host", "tenant-a_web"), (None, "tenant-a_web".into()));
        for odd in ["web", "_web", "tenant_", ""] {
            assert_eq!(split("launcher:p", odd), (None, odd.to_owned()));
        }
    }
}
