//! Survey of the whole host for the doctor. It changes, executes and connects to nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{major, minor};
use nix::unistd::{AccessFlags, Uid, access};

use super::{MAX_FILE_BYTES, NESTED, entries, exists, is_on, kvm, meminfo, read_up_to, text};
use crate::doctor::checks::GIVEN_SOCKET;
use crate::doctor::checks::observed::{
    Accounts, BootLoader, CpuInfo, DeviceNode, HostSurvey, HugePages, IommuSurvey, Kvm, OpenError,
    Socket, SocketState, Vfio,
};
use crate::units::{Bytes, KiB};

/// Number of bytes of cpuinfo that include the first processor on every architecture.
const FIRST_PROCESSOR_BYTES: u64 = 64 * 1024;

const MODULES: [&str; 5] = ["kvm", "kvm_intel", "kvm_amd", "kvm_hv", "kvm_pr"];
const SOCKETS: [&str; 3] = ["libvirt-sock", "virtqemud-sock", "virtlogd-sock"];
const DAEMONS: [&str; 3] = ["libvirtd", "virtqemud", "virtlogd"];
const UNIT_DIRECTORIES: [&str; 3] = [
    "etc/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];
const POLKIT: [&str; 4] = [
    "usr/lib/polkit-1/polkitd",
    "usr/libexec/polkitd",
    "usr/lib/policykit-1/polkitd",
    "usr/libexec/polkit-1/polkitd",
];

/// Surveys the host below `root` with about two hundred small reads, none of which waits for a device
/// or another process. `socket` is the path of the configured libvirt socket in this process.
pub fn survey(root: &Path, socket: Option<&Path>) -> HostSurvey {
    let is_here = root == Path::new("/");
    let arch = super::arch(root);
    let in_pod = is_here && std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    let has_mark = in_pod || exists(root, &[".dockerenv", "run/.containerenv"]);
    let in_container = has_mark && !has_initial_namespaces(root);
    // In a mount of the host's root, "self" would be this process in its container.
    let process = if is_here { "proc/self" } else { "proc/1" };
    let cpu = cpu(root, &arch);
    HostSurvey {
        is_root: Uid::effective().is_root(),
        in_container,
        systemd: exists(root, &["run/systemd/system"]),
        udev: exists(root, &["etc/udev/rules.d"]),
        distribution: distribution(root),
        guest_of: guest_of(root, &arch, cpu.as_ref()),
        cpu,
        kvm: survey_kvm(root),
        kernel_arguments: text(root, "proc/cmdline")
            .map(|line| line.split_whitespace().map(str::to_owned).collect()),
        boot_loader: boot_loader(root),
        iommu: iommu(root),
        vfio: Vfio {
            vfio: exists(root, &["dev/vfio/vfio", "sys/class/misc/vfio"]),
            iommufd: exists(root, &["dev/iommu", "sys/class/misc/iommu"]),
            unsafe_interrupts: is_on(
                root,
                "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
            ),
            no_iommu: is_on(
                root,
                "sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
            ),
        },
        huge_pages: huge_pages(root, process),
        sockets: sockets(root, socket, Some(process).filter(|_| !in_container)),
        daemons: select(&DAEMONS, |name| {
            exists(
                root,
                &[&format!("usr/sbin/{name}"), &format!("usr/bin/{name}")],
            )
        }),
        units: ["libvirtd.socket", "virtqemud.socket", "virtlogd.socket"]
            .into_iter()
            .filter(|unit| has_unit(root, unit))
            .map(str::to_owned)
            .collect(),
        polkit: exists(root, &POLKIT),
        logs_to_file: logs_to_file(root),
        virtnode_unit: has_unit(root, "virtnode.service"),
        accounts: accounts(root),
        arch,
    }
}

/// True if this process runs in the host's own namespaces, whose numbers are fixed
/// (`PROC_*_INIT_INO`, linux/proc_ns.h). A file from an image can claim otherwise.
fn has_initial_namespaces(root: &Path) -> bool {
    [
        ("ipc", 0xEFFF_FFFF_u32),
        ("uts", 0xEFFF_FFFE),
        ("pid", 0xEFFF_FFFC),
        ("cgroup", 0xEFFF_FFFB),
    ]
    .iter()
    .all(|(kind, number)| {
        let link = fs::read_link(root.join("proc/self/ns").join(kind));
        link.is_ok_and(|link| link == Path::new(&format!("{kind}:[{number}]")))
    })
}

fn select(names: &[&str], exists: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let existing = names.iter().filter(|name| exists(name));
    existing.map(|name| (*name).to_owned()).collect()
}

fn has_unit(root: &Path, unit: &str) -> bool {
    UNIT_DIRECTORIES
        .iter()
        .any(|directory| root.join(directory).join(unit).exists())
}

fn distribution(root: &Path) -> Vec<String> {
    let text = text(root, "etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_default()
            .trim_matches(['"', '\''])
            .to_owned()
    };
    [value("ID="), value("ID_LIKE=")]
        .iter()
        .flat_map(|words| words.split_whitespace())
        .map(str::to_owned)
        .collect()
}

/// Reads the first processor's entries in cpuinfo, whose keys depend on the architecture.
fn cpu(root: &Path, arch: &str) -> Option<CpuInfo> {
    // Power lists the platform after all processors.
    let limit = if arch.starts_with("ppc") {
        MAX_FILE_BYTES
    } else {
        FIRST_PROCESSOR_BYTES
    };
    let text = read_up_to(&root.join("proc/cpuinfo"), limit).ok()?;
    let value = |keys: &[&str]| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            keys.contains(&key.trim()).then(|| value.trim().to_owned())
        })
    };
    let flags = value(&["flags", "Features", "features", "isa"]).unwrap_or_default();
    Some(CpuInfo {
        flags: flags.split_whitespace().map(str::to_owned).collect(),
        vendor: value(&["vendor_id"]),
        platform: value(&["platform"]),
    })
}

