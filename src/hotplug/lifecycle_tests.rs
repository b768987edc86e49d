//! Truth table of interruptions: ended domains, resets, errors, lost answers.

use super::simulation::{
    GuestBehavior, World, WorldChange, failed, mib, ms, onlines, without_agent,
};
use super::*;
use crate::domain::CallError;

#[test]
fn stopped_domain_is_not_changed() {
    use crate::domain::DomainState;
    for state in [
        DomainState::Paused,
        DomainState::ShutOff,
        DomainState::Suspended,
        DomainState::Crashed,
    ] {
        let mut world = World::new(1, onlines());
        world.domain.state = state;
        assert_eq!(
            world.vcpus(2).verdict(),
            Verdict::DomainNotRunning,
            "{state}"
        );
        assert!(world.made.is_empty());
    }
}

#[test]
fn pause_reason_decides_between_waiting_and_rejecting() {
    use crate::domain::{DomainState, PauseReason};
    let held = |state, reason| {
        let mut seen = World::new(1, onlines()).observe();
        (seen.domain.state, seen.reason) = (state, reason);
        let (count, online) = (2, false);
        preflight(
            &HotplugRequest::Vcpus { count, online },
            Scope::Live,
            &seen,
            &Host::default(),
        )
    };
    let blocked = held(DomainState::Paused, Some(PauseReason::Save));
    assert_eq!(
        blocked,
        Preflight::Blocked("the domain, paused by a save to a file, to run again".to_owned())
    );
    for (state, reason, says) in [
        (
            DomainState::Paused,
            Some(PauseReason::IoError),
            "the domain is paused by an I/O error of",
        ),
        // From a journal of an older version.
        (
            DomainState::Paused,
            None,
            "the domain is paused: resume it first",
        ),
        (
            DomainState::ShutOff,
            None,
            "the domain is shut off: start it",
        ),
        // Starting it here as well would destroy it.
        (
            DomainState::ShutOff,
            Some(PauseReason::Migrated),
            "ask the node that it runs on now",
        ),
        (
            DomainState::ShutOff,
            Some(PauseReason::Saved),
            "saved to a file: restore it first",
        ),
        (DomainState::Suspended, None, "virsh dompmwakeup"),
    ] {
        let (Preflight::Rejected(rejection) | Preflight::Unexplained(rejection)) =
            held(state, reason)
        else {
            panic!("{state} {reason:?}");
        };
        assert_eq!(rejection.verdict(), Verdict::DomainNotRunning);
        let text = rejection.to_string();
        assert!(text.contains(says), "no '{says}' in {text}");
    }
}

#[test]
fn pause_until_deadline_yields_domain_not_running_with_remedy() {
    use crate::domain::PauseReason;
    for (by, says) in [
        (
            PauseReason::User,
            "paused by a user, so its guest cannot react: resume it first",
        ),
        (
            PauseReason::IoError,
            "I/O error of one of its disks, so its guest",
        ),
        (PauseReason::Save, "wait until that is over"),
    ] {
        let mut world = World::new(1, GuestBehavior::default()).at(ms(300), WorldChange::Pause);
        world.paused_by = by;
        let ended = world.vcpus(3);
        assert_eq!(ended.verdict(), Verdict::DomainNotRunning);
        let message = &ended.outcome().message;
        assert!(message.contains(says), "no '{says}' in {message}");
    }
}

#[test]
fn end_of_domain_ends_operation() {
    let mut world = World::new(1, GuestBehavior::default()).at(ms(500), WorldChange::Destroy);
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::DomainNotRunning);
    assert!(ended.took(&world) < ms(1000));

    let mut world = World::new(1, GuestBehavior::default()).at(ms(300), WorldChange::Pause);
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::DomainNotRunning);

    let paused_for_a_while = World::new(1, onlines()).at(ms(60), WorldChange::Pause);
    let mut world = paused_for_a_while.at(ms(8000), WorldChange::Resume);
    assert_eq!(world.vcpus(3).verdict(), Verdict::Verified);
    assert!(world.guest_uses(3));
}

