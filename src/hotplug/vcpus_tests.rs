//! Truth table of vCPUs that are plugged, on the simulated guest.

use std::time::Duration;

use super::simulation::{
    Ended, GuestBehavior, World, WorldChange, ids, ms, onlines, sources, without_agent,
};
use super::*;

#[test]
fn agent_reporting_all_online_yields_verified() {
    let mut world = World::new(1, onlines());
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.guest_uses(3));
    assert!(ended.took(&world) < ms(1000));
    let outcome = ended.outcome();
    assert_eq!(
        outcome.message,
        "2 vCPUs added, all 3 online in the guest after 0.4 s"
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
fn run_times_without_agent_yield_verified() {
    let mut world = World::new(1, without_agent(onlines()));
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(sources(&ended).contains(&Source::VcpuTime));
    assert!(!sources(&ended).contains(&Source::GuestAgent));
}

#[test]
fn offline_vcpus_without_online_flag_yield_guest_offline() {
    let mut world = World::new(1, GuestBehavior::default());
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

    let mut world = World::new(1, GuestBehavior::default());
    let terms = world.terms(Require::Online, 30);
    let ended = world.carry_out(
        HotplugRequest::Vcpus {
            count: 3,
            online: true,
        },
        terms,
    );
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.guest_uses(3));
    assert_eq!(world.made[1], Action::OnlineVcpus { ids: ids("1-2") });
}

#[test]
fn failed_online_request_yields_guest_offline() {
    let behavior = GuestBehavior {
        stuck: true,
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
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
fn offline_vcpus_without_agent_yield_guest_offline() {
    let mut world = World::new(1, without_agent(GuestBehavior::default()));
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestOffline, "cpus-never-ran")
    );
}

#[test]
fn dropped_vcpus_yield_guest_refused_only_with_agent() {
    let behavior = GuestBehavior {
        nr_cpus: 1,
        ..onlines()
    };
    let mut world = World::new(1, behavior.clone());
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestRefused, "nr-cpus")
    );
    let diagnosis = ended.outcome().diagnosis.as_ref().unwrap();
    assert!(diagnosis.remedy.contains("nr_cpus") && diagnosis.remedy.contains("NR_CPUS"));
    assert!(ended.took(&world) < ms(2000));

    let mut world = World::new(1, without_agent(behavior));
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
fn room_for_some_vcpus_yields_partially_applied() {
    let behavior = GuestBehavior {
        nr_cpus: 2,
        ..onlines()
    };
    let mut world = World::new(1, behavior);
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
fn acpi_confirmation_suffices_for_acknowledged_unless_agent_contradicts() {
    for (behavior, verdict) in [
        (GuestBehavior::default(), Verdict::Verified),
        (without_agent(GuestBehavior::default()), Verdict::Verified),
        (
            GuestBehavior {
                nr_cpus: 1,
                ..GuestBehavior::default()
            },
            Verdict::GuestRefused,
        ),
        (
            GuestBehavior {
                unresponsive: true,
                ..GuestBehavior::default()
            },
            Verdict::GuestSilent,
        ),
    ] {
        let mut world = World::new(1, behavior);
        let terms = world.terms(Require::Acknowledged, 30);
        let request = HotplugRequest::Vcpus {
            count: 3,
            online: false,
        };
        let ended = world.carry_out(request.clone(), terms);
        assert_eq!(ended.verdict(), verdict, "{:?}", world.behavior);
        // The lowest level needs only the hypervisor.
        let mut world = World::new(1, world.behavior);
        let terms = world.terms(Require::Accepted, 30);
        assert_eq!(world.carry_out(request, terms).verdict(), Verdict::Verified);
    }
}

#[test]
fn refusing_or_unresponsive_guest_yields_refused_or_silent() {
    let refuses = GuestBehavior {
        refuses: Some(0x82),
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, refuses);
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestRefused, "plug-refused")
    );
    assert!(ended.took(&world) < ms(1000));

    for agent in [true, false] {
        let behavior = GuestBehavior {
            unresponsive: true,
            agent,
            ..GuestBehavior::default()
        };
        let mut world = World::new(1, behavior);
        let ended = world.vcpus(2);
        assert_eq!(
            (ended.verdict(), ended.diagnosis()),
            (Verdict::GuestSilent, "no-sign")
        );
        assert!(ended.took(&world) >= ms(30_000));
    }

    // Some QEMU versions are the cause, but only with software emulation.
    for (virt_type, emulated) in [("qemu", true), ("kvm", false)] {
        let unresponsive = GuestBehavior {
            unresponsive: true,
            ..GuestBehavior::default()
        };
        let mut world = World::new(1, unresponsive);
        world.domain.virt_type = virt_type.to_owned();
        let remedy = world.vcpus(2).outcome().diagnosis.clone().unwrap().remedy;
        assert_eq!(remedy.contains("QEMU 5.1 to 7.1"), emulated, "{remedy}");
    }
}

