//! Truth table of vCPUs that are unplugged, on the simulated guest.

use super::simulation::{GuestBehavior, World, ms, onlines, sources};
use super::*;

#[test]
fn timed_out_unplug_that_guest_did_is_verified() {
    let mut world = World::new(3, onlines());
    let ended = world.vcpus(2);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.guest_uses(2));
    assert_eq!(
        world.made.len(),
        2,
        "the call to libvirt is repeated: {:?}",
        world.made
    );
    assert!(
        ended
            .outcome()
            .hypervisor_error
            .as_ref()
            .unwrap()
            .contains("timed out")
    );
    assert!(sources(&ended).contains(&Source::DeviceEvent));

    // libvirt unplugs one after the other.
    let mut world = World::new(3, onlines());
    assert_eq!(world.vcpus(1).verdict(), Verdict::Verified);
    assert!(world.guest_uses(1));
    assert_eq!(world.made.len(), 3);

    // A libvirt that notices by itself gets one call.
    let mut world = World::new(3, onlines());
    world.misses_removals = false;
    assert_eq!(world.vcpus(1).verdict(), Verdict::Verified);
    assert_eq!(world.made.len(), 1);
}

/// libvirt 9.0 behaves so with QEMU's software emulation.
#[test]
fn libvirt_that_rejects_repeats_yields_restart_remedy() {
    let rejects_repeats = |agent| {
        let mut world = World::new(3, GuestBehavior { agent, ..onlines() });
        world.rejects_repeats = true;
        world
    };
    let mut world = rejects_repeats(true);
    let ended = world.vcpus(2);
    let outcome = ended.outcome();
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::Pending, "libvirt-miscounts")
    );
    assert_eq!(
        outcome.message,
        "the guest released 1 vCPU, and libvirt still counts 3"
    );
    assert!(ended.took(&world) < ms(6000));
    assert_eq!((world.has.len(), world.online.len()), (2, 2));
    assert_eq!(world.made.len(), 2);
    // The restarted daemon counts what QEMU has.
    let mut history = ended.into_history();
    world.judge_later(&mut history, ms(1000));
    assert_eq!(settle(&history), None, "it does not listen");
    world.domain.vcpus.each[2].enabled = false;
    let outcome = world.judge_later(&mut history, ms(1000));
    assert_eq!(outcome.verdict, Verdict::Verified);

    // libvirt does not get beyond the first of two.
    let ended = rejects_repeats(true).vcpus(1);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::PartiallyApplied, "libvirt-miscounts")
    );

    // A repeated request has the same result, and a request for what libvirt counts is not
    // verified.
    let mut world = rejects_repeats(true);
    world.vcpus(2);
    let ended = world.vcpus(2);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::HypervisorError, "libvirt-miscounts")
    );
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestSilent, "fewer-than-counted")
    );
    assert_eq!(
        ended.outcome().message,
        "libvirt counts 3 vCPUs and the guest has 2"
    );

    // The agent alone is evidence; without any, libvirt's error is the verdict.
    for (agent, verdict) in [(true, Verdict::Pending), (false, Verdict::HypervisorError)] {
        let mut world = rejects_repeats(agent);
        world.monitor_events = false;
        let ended = world.vcpus(2);
        assert_eq!(
            (ended.verdict(), ended.diagnosis()),
            (verdict, "libvirt-miscounts"),
            "agent {agent}"
        );
    }
}

#[test]
fn unplug_without_events_is_verified() {
    for agent in [true, false] {
        let mut world = World::new(3, GuestBehavior { agent, ..onlines() });
        world.monitor_events = false;
        assert_eq!(world.vcpus(2).verdict(), Verdict::Verified, "agent {agent}");
        assert_eq!(world.made.len(), 2);
    }
}

#[test]
fn acknowledged_unplug_does_not_wait_for_libvirt() {
    let mut world = World::new(3, onlines());
    let terms = world.terms(Require::Acknowledged, 30);
    let ended = world.carry_out(
        HotplugRequest::Vcpus {
            count: 2,
            online: false,
        },
        terms,
    );
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(ended.took(&world) < ms(1000));
}

#[test]
fn kept_cpu_yields_guest_refused_before_libvirt_times_out() {
    let behavior = GuestBehavior {
        keeps: Some(2),
        ..onlines()
    };
    let mut world = World::new(3, behavior);
    let ended = world.vcpus(2);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestRefused, "cpu-in-use")
    );
    assert!(ended.took(&world) <= ms(1000));
    assert_eq!(world.made.len(), 1);

    // A later success corrects the record.
    let mut history = ended.into_history();
    world.behavior.keeps = None;
    world.misses_removals = false;
    world.judge_later(&mut history, ms(6000));
    world.vcpus(2);
    let outcome = world.judge_later(&mut history, ms(200));
    assert_eq!(outcome.verdict, Verdict::Verified);
}

#[test]
fn one_of_two_kept_yields_partially_applied() {
    let behavior = GuestBehavior {
        keeps: Some(1),
        ..onlines()
    };
    let mut world = World::new(3, behavior);
    let ended = world.vcpus(1);
    assert_eq!(
        ended.verdict(),
        Verdict::PartiallyApplied,
        "{:?}",
        ended.outcome()
    );
    assert_eq!(
        ended.outcome().after,
        Amount::Vcpus {
            vcpus: 2,
            online: Some(2)
        }
    );
}

#[test]
fn unanswered_unplug_yields_pending() {
    let behavior = GuestBehavior {
        unresponsive: true,
        ..GuestBehavior::default()
    };
    let mut world = World::new(3, behavior);
    let ended = world.vcpus(2);
    assert_eq!(ended.verdict(), Verdict::Pending);
    assert!(world.made.len() <= 2);
}

/// vCPUs that are released after the deadline need another call to libvirt.
#[test]
fn vcpu_released_after_verdict_needs_another_call() {
    let behavior = GuestBehavior {
        unresponsive: true,
        ..onlines()
    };
    let mut world = World::new(3, behavior);
    let ended = world.vcpus(2);
    assert_eq!(ended.verdict(), Verdict::Pending);
    let mut history = ended.into_history();
    world.judge_later(&mut history, ms(1000));
    assert_eq!(settle(&history), None, "nothing went");

    // The guest reacts late; another client repeats the call, which times out.
    world.behavior.unresponsive = false;
    let made = world.made.len();
    world.repeat_call(made - 1);
    world.judge_later(&mut history, ms(1000));
    let action = settle(&history).unwrap();
    let mut meanwhile = history.clone();
    history.called(world.now, action);
    assert_eq!(settle(&history), None, "the call is in progress");
    world.repeat_call(made - 1);
    let outcome = world.judge_later(&mut history, ms(6000));
    assert_eq!(outcome.verdict, Verdict::Verified);
    assert_eq!(settle(&history), None, "libvirt agrees");

    // Another client plugs one.
    let mut seen = world.observe();
    for vcpu in &mut seen.domain.vcpus.each {
        vcpu.enabled = true;
    }
    meanwhile.observed(seen);
    assert_eq!(settle(&meanwhile), None);
}