#[test]
fn reset_discards_earlier_evidence() {
    let mut world = World::new(1, GuestBehavior::default()).at(ms(1000), WorldChange::Reset);
    let ended = world.vcpus(3);
    assert_eq!(
        ended.verdict(),
        Verdict::Verified,
        "a booting guest takes all that is there"
    );
    assert!(world.guest_uses(3));
    let mut world =
        World::new(1, without_agent(GuestBehavior::default())).at(ms(1000), WorldChange::Reset);
    assert_eq!(world.vcpus(3).verdict(), Verdict::Verified);
    // A firmware that keeps all vCPUs running is not a guest.
    let behavior = GuestBehavior {
        nr_cpus: 1,
        ..without_agent(GuestBehavior::default())
    };
    let mut world = World::new(1, behavior).at(ms(1000), WorldChange::Reset);
    for after in (1_100..9_000).step_by(100) {
        world = world.at(ms(after), WorldChange::Runs(2));
        world = world.at(ms(after), WorldChange::Runs(1));
    }
    assert_ne!(world.vcpus(3).verdict(), Verdict::Verified);
    // Run time before the reset does not count.
    let behavior = GuestBehavior {
        nr_cpus: 1,
        ..without_agent(GuestBehavior::default())
    };
    let mut world = World::new(1, behavior).at(ms(1000), WorldChange::Reset);
    assert_ne!(world.vcpus(3).verdict(), Verdict::Verified);
}

#[test]
fn call_error_is_verdict_after_observation() {
    let mut world = World::new(1, onlines());
    let text = "internal error: unable to execute QEMU command 'device_add': cpu hotplug with SMI \
                wasn't enabled by firmware";
    world.fails = Some(failed(text));
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::HypervisorError, "firmware-smi")
    );
    assert_eq!(ended.outcome().message, text);
    assert_eq!(world.made.len(), 1);

    let mut world = World::new(1, onlines());
    world.fails = Some(CallError::NotRunning(
        "ドメインは動作していません".to_owned(),
    ));
    assert_eq!(world.vcpus(3).verdict(), Verdict::DomainNotRunning);

    let mut world = World::new(1, onlines());
    world.fails = Some(CallError::Busy {
        call: "set-vcpus".into(),
        text: "操作がタイムアウトしました".to_owned(),
    });
    world.call_takes = ms(7000);
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Busy);
    assert!(world.made.len() > 1, "it is tried again");
}

#[test]
fn lost_call_that_was_carried_out_is_not_repeated() {
    // libvirt carried out the call, and the connection broke.
    let lost = World::new(1, onlines()).at(ms(20), WorldChange::LosesLibvirt);
    let mut world = lost.at(ms(3000), WorldChange::FindsLibvirt);
    assert_eq!(world.vcpus(3).verdict(), Verdict::Verified);
    assert_eq!(world.made.len(), 1);

    let mut world = World::new(1, onlines()).at(ms(20), WorldChange::LosesLibvirt);
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::HypervisorUnavailable);
    assert_eq!(world.made.len(), 1);
}

/// Returns the history of an operation that was killed in its first call, which libvirt never
/// received.
fn killed(world: &World, request: HotplugRequest) -> History {
    let terms = world.terms(Require::Online, 30);
    let before = world.observe();
    let Preflight::Ready(plan) = preflight(&request, Scope::Live, &before, &Host::default()) else {
        panic!();
    };
    let action = plan.actions[0].clone();
    let mut history = History::new(request, terms, plan, before, true);
    history.called(world.now, action);
    let journal = serde_json::to_string(&history).unwrap();
    let mut history: History = serde_json::from_str(&journal).unwrap();
    history.lost(world.now.after(ms(5)));
    history
}

fn vcpus(count: u32) -> HotplugRequest {
    let online = false;
    HotplugRequest::Vcpus { count, online }
}

