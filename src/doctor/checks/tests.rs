use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;

use super::observed::*;
use super::*;
use crate::capability::{Capabilities, Eim, NodeFacts, Version};
use crate::domain::{ConnectionId, Domain, DomainState, Stats};
use crate::hotplug::{Agent, GuestVcpus};
use crate::label::{InvalidLabel, RejectedLabel};
use crate::units::Bytes;

/// Returns a healthy Debian host: libvirt 11.3 with QEMU 10.0, KVM open to QEMU, a daemon.
fn healthy_host() -> Observed {
    let capabilities = include_bytes!(
        "../../../tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0/capabilities.xml"
    );
    let node = |mode, gid| DeviceNode::Node {
        number: (10, 232),
        mode,
        uid: 0,
        gid,
        open: Ok(()),
    };
    let socket = Socket {
        mode: 0o660,
        uid: 0,
        gid: 106,
        state: SocketState::Listens,
    };
    Observed {
        host: HostSurvey {
            arch: "x86_64".to_owned(),
            is_root: true,
            systemd: true,
            udev: true,
            distribution: vec!["debian".to_owned()],
            cpu: Some(CpuInfo {
                flags: ["svm".to_owned()].into(),
                vendor: Some("AuthenticAMD".to_owned()),
                platform: None,
            }),
            kvm: Kvm {
                device: node(0o660, 107),
                registered: true,
                modules: ["kvm_amd".to_owned()].into(),
                max_vcpus: Some(1024),
                nested: Some(true),
            },
            kernel_arguments: Some(vec!["ro".to_owned()]),
            iommu: IommuSurvey {
                devices: vec!["ivhd0".to_owned()],
                groups: 40,
                ..IommuSurvey::default()
            },
            sockets: BTreeMap::from([
                ("libvirt-sock".to_owned(), socket.clone()),
                ("virtlogd-sock".to_owned(), socket),
            ]),
            daemons: ["libvirtd", "virtlogd"].map(str::to_owned).into(),
            polkit: true,
            logs_to_file: Some(false),
            accounts: Accounts {
                users: BTreeMap::from([
                    ("root".to_owned(), (0, 0)),
                    ("ann".to_owned(), (1000, 1000)),
                    ("libvirt-qemu".to_owned(), (64055, 64055)),
                ]),
                groups: BTreeMap::from([
                    ("root".to_owned(), (0, [].into())),
                    ("libvirt".to_owned(), (106, [].into())),
                    ("kvm".to_owned(), (107, ["libvirt-qemu".to_owned()].into())),
                ]),
                configured: Some((None, None)),
                own_uid: 0,
            },
            ..HostSurvey::default()
        },
        libvirt: LibvirtStatus {
            uri: "qemu:///system".to_owned(),
            ..LibvirtStatus::default()
        },
        documents: ObservedDocuments {
            directory: "/documents".to_owned(),
            ..ObservedDocuments::default()
        },
        facts: Arc::new(NodeFacts {
            libvirt_version: Some(Version::new(11, 3, 0)),
            hypervisor_version: Some(Version::new(10, 0, 2)),
            capabilities: Some(Capabilities::parse("c", capabilities).unwrap()),
            ..NodeFacts::default()
        }),
        rejected: Vec::new(),
        domains: Ok(Vec::new()),
        daemon: daemon(990.0, 0),
    }
}

fn daemon(probed: f64, dropped: u32) -> Daemon {
    Daemon::Runs {
        metrics: format!(
            "# TYPE virtnode_probe_last_success_timestamp_seconds gauge\n\
             virtnode_probe_last_success_timestamp_seconds{{source=\"capabilities\"}} {probed}\n\
             virtnode_probe_last_success_timestamp_seconds{{source=\"host\"}} 999\n\
             virtnode_label_conflicts_total{{action=\"dropped\"}} {dropped}\n\
             virtnode_label_conflicts_total{{action=\"forced\"}} 7\n"
        ),
        now: 1000.0,
        interval: Duration::from_secs(60),
    }
}

fn of(observed: &Observed, check: Check) -> Finding {
    let report = diagnose(observed);
    let mut findings = report.findings.into_iter();
    let unseen = &report.unseen;
    findings
        .find(|finding| finding.check == check)
        .unwrap_or_else(|| panic!("{check}: {unseen:#?}"))
}

fn commands(finding: &Finding) -> Vec<&str> {
    let remedy = finding.remedy.iter();
    remedy
        .flat_map(|remedy| remedy.commands.iter().map(String::as_str))
        .collect()
}

