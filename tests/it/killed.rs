//! The daemon killed with `kill -9` at each step of an operation, on a real libvirtd with real
//! guests. Afterward the record is complete and true, and no call was repeated: a relay between the
//! daemon and libvirtd counts the calls and holds the one at which the daemon is killed.

use std::time::Duration;

use anyhow::ensure;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use virtnode::executor::{OperationId, Record};
use virtnode::hotplug::Verdict;

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::guest::{Guest, GuestConfig, MorePossible};
use crate::support::libvirtd::Libvirtd;
use crate::support::relay::{
    ATTACH_DEVICE, GUEST_VCPUS, Hold, LOOKUP_BY_NAME, Relay, SET_VCPUS, UPDATE_DEVICE,
};

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(120);

/// A daemon with its state directory and the relay to libvirtd.
struct Node {
    relay: Relay,
    /// `None` only between a kill and the next start.
    daemon: Option<Daemon>,
}

impl Node {
    async fn start(libvirtd: &Libvirtd) -> Self {
        let relay = Relay::start(libvirtd).unwrap();
        let daemon = Daemon::start(relay.uri(), &[]).await.unwrap();
        daemon.ready().await.unwrap();
        Self {
            relay,
            daemon: Some(daemon),
        }
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// Kills the daemon; the relay forwards or drops the held message before the next one starts.
    async fn kill(&mut self, pass_on: bool) {
        let directory = self.daemon.take().unwrap().kill().unwrap();
        self.relay.release(pass_on);
        let next = Daemon::start_in(directory, self.relay.uri(), &[]).await;
        self.daemon = Some(next.unwrap());
    }

    fn ask(&self, domain: &str, resource: &str, body: &Value) -> OperationId {
        let path = format!("/v1/domains/{domain}/{resource}");
        let record = self.daemon().api("POST", &path, &body.to_string()).unwrap();
        record["id"].as_str().unwrap().parse().unwrap()
    }

    fn record(&self, id: &OperationId) -> anyhow::Result<Record> {
        let path = format!("/v1/operations/{id}");
        Ok(serde_json::from_value(
            self.daemon().api("GET", &path, "")?,
        )?)
    }

    async fn becomes(&self, id: &OperationId, wanted: impl Fn(&Record) -> bool) -> Record {
        eventually(LONG, async || {
            let record = self.record(id)?;
            ensure!(wanted(&record), "{record:#?}");
            Ok(record)
        })
        .await
        .unwrap()
    }

    async fn is_verified(&self, id: &OperationId) -> Record {
        let record = self.becomes(id, Record::is_done).await;
        assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
        record
    }

    /// Returns the number of calls in the journal, and true if the last one returned.
    fn calls(&self, id: &OperationId) -> (usize, bool) {
        let entry = self.daemon().journal(id).unwrap();
        let calls = entry["entry"]["history"]["calls"].as_array();
        let calls = calls.map(Vec::as_slice).unwrap_or_default();
        let returned = calls.last().is_some_and(|call| !call["returned"].is_null());
        (calls.len(), returned)
    }
}

/// Returns libvirt's number of vCPUs.
fn counted(libvirtd: &Libvirtd, domain: &str) -> u32 {
    let count = libvirtd.virsh(&["vcpucount", domain, "--live"]);
    count.unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn daemon_killed_during_a_vcpu_plug_resumes_it() {
    let libvirtd = Libvirtd::start().unwrap();
    let config = GuestConfig {
        words: "lab.cpus=online",
        maximum: 8,
        ..GuestConfig::default()
    };
    let guest = Guest::start(&libvirtd, &config).await.unwrap();
    let mut node = Node::start(&libvirtd).await;
    // The message held at the kill, whether the relay forwards it, and the calls in the journal.
    let steps = [
        (
            "asked for",
            Hold::Request(LOOKUP_BY_NAME),
            false,
            (0, false),
        ),
        (
            "called, and libvirt never got it",
            Hold::Request(SET_VCPUS),
            false,
            (1, false),
        ),
        (
            "called, and libvirt gets it later",
            Hold::Request(SET_VCPUS),
            true,
            (1, false),
        ),
        (
            "done, and nobody heard it",
            Hold::Answer(SET_VCPUS),
            false,
            (1, false),
        ),
    ];
    let mut count = 1;
    for (step, hold, pass_on, known) in steps {
        count += 1;
        let before = node.relay.passed(SET_VCPUS);
        node.relay.hold(hold);
        let id = node.ask("guest", "vcpus", &json!({ "count": count }));
        node.relay.holds().unwrap();
        assert_eq!(node.calls(&id), known, "{step}");
        node.kill(pass_on).await;
        node.is_verified(&id).await;
        let online = format!("0-{}", count - 1);
        guest.sees(|guest| guest.online == online).await.unwrap();
        assert_eq!(node.relay.passed(SET_VCPUS) - before, 1, "{step}");
    }

    // libvirt accepted the call, and no daemon observed whether the guest followed.
    let before = node.relay.passed(SET_VCPUS);
    node.relay.hold(Hold::Answer(SET_VCPUS));
    let id = node.ask("guest", "vcpus", &json!({"count": 6}));
    node.relay.holds().unwrap();
    node.relay.then(Hold::Answer(GUEST_VCPUS));
    node.relay.holds().unwrap();
    eventually(LONG, async || {
        ensure!(node.calls(&id) == (1, true));
        Ok(())
    })
    .await
    .unwrap();
    node.kill(false).await;
    let record = node.is_verified(&id).await;
    guest.sees(|guest| guest.online == "0-5").await.unwrap();
    assert_eq!(node.relay.passed(SET_VCPUS) - before, 1);

    // After the verdict.
    node.kill(false).await;
    let again = node.becomes(&id, Record::is_done).await;
    assert_eq!(again, record);

    // A call that arrives after its repetition has no effect.
    node.relay.hold(Hold::Request(SET_VCPUS));
    let id = node.ask("guest", "vcpus", &json!({"count": 7}));
    node.relay.holds().unwrap();
    let directory = node.daemon.take().unwrap().kill().unwrap();
    let next = Daemon::start_in(directory, node.relay.uri(), &[]).await;
    node.daemon = Some(next.unwrap());
    let record = node.is_verified(&id).await;
    node.relay.release(true);
    eventually(LONG, async || {
        ensure!(node.relay.passed(SET_VCPUS) - before == 3);
        Ok(())
    })
    .await
    .unwrap();
    assert_eq!(counted(&libvirtd, "guest"), 7);
    guest.sees(|guest| guest.online == "0-6").await.unwrap();
    assert_eq!(node.record(&id).unwrap(), record);
}

#[tokio::test]
async fn daemon_killed_during_a_vcpu_unplug_resumes_it() {
    let libvirtd = Libvirtd::start().unwrap();
    let config = GuestConfig {
        words: "lab.cpus=online",
        ..GuestConfig::default()
    };
    let guest = Guest::start(&libvirtd, &config).await.unwrap();
    libvirtd
        .virsh(&["setvcpus", "guest", "3", "--live"])
        .unwrap();
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
    let mut node = Node::start(&libvirtd).await;

    // libvirt did not receive the call.
    node.relay.hold(Hold::Request(SET_VCPUS));
    let id = node.ask("guest", "vcpus", &json!({"count": 2}));
    node.relay.holds().unwrap();
    node.kill(false).await;
    node.is_verified(&id).await;
    guest.sees(|guest| guest.online == "0-1").await.unwrap();
    assert_eq!(counted(&libvirtd, "guest"), 2);
    // One call, and a second one if libvirt does not notice that the vCPU was released.
    let calls = node.relay.passed(SET_VCPUS);
    assert!((1..=2).contains(&calls), "{calls}");

    // The guest released the vCPU, and libvirt has not reported it yet.
    let id = node.ask("guest", "vcpus", &json!({"count": 1}));
    guest.sees(|guest| guest.online == "0").await.unwrap();
    node.kill(false).await;
    node.is_verified(&id).await;
    assert_eq!(counted(&libvirtd, "guest"), 1);
    assert_eq!(guest.witness().unwrap().online, "0");
    let calls = node.relay.passed(SET_VCPUS) - calls;
    assert!((1..=2).contains(&calls), "{calls}");
}

#[tokio::test]
async fn daemon_killed_during_a_memory_plug_resumes_it() {
    let libvirtd = Libvirtd::start().unwrap();
    let resized = GuestConfig {
        name: "resized",
        words: "lab.blocks=online_movable",
        ..GuestConfig::default()
    };
    let slotted = GuestConfig {
        name: "slotted",
        words: "lab.blocks=online",
        memory: MorePossible::Dimms,
        ..GuestConfig::default()
    };
    let guests = tokio::join!(
        Guest::start(&libvirtd, &resized),
        Guest::start(&libvirtd, &slotted)
    );
    let (_resized, _slotted) = (guests.0.unwrap(), guests.1.unwrap());
    let mut node = Node::start(&libvirtd).await;
    for (domain, call, hold, pass_on, size) in [
        (
            "resized",
            UPDATE_DEVICE,
            Hold::Request(UPDATE_DEVICE),
            false,
            "640MiB",
        ),
        (
            "resized",
            UPDATE_DEVICE,
            Hold::Answer(UPDATE_DEVICE),
            false,
            "768MiB",
        ),
        (
            "resized",
            UPDATE_DEVICE,
            Hold::Request(UPDATE_DEVICE),
            true,
            "512MiB",
        ),
        (
            "slotted",
            ATTACH_DEVICE,
            Hold::Request(ATTACH_DEVICE),
            false,
            "640MiB",
        ),
        (
            "slotted",
            ATTACH_DEVICE,
            Hold::Answer(ATTACH_DEVICE),
            false,
            "768MiB",
        ),
    ] {
        let before = node.relay.passed(call);
        node.relay.hold(hold);
        let id = node.ask(domain, "memory", &json!({ "size": size }));
        node.relay.holds().unwrap();
        node.kill(pass_on).await;
        node.is_verified(&id).await;
        assert_eq!(node.relay.passed(call) - before, 1, "{hold:?} {size}");
    }
    let xml = libvirtd.virsh(&["dumpxml", "slotted"]).unwrap();
    assert_eq!(xml.matches("<memory model='dimm'").count(), 2, "{xml}");
}

/// Kills the daemon between any two messages to libvirt.
#[tokio::test]
async fn daemon_killed_between_any_two_messages_resumes() {
    let libvirtd = Libvirtd::start().unwrap();
    libvirtd.start_firmware("guest", 32).unwrap();
    let mut node = Node::start(&libvirtd).await;
    let mut count = 1;
    for messages in (0..30).step_by(3) {
        count += 1;
        let before = node.relay.passed(SET_VCPUS);
        node.relay.hold(Hold::After(messages));
        let body = json!({"count": count, "require": "accepted"});
        let id = node.ask("guest", "vcpus", &body);
        eventually(LONG, async || {
            let done = node.record(&id)?.is_done();
            ensure!(node.relay.is_holding() || done, "neither held nor done");
            Ok(())
        })
        .await
        .unwrap();
        node.kill(false).await;
        node.is_verified(&id).await;
        assert_eq!(
            counted(&libvirtd, "guest"),
            count,
            "after {messages} messages"
        );
        let calls = node.relay.passed(SET_VCPUS) - before;
        assert_eq!(calls, 1, "after {messages} messages");
    }
}

/// libvirt completes a call after the deadline: the verdict is corrected, even by a daemon that was
/// killed and restarted meanwhile.
#[tokio::test]
async fn daemon_killed_while_following_corrects_the_verdict() {
    let libvirtd = Libvirtd::start().unwrap();
    libvirtd.start_firmware("guest", 8).unwrap();
    let mut node = Node::start(&libvirtd).await;
    for (count, killed) in [(2, false), (3, true)] {
        let before = node.relay.passed(SET_VCPUS);
        node.relay.hold(Hold::Request(SET_VCPUS));
        let body = json!({"count": count, "require": "accepted", "timeoutSeconds": 6});
        let id = node.ask("guest", "vcpus", &body);
        node.relay.holds().unwrap();
        libvirtd.signal_emulator("guest", Signal::SIGSTOP).unwrap();
        node.relay.release(true);
        let record = node.becomes(&id, Record::is_done).await;
        assert_eq!(record.verdict, Some(Verdict::Pending), "{record:#?}");
        if killed {
            node.kill(false).await;
            let after = node.becomes(&id, Record::is_done).await;
            assert_eq!(after.verdict, Some(Verdict::Pending), "{after:#?}");
        }
        libvirtd.signal_emulator("guest", Signal::SIGCONT).unwrap();
        let verified = |record: &Record| record.verdict == Some(Verdict::Verified);
        let record = node.becomes(&id, verified).await;
        assert!(record.corrected > record.finished, "{record:#?}");
        assert_eq!(counted(&libvirtd, "guest"), count);
        assert_eq!(node.relay.passed(SET_VCPUS) - before, 1);
    }
}

/// libvirtd killed before it starts a call, and before it answers one.
#[tokio::test]
async fn libvirtd_killed_during_a_call_is_observed() {
    let mut libvirtd = Libvirtd::start().unwrap();
    libvirtd.start_firmware("guest", 8).unwrap();
    let node = Node::start(&libvirtd).await;
    for (count, hold) in [(2, Hold::Request(SET_VCPUS)), (3, Hold::Answer(SET_VCPUS))] {
        let before = node.relay.passed(SET_VCPUS);
        node.relay.hold(hold);
        let body = json!({"count": count, "require": "accepted"});
        let id = node.ask("guest", "vcpus", &body);
        node.relay.holds().unwrap();
        libvirtd.kill().unwrap();
        node.relay.release(false);
        libvirtd.restart().unwrap();
        node.is_verified(&id).await;
        assert_eq!(counted(&libvirtd, "guest"), count);
        assert_eq!(node.relay.passed(SET_VCPUS) - before, 1, "{hold:?}");
    }
}
