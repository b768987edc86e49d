//! Connections to the libvirt of each KubeVirt launcher pod on this node.

use std::sync::Arc;

use crate::connections::ConnectionSet;
use crate::domain::ConnectionId;
use crate::hypervisor::Libvirt;

/// The launchers at one time, for services that ask each of them.
#[derive(Default)]
pub struct Census {
    /// True once the directory was scanned; until then nothing is known.
    pub scanned: bool,
    pub up: Vec<(ConnectionId, Arc<Libvirt>)>,
    /// Launchers whose libvirt cannot be asked, so that their domains are unknown.
    pub unreachable: Vec<ConnectionId>,
}

/// The launchers of this node.
pub struct Launchers {
    connections: Arc<ConnectionSet<Libvirt>>,
}

impl Launchers {
    pub fn new(connections: Arc<ConnectionSet<Libvirt>>) -> Self {
        Self { connections }
    }

    pub fn census(&self) -> Census {
        let up = self.connections.up().into_iter();
        Census {
            scanned: false,
            up: up
                .filter(|(connection, _)| connection.is_launcher())
                .collect(),
            unreachable: Vec::new(),
        }
    }
}
