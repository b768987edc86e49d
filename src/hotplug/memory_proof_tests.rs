//! The evidence that a guest uses its memory.

use super::simulation::{Ended, GuestBehavior, World, WorldChange, failed, mib, ms};
use super::*;
use crate::domain::CallError;
use crate::units::Bytes;

fn offline() -> GuestBehavior {
    GuestBehavior {
        blocks_online: false,
        ..GuestBehavior::default()
    }
}

fn periods(world: &World) -> Vec<(u32, u32)> {
    let period = |action: &Action| match action {
        Action::SetStatsPeriod { seconds, was } => Some((*seconds, *was)),
        _ => None,
    };
    world.made.iter().filter_map(period).collect()
}

/// The record of the operation, as the next one on the same domain gets it.
fn ask_again(world: &mut World, earlier: &Ended, size: Bytes) -> Outcome {
    let before = world.observe();
    let (request, terms) = (request(size), world.terms(Require::Online, 60));
    let Preflight::Ready(plan) = preflight(&request, Scope::Live, &before, &Host::default()) else {
        panic!();
    };
    assert!(plan.actions.is_empty());
    let mut history = History::new(request, terms, plan, before, true);
    history.earlier = Some(Earlier {
        verdict: earlier.verdict(),
        after: earlier.outcome().after,
    });
    world.run(&mut history)
}

fn request(size: Bytes) -> HotplugRequest {
    HotplugRequest::Memory { size, force: false }
}

#[test]
fn complete_growth_yields_verified_whatever_the_kernel_reserved_at_boot() {
    // crashkernel=256M: measured with 512 MiB
    for dimms in [false, true] {
        let mut world = World::new(1, GuestBehavior::default()).with_total(mib(148));
        if dimms {
            world = world.with_dimms();
        }
        let ended = world.memory(mib(1024));
        assert_eq!(ended.verdict(), Verdict::Verified, "{:?}", ended.outcome());
        let again = ask_again(&mut world, &ended, mib(1024));
        assert_eq!(again.verdict, Verdict::Verified, "{again:?}");
        // Nobody remembers: what is missing may be reserved or offline.
        let alone = world.memory(mib(1024));
        let expected = (Verdict::Unverifiable, "unclear-total");
        assert_eq!((alone.verdict(), alone.diagnosis()), expected);
    }
}

#[test]
fn missing_memory_yields_one_verdict_for_one_state() {
    let mut world = World::new(1, offline());
    let ended = world.memory(mib(1024));
    assert_eq!(ended.verdict(), Verdict::GuestOffline);
    let again = ask_again(&mut world, &ended, mib(1024));
    assert_eq!(again.verdict, Verdict::GuestOffline);
    let diagnosis = again.diagnosis.unwrap();
    assert!(
        diagnosis.seen.contains("620MiB are missing"),
        "{diagnosis:?}"
    );
    assert!(diagnosis.remedy.contains("echo online > $state"));
}

#[test]
fn missing_statistics_are_switched_on_for_the_operation() {
    for (behavior, verdict) in [
        (GuestBehavior::default(), Verdict::Verified),
        (offline(), Verdict::GuestOffline),
    ] {
        let mut world = World::new(1, behavior).with_period(None);
        assert_eq!(world.observe().guest_total(), None, "as old as the guest");
        let ended = world.memory(mib(1024));
        assert_eq!(ended.verdict(), verdict, "{:?}", ended.outcome());
        assert_eq!(periods(&world), [(1, 0)]);
        let Amount::Memory { guest_total, .. } = ended.outcome().before else {
            panic!();
        };
        assert_eq!(guest_total, Some(mib(404)), "reported before the change");
        let mut history = ended.into_history();
        let back = Action::SetStatsPeriod { seconds: 0, was: 1 };
        assert_eq!(put_back(&history), Some(back.clone()));
        history.called(world.now, back);
        assert_eq!(put_back(&history), None, "once");
    }
    // What is there already is left alone.
    let mut world = World::new(1, GuestBehavior::default());
    let history = world.memory(mib(1024)).into_history();
    assert_eq!(periods(&world), []);
    assert_eq!(put_back(&history), None);
}

#[test]
fn statistics_that_another_client_changed_are_not_put_back() {
    let mut world = World::new(1, GuestBehavior::default()).with_period(None);
    let mut history = world.memory(mib(1024)).into_history();
    world.domain.balloon.stats_period = Some(10);
    world.now = world.now.after(ms(100));
    history.observed(world.observe());
    assert_eq!(put_back(&history), None);
}