#[test]
fn healthy_node_has_only_ok_findings() {
    let report = diagnose(&healthy_host());
    assert_eq!(report.worst(), Severity::Ok, "{report:#?}");
    assert!(report.unseen.is_empty(), "{report:#?}");
    let checks: Vec<Check> = report.findings.iter().map(|f| f.check).collect();
    assert_eq!(checks, Check::ALL);
}

/// As where KVM needs no vmx and svm of the CPU, or the process sees neither flags nor /dev/kvm.
#[test]
fn kvm_that_libvirt_offers_overrides_what_the_cpu_shows() {
    let mut observed = healthy_host();
    observed.host.cpu = Some(CpuInfo::default());
    observed.host.kvm = Kvm {
        device: DeviceNode::Missing,
        registered: false,
        ..Kvm::default()
    };
    for check in [
        Check::VirtualizationExtensions,
        Check::KvmModule,
        Check::KvmDevice,
    ] {
        let finding = of(&observed, check);
        assert_eq!(finding.severity, Severity::Ok, "{finding:#?}");
        assert!(
            !finding.what.contains("no virtualization extensions"),
            "{finding:#?}"
        );
    }
}

#[test]
fn kvm_that_libvirt_does_not_offer_is_a_warning() {
    let mut observed = healthy_host();
    let capabilities =
        include_str!("../../../tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0/capabilities.xml");
    let without = capabilities.replace("<domain type='kvm'/>", "");
    let capabilities = Capabilities::parse("c", without.as_bytes()).unwrap();
    Arc::make_mut(&mut observed.facts).capabilities = Some(capabilities);
    let finding = of(&observed, Check::KvmDevice);
    assert_eq!(finding.severity, Severity::Warning, "{finding:#?}");
    assert!(
        finding.what.contains("virtnode.io/accelerator is tcg"),
        "{finding:#?}"
    );
}

/// libvirt's own answer (`+64055:+64055`) takes precedence. After the remedy the check is ok.
#[test]
fn closed_kvm_device_is_an_error_until_its_group_may_open_it() {
    let mut observed = healthy_host();
    let close = |observed: &mut Observed, mode, gid| {
        observed.host.kvm.device = DeviceNode::Node {
            number: (10, 232),
            mode,
            uid: 0,
            gid,
            open: Ok(()),
        };
    };
    close(&mut observed, 0o600, 0);
    let finding = of(&observed, Check::KvmDevice);
    assert_eq!(finding.severity, Severity::Error);
    assert_eq!(
        commands(&finding),
        [
            "chgrp kvm /dev/kvm && chmod 660 /dev/kvm",
            r#"echo 'KERNEL=="kvm", GROUP="kvm", MODE="0660"' >/etc/udev/rules.d/65-kvm.rules"#
        ]
    );
    close(&mut observed, 0o660, 107);
    assert_eq!(of(&observed, Check::KvmDevice).severity, Severity::Ok);
    // The user must also be a member of the group.
    observed
        .host
        .accounts
        .groups
        .get_mut("kvm")
        .unwrap()
        .1
        .clear();
    let finding = of(&observed, Check::KvmDevice);
    assert_eq!(
        commands(&finding)[0],
        "usermod --append --groups kvm libvirt-qemu"
    );
    // Debian creates the user with KVM's group as its primary group.
    set_primary_group(&mut observed, 107);
    assert_eq!(of(&observed, Check::KvmDevice).severity, Severity::Ok);
    set_primary_group(&mut observed, 64055);
    close(&mut observed, 0o666, 0);
    assert_eq!(of(&observed, Check::KvmDevice).severity, Severity::Ok);
}

fn set_primary_group(observed: &mut Observed, gid: u32) {
    let users = &mut observed.host.accounts.users;
    users.insert("libvirt-qemu".to_owned(), (64055, gid));
}

#[rstest]
#[case::missing_driver(Err(OpenError::NoDriver), (10, 232), "has no driver", "modprobe kvm_amd")]
#[case::another_device(Ok(()), (1, 3), "is device 1:3, not KVM's", "rm /dev/kvm && mknod")]
fn device_other_than_kvms_is_an_error(
    #[case] open: Result<(), OpenError>,
    #[case] number: (u64, u64),
    #[case] what: &str,
    #[case] command: &str,
) {
    let mut observed = healthy_host();
    observed.host.kvm.device = DeviceNode::Node {
        number,
        mode: 0o666,
        uid: 0,
        gid: 0,
        open,
    };
    let finding = of(&observed, Check::KvmDevice);
    assert_eq!(finding.severity, Severity::Error);
    assert!(finding.what.contains(what), "{finding:#?}");
    assert!(commands(&finding)[0].starts_with(command), "{finding:#?}");
}

