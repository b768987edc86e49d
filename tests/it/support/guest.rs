//! Guests with configurable behavior: the lab (`tests/lab/`) on a private libvirtd.
//!
//! Words on the guest's kernel command line, which `tests/lab/guest-init` describes, choose its
//! behavior at a plug. The guest reports its own CPUs and memory on its console, independently of the
//! hypervisor.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use quick_xml::escape::escape;
use serde_json::json;

use super::eventually;
use super::libvirtd::Libvirtd;

/// Timeout for a boot, which takes 3 s alone: many guests boot at once, in software emulation.
const BOOT: Duration = Duration::from_secs(180);

/// The guest's memory at boot.
const BOOT_MIB: u64 = 512;

/// Shares of the virtio-mem device and the DIMMs in [`MAXIMUM_MIB`].
const VIRTIO_MEM_MIB: u64 = 2048;

/// Maximum memory of the guest.
const MAXIMUM_MIB: u64 = 4096;

/// The way to plug more memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MorePossible {
    /// An empty virtio-mem device of 2 GiB in blocks of 2 MiB, alias `ua-mem0`, and slots for DIMMs.
    VirtioMem,
    /// Four slots for DIMMs.
    Dimms,
    /// None: the domain has no maxMemory.
    No,
}

/// What the guest's memory balloon reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Statistics {
    /// The guest's memory, each so many seconds.
    Every(u32),
    /// Nothing but once at the start: there is no statistics period.
    Off,
    /// There is no balloon.
    NoBalloon,
}

impl Statistics {
    pub(crate) fn xml(self) -> String {
        match self {
            Self::Every(period) => {
                format!("<memballoon model='virtio'><stats period='{period}'/></memballoon>")
            }
            Self::Off => "<memballoon model='virtio'/>".to_owned(),
            Self::NoBalloon => "<memballoon model='none'/>".to_owned(),
        }
    }
}

/// Configuration of a guest. The default has one vCPU of four, a virtio-mem device, an agent and
/// balloon statistics each second, and leaves plugged resources offline.
#[derive(Debug, Clone)]
pub(crate) struct GuestConfig<'c> {
    /// The domain's name.
    pub(crate) name: &'c str,
    /// Words for the guest: see `tests/lab/guest-init`.
    pub(crate) words: &'c str,
    /// vCPUs at boot.
    pub(crate) vcpus: u32,
    /// Maximum number of vCPUs.
    pub(crate) maximum: u32,
    /// The way to plug more memory.
    pub(crate) memory: MorePossible,
    pub(crate) statistics: Statistics,
    /// True for a persistent domain.
    pub(crate) persistent: bool,
    /// True for a device that reports a panic of the guest's kernel.
    pub(crate) panic: bool,
}

impl Default for GuestConfig<'_> {
    fn default() -> Self {
        Self {
            name: "guest",
            words: "",
            vcpus: 1,
            maximum: 4,
            memory: MorePossible::VirtioMem,
            statistics: Statistics::Every(1),
            persistent: false,
            panic: false,
        }
    }
}

