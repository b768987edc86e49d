//! Facts about the host from sysfs, procfs and KVM's device.
//!
//! All paths are below a root: `/`, a mount of the host's root in a container, or a directory in a
//! test. A missing or unreadable file is not an error: the fact is absent. All reads are
//! synchronous and bounded in size; none waits for a device.

mod fingerprint;
mod kvm;
mod survey;

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

pub use fingerprint::{Fingerprint, fingerprint};
pub use survey::survey;

use crate::capability::{HostFacts, IommuKind};
use crate::units::{Bytes, KiB};

/// Maximum number of bytes to read of a file; passwd and cpuinfo of large hosts are smaller.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// The parameter of each architecture's KVM module that enables nested virtualization.
const NESTED: [&str; 4] = [
    "sys/module/kvm_intel/parameters/nested",
    "sys/module/kvm_amd/parameters/nested",
    "sys/module/kvm/parameters/nested",    // s390x
    "sys/module/kvm_hv/parameters/nested", // ppc64
];

/// Reads all facts with some dozen system calls.
pub fn read(root: &Path) -> HostFacts {
    let kvm = kvm::open(root);
    let arch = arch(root);
    let iommu_groups = entries(&root.join("sys/kernel/iommu_groups")).len();
    HostFacts {
        kvm_max_vcpus: kvm.as_ref().and_then(kvm::max_vcpus),
        kvm_hyperv: kvm
            .as_ref()
            .filter(|_| arch == "x86_64")
            .and_then(kvm::hyperv),
        iommu: iommu(&entries(&root.join("sys/class/iommu")), iommu_groups),
        iommu_groups: u32::try_from(iommu_groups).unwrap_or(u32::MAX),
        vfio: exists(root, &["dev/vfio/vfio", "sys/class/misc/vfio"]),
        iommufd: exists(root, &["dev/iommu", "sys/class/misc/iommu"]),
        nested: NESTED.iter().any(|path| is_on(root, path)),
        realtime: text(root, "proc/sys/kernel/sched_rt_runtime_us").as_deref() == Some("-1"),
        arch,
    }
}

/// Returns the memory that the kernel can allocate without swapping.
pub fn available_memory(root: &Path) -> Option<Bytes> {
    meminfo(root, "MemAvailable:")
}

fn meminfo(root: &Path, field: &str) -> Option<Bytes> {
    let text = text(root, "proc/meminfo")?;
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    KiB::new(kib).map(Bytes::from)
}

/// Determines the kind by the names of the IOMMU devices: `dmar0`, `ivhd0`, `smmu3.0x9050000`. Groups
/// without such a device belong to another architecture or to virtio-iommu.
fn iommu(devices: &[String], groups: usize) -> IommuKind {
    let any = |prefix: &str| devices.iter().any(|device| device.starts_with(prefix));
    if any("dmar") {
        IommuKind::VtD
    } else if any("ivhd") {
        IommuKind::AmdVi
    } else if any("smmu") {
        IommuKind::Smmu
    } else if groups > 0 {
        IommuKind::Other
    } else {
        IommuKind::None
    }
}

/// Returns the kernel's architecture (since Linux 6.1), else the one this program was built for.
fn arch(root: &Path) -> String {
    text(root, "proc/sys/kernel/arch")
        .filter(|arch| !arch.is_empty())
        .unwrap_or_else(|| {
            let arch = match std::env::consts::ARCH {
                "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
                "powerpc64" => "ppc64",
                arch => arch,
            };
            arch.to_owned()
        })
}

/// True if the module parameter is set. The kernel writes `Y` for booleans, `1` for integers.
fn is_on(root: &Path, parameter: &str) -> bool {
    matches!(text(root, parameter).as_deref(), Some("Y" | "y" | "1"))
}

fn exists(root: &Path, any_of: &[&str]) -> bool {
    any_of.iter().any(|path| root.join(path).exists())
}

