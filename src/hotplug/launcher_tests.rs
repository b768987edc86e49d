//! Requests about a domain in a KubeVirt launcher.

use super::simulation::{GuestBehavior, World, mib};
use super::*;
use crate::domain::{Job, VcpuTopology};

const CLAIMED: Option<(&str, &str)> = Some(("tenant-a", "web"));

fn vcpus(count: u32, online: bool) -> HotplugRequest {
    HotplugRequest::Vcpus { count, online }
}

fn memory() -> HotplugRequest {
    HotplugRequest::Memory {
        size: mib(2048),
        force: false,
    }
}

fn seen() -> Observation {
    World::new(1, GuestBehavior::default()).observe()
}

fn message(request: &HotplugRequest, right: &LauncherRight) -> String {
    let rejection = check_launcher(request, false, right, CLAIMED, &seen()).unwrap();
    assert_eq!(rejection.verdict(), Verdict::Infeasible);
    rejection.to_string()
}

#[test]
fn granted_right_allows_vcpus_of_the_running_domain_and_nothing_else() {
    let granted = LauncherRight::Granted;
    let check = |request, persistent| {
        check_launcher(&request, persistent, &granted, CLAIMED, &seen()).map(|it| it.to_string())
    };
    assert_eq!(check(vcpus(4, false), false), None);
    let persistent = check(vcpus(4, false), true).unwrap();
    assert!(
        persistent.contains("only the running domain"),
        "{persistent}"
    );
    let online = check(vcpus(4, true), false).unwrap();
    assert!(online.contains("guest agent"), "{online}");
    let memory = check(memory(), false).unwrap();
    assert!(memory.contains("memory limit of its pod"), "{memory}");
    let command = r#"kubectl -n tenant-a patch vm web --type merge -p '{"spec":{"template":{"spec":{"domain":{"memory":{"guest":"2Gi"}}}}}}'"#;
    assert!(memory.ends_with(command), "{memory}");
}

#[test]
fn rejection_names_the_command_that_asks_kubevirt_for_the_same() {
    let off = message(&vcpus(4, false), &LauncherRight::Off);
    assert!(off.contains("launchers.hotplug is false"), "{off}");
    let command = r#"kubectl -n tenant-a patch vm web --type merge -p '{"spec":{"template":{"spec":{"domain":{"cpu":{"sockets":4}}}}}}'"#;
    assert!(off.ends_with(command), "{off}");
    let unverified = LauncherRight::Unverified("no such Pod".to_owned());
    let unverified = message(&vcpus(4, false), &unverified);
    assert!(
        unverified.contains("cannot be verified: no such Pod"),
        "{unverified}"
    );

    // KubeVirt plugs sockets.
    let mut cores = seen();
    cores.domain.cpu.topology = Some(VcpuTopology {
        cores: 2,
        ..VcpuTopology::default()
    });
    let ask = |count| {
        let request = vcpus(count, false);
        let rejection = check_launcher(&request, false, &LauncherRight::Off, CLAIMED, &cores);
        rejection.unwrap().to_string()
    };
    assert!(ask(4).contains(r#""sockets":2"#));
    assert!(!ask(3).contains("kubectl"));
}

#[test]
fn name_with_other_characters_is_in_no_command() {
    for claimed in [
        Some(("a", "web'; rm -rf ~")),
        Some(("-n", "web")),
        Some(("A", "b")),
        None,
    ] {
        let request = vcpus(4, false);
        let rejection = check_launcher(&request, false, &LauncherRight::Off, claimed, &seen());
        let text = rejection.unwrap().to_string();
        assert!(
            text.contains("ask KubeVirt: change") && !text.contains("rm"),
            "{text}"
        );
    }
}

#[test]
fn migration_ends_the_request_at_once() {
    for job in [Job::MigrationIn, Job::MigrationOut] {
        let mut migrating = seen();
        migrating.job = Some(job);
        let request = vcpus(4, false);
        let rejection = check_launcher(
            &request,
            false,
            &LauncherRight::Granted,
            CLAIMED,
            &migrating,
        );
        assert_eq!(rejection.unwrap().verdict(), Verdict::Busy);
    }
}
