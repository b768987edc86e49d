//! Truth table of what deceives: other clients, lying agents, late answers, emulators that abort.

use std::time::Duration;

use super::simulation::{Ended, GuestBehavior, World, WorldChange, ms, onlines};
use super::*;
use crate::domain::{CallError, DomainState};
use crate::operation::{AskedBy, OperationId, Order, Record};

fn vcpus(count: u32) -> HotplugRequest {
    let online = false;
    HotplugRequest::Vcpus { count, online }
}

/// A guest that takes a CPU at once and brings it online late.
fn late() -> GuestBehavior {
    GuestBehavior {
        onlines_after: Some(ms(5_000)),
        ..GuestBehavior::default()
    }
}

#[test]
fn change_by_another_client_is_reported_at_once_and_not_blamed_on_the_guest() {
    let another = |count| WorldChange::AnotherSets(count);
    for (has, asked, other) in [(1, 3, 2), (1, 3, 1), (1, 2, 4), (2, 3, 1), (1, 3, 4)] {
        let mut world = World::new(has, late()).at(ms(2_000), another(other));
        world.misses_removals = false;
        let ended = world.vcpus(asked);
        assert_eq!(
            (ended.verdict(), ended.diagnosis()),
            (Verdict::HypervisorError, "changed-by-another-client"),
            "{has} {asked} {other}: {:?}",
            ended.outcome()
        );
        let message = &ended.outcome().message;
        let to = format!("another client changed the domain to {other} vCPU");
        assert!(message.contains(&to), "{message}");
        assert!(ended.took(&world) < ms(3_000));
    }
    // The guest takes its time to release a vCPU, and another client plugs one.
    let silent = GuestBehavior {
        unresponsive: true,
        agent: false,
        ..onlines()
    };
    let mut world = World::new(3, silent).at(ms(7_000), another(4));
    let ended = world.vcpus(2);
    assert_eq!(ended.diagnosis(), "changed-by-another-client", "{ended:?}");
}

/// libvirt counts a vCPU that its guest released on the request of another client (before 12.4).
#[test]
fn vcpu_released_for_another_client_does_not_accuse_the_kernel() {
    let mut world = World::new(1, late()).at(ms(1_500), WorldChange::AnotherSets(2));
    let ended = world.vcpus(3);
    let outcome = ended.outcome();
    assert_eq!(
        ended.diagnosis(),
        "changed-by-another-client",
        "{outcome:?}"
    );
    assert_eq!(
        outcome.message,
        "another client asked the guest to release vCPU 2, and it did: 2 are left, and libvirt still \
         counts 3"
    );
    let words = format!("{outcome:?}");
    assert!(
        !words.contains("nr_cpus") && !words.contains("no room"),
        "{words}"
    );
}

/// libvirt counted a vCPU that had left before the operation, and the guest takes the new one.
#[test]
fn vcpu_that_left_before_does_not_accuse_the_kernel() {
    let mut world = World::new(3, onlines());
    world.has.remove(&2);
    world.online.remove(&2);
    let ended = world.vcpus(4);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::PartiallyApplied, "fewer-than-counted"),
        "{:?}",
        ended.outcome()
    );
    let message = &ended.outcome().message;
    assert!(
        message.ends_with("the guest has 3 of the 4 that libvirt counts, and had 2 of 3 before"),
        "{message}"
    );
}

#[test]
fn agent_that_claims_more_than_was_plugged_is_no_evidence() {
    let lies = GuestBehavior {
        nr_cpus: 1,
        ..onlines()
    };
    let mut world = World::new(1, lies.clone());
    world.claims = Some(3);
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestOffline, "cpus-never-ran"),
        "{:?}",
        ended.outcome()
    );

    // It begins to lie when it is asked: the vCPUs have not run.
    let mut world = World::new(1, lies).at(ms(100), WorldChange::Claims(3));
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::Unverifiable, "agent-contradicted"),
        "{:?}",
        ended.outcome()
    );

    // Without run times an agent is believed, as docs/security.md says.
    let mut world = World::new(1, onlines());
    world.counts_time = false;
    assert_eq!(world.vcpus(3).verdict(), Verdict::Verified);

    // A false claim does not make an honest plug fail where run times prove it.
    let mut world = World::new(1, onlines());
    world.claims = Some(4);
    assert_eq!(world.vcpus(3).verdict(), Verdict::Verified);
}

