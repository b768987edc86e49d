//! Guests that do as they are told: the lab (`tests/lab/`) on a private libvirtd.
//!
//! Words on the guest's kernel command line choose what it does with what is plugged; they are
//! described in `tests/lab/guest-init`. The guest tells on its console what it sees itself, which
//! is the tests' witness beside everything that the hypervisor says.

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

/// A guest boots in 3 s alone; here many boot at once, in software emulation.
const BOOT: Duration = Duration::from_secs(180);

/// What the guest has when it boots.
const BOOT_MIB: u64 = 512;

/// The virtio-mem device's and the DIMMs' share of [`MAXIMUM_MIB`].
const VIRTIO_MEM_MIB: u64 = 2048;

/// What it can have at most.
const MAXIMUM_MIB: u64 = 4096;

/// How more memory can come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MorePossible {
    /// A virtio-mem device of 2 GiB in blocks of 2 MiB, alias `ua-mem0`, of which nothing is
    /// plugged; and slots for DIMMs.
    VirtioMem,
    /// Four slots for DIMMs.
    Dimms,
    /// Not at all: the domain has no maxMemory.
    No,
}

/// What a guest is like. The default: one vCPU of four, a virtio-mem device, an agent, balloon
/// statistics each second; it takes what it gets and leaves it offline.
#[derive(Debug, Clone)]
pub(crate) struct GuestConfig<'c> {
    /// The domain's name.
    pub(crate) name: &'c str,
    /// Words for the guest: see `tests/lab/guest-init`.
    pub(crate) words: &'c str,
    /// vCPUs at boot.
    pub(crate) vcpus: u32,
    /// vCPUs at most.
    pub(crate) maximum: u32,
    /// How more memory can come.
    pub(crate) memory: MorePossible,
    /// Whether the definition outlives the domain.
    pub(crate) persistent: bool,
}

impl Default for GuestConfig<'_> {
    fn default() -> Self {
        Self {
            name: "guest",
            words: "",
            vcpus: 1,
            maximum: 4,
            memory: MorePossible::VirtioMem,
            persistent: false,
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
        // Linux from 6.8 on leaves out the CPUs that may come later unless it knows its
        // hypervisor, and it does not know QEMU's software emulation. What it does know is
        // VMware, by the serial number of the machine and the port that QEMU has for it.
        // Each CPU in a socket of its own: it also leaves out those in a socket that is there.
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
             <memballoon model='virtio'><stats period='1'/></memballoon>\
             <controller type='usb' model='none'/></devices></domain>"
        )
    }

    /// The file of the guest's console. A domain's name may hold what a file's may not.
    fn console(&self, files: &Path) -> PathBuf {
        let name: String = self.name.chars().filter(|c| c.is_alphanumeric()).collect();
        files.join(format!("{name}.console"))
    }
}

/// A running guest; ended when dropped.
pub(crate) struct Guest<'l> {
    libvirtd: &'l Libvirtd,
    name: String,
    persistent: bool,
    console: PathBuf,
}

/// What the guest itself sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Witness {
    /// CPUs that its kernel has, as `0-2`.
    pub(crate) present: String,
    /// CPUs that it uses.
    pub(crate) online: String,
    /// Its MemTotal, in KiB.
    pub(crate) total_kib: u64,
}

impl<'l> Guest<'l> {
    /// Starts a guest and returns when it is ready, with its agent if it has one.
    ///
    /// # Errors
    /// No guest could be built or started, or it did not get ready: with its console.
    pub(crate) async fn start(
        libvirtd: &'l Libvirtd,
        config: &GuestConfig<'_>,
    ) -> anyhow::Result<Self> {
        let guest = Self::boot(libvirtd, config)?;
        guest.ready().await?;
        if !config.words.contains("lab.agent=no") {
            eventually(BOOT, async || {
                libvirtd.virsh(&["guestvcpus", config.name]).map(drop)
            })
            .await?;
        }
        Ok(guest)
    }

    /// Starts a guest and returns while it is still in its firmware.
    ///
    /// # Errors
    /// No guest could be built or started.
    pub(crate) fn boot(libvirtd: &'l Libvirtd, config: &GuestConfig<'_>) -> anyhow::Result<Self> {
        let files = libvirtd.directory().join("guest");
        provide(&files)?;
        let guest = Self {
            libvirtd,
            name: config.name.to_owned(),
            persistent: config.persistent,
            console: config.console(&files),
        };
        fs::write(&guest.console, "")?;
        fs::set_permissions(&guest.console, fs::Permissions::from_mode(0o666))?;
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

    /// Waits until the guest's own programs run.
    ///
    /// # Errors
    /// It took too long: with the console.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        self.says("lab: ready").await
    }

    /// Waits until the guest has said something on its console.
    ///
    /// # Errors
    /// It took too long: with the console.
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

    /// Has the guest's agent run a program, and does not wait for it.
    ///
    /// # Errors
    /// The agent does not answer, or there is no such program.
    pub(crate) fn runs(&self, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let command = json!({
            "execute": "guest-exec",
            "arguments": {"path": program, "arg": arguments},
        });
        let command = command.to_string();
        self.libvirtd
            .virsh(&["qemu-agent-command", &self.name, &command])
            .map(drop)
    }

    /// What the guest sees at present, by its own word.
    ///
    /// # Errors
    /// It has not said anything.
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

    /// Waits until the guest sees what is expected.
    ///
    /// # Errors
    /// It took too long: with what it sees.
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

    /// The console so far. Bytes that are no text are replaced.
    fn console(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.console)?).replace('\r', ""))
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // A test may have ended it already.
        self.libvirtd.virsh(&["destroy", &self.name]).ok();
        if self.persistent {
            self.libvirtd.virsh(&["undefine", &self.name]).ok();
        }
    }
}

/// Puts the guest's kernel and initramfs where the daemon's user can read them: the cache may be
/// in a home directory that is closed to others.
fn provide(files: &Path) -> anyhow::Result<()> {
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

/// The directory of the built guest; built at the first time, which takes a minute.
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
