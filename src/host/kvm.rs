//! What KVM itself says, by ioctl on /dev/kvm.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;

use crate::capability::KvmHyperv;
use crate::ffi;

/// `linux/kvm.h`.
const KVM_CAP_NR_VCPUS: u32 = 9;
const KVM_CAP_MAX_VCPUS: u32 = 66;

/// KVM's device, if it is there and we may open it.
pub(super) fn open(root: &Path) -> Option<File> {
    let path = root.join("dev/kvm");
    OpenOptions::new().read(true).write(true).open(path).ok()
}

/// The most vCPUs one domain can have. `None` if this is not KVM.
///
/// The kernel's rule for old ones (Documentation/virt/kvm/api.rst, 4.7): without
/// `KVM_CAP_MAX_VCPUS` the recommended number is the limit, and without that it is 4.
pub(super) fn max_vcpus(kvm: &File) -> Option<u32> {
    let ask = |capability| ffi::kvm_extension(kvm.as_fd(), capability).ok();
    let known = |number: &u32| *number > 0;
    let maximum = ask(KVM_CAP_MAX_VCPUS)?;
    Some(maximum)
        .filter(known)
        .or_else(|| ask(KVM_CAP_NR_VCPUS).filter(known))
        .or(Some(4))
}

/// The Hyper-V enlightenments; `None` if one of the questions fails, as half an answer would
/// look like enlightenments that are not there.
pub(super) fn hyperv(kvm: &File) -> Option<KvmHyperv> {
    let registers = ffi::kvm_msr_indices(kvm.as_fd()).ok()?;
    let extensions = KvmHyperv::EXTENSIONS
        .iter()
        .map(|(_, capability)| {
            Some((
                *capability,
                ffi::kvm_extension(kvm.as_fd(), *capability).ok()? > 0,
            ))
        })
        .collect::<Option<Vec<_>>>()?;
    Some(KvmHyperv::derive(
        |capability| extensions.contains(&(capability, true)),
        &registers,
    ))
}