#[test]
fn evidence_is_in_the_order_of_cause_and_effect() {
    let mut world = World::new(1, onlines());
    world.call_takes = ms(1_000);
    let ended = world.vcpus(3);
    let evidence = &ended.outcome().evidence;
    let time = |source| {
        let of = move |piece: &&Evidence| piece.source == source;
        evidence.iter().filter(of).map(|piece| piece.time)
    };
    let called = time(Source::HypervisorCall).next().unwrap();
    assert!(
        called <= time(Source::AcpiOst).min().unwrap(),
        "{evidence:?}"
    );
    assert!(
        called <= time(Source::LiveXml).max().unwrap(),
        "{evidence:?}"
    );

    // An answer stands at the time at which it came.
    let mut history = ended.into_history();
    let mut seen = history.latest().clone();
    seen.at = world.now;
    seen.answered.live = Some(world.now.after(ms(100)));
    seen.answered.agent = Some(world.now.after(ms(3_000)));
    seen.answered.statistics = Some(world.now.after(ms(200)));
    history.observed(seen);
    let Step::Done(outcome) = judge(&history, world.now.after(ms(60_000))) else {
        panic!("the deadline is over");
    };
    let is_time = |piece: &&Evidence| piece.source == Source::VcpuTime;
    let last = outcome.evidence.iter().rfind(is_time).unwrap();
    assert_eq!(last.time, world.now.after(ms(200)));
    let after = world.now.after(ms(3_000)).since(history.calls()[0].started);
    let after = format!("after {}", crate::units::seconds(after));
    assert!(outcome.message.ends_with(&after), "{}", outcome.message);
}

#[test]
fn present_vcpus_are_verified_with_their_proof() {
    let mut world = World::new(
        2,
        GuestBehavior {
            agent: false,
            ..onlines()
        },
    );
    let ended = world.vcpus(2);
    let outcome = ended.outcome();
    assert_eq!(ended.verdict(), Verdict::Verified, "{outcome:?}");
    assert_eq!(
        outcome.message,
        "2 vCPUs plugged already, all 2 seen running"
    );
    let proof = outcome
        .evidence
        .iter()
        .find(|piece| piece.source == Source::VcpuTime);
    assert!(proof.unwrap().detail.contains("vcpu1 ran"), "{outcome:?}");
}

#[test]
fn emulator_without_kvm_is_not_asked_for_more_vcpus_than_it_can_start() {
    let plan = |virt_type: &str, has: u32, count: u32, released: u32| {
        let mut world = World::new(has, onlines());
        world.domain.virt_type = virt_type.to_owned();
        world.host.released_vcpus = released;
        world.vcpus(count)
    };
    // 1 at start, 3 plugged, 3 released: each further one is the fifth of 4.
    for (has, count, released, possible) in [
        (1, 4, 0, true),
        (2, 3, 1, true),
        (2, 4, 1, false),
        (1, 2, 3, false),
        (1, 3, 2, false),
        (3, 1, 3, true),
        (3, 3, 9, true),
    ] {
        match plan("qemu", has, count, released) {
            Ended::Rejected(Rejection::Infeasible(Infeasible::EmulatedVcpus { .. })) => {
                assert!(!possible, "{has} {count} {released}");
            }
            ended => assert!(possible, "{has} {count} {released}: {ended:?}"),
        }
        let ended = plan("kvm", has, count, released);
        assert!(matches!(ended, Ended::Judged(_)), "{ended:?}");
    }
    let Ended::Rejected(rejection) = plan("qemu", 1, 3, 2) else {
        panic!("2 of 4 are left");
    };
    assert_eq!(
        rejection.to_string(),
        "3 vCPUs would crash the domain: without KVM, QEMU starts at most 4 vCPUs in its life, the \
         maximum, and 2 of them were unplugged since it started; ask for 2 or fewer, or shut the \
         domain down and start it again"
    );
}