#[test]
fn session_runs_qemu_as_its_user() {
    let mut observed = healthy_host();
    Arc::make_mut(&mut observed.facts).capabilities = None;
    observed.libvirt.uri = "qemu:///session".to_owned();
    observed.host.accounts.own_uid = 1000;
    let finding = of(&observed, Check::KvmDevice);
    assert_eq!(commands(&finding)[0], "usermod --append --groups kvm ann");
}

#[rstest]
#[case::not_started("unavailable", "Failed to connect socket", &["systemctl enable --now libvirtd.socket"])]
#[case::stuck("timeout", "libvirt did not answer versions within 20s", &["systemctl restart libvirtd.service"])]
#[case::denied("denied", "libvirt denied open: access denied by policy", &["usermod --append --groups libvirt ann"])]
#[case::closed("unavailable", "Failed to connect socket to '/run/libvirt/libvirt-sock': Permission denied", &["usermod --append --groups libvirt ann"])]
#[case::polkit("denied", "authentication unavailable: no polkit agent available to authenticate action 'org.libvirt.unix.manage'", &["usermod --append --groups libvirt ann"])]
fn unreachable_libvirt_yields_a_remedy_for_its_cause(
    #[case] code: &'static str,
    #[case] message: &str,
    #[case] expected: &[&str],
) {
    let mut observed = healthy_host();
    observed.host.accounts.own_uid = 1000;
    observed.libvirt.failure = Some(LibvirtFailure {
        code,
        message: message.to_owned(),
    });
    let finding = of(&observed, Check::LibvirtConnection);
    assert_eq!(finding.severity, Severity::Error);
    assert_eq!(commands(&finding), expected, "{finding:#?}");
}

#[rstest]
#[case::systemd(true, "libvirtd virtlogd", "systemctl enable --now libvirtd.socket")]
#[case::modular(true, "virtqemud virtlogd", "systemctl enable --now virtqemud.socket")]
#[case::by_hand(false, "libvirtd virtlogd", "virtlogd -d && libvirtd -d")]
#[case::not_installed(true, "", "apt-get install libvirt-daemon-system qemu-system")]
fn stopped_libvirt_yields_the_start_command_of_this_host(
    #[case] systemd: bool,
    #[case] daemons: &str,
    #[case] expected: &str,
) {
    let mut observed = healthy_host();
    observed.host.sockets.clear();
    observed.host.systemd = systemd;
    observed.host.daemons = daemons.split_whitespace().map(str::to_owned).collect();
    observed.libvirt.failure = Some(LibvirtFailure {
        code: "unavailable",
        message: "no connection to libvirt: No such file or directory".to_owned(),
    });
    let finding = of(&observed, Check::LibvirtConnection);
    assert_eq!(commands(&finding), [expected]);
}

#[test]
fn unanswered_query_is_a_warning() {
    let mut observed = healthy_host();
    let unanswered = (
        "capabilities".to_owned(),
        "libvirt did not answer".to_owned(),
    );
    observed.libvirt.unanswered.push(unanswered);
    let finding = of(&observed, Check::LibvirtConnection);
    assert_eq!(finding.severity, Severity::Warning);
    assert_eq!(commands(&finding), ["virsh -c qemu:///system capabilities"]);
}

#[test]
fn libvirtd_beside_virtqemud_is_an_error() {
    let mut observed = healthy_host();
    let socket = observed.host.sockets["libvirt-sock"].clone();
    observed
        .host
        .sockets
        .insert("virtqemud-sock".to_owned(), socket);
    let finding = of(&observed, Check::LibvirtDaemons);
    assert_eq!(finding.severity, Severity::Error);
    assert!(commands(&finding)[0].starts_with("systemctl disable --now libvirtd.socket"));
}

#[test]
fn missing_virtlogd_is_an_error_unless_logs_go_to_files() {
    let mut observed = healthy_host();
    observed.host.sockets.remove("virtlogd-sock");
    let finding = of(&observed, Check::LibvirtDaemons);
    assert_eq!(finding.severity, Severity::Error);
    assert_eq!(
        commands(&finding),
        ["systemctl enable --now virtlogd.socket"]
    );
    observed.host.logs_to_file = Some(true);
    assert_eq!(of(&observed, Check::LibvirtDaemons).severity, Severity::Ok);
}

