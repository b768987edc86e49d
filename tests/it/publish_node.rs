//! The Node publisher with a fake API server that fails, hangs and races on demand.

use std::cell::RefCell;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use virtnode::cluster::Cluster;
use virtnode::label::LabelSet;
use virtnode::publish::node::{NodePublisherOptions, Retry, SyncProblem};

use crate::support::eventually;
use crate::support::fake_api::{FakeApi, Fault};
use crate::support::publisher::{Publisher, SOON, labels, until};

const X: &str = "machine.virtnode.io/x";
const Y: &str = "machine.virtnode.io/y";

fn options() -> NodePublisherOptions {
    NodePublisherOptions {
        start_jitter: Duration::ZERO,
        retry: Retry {
            first: Duration::from_millis(20),
            longest: Duration::from_millis(100),
            needs_people: Duration::from_millis(100),
        },
        ..NodePublisherOptions::default()
    }
}

/// Options without retries within a test.
fn patient() -> NodePublisherOptions {
    let retry = Retry {
        first: Duration::from_secs(600),
        ..Retry::default()
    };
    NodePublisherOptions {
        retry: Retry {
            needs_people: retry.first,
            ..retry
        },
        ..options()
    }
}

/// A running publisher with a fake API server.
struct Running {
    api: FakeApi,
    publisher: Publisher,
}

impl Deref for Running {
    type Target = Publisher;

    fn deref(&self) -> &Publisher {
        &self.publisher
    }
}

impl DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Publisher {
        &mut self.publisher
    }
}

fn start(api: &FakeApi, pairs: &[(&str, &str)]) -> Running {
    start_with(api, pairs, LabelSet::new(), options())
}

fn start_with(
    api: &FakeApi,
    pairs: &[(&str, &str)],
    already_published: LabelSet,
    options: NodePublisherOptions,
) -> Running {
    let deadline = Duration::from_millis(200);
    let cluster = Cluster::with_client(api.client(), "node-a", deadline).expect("a name");
    let publisher = Publisher::start(cluster, labels(pairs), already_published, options);
    Running {
        api: api.clone(),
        publisher,
    }
}

impl Running {
    /// Waits until the Node has these labels of virtnode, and is watched.
    async fn shows(&self, pairs: &[(&str, Option<&str>)]) -> anyhow::Result<()> {
        eventually(SOON, async || {
            let shown = self.api.look(|node| node.labels.clone());
            for (key, value) in pairs {
                ensure!(shown.get(*key).map(String::as_str) == *value, "{shown:?}");
            }
            ensure!(self.api.watches() > 0, "no watch");
            Ok(())
        })
        .await
    }

    /// Waits until the publisher has handled all delivered changes: a change that it must answer is
    /// answered.
    async fn has_handled_all_changes(&self) -> anyhow::Result<()> {
        let repaired = self.changes("repaired");
        self.api.change(|node| node.update("meddler", Y, None));
        until(|| self.changes("repaired") > repaired).await
    }
}

#[tokio::test]
async fn set_is_applied_changed_and_kept_after_a_stop() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.change(|node| node.update("kubelet", "kubernetes.io/os", Some("linux")));
    let mut it = start(&api, &[(X, "240"), (Y, "1")]);
    it.state(|state| state.synced).await?;
    assert_eq!(api.look(|node| node.owned_by("virtnode").len()), 2);

    it.publish(&[(X, "288")]);
    it.shows(&[
        (X, Some("288")),
        (Y, None),
        ("kubernetes.io/os", Some("linux")),
    ])
    .await?;
    let state = it.state(|state| state.published.len() == 1).await?;
    assert_eq!(*state.published, labels(&[(X, "288")]));
    assert_eq!(
        (
            it.changes("added"),
            it.changes("changed"),
            it.changes("removed")
        ),
        (2, 1, 1)
    );
    eventually(SOON, async || {
        ensure!(
            api.events().iter().any(|note| note.contains(Y)),
            "{:?}",
            api.events()
        );
        Ok(())
    })
    .await?;

    it.publisher.stop().await?;
    assert_eq!(api.look(|node| node.labels.len()), 2);
    Ok(())
}