/// Returns the hypervisor that this host is a guest of: by the CPU flag on x86, the device tree, the
/// entry of z/VM or KVM in sysinfo on s390x, or DMI names that only virtual machines have.
fn guest_of(root: &Path, arch: &str, cpu: Option<&CpuInfo>) -> Option<String> {
    let vendor = text(root, "sys/class/dmi/id/sys_vendor").unwrap_or_default();
    let product = text(root, "sys/class/dmi/id/product_name").unwrap_or_default();
    if matches!(arch, "x86_64" | "i686") {
        let is_guest = cpu?.flags.contains("hypervisor");
        return is_guest.then(|| match (vendor.as_str(), product.as_str()) {
            ("", _) => "a hypervisor without a name".to_owned(),
            (vendor, "") => vendor.to_owned(),
            (vendor, product) => format!("{vendor} {product}"),
        });
    }
    if let Some(compatible) = text(root, "proc/device-tree/hypervisor/compatible") {
        return Some(compatible.trim_matches('\0').replace('\0', " "));
    }
    let sysinfo = text(root, "proc/sysinfo").unwrap_or_default();
    let control = sysinfo
        .lines()
        .find_map(|line| line.strip_prefix("VM00 Control Program:"));
    if let Some(control) = control {
        return Some(control.trim().to_owned());
    }
    let virtual_only = ["QEMU", "Amazon EC2", "VMware, Inc.", "KVM", "Google"];
    (virtual_only.contains(&vendor.as_str()) || product == "Virtual Machine").then_some(vendor)
}

