//! Imitated KubeVirt launcher pods: each a real libvirt in namespaces of its own, reached on the node
//! only by the socket in a volume below the kubelet's pods directory.
//!
//! A launcher is `tests/lab/launcher.sh` in new mount, process, network, IPC and host name namespaces.
//! As in KubeVirt, the daemon is user 107 and unprivileged, the volumes have the kubelet's modes, and
//! the daemon can die and restart while its domains go on. Debian has no virtqemud; libvirtd in
//! session mode does the same, and its socket gets a second name.
//!
//! Everything in a launcher ends with it: the script is the first process of its process namespace,
//! and exits when its standard input ends, also if the test is killed.
//!
//! It needs root and util-linux, and neither KVM nor a network.

pub(crate) mod broker;
pub(crate) mod vm;

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::unistd::Uid;
use tempfile::TempDir;

use super::eventually;
use super::guest::{Guest, Host};
use super::libvirtd::{ROOT, copy_files};
use vm::Vm;

/// The user of KubeVirt's launchers, "qemu" in their image.
pub(crate) const QEMU: u32 = 107;
/// Path from a pod's directory to its emptyDirs.
const EMPTY_DIRS: &str = "volumes/kubernetes.io~empty-dir";
/// The socket's name in KubeVirt.
pub(crate) const VIRTQEMUD_SOCK: &str = "virtqemud-sock";
/// The socket's name of a libvirtd.
pub(crate) const LIBVIRT_SOCK: &str = "libvirt-sock";
/// libvirt's cache of the emulators' capabilities, below `XDG_CACHE_HOME`.
const CAPABILITIES: &str = "libvirt/qemu/cache/capabilities";
/// Timeout for a start, at which libvirt may probe each installed emulator for seconds.
const START: Duration = Duration::from_secs(120);

/// A node's kubelet directory, for launchers.
pub(crate) struct Launchers {
    shared: Arc<Shared>,
}

/// The files of a node. Launchers keep them, so that they are removed after the last one ended.
struct Shared {
    directory: TempDir,
    /// The launchers' root file system, if it is not this machine's.
    root: Option<PathBuf>,
    /// Number of launchers so far.
    started: Mutex<u32>,
}

impl Shared {
    fn path(&self, below: &str) -> PathBuf {
        self.directory.path().join(below)
    }

    /// Returns libvirt's cache of the emulators' capabilities, kept between test runs. libvirt itself
    /// detects an outdated one.
    fn seed(&self) -> PathBuf {
        let root = self.root.as_deref().map(Path::to_string_lossy);
        let of = root.unwrap_or_default().replace('/', "-");
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("launcher-capabilities{of}"))
    }
}

/// The settings of a launcher. The default is that of KubeVirt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LauncherConfig<'c> {
    /// The pod's UID.
    pub(crate) pod: &'c str,
    /// User of the daemon: [`QEMU`], or 0 as with KubeVirt's feature gate `Root`.
    pub(crate) user: u32,
    /// Name of the socket: [`VIRTQEMUD_SOCK`] or [`LIBVIRT_SOCK`].
    pub(crate) socket: &'c str,
}

impl<'c> LauncherConfig<'c> {
    pub(crate) fn new(pod: &'c str) -> Self {
        Self {
            pod,
            user: QEMU,
            socket: VIRTQEMUD_SOCK,
        }
    }
}

/// Returns a pod's UID.
pub(crate) fn pod_uid(number: u32) -> String {
    format!("{number:08x}-0000-4000-8000-00000000beef")
}

impl Launchers {
    /// Returns a node without launchers.
    ///
    /// # Errors
    /// The test does not run as root.
    pub(crate) fn new() -> anyhow::Result<Self> {
        ensure!(
            Uid::effective().is_root(),
            "this test needs root: it imitates launcher pods in namespaces"
        );
        // A socket's path may have 107 bytes, and the directory must be open to another user.
        let directory = tempfile::Builder::new().prefix("l-").tempdir_in("/tmp")?;
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
        let root = std::env::var_os(ROOT).map(PathBuf::from);
        let shared = Shared {
            directory,
            root,
            started: Mutex::new(0),
        };
        for (part, mode) in [
            ("pods", 0o750),
            ("accounts", 0o755),
            ("s", 0o755),
            ("common", 0o777),
        ] {
            fs::create_dir(shared.path(part))?;
            fs::set_permissions(shared.path(part), Permissions::from_mode(mode))?;
        }
        for (file, line) in [
            ("passwd", "qemu:x:107:107:qemu:/:/sbin/nologin"),
            ("group", "qemu:x:107:"),
        ] {
            let etc = shared.root.as_deref().unwrap_or(Path::new("/")).join("etc");
            let accounts = fs::read_to_string(etc.join(file))?;
            // The machine may have given the number to another.
            let others = accounts
                .lines()
                .filter(|line| line.split(':').nth(2) != Some("107"));
            let lines: Vec<&str> = others.chain([line]).collect();
            fs::write(shared.path("accounts").join(file), lines.join("\n") + "\n")?;
        }
        let shared = Arc::new(shared);
        Ok(Self { shared })
    }