#[tokio::test]
async fn of_two_daemons_on_one_node_the_first_stands_back() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut first = start(&api, &[(X, "240"), (Y, "1")]);
    first.state(|state| state.synced).await?;
    let mut second = start(&api, &[(X, "288")]);
    let is_told = |problem: &Option<SyncProblem>| {
        let problem = problem.as_ref();
        problem.is_some_and(|it| it.code == "another-daemon" && it.message.contains("stands back"))
    };
    let state = first.state(|state| is_told(&state.problem)).await?;
    assert!(!state.synced, "it is not ready");
    assert_eq!(first.failures("another-daemon"), 1);
    until(|| {
        api.events()
            .iter()
            .any(|note| note.contains("another virtnode daemon"))
    })
    .await?;
    second
        .state(|state| state.synced && state.problem.is_none())
        .await?;
    second.shows(&[(X, Some("288")), (Y, None)]).await?;
    let writes = api.asked("patch");
    assert!(writes <= 4, "{writes} writes");
    // Neither a new set nor the other's write makes it write again.
    first.publish(&[(X, "300")]);
    second.publish(&[(X, "289")]);
    second.shows(&[(X, Some("289"))]).await?;
    assert_eq!(api.asked("patch"), writes + 1);
    Ok(())
}

#[tokio::test]
async fn empty_set_or_none_changes_nothing() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let it = start(&api, &[(X, "1"), (Y, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    let writes = api.asked("patch");
    it.desired.send_replace(Some(Arc::default()));
    it.desired.send_replace(None);
    it.publish(&[(X, "1"), (Y, "1")]);
    it.has_handled_all_changes().await?;
    assert_eq!(api.asked("patch"), writes + 1, "only the repair of {Y}");
    assert_eq!(it.changes("removed"), 0);
    Ok(())
}

#[tokio::test]
async fn idle_publisher_sends_nothing() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut it = start(&api, &[(X, "1"), (Y, "1")]);
    it.state(|state| state.synced).await?;
    it.has_handled_all_changes().await?;
    let (reads, writes) = (api.asked("get"), api.asked("patch"));
    for round in 0..50 {
        api.change(|node| node.update("other", "other.io/x", Some(&round.to_string())));
    }
    it.has_handled_all_changes().await?;
    // Only the requests of the repair at the end.
    assert_eq!(
        (api.asked("get"), api.asked("patch")),
        (reads + 1, writes + 1)
    );
    Ok(())
}

#[tokio::test]
async fn deleted_or_edited_label_is_restored_at_once() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let it = start(&api, &[(X, "1"), (Y, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    for (value, repaired) in [(None, 1), (Some("2"), 2)] {
        let begin = Instant::now();
        api.change(|node| node.update("kubectl-label", X, value));
        it.shows(&[(X, Some("1"))]).await?;
        // Triggered by the watch, long before the fallback.
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{:?}",
            begin.elapsed()
        );
        until(|| it.changes("repaired") == repaired).await?;
    }
    assert!(api.look(|node| node.owned_by("virtnode").contains(X)));
    assert_eq!(it.conflicts("dropped"), 0);
    Ok(())
}

#[tokio::test]
async fn label_edited_while_stopped_is_restored() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.change(|node| node.update("kubectl-label", X, Some("2")));
    let it = start_with(&api, &[(X, "1")], labels(&[(X, "1")]), options());
    it.shows(&[(X, Some("1"))]).await?;
    until(|| it.changes("repaired") == 1).await
}

#[tokio::test]
async fn conflict_affects_one_key_until_it_ends() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.change(|node| node.force_apply("gitops", X, "mine"));
    let mut it = start(&api, &[(X, "1"), (Y, "1")]);
    let state = it.state(|state| state.synced).await?;
    assert_eq!(*state.published, labels(&[(Y, "1")]));
    let conflict = &state.conflicts[&X.parse()?];
    assert_eq!(conflict.value.as_deref(), Some("mine"));
    assert_eq!(
        conflict.owner.as_ref().context("an owner")?.manager,
        "gitops"
    );
    it.has_handled_all_changes().await?;
    it.has_handled_all_changes().await?;
    assert_eq!(it.conflicts("dropped"), 1);
    let notes: Vec<_> = api
        .events()
        .into_iter()
        .filter(|note| note.contains("gitops"))
        .collect();
    assert_eq!(notes.len(), 1, "{notes:?}");

    api.change(|node| node.update("gitops", X, None));
    it.shows(&[(X, Some("1"))]).await?;
    it.state(|state| state.conflicts.is_empty()).await?;
    Ok(())
}