fn survey_kvm(root: &Path) -> Kvm {
    let parameter = NESTED.iter().find(|path| text(root, path).is_some());
    Kvm {
        device: device(&root.join("dev/kvm")),
        registered: exists(root, &["sys/class/misc/kvm"]),
        modules: select(&MODULES, |name| root.join("sys/module").join(name).exists()),
        max_vcpus: kvm::open(root).as_ref().and_then(kvm::max_vcpus),
        nested: parameter.map(|path| is_on(root, path)),
    }
}

fn device(path: &Path) -> DeviceNode {
    let node = match fs::metadata(path) {
        Ok(node) => node,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return DeviceNode::Missing,
        Err(error) => return DeviceNode::Hidden(error.to_string()),
    };
    if !node.file_type().is_char_device() {
        return DeviceNode::NoDevice;
    }
    let number = (major(node.rdev()), minor(node.rdev()));
    let open = match File::options().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EACCES | Errno::EPERM) => OpenError::NotAllowed,
            Some(Errno::ENODEV | Errno::ENXIO) => OpenError::NoDriver,
            _ => OpenError::Other,
        }),
    };
    DeviceNode::Node {
        number,
        mode: node.mode() & 0o777,
        uid: node.uid(),
        gid: node.gid(),
        open,
    }
}

fn boot_loader(root: &Path) -> BootLoader {
    if exists(root, &["usr/sbin/grubby", "usr/bin/grubby"]) {
        return BootLoader::Grubby;
    }
    let file = text(root, "etc/default/grub").unwrap_or_default();
    let quoted = file
        .lines()
        .any(|line| line.starts_with("GRUB_CMDLINE_LINUX=\""));
    if quoted && exists(root, &["usr/sbin/update-grub"]) {
        BootLoader::UpdateGrub
    } else {
        BootLoader::Unknown
    }
}

fn iommu(root: &Path) -> IommuSurvey {
    let mut devices = entries(&root.join("sys/class/iommu"));
    devices.sort_unstable();
    let groups = entries(&root.join("sys/kernel/iommu_groups"));
    let types: Vec<String> = groups
        .iter()
        .filter_map(|group| text(root, &format!("sys/kernel/iommu_groups/{group}/type")))
        .collect();
    let tables = root.join("sys/firmware/acpi/tables");
    IommuSurvey {
        devices,
        groups: groups.len(),
        identity: types.iter().filter(|kind| *kind == "identity").count(),
        typed: types.len(),
        tables: tables.is_dir().then(|| {
            let tables = entries(&tables);
            select(&["DMAR", "IVRS"], |name| {
                tables.iter().any(|table| table == name)
            })
        }),
    }
}

fn huge_pages(root: &Path, process: &str) -> Vec<HugePages> {
    const DIRECTORY: &str = "sys/kernel/mm/hugepages";
    let mounted = mounted_sizes(root, process);
    let mut all: Vec<HugePages> = entries(&root.join(DIRECTORY))
        .into_iter()
        .filter_map(|name| {
            let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            let size = KiB::new(kib.parse().ok()?).map(Bytes::from)?;
            let count = |file: &str| {
                text(root, &format!("{DIRECTORY}/{name}/{file}"))?
                    .parse()
                    .ok()
            };
            Some(HugePages {
                size,
                reserved: count("nr_hugepages")?,
                free: count("free_hugepages")?,
                mounted: mounted.as_ref().map(|sizes| sizes.contains(&size)),
            })
        })
        .collect();
    all.sort_unstable_by_key(|pages| pages.size);
    all
}

/// Returns the page sizes with a mounted hugetlbfs; `None` if the mounts cannot be read.
fn mounted_sizes(root: &Path, process: &str) -> Option<BTreeSet<Bytes>> {
    let mounts = text(root, &format!("{process}/mounts"))?;
    let default = meminfo(root, "Hugepagesize:");
    let sizes = mounts.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(2);
        if fields.next()? != "hugetlbfs" {
            return None;
        }
        let options = fields.next().unwrap_or_default();
        let size = options.split(',').find_map(|o| o.strip_prefix("pagesize="));
        match size {
            // The kernel writes 2M and 1024M.
            Some(size) => format!("{size}iB").parse().ok(),
            None => default,
        }
    });
    Some(sizes.collect())
}

