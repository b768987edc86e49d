//! A private libvirtd, apart from the machine's own: an unprivileged session daemon in a
//! directory below /tmp (a socket's path may have 107 bytes, and the directory must be open to
//! another user), with QEMU's software emulation.
//!
//! As root it runs as another user: then libvirt is unprivileged, keeps all files below the XDG
//! directories, and needs neither systemd nor virtlogd nor rights on /dev/kvm.
//!
//! It is the machine's own, or that of another distribution with its QEMU, whose root file system
//! the environment names: see "Another libvirt" in CONTRIBUTING.md.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Pid, Uid};
use tempfile::TempDir;

use super::eventually;

/// The user and group "nobody" of Debian and Ubuntu; nothing depends on the name.
const OTHER: u32 = 65534;
/// The environment variable with the root file system whose libvirtd is run. This machine's /tmp
/// has to be mounted there, and /dev, /proc and /sys.
pub(super) const ROOT: &str = "VIRTNODE_TEST_LIBVIRT_ROOT";
/// Timeout for the first start, at which libvirt probes each installed emulator for seconds.
const START: Duration = Duration::from_secs(120);

/// A running libvirtd, stopped with its domains when dropped.
pub(crate) struct Libvirtd {
    directory: TempDir,
    /// The value of [`ROOT`], if set.
    root: Option<PathBuf>,
    /// The program, within that root.
    daemon: PathBuf,
    /// Additional environment of the daemon.
    environment: Vec<(&'static str, &'static str)>,
    /// True if it sees a /dev/kvm that it may open.
    with_kvm: bool,
    child: Option<Child>,
}