#[tokio::test]
async fn owner_added_between_read_and_apply_is_a_conflict() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.before_next_patch(|node| node.update("hasty", X, Some("mine")));
    let mut it = start(&api, &[(X, "1"), (Y, "1")]);
    let state = it.state(|state| state.synced).await?;
    assert_eq!(state.conflicts.len(), 1);
    it.shows(&[(X, Some("mine")), (Y, Some("1"))]).await?;
    assert_eq!(
        (it.metrics.sync.attempts.get(), it.failures("api-conflict")),
        (1, 0)
    );
    Ok(())
}

#[tokio::test]
async fn force_is_limited_to_the_version_that_was_read() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.change(|node| node.update("kubectl-label", X, Some("2")));
    // X is drift and needs force; Y gets another owner at the same time.
    api.before_next_patch(|node| node.force_apply("hasty", Y, "mine"));
    let mut it = start_with(&api, &[(X, "1"), (Y, "1")], labels(&[(X, "1")]), options());
    let state = it.state(|state| state.synced).await?;
    assert_eq!(state.conflicts.len(), 1);
    it.shows(&[(X, Some("1")), (Y, Some("mine"))]).await
}

#[tokio::test]
async fn force_conflicts_takes_labels_over() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.change(|node| node.force_apply("kubevirt", X, "mine"));
    let options = NodePublisherOptions {
        force_conflicts: true,
        ..options()
    };
    let mut it = start_with(&api, &[(X, "1")], LabelSet::new(), options);
    it.state(|state| state.synced).await?;
    it.shows(&[(X, Some("1"))]).await?;
    assert_eq!((it.conflicts("forced"), it.conflicts("dropped")), (1, 0));
    Ok(())
}

