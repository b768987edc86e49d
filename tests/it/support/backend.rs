//! The two backends of the contract suite: the hypervisor in memory, and a real libvirt with real
//! guests.

use std::cell::RefCell;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::time::timeout;
use virtnode::daemon::Metrics;
use virtnode::domain::{Job, PauseReason};
use virtnode::hypervisor::{
    ConnectionState, DomainBackend, Libvirt, LibvirtConfig, ObservationQuery,
};
use virtnode::units::{Bytes, KiB};

use super::eventually;
use super::fake_domains::{Blocks, Cpus, FakeControl, FakeGuest};
use super::guest::{Guest, GuestConfig};
use super::libvirtd::Libvirtd;

/// Name of the only guest.
pub(crate) const NAME: &str = "guest";

/// Observes the live domain only.
pub(crate) const PLAIN: ObservationQuery = ObservationQuery {
    timeout: LONG,
    statistics: false,
    agent: None,
    background: false,
    answers: false,
    definition: false,
};

/// Observes everything. Taints the domain.
pub(crate) const EVERYTHING: ObservationQuery = ObservationQuery {
    timeout: LONG,
    statistics: true,
    agent: Some(LONG),
    background: false,
    answers: true,
    definition: false,
};

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(120);

/// A hypervisor of the suite.
pub(crate) trait Backend: Sized {
    /// Its client.
    type Control: DomainBackend;
    /// A guest on it.
    type Guest<'b>: Witness
    where
        Self: 'b;

    /// Starts a hypervisor, and waits until it delivers events.
    async fn start() -> Self;

    /// Returns the client.
    fn control(&self) -> &Arc<Self::Control>;

    /// Starts a guest with this behavior, and waits until it is ready.
    async fn guest<'b>(&'b self, like: &FakeGuest) -> Self::Guest<'b>;

    /// Starts a job on the domain that runs until [`Self::ends_job`].
    async fn begins_job(&self);

    /// Ends the job; the domain continues.
    async fn ends_job(&self);
}

/// A guest with its own report.
pub(crate) trait Witness {
    /// Waits until the guest reports these CPUs as online: `0-2`.
    async fn uses(&self, cpus: &str);

    /// Waits until the guest reports exactly these CPUs, online or offline.
    async fn has(&self, cpus: &str);

    /// Returns the guest's total memory as it reports it.
    fn total(&self) -> Bytes;

    /// Waits until a guest that keeps its CPUs is set up to do so.
    async fn keeps(&self);

    /// Lets the guest release its CPUs, and unplugs them as another client down to this number.
    async fn gives_in(&self, count: u32);

    /// True if a query that bypassed libvirt tainted the domain.
    fn is_tainted(&self) -> bool;

    /// Pauses or resumes the domain.
    fn pause(&self, on: bool);

    /// Destroys the domain.
    fn destroy(&self);
}

/// The hypervisor in memory.
pub(crate) struct InMemory(Arc<FakeControl>);

impl Backend for InMemory {
    type Control = FakeControl;
    type Guest<'b> = &'b FakeControl;

    async fn start() -> Self {
        // Virtual time.
        tokio::time::pause();
        Self(FakeControl::new())
    }

    fn control(&self) -> &Arc<FakeControl> {
        &self.0
    }

    async fn guest<'b>(&'b self, like: &FakeGuest) -> &'b FakeControl {
        self.0.add(NAME, like.clone());
        &self.0
    }

    async fn begins_job(&self) {
        self.0.does(NAME, Some(Job::Save));
        self.0.pause(NAME, PauseReason::Save);
    }

    async fn ends_job(&self) {
        self.0.does(NAME, None);
        self.0.resume(NAME);
    }
}

impl Witness for &FakeControl {
    async fn uses(&self, cpus: &str) {
        let wanted: virtnode::domain::IdSet = cpus.parse().unwrap();
        eventually(LONG, async || {
            ensure!(self.online(NAME) == wanted.len(), "not {cpus}");
            Ok(())
        })
        .await
        .unwrap();
    }

    async fn has(&self, cpus: &str) {
        assert_eq!(self.present(NAME), cpus.parse().unwrap());
    }

    fn total(&self) -> Bytes {
        FakeControl::total(self, NAME)
    }

    async fn keeps(&self) {}

    async fn gives_in(&self, count: u32) {
        self.behaves(NAME, |guest| guest.cpus = Cpus::Onlines);
        self.somebody_unplugs(NAME, count);
    }

    fn is_tainted(&self) -> bool {
        FakeControl::is_tainted(self, NAME)
    }

    fn pause(&self, on: bool) {
        if on {
            FakeControl::pause(self, NAME, PauseReason::User)
        } else {
            self.resume(NAME)
        }
    }

    fn destroy(&self) {
        FakeControl::destroy(self, NAME);
    }
}

/// A real libvirt, with real guests.
pub(crate) struct Real {
    control: Arc<Libvirt>,
    libvirtd: Libvirtd,
    saving: RefCell<Option<Child>>,
}

impl Backend for Real {
    type Control = Libvirt;
    type Guest<'b> = RealGuest<'b>;

    async fn start() -> Self {
        let libvirtd = Libvirtd::start().unwrap();
        let config = LibvirtConfig::new(libvirtd.uri());
        let control = Arc::new(Libvirt::start(config, Metrics::new().hypervisor));
        let mut listening = control.health();
        let up = listening.wait_for(|state| matches!(state, ConnectionState::Up(_)));
        timeout(LONG, up).await.unwrap().unwrap();
        Self {
            control,
            libvirtd,
            saving: RefCell::default(),
        }
    }

