//! Starts the executor, with the journal, metrics and Node events connected to it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::ObjectReference;
use nix::unistd::geteuid;
use tokio::sync::watch;

use super::api::OperationService;
use crate::cluster::LauncherPods;
use crate::config::Config;
use crate::domain::{ConnectionId, DomainRef};
use crate::executor::HotplugMetrics;
use crate::executor::{Executor, LauncherRights, Listener, Options, SubmitError};
use crate::external::OwnOperations;
use crate::host;
use crate::hotplug::LauncherRight;
use crate::hypervisor::DomainBackend;
use crate::journal::Journal;
use crate::operation::{OperationId, Order, Record};
use crate::publish::events::EventRecorder;
use crate::publish::node_events;

/// Interval between updates of the journal's metrics. Dashboards do not need its size to the
/// second.
const COUNT_INTERVAL: Duration = Duration::from_secs(15);

/// Adds to an error about missing permissions which of the directories belongs to another user: the
/// usual cause is a package and a DaemonSet on one host.
pub(super) fn with_owner<'d>(
    error: anyhow::Error,
    directories: impl IntoIterator<Item = &'d Path>,
) -> anyhow::Error {
    let is_denied = error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
    });
    let user = geteuid().as_raw();
    let owner = |directory: &Path| std::fs::metadata(directory).ok().map(|it| it.uid());
    let mut directories = directories.into_iter().filter(|_| is_denied);
    let foreign = directories.find_map(|directory| {
        let owner = owner(directory).filter(|owner| *owner != user)?;
        Some((directory, owner))
    });
    match foreign {
        None => error,
        Some((directory, owner)) => error.context(format!(
            "{} belongs to user {owner} and this daemon runs as user {user}: if a package \
             and a DaemonSet share this host, remove one of them; then chown the directory",
            directory.display()
        )),
    }
}

/// Starts an executor with the journal in the state directory. It resumes the journal's unfinished
/// operations. `on_node` receives events about operations that did not succeed, and `own` every
/// operation, which is then not taken for a change by another client. `pods` verifies launchers.
///
/// # Errors
/// The journal cannot be opened or read.
pub fn start_executor<C: DomainBackend>(
    config: &Config,
    domains: Arc<C>,
    metrics: &Arc<HotplugMetrics>,
    on_node: Option<(EventRecorder, ObjectReference)>,
    own: Option<Arc<OwnOperations>>,
    pods: Option<LauncherPods>,
) -> anyhow::Result<Arc<Executor<C>>> {
    let journal = Journal::open(&config.state_directory).context("cannot open the journal")?;
    let options = Options {
        deep_verify: config.deep_verify,
        available_memory: Arc::new(|| host::available_memory(Path::new("/"))),
        launcher_rights: launcher_rights(config, pods),
        ..Options::default()
    };
    let reporter = OperationReporter {
        metrics: Arc::clone(metrics),
        on_node,
        own: own.clone(),
    };
    let executor = Executor::start(domains, journal, options, reporter)?;
    if let Some(own) = own {
        // Oldest first: the last operation on a domain counts.
        executor
            .operations()
            .iter()
            .rev()
            .for_each(|record| own.record(record));
    }
    Ok(executor)
}

/// Returns the rights on domains in launchers: with `launchers.hotplug`, on each whose identity the
/// API server confirms.
fn launcher_rights(config: &Config, pods: Option<LauncherPods>) -> LauncherRights {
    if !config.launchers.hotplug {
        return Arc::new(|_| LauncherRight::Off);
    }
    Arc::new(move |domain: &DomainRef| {
        let (Some(pods), ConnectionId::Launcher { pod }) = (&pods, &domain.connection) else {
            let reason = "this daemon is not connected to an API server (publish: [node])";
            return LauncherRight::Unverified(reason.to_owned());
        };
        match pods.verify(pod, domain.namespace_and_name()) {
            Ok(_) => LauncherRight::Granted,
            Err(error) => LauncherRight::Unverified(error.to_string()),
        }
    })
}

/// Keeps the journal's metrics up to date, forever.
pub(super) async fn count_operations<C: DomainBackend>(
    executor: &Executor<C>,
    metrics: &HotplugMetrics,
) {
    let mut tick = tokio::time::interval(COUNT_INTERVAL);
    loop {
        tick.tick().await;
        let records = executor.operations();
        metrics.set_journal(records.iter().map(|record| record.state));
    }
}

impl<C: DomainBackend> OperationService for Executor<C> {
    async fn submit(self: &Arc<Self>, order: Order) -> Result<OperationId, SubmitError> {
        Self::submit(self, order).await
    }

    fn operation(&self, id: &OperationId) -> Option<Record> {
        self.operation(id)
    }

    fn operations(&self) -> Vec<Record> {
        self.operations()
    }

    fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>> {
        self.watch(id)
    }
}

/// Reports every operation to the metrics, and those that did not succeed as events on the Node.
struct OperationReporter {
    metrics: Arc<HotplugMetrics>,
    on_node: Option<(EventRecorder, ObjectReference)>,
    own: Option<Arc<OwnOperations>>,
}

impl Listener for OperationReporter {
    fn changed(&self, record: &Record) {
        self.metrics.changed(record);
        if let Some(own) = &self.own {
            own.record(record);
        }
        if let Some((events, node)) = &self.on_node
            && let Some(event) = node_events::of_operation(node, record)
        {
            events.record(event);
        }
    }

    fn concluded_after(&self, _: Duration) {}

    fn journal_failed(&self) {
        self.metrics.journal_failed();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use anyhow::anyhow;

    use super::*;

    #[test]
    fn denied_directory_of_another_user_is_named_with_its_owner() {
        let own = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let root = Path::new("/");
        let foreign = if geteuid().is_root() {
            chown(other.path(), Some(12_345), None).unwrap();
            other.path()
        } else {
            root
        };
        let directories = || [own.path(), foreign];
        let denied = || anyhow::Error::new(io::Error::from(io::ErrorKind::PermissionDenied));
        let text = format!(
            "{:#}",
            with_owner(denied().context("the journal"), directories())
        );
        assert!(text.contains(&foreign.display().to_string()), "{text}");
        assert!(
            text.contains("belongs to user") && text.contains("the journal"),
            "{text}"
        );
        let text = format!("{:#}", with_owner(denied(), [own.path()]));
        assert!(!text.contains("belongs"), "{text}");
        let text = format!("{:#}", with_owner(anyhow!("full"), directories()));
        assert_eq!(text, "full");
    }
}
