//! Labels from KubeVirt's documents, with launchers in memory: the versions, what is kept, and files
//! that are being written.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use virtnode::capability::Version;
use virtnode::config::LabelOrigin;
use virtnode::daemon::Metrics;
use virtnode::documents::{DocumentDirectory, DocumentFile};
use virtnode::domain::{ConnectionId, NodeRequirements};
use virtnode::hypervisor::{CallError, DomainRef, RunningDomain, Versions};
use virtnode::label::{LabelSet, Policy, Schema};
use virtnode::labeller::{Labeller, LabellerProgress, LatestProbe, Outputs};
use virtnode::probe::{LabelSource, LaunchersSeen};

use crate::support::hypervisor::InMemory;
use crate::support::probes::published;

const INTERVAL: Duration = Duration::from_secs(60);
const Q35: &str = "machine.virtnode.io/pc-q35-10.0";
const OLD: &str = "machine-type.node.kubevirt.io/pc-q35-5.0";
const LIBVIRT: &str = "virtnode.io/libvirt-version";
const FEATURES: &str = "<cpu mode='custom'><model>EPYC</model>\
    <feature policy='require' name='x2apic'/></cpu>";

/// Launchers that a test changes, with the connection of each.
#[derive(Clone, Default)]
struct Pods(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    up: Vec<(ConnectionId, Arc<InMemory>)>,
    unreachable: Vec<ConnectionId>,
}

fn pod(name: &str) -> ConnectionId {
    ConnectionId::Launcher {
        pod: name.to_owned(),
    }
}

impl Pods {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, name: &str, launcher: InMemory) -> Arc<InMemory> {
        let launcher = Arc::new(launcher);
        self.lock().up.push((pod(name), Arc::clone(&launcher)));
        launcher
    }

    fn observe(&self) -> LaunchersSeen<InMemory> {
        let seen = self.lock();
        LaunchersSeen {
            scanned: true,
            up: seen.up.clone(),
            unreachable: seen.unreachable.clone(),
        }
    }
}

/// A labeller in paused time with a directory of documents, launchers, and possibly a libvirt of the
/// host.
struct Node {
    directory: TempDir,
    documents: DocumentDirectory,
    metrics: Arc<Metrics>,
    labels: watch::Receiver<Option<Arc<LabelSet>>>,
    progress: watch::Receiver<LabellerProgress>,
    latest: watch::Receiver<Option<Arc<LatestProbe>>>,
    _stop: tokio_util::sync::DropGuard,
}

impl Node {
    /// Writes the captured documents of Debian 13.
    fn write_documents(&self) {
        let answers = InMemory::debian_13();
        let answers = answers.answers();
        self.write(
            DocumentFile::Capabilities,
            answers.capabilities.as_ref().unwrap(),
        );
        let document = answers.domain_capabilities.as_ref().unwrap();
        self.write(DocumentFile::DomainCapabilities, document);
        self.write(DocumentFile::SupportedFeatures, FEATURES);
    }

    fn write(&self, file: DocumentFile, text: &str) {
        fs::write(self.documents.file(file), text).unwrap();
    }

    fn start(origin: LabelOrigin, host: Option<Arc<InMemory>>, pods: Option<Pods>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let documents = DocumentDirectory::new(directory.path());
        let source = LabelSource::new(
            origin,
            DocumentDirectory::new(directory.path()),
            host,
            pods.map(|pods| Box::new(move || pods.observe()) as _),
        );
        let metrics = Arc::new(Metrics::new());
        let (desired, labels) = watch::channel(None);
        let outputs = Outputs {
            node: Some(desired),
            ..Outputs::default()
        };
        let policy = Policy {
            schema: Schema::Both,
            ..Policy::default()
        };
        let labeller = Labeller::new(
            Arc::new(source),
            policy,
            INTERVAL,
            PathBuf::from(directory.path()),
            outputs,
            Arc::clone(&metrics.labeller),
        );
        let (progress, latest) = (labeller.progress(), labeller.latest());
        let stop = CancellationToken::new();
        tokio::spawn(labeller.run(stop.clone()));
        Self {
            directory,
            documents,
            metrics,
            labels,
            progress,
            latest,
            _stop: stop.drop_guard(),
        }
    }