#[test]
fn features_missing_from_versions_are_warnings() {
    let mut observed = healthy_host();
    Arc::make_mut(&mut observed.facts).libvirt_version = Some(Version::new(9, 0, 0));
    let finding = of(&observed, Check::Versions);
    assert_eq!(finding.severity, Severity::Warning);
    assert!(finding.remedy.unwrap().text.contains("eim='on'"));
    // The result of the dry run overrides the versions.
    Arc::make_mut(&mut observed.facts).eim = Some(Eim::Auto);
    assert_eq!(of(&observed, Check::Versions).severity, Severity::Ok);
    Arc::make_mut(&mut observed.facts).libvirt_version = Some(Version::new(7, 0, 0));
    let finding = of(&observed, Check::Versions);
    assert!(finding.what.contains("no virtio-mem"), "{finding:#?}");
}

#[rstest]
#[case::fresh(990.0, Severity::Ok, "10 s")]
#[case::late(500.0, Severity::Warning, "8 min ago")]
#[case::stale(-900.0 + 1.0, Severity::Error, "never")]
#[case::never(0.0, Severity::Error, "has never read capabilities")]
fn age_of_the_last_probe_decides_its_severity(
    #[case] at: f64,
    #[case] severity: Severity,
    #[case] what: &str,
) {
    let mut observed = healthy_host();
    observed.daemon = daemon(at, 0);
    let finding = of(&observed, Check::ProbeAge);
    assert_eq!(finding.severity, severity, "{finding:#?}");
    assert!(finding.what.contains(what), "{finding:#?}");
    if let Daemon::Runs { now, .. } = &mut observed.daemon {
        *now = 5000.0;
    }
    assert_eq!(of(&observed, Check::ProbeAge).severity, Severity::Error);
}

#[test]
fn rejected_and_conflicting_labels_are_counted_and_named() {
    let mut observed = healthy_host();
    observed.rejected = vec![RejectedLabel {
        key: "machine.virtnode.io/pc+x".to_owned(),
        value: "8".to_owned(),
        reason: InvalidLabel::ALL[0],
    }];
    observed.daemon = daemon(990.0, 3);
    let report = diagnose(&observed);
    let labels = report.findings.iter().filter(|f| f.check == Check::Labels);
    let what: Vec<&str> = labels.map(|finding| finding.what.as_str()).collect();
    assert_eq!(
        what,
        [
            "1 label rejected: machine.virtnode.io/pc+x=8",
            "3 labels left to other owners since the daemon started",
        ]
    );
    assert_eq!(report.count(Check::Labels, Severity::Warning), 2);
}

fn domain(name: &str, machine: &str, inner: &str) -> ObservedDomain {
    let xml = format!(
        "<domain type='kvm' id='1'><name>{}</name><memory>2097152</memory>\
         <vcpu current='3'>4</vcpu><os><type arch='x86_64' machine='{machine}'>hvm</type></os>\
         <devices>{inner}</devices></domain>",
        quick_xml::escape::escape(name)
    );
    let parsed = Domain::parse("d", xml.as_bytes(), DomainState::Running).unwrap();
    ObservedDomain {
        connection: ConnectionId::Host,
        name: name.to_owned(),
        uuid: "2c298bd7-db31-43ec-8ced-225aa039f21b".to_owned(),
        state: DomainState::Running,
        stats: Stats::default(),
        details: Ok(Arc::new(DomainDetails {
            domain: parsed,
            persistent: true,
            agent: Agent::NotAsked,
        })),
        earlier: BTreeMap::new(),
    }
}

fn with_agent(mut seen: ObservedDomain, agent: Agent) -> ObservedDomain {
    let details = (**seen.details.as_ref().unwrap()).clone();
    seen.details = Ok(Arc::new(DomainDetails { agent, ..details }));
    seen
}

fn guest(vcpus: &str, online: &str) -> Agent {
    Agent::Answered(GuestVcpus::from_libvirt(vcpus, online).unwrap())
}

const CHANNEL: &str = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>";
const NEWEST: &str = "pc-q35-10.0";

