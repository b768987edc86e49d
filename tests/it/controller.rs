//! DomainHotplug objects with a fake API server and an in-memory hypervisor: all verdicts, invalid
//! objects, faults, races and restarts. Time is paused unless a test says otherwise.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use rstest::rstest;
use serde_json::{Value, json};
use virtnode::cluster::Cluster;
use virtnode::controller::ControllerOptions;
use virtnode::domain::PauseReason;
use virtnode::executor::Options as ExecutorOptions;
use virtnode::hotplug::Verdict;
use virtnode::hypervisor::CallError;

use crate::support::controller::{HotplugNode, becomes, condition, options};
use crate::support::eventually;
use crate::support::fake_api::{FakeApi, Fault};
use crate::support::fake_domains::{Blocks, Calls, Cpus, FakeGuest};
use crate::support::publisher::until;

fn cluster(api: &FakeApi) -> Cluster {
    Cluster::with_client(api.client(), "node-a", Duration::from_secs(1)).unwrap()
}

fn vcpus(domain: &str, count: u32) -> Value {
    json!({"nodeName": "node-a", "domain": {"name": domain}, "vcpus": {"count": count},
        "deadlineSeconds": 30})
}

fn memory(domain: &str, size: &str) -> Value {
    json!({"nodeName": "node-a", "domain": {"name": domain}, "memory": {"size": size},
        "deadlineSeconds": 30})
}

/// Waits for a state of the object.
async fn object(api: &FakeApi, name: &str, is: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
    becomes(async || Ok(api.object(name).unwrap_or_default()), is).await
}

fn verdict(object: &Value) -> Option<&str> {
    object["status"]["verdict"].as_str()
}

/// Waits for a condition that takes minutes.
async fn later(is: impl Fn() -> bool) -> anyhow::Result<()> {
    eventually(Duration::from_secs(600), async || {
        ensure!(is(), "it is not so");
        Ok(())
    })
    .await
}

/// Waits for the verdict.
async fn finished(api: &FakeApi, name: &str) -> anyhow::Result<Value> {
    object(api, name, |object| verdict(object).is_some()).await
}

fn pair(status: &str, reason: &str) -> Option<(String, String)> {
    Some((status.to_owned(), reason.to_owned()))
}