#[test]
fn lost_call_that_was_not_carried_out_is_repeated() {
    for (from, to) in [(1, 3), (3, 2)] {
        let mut world = World::new(from, onlines());
        world.misses_removals = false;
        let mut history = killed(&world, vcpus(to));
        let outcome = world.run(&mut history);
        assert_eq!(outcome.verdict, Verdict::Verified, "{}", outcome.message);
        assert_eq!(world.made.len(), 1);
        assert!(world.guest_uses(to));
    }

    // Two devices: the part of the plan that was carried out is not repeated.
    let mut world = World::new(1, onlines());
    let mut other = world.domain.memory.devices[0].clone();
    other.alias = Some("ua-mem1".to_owned());
    world.domain.memory.devices.push(other);
    world.domain.memory.devices[0].size = mib(256);
    world.domain.memory.maximum = Some(mib(8192));
    let size = mib(1024);
    let mut history = killed(&world, HotplugRequest::Memory { size, force: false });
    world.domain.memory.devices[0].requested = Some(mib(256));
    world.domain.memory.devices[0].current = Some(mib(256));
    world.run(&mut history);
    let aliases = world.made.iter().map(|action| match action {
        Action::ResizeVirtioMem { alias, .. } => alias.as_str(),
        other => panic!("{other:?}"),
    });
    assert_eq!(aliases.collect::<Vec<_>>(), ["ua-mem1"]);
}

#[test]
fn lost_call_on_otherwise_changed_domain_is_not_repeated() {
    let mut world = World::new(2, onlines());
    let mut history = killed(&world, vcpus(3));
    world.domain.vcpus.each[1].enabled = false;
    let outcome = world.run(&mut history);
    assert_eq!(outcome.verdict, Verdict::HypervisorError);
    assert!(outcome.message.contains("something else changed it"));
    assert!(world.made.is_empty());
}

#[test]
fn call_lost_three_times_is_given_up() {
    let world = World::new(1, onlines());
    let mut history = killed(&world, vcpus(3));
    let mut now = world.now;
    let mut calls = 1;
    let outcome = loop {
        match judge(&history, now) {
            Step::Done(outcome) => break outcome,
            Step::Call(action) => {
                calls += 1;
                history.called(now, action);
                history.lost(now);
            }
            Step::Wait { .. } => {}
        }
        now = now.after(ms(200));
        let mut seen = world.observe();
        seen.at = now;
        history.observed(seen);
    };
    assert_eq!(outcome.verdict, Verdict::HypervisorError);
    assert_eq!(calls, 3);
}

/// The agent may not have received the request, and repeating it does no harm.
#[test]
fn lost_agent_call_is_repeated() {
    let mut world = World::new(1, GuestBehavior::default());
    let (count, online) = (3, true);
    let mut history = killed(&world, HotplugRequest::Vcpus { count, online });
    world.made.push(history.calls()[0].action.clone());
    world.repeat_call(0);
    let before = world.made.len();
    world.run_until(&mut history, |step| matches!(step, Step::Call(_)));
    let Step::Call(call) = judge(&history, world.now) else {
        panic!();
    };
    history.called(world.now, call.clone());
    history.lost(world.now);
    let outcome = world.run(&mut history);
    assert_eq!(outcome.verdict, Verdict::Verified, "{}", outcome.message);
    assert_eq!(world.made[before..], [call]);
}

/// At the deadline libvirt may be about to carry out the lost call.
#[test]
fn unsettled_call_at_deadline_yields_pending() {
    let mut world = World::new(1, onlines());
    let mut history = killed(&world, vcpus(3));
    let late = history.terms.deadline.after(ms(1));
    let error = CallError::Lost("the connection broke".to_owned());
    history.returned(late, Return::Failed(error));
    let mut seen = world.observe();
    seen.at = late;
    history.observed(seen);
    let Step::Done(outcome) = judge(&history, late) else {
        panic!();
    };
    assert_eq!(outcome.verdict, Verdict::Pending, "{}", outcome.message);
    assert!(outcome.verdict.may_change() && history.is_unsettled());
    world.now = late;
    let outcome = world.judge_later(&mut history, ms(3000));
    assert_eq!(outcome.verdict, Verdict::HypervisorError);
    assert!(!history.is_unsettled() && world.made.is_empty());
}

#[test]
fn frozen_libvirt_yields_guest_silent_for_plugged_vcpus() {
    let mut world = World::new(
        1,
        GuestBehavior {
            unresponsive: true,
            ..onlines()
        },
    );
    world.call_takes = ms(100_000);
    world.domain.vcpus.each[1].enabled = false;
    let ended = world.vcpus(3);
    // The live XML shows the vCPUs, and the guest does not react.
    assert_eq!(ended.verdict(), Verdict::GuestSilent);
}