#[test]
fn no_source_of_evidence_yields_unverifiable() {
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
fn agent_that_was_not_queried_never_counts_as_silence() {
    let unqueried = Agent::NotQueried("calls for other domains have not returned".to_owned());
    // A guest that leaves its CPUs offline, one that notices nothing, and one that uses them.
    for (unresponsive, onlines_after) in [(false, None), (true, None), (false, Some(ms(100)))] {
        let behavior = GuestBehavior {
            agent_trouble: Some(unqueried.clone()),
            unresponsive,
            onlines_after,
            ..GuestBehavior::default()
        };
        let mut world = World::new(1, behavior);
        let ended = world.vcpus(3);
        let outcome = ended.outcome();
        if onlines_after.is_some() {
            // The run times prove it.
            assert_eq!(ended.verdict(), Verdict::Verified);
        } else {
            assert_eq!(
                (ended.verdict(), ended.diagnosis()),
                (Verdict::Unverifiable, "agent-not-queried")
            );
            let remedy = &outcome.diagnosis.as_ref().unwrap().remedy;
            assert!(!remedy.contains("install"), "{remedy}");
        }
        let details: Vec<_> = outcome.evidence.iter().map(|piece| &piece.detail).collect();
        let expected = "agent not queried: calls for other domains have not returned";
        assert!(details.contains(&&expected.to_owned()), "{details:?}");
    }
}

#[test]
fn agent_that_rejects_the_question_is_named_with_its_setting() {
    let behavior = GuestBehavior {
        agent_trouble: Some(Agent::Refused(
            "Command guest-get-vcpus has been disabled".to_owned(),
        )),
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
    let ended = world.vcpus(3);
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestOffline, "cpus-never-ran")
    );
    let remedy = &ended.outcome().diagnosis.as_ref().unwrap().remedy;
    assert!(
        remedy.contains("block-rpcs") && !remedy.contains("install"),
        "{remedy}"
    );
}