#[test]
fn deadline_shorter_than_statistics_period_is_met() {
    let mut world = World::new(1, GuestBehavior::default()).with_period(Some(60));
    let terms = world.terms(Require::Online, 8);
    let ended = world.carry_out(request(mib(1024)), terms);
    assert_eq!(ended.verdict(), Verdict::Verified, "{:?}", ended.outcome());
    assert_eq!(periods(&world), [(1, 60)]);
    let back = Action::SetStatsPeriod {
        seconds: 60,
        was: 1,
    };
    assert_eq!(put_back(&ended.into_history()), Some(back));
}

#[test]
fn nothing_is_verified_online_without_a_report() {
    let silent = GuestBehavior {
        reports_total: false,
        ..offline()
    };
    for dimms in [false, true] {
        for (present, remedy) in [
            (false, "<memballoon model='virtio'>"),
            (true, "virtio_balloon"),
        ] {
            let mut world = World::new(1, silent.clone()).with_period(None);
            world.domain.balloon.present = present;
            if dimms {
                world = world.with_dimms();
            }
            for _ in 0..2 {
                let ended = world.memory(mib(1024));
                let expected = (Verdict::Unverifiable, "no-source");
                assert_eq!((ended.verdict(), ended.diagnosis()), expected);
                let diagnosis = ended.outcome().diagnosis.clone().unwrap();
                assert!(diagnosis.remedy.contains(remedy), "{diagnosis:?}");
                assert!(ended.took(&world) < ms(30_000));
            }
            let terms = world.terms(Require::Acknowledged, 30);
            let ended = world.carry_out(request(mib(1536)), terms);
            assert_eq!(ended.verdict(), Verdict::Verified);
        }
    }
}

#[test]
fn failure_to_switch_statistics_on_does_not_end_the_operation() {
    let world = World::new(1, GuestBehavior::default()).with_period(None);
    let before = world.observe();
    let (request, terms) = (request(mib(1024)), world.terms(Require::Online, 60));
    let Preflight::Ready(plan) = preflight(&request, Scope::Live, &before, &Host::default()) else {
        panic!();
    };
    for error in [
        failed("unsupported"),
        CallError::Lost("virtnode ended".to_owned()),
    ] {
        let mut world = world.clone();
        let mut history = History::new(request.clone(), terms, plan.clone(), world.observe(), true);
        let Step::Call(action) = judge(&history, world.now) else {
            panic!();
        };
        history.called(world.now, action);
        history.returned(world.now.after(ms(20)), Return::Failed(error));
        world.now = world.now.after(ms(50));
        let outcome = world.run(&mut history);
        assert_eq!(outcome.verdict, Verdict::Unverifiable, "{outcome:?}");
        assert_eq!(world.domain.memory.plugged(), mib(1024));
    }
}

#[test]
fn balloon_that_takes_what_was_plugged_yields_one_verdict() {
    // The guest brings its memory online, and the balloon takes it before the next report.
    let inflates = WorldChange::Inflates(mib(512));
    let mut world = World::new(1, GuestBehavior::default()).at(ms(900), inflates);
    let ended = world.memory(mib(1024));
    let again = ask_again(&mut world, &ended, mib(1024));
    let alone = world.memory(mib(1024));
    for outcome in [ended.outcome(), &again, alone.outcome()] {
        assert_eq!(outcome.verdict, Verdict::GuestOffline, "{outcome:?}");
        let diagnosis = outcome.diagnosis.as_ref().unwrap();
        assert_eq!(diagnosis.code, "balloon");
        // libvirt adds the virtio-mem devices itself
        assert!(
            diagnosis.remedy.contains("virsh setmem vm 524288 --live"),
            "{diagnosis:?}"
        );
    }
}

#[test]
fn balloon_whose_size_arrives_after_the_total_yields_the_same_verdict() {
    for late in [0, 100, 300, 600, 900] {
        let mut world = World::new(1, GuestBehavior::default());
        assert_eq!(world.memory(mib(1024)).verdict(), Verdict::Verified);
        // A busy guest takes seconds.
        let mut world = (0..5).fold(world, |world, part| {
            world.at(ms(late + 700 * part), WorldChange::Inflates(mib(64)))
        });
        let held = |world: &World| world.observe().stats.unwrap().balloon.current < Some(mib(1024));
        while !held(&world) {
            world.pass(world.now.after(ms(10)));
        }
        let ended = world.memory(mib(1024));
        let outcome = ended.outcome();
        assert_eq!(outcome.verdict, Verdict::PartiallyApplied, "{outcome:?}");
        assert_eq!(ended.diagnosis(), "balloon");
    }
}