#[tokio::test(start_paused = true)]
async fn each_verdict_yields_conditions_and_events_with_few_calls() -> anyhow::Result<()> {
    let guest = |cpus, agent| FakeGuest {
        cpus,
        agent,
        ..FakeGuest::default()
    };
    let blocks = |blocks| FakeGuest {
        blocks,
        ..FakeGuest::default()
    };
    let fails = |error| FakeGuest {
        calls: Calls::Fail(error),
        ..FakeGuest::default()
    };
    let failed = CallError::Failed {
        call: "set-vcpus".into(),
        code: "1".to_owned(),
        text: "internal error".to_owned(),
    };
    let cases = [
        (
            Verdict::Verified,
            vcpus("vm", 3),
            guest(Cpus::Onlines, true),
        ),
        (
            Verdict::GuestOffline,
            vcpus("vm", 3),
            guest(Cpus::LeavesOffline, true),
        ),
        (
            Verdict::GuestRefused,
            vcpus("vm", 3),
            guest(Cpus::ThrowsAway, true),
        ),
        (
            Verdict::GuestSilent,
            vcpus("vm", 3),
            guest(Cpus::Silent, false),
        ),
        (
            Verdict::Infeasible,
            vcpus("vm", 8),
            guest(Cpus::Onlines, true),
        ),
        (Verdict::HypervisorError, vcpus("vm", 3), fails(failed)),
        (
            Verdict::Verified,
            memory("vm", "1Gi"),
            blocks(Blocks::Onlines),
        ),
        (
            Verdict::GuestOffline,
            memory("vm", "1Gi"),
            blocks(Blocks::LeavesOffline),
        ),
        (
            Verdict::GuestSilent,
            memory("vm", "1Gi"),
            blocks(Blocks::NoDriver),
        ),
    ];
    for (expected, spec, guest) in cases {
        let api = FakeApi::with_node();
        let node = HotplugNode::start(cluster(&api));
        node.control.add("vm", guest);
        api.make("x", spec);
        let ended = finished(&api, "x").await?;
        assert_eq!(verdict(&ended), Some(expected.as_str()), "{ended:#}");
        let success = if expected == Verdict::Verified {
            "True"
        } else {
            "False"
        };
        assert_eq!(condition(&ended, "Accepted"), pair("True", "Accepted"));
        assert_eq!(
            condition(&ended, "Progressing"),
            pair("False", expected.as_str())
        );
        assert_eq!(
            condition(&ended, "Succeeded"),
            pair(success, expected.as_str())
        );
        let status = &ended["status"];
        assert!(status["message"].is_string() && status["completionTime"].is_string());
        assert!(status["requested"].is_object() && status["before"].is_object());
        assert_eq!(
            status["evidence"].is_array(),
            expected != Verdict::Infeasible
        );
        until(|| api.object("x").unwrap()["metadata"]["ownerReferences"][0]["name"] == "node-a")
            .await?;
        let kind = if success == "True" {
            "Normal"
        } else {
            "Warning"
        };
        let events = [(kind.to_owned(), expected.to_string())];
        until(|| api.events_about("DomainHotplug", "x") == events).await?;
        let on_node = match expected {
            Verdict::Verified => Vec::new(),
            _ => vec![("Warning".to_owned(), format!("Hotplug{expected}"))],
        };
        until(|| api.events_about("Node", "node-a") == on_node).await?;
        let calls: usize = ["get", "hotplug-status", "hotplug-own", "event"]
            .map(|call| api.asked(call))
            .iter()
            .sum();
        // Eight with creation and deletion by the requester.
        assert!(calls <= 6, "{calls} calls");
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn missing_or_stopped_domain_yields_its_verdict() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("paused", FakeGuest::default());
    node.control.pause("paused", PauseReason::User);
    api.make("absent", vcpus("nobody", 2));
    api.make("paused", vcpus("paused", 2));
    assert_eq!(
        verdict(&finished(&api, "absent").await?),
        Some("DomainNotFound")
    );
    assert_eq!(
        verdict(&finished(&api, "paused").await?),
        Some("DomainNotRunning")
    );
    node.control.connect(false);
    api.make("away", vcpus("paused", 2));
    assert_eq!(
        verdict(&finished(&api, "away").await?),
        Some("HypervisorUnavailable")
    );
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn hanging_queued_and_partial_operations_yield_their_verdicts() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    let stuck = FakeGuest {
        calls: Calls::Hang,
        ..FakeGuest::default()
    };
    node.control.add("stuck", stuck);
    let half = FakeGuest {
        blocks: Blocks::GivesHalfBack,
        ..FakeGuest::default()
    };
    node.control.add("half", half);
    api.make("first", vcpus("stuck", 2));
    let mut behind = vcpus("stuck", 3);
    behind["deadlineSeconds"] = 20.into();
    api.make("behind", behind);
    api.make("more", memory("half", "1Gi"));
    api.make("less", memory("half", "512Mi"));
    for (name, expected) in [
        ("first", "Pending"),
        ("behind", "Busy"),
        ("more", "Verified"),
        ("less", "PartiallyApplied"),
    ] {
        let is = || {
            let object = api.object(name).unwrap_or_default();
            let events = api.events_about("DomainHotplug", name);
            verdict(&object) == Some(expected)
                && events.iter().any(|(_, reason)| reason == expected)
        };
        later(is)
            .await
            .with_context(|| format!("{:#?}", api.object(name)))?;
    }
    Ok(())
}

#[rstest]
#[case::two(|spec: &mut Value| spec["memory"] = json!({"size": "2Gi"}), "several resources: exactly one of vcpus and memory")]
#[case::none(|spec: &mut Value| spec["vcpus"] = Value::Null, "no resource: exactly one of vcpus and memory")]
#[case::zero(|spec: &mut Value| spec["vcpus"]["count"] = 0.into(), "count is 0")]
#[case::newer(|spec: &mut Value| spec["attach"] = json!({"disk": {}}), "unknown field `attach`")]
#[case::nothing(|spec: &mut Value| *spec = Value::Null, "cannot parse the spec")]
#[case::text(|spec: &mut Value| *spec = "vcpus: 4".into(), "cannot parse the spec")]
#[tokio::test(start_paused = true)]
async fn invalid_object_is_rejected_once_and_does_not_affect_others(
    #[case] spoil: impl FnOnce(&mut Value),
    #[case] expected: &str,
) -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut spec = vcpus("vm", 3);
    spoil(&mut spec);
    api.make("wrong", spec);
    api.make("sound", vcpus("vm", 3));
    let mut node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    assert_eq!(verdict(&finished(&api, "sound").await?), Some("Verified"));
    let wrong = object(&api, "wrong", |it| condition(it, "Accepted").is_some()).await?;
    assert_eq!(condition(&wrong, "Accepted"), pair("False", "InvalidSpec"));
    assert_eq!(condition(&wrong, "Succeeded"), pair("False", "InvalidSpec"));
    let message = wrong["status"]["message"].as_str().unwrap();
    assert!(message.contains(expected), "{message}");
    assert!(node.operations_of("wrong").is_empty());
    // The next daemon does not report it again.
    let rejected = [("Warning".to_owned(), "InvalidSpec".to_owned())];
    until(|| api.events_about("DomainHotplug", "wrong") == rejected).await?;
    until(|| api.asked("hotplug-own") == 2).await?;
    let (written, events) = (api.statuses().len(), api.asked("event"));
    node.stop().await;
    node.start_again();
    until(|| api.asked("hotplug-list") == 2).await?;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(api.statuses().len(), written);
    assert_eq!(api.asked("event"), events);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn object_made_while_hotplug_was_off_expires() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut patient = vcpus("vm", 3);
    patient["startingDeadlineSeconds"] = 86_400.into();
    api.make("late", vcpus("vm", 2));
    api.make("patient", patient);
    for name in ["late", "patient"] {
        api.backdate(name, 601 + 60);
    }
    let mut node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    assert_eq!(verdict(&finished(&api, "patient").await?), Some("Verified"));
    let late = object(&api, "late", |it| condition(it, "Accepted").is_some()).await?;
    assert_eq!(condition(&late, "Accepted"), pair("False", "Expired"));
    assert_eq!(condition(&late, "Succeeded"), pair("False", "Expired"));
    let message = late["status"]["message"].as_str().unwrap();
    assert!(message.contains("startingDeadlineSeconds"), "{message}");
    assert!(node.operations_of("late").is_empty());
    let expired = [("Warning".to_owned(), "Expired".to_owned())];
    until(|| api.events_about("DomainHotplug", "late") == expired).await?;
    until(|| api.asked("hotplug-own") == 2).await?;
    // It stays so, and is written once.
    let written = api.statuses().len();
    node.stop().await;
    node.start_again();
    until(|| api.asked("hotplug-list") == 2).await?;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(api.statuses().len(), written);
    assert!(node.operations_of("late").is_empty());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn label_and_spec_with_different_nodes_yield_wrong_node() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    let mut theirs = vcpus("vm", 3);
    theirs["nodeName"] = "node-b".into();
    api.make("mismatch", theirs.clone());
    api.make_labelled("theirs", "node-b", theirs);
    let mismatch = object(&api, "mismatch", |it| condition(it, "Accepted").is_some()).await?;
    assert_eq!(condition(&mismatch, "Accepted"), pair("False", "WrongNode"));
    // An API server without immutable specs lets people correct it.
    api.change_spec("mismatch", |spec| spec["nodeName"] = "node-a".into());
    assert_eq!(
        verdict(&finished(&api, "mismatch").await?),
        Some("Verified")
    );
    let theirs = api.object("theirs").unwrap();
    assert!(theirs["status"].is_null() && theirs["metadata"]["ownerReferences"].is_null());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn objects_for_one_domain_are_executed_in_creation_order() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.make("z-first", vcpus("vm", 3));
    api.make("a-second", vcpus("vm", 4));
    let by_uuid = json!({"nodeName": "node-a", "vcpus": {"count": 2},
        "domain": {"uuid": "00000000-0000-4000-8000-000000000001"}});
    api.make("m-third", by_uuid);
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    let third = finished(&api, "m-third").await?;
    assert_eq!(verdict(&third), Some("Verified"), "{third:#}");
    let calls = node.control.calls();
    assert_eq!(
        calls[..2],
        ["set-vcpus vm 3", "set-vcpus vm 4"],
        "{calls:?}"
    );
    let others = &calls[2..];
    assert!(
        others.iter().all(|call| call == "set-vcpus vm 2"),
        "{calls:?}"
    );
    let first = &finished(&api, "z-first").await?["status"];
    let second = &finished(&api, "a-second").await?["status"];
    assert_eq!(first["after"]["vcpus"], 3);
    assert_eq!(second["before"]["vcpus"], 3);
    // The status of a waiting object is Queued.
    let waits = |status: &Value| {
        status["request"] == "vcpus=2" && status["conditions"][2]["reason"] == "Queued"
    };
    assert!(api.statuses().iter().any(waits), "{:#?}", api.statuses());
    Ok(())
}