impl Libvirtd {
    /// Starts a libvirtd and waits until it answers.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut libvirtd = Self::new()?;
        libvirtd.restart()?;
        // libvirt probes the emulators at the first query, which would exceed a test's deadlines.
        libvirtd.virsh(&["capabilities"])?;
        libvirtd.virsh(&["domcapabilities"])?;
        Ok(libvirtd)
    }

    /// Starts a libvirtd whose messages are Japanese (package libvirt-l10n). gettext ignores `LANGUAGE` in
    /// the locale "C", and not in "C.UTF-8", which every glibc has.
    pub(crate) fn start_in_japanese() -> anyhow::Result<Self> {
        let mut libvirtd = Self::new()?;
        libvirtd.environment = vec![("LC_ALL", "C.UTF-8"), ("LANGUAGE", "ja")];
        libvirtd.restart()?;
        libvirtd.virsh(&["capabilities"])?;
        Ok(libvirtd)
    }

    /// Starts one that may use KVM: it sees another device node of /dev/kvm, in a mount namespace
    /// of its own. `None` without KVM, or without the rights for that.
    pub(crate) fn start_with_kvm() -> anyhow::Result<Option<Self>> {
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
        if kvm.is_err() || !Uid::effective().is_root() {
            return Ok(None);
        }
        let mut libvirtd = Self::new()?;
        if libvirtd.root.is_some() {
            return Ok(None);
        }
        libvirtd.with_kvm = true;
        let node = libvirtd.path("kvm");
        let device = fs::metadata("/dev/kvm")?.rdev();
        mknod(
            &node,
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o666),
            device,
        )?;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
        libvirtd.restart()?;
        libvirtd.virsh(&["capabilities"])?;
        Ok(Some(libvirtd))
    }

    /// Returns a libvirtd that is not started yet and has no socket.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let root = std::env::var_os(ROOT).map(PathBuf::from);
        let find = |program| match &root {
            Some(root) => in_root(root, program),
            None => in_path(program),
        };
        let daemon = ["libvirtd", "virtqemud"].into_iter().find_map(find);
        let daemon = daemon.context("this test needs libvirtd (package libvirt-daemon)")?;
        let directory = tempfile::Builder::new()
            .prefix("virt-")
            .tempdir_in("/tmp")?;
        let libvirtd = Self {
            directory,
            root,
            daemon,
            environment: Vec::new(),
            with_kvm: false,
            child: None,
        };
        for part in ["run", "config/libvirt", "cache", "home"] {
            fs::create_dir_all(libvirtd.path(part))?;
        }
        // Otherwise a domain requires virtlogd.
        let configuration = libvirtd.path("config/libvirt/qemu.conf");
        fs::write(configuration, "stdio_handler = \"file\"\n")?;
        // libvirt does not migrate between daemons with the same host UUID.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let host = format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id());
        let program = libvirtd.daemon.file_name().context("a file")?;
        let configuration = format!("config/libvirt/{}.conf", program.to_string_lossy());
        fs::write(
            libvirtd.path(&configuration),
            format!("host_uuid = \"{host}\"\n"),
        )?;
        copy_files(&libvirtd.seed(), &libvirtd.capability_cache())?;
        give_away(libvirtd.directory.path())?;
        Ok(libvirtd)
    }

    /// Returns its URI. With `name` instead of the path `/session`, the client library of an
    /// unprivileged user does not start another daemon if this one does not answer.
    pub(crate) fn uri(&self) -> String {
        let socket = self.socket();
        format!(
            "qemu+unix:///system?name=qemu:///session&socket={}",
            socket.display()
        )
    }

    /// Returns the directory with all its files, where files for QEMU belong too.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let child = self.child.as_ref().context("libvirtd does not run")?;
        Ok(kill(Pid::from_raw(i32::try_from(child.id())?), signal)?)
    }

    /// Kills it like a crash: its clients are not notified, and domains continue.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("libvirtd does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Restarts it on the same socket and waits until it answers.
    pub(crate) fn restart(&mut self) -> anyhow::Result<()> {
        self.spawn()?;
        let until = Instant::now() + START;
        while !self.try_virsh(&["uri"])?.status.success() {
            let ended = self
                .child
                .as_mut()
                .and_then(|child| child.try_wait().transpose());
            ensure!(ended.is_none(), "libvirtd ended:\n{}", self.log());
            ensure!(
                Instant::now() < until,
                "libvirtd does not answer:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn spawn(&mut self) -> anyhow::Result<()> {
        ensure!(self.child.is_none(), "libvirtd runs already");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))?;
        let mut command = match &self.root {
            // chroot becomes libvirtd, with the same process ID.
            Some(root) => {
                let mut command = Command::new("chroot");
                command.arg(format!("--userspec={OTHER}:{OTHER}"));
                command.arg("--groups=").arg(root).arg(&self.daemon);
                command
            }
            None if self.with_kvm => {
                let mut command = Command::new("unshare");
                let mount = format!(
                    "mount --bind {} /dev/kvm && exec setpriv --reuid={OTHER} --regid={OTHER} \
                     --clear-groups {}",
                    self.path("kvm").display(),
                    self.daemon.display()
                );
                command.args(["--mount", "--propagation", "private", "sh", "-c", &mount]);
                command
            }
            None => Command::new(&self.daemon),
        };
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_DATA_HOME", self.path("home/data"))
            .envs(self.environment.iter().copied())
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if self.root.is_none() && !self.with_kvm && Uid::effective().is_root() {
            // The standard library also drops the supplementary groups.
            command.uid(OTHER).gid(OTHER);
        }
        self.child = Some(command.spawn()?);
        Ok(())
    }

    /// Stops it with its sockets open (`SIGSTOP`).
    pub(crate) fn freeze(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Continues it (`SIGCONT`).
    pub(crate) fn thaw(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Starts a domain that stays paused, in software emulation with 16 MiB.
    pub(crate) fn start_domain(&self, name: &str) -> anyhow::Result<()> {
        let file = self.path(&format!("{name}.xml"));
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>\
             <os><type machine='q35'>hvm</type></os></domain>"
        );
        fs::write(&file, xml)?;
        self.virsh(&["create", "--paused", &file.to_string_lossy()])?;
        Ok(())
    }

    /// Starts a domain without a boot device, which stays in its firmware, with this maximum of vCPUs.
    /// Each is one thread of a core of four.
    pub(crate) fn start_firmware(&self, name: &str, vcpus: u32) -> anyhow::Result<()> {
        let file = self.path(&format!("{name}.xml"));
        let sockets = vcpus.div_ceil(4);
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>\
             <vcpu current='1'>{vcpus}</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
             <features><acpi/><apic/></features>\
             <cpu><topology sockets='{sockets}' cores='2' threads='2'/></cpu></domain>"
        );
        fs::write(&file, xml)?;
        self.virsh(&["create", &file.to_string_lossy()])?;
        Ok(())
    }

    /// Sends a signal to a domain's emulator.
    pub(crate) fn signal_emulator(&self, name: &str, signal: Signal) -> anyhow::Result<()> {
        let file = self.path(&format!("run/libvirt/qemu/run/{name}.pid"));
        let pid = fs::read_to_string(&file).with_context(|| format!("no {}", file.display()))?;
        Ok(kill(Pid::from_raw(pid.trim().parse()?), signal)?)
    }

    /// Starts a definition. The error is that of virsh.
    pub(crate) fn create(&self, xml: &str) -> Result<(), String> {
        self.with_file(xml, &["create"])
    }

    /// Starts a definition, paused, and destroys it. The error is that of virsh and QEMU: on a slow
    /// machine libvirt may miss the message of a QEMU that exits, which is in the domain's log.
    pub(crate) fn start_and_end(&self, xml: &str) -> Result<(), String> {
        let log = self.path(&format!("cache/libvirt/qemu/log/{}.log", name_in(xml)));
        fs::remove_file(&log).ok();
        self.with_file(xml, &["create", "--paused"])
            .map_err(|said| said + &fs::read_to_string(&log).unwrap_or_default())?;
        let destroyed = self.try_virsh(&["destroy", &name_in(xml)]);
        assert!(
            destroyed.is_ok_and(|output| output.status.success()),
            "{xml}"
        );
        Ok(())
    }

    /// Defines and undefines a domain. The error is that of virsh.
    pub(crate) fn define(&self, xml: &str) -> Result<(), String> {
        self.with_file(xml, &["define"])?;
        let undefined = self.try_virsh(&["undefine", &name_in(xml)]);
        assert!(
            undefined.is_ok_and(|output| output.status.success()),
            "{xml}"
        );
        Ok(())
    }

    /// Runs a command of virsh about a file with this content.
    fn with_file(&self, xml: &str, command: &[&str]) -> Result<(), String> {
        let file = tempfile::NamedTempFile::new_in(self.directory.path()).unwrap();
        fs::write(file.path(), xml).unwrap();
        let path = file.path().to_string_lossy().into_owned();
        let output = self.try_virsh(&[command, &[&path]].concat()).unwrap();
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Starts a live migration of a domain to another libvirtd.
    pub(crate) fn migrate(
        &self,
        name: &str,
        to: &Self,
        arguments: &[&str],
    ) -> anyhow::Result<Migration> {
        let words = to.path(&format!("migration-of-{name}.log"));
        let log = fs::File::create(&words)?;
        let socket = to.path(&format!("migration-of-{name}"));
        let command = Command::new("virsh")
            .args(["--quiet", "--connect", &self.uri()])
            .args(["migrate", "--live", name, "--desturi", &to.uri()])
            .args(["--migrateuri", &format!("unix://{}", socket.display())])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Migration { command, words })
    }

    /// Destroys a domain.
    pub(crate) fn end_domain(&self, name: &str) -> anyhow::Result<()> {
        self.virsh(&["destroy", name])?;
        Ok(())
    }

    /// Returns the output of virsh, for comparison.
    ///
    /// # Errors
    /// virsh fails; with its output and the daemon's.
    pub(crate) fn virsh(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.try_virsh(arguments)?;
        ensure!(
            output.status.success(),
            "virsh {arguments:?}: {}\nlibvirtd's log:\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    fn try_virsh(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        Command::new("virsh")
            .args(["--quiet", "--connect", &self.uri()])
            .args(arguments)
            .output()
            .context("this test needs virsh (package libvirt-clients)")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn path(&self, below: &str) -> PathBuf {
        self.directory.path().join(below)
    }

    /// Returns its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path(if self.daemon.ends_with("virtqemud") {
            "run/libvirt/virtqemud-sock"
        } else {
            "run/libvirt/libvirt-sock"
        })
    }

    /// Returns libvirt's cache of the emulators' capabilities, kept between test runs. libvirt itself
    /// detects an outdated one.
    fn seed(&self) -> PathBuf {
        let root = self.root.as_deref().map(Path::to_string_lossy);
        let of = root.unwrap_or_default().replace('/', "-");
        let of = if self.with_kvm { "-kvm".into() } else { of };
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libvirt-capabilities{of}"))
    }

    fn capability_cache(&self) -> PathBuf {
        self.path("cache/libvirt/qemu/cache/capabilities")
    }

    /// Kills the remaining emulators, by the process IDs in libvirt's files.
    fn end_domains(&self) {
        let Ok(files) = fs::read_dir(self.path("run/libvirt/qemu/run")) else {
            return;
        };
        for file in files.flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if name == "driver.pid" || !name.ends_with(".pid") {
                continue;
            }
            let pid = fs::read_to_string(file.path()).unwrap_or_default();
            if let Ok(pid) = pid.trim().parse() {
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            }
        }
    }
}