    /// Returns the kubelet's pods directory.
    pub(crate) fn pods(&self) -> PathBuf {
        self.shared.path("pods")
    }

    /// Returns the directory of a pod.
    pub(crate) fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    /// Starts a launcher and waits until it answers.
    ///
    /// # Errors
    /// The launcher cannot start; with its log.
    pub(crate) async fn start(&self, pod: &str) -> anyhow::Result<Launcher> {
        self.start_with(LauncherConfig::new(pod)).await
    }

    /// Starts a launcher with these settings and waits until it answers.
    ///
    /// # Errors
    /// The launcher cannot start; with its log.
    pub(crate) async fn start_with(&self, config: LauncherConfig<'_>) -> anyhow::Result<Launcher> {
        let mut launcher = self.begin(config)?;
        launcher.answers().await?;
        Ok(launcher)
    }

    /// Starts several launchers at once and waits until all answer.
    ///
    /// # Errors
    /// A launcher cannot start; with its log.
    pub(crate) async fn start_all(&self, pods: &[String]) -> anyhow::Result<Vec<Launcher>> {
        let begin = |pod: &String| self.begin(LauncherConfig::new(pod));
        let mut launchers = pods.iter().map(begin).collect::<anyhow::Result<Vec<_>>>()?;
        for launcher in &mut launchers {
            launcher.answers().await?;
        }
        Ok(launchers)
    }

    /// Creates the directory of a pod with an emptyDir volume like the kubelet, and returns the volume.
    ///
    /// # Errors
    /// The directory cannot be created.
    pub(crate) fn volume(&self, pod: &str, volume: &str) -> anyhow::Result<PathBuf> {
        let mut directory = self.pod(pod);
        for part in ["", "volumes", "kubernetes.io~empty-dir"] {
            directory.push(part);
            fs::create_dir_all(&directory)?;
            fs::set_permissions(&directory, Permissions::from_mode(0o750))?;
        }
        directory.push(volume);
        fs::create_dir(&directory)?;
        // The kubelet applies the pod's fsGroup.
        chown(&directory, Some(0), Some(QEMU))?;
        fs::set_permissions(&directory, Permissions::from_mode(0o2777))?;
        Ok(directory)
    }

    /// Starts a launcher, whose socket may not exist yet.
    fn begin(&self, config: LauncherConfig<'_>) -> anyhow::Result<Launcher> {
        let shared = Arc::clone(&self.shared);
        let number = {
            let mut started = shared
                .started
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *started += 1;
            *started
        };
        let runtime = self.volume(config.pod, "libvirt-runtime")?;
        let private = self.volume(config.pod, "private")?;
        fs::create_dir_all(private.join("libvirt"))?;
        fs::write(
            private.join("libvirt/qemu.conf"),
            "stdio_handler = \"file\"\nnamespaces = [ ]\ncgroup_controllers = [ ]\n\
             remember_owner = 0\nuser = \"+107\"\ngroup = \"+107\"\n",
        )?;
        // libvirt does not migrate between daemons with the same host UUID.
        let process = std::process::id();
        fs::write(
            private.join("libvirtd.conf"),
            format!("host_uuid = \"{process:08x}-0000-4000-9000-{number:012x}\"\n"),
        )?;
        copy_files(&shared.seed(), &private.join(CAPABILITIES))?;
        give_to(&private, config.user)?;
        let link = shared.path(&format!("s/{number}"));
        symlink(&runtime, &link)?;

        let log = shared.path(&format!("log-{number}"));
        let root = shared.root.as_deref().unwrap_or(Path::new(""));
        let mut script = Command::new("unshare")
            .args(["--mount", "--pid", "--net", "--ipc", "--uts"])
            .args(["--fork", "--kill-child"])
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/launcher.sh"))
            .arg(root)
            .arg(self.pod(config.pod).join(EMPTY_DIRS))
            .arg(shared.path("accounts"))
            .arg(config.user.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .context("this test needs unshare (package util-linux)")?;
        let input = script.stdin.take();
        let output = script.stdout.take().context("piped")?;
        let mut launcher = Launcher {
            directory: self.pod(config.pod),
            runtime,
            private,
            link,
            log,
            name: config.socket.to_owned(),
            user: config.user,
            input,
            output: BufReader::new(output),
            script,
            shared,
        };
        launcher.run("start")?;
        Ok(launcher)
    }
}

/// A running launcher pod; ended with its domains when dropped.
pub(crate) struct Launcher {
    directory: PathBuf,
    /// The volume with the socket.
    runtime: PathBuf,
    /// The volume with the configuration and the cache.
    private: PathBuf,
    /// A short path to `runtime`.
    link: PathBuf,
    log: PathBuf,
    /// Name of the socket.
    name: String,
    user: u32,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    script: Child,
    shared: Arc<Shared>,
}

impl Launcher {
    /// Returns the path of the socket on the node.
    pub(crate) fn socket(&self) -> PathBuf {
        self.runtime.join(&self.name)
    }

