//! A hash of the files that capabilities depend on, cheap enough to compute every few seconds.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Comparable only within one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u64);

const MODULES: [&str; 4] = ["kvm", "kvm_intel", "kvm_amd", "kvm_hv"];
/// Files of a loaded module: its build and whether it supports nesting. Their contents are hashed,
/// because sysfs does not maintain modification times.
const MODULE_FILES: [&str; 3] = ["srcversion", "parameters/nested", "taint"];

/// Hashes the metadata of the emulators and of KVM's device, and the state of KVM's modules, below
/// `root`: about twenty system calls. Nothing is executed or opened for writing.
///
/// libvirt invalidates its cache of capabilities by the same files (`virQEMUCapsIsValid`), apart
/// from those that change only with a reboot.
pub fn fingerprint<P: AsRef<Path>>(root: &Path, emulators: &[P]) -> Fingerprint {
    let mut hasher = DefaultHasher::new();
    for emulator in emulators {
        let emulator = emulator.as_ref();
        let path = root.join(emulator.strip_prefix("/").unwrap_or(emulator));
        emulator.hash(&mut hasher);
        fs::metadata(path)
            .ok()
            .map(|file| {
                (
                    file.dev(),
                    file.ino(),
                    file.size(),
                    file.mtime(),
                    change_time(&file),
                )
            })
            .hash(&mut hasher);
    }
    fs::metadata(root.join("dev/kvm"))
        .ok()
        .map(|device| {
            (
                device.ino(),
                device.mode(),
                device.uid(),
                device.gid(),
                change_time(&device),
            )
        })
        .hash(&mut hasher);
    for module in MODULES {
        let directory = root.join("sys/module").join(module);
        directory.exists().hash(&mut hasher);
        for file in MODULE_FILES {
            fs::read(directory.join(file)).ok().hash(&mut hasher);
        }
    }
    Fingerprint(hasher.finish())
}

fn change_time(file: &fs::Metadata) -> (i64, i64) {
    (file.ctime(), file.ctime_nsec())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rstest::rstest;
    use tempfile::TempDir;

    use super::*;

    const EMULATOR: &str = "/usr/bin/qemu-system-x86_64";

    fn machine() -> TempDir {
        let root = TempDir::new().unwrap();
        for (path, text) in [
            ("usr/bin/qemu-system-x86_64", "one"),
            ("dev/kvm", ""),
            ("sys/module/kvm/srcversion", "A1"),
            ("sys/module/kvm_amd/parameters/nested", "1"),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn now(root: &TempDir) -> Fingerprint {
        fingerprint(root.path(), &[EMULATOR])
    }

    #[test]
    fn reading_a_file_does_not_change_fingerprint() {
        let root = machine();
        let before = now(&root);
        fs::read(root.path().join("usr/bin/qemu-system-x86_64")).unwrap();
        assert_eq!(now(&root), before);
    }

    #[rstest]
    #[case::emulator_replaced(|root: &Path| fs::write(root.join("usr/bin/qemu-system-x86_64"), "three"))]
    #[case::emulator_removed(|root: &Path| fs::remove_file(root.join("usr/bin/qemu-system-x86_64")))]
    #[case::kvm_closed(|root: &Path| fs::set_permissions(root.join("dev/kvm"), fs::Permissions::from_mode(0o600)))]
    #[case::kvm_gone(|root: &Path| fs::remove_file(root.join("dev/kvm")))]
    #[case::module_loaded(|root: &Path| fs::create_dir(root.join("sys/module/kvm_intel")))]
    #[case::module_replaced(|root: &Path| fs::write(root.join("sys/module/kvm/srcversion"), "B2"))]
    #[case::nesting_off(|root: &Path| fs::write(root.join("sys/module/kvm_amd/parameters/nested"), "0"))]
    fn changed_file_changes_fingerprint(#[case] change: fn(&Path) -> std::io::Result<()>) {
        let root = machine();
        // A case that sets the mode must differ from this one, whatever the umask is.
        let kvm = root.path().join("dev/kvm");
        fs::set_permissions(kvm, fs::Permissions::from_mode(0o666)).unwrap();
        let before = now(&root);
        change(root.path()).unwrap();
        assert_ne!(now(&root), before);
    }

    #[test]
    fn additional_emulator_changes_fingerprint() {
        let root = machine();
        let two = fingerprint(root.path(), &[EMULATOR, "/usr/bin/qemu-system-s390x"]);
        assert_ne!(two, now(&root));
    }
}