    fn control(&self) -> &Arc<Libvirt> {
        &self.control
    }

    async fn guest<'b>(&'b self, like: &FakeGuest) -> RealGuest<'b> {
        let mut words = vec![
            match like.cpus {
                Cpus::Onlines | Cpus::Silent => "lab.cpus=online",
                Cpus::LeavesOffline => "lab.cpus=offline",
                Cpus::ThrowsAway => "nr_cpus=1 lab.cpus=online",
                Cpus::KeepsThem => "lab.cpus=online lab.deadline=3",
            },
            match like.blocks {
                Blocks::Onlines => "lab.blocks=online_movable",
                Blocks::LeavesOffline => "lab.blocks=offline",
                Blocks::NoDriver => "lab.virtio_mem=no",
                Blocks::GivesHalfBack => "lab.blocks=online lab.pin=yes",
            },
        ];
        if !like.agent {
            words.push("lab.agent=no");
        }
        let config = GuestConfig {
            name: NAME,
            words: &words.join(" "),
            vcpus: like.vcpus,
            memory: like.memory,
            statistics: like.statistics,
            ..GuestConfig::default()
        };
        let guest = match like.cpus {
            Cpus::Silent => firmware(&self.libvirtd),
            _ => Some(Guest::start(&self.libvirtd, &config).await.unwrap()),
        };
        RealGuest {
            guest,
            keeps: match (like.cpus, like.blocks) {
                (Cpus::KeepsThem, _) => Some("lab: 3 deadline tasks"),
                (_, Blocks::GivesHalfBack) => Some("lab: pinned"),
                _ => None,
            },
            libvirtd: &self.libvirtd,
        }
    }

    /// Saves the domain into a pipe without a reader, so that the job does not end.
    async fn begins_job(&self) {
        let pipe = self.libvirtd.directory().join("pipe");
        mkfifo(&pipe, Mode::from_bits_truncate(0o666)).unwrap();
        // Independent of the umask.
        std::fs::set_permissions(&pipe, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .unwrap();
        let reader = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&pipe)
            .unwrap();
        let save = Command::new("virsh")
            .args(["--quiet", "--connect", &self.libvirtd.uri(), "save", NAME])
            .arg(&pipe)
            .stdin(reader)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.saving.replace(Some(save.unwrap()));
        eventually(LONG, async || {
            let job = self.libvirtd.virsh(&["domjobinfo", NAME])?;
            ensure!(job.contains("Save"), "{job}");
            Ok(())
        })
        .await
        .unwrap();
    }

    async fn ends_job(&self) {
        let mut saving = self.saving.take().unwrap();
        self.libvirtd.virsh(&["domjobabort", NAME]).unwrap();
        // Closing the pipe's last reader ends the save: libvirt's helper still writes.
        saving.kill().unwrap();
        saving.wait().unwrap();
        eventually(LONG, async || {
            let state = self.libvirtd.virsh(&["domstate", NAME])?;
            ensure!(state.trim() == "running", "{state}");
            Ok(())
        })
        .await
        .unwrap();
    }
}

/// A guest on a real libvirt.
pub(crate) struct RealGuest<'b> {
    /// `None` if the domain has only firmware.
    guest: Option<Guest<'b>>,
    /// The console line of a guest that keeps its CPUs.
    keeps: Option<&'static str>,
    libvirtd: &'b Libvirtd,
}

/// A domain without a boot device, which stays in its firmware.
fn firmware<'b>(libvirtd: &'b Libvirtd) -> Option<Guest<'b>> {
    let file = libvirtd.directory().join("firmware.xml");
    let xml = format!(
        "<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>32</memory>\
         <vcpu current='1'>4</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <features><acpi/><apic/></features></domain>"
    );
    std::fs::write(&file, xml).unwrap();
    libvirtd
        .virsh(&["create", &file.to_string_lossy()])
        .unwrap();
    None
}

impl Witness for RealGuest<'_> {
    async fn uses(&self, cpus: &str) {
        let Some(guest) = &self.guest else { return };
        guest.sees(|guest| guest.online == cpus).await.unwrap();
    }

    async fn has(&self, cpus: &str) {
        let Some(guest) = &self.guest else { return };
        guest.sees(|guest| guest.present == cpus).await.unwrap();
    }

    fn total(&self) -> Bytes {
        let guest = self.guest.as_ref().context("only firmware").unwrap();
        Bytes::from(KiB::new(guest.witness().unwrap().total_kib).unwrap())
    }

    async fn keeps(&self) {
        if let (Some(words), Some(guest)) = (self.keeps, &self.guest) {
            guest.says(words).await.unwrap();
        }
    }

    async fn gives_in(&self, count: u32) {
        let guest = self.guest.as_ref().context("only firmware").unwrap();
        guest.runs("/bin/busybox", &["killall", "sleep"]).unwrap();
        let (left, count) = (format!("0-{}", count - 1), count.to_string());
        // libvirt does not notice the release.
        let asked_again = async || {
            self.libvirtd.virsh(&["setvcpus", NAME, &count]).ok();
            let sees = guest.witness()?;
            ensure!(sees.online == left, "{sees:?}");
            Ok(())
        };
        eventually(LONG, asked_again).await.unwrap();
    }

    fn is_tainted(&self) -> bool {
        let info = self.libvirtd.virsh(&["dominfo", NAME]).unwrap();
        info.contains("custom monitor")
    }

    fn pause(&self, on: bool) {
        let command = if on { "suspend" } else { "resume" };
        self.libvirtd.virsh(&[command, NAME]).unwrap();
    }

    fn destroy(&self) {
        self.libvirtd.virsh(&["destroy", NAME]).unwrap();
    }
}
