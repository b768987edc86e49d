//! One contract, two backends: what the contract suite needs of a hypervisor and its guests, of
//! the one in memory and of a real libvirt.

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

/// The name of the one guest.
pub(crate) const NAME: &str = "guest";

/// Observes the live domain only.
pub(crate) const PLAIN: ObservationQuery = ObservationQuery {
    timeout: LONG,
    statistics: false,
    agent: None,
    answers: false,
};

/// Observes everything. Taints the domain.
pub(crate) const EVERYTHING: ObservationQuery = ObservationQuery {
    timeout: LONG,
    statistics: true,
    agent: Some(LONG),
    answers: true,
};

/// For what has no deadline of its own; only a failing test waits so long.
const LONG: Duration = Duration::from_secs(120);

/// A hypervisor.
pub(crate) trait Backend: Sized {
    /// How it is reached.
    type Control: DomainBackend;
    /// Its guest.
    type Guest<'b>: Witness
    where
        Self: 'b;

    /// Starts one, on which things can be heard.
    async fn start() -> Self;

    /// How it is reached.
    fn control(&self) -> &Arc<Self::Control>;

    /// Starts a guest that is like that, and returns when it is.
    async fn guest<'b>(&'b self, like: &FakeGuest) -> Self::Guest<'b>;

    /// Begins a job on the domain that goes on until it is told to end.
    async fn begins_job(&self);

    /// Ends that job; the domain runs on.
    async fn ends_job(&self);
}

/// A guest, and what it says of itself.
pub(crate) trait Witness {
    /// Waits until the guest says that it uses these CPUs, as `0-2`.
    async fn uses(&self, cpus: &str);

    /// Waits until the guest says that it has these CPUs and no others.
    async fn has(&self, cpus: &str);

    /// What the guest has of memory in all, by its own word, at present.
    fn total(&self) -> Bytes;

    /// Waits until the guest keeps what it has, if it is one of those that do.
    async fn keeps(&self);

    /// Has it keep its CPUs no more, and somebody else ask it for them until it has so many.
    async fn gives_in(&self, count: u32);

    /// Whether the domain is tainted by what was asked past libvirt.
    fn is_tainted(&self) -> bool;

    /// Holds its processors, or lets them run again.
    fn pause(&self, on: bool);

    /// Ends it.
    fn destroy(&self);
}

/// The hypervisor in memory.
pub(crate) struct InMemory(Arc<FakeControl>);

impl Backend for InMemory {
    type Control = FakeControl;
    type Guest<'b> = &'b FakeControl;

    async fn start() -> Self {
        // Time passes at once.
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

    /// A save into a pipe that nobody reads from: it goes on for as long as somebody could.
    async fn begins_job(&self) {
        let pipe = self.libvirtd.directory().join("pipe");
        mkfifo(&pipe, Mode::from_bits_truncate(0o666)).unwrap();
        // Whatever the umask took.
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
        // It is the pipe's last reader, and libvirt's helper still writes.
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
    /// None where there is only firmware.
    guest: Option<Guest<'b>>,
    /// What the guest says when it keeps what it has.
    keeps: Option<&'static str>,
    libvirtd: &'b Libvirtd,
}

/// A domain with nothing to boot from: it stays in its firmware.
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
        // libvirt does not notice that it does.
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