#[test]
fn shrink_below_what_the_guest_uses_is_infeasible_unless_forced() {
    for period in [None, Some(1)] {
        let mut world = World::new(1, GuestBehavior::default()).with_period(period);
        world.used = Some(mib(100));
        assert_eq!(world.memory(mib(2048)).verdict(), Verdict::Verified);
        if period.is_none() {
            world.domain.balloon.stats_period = None;
            world.now = world.now.after(ms(60_000));
        }
        world.used = Some(mib(1000));
        let calls = world.made.len();
        let ended = world.memory(mib(1024));
        assert_eq!(ended.verdict(), Verdict::Infeasible);
        let text = match &ended {
            Ended::Rejected(rejection) => rejection.to_string(),
            Ended::Judged(judged) => judged.0.message.clone(),
        };
        let figures = "916MiB of its total left, and it uses 1000MiB of 1940MiB (reported 0 s";
        assert!(text.contains(figures), "{text}");
        assert!(text.contains("ask for 1108MiB or more; --force"), "{text}");
        let harmless = |action: &Action| !action.changes_guest();
        assert!(world.made[calls..].iter().all(harmless));

        assert_eq!(world.memory(mib(1108)).verdict(), Verdict::Verified);
        let terms = world.terms(Require::Online, 60);
        let (size, force) = (mib(1024), true);
        let ended = world.carry_out(HotplugRequest::Memory { size, force }, terms);
        assert_eq!(ended.verdict(), Verdict::Verified, "{:?}", ended.outcome());
    }
}

#[test]
fn silent_guest_is_noticed_after_a_shrink() {
    let behavior = GuestBehavior {
        pinned: mib(512),
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
    world.used = Some(mib(100));
    world.memory(mib(1024));
    let mut world = world.at(ms(300), WorldChange::Hangs);
    let ended = world.memory(mib(512));
    let expected = (Verdict::GuestSilent, "guest-not-reporting");
    assert_eq!((ended.verdict(), ended.diagnosis()), expected);
    let seen = &ended.outcome().diagnosis.as_ref().unwrap().seen;
    assert!(seen.contains("it had used 100MiB of 916MiB"), "{seen}");
}

#[test]
fn reset_after_a_shrink_is_told_even_if_verified() {
    let mut world = World::new(1, GuestBehavior::default());
    world.used = Some(mib(100));
    world.memory(mib(1024));
    let mut world = world.at(ms(200), WorldChange::Reset);
    let ended = world.memory(mib(512));
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert_eq!(ended.diagnosis(), "guest-reset");
}

#[test]
fn memory_too_large_to_describe_is_told_before_and_after() {
    for dimms in [false, true] {
        let behavior = GuestBehavior {
            unresponsive: true,
            ..offline()
        };
        let mut world = World::new(1, GuestBehavior::default());
        if dimms {
            world = world.with_dimms();
        }
        world.used = Some(mib(384));
        world.behavior = behavior;
        let ended = world.memory(mib(512 + 2048));
        assert_eq!(ended.diagnosis(), "too-large-to-describe");
        let outcome = ended.outcome();
        let diagnosis = outcome.diagnosis.as_ref().unwrap();
        assert!(
            diagnosis.seen.contains("needs 32MiB, and 20MiB of 404MiB"),
            "{diagnosis:?}"
        );
        assert!(
            diagnosis.remedy.contains("640MiB more at a time"),
            "{diagnosis:?}"
        );
        let warned = outcome
            .evidence
            .iter()
            .find(|piece| piece.detail.starts_with("warning"));
        assert!(warned.is_some(), "{outcome:?}");
    }
}

#[test]
fn evidence_of_several_devices_is_told_when_it_changes() {
    let mut world = World::new(1, GuestBehavior::default());
    for number in 1..8 {
        let mut device = world.domain.memory.devices[0].clone();
        device.alias = Some(format!("ua-mem{number}"));
        world.domain.memory.devices.push(device);
    }
    world.domain.memory.maximum = Some(mib(32 << 10));
    world.behavior.takes_at_most = mib(256);
    let ended = world.memory(mib(512 + 6 * 2048));
    assert_eq!(ended.verdict(), Verdict::PartiallyApplied);
    let evidence = &ended.outcome().evidence;
    let mut details: Vec<_> = evidence
        .iter()
        .map(|piece| (&piece.detail, piece.source))
        .collect();
    let all = details.len();
    details.sort_unstable();
    details.dedup();
    assert_eq!(details.len(), all, "{evidence:?}");
    let size = serde_json::to_vec(ended.outcome()).unwrap().len();
    assert!(size <= 16 << 10, "{size} bytes");
}

#[test]
fn change_by_another_client_is_told_at_once() {
    for (at, behavior) in [(300, GuestBehavior::default()), (3000, offline())] {
        let other = WorldChange::Resizes(mib(128));
        let mut world = World::new(1, behavior).at(ms(at), other);
        let ended = world.memory(mib(1024));
        let expected = (Verdict::HypervisorError, "changed-by-another-client");
        assert_eq!((ended.verdict(), ended.diagnosis()), expected);
        assert!(ended.outcome().message.contains("640MiB"));
        assert!(ended.took(&world) < ms(at + 1000));
    }
}