impl GuestConfig<'_> {
    fn xml(&self, files: &Path) -> String {
        let Self {
            name,
            words,
            vcpus,
            maximum,
            ..
        } = *self;
        let file = |file: &str| escape(files.join(file).to_string_lossy()).into_owned();
        let (kernel, initramfs) = (file("vmlinuz"), file("initramfs.gz"));
        let console = escape(self.console(files).to_string_lossy()).into_owned();
        let (name, words) = (escape(name), escape(words));
        let balloon = self.statistics.xml();
        let panic = if self.panic {
            "<panic model='isa'/>"
        } else {
            ""
        };
        let last = maximum - 1;
        let (max_memory, numa) = match self.memory {
            MorePossible::No => (String::new(), String::new()),
            _ => (
                format!("<maxMemory slots='4' unit='MiB'>{MAXIMUM_MIB}</maxMemory>"),
                format!(
                    "<numa><cell id='0' cpus='0-{last}' memory='{BOOT_MIB}' unit='MiB'/></numa>"
                ),
            ),
        };
        // <memory> counts the devices in full
        let (memory, device) = match self.memory {
            MorePossible::VirtioMem => (
                BOOT_MIB + VIRTIO_MEM_MIB,
                format!(
                    "<memory model='virtio-mem'><target>\
                     <size unit='MiB'>{VIRTIO_MEM_MIB}</size><node>0</node>\
                     <block unit='MiB'>2</block><requested unit='MiB'>0</requested>\
                     </target><alias name='ua-mem0'/></memory>"
                ),
            ),
            _ => (BOOT_MIB, String::new()),
        };
        // Linux 6.8 and later reserves no CPUs for hotplug unless it recognizes its hypervisor,
        // which it does not for QEMU's software emulation. It recognizes VMware, by the machine's
        // serial number and a port that QEMU emulates. Each CPU has a socket of its own, because
        // Linux also omits absent CPUs of a present socket.
        format!(
            "<domain type='qemu'><name>{name}</name>\
             {max_memory}<memory unit='MiB'>{memory}</memory>\
             <vcpu current='{vcpus}'>{maximum}</vcpu>\
             <sysinfo type='smbios'><system><entry name='serial'>VMware-lab</entry></system></sysinfo>\
             <os><type arch='x86_64' machine='q35'>hvm</type>\
             <kernel>{kernel}</kernel><initrd>{initramfs}</initrd>\
             <cmdline>console=ttyS0 quiet panic=-1 {words}</cmdline><smbios mode='sysinfo'/></os>\
             <features><acpi/><apic/><vmport state='on'/></features>\
             <cpu mode='custom' match='exact'><model>qemu64</model>\
             <topology sockets='{maximum}' cores='1' threads='1'/>\
             <feature name='hypervisor' policy='disable'/>{numa}</cpu>\
             <on_crash>destroy</on_crash>\
             <devices>{device}<channel type='unix'>\
             <target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <serial type='file'><source path='{console}'/></serial>\
             {balloon}{panic}\
             <controller type='usb' model='none'/></devices></domain>"
        )
    }

    /// Returns the file of the guest's console. A domain's name may contain characters that a file
    /// name may not.
    fn console(&self, files: &Path) -> PathBuf {
        let name: String = self.name.chars().filter(|c| c.is_alphanumeric()).collect();
        files.join(format!("{name}.console"))
    }
}

/// A libvirt on which guests run.
pub(crate) trait Host: Sync {
    /// Returns the output of virsh.
    ///
    /// # Errors
    /// virsh fails; with its output and the daemon's.
    fn virsh(&self, arguments: &[&str]) -> anyhow::Result<String>;

    /// Returns a directory for files of QEMU.
    fn directory(&self) -> &Path;
}

impl Host for Libvirtd {
    fn virsh(&self, arguments: &[&str]) -> anyhow::Result<String> {
        Self::virsh(self, arguments)
    }

    fn directory(&self) -> &Path {
        Self::directory(self)
    }
}

/// A running guest; ended when dropped.
pub(crate) struct Guest<'l> {
    host: &'l dyn Host,
    name: String,
    persistent: bool,
    console: PathBuf,
}

/// The guest's own report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Witness {
    /// Its kernel's CPUs: `0-2`.
    pub(crate) present: String,
    /// Its CPUs that are online.
    pub(crate) online: String,
    /// Its MemTotal, in KiB.
    pub(crate) total_kib: u64,
}

impl<'l> Guest<'l> {
    /// Starts a guest and returns when it is ready, with its agent if it has one.
    ///
    /// # Errors
    /// The guest cannot be built or started, or does not become ready; with its console.
    pub(crate) async fn start(
        libvirtd: &'l Libvirtd,
        config: &GuestConfig<'_>,
    ) -> anyhow::Result<Self> {
        let guest = Self::boot(libvirtd, config)?;
        guest.ready().await?;
        guest.agent(config.words).await?;
        Ok(guest)
    }

    /// Waits for the agent that a guest with these words has.
    ///
    /// # Errors
    /// A timeout.
    pub(crate) async fn agent(&self, words: &str) -> anyhow::Result<()> {
        if words.contains("lab.agent=sync") || words.contains("lab.block=") {
            eventually(BOOT, async || {
                let xml = self.host.virsh(&["dumpxml", &self.name])?;
                ensure!(xml.contains("state='connected'"), "no agent: {xml}");
                Ok(())
            })
            .await?;
        } else if !words.contains("lab.agent=no") {
            eventually(BOOT, async || {
                self.host.virsh(&["guestvcpus", &self.name]).map(drop)
            })
            .await?;
        }
        Ok(())
    }