/// Returns the trimmed content of a file; `None` if it cannot be read.
fn text(root: &Path, path: &str) -> Option<String> {
    let text = read_up_to(&root.join(path), MAX_FILE_BYTES).ok()?;
    Some(text.trim().to_owned())
}

fn read_up_to(path: &Path, limit: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use tempfile::TempDir;

    use super::*;

    fn put(root: &TempDir, path: &str, text: &str) {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(available_memory(root.path()), None);
        fs::create_dir(root.path().join("proc")).unwrap();
        let text = "MemTotal:       16314332 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\n";
        fs::write(root.path().join("proc/meminfo"), text).unwrap();
        let available = KiB::new(12_000_000).map(Bytes::from);
        assert_eq!(available_memory(root.path()), available);
    }

    #[test]
    fn empty_root_yields_only_the_architecture() {
        let root = TempDir::new().unwrap();
        let facts = read(root.path());
        assert_eq!(
            facts,
            HostFacts {
                arch: facts.arch.clone(),
                ..HostFacts::default()
            }
        );
        assert!(!facts.arch.is_empty());
    }

    #[test]
    fn all_facts_of_a_host_are_read() {
        let root = TempDir::new().unwrap();
        put(&root, "proc/sys/kernel/arch", "x86_64\n");
        put(&root, "proc/sys/kernel/sched_rt_runtime_us", "-1\n");
        put(&root, "sys/class/iommu/dmar0/intel-iommu/version", "1:0\n");
        for group in ["0", "1", "2"] {
            put(
                &root,
                &format!("sys/kernel/iommu_groups/{group}/type"),
                "DMA\n",
            );
        }
        put(&root, "dev/vfio/vfio", "");
        put(&root, "sys/class/misc/iommu/dev", "10:1\n");
        put(&root, "sys/module/kvm_intel/parameters/nested", "Y\n");
        // The file opens, but is not KVM's device.
        put(&root, "dev/kvm", "");
        assert_eq!(
            read(root.path()),
            HostFacts {
                arch: "x86_64".to_owned(),
                kvm_max_vcpus: None,
                kvm_hyperv: None,
                iommu: IommuKind::VtD,
                iommu_groups: 3,
                vfio: true,
                iommufd: true,
                nested: true,
                realtime: true,
            }
        );
    }

    #[rstest]
    #[case(&["dmar0", "dmar1"], 20, IommuKind::VtD)]
    #[case(&["ivhd0"], 20, IommuKind::AmdVi)]
    #[case(&["smmu3.0x0000000009050000"], 3, IommuKind::Smmu)]
    #[case(&["virtio0"], 2, IommuKind::Other)]
    #[case(&[], 2, IommuKind::Other)]
    #[case(&[], 0, IommuKind::None)]
    fn iommu_devices_determine_the_kind(
        #[case] devices: &[&str],
        #[case] groups: usize,
        #[case] expected: IommuKind,
    ) {
        let devices: Vec<String> = devices.iter().map(|&device| device.to_owned()).collect();
        assert_eq!(iommu(&devices, groups), expected);
    }

    #[rstest]
    #[case("sys/module/kvm_amd/parameters/nested", "1\n", true)]
    #[case("sys/module/kvm/parameters/nested", "1\n", true)]
    #[case("sys/module/kvm_intel/parameters/nested", "N\n", false)]
    #[case("sys/module/kvm_amd/parameters/nested", "0\n", false)]
    fn module_parameter_determines_nested(
        #[case] path: &str,
        #[case] value: &str,
        #[case] expected: bool,
    ) {
        let root = TempDir::new().unwrap();
        put(&root, path, value);
        assert_eq!(read(root.path()).nested, expected);
    }

    #[test]
    fn facts_of_this_host_are_consistent() {
        let facts = read(Path::new("/"));
        assert_eq!(
            facts.arch,
            std::env::consts::ARCH.replace("powerpc64", "ppc64le")
        );
        assert!(facts.iommu_groups == 0 || facts.iommu != IommuKind::None);
        if let Some(maximum) = facts.kvm_max_vcpus {
            assert!(maximum >= 1);
        }
    }
}