#[rstest]
#[case::all(guest("0-2", "0-2"), Severity::Ok, "1 guest uses all", "")]
#[case::rejected(
    guest("0", "0"),
    Severity::Warning,
    "its guest has 1",
    "cat /proc/cmdline"
)]
#[case::offline(
    guest("0-2", "0"),
    Severity::Warning,
    "its guest uses 1",
    "virtnode hotplug vcpus web 3 --online"
)]
#[case::no_agent(
    Agent::NotAsked,
    Severity::Warning,
    "vCPUs 1-2 are plugged but have never run",
    "cat /sys"
)]
fn unused_vcpus_are_a_warning(
    #[case] agent: Agent,
    #[case] severity: Severity,
    #[case] what: &str,
    #[case] command: &str,
) {
    let mut observed = healthy_host();
    let mut seen = with_agent(domain("web", NEWEST, CHANNEL), agent);
    seen.stats = Stats::from_parameters([
        ("vcpu.0.time", 4_000_000),
        ("vcpu.1.time", 0),
        ("vcpu.2.time", 0),
    ]);
    observed.domains = Ok(vec![seen.clone()]);
    let finding = of(&observed, Check::VcpusOnline);
    assert_eq!(finding.severity, severity, "{finding:#?}");
    assert!(finding.what.contains(what), "{finding:#?}");
    let first = commands(&finding).first().copied().unwrap_or_default();
    assert!(first.starts_with(command), "{finding:#?}");
    // A paused guest cannot run its vCPUs.
    if matches!(seen.details.as_ref().unwrap().agent, Agent::NotAsked) {
        seen.state = DomainState::Paused;
        observed.domains = Ok(vec![seen]);
        assert_eq!(of(&observed, Check::VcpusOnline).severity, Severity::Ok);
    }
}

#[test]
fn growing_memory_is_ok_and_stuck_memory_a_warning() {
    let device = "<memory model='virtio-mem'><target><size>1048576</size>\
                  <requested>524288</requested><current>2048</current></target>\
                  <alias name='ua-mem0'/></memory>";
    let mut observed = healthy_host();
    let mut seen = domain("db", NEWEST, device);
    observed.domains = Ok(vec![seen.clone()]);
    let growing = of(&observed, Check::VirtioMem);
    assert_eq!(growing.severity, Severity::Ok);
    assert!(growing.what.contains("still growing"), "{growing:#?}");
    seen.earlier
        .insert("ua-mem0".to_owned(), Bytes::new(1 << 20));
    observed.domains = Ok(vec![seen.clone()]);
    assert_eq!(of(&observed, Check::VirtioMem).severity, Severity::Ok);
    seen.earlier
        .insert("ua-mem0".to_owned(), Bytes::new(2 << 20));
    observed.domains = Ok(vec![seen]);
    let stuck = of(&observed, Check::VirtioMem);
    assert_eq!(stuck.severity, Severity::Warning);
    assert_eq!(
        stuck.what,
        "ua-mem0: requested 512MiB, plugged 2MiB, no longer growing"
    );
    assert_eq!(stuck.remedy.unwrap().place, Place::Guest);
}

#[test]
fn deprecated_machine_type_is_a_warning_and_a_missing_one_an_error() {
    let mut observed = healthy_host();
    let machine = |machine: &str| Ok(vec![domain("old", machine, "")]);
    observed.domains = machine("pc-q35-2.4");
    let finding = of(&observed, Check::MachineTypes);
    assert_eq!(finding.severity, Severity::Warning);
    assert_eq!(
        commands(&finding),
        ["virsh -c qemu:///system dumpxml --inactive old | sed \
          's/machine='\\''pc-q35-2.4'\\''/machine='\\''pc-q35-10.0'\\''/' | \
          virsh -c qemu:///system define /dev/stdin"]
    );
    observed.domains = machine("pc-q35-1.4");
    let finding = of(&observed, Check::MachineTypes);
    assert_eq!(finding.severity, Severity::Error);
    assert!(
        finding
            .what
            .contains("no longer has the machine type pc-q35-1.4")
    );
    observed.domains = machine(NEWEST);
    assert_eq!(of(&observed, Check::MachineTypes).severity, Severity::Ok);
}

