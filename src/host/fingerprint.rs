//! A cheap value that changes when a new probe may find something else.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Equal as long as nothing changed. Good within one process only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u64);

/// What of KVM's modules a probe depends on: whether they are loaded, from which build, and
/// whether they nest. Contents, because sysfs makes up its files' times when they are looked at.
const MODULES: [&str; 4] = ["kvm", "kvm_intel", "kvm_amd", "kvm_hv"];
const OF_A_MODULE: [&str; 3] = ["srcversion", "parameters/nested", "taint"];

/// Looks at the emulators' files, KVM's device and KVM's modules, all below `root`: some twenty
/// system calls, nothing is executed or opened for writing.
///
/// These are what libvirt's own cache of capabilities goes by, as far as they can change without
/// a restart of the machine (`virQEMUCapsIsValid`).
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
                    changed(&file),
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
                changed(&device),
            )
        })
        .hash(&mut hasher);
    for module in MODULES {
        let directory = root.join("sys/module").join(module);
        directory.exists().hash(&mut hasher);
        for file in OF_A_MODULE {
            fs::read(directory.join(file)).ok().hash(&mut hasher);
        }
    }
    Fingerprint(hasher.finish())
}

fn changed(file: &fs::Metadata) -> (i64, i64) {
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
    fn it_stays_while_nothing_changes() {
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
    fn it_changes_with(#[case] change: fn(&Path) -> std::io::Result<()>) {
        let root = machine();
        // So that the mode that a case sets is another than before, whatever the umask is.
        let kvm = root.path().join("dev/kvm");
        fs::set_permissions(kvm, fs::Permissions::from_mode(0o666)).unwrap();
        let before = now(&root);
        change(root.path()).unwrap();
        assert_ne!(now(&root), before);
    }

    #[test]
    fn another_emulator_is_another_value() {
        let root = machine();
        let two = fingerprint(root.path(), &[EMULATOR, "/usr/bin/qemu-system-s390x"]);
        assert_ne!(two, now(&root));
    }
}
