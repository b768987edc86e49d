//! Joins the executor with the local API and the metrics.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::watch;

use super::api::Operations;
use crate::executor::{Executor, Listener, Options, SubmitError};
use crate::host;
use crate::hypervisor::DomainBackend;
use crate::journal::Journal;
use crate::operation::{OperationId, Order, Record};
use crate::publish::events::EventRecorder;
use crate::publish::node_events;
use crate::telemetry::Metrics;

/// An executor as the local API uses it.
pub struct Carried<C>(Arc<Executor<C>>);

impl<C: DomainBackend> Carried<C> {
    /// Starts an executor with its journal below the state directory. What the journal holds
    /// unfinished is taken up. `deep_verify` taints the domains that are changed. What does not end
    /// well is told on the Node, if there is one.
    ///
    /// # Errors
    /// The journal cannot be opened or read.
    pub fn start(
        control: Arc<C>,
        state_directory: &Path,
        deep_verify: bool,
        metrics: &Arc<Metrics>,
        on_node: Option<(EventRecorder, ObjectReference)>,
    ) -> anyhow::Result<Self> {
        let journal = Journal::open(state_directory).context("cannot open the journal")?;
        let options = Options {
            deep_verify,
            available_memory: Arc::new(|| host::available_memory(Path::new("/"))),
            ..Options::default()
        };
        let told = Told {
            metrics: Arc::clone(metrics),
            on_node,
        };
        let executor = Executor::start(control, journal, options, told)?;
        Ok(Self(executor))
    }

    /// The executor itself.
    pub fn executor(&self) -> Arc<Executor<C>> {
        Arc::clone(&self.0)
    }

    /// Ends all work; what is unfinished stays in the journal.
    pub async fn stop(&self) {
        self.0.stop().await;
    }

    /// Keeps the journal's metrics up to date for ever.
    pub async fn count(&self, metrics: &Metrics) {
        let mut tick = tokio::time::interval(COUNT_EVERY);
        loop {
            tick.tick().await;
            let records = self.0.operations();
            metrics
                .hotplug
                .journal_holds(records.iter().map(|record| record.state));
        }
    }
}

/// The journal changes with each operation; its size need not be to the second.
const COUNT_EVERY: Duration = Duration::from_secs(15);

impl<C: DomainBackend> Operations for Carried<C> {
    async fn submit(&self, order: Order) -> Result<OperationId, SubmitError> {
        self.0.submit(order).await
    }

    fn operation(&self, id: &OperationId) -> Option<Record> {
        self.0.operation(id)
    }

    fn operations(&self) -> Vec<Record> {
        self.0.operations()
    }

    fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>> {
        self.0.watch(id)
    }
}

/// Passes what happens on to the metrics, and what does not end well to the Node.
struct Told {
    metrics: Arc<Metrics>,
    on_node: Option<(EventRecorder, ObjectReference)>,
}

impl Listener for Told {
    fn changed(&self, record: &Record) {
        self.metrics.hotplug.changed(record);
        if let Some((events, node)) = &self.on_node
            && let Some(happening) = node_events::of_operation(node, record)
        {
            events.record(happening);
        }
    }

    fn concluded_after(&self, _: Duration) {}

    fn journal_failed(&self) {
        self.metrics.hotplug.journal_failed();
    }
}