    /// Returns a URI for any client that may enter the pods directory.
    pub(crate) fn uri(&self) -> String {
        uri(&self.link.join(&self.name))
    }

    /// Runs a shell command in the pod.
    ///
    /// # Errors
    /// The command fails, or the pod has ended.
    fn run(&mut self, command: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("the launcher has ended")?;
        writeln!(input, "{command}")?;
        let mut status = String::new();
        self.output.read_line(&mut status)?;
        ensure!(
            status.trim() == "0",
            "'{command}' in the launcher: status {status:?}\n{}",
            self.log()
        );
        Ok(())
    }

    /// Waits until the daemon answers.
    async fn answers(&mut self) -> anyhow::Result<()> {
        let own = [VIRTQEMUD_SOCK, LIBVIRT_SOCK].map(|name| self.runtime.join(name));
        let exists = eventually(START, async || {
            let is_socket = |path: &&PathBuf| {
                fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
            };
            own.iter().find(is_socket).cloned().context("no socket")
        });
        let own = exists.await.with_context(|| self.log())?;
        let wanted = self.socket();
        if own != wanted {
            fs::hard_link(&own, &wanted)?;
        }
        let ready = eventually(START, async || self.virsh(&["uri"]).map(drop));
        ready.await.with_context(|| self.log())
    }

    /// Starts the daemon again, on a new socket, and waits until it answers.
    ///
    /// # Errors
    /// The daemon cannot start; with its log.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<()> {
        self.unlink()?;
        self.run("start")?;
        self.answers().await
    }

