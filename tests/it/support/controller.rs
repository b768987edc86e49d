//! A node whose DomainHotplug objects are looked after, and what a test can see of it.

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
use virtnode::executor::{Executor, Listener, Options as ExecutorOptions};
use virtnode::journal::Journal;
use virtnode::operation::Record;
use virtnode::publish::events::EventRecorder;
use virtnode::publish::node_events;
use virtnode::telemetry::Metrics;

use super::eventually;
use super::fake_domains::FakeControl;

/// For what takes milliseconds on an idle machine.
const SOON: Duration = Duration::from_secs(60);

/// Who tries again at once.
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
    }
}

/// A controller that runs, with its executor. It ends with the test.
pub(crate) struct HotplugNode {
    pub(crate) control: Arc<FakeControl>,
    pub(crate) executor: Arc<Executor<FakeControl>>,
    pub(crate) metrics: Arc<Metrics>,
    watched: watch::Receiver<Option<Condition>>,
    cluster: Cluster,
    events: EventRecorder,
    executor_options: ExecutorOptions,
    state: TempDir,
    token: CancellationToken,
    task: Option<JoinHandle<()>>,
    _writing: DropGuard,
}

/// Tells on the Node what the daemon tells there.
struct OnNode(EventRecorder, Cluster);

impl Listener for OnNode {
    fn changed(&self, record: &Record) {
        let happening = node_events::of_operation(&self.1.node_reference(), record);
        happening.into_iter().for_each(|it| self.0.record(it));
    }

    fn concluded_after(&self, _: Duration) {}

    fn journal_failed(&self) {}
}

impl HotplugNode {
    pub(crate) fn start(cluster: Cluster) -> Self {
        Self::start_with(cluster, ExecutorOptions::default())
    }

    pub(crate) fn start_with(cluster: Cluster, executor_options: ExecutorOptions) -> Self {
        let state = TempDir::new().unwrap();
        let control = FakeControl::new();
        let metrics = Arc::new(Metrics::new());
        let (events, writer) = EventRecorder::new(cluster.clone(), Arc::clone(&metrics));
        let writing = CancellationToken::new();
        tokio::spawn(writer.run(writing.clone()));
        let on_node = OnNode(events.clone(), cluster.clone());
        let executor = executor(&control, state.path(), &executor_options, on_node);
        let mut node = Self {
            control,
            executor,
            metrics,
            watched: watch::channel(None).1,
            cluster,
            events,
            _writing: writing.drop_guard(),
            executor_options,
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
            Arc::clone(&self.metrics),
            options(),
        );
        self.watched = controller.condition();
        self.task = Some(tokio::spawn(controller.run(self.token.clone())));
    }

    /// Ends all as the daemon does, whatever is under way.
    pub(crate) async fn stop(&mut self) {
        self.token.cancel();
        if let Some(task) = self.task.take() {
            task.await.unwrap();
        }
        self.executor.stop().await;
    }

    /// Starts again what was stopped, with the journal as it is.
    pub(crate) fn start_again(&mut self) {
        let on_node = OnNode(self.events.clone(), self.cluster.clone());
        let (state, options) = (self.state.path(), &self.executor_options);
        self.executor = executor(&self.control, state, options, on_node);
        self.begin();
    }

    /// The operations of an object.
    pub(crate) fn operations_of(&self, object: &str) -> Vec<Record> {
        let asker = format!("domainhotplug/{object}");
        let mut records = self.executor.operations();
        records.retain(|record| record.asked_by.to_string() == asker);
        records
    }

    /// Whether objects are seen, as the node is told of it: status and reason.
    pub(crate) fn told_of_watch(&self) -> Option<(String, String)> {
        let condition = self.watched.borrow();
        let condition = condition.as_ref()?;
        Some((condition.status.clone(), condition.reason.clone()))
    }

    /// The value of a series, written as in the exposition.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let text = self.metrics.encode().unwrap();
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
    on_node: OnNode,
) -> Arc<Executor<FakeControl>> {
    let journal = Journal::open(state).unwrap();
    Executor::start(Arc::clone(control), journal, options.clone(), on_node).unwrap()
}

/// `True`, `False` or `Unknown`, and the reason, of one of an object's conditions.
pub(crate) fn condition(object: &Value, kind: &str) -> Option<(String, String)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let condition = conditions.iter().find(|it| it["type"] == kind)?;
    let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason")))
}

/// Waits until an object is so, and gives it.
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
