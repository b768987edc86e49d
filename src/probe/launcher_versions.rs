//! Versions for KubeVirt's documents, which do not contain any: those of a connected launcher.
//!
//! Launchers of several versions run on a node until an update of KubeVirt has migrated all VMs. One
//! fits the documents if its capabilities give the usual machine type (`q35`, `virt`) the same
//! canonical name. Of several versions that fit, the highest counts.
//!
//! A launcher's answers are its own claim. It is asked for its versions once, and of each
//! pair of versions one launcher for its capabilities. Calls run at the same time, so launchers that
//! do not answer delay a probe by [`ALL_TIMEOUT`] at most, and no other launcher for longer.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::capability::{Capabilities, NodeFacts};
use crate::domain::ConnectionId;
use crate::hypervisor::{NodeSource, Versions};
use crate::label::FactSource;

/// Timeout for a launcher, whose libvirt answers from memory.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for all launchers together. The others are asked by the next probe.
const ALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of launchers that are asked at the same time.
const AT_A_TIME: usize = 4;
/// Maximum number of pairs of versions. A node has two or three; a launcher can invent others.
const MAX_PAIRS: usize = 16;

/// The versions of the connected launchers.
#[derive(Default)]
pub(super) struct LauncherVersions {
    launchers: HashMap<ConnectionId, Versions>,
    /// The canonical name of the usual machine type, by versions; `None` if there is no such type.
    machines: HashMap<Versions, Option<String>>,
    /// Launchers that did not report their capabilities: others with the same versions come first.
    silent: HashSet<ConnectionId>,
}

impl LauncherVersions {
    /// Returns the highest versions that fit, and a launcher that has them. `canonical` is the
    /// documents' usual machine type.
    pub(super) async fn find<H: NodeSource>(
        &mut self,
        up: &[(ConnectionId, Arc<H>)],
        canonical: &str,
    ) -> Option<(Versions, Arc<H>)> {
        self.read_versions(up).await;
        self.read_machines(up).await;
        let fits = |versions: &Versions| {
            let machine = self.machines.get(versions);
            machine.is_some_and(|machine| machine.as_deref() == Some(canonical))
        };
        up.iter()
            .filter_map(|(id, launcher)| Some((*self.launchers.get(id)?, launcher)))
            .filter(|(versions, _)| fits(versions))
            .max_by_key(|(versions, _)| *versions)
            .map(|(versions, launcher)| (versions, Arc::clone(launcher)))
    }

    /// Asks each new launcher for its versions.
    async fn read_versions<H: NodeSource>(&mut self, up: &[(ConnectionId, Arc<H>)]) {
        self.launchers
            .retain(|id, _| up.iter().any(|(other, _)| other == id));
        let mut new = Vec::new();
        for (id, launcher) in up {
            if !self.launchers.contains_key(id) {
                new.push((id.clone(), Arc::clone(launcher)));
            }
        }
        let answers = stream::iter(new)
            .map(|(id, launcher)| async move {
                let answer = timeout(TIMEOUT, launcher.versions()).await;
                (id, answer)
            })
            .buffer_unordered(AT_A_TIME)
            .take_until(sleep(ALL_TIMEOUT));
        let answers: Vec<_> = answers.collect().await;
        for (id, answer) in answers {
            match answer {
                Ok(Ok(Some(versions))) => drop(self.launchers.insert(id, versions)),
                other => debug!(connection = %id, ?other, "launcher did not report its versions"),
            }
        }
    }

    /// Asks one launcher of each new pair of versions for its capabilities.
    async fn read_machines<H: NodeSource>(&mut self, up: &[(ConnectionId, Arc<H>)]) {
        let known = &self.launchers;
        self.machines
            .retain(|versions, _| known.values().any(|other| other == versions));
        self.silent.retain(|id| known.contains_key(id));
        let mut new: HashMap<Versions, &(ConnectionId, Arc<H>)> = HashMap::new();
        for launcher in up {
            let Some(versions) = known.get(&launcher.0) else {
                continue;
            };
            if self.machines.contains_key(versions) || self.machines.len() + new.len() >= MAX_PAIRS
            {
                continue;
            }
            let chosen = new.entry(*versions).or_insert(launcher);
            if self.silent.contains(&chosen.0) {
                *chosen = launcher;
            }
        }
        let new: Vec<_> = new
            .into_iter()
            .map(|(versions, (id, launcher))| (versions, id.clone(), Arc::clone(launcher)))
            .collect();
        let answers = stream::iter(new)
            .map(|(versions, id, launcher)| async move {
                let answer = timeout(TIMEOUT, launcher.capabilities()).await;
                (versions, id, answer)
            })
            .buffer_unordered(AT_A_TIME)
            .take_until(sleep(ALL_TIMEOUT));
        let answers: Vec<_> = answers.collect().await;
        for (versions, id, answer) in answers {
            let Ok(Ok(text)) = answer else {
                debug!(connection = %id, "launcher did not report its capabilities");
                // If all with these versions were silent, each is asked once more.
                if !self.silent.insert(id.clone()) {
                    let launchers = &self.launchers;
                    self.silent
                        .retain(|id| launchers.get(id) != Some(&versions));
                }
                continue;
            };
            let name = FactSource::Capabilities.as_str();
            let facts = NodeFacts {
                capabilities: Capabilities::parse(name, text.as_bytes()).ok(),
                ..NodeFacts::default()
            };
            let machine = facts.usual_machine();
            let canonical = machine.map(|machine| machine.canonical_name().to_owned());
            self.machines.insert(versions, canonical);
        }
    }
}