    fn attempts(&self) -> u64 {
        let attempts = &self.metrics.labeller.probe.attempts;
        attempts.with_label_values(&["domains"]).get()
    }

    /// Waits until `count` more probes have been published.
    async fn probes(&self, count: u64) {
        published(&self.latest, count).await;
    }

    fn value(&self, key: &str) -> Option<String> {
        let set = self.labels.borrow();
        Some(set.as_ref()?.get(&key.parse().unwrap())?.to_string())
    }

    fn keys(&self) -> BTreeSet<String> {
        let set = self.labels.borrow();
        set.iter()
            .flat_map(|set| set.keys())
            .map(ToString::to_string)
            .collect()
    }

    fn failures(&self) -> Vec<(&'static str, &'static str)> {
        let progress = self.progress.borrow();
        let failures = progress.failures.iter();
        failures.map(|f| (f.source.as_str(), f.code)).collect()
    }
}

fn versions(libvirt: Version, qemu: Version) -> Versions {
    Versions {
        libvirt,
        hypervisor: Some(qemu),
    }
}

#[tokio::test(start_paused = true)]
async fn labels_come_from_documents_and_versions_from_the_launcher_that_fits() {
    let pods = Pods::default();
    pods.add("newer", InMemory::debian_sid());
    let fitting = pods.add("fitting", InMemory::debian_13());
    let node = Node::start(LabelOrigin::Auto, None, Some(pods.clone()));
    node.write_documents();
    node.probes(2).await;
    assert_eq!(node.failures(), []);
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("11.3.0"));
    assert_eq!(node.value("virtnode.io/eim").as_deref(), Some("auto"));
    assert_eq!(node.value(Q35).as_deref(), Some("1024"));
    let accelerator = node.value("virtnode.io/accelerator");
    assert_eq!(accelerator.as_deref(), Some("kvm"));
    assert!(node.value("cpu-feature.node.kubevirt.io/x2apic").is_some());
    // Of several that fit, the highest version counts.
    let patched = versions(Version::new(11, 3, 1), Version::new(10, 0, 2));
    pods.add("patched", InMemory::debian_13())
        .answers()
        .versions = Ok(Some(patched));
    node.probes(1).await;
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("11.3.1"));
    drop(fitting);
}

#[tokio::test(start_paused = true)]
async fn node_without_launcher_is_ready_and_keeps_labels_of_versions() {
    let pods = Pods::default();
    let node = Node::start(LabelOrigin::Files, None, Some(pods.clone()));
    node.write_documents();
    node.probes(2).await;
    assert!(node.progress.borrow().probed);
    assert_eq!(node.value(LIBVIRT), None);
    assert_eq!(node.value(Q35).as_deref(), Some("255"));
    let age = &node.metrics.registry.encode().unwrap();
    let age = age.contains("virtnode_probe_last_success_timestamp_seconds{source=\"versions\"}");
    assert!(!age, "a source that nothing can answer has no age");

    pods.add("a", InMemory::debian_13());
    node.probes(1).await;
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("11.3.0"));
    assert_eq!(node.value(Q35).as_deref(), Some("1024"));

    pods.lock().up.clear();
    let before = fs::read_to_string(node.documents.file(DocumentFile::Capabilities)).unwrap();
    let kept = before.lines().filter(|line| !line.contains(">pc-q35-5.0<"));
    let after: Vec<&str> = kept.collect();
    node.write(DocumentFile::Capabilities, &after.join("\n"));
    node.probes(4).await;
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("11.3.0"));
    assert_eq!(node.value(Q35).as_deref(), Some("1024"));
    assert_eq!(node.value(OLD), None);
    assert_eq!(node.failures(), []);
}

#[tokio::test(start_paused = true)]
async fn first_probe_waits_for_the_connections_to_launchers() {
    let pods = Pods::default();
    pods.lock().unreachable.push(pod("a"));
    let node = Node::start(LabelOrigin::Files, None, Some(pods.clone()));
    node.write_documents();
    sleep(Duration::from_secs(2)).await;
    pods.lock().unreachable.clear();
    pods.add("a", InMemory::debian_13());
    node.probes(1).await;
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("11.3.0"));
    assert_eq!(node.failures(), []);
}

