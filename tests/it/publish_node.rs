//! The Node publisher against a fake API server that fails, hangs and races on demand.

use std::cell::RefCell;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use virtnode::cluster::Cluster;
use virtnode::label::LabelSet;
use virtnode::publish::node::{NodePublisherOptions, Retry};

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

/// NodePublisherOptions of one who does not try again within a test.
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

/// A publisher that runs against a fake.
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
    /// Waits until the Node shows these of our labels, and the watch is there.
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

    /// Waits until the publisher has dealt with all that the watch told so far: a change that
    /// it has to answer is answered.
    async fn has_seen_everything(&self) -> anyhow::Result<()> {
        let repaired = self.changes("repaired");
        self.api.change(|node| node.update("meddler", Y, None));
        until(|| self.changes("repaired") > repaired).await
    }
}

#[tokio::test]
async fn a_set_is_applied_changed_and_kept_when_it_ends() -> anyhow::Result<()> {
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
async fn an_empty_set_or_none_changes_nothing() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let it = start(&api, &[(X, "1"), (Y, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    let writes = api.asked("patch");
    it.desired.send_replace(Some(Arc::default()));
    it.desired.send_replace(None);
    it.publish(&[(X, "1"), (Y, "1")]);
    it.has_seen_everything().await?;
    assert_eq!(api.asked("patch"), writes + 1, "only the repair of {Y}");
    assert_eq!(it.changes("removed"), 0);
    Ok(())
}

#[tokio::test]
async fn nothing_is_asked_or_written_at_rest() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut it = start(&api, &[(X, "1"), (Y, "1")]);
    it.state(|state| state.synced).await?;
    it.has_seen_everything().await?;
    let (reads, writes) = (api.asked("get"), api.asked("patch"));
    for round in 0..50 {
        api.change(|node| node.update("other", "other.io/x", Some(&round.to_string())));
    }
    it.has_seen_everything().await?;
    // What the repair at the end needs, and no more.
    assert_eq!(
        (api.asked("get"), api.asked("patch")),
        (reads + 1, writes + 1)
    );
    Ok(())
}

#[tokio::test]
async fn what_others_delete_or_edit_is_back_at_once() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let it = start(&api, &[(X, "1"), (Y, "1")]);
    it.shows(&[(X, Some("1"))]).await?;
    for (value, repaired) in [(None, 1), (Some("2"), 2)] {
        let begin = Instant::now();
        api.change(|node| node.update("kubectl-label", X, value));
        it.shows(&[(X, Some("1"))]).await?;
        // It is the watch that told, long before the next look.
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
async fn what_was_edited_while_we_were_away_is_put_back() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.change(|node| node.update("kubectl-label", X, Some("2")));
    let it = start_with(&api, &[(X, "1")], labels(&[(X, "1")]), options());
    it.shows(&[(X, Some("1"))]).await?;
    until(|| it.changes("repaired") == 1).await
}

#[tokio::test]
async fn a_conflict_costs_its_key_only_and_ends_by_itself() -> anyhow::Result<()> {
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
    it.has_seen_everything().await?;
    it.has_seen_everything().await?;
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
async fn an_owner_between_look_and_apply_is_a_conflict_in_the_same_attempt() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.before_next_patch(|node| node.update("hasty", X, Some("mine")));
    let mut it = start(&api, &[(X, "1"), (Y, "1")]);
    let state = it.state(|state| state.synced).await?;
    assert_eq!(state.conflicts.len(), 1);
    it.shows(&[(X, Some("mine")), (Y, Some("1"))]).await?;
    assert_eq!(
        (it.metrics.sync_attempts.get(), it.failures("api-conflict")),
        (1, 0)
    );
    Ok(())
}

#[tokio::test]
async fn force_is_never_used_on_what_was_not_looked_at() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.change(|node| node.update("kubectl-label", X, Some("2")));
    // X is drift and needs force; Y becomes somebody's at the same moment.
    api.before_next_patch(|node| node.force_apply("hasty", Y, "mine"));
    let mut it = start_with(&api, &[(X, "1"), (Y, "1")], labels(&[(X, "1")]), options());
    let state = it.state(|state| state.synced).await?;
    assert_eq!(state.conflicts.len(), 1);
    it.shows(&[(X, Some("1")), (Y, Some("mine"))]).await
}

#[tokio::test]
async fn conflicts_are_taken_over_where_configured() -> anyhow::Result<()> {
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
async fn a_fight_over_a_label_is_given_up() -> anyhow::Result<()> {
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
async fn every_failure_is_counted_and_survived() -> anyhow::Result<()> {
    for (verb, fault, code) in [
        ("get", Fault::Hang, "api-timeout"),
        ("patch", Fault::Hang, "api-timeout"),
        ("get", Fault::Refuse, "api-unreachable"),
        ("patch", Fault::Status(500), "api-rejected"),
        ("get", Fault::Status(503), "api-rejected"),
        // As from an API server that has just started.
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
async fn a_busy_server_is_left_alone_for_as_long_as_it_wants() -> anyhow::Result<()> {
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
async fn a_watch_that_hangs_breaks_or_expires_is_made_again() -> anyhow::Result<()> {
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

#[tokio::test]
async fn a_watch_that_is_told_nothing_is_replaced() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let options = NodePublisherOptions {
        fallback: Duration::from_millis(100),
        ..options()
    };
    let it = start_with(&api, &[(X, "1"), (Y, "1")], LabelSet::new(), options);
    it.shows(&[(X, Some("1"))]).await?;
    api.mute_watches();
    // One change alone could be taken for one that the watch told before it fell silent.
    until(|| {
        api.change(|node| node.update("other", "other.io/x", Some("1")));
        api.watches() == 1
    })
    .await
}

#[tokio::test]
async fn without_a_watch_the_labels_are_looked_after_all_the_same() -> anyhow::Result<()> {
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
async fn an_outage_is_told_once_and_nothing_is_lost() -> anyhow::Result<()> {
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
    assert_eq!(
        log.matches("labels cannot be published").count(),
        1,
        "{log}"
    );
    assert_eq!(
        log.matches("labels are published again").count(),
        1,
        "{log}"
    );
    assert!(!log.contains("ERROR"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_missing_node_is_told_and_found_as_soon_as_it_is_there() -> anyhow::Result<()> {
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
async fn another_node_by_the_same_name_gets_the_labels_and_nobody_is_blamed() -> anyhow::Result<()>
{
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
async fn a_missing_right_is_told_and_not_asked_for_all_the_time() -> anyhow::Result<()> {
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
    // A new set is worth a try; that the Node changes is not.
    for round in 0..20 {
        api.change(|node| node.update("other", "other.io/x", Some(&round.to_string())));
    }
    it.publish(&[(X, "2")]);
    until(|| it.failures("api-forbidden") == 2).await?;
    assert_eq!(api.asked("patch"), 2);
    Ok(())
}

#[tokio::test]
async fn the_first_write_may_wait_and_what_is_in_place_does_not() -> anyhow::Result<()> {
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

/// What this test's thread has logged so far. For the whole process, because a subscriber for
/// one thread misses what another thread has logged first.
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