#[test]
fn fixed_vcpus_are_named_with_commands() {
    let mut world = World::new(3, onlines());
    for vcpu in &mut world.domain.vcpus.each[..3] {
        vcpu.hotpluggable = false;
    }
    world.domain.uuid = Some("9d6c5a4e-0c1f-4f0e-8a52-d9a5d0d3b1a7".to_owned());
    world.persistent = true;
    let Ended::Rejected(rejection) = world.vcpus(2) else {
        panic!("3 are fixed");
    };
    let words = rejection.to_string();
    for part in [
        "(vCPUs 0-2)",
        "`virsh setvcpus 9d6c5a4e-0c1f-4f0e-8a52-d9a5d0d3b1a7 2 --config`",
        "`virsh setvcpus 9d6c5a4e-0c1f-4f0e-8a52-d9a5d0d3b1a7 3 --config --hotpluggable`",
    ] {
        assert!(words.contains(part), "{words}");
    }
}

#[test]
fn pause_without_a_reason_is_observed_again() {
    for reason in [None, Some(PauseReason::Unknown)] {
        let mut seen = World::new(1, onlines()).observe();
        (seen.domain.state, seen.reason) = (DomainState::Paused, reason);
        let result = preflight(&vcpus(2), Scope::Live, &seen, &Host::default());
        assert!(matches!(result, Preflight::Unexplained(_)), "{result:?}");
    }
}

/// The longest history that an operation can have, with the longest texts.
#[test]
fn record_of_the_worst_history_stays_below_16_kib() {
    let mut world = World::new(1, onlines());
    let before = world.observe();
    let plan = Plan {
        actions: vec![Action::SetVcpus {
            count: 3,
            persist: false,
        }],
    };
    let terms = world.terms(Require::Online, 3_600);
    let mut history = History::new(vcpus(3), terms, plan, before, true);
    let noise = "\u{1b}\"\\".repeat(100_000);
    for n in 0..600 {
        world.now = world.now.after(Duration::from_secs(1));
        let action = Action::SetVcpus {
            count: 3 + n % 2,
            persist: false,
        };
        history.called(world.now, action);
        let error = CallError::Busy {
            call: "set-vcpus".into(),
            text: format!("{n}{noise}"),
        };
        history.returned(world.now, Return::Failed(error));
        let device = format!("vcpu{n}");
        history.happened(world.now, Event::UnplugFailed { device });
        let mut seen = world.observe();
        seen.domain.vcpus.each[1].enabled = n % 2 == 0;
        seen.agent = Agent::Silent(format!("{n}{noise}"));
        history.observed(seen);
    }
    let Step::Done(outcome) = judge(&history, terms.deadline) else {
        panic!("the deadline is over");
    };
    let order = Order {
        domain: "\u{1}".repeat(255).parse().unwrap(),
        request: vcpus(3),
        require: Require::Online,
        persistent: true,
        timeout: Duration::from_secs(3_600),
        idempotency_key: Some("k".repeat(128)),
        asked_by: AskedBy::Object {
            object: format!("domainhotplug/{}", "n".repeat(253)),
            user: Some("u".repeat(253)),
        },
    };
    let mut record = Record::new(OperationId::new(0, 0), &order, world.now);
    record.awaits(&noise, world.now);
    let mut worst = *outcome;
    worst.diagnosis = Some(Diagnosis::new("code", noise.clone(), noise.clone()));
    worst.message.clone_from(&noise);
    worst.hypervisor_error = Some(noise);
    record.conclude(worst, world.now);
    let json = serde_json::to_string(&record).unwrap();
    assert!(record.evidence.len() > 16, "{}", record.evidence.len());
    assert!(json.len() <= 16 << 10, "{}", json.len());
}