#[tokio::test(start_paused = true)]
async fn one_launcher_of_each_pair_of_versions_is_asked_for_its_capabilities() {
    let pods = Pods::default();
    let asked = || -> usize {
        let launchers = pods.lock().up.clone();
        launchers.iter().map(|(_, it)| it.answers().asked).sum()
    };
    let overdue = || CallError::Overdue {
        call: "capabilities".into(),
        after: Duration::from_secs(1),
    };
    pods.add("silent", InMemory::debian_13())
        .answers()
        .capabilities = Err(overdue());
    for name in ["a", "b", "c"] {
        pods.add(name, InMemory::debian_13());
        pods.add(&format!("new-{name}"), InMemory::debian_sid());
    }
    let node = Node::start(LabelOrigin::Files, None, Some(pods.clone()));
    node.write_documents();
    node.probes(4).await;
    // The silent one, one after it, and one of the newer ones.
    assert_eq!(asked(), 3);
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("11.3.0"));
}

#[tokio::test(start_paused = true)]
async fn domains_of_launchers_keep_their_labels_and_unreachable_ones_keep_all() {
    let pods = Pods::default();
    let launcher = pods.add("a", InMemory::debian_13());
    let node = Node::start(LabelOrigin::Files, None, Some(pods.clone()));
    node.write_documents();
    node.probes(2).await;
    let domain = |machine: &str| RunningDomain {
        id: DomainRef::on_host("default_web", "5fc6a4ac-447f-479c-95b8-97395d1c380b"),
        requirements: Ok(NodeRequirements {
            machine: Some(machine.to_owned()),
            cpu_model: Some("EPYC".to_owned()),
            ..NodeRequirements::default()
        }),
    };
    launcher.answers().domains = vec![domain("pc-q35-5.0")];
    let capabilities = node.documents.file(DocumentFile::Capabilities);
    let whole = fs::read_to_string(&capabilities).unwrap();
    let without = |machines: &[&str]| {
        let is_kept = |line: &&str| {
            !machines
                .iter()
                .any(|name| line.contains(&format!(">{name}<")))
        };
        whole.lines().filter(is_kept).collect::<Vec<_>>().join("\n")
    };
    fs::write(&capabilities, without(&["pc-q35-5.0", "pc-q35-4.0"])).unwrap();
    node.probes(4).await;
    assert!(node.value(OLD).is_some());
    assert_eq!(node.value("machine-type.node.kubevirt.io/pc-q35-4.0"), None);

    pods.lock().unreachable.push(pod("b"));
    fs::write(&capabilities, without(&["pc-q35-5.0", "pc-q35-5.1"])).unwrap();
    node.probes(5).await;
    assert_eq!(node.failures(), [("domains", "unavailable")]);
    assert!(
        node.value("machine-type.node.kubevirt.io/pc-q35-5.1")
            .is_some()
    );

    pods.lock().unreachable.clear();
    node.probes(3).await;
    assert_eq!(node.value("machine-type.node.kubevirt.io/pc-q35-5.1"), None);
    assert!(node.value(OLD).is_some());
    launcher.answers().domains.clear();
    node.probes(3).await;
    assert_eq!(node.value(OLD), None);
}

