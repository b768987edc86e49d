//! Truth table of vCPUs that are plugged, on the simulated guest.

use std::time::Duration;

use super::simulation::{Change, Ended, Habits, World, ids, ms, onlines, sources, without_agent};
use super::*;

#[test]
fn a_guest_that_onlines_by_itself_is_verified_by_its_agent() {
    let mut world = World::new(1, onlines());
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.really_uses(3));
    assert!(ended.took(&world) < ms(1000));
    let outcome = ended.outcome();
    assert_eq!(
        outcome.message,
        "2 vCPUs added, all 3 online in the guest after 0.2 s"
    );
    assert_eq!(
        outcome.before,
        Amount::Vcpus {
            vcpus: 1,
            online: Some(1)
        }
    );
    assert_eq!(
        outcome.after,
        Amount::Vcpus {
            vcpus: 3,
            online: Some(3)
        }
    );
    assert_eq!(
        outcome.requested,
        Amount::Vcpus {
            vcpus: 3,
            online: None
        }
    );
    let seen = sources(&ended);
    for source in [
        Source::AcpiOst,
        Source::GuestAgent,
        Source::LiveXml,
        Source::HypervisorCall,
    ] {
        assert!(seen.contains(&source), "{source}: {:?}", outcome.evidence);
    }
}

#[test]
fn without_an_agent_the_time_that_vcpus_ran_is_the_proof() {
    let mut world = World::new(1, without_agent(onlines()));
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(sources(&ended).contains(&Source::VcpuTime));
    assert!(!sources(&ended).contains(&Source::GuestAgent));
}

#[test]
fn a_guest_that_leaves_them_offline_is_told_so_or_told_to() {
    let mut world = World::new(1, Habits::default());
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestOffline, "cpus-offline")
    );
    assert!(
        ended
            .outcome()
            .diagnosis
            .as_ref()
            .unwrap()
            .remedy
            .contains("udev")
    );
    assert_eq!(world.made.len(), 1);

    let mut world = World::new(1, Habits::default());
    let terms = world.terms(Require::Online, 30);
    let ended = world.carry_out(
        HotplugRequest::Vcpus {
            count: 3,
            online: true,
        },
        terms,
    );
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.really_uses(3));
    assert_eq!(world.made[1], Action::OnlineVcpus { ids: ids("1-2") });
}

#[test]
fn cpus_that_cannot_be_brought_online_are_found_out() {
    let habits = Habits {
        stuck: true,
        ..Habits::default()
    };
    let mut world = World::new(1, habits);
    let terms = world.terms(Require::Online, 30);
    let ended = world.carry_out(
        HotplugRequest::Vcpus {
            count: 3,
            online: true,
        },
        terms,
    );
    assert_eq!(ended.verdict(), Verdict::GuestOffline);
    assert_eq!(ended.diagnosis(), "cpus-cannot-be-onlined");
    assert!(
        ended.took(&world) < ms(2000),
        "an agent that cannot will not later"
    );
    assert_eq!(world.made.len(), 2);
}

#[test]
fn offline_without_an_agent_is_never_verified() {
    let mut world = World::new(1, without_agent(Habits::default()));
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestOffline, "cpus-never-ran")
    );
}

#[test]
fn a_guest_without_room_is_found_out_by_its_agent_only() {
    let habits = Habits {
        nr_cpus: 1,
        ..onlines()
    };
    let mut world = World::new(1, habits.clone());
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestRefused, "nr-cpus")
    );
    let diagnosis = ended.outcome().diagnosis.as_ref().unwrap();
    assert!(diagnosis.remedy.contains("nr_cpus") && diagnosis.remedy.contains("NR_CPUS"));
    assert!(ended.took(&world) < ms(2000));

    let mut world = World::new(1, without_agent(habits));
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::GuestOffline);
    assert!(
        ended
            .outcome()
            .diagnosis
            .as_ref()
            .unwrap()
            .seen
            .contains("nr_cpus")
    );
}

#[test]
fn a_guest_with_room_for_some_took_some() {
    let habits = Habits {
        nr_cpus: 2,
        ..onlines()
    };
    let mut world = World::new(1, habits);
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::PartiallyApplied, "nr-cpus")
    );
    assert!(
        ended.outcome().message.starts_with("1 vCPU more in use"),
        "{ended:?}"
    );
}