/// A migration in progress.
pub(crate) struct Migration {
    command: Child,
    words: PathBuf,
}

impl Migration {
    /// Waits for its end.
    ///
    /// # Errors
    /// The migration failed; with the output of virsh.
    pub(crate) async fn ends(mut self) -> anyhow::Result<()> {
        let ended = async || self.command.try_wait()?.context("the migration goes on");
        let status = eventually(START, ended).await?;
        let words = fs::read_to_string(&self.words)?;
        ensure!(status.success(), "virsh migrate: {words}");
        Ok(())
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        self.command.kill().ok();
        self.command.wait().ok();
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        self.end_domains();
        // Saves the next test the probe of the emulators.
        copy_files(&self.capability_cache(), &self.seed()).ok();
    }
}

/// Returns the domain's name in a definition.
fn name_in(xml: &str) -> String {
    let name = xml
        .split_once("<name>")
        .and_then(|(_, rest)| rest.split_once("</name>"));
    name.map(|(name, _)| name.to_owned())
        .expect("it has a name")
}

/// Changes the owner of a directory and its content to the daemon's user.
fn give_away(path: &Path) -> anyhow::Result<()> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    chown(path, Some(OTHER), Some(OTHER))?;
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            give_away(&entry?.path())?;
        }
    }
    Ok(())
}

/// Copies a directory's files, each atomically, because tests copy concurrently.
pub(super) fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    let Ok(files) = fs::read_dir(from) else {
        return Ok(());
    };
    for file in files {
        let file = file?;
        if file.path().extension().is_some_and(|end| end == "xml") {
            let copy = tempfile::NamedTempFile::new_in(to)?;
            fs::copy(file.path(), copy.path())?;
            copy.persist(to.join(file.file_name()))?;
        }
    }
    Ok(())
}

/// Returns a program's path within another root.
fn in_root(root: &Path, program: &str) -> Option<PathBuf> {
    let inside = Path::new("/usr/sbin").join(program);
    let outside = root.join(inside.strip_prefix("/").ok()?);
    outside.is_file().then_some(inside)
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/bin".into()])
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}