#[test]
fn reached_target_is_verified_without_call() {
    let mut world = World::new(3, GuestBehavior::default());
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(world.made.is_empty());
    assert_eq!(ended.took(&world), Duration::ZERO);

    let mut world = World::new(3, without_agent(GuestBehavior::default()));
    assert_eq!(world.vcpus(3).verdict(), Verdict::Verified);
    assert!(world.made.is_empty());

    let mut world = World::new(3, GuestBehavior::default());
    world.online.remove(&2);
    assert_eq!(world.vcpus(3).verdict(), Verdict::GuestOffline);
    let mut world = World::new(3, without_agent(GuestBehavior::default()));
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
fn impossible_request_is_infeasible_with_limit() {
    let infeasible = |vcpus, count, change: &dyn Fn(&mut World)| {
        let mut world = World::new(vcpus, GuestBehavior::default());
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
fn late_guest_corrects_record() {
    let mut world = World::new(1, GuestBehavior::default())
        .at(ms(40_000), WorldChange::Onlines(1))
        .at(ms(40_000), WorldChange::Onlines(2));
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::GuestOffline);
    assert!(ended.verdict().may_change());
    let mut history = ended.into_history();
    let outcome = world.judge_later(&mut history, ms(35_000));
    assert_eq!(outcome.verdict, Verdict::Verified);
    assert!(outcome.diagnosis.is_none());
}

#[test]
fn lost_agent_leaves_other_sources() {
    let behavior = GuestBehavior {
        onlines_after: Some(ms(900)),
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior).at(ms(500), WorldChange::AgentDies);
    let ended = world.vcpus(3);
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert!(sources(&ended).contains(&Source::VcpuTime));
}

#[test]
fn brief_run_in_firmware_proves_nothing() {
    // A firmware with Secure Boot starts each new CPU once.
    let world = World::new(1, without_agent(GuestBehavior::default()));
    let terms = world.terms(Require::Online, 3);
    let request = HotplugRequest::Vcpus {
        count: 2,
        online: false,
    };
    let before = world.observe();
    let Preflight::Ready(plan) = preflight(&request, Scope::Live, &before, &Host::default()) else {
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
fn definition_is_changed_only_on_request() {
    for (scope, persist, note) in [
        (Scope::Live, false, "; the definition is unchanged"),
        (
            Scope::LiveAndConfig,
            true,
            "; the definition was changed as well",
        ),
    ] {
        let mut world = World::new(1, onlines());
        (world.persistent, world.scope) = (true, scope);
        let ended = world.vcpus(2);
        assert_eq!(ended.verdict(), Verdict::Verified);
        assert!(ended.outcome().message.ends_with(note), "{ended:?}");
        assert_eq!(world.made, [Action::SetVcpus { count: 2, persist }]);
    }

    // libvirt calls nothing live, and changes the definition.
    let mut world = World::new(2, onlines());
    (world.persistent, world.scope) = (true, Scope::LiveAndConfig);
    assert_eq!(world.vcpus(2).verdict(), Verdict::Verified);
    assert_eq!(world.made.len(), 1);

    let mut world = World::new(1, onlines());
    world.scope = Scope::LiveAndConfig;
    let Ended::Rejected(rejection) = world.vcpus(2) else {
        panic!("the domain is transient");
    };
    assert_eq!(rejection, Infeasible::NoDefinition.into());
}

/// libvirt gives up an unplug before it changes the definition, and the guest releases the vCPU.
#[test]
fn unplug_that_libvirt_gave_up_is_repeated_for_the_definition() {
    let mut world = World::new(3, onlines());
    (world.persistent, world.scope) = (true, Scope::LiveAndConfig);
    world.monitor_events = false;
    let ended = world.vcpus(2);
    assert_eq!(ended.verdict(), Verdict::Verified, "{ended:?}");
    let last = ended.into_history();
    assert!(last.is_done(&world.made[0]), "{last:?}");
}

/// The guest brings its CPUs online while the domain cannot be observed: earlier observations do
/// not count.
#[test]
fn observation_within_grace_period_does_not_count_against_guest() {
    for agent in [true, false] {
        let behavior = GuestBehavior {
            onlines_after: Some(ms(6_000)),
            agent,
            ..GuestBehavior::default()
        };
        let blind = World::new(1, behavior).at(ms(2_000), WorldChange::LosesLibvirt);
        let mut world = blind.at(ms(20_000), WorldChange::FindsLibvirt);
        let ended = world.vcpus(3);
        assert_eq!(ended.verdict(), Verdict::Verified, "{:?}", ended.outcome());
    }
}

#[test]
fn pause_between_acknowledgement_and_agent_verifies_nothing() {
    // Linux confirms CPUs through ACPI for which it has no room.
    let behavior = GuestBehavior {
        nr_cpus: 3,
        ..GuestBehavior::default()
    };
    let mut world = World::new(2, behavior).at(ms(31), WorldChange::Pause);
    world.call_takes = ms(20);
    let terms = world.terms(Require::Acknowledged, 30);
    let online = false;
    let ended = world.carry_out(HotplugRequest::Vcpus { count: 4, online }, terms);
    assert_eq!(ended.verdict(), Verdict::DomainNotRunning);
}
