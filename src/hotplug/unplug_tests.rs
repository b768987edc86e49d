//! Truth table of vCPUs that are unplugged, on the simulated guest.

use super::simulation::{Habits, World, ms, onlines, sources};
use super::*;

#[test]
fn an_unplug_is_verified_although_libvirt_says_it_timed_out() {
    let mut world = World::new(3, onlines());
    let ended = world.vcpus(2);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.really_uses(2));
    assert_eq!(
        world.made.len(),
        2,
        "libvirt is told again: {:?}",
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
    assert!(world.really_uses(1));
    assert_eq!(world.made.len(), 3);

    // A libvirt that notices by itself gets one call.
    let mut world = World::new(3, onlines());
    world.forgetful = false;
    assert_eq!(world.vcpus(1).verdict(), Verdict::Verified);
    assert_eq!(world.made.len(), 1);
}

/// libvirt 9.0 behaves so with QEMU's software emulation.
#[test]
fn a_libvirt_that_cannot_be_told_is_to_be_started_anew() {
    let unteachable = |agent| {
        let mut world = World::new(3, Habits { agent, ..onlines() });
        world.unteachable = true;
        world
    };
    let mut world = unteachable(true);
    let ended = world.vcpus(2);
    let outcome = ended.outcome();
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::Pending, "libvirt-miscounts")
    );
    assert_eq!(
        outcome.message,
        "the guest let 1 vCPU go, and libvirt still counts 3"
    );
    assert!(ended.took(&world) < ms(6000));
    assert_eq!((world.has.len(), world.online.len()), (2, 2));
    assert_eq!(world.made.len(), 2);
    // The restarted daemon counts what QEMU has.
    let mut history = ended.into_history();
    world.look_again(&mut history, ms(1000));
    assert_eq!(settle(&history), None, "it does not listen");
    world.domain.vcpus.each[2].enabled = false;
    let outcome = world.look_again(&mut history, ms(1000));
    assert_eq!(outcome.verdict, Verdict::Verified);

    // libvirt does not get beyond the first of two.
    let ended = unteachable(true).vcpus(1);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::PartiallyApplied, "libvirt-miscounts")
    );

    // A repeated request has the same result, and a request for what libvirt counts is not
    // verified.
    let mut world = unteachable(true);
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
        let mut world = unteachable(agent);
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
fn an_unplug_is_found_out_without_events_too() {
    for agent in [true, false] {
        let mut world = World::new(3, Habits { agent, ..onlines() });
        world.monitor_events = false;
        assert_eq!(world.vcpus(2).verdict(), Verdict::Verified, "agent {agent}");
        assert_eq!(world.made.len(), 2);
    }
}

#[test]
fn an_acknowledged_unplug_does_not_wait_for_libvirt() {
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
fn a_guest_that_keeps_a_cpu_is_found_out_before_libvirt_gives_up() {
    let habits = Habits {
        keeps: Some(2),
        ..onlines()
    };
    let mut world = World::new(3, habits);
    let ended = world.vcpus(2);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestRefused, "cpu-in-use")
    );
    assert!(ended.took(&world) <= ms(1000));
    assert_eq!(world.made.len(), 1);

    // A later success corrects the record.
    let mut history = ended.into_history();
    world.habits.keeps = None;
    world.forgetful = false;
    world.look_again(&mut history, ms(6000));
    world.vcpus(2);
    let outcome = world.look_again(&mut history, ms(200));
    assert_eq!(outcome.verdict, Verdict::Verified);
}

#[test]
fn one_of_two_kept_is_a_part() {
    let habits = Habits {
        keeps: Some(1),
        ..onlines()
    };
    let mut world = World::new(3, habits);
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
fn an_unplug_that_nobody_answers_stands() {
    let habits = Habits {
        deaf: true,
        ..Habits::default()
    };
    let mut world = World::new(3, habits);
    let ended = world.vcpus(2);
    assert_eq!(ended.verdict(), Verdict::Pending);
    assert!(world.made.len() <= 2);
}

/// vCPUs that are released after the deadline need another call to libvirt.
#[test]
fn a_vcpu_that_goes_after_the_verdict_is_brought_to_libvirts_notice() {
    let habits = Habits {
        deaf: true,
        ..onlines()
    };
    let mut world = World::new(3, habits);
    let ended = world.vcpus(2);
    assert_eq!(ended.verdict(), Verdict::Pending);
    let mut history = ended.into_history();
    world.look_again(&mut history, ms(1000));
    assert_eq!(settle(&history), None, "nothing went");

    // The guest reacts late; another client repeats the call, which times out.
    world.habits.deaf = false;
    let made = world.made.len();
    world.call_again(made - 1);
    world.look_again(&mut history, ms(1000));
    let action = settle(&history).unwrap();
    let mut meanwhile = history.clone();
    history.called(world.now, action);
    assert_eq!(settle(&history), None, "it is being told");
    world.call_again(made - 1);
    let outcome = world.look_again(&mut history, ms(6000));
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