#[test]
fn the_acknowledged_level_believes_acpi_until_the_agent_contradicts() {
    for (habits, verdict) in [
        (Habits::default(), Verdict::Verified),
        (without_agent(Habits::default()), Verdict::Verified),
        (
            Habits {
                nr_cpus: 1,
                ..Habits::default()
            },
            Verdict::GuestRefused,
        ),
        (
            Habits {
                deaf: true,
                ..Habits::default()
            },
            Verdict::GuestSilent,
        ),
    ] {
        let mut world = World::new(1, habits);
        let terms = world.terms(Require::Acknowledged, 30);
        let request = HotplugRequest::Vcpus {
            count: 3,
            online: false,
        };
        let ended = world.carry_out(request.clone(), terms);
        assert_eq!(ended.verdict(), verdict, "{:?}", world.habits);
        // The lowest level needs only the hypervisor.
        let mut world = World::new(1, world.habits);
        let terms = world.terms(Require::Accepted, 30);
        assert_eq!(world.carry_out(request, terms).verdict(), Verdict::Verified);
    }
}

#[test]
fn a_guest_that_refuses_or_is_deaf() {
    let refuses = Habits {
        refuses: Some(0x82),
        ..Habits::default()
    };
    let mut world = World::new(1, refuses);
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestRefused, "plug-refused")
    );
    assert!(ended.took(&world) < ms(1000));

    for agent in [true, false] {
        let habits = Habits {
            deaf: true,
            agent,
            ..Habits::default()
        };
        let mut world = World::new(1, habits);
        let ended = world.vcpus(2);
        assert_eq!(
            (ended.verdict(), ended.diagnosis()),
            (Verdict::GuestSilent, "no-sign")
        );
        assert!(ended.took(&world) >= ms(30_000));
    }

    // Some QEMU versions are the cause, but only with software emulation.
    for (virt_type, emulated) in [("qemu", true), ("kvm", false)] {
        let deaf = Habits {
            deaf: true,
            ..Habits::default()
        };
        let mut world = World::new(1, deaf);
        world.domain.virt_type = virt_type.to_owned();
        let remedy = world.vcpus(2).outcome().diagnosis.clone().unwrap().remedy;
        assert_eq!(remedy.contains("QEMU 5.1 to 7.1"), emulated, "{remedy}");
    }
}

#[test]
fn without_any_source_it_is_unverifiable() {
    let mut world = World::new(1, without_agent(onlines()));
    world.monitor_events = false;
    world.counts_time = false;
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::Unverifiable, "no-source")
    );
    // The same with answers through ACPI, after the grace period.
    let mut world = World::new(1, without_agent(onlines()));
    world.counts_time = false;
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Unverifiable);
    assert!(ended.took(&world) < ms(12_000));
}

#[test]
fn a_target_that_is_met_is_proven_without_a_call() {
    let mut world = World::new(3, Habits::default());
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.made.is_empty());
    assert_eq!(ended.took(&world), Duration::ZERO);

    let mut world = World::new(3, without_agent(Habits::default()));
    assert_eq!(world.vcpus(3).verdict(), Verdict::Verified);
    assert!(world.made.is_empty());

    let mut world = World::new(3, Habits::default());
    world.online.remove(&2);
    assert_eq!(world.vcpus(3).verdict(), Verdict::GuestOffline);
    let mut world = World::new(3, without_agent(Habits::default()));
    world.online.remove(&2);
    let ended = world.vcpus(3);
    assert_eq!(
        ended.verdict(),
        Verdict::GuestSilent,
        "{:?}",
        ended.outcome()
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_limit() {
    let infeasible = |vcpus, count, change: &dyn Fn(&mut World)| {
        let mut world = World::new(vcpus, Habits::default());
        change(&mut world);
        match world.vcpus(count) {
            Ended::Rejected(Rejection::Infeasible(limit)) => {
                assert!(world.made.is_empty());
                (limit.code(), limit.to_string())
            }
            other => panic!("{other:?}"),
        }
    };
    let (code, text) = infeasible(1, 5, &|_| {});
    assert_eq!(code, "above-maximum-vcpus");
    assert!(text.contains("maximum of 4"), "{text}");
    assert_eq!(infeasible(1, 0, &|_| {}).0, "no-vcpus");
    assert_eq!(infeasible(1, u32::MAX, &|_| {}).0, "above-maximum-vcpus");
    let (code, text) = infeasible(1, 3, &|world| {
        world.domain.machine = Some("pseries-9.2".to_owned());
        world.domain.cpu.topology = Some(crate::domain::VcpuTopology {
            sockets: 1,
            dies: 1,
            clusters: 1,
            cores: 2,
            threads: 2,
        });
    });
    assert_eq!(code, "vcpu-granularity");
    assert!(text.contains("ask for 2 or 4"), "{text}");
    for (machine, arch) in [
        ("microvm", "x86_64"),
        ("virt-9.2", "aarch64"),
        ("virt", "riscv64"),
    ] {
        let (code, text) = infeasible(1, 2, &|world| {
            world.domain.machine = Some(machine.to_owned());
            world.domain.arch = Some(arch.to_owned());
        });
        assert_eq!(code, "machine-without-vcpu-hotplug");
        // Only x86 has that machine type.
        assert_eq!(text.contains("use q35"), arch == "x86_64", "{text}");
    }
    let s390 = |world: &mut World| {
        world.domain.machine = Some("s390-ccw-virtio-9.2".to_owned());
        world.domain.arch = Some("s390x".to_owned());
    };
    assert_eq!(infeasible(2, 1, &s390).0, "machine-without-vcpu-unplug");
    assert_eq!(
        infeasible(1, 2, &|world| world.domain.acpi = false).0,
        "no-acpi"
    );
    let (code, text) = infeasible(2, 1, &|world| {
        world.domain.vcpus.each[1].hotpluggable = false
    });
    assert_eq!(code, "fixed-vcpus");
    assert!(text.contains("fewer than the 2"), "{text}");
    let too_few = |world: &mut World| {
        world.domain.vcpus.each[2].hotpluggable = false;
        world.domain.vcpus.each[3].hotpluggable = false;
    };
    assert_eq!(infeasible(1, 3, &too_few).0, "too-few-hotpluggable-vcpus");
}

#[test]
fn a_guest_that_follows_late_puts_the_record_right() {
    let mut world = World::new(1, Habits::default())
        .at(ms(40_000), Change::Onlines(1))
        .at(ms(40_000), Change::Onlines(2));
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::GuestOffline);
    assert!(ended.verdict().may_change());
    let mut history = ended.into_history();
    let outcome = world.look_again(&mut history, ms(35_000));
    assert_eq!(outcome.verdict, Verdict::Verified);
    assert!(outcome.diagnosis.is_none());
}

