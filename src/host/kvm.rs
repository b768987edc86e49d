//! KVM's capabilities, by ioctl on /dev/kvm. The kernel answers at once.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;

use crate::capability::KvmHyperv;
use crate::ffi;

/// `linux/kvm.h`
const KVM_CAP_NR_VCPUS: u32 = 9;
const KVM_CAP_MAX_VCPUS: u32 = 66;

/// Opens KVM's device; `None` if it does not exist or permission is missing.
pub(super) fn open(root: &Path) -> Option<File> {
    let path = root.join("dev/kvm");
    OpenOptions::new().read(true).write(true).open(path).ok()
}

/// Returns the maximum number of vCPUs per domain; `None` if the file is not KVM's device.
///
/// Old kernels (Documentation/virt/kvm/api.rst, 4.7): without `KVM_CAP_MAX_VCPUS` the recommended
/// number is the limit, and without that the limit is 4.
pub(super) fn max_vcpus(kvm: &File) -> Option<u32> {
    let query = |capability| ffi::kvm_extension(kvm.as_fd(), capability).ok();
    let known = |number: &u32| *number > 0;
    Some(query(KVM_CAP_MAX_VCPUS)?)
        .filter(known)
        .or_else(|| query(KVM_CAP_NR_VCPUS).filter(known))
        .or(Some(4))
}

/// Returns the Hyper-V enlightenments; `None` if any ioctl fails, because an incomplete list would
/// look like missing enlightenments.
pub(super) fn hyperv(kvm: &File) -> Option<KvmHyperv> {
    let registers = ffi::kvm_msr_indices(kvm.as_fd()).ok()?;
    let extensions = KvmHyperv::EXTENSIONS
        .iter()
        .map(|(_, capability)| {
            let supported = ffi::kvm_extension(kvm.as_fd(), *capability).ok()? > 0;
            Some((*capability, supported))
        })
        .collect::<Option<Vec<_>>>()?;
    Some(KvmHyperv::derive(
        |capability| extensions.contains(&(capability, true)),
        &registers,
    ))
}