    /// Kills the daemon (`SIGKILL`): its socket stays, and domains go on.
    ///
    /// # Errors
    /// The daemon does not run.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.run("stop KILL")
    }

    /// Stops the daemon (`SIGTERM`): it removes its socket, and domains go on.
    ///
    /// # Errors
    /// The daemon does not run.
    pub(crate) fn terminate(&mut self) -> anyhow::Result<()> {
        self.run("stop TERM")?;
        self.unlink()
    }

    /// Stops the daemon with its socket open (`SIGSTOP`).
    ///
    /// # Errors
    /// The daemon does not run.
    pub(crate) fn freeze(&mut self) -> anyhow::Result<()> {
        self.run("kill -s STOP \"$daemon\"")
    }

    /// Continues the daemon (`SIGCONT`).
    ///
    /// # Errors
    /// The daemon does not run.
    pub(crate) fn thaw(&mut self) -> anyhow::Result<()> {
        self.run("kill -s CONT \"$daemon\"")
    }

    /// Ends the pod and removes its directory, like the kubelet.
    ///
    /// # Errors
    /// The directory cannot be removed.
    pub(crate) fn remove(self) -> anyhow::Result<()> {
        let directory = self.directory.clone();
        drop(self);
        Ok(fs::remove_dir_all(directory)?)
    }

    fn unlink(&self) -> anyhow::Result<()> {
        for name in [VIRTQEMUD_SOCK, LIBVIRT_SOCK] {
            match fs::remove_file(self.runtime.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => bail!(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Starts a domain in the way of KubeVirt: defines it, and starts it paused in its firmware.
    ///
    /// # Errors
    /// libvirt's error.
    pub(crate) fn start_paused(&self, vm: &Vm<'_>) -> anyhow::Result<()> {
        self.define(vm)?;
        self.virsh(&["start", "--paused", &vm.domain()]).map(drop)
    }

    /// Starts a guest of the lab and returns when it is ready, with its agent if it has one.
    ///
    /// # Errors
    /// The guest cannot be started, or does not become ready; with its console.
    pub(crate) async fn guest(&self, vm: &Vm<'_>) -> anyhow::Result<Guest<'_>> {
        let guest = self.boot(vm)?;
        guest.ready().await?;
        guest.agent(vm.words).await?;
        Ok(guest)
    }

    /// Starts a guest of the lab and returns while it is still in its firmware.
    ///
    /// # Errors
    /// The guest cannot be started.
    pub(crate) fn boot(&self, vm: &Vm<'_>) -> anyhow::Result<Guest<'_>> {
        let guest = Guest::new(self, &vm.domain(), true, vm.console(self.directory()))?;
        self.define(vm)?;
        self.virsh(&["start", &vm.domain()])?;
        Ok(guest)
    }

    fn define(&self, vm: &Vm<'_>) -> anyhow::Result<()> {
        super::guest::provide(&self.directory().join("guest"))?;
        self.with_xml(&["define"], &vm.xml(self.directory())?)
    }

    /// Attaches a device to a running domain with KubeVirt's flags.
    ///
    /// # Errors
    /// libvirt's error.
    pub(crate) fn attach(&self, domain: &str, device: &str) -> anyhow::Result<()> {
        self.with_xml(&["attach-device", domain, "--live", "--config"], device)
    }

    /// Detaches a device from a running domain with KubeVirt's flags. libvirt reports success after 5 s
    /// if the guest does not answer.
    ///
    /// # Errors
    /// libvirt's error.
    pub(crate) fn detach(&self, domain: &str, device: &str) -> anyhow::Result<()> {
        self.with_xml(&["detach-device", domain, "--live", "--config"], device)
    }

    /// Runs a command of virsh about a file with this content.
    fn with_xml(&self, command: &[&str], xml: &str) -> anyhow::Result<()> {
        let file = tempfile::NamedTempFile::new_in(self.directory())?;
        fs::write(file.path(), xml)?;
        let path = file.path().to_string_lossy().into_owned();
        // virsh accepts the file before or after its options.
        self.virsh(&[command, &["--file", &path]].concat())
            .map(drop)
    }

    /// Migrates a domain to another launcher in the way of KubeVirt: the source's daemon connects to the
    /// target's by a proxy's socket.
    ///
    /// # Errors
    /// The migration failed; with the output of virsh.
    pub(crate) fn migrate(&self, domain: &str, to: &Self) -> anyhow::Result<()> {
        // The source's daemon may not enter the pods directory.
        let proxy = to.shared.path("common/proxy");
        fs::remove_file(&proxy).ok();
        fs::hard_link(to.socket(), &proxy)?;
        let stream = to.shared.path("common/migration");
        self.virsh(&[
            "migrate",
            "--live",
            "--p2p",
            "--persistent",
            "--undefinesource",
            "--unsafe",
            domain,
            "--desturi",
            &uri(&proxy),
            "--migrateuri",
            &format!("unix://{}", stream.display()),
        ])
        .map(drop)
    }

    fn log(&self) -> String {
        format!(
            "the launcher's log:\n{}",
            fs::read_to_string(&self.log).unwrap_or_default()
        )
    }
}

impl Host for Launcher {
    fn virsh(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = virsh(&self.uri()).args(arguments).output()?;
        ensure!(
            output.status.success(),
            "virsh {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Returns the directory for files of QEMU, which all launchers share.
    fn directory(&self) -> &Path {
        self.shared.directory.path()
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // Only an unprivileged daemon keeps its cache in the volume.
        if self.user == QEMU {
            copy_files(&self.private.join(CAPABILITIES), &self.shared.seed()).ok();
        }
        // The script exits, and the kernel ends all processes of the namespace before `wait` returns.
        self.input.take();
        self.script.wait().ok();
    }
}

/// The identity of a client, with no supplementary group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) user: u32,
    pub(crate) group: u32,
}

impl Identity {
    /// Returns a command that runs a program with this identity, without capabilities and without a
    /// way to gain privileges.
    pub(crate) fn command(self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let Self { user, group } = self;
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={user}"))
            .arg(format!("--regid={group}"))
            .args(["--clear-groups", "--inh-caps=-all", "--bounding-set=-all"])
            .arg("--no-new-privs")
            .arg(program)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("HOME", "/")
            .stdin(Stdio::null());
        command
    }

    /// Runs virsh with this identity.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn virsh(self, uri: &str, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = self.command("virsh");
        command.args(["--quiet", "--connect", uri]).args(arguments);
        Ok(command.output()?)
    }
}

/// Returns the URI of a socket. `/session` also fits the daemon of a root launcher, and `/system` does
/// not fit that of an unprivileged one.
pub(crate) fn uri(socket: &Path) -> String {
    format!("qemu+unix:///session?socket={}", socket.display())
}

fn virsh(uri: &str) -> Command {
    let mut command = Command::new("virsh");
    command.args(["--quiet", "--connect", uri]);
    command
}

/// Changes the owner of a directory's content.
fn give_to(directory: &Path, user: u32) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        chown(&path, Some(user), Some(user))?;
        if path.is_dir() {
            give_to(&path, user)?;
        }
    }
    Ok(())
}