#[test]
fn an_agent_that_dies_leaves_the_other_sources() {
    let habits = Habits {
        onlines_after: Some(ms(900)),
        ..Habits::default()
    };
    let mut world = World::new(1, habits).at(ms(500), Change::AgentDies);
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(sources(&ended).contains(&Source::VcpuTime));
}

#[test]
fn a_moment_in_the_firmware_is_no_proof() {
    // A firmware with Secure Boot starts each new CPU once.
    let world = World::new(1, without_agent(Habits::default()));
    let terms = world.terms(Require::Online, 3);
    let request = HotplugRequest::Vcpus {
        count: 2,
        online: false,
    };
    let before = world.observe();
    let Preflight::Ready(plan) = preflight(&request, &before, &Host::default()) else {
        panic!();
    };
    let mut history = History::new(request, terms, plan.clone(), before, true);
    history.called(world.now, plan.actions[0].clone());
    history.returned(world.now.after(ms(20)), Return::Done);
    for look in 1..20_u64 {
        let mut seen = world.observe();
        seen.at = world.now.after(ms(200 * look));
        seen.domain.vcpus.each[1].enabled = true;
        let stats = seen.stats.as_mut().unwrap();
        let time = |millis: u64| crate::domain::VcpuStats {
            time: Some(millis * 1_000_000),
            exits: None,
        };
        stats.vcpus.insert(0, time(3000 + 10 * look));
        stats.vcpus.insert(1, time(10));
        history.observed(seen);
    }
    let Step::Done(outcome) = judge(&history, world.now.after(ms(4000))) else {
        panic!();
    };
    assert_ne!(outcome.verdict, Verdict::Verified);
}

#[test]
fn the_lasting_definition_is_changed_where_there_is_one() {
    let mut world = World::new(1, onlines());
    world.persistent = true;
    world.vcpus(2);
    assert_eq!(
        world.made,
        [Action::SetVcpus {
            count: 2,
            persist: true
        }]
    );
}

/// The guest brings its CPUs online while the domain cannot be observed: earlier observations do
/// not count.
#[test]
fn what_was_seen_before_a_guests_time_was_up_says_nothing_against_it() {
    for agent in [true, false] {
        let habits = Habits {
            onlines_after: Some(ms(6_000)),
            agent,
            ..Habits::default()
        };
        let blind = World::new(1, habits).at(ms(2_000), Change::LosesLibvirt);
        let mut world = blind.at(ms(20_000), Change::FindsLibvirt);
        let ended = world.vcpus(3);
        assert_eq!(ended.verdict(), Verdict::Verified, "{:?}", ended.outcome());
    }
}