    /// Returns a guest that is not started yet, with an empty console.
    ///
    /// # Errors
    /// The console's file cannot be written.
    pub(crate) fn new(
        host: &'l dyn Host,
        name: &str,
        persistent: bool,
        console: PathBuf,
    ) -> anyhow::Result<Self> {
        fs::write(&console, "")?;
        fs::set_permissions(&console, fs::Permissions::from_mode(0o666))?;
        Ok(Self {
            host,
            name: name.to_owned(),
            persistent,
            console,
        })
    }

    /// Starts a guest and returns while it is still in its firmware.
    ///
    /// # Errors
    /// The guest cannot be built or started.
    pub(crate) fn boot(libvirtd: &'l Libvirtd, config: &GuestConfig<'_>) -> anyhow::Result<Self> {
        let files = libvirtd.directory().join("guest");
        provide(&files)?;
        let console = config.console(&files);
        let guest = Self::new(libvirtd, config.name, config.persistent, console)?;
        let definition = guest.console.with_extension("xml");
        fs::write(&definition, config.xml(&files))?;
        let definition = definition.to_string_lossy();
        if config.persistent {
            libvirtd.virsh(&["define", &definition])?;
            libvirtd.virsh(&["start", config.name])?;
        } else {
            libvirtd.virsh(&["create", &definition])?;
        }
        Ok(guest)
    }

    /// Waits until the guest has booted.
    ///
    /// # Errors
    /// A timeout, with the console.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        self.says("lab: ready").await
    }

    /// Waits for a text on the guest's console.
    ///
    /// # Errors
    /// A timeout, with the console.
    pub(crate) async fn says(&self, words: &str) -> anyhow::Result<()> {
        eventually(BOOT, async || {
            let console = self.console()?;
            ensure!(
                console.contains(words),
                "the guest does not say '{words}':\n{console}"
            );
            Ok(())
        })
        .await
    }

    /// Runs a program through the guest's agent without waiting for it.
    ///
    /// # Errors
    /// The agent does not answer, or the program does not exist.
    pub(crate) fn runs(&self, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let command = json!({
            "execute": "guest-exec",
            "arguments": {"path": program, "arg": arguments},
        });
        let command = command.to_string();
        self.host
            .virsh(&["qemu-agent-command", &self.name, &command])
            .map(drop)
    }

    /// Returns the guest's last report.
    ///
    /// # Errors
    /// The guest has not reported yet.
    pub(crate) fn witness(&self) -> anyhow::Result<Witness> {
        let console = self.console()?;
        let line = console
            .lines()
            .rfind(|line| line.starts_with("lab: present="))
            .with_context(|| format!("the guest has not said what it sees:\n{console}"))?;
        let field = |name: &str| {
            let mut words = line.split_whitespace();
            words
                .find_map(|word| word.strip_prefix(name))
                .with_context(|| format!("no {name} in '{line}'"))
        };
        Ok(Witness {
            present: field("present=")?.to_owned(),
            online: field("online=")?.to_owned(),
            total_kib: field("total=")?.parse()?,
        })
    }

    /// Waits for a matching report of the guest.
    ///
    /// # Errors
    /// A timeout, with the last report.
    pub(crate) async fn sees(
        &self,
        expected: impl Fn(&Witness) -> bool,
    ) -> anyhow::Result<Witness> {
        eventually(BOOT, async || {
            let witness = self.witness()?;
            ensure!(expected(&witness), "the guest sees {witness:?}");
            Ok(witness)
        })
        .await
    }

    /// Returns the console so far. Bytes that are not UTF-8 are replaced.
    fn console(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.console)?).replace('\r', ""))
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // The test may have ended it already.
        self.host.virsh(&["destroy", &self.name]).ok();
        if self.persistent {
            self.host.virsh(&["undefine", &self.name]).ok();
        }
    }
}

/// Copies the guest's kernel and initramfs to where the daemon's user can read them: the cache may be
/// in a private home directory.
pub(crate) fn provide(files: &Path) -> anyhow::Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if !files.is_dir() {
        let built = build()?;
        let draft = files.with_extension("draft");
        fs::create_dir_all(&draft)?;
        for file in ["vmlinuz", "initramfs.gz"] {
            fs::copy(built.join(file), draft.join(file))?;
        }
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o755))?;
        fs::rename(draft, files)?;
    }
    drop(guard);
    Ok(())
}

/// Returns the directory of the built guest. The first call builds it, which takes a minute.
fn build() -> anyhow::Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/build-guest.sh");
    let output = Command::new(&script)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", script.display()))?;
    ensure!(output.status.success(), "the lab's guest cannot be built");
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}