#[tokio::test(start_paused = true)]
async fn launcher_that_cannot_be_reached_from_the_start_does_not_delay_readiness() {
    let pods = Pods::default();
    pods.lock().unreachable.push(pod("refused"));
    let node = Node::start(LabelOrigin::Files, None, Some(pods));
    node.write_documents();
    node.probes(2).await;
    assert!(node.progress.borrow().probed);
    let failure = node.progress.borrow().failures[0].message.clone();
    assert!(
        failure.contains("launcher:refused is not connected"),
        "{failure}"
    );
    assert!(node.value(OLD).is_some());
    // The usual interval suffices.
    let (start, before) = (Instant::now(), node.attempts());
    node.probes(1).await;
    assert_eq!(node.attempts(), before + 1);
    assert!(start.elapsed() > INTERVAL / 2, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn host_without_documents_uses_its_libvirt_until_documents_appear() {
    let host = Arc::new(InMemory::debian_sid());
    let node = Node::start(LabelOrigin::Auto, Some(host), None);
    node.probes(1).await;
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("12.8.0"));
    node.write_documents();
    // Noticed by the fingerprint, long before the next probe is due.
    sleep(Duration::from_secs(9)).await;
    assert!(node.value(OLD).is_some());
    // The files vanish: the host's libvirt describes another QEMU.
    for file in DocumentFile::ALL {
        fs::remove_file(node.documents.file(file)).unwrap();
    }
    let before = node.keys();
    node.probes(4).await;
    assert_eq!(node.keys(), before);
    assert!(node.failures().contains(&("capabilities", "unreadable")));
}

#[tokio::test(start_paused = true)]
async fn origin_libvirt_ignores_documents() {
    let host = Arc::new(InMemory::debian_sid());
    let node = Node::start(LabelOrigin::Libvirt, Some(host), None);
    node.write_documents();
    node.probes(2).await;
    assert_eq!(node.value(OLD), None);
    assert_eq!(node.value(LIBVIRT).as_deref(), Some("12.8.0"));
}

const SMALL: [(DocumentFile, &str); 3] = [
    (
        DocumentFile::Capabilities,
        "<capabilities><host><cpu><arch>x86_64</arch><counter name='tsc' frequency='1000' \
         scaling='no'/></cpu></host><guest><os_type>hvm</os_type><arch name='x86_64'>\
         <machine maxCpus='288' canonical='pc-q35-9.0'>q35</machine>\
         <machine maxCpus='288'>pc-q35-9.0</machine><domain type='kvm'/></arch>\
         </guest></capabilities>\n",
    ),
    (
        DocumentFile::DomainCapabilities,
        "<domainCapabilities><domain>kvm</domain><machine>pc-q35-9.0</machine>\
         <arch>x86_64</arch><vcpu max='240'/><cpu><mode name='host-model' supported='yes'>\
         <model fallback='forbid'>EPYC</model><vendor>AMD</vendor>\
         <feature policy='require' name='x2apic'/></mode><mode name='custom' supported='yes'>\
         <model usable='yes' vendor='AMD'>EPYC</model><model usable='no' vendor='Intel'>Denverton\
         </model></mode></cpu><features><sev supported='yes'><maxESGuests>1</maxESGuests></sev>\
         </features></domainCapabilities>\n",
    ),
    (
        DocumentFile::SupportedFeatures,
        "<cpu mode='custom' match='exact'><model fallback='forbid'>EPYC</model>\
         <feature policy='require' name='x2apic'/><feature policy='require' name='svm'/></cpu>\n",
    ),
];

#[tokio::test(start_paused = true)]
async fn document_cut_off_at_any_length_changes_no_label() {
    let node = Node::start(LabelOrigin::Files, None, Some(Pods::default()));
    for (file, text) in SMALL {
        node.write(file, text);
    }
    node.probes(3).await;
    let before = node.labels.borrow().clone().unwrap();
    assert!(before.len() > 10, "{before:?}");
    for (file, text) in SMALL {
        for length in 0..text.len() {
            node.write(file, &text[..length]);
            node.probes(1).await;
            let cut = &text[..length];
            assert_eq!(node.labels.borrow().as_ref(), Some(&before), "{cut}");
            // Without the last line break it is still whole.
            assert_eq!(
                node.failures().is_empty(),
                length + 1 == text.len(),
                "{cut}"
            );
        }
        node.write(file, text);
        node.probes(1).await;
        assert_eq!(node.failures(), []);
    }
    drop(node.directory);
}

#[tokio::test(start_paused = true)]
async fn documents_that_are_rewritten_all_the_time_never_cost_a_label() {
    let node = Node::start(LabelOrigin::Files, None, Some(Pods::default()));
    for (file, text) in SMALL {
        node.write(file, text);
    }
    node.probes(3).await;
    let before = node.keys();
    let mut pause = 0;
    for round in 0..120 {
        for (file, text) in SMALL {
            // As the shell and virsh do: truncated, then written in parts.
            let text = text.replace("EPYC", if round % 2 == 0 { "EPYC-Rome" } else { "EPYC" });
            let half = text.len() / 2;
            for part in [0, half, text.len()] {
                node.write(file, &text[..part]);
                pause = (pause * 7 + 311) % 2600;
                sleep(Duration::from_millis(pause)).await;
                assert!(node.keys().is_superset(&before), "{:?}", node.failures());
            }
        }
    }
    node.probes(3).await;
    assert!(node.keys().is_superset(&before));
}