#[tokio::test]
async fn contested_label_is_given_up() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut it = start(&api, &[(X, "1"), (Y, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    for repaired in 1..=3 {
        api.change(|node| node.update("fighter", X, Some("2")));
        until(|| it.changes("repaired") == repaired).await?;
    }
    let writes = api.asked("patch");
    api.change(|node| node.update("fighter", X, Some("2")));
    let state = it.state(|state| !state.conflicts.is_empty()).await?;
    assert_eq!(state.conflicts[&X.parse()?].value.as_deref(), Some("2"));
    assert_eq!((api.asked("patch"), it.conflicts("dropped")), (writes, 1));
    Ok(())
}

#[tokio::test]
async fn each_failure_is_counted_and_retried() -> anyhow::Result<()> {
    for (verb, fault, code) in [
        ("get", Fault::Hang, "api-timeout"),
        ("patch", Fault::Hang, "api-timeout"),
        ("get", Fault::Refuse, "api-unreachable"),
        ("patch", Fault::Status(500), "api-rejected"),
        ("get", Fault::Status(503), "api-rejected"),
        // As of an API server that has just started.
        ("get", Fault::Status(403), "api-forbidden"),
        ("patch", Fault::Busy { retry_after: 0 }, "api-rejected"),
    ] {
        let api = FakeApi::with_node();
        api.break_calls(verb, fault, 2);
        let it = start(&api, &[(X, "1")]);
        it.shows(&[(X, Some("1"))])
            .await
            .with_context(|| format!("{verb} {fault:?}"))?;
        assert_eq!(it.failures(code), 2, "{verb} {fault:?}");
    }
    Ok(())
}

#[tokio::test]
async fn retry_after_of_a_busy_server_is_respected() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.break_calls("patch", Fault::Busy { retry_after: 1 }, 1);
    let begin = Instant::now();
    let it = start(&api, &[(X, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    assert!(
        begin.elapsed() >= Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
    Ok(())
}

#[tokio::test]
async fn hanging_broken_or_expired_watch_is_restarted() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.break_calls("watch", Fault::Hang, 1);
    api.break_calls("list", Fault::Status(500), 1);
    let it = start(&api, &[(X, "1"), (Y, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    for last in [None, Some(410), Some(500)] {
        api.cut_watches(last);
        api.change(|node| node.update("meddler", X, None));
        it.shows(&[(X, Some("1"))])
            .await
            .with_context(|| format!("after {last:?}"))?;
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn watch_that_ends_at_once_backs_off_and_is_reported_once() -> anyhow::Result<()> {
    for (fault, says) in [
        (Fault::Empty, "the watch ended after"),
        (Fault::Redirect, "redirect to https://login.example/"),
    ] {
        let api = FakeApi::with_node();
        api.break_calls("watch", fault, usize::MAX);
        let mut it = start(&api, &[(X, "1")]);
        it.state(|state| state.synced).await?;
        tokio::time::sleep(Duration::from_secs(600)).await;
        let state = it.state.borrow().clone();
        let problem = state.watch_problem.context("a problem of the watch")?;
        assert!(problem.message.contains(says), "{}", problem.message);
        assert_eq!(problem.code, "api-rejected");
        let asked = ["watch", "list", "get"].map(|verb| api.asked(verb));
        assert!(asked.iter().all(|asked| *asked <= 60), "{asked:?}");
        assert!(asked[0] >= 10, "{asked:?}");
        let failures = it
            .metrics
            .sync
            .watch_failures
            .with_label_values(&["api-rejected"]);
        assert_eq!(failures.get(), asked[0] as u64);
        api.repair();
        tokio::time::timeout(
            Duration::from_secs(120),
            it.state.wait_for(|state| state.watch_problem.is_none()),
        )
        .await
        .context("the problem stays")??;
    }
    Ok(())
}

#[tokio::test]
async fn stalled_watch_is_replaced() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let options = NodePublisherOptions {
        fallback: Duration::from_millis(100),
        ..options()
    };
    let it = start_with(&api, &[(X, "1"), (Y, "1")], LabelSet::new(), options);
    it.shows(&[(X, Some("1"))]).await?;
    api.mute_watches();
    // A single change could have been delivered before the watch stalled.
    until(|| {
        api.change(|node| node.update("other", "other.io/x", Some("1")));
        api.watches() == 1
    })
    .await
}

#[tokio::test]
async fn labels_are_restored_without_a_watch() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.break_calls("list", Fault::Status(403), usize::MAX);
    let options = NodePublisherOptions {
        fallback: Duration::from_millis(100),
        ..options()
    };
    let mut it = start_with(&api, &[(X, "1")], LabelSet::new(), options);
    it.state(|state| state.synced).await?;
    api.change(|node| node.update("meddler", X, None));
    until(|| it.changes("repaired") == 1).await
}

#[tokio::test]
async fn outage_is_logged_once_and_loses_nothing() -> anyhow::Result<()> {
    assert_eq!(logged(), "");
    let api = FakeApi::with_node();
    let mut it = start(&api, &[(X, "1")]);
    it.shows(&[(X, Some("1"))]).await?;

    api.break_calls("*", Fault::Refuse, usize::MAX);
    api.cut_watches(None);
    let problem = it
        .state(|state| state.problem.is_some())
        .await?
        .problem
        .context("a problem")?;
    assert_eq!(problem.code, "api-unreachable");
    it.publish(&[(X, "2")]);
    until(|| it.failures("api-unreachable") >= 5).await?;
    api.repair();
    it.shows(&[(X, Some("2"))]).await?;
    it.state(|state| state.problem.is_none()).await?;

    let log = logged();
    assert_eq!(log.matches("cannot publish labels").count(), 1, "{log}");
    assert_eq!(
        log.matches("labels are published again").count(),
        1,
        "{log}"
    );
    assert!(!log.contains("ERROR"), "{log}");
    Ok(())
}

#[tokio::test]
async fn missing_node_is_reported_and_labeled_once_it_exists() -> anyhow::Result<()> {
    let api = FakeApi::default();
    let mut it = start_with(&api, &[(X, "1")], LabelSet::new(), patient());
    let problem = it
        .state(|state| state.problem.is_some())
        .await?
        .problem
        .context("a problem")?;
    assert_eq!(problem.code, "api-node-not-found");
    assert!(problem.message.contains("node-a"), "{}", problem.message);
    assert_eq!(api.asked("patch"), 0);
    until(|| api.watches() > 0).await?;
    api.create_node();
    it.shows(&[(X, Some("1"))]).await
}

#[tokio::test]
async fn replaced_node_gets_the_labels_without_repairs() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let it = start(&api, &[(X, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    api.create_node();
    it.shows(&[(X, Some("1"))]).await?;
    until(|| it.changes("added") == 2).await?;
    assert_eq!(it.changes("repaired"), 0);
    Ok(())
}

#[tokio::test]
async fn missing_right_is_reported_and_retried_rarely() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.break_calls("patch", Fault::Status(403), usize::MAX);
    let mut it = start_with(&api, &[(X, "1")], LabelSet::new(), patient());
    let problem = it
        .state(|state| state.problem.is_some())
        .await?
        .problem
        .context("a problem")?;
    assert_eq!(problem.code, "api-forbidden");
    assert!(
        problem.message.contains("`patch` on `nodes`"),
        "{}",
        problem.message
    );
    assert!(!it.state.borrow().synced);
    // A new set triggers a retry, a change of the Node does not.
    for round in 0..20 {
        api.change(|node| node.update("other", "other.io/x", Some(&round.to_string())));
    }
    it.publish(&[(X, "2")]);
    until(|| it.failures("api-forbidden") == 2).await?;
    assert_eq!(api.asked("patch"), 2);
    Ok(())
}

#[tokio::test]
async fn start_jitter_delays_writes_but_not_syncs() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let slow = NodePublisherOptions {
        start_jitter: Duration::from_secs(1_000_000),
        ..options()
    };
    let mut it = start_with(&api, &[(X, "1")], LabelSet::new(), slow.clone());
    until(|| api.asked("get") > 0).await?;
    assert!(!it.state.borrow_and_update().synced);
    it.publisher.stop().await?;
    assert_eq!(api.asked("patch"), 0);

    start(&api, &[(X, "1")]).state(|state| state.synced).await?;
    let mut it = start_with(&api, &[(X, "1")], LabelSet::new(), slow);
    it.state(|state| state.synced).await?;
    Ok(())
}

thread_local! {
    static LOGGED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Returns the log of this test's thread. The subscriber is global, because a thread's subscriber
/// misses callsites that another thread has registered first.
fn logged() -> String {
    static SUBSCRIBE: Once = Once::new();
    SUBSCRIBE.call_once(|| {
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(|| Logged);
        tracing::subscriber::set_global_default(subscriber.finish()).expect("no other one");
    });
    LOGGED.with_borrow(|bytes| String::from_utf8_lossy(bytes).into_owned())
}

struct Logged;

impl Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOGGED.with_borrow_mut(|logged| logged.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