/// Surveys libvirt's sockets. Listeners come from the kernel's list of sockets, because libvirt logs
/// an error for a connection that is closed at once.
fn sockets(root: &Path, given: Option<&Path>, process: Option<&str>) -> BTreeMap<String, Socket> {
    let listening: Option<BTreeSet<PathBuf>> = process
        .and_then(|process| text(root, &format!("{process}/net/unix")))
        .map(|text| {
            text.lines()
                .filter_map(|line| {
                    let fields: Vec<&str> = line.split_whitespace().collect();
                    // __SO_ACCEPTCON
                    let listens = fields.get(3) == Some(&"00010000");
                    let path = fields.get(7).filter(|_| listens)?;
                    Some(without_var(Path::new(path)))
                })
                .collect()
        });
    let usual = SOCKETS.map(|name| {
        let path = Path::new("/run/libvirt").join(name);
        (
            name,
            root.join(path.strip_prefix("/").unwrap_or(&path)),
            path,
        )
    });
    let given = given.map(|path| (GIVEN_SOCKET, path.to_owned(), path.to_owned()));
    usual
        .into_iter()
        .chain(given)
        .filter_map(|(name, here, path)| {
            let node = fs::metadata(&here).ok()?;
            let state = match (access(&here, AccessFlags::W_OK), &listening) {
                (Err(_), _) => SocketState::NotAllowed,
                (_, None) => SocketState::Unknown,
                (_, Some(all)) if all.contains(&without_var(&path)) => SocketState::Listens,
                (_, Some(_)) => SocketState::Refused,
            };
            let socket = Socket {
                mode: node.mode() & 0o777,
                uid: node.uid(),
                gid: node.gid(),
                state,
            };
            Some((name.to_owned(), socket))
        })
        .collect()
}

/// Replaces `/var/run` by `/run`, which it links to.
fn without_var(path: &Path) -> PathBuf {
    match path.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest),
        Err(_) => path.to_owned(),
    }
}

const QEMU_CONF: &str = "etc/libvirt/qemu.conf";

/// Returns the value of `name = "value"` in qemu.conf.
fn setting(text: &str, name: &str) -> Option<String> {
    let value = text.lines().find_map(|line| {
        let rest = line.trim_start().strip_prefix(name)?.trim_start();
        rest.strip_prefix('=')
    })?;
    let value = value.split('#').next().unwrap_or_default();
    Some(value.trim().trim_matches('"').to_owned()).filter(|value| !value.is_empty())
}

fn logs_to_file(root: &Path) -> Option<bool> {
    match read_up_to(&root.join(QEMU_CONF), MAX_FILE_BYTES) {
        Ok(text) => Some(setting(&text, "stdio_handler").as_deref() == Some("file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(false),
        Err(_) => None,
    }
}

fn accounts(root: &Path) -> Accounts {
    let passwd = text(root, "etc/passwd").unwrap_or_default();
    let group = text(root, "etc/group").unwrap_or_default();
    Accounts {
        users: passwd
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?.to_owned();
                let mut number = || fields.nth(1)?.parse().ok();
                let uid = number()?;
                let gid = fields.next()?.parse().ok()?;
                Some((name, (uid, gid)))
            })
            .collect(),
        groups: group
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?.to_owned();
                let gid = fields.nth(1)?.parse().ok()?;
                let members = fields.next().unwrap_or_default().split(',');
                let members = members.filter(|name| !name.is_empty());
                Some((name, (gid, members.map(str::to_owned).collect())))
            })
            .collect(),
        configured: text(root, QEMU_CONF)
            .map(|text| (setting(&text, "user"), setting(&text, "group"))),
        own_uid: Uid::effective().as_raw(),
    }
}
