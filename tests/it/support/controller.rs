//! A node with a running controller of DomainHotplug objects.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use virtnode::cluster::objects::Condition;
use virtnode::cluster::{Cluster, HotplugObjects, Retry};
use virtnode::controller::{Controller, ControllerOptions};
use virtnode::daemon::Metrics;
use virtnode::executor::{Executor, Listener, Options as ExecutorOptions};
use virtnode::journal::Journal;
use virtnode::operation::Record;
use virtnode::publish::events::EventRecorder;
use virtnode::publish::node_events;

use super::eventually;
use super::fake_domains::FakeControl;

/// Timeout for actions that take milliseconds on an idle machine.
const SOON: Duration = Duration::from_secs(60);

/// Options without delays.
pub(crate) fn options() -> ControllerOptions {
    let retry = Retry {
        first: Duration::from_millis(20),
        longest: Duration::from_millis(100),
        needs_people: Duration::from_millis(100),
    };
    ControllerOptions {
        start_jitter: Duration::ZERO,
        retry,
        watch_retry: retry,
        submit_interval: Duration::from_millis(50),
        ..ControllerOptions::default()
    }
}

/// A running controller with its executor, stopped when dropped.
pub(crate) struct HotplugNode {
    pub(crate) control: Arc<FakeControl>,
    pub(crate) executor: Arc<Executor<FakeControl>>,
    pub(crate) metrics: Arc<Metrics>,
    watched: watch::Receiver<Option<Condition>>,
    cluster: Cluster,
    events: EventRecorder,
    executor_options: ExecutorOptions,
    options: ControllerOptions,
    state: TempDir,
    token: CancellationToken,
    task: Option<JoinHandle<()>>,
    _writing: DropGuard,
}

/// Records the Node's events as the daemon does.
struct NodeEventListener(EventRecorder, Cluster);

impl Listener for NodeEventListener {
    fn changed(&self, record: &Record) {
        let event = node_events::of_operation(&self.1.node_reference(), record);
        event.into_iter().for_each(|event| self.0.record(event));
    }

    fn concluded_after(&self, _: Duration) {}

    fn journal_failed(&self) {}
}

impl HotplugNode {
    pub(crate) fn start(cluster: Cluster) -> Self {
        Self::start_with(cluster, ExecutorOptions::default())
    }

    pub(crate) fn start_with(cluster: Cluster, executor_options: ExecutorOptions) -> Self {
        Self::start_with_options(cluster, executor_options, options())
    }

    pub(crate) fn start_with_options(
        cluster: Cluster,
        executor_options: ExecutorOptions,
        options: ControllerOptions,
    ) -> Self {
        let state = TempDir::new().unwrap();
        let control = FakeControl::new();
        let metrics = Arc::new(Metrics::new());
        let (events, writer) = EventRecorder::new(cluster.clone(), Arc::clone(&metrics.events));
        let writing = CancellationToken::new();
        tokio::spawn(writer.run(writing.clone()));
        let listener = NodeEventListener(events.clone(), cluster.clone());
        let executor = executor(&control, state.path(), &executor_options, listener);
        let mut node = Self {
            control,
            executor,
            metrics,
            watched: watch::channel(None).1,
            cluster,
            events,
            _writing: writing.drop_guard(),
            executor_options,
            options,
            state,
            token: CancellationToken::new(),
            task: None,
        };
        node.begin();
        node
    }

    fn begin(&mut self) {
        self.token = CancellationToken::new();
        let controller = Controller::new(
            HotplugObjects::new(&self.cluster),
            Arc::clone(&self.executor),
            self.events.clone(),
            Arc::clone(&self.metrics.objects),
            self.options.clone(),
        );
        self.watched = controller.condition();
        self.task = Some(tokio::spawn(controller.run(self.token.clone())));
    }

    /// Stops everything as the daemon does, also during operations.
    pub(crate) async fn stop(&mut self) {
        self.token.cancel();
        if let Some(task) = self.task.take() {
            task.await.unwrap();
        }
        self.executor.stop().await;
    }

    /// Restarts with the same journal.
    pub(crate) fn start_again(&mut self) {
        let listener = NodeEventListener(self.events.clone(), self.cluster.clone());
        let (state, options) = (self.state.path(), &self.executor_options);
        self.executor = executor(&self.control, state, options, listener);
        self.begin();
    }

    /// Returns the operations of an object.
    pub(crate) fn operations_of(&self, object: &str) -> Vec<Record> {
        let asker = format!("domainhotplug/{object}");
        let mut records = self.executor.operations();
        records.retain(|record| record.asked_by.to_string() == asker);
        records
    }

    /// Returns status and reason of the condition of the watch.
    pub(crate) fn watch_condition(&self) -> Option<(String, String)> {
        let condition = self.watched.borrow();
        let condition = condition.as_ref()?;
        Some((condition.status.clone(), condition.reason.clone()))
    }

    /// Returns the value of a series, named as in the exposition format.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let text = self.metrics.registry.encode().unwrap();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value
            .unwrap_or_else(|| panic!("no {series}"))
            .parse()
            .unwrap()
    }
}

fn executor(
    control: &Arc<FakeControl>,
    state: &Path,
    options: &ExecutorOptions,
    listener: NodeEventListener,
) -> Arc<Executor<FakeControl>> {
    let journal = Journal::open(state).unwrap();
    Executor::start(Arc::clone(control), journal, options.clone(), listener).unwrap()
}

/// Returns status and reason of a condition.
pub(crate) fn condition(object: &Value, kind: &str) -> Option<(String, String)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let condition = conditions.iter().find(|it| it["type"] == kind)?;
    let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason")))
}

/// Waits for a state of an object, and returns the object.
pub(crate) async fn becomes(
    object: impl AsyncFn() -> anyhow::Result<Value>,
    is: impl Fn(&Value) -> bool,
) -> anyhow::Result<Value> {
    eventually(SOON, async || {
        let object = object().await?;
        ensure!(is(&object), "it is not so: {object:#}");
        Ok(object)
    })
    .await
    .context("an object is not as it should be")
}