/// Tenants choose the names of domains.
#[rstest]
#[case("web-1.example", "web-1.example")]
#[case("x; reboot", "2c298bd7-db31-43ec-8ced-225aa039f21b")]
#[case("$(reboot)", "2c298bd7-db31-43ec-8ced-225aa039f21b")]
#[case("--all", "2c298bd7-db31-43ec-8ced-225aa039f21b")]
// virsh would parse it as an ID.
#[case("98765432", "2c298bd7-db31-43ec-8ced-225aa039f21b")]
fn special_characters_in_a_name_never_reach_a_command(#[case] name: &str, #[case] called: &str) {
    let mut observed = healthy_host();
    observed.domains = Ok(vec![domain(name, "pc-q35-2.4", "")]);
    for check in [Check::MachineTypes, Check::GuestAgent] {
        let finding = of(&observed, check);
        assert_eq!(finding.domain.as_deref(), Some(name));
        let command = commands(&finding)[0];
        assert!(command.split(' ').any(|word| word == called), "{command}");
        assert!(called == name || !command.contains(name), "{command}");
    }
}

#[test]
fn domain_without_an_answer_is_a_warning() {
    let mut observed = healthy_host();
    let mut stuck = domain("stuck", NEWEST, CHANNEL);
    stuck.details = Err(Undetailed::Unanswered("no answer within 5s".to_owned()));
    let fine = with_agent(domain("fine", NEWEST, CHANNEL), guest("0-2", "0-2"));
    observed.domains = Ok(vec![fine, stuck]);
    let report = diagnose(&observed);
    assert_eq!(report.count(Check::Domains, Severity::Warning), 1);
    assert_eq!(report.count(Check::GuestAgent, Severity::Ok), 1);
    assert_eq!(report.unseen.len(), 4, "{report:#?}");
}

#[test]
fn silent_agent_is_a_warning_with_the_reason() {
    let mut observed = healthy_host();
    let silent = Agent::Silent("no answer within 7s".to_owned());
    observed.domains = Ok(vec![with_agent(domain("mute", NEWEST, CHANNEL), silent)]);
    let finding = of(&observed, Check::GuestAgent);
    assert_eq!(finding.severity, Severity::Warning);
    assert!(finding.what.ends_with("no answer within 7s"));
    assert_eq!(commands(&finding), ["systemctl restart qemu-guest-agent"]);
}

/// Returns facts of the captured Debian sid as documents of KubeVirt.
fn documents_of_sid() -> Arc<NodeFacts> {
    let capabilities = include_bytes!(
        "../../../tests/fixtures/debian-sid-libvirt-12.8.0-qemu-11.1/capabilities.xml"
    );
    Arc::new(NodeFacts {
        capabilities: Some(Capabilities::parse("c", capabilities).unwrap()),
        ..NodeFacts::default()
    })
}

#[test]
fn documents_that_differ_from_libvirt_are_a_warning() {
    let mut observed = healthy_host();
    let check = Check::LabelDocuments;
    assert_eq!(of(&observed, check).severity, Severity::Ok);
    observed.documents.exist = true;
    observed.documents.facts = Some(Arc::clone(&observed.facts));
    for used in [true, false] {
        observed.documents.used = used;
        assert_eq!(of(&observed, check).severity, Severity::Ok);
    }
    observed.documents.facts = Some(documents_of_sid());
    let finding = of(&observed, check);
    assert_eq!(finding.severity, Severity::Warning);
    let expected = "q35 means pc-q35-11.1 in the documents and pc-q35-10.0 in libvirt";
    assert!(finding.what.contains(expected), "{}", finding.what);
    assert!(finding.remedy.unwrap().text.contains("labels.source: auto"));
    observed.documents.used = true;
    let remedy = of(&observed, check).remedy.unwrap().text;
    assert!(remedy.contains("labels.source: libvirt"), "{remedy}");
    // A node without a libvirt of its own has nothing to compare.
    observed.facts = Arc::default();
    assert_eq!(of(&observed, check).severity, Severity::Ok);
}

#[test]
fn document_that_cannot_be_used_is_an_error_where_labels_follow_it() {
    let mut observed = healthy_host();
    observed.documents.exist = true;
    observed.documents.problems = vec!["/documents/capabilities.xml: is empty".to_owned()];
    let check = Check::LabelDocuments;
    assert_eq!(of(&observed, check).severity, Severity::Ok);
    observed.documents.used = true;
    let finding = of(&observed, check);
    assert_eq!(finding.severity, Severity::Error);
    assert!(finding.what.ends_with("is empty"), "{}", finding.what);
    observed.documents = ObservedDocuments {
        used: true,
        ..ObservedDocuments::default()
    };
    assert_eq!(of(&observed, check).severity, Severity::Error);
}