/// Returns a guest that is slow enough for a test to act during the operation.
fn slow() -> FakeGuest {
    FakeGuest {
        cpus: Cpus::LeavesOffline,
        ..FakeGuest::default()
    }
}

fn running(object: &Value) -> bool {
    condition(object, "Succeeded") == pair("Unknown", "Running")
}

#[tokio::test(start_paused = true)]
async fn restart_during_an_operation_finishes_it() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    api.make("x", vcpus("vm", 3));
    object(&api, "x", running).await?;
    node.stop().await;
    let before = node.operations_of("x");
    node.start_again();
    let ended = finished(&api, "x").await?;
    assert_eq!(verdict(&ended), Some("GuestOffline"), "{ended:#}");
    assert_eq!(node.control.calls(), ["set-vcpus vm 3"], "done once");
    let after = node.operations_of("x");
    assert_eq!((before.len(), after.len()), (1, 1));
    assert_eq!(ended["status"]["operation"], after[0].id.as_str());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn daemon_killed_after_any_call_executes_once_and_reports() -> anyhow::Result<()> {
    for calls in 0.. {
        ensure!(calls < 50, "it does not come to rest");
        let api = FakeApi::with_node();
        api.answer_only(calls);
        let mut node = HotplugNode::start(cluster(&api));
        node.control.add("vm", slow());
        api.make("x", vcpus("vm", 3));
        let is_reported = || {
            let event = ("Warning".to_owned(), "GuestOffline".to_owned());
            let owned = |it: &Value| it["metadata"]["ownerReferences"][0]["name"] == "node-a";
            api.object("x").as_ref().is_some_and(owned)
                && api.events_about("DomainHotplug", "x") == [event]
                && api.events_about("Node", "node-a").len() == 1
        };
        later(|| api.unanswered() > 0 || is_reported()).await?;
        let was_at_rest = api.unanswered() == 0;
        node.stop().await;
        api.repair();
        node.start_again();
        later(is_reported)
            .await
            .with_context(|| format!("after {calls} calls"))?;
        let ended = finished(&api, "x").await?;
        assert_eq!(verdict(&ended), Some("GuestOffline"), "{calls}: {ended:#}");
        assert_eq!(node.control.calls(), ["set-vcpus vm 3"], "{calls}");
        let records = node.operations_of("x");
        assert_eq!(records.len(), 1, "{calls}");
        assert_eq!(ended["status"]["operation"], records[0].id.as_str());
        if was_at_rest {
            // List, watch, and for the object: read the Node, set the owner, two statuses, two events.
            ensure!(calls >= 8, "after {calls} calls");
            break;
        }
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn verdict_during_an_outage_is_reported_after_a_restart() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    api.break_calls("hotplug-status", Fault::Refuse, usize::MAX);
    api.make("x", vcpus("vm", 3));
    until(|| {
        node.operations_of("x")
            .iter()
            .any(|record| record.is_done())
    })
    .await?;
    node.stop().await;
    assert!(api.statuses().is_empty());
    api.repair();
    node.start_again();
    let ended = finished(&api, "x").await?;
    assert_eq!(verdict(&ended), Some("Verified"));
    assert_eq!(node.control.calls(), ["set-vcpus vm 3"], "done once");
    assert_eq!(node.operations_of("x").len(), 1);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn finished_object_is_not_executed_again_without_the_journal() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    api.make("x", vcpus("vm", 3));
    finished(&api, "x").await?;
    let written = api.statuses().len();
    node.stop().await;
    node.start_again();
    until(|| api.asked("hotplug-list") == 2).await?;
    api.make("marker", vcpus("vm", 3));
    finished(&api, "marker").await?;
    let of_marker = 1;
    assert_eq!(api.statuses().len(), written + of_marker);

    node.stop().await;
    // The same node without its journal.
    let other = HotplugNode::start(cluster(&api));
    other.control.add("vm", FakeGuest::default());
    api.make("marker-2", vcpus("vm", 1));
    finished(&api, "marker-2").await?;
    assert!(other.operations_of("x").is_empty() && other.operations_of("marker").is_empty());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn outage_of_the_api_server_does_not_affect_operations() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    api.make("x", vcpus("vm", 3));
    object(&api, "x", running).await?;
    for fault in [
        Fault::Refuse,
        Fault::Hang,
        Fault::Status(500),
        Fault::Busy { retry_after: 2 },
    ] {
        api.break_calls("*", fault, 5);
    }
    api.cut_watches(None);
    until(|| {
        node.operations_of("x")
            .iter()
            .any(|record| record.is_done())
    })
    .await?;
    assert_eq!(verdict(&finished(&api, "x").await?), Some("GuestOffline"));
    let failures = |reason| {
        node.metric(&format!(
            "virtnode_hotplug_object_call_failures_total{{call=\"status\",reason=\"{reason}\"}}"
        ))
    };
    assert!(failures("api-unreachable") >= 1.0 || failures("api-timeout") >= 1.0);
    // New objects are accepted again.
    api.make("y", vcpus("vm", 1));
    finished(&api, "y").await?;
    assert_eq!(node.operations_of("x").len(), 1);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn more_objects_than_places_are_executed_in_order_of_creation() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let name = |number: u32| format!("object-{}", 99 - number);
    let ttl = |number: u32| {
        let mut spec = vcpus(&format!("vm-{number}"), 8);
        spec["ttlSecondsAfterFinished"] = 3600.into();
        spec
    };
    for number in 0..20 {
        api.make(&name(number), ttl(number));
    }
    let options = ControllerOptions {
        max_tracked: 3,
        ..options()
    };
    let executor = ExecutorOptions::default();
    let node = HotplugNode::start_with_options(cluster(&api), executor, options);
    for number in 0..20 {
        finished(&api, &name(number)).await?;
    }
    // Two while the others still hold their places.
    for number in 20..22 {
        api.make(&name(number), ttl(number));
    }
    for number in 20..22 {
        finished(&api, &name(number)).await?;
    }
    let mut order: Vec<_> = node.executor.operations();
    order.reverse();
    let asked: Vec<_> = order
        .iter()
        .map(|record| record.asked_by.to_string())
        .collect();
    let expected: Vec<_> = (0..22)
        .map(|number| format!("domainhotplug/{}", name(number)))
        .collect();
    assert_eq!(asked, expected);
    assert_eq!(api.statuses().len(), 22, "each status is written once");
    assert_eq!(api.asked("hotplug-own"), 22, "each owner is set once");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn objects_beyond_the_names_in_memory_are_found_by_another_list() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    for number in 0..20 {
        api.make(
            &format!("object-{number}"),
            vcpus(&format!("vm-{number}"), 8),
        );
    }
    let options = ControllerOptions {
        max_tracked: 3,
        max_waiting: 4,
        list_interval: Duration::from_secs(1),
        ..options()
    };
    let executor = ExecutorOptions::default();
    let _node = HotplugNode::start_with_options(cluster(&api), executor, options);
    for number in 0..20 {
        finished(&api, &format!("object-{number}")).await?;
    }
    assert_eq!(api.statuses().len(), 20, "each status is written once");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn list_that_is_too_long_for_one_answer_is_read_in_pages() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut spec = vcpus("nobody", 8);
    spec["padding"] = "x".repeat(1_000_000).into();
    for number in 0..5 {
        api.make(&format!("large-{number}"), spec.clone());
    }
    api.make("small", vcpus("nobody", 8));
    let _node = HotplugNode::start(cluster(&api));
    finished(&api, "small").await?;
    let large = object(&api, "large-4", |object| object["status"].is_object()).await?;
    assert_eq!(condition(&large, "Accepted"), pair("False", "InvalidSpec"));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn ended_or_expired_watch_is_resumed() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    for (number, last) in [None, Some(410), Some(500)].into_iter().enumerate() {
        until(|| api.hotplug_watches() > 0).await?;
        api.cut_watches(last);
        let name = format!("x-{number}");
        api.make(&name, vcpus("vm", 3));
        assert_eq!(
            verdict(&finished(&api, &name).await?),
            Some("Verified"),
            "{last:?}"
        );
    }
    // The client ends a hanging watch some time after the server's timeout.
    until(|| api.hotplug_watches() > 0).await?;
    api.mute_watches();
    api.make("unheard", vcpus("vm", 3));
    let ended = tokio::time::timeout(Duration::from_secs(3600), async {
        while api
            .object("unheard")
            .is_none_or(|it| verdict(&it).is_none())
        {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    ended.await?;
    assert_eq!(node.operations_of("x-0").len(), 1);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn watch_without_bookmarks_is_restarted_within_minutes() -> anyhow::Result<()> {
    const MINUTE: Duration = Duration::from_secs(60);
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    until(|| api.hotplug_watches() > 0).await?;
    for _ in 0..60 {
        api.bookmark_watches();
        tokio::time::sleep(MINUTE).await;
    }
    // The server's timeout restarts it; no bookmark is missing.
    let watches = api.asked("hotplug-watch");
    ensure!(watches <= 4, "{watches} watches in an hour");

    api.bookmark_watches();
    tokio::time::sleep(MINUTE / 2).await;
    let watches = api.asked("hotplug-watch");
    api.mute_watches();
    let muted = tokio::time::Instant::now();
    api.make("unheard", vcpus("vm", 3));
    later(|| {
        api.object("unheard")
            .is_some_and(|it| verdict(&it).is_some())
    })
    .await?;
    let late = muted.elapsed();
    ensure!(late < 3 * MINUTE, "heard after {late:?}");
    assert_eq!(api.asked("hotplug-watch"), watches + 1, "one request");
    assert_eq!(
        api.asked("hotplug-list"),
        1,
        "resumed from the last version"
    );
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn recovered_watch_sets_the_condition_without_a_change() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    until(|| api.hotplug_watches() > 0).await?;
    let watched = || node.metric("virtnode_hotplug_objects_watched") == 1.0;
    until(watched).await?;
    api.break_calls("hotplug-watch", Fault::Refuse, 4);
    api.cut_watches(None);
    until(|| !watched()).await?;
    later(watched).await?;
    assert_eq!(api.asked("hotplug-list"), 1);
    // An outage does not change the condition; a missing right does.
    let shown = || node.watch_condition();
    assert_eq!(shown(), pair("True", "Watched"));
    api.break_calls("hotplug-watch", Fault::Status(403), usize::MAX);
    api.cut_watches(None);
    until(|| shown() == pair("False", "NotAllowed")).await?;
    // Successful lists alone do not count.
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(shown(), pair("False", "NotAllowed"));
    assert!(!watched());
    api.repair();
    later(|| shown() == pair("True", "Watched")).await?;
    assert!(watched());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn object_deleted_during_its_operation_leaves_the_record() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    api.make("x", vcpus("vm", 3));
    object(&api, "x", running).await?;
    let written = api.statuses().len();
    api.delete("x");
    until(|| {
        node.operations_of("x")
            .iter()
            .any(|record| record.is_done())
    })
    .await?;
    let record = &node.operations_of("x")[0];
    assert_eq!(record.verdict, Some(Verdict::GuestOffline));
    // An object of the same name is another one.
    api.make("x", vcpus("vm", 1));
    finished(&api, "x").await?;
    assert_eq!(node.operations_of("x").len(), 2);
    let of_the_first = api.statuses()[written..]
        .iter()
        .filter(|status| status["operation"] == record.id.as_str())
        .count();
    assert_eq!(of_the_first, 0, "a deleted object gets no event");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn verdict_is_not_reported_to_another_object_of_the_same_name() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    api.make("x", vcpus("vm", 3));
    object(&api, "x", running).await?;
    // The watch misses all of this.
    api.mute_watches();
    let first = api.object("x").unwrap()["metadata"]["uid"].clone();
    api.delete("x");
    api.make("x", vcpus("vm", 2));
    until(|| api.asked("hotplug-get") > 0).await?;
    assert!(node.operations_of("x")[0].is_done());
    let second = api.object("x").unwrap();
    assert!(
        second["status"].is_null() && second["metadata"]["uid"] != first,
        "{second:#}"
    );
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn concurrent_change_does_not_delay_the_verdict() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    api.make("x", vcpus("vm", 3));
    object(&api, "x", running).await?;
    api.mute_watches();
    api.change_spec("x", |_| {});
    assert_eq!(verdict(&finished(&api, "x").await?), Some("GuestOffline"));
    assert_eq!(api.asked("hotplug-get"), 1);
    Ok(())
}

#[tokio::test]
async fn object_is_deleted_at_the_end_of_its_time_to_live() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    let with_time_to_live = |seconds: u32| {
        let mut spec = vcpus("vm", 3);
        spec["ttlSecondsAfterFinished"] = seconds.into();
        spec
    };
    api.make("stays", vcpus("vm", 3));
    api.make("an-hour", with_time_to_live(3600));
    api.make("two-seconds", with_time_to_live(2));
    let mut refused = with_time_to_live(1);
    refused["memory"] = json!({"size": "2Gi"});
    api.make("refused", refused);
    let ended = finished(&api, "two-seconds").await?;
    let completed: jiff::Timestamp = ended["status"]["completionTime"]
        .as_str()
        .unwrap()
        .parse()?;
    until(|| api.object("two-seconds").is_none()).await?;
    let lived = jiff::Timestamp::now().duration_since(completed);
    assert!(lived.as_millis() >= 1999, "{lived:?}");
    until(|| api.object("refused").is_none()).await?;
    assert_eq!(api.asked("hotplug-delete"), 2);
    assert_eq!(verdict(&finished(&api, "stays").await?), Some("Verified"));
    assert_eq!(verdict(&finished(&api, "an-hour").await?), Some("Verified"));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn later_spec_change_is_reported_and_has_no_effect() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let mut node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    api.make("x", vcpus("vm", 3));
    object(&api, "x", running).await?;
    api.change_spec("x", |spec| spec["vcpus"]["count"] = 4.into());
    let changed = object(&api, "x", |it| {
        condition(it, "Accepted") == pair("True", "SpecChanged")
    })
    .await?;
    assert_eq!(changed["status"]["request"], "vcpus=3");
    // A daemon that starts after the change reports the same.
    node.stop().await;
    node.start_again();
    let ended = finished(&api, "x").await?;
    assert_eq!(condition(&ended, "Accepted"), pair("True", "SpecChanged"));
    assert_eq!(ended["status"]["observedGeneration"], 1);
    assert_eq!(ended["status"]["requested"]["vcpus"], 3);
    assert_eq!(node.control.calls(), ["set-vcpus vm 3"]);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn late_guest_corrects_the_status() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", slow());
    api.make("x", vcpus("vm", 3));
    assert_eq!(verdict(&finished(&api, "x").await?), Some("GuestOffline"));
    node.control.brings_online("vm");
    let right = object(&api, "x", |it| verdict(it) == Some("Verified")).await?;
    assert_eq!(condition(&right, "Succeeded"), pair("True", "Verified"));
    let events = [("Warning", "GuestOffline"), ("Normal", "Verified")];
    let events = events.map(|(kind, reason)| (kind.to_owned(), reason.to_owned()));
    until(|| api.events_about("DomainHotplug", "x") == events).await
}

#[tokio::test(start_paused = true)]
async fn missing_definition_is_polled_rarely_until_it_exists() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.break_calls("hotplug-list", Fault::Status(404), 4);
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    api.make("x", vcpus("vm", 3));
    assert_eq!(node.metric("virtnode_hotplug_objects_watched"), 0.0);
    assert_eq!(verdict(&finished(&api, "x").await?), Some("Verified"));
    later(|| node.metric("virtnode_hotplug_objects_watched") == 1.0).await?;
    let failures =
        "virtnode_hotplug_object_call_failures_total{call=\"watch\",reason=\"api-not-found\"}";
    assert_eq!(node.metric(failures), 4.0);
    assert_eq!(api.asked("hotplug-list"), 5);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn forbidden_owner_does_not_delay_the_operation() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    api.break_calls("hotplug-own", Fault::Status(403), usize::MAX);
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    for name in ["x", "y"] {
        api.make(name, vcpus("vm", 3));
        assert_eq!(verdict(&finished(&api, name).await?), Some("Verified"));
    }
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(api.asked("hotplug-own"), 2, "once for each");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn postponed_objects_are_submitted_in_order() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let few = ExecutorOptions {
        max_open: 1,
        ..ExecutorOptions::default()
    };
    let node = HotplugNode::start_with(cluster(&api), few);
    node.control.add("vm", slow());
    api.make("c", vcpus("vm", 2));
    object(&api, "c", running).await?;
    api.make("b", vcpus("vm", 3));
    let waits = object(&api, "b", |it| condition(it, "Accepted").is_some()).await?;
    assert_eq!(
        condition(&waits, "Accepted"),
        pair("Unknown", "TooManyOperations")
    );
    api.make("a", vcpus("vm", 4));
    let last = finished(&api, "a").await?;
    assert_eq!(condition(&last, "Accepted"), pair("True", "Accepted"));
    let calls = node.control.calls();
    assert_eq!(
        calls,
        ["set-vcpus vm 2", "set-vcpus vm 3", "set-vcpus vm 4"]
    );
    let held = |status: &&Value| status["conditions"][0]["reason"] == "TooManyOperations";
    assert!(
        api.statuses().iter().filter(held).count() <= 2,
        "one report for each"
    );
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn idle_controller_writes_nothing() -> anyhow::Result<()> {
    let api = FakeApi::with_node();
    let node = HotplugNode::start(cluster(&api));
    node.control.add("vm", FakeGuest::default());
    for number in 0..20 {
        api.make(&format!("x-{number}"), vcpus("vm", 3));
    }
    for number in 0..20 {
        finished(&api, &format!("x-{number}")).await?;
    }
    until(|| api.asked("hotplug-own") == 20).await?;
    let verbs = [
        "hotplug-status",
        "hotplug-own",
        "hotplug-delete",
        "get",
        "hotplug-list",
    ];
    let before = verbs.map(|verb| api.asked(verb));
    tokio::time::sleep(Duration::from_secs(3 * 3600)).await;
    assert_eq!(verbs.map(|verb| api.asked(verb)), before);
    let watches = api.asked("hotplug-watch");
    ensure!(watches <= 8, "{watches} watches in three hours");
    Ok(())
}
