//! `virtnode check --try`: starts a copy of the domain, paused, and destroys it.
//!
//! The copy is transient, has a name and a UUID of its own, and neither disks, networks, host
//! devices nor files. libvirt destroys it when the connection that started it ends
//! (`VIR_DOMAIN_START_AUTODESTROY`), so it does not outlive this command, however that ends.

use std::path::Path;

use anyhow::Context;

use super::source::CheckedDomain;
use crate::compat::{DefinitionCopy, DryRun, Trial, trial_copy};
use crate::host::available_memory;
use crate::hypervisor::{CallError, Libvirt};
use crate::units::Bytes;

/// Starts the copy if libvirt accepted the dry run and the node has the memory. Returns the result
/// and the copy.
pub(super) async fn start(
    domain: &CheckedDomain,
    dry_run: &DryRun,
    emulator: Option<&str>,
    libvirt: &Libvirt,
) -> anyhow::Result<(Trial, DefinitionCopy)> {
    let name = format!(
        "virtnode-try-{}-{:08x}",
        std::process::id(),
        fastrand::u32(..)
    );
    let copy = trial_copy(&domain.xml, &name, emulator).context("the definition is not valid")?;
    let reason = match dry_run {
        DryRun::Accepted => lacks_memory(domain, available_memory(Path::new("/"))),
        DryRun::Refused { .. } => Some("libvirt already rejects the dry run".to_owned()),
        DryRun::Failed { reason } => Some(reason.clone()),
    };
    if let Some(reason) = reason {
        return Ok((Trial::NotTried { reason }, copy));
    }
    let trial = match libvirt.try_start(copy.xml.clone()).await {
        Ok(()) => Trial::Started,
        Err(CallError::Failed { text, .. }) => Trial::Refused { words: text },
        Err(error) => Trial::NotTried {
            reason: error.to_string(),
        },
    };
    Ok((trial, copy))
}

/// Returns the reason not to start a copy that could take the memory of other domains. Huge pages
/// come from a pool of their own, which QEMU cannot exceed.
fn lacks_memory(domain: &CheckedDomain, available: Option<Bytes>) -> Option<String> {
    let requirement = &domain.requirement;
    if requirement.backing.huge_pages {
        return None;
    }
    let wanted = requirement.domain.as_ref()?.memory.asked();
    match available {
        Some(available) if wanted <= available => None,
        Some(available) => Some(format!(
            "the domain has {wanted}, but this machine has only {available} available; a copy \
             could take them from other domains"
        )),
        None => Some("the available memory of this machine is unknown".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_larger_than_the_available_memory_is_not_started() {
        let domain = |backing: &str| {
            let xml = format!(
                "<domain type='kvm'><name>d</name><memory unit='GiB'>4</memory>{backing}</domain>"
            );
            CheckedDomain::parse("d", xml).unwrap()
        };
        let reason = lacks_memory(&domain(""), Some(Bytes::new(3 << 30)));
        assert!(reason.unwrap().contains("the domain has 4GiB"));
        assert!(lacks_memory(&domain(""), None).is_some());
        assert_eq!(lacks_memory(&domain(""), Some(Bytes::new(4 << 30))), None);
        let huge = "<memoryBacking><hugepages/></memoryBacking>";
        assert_eq!(lacks_memory(&domain(huge), Some(Bytes::new(3 << 30))), None);
    }
}
