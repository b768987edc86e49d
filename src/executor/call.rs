//! Making the calls that the core asks for.

use crate::domain::device_xml;
use crate::hotplug::{Action, Return};
use crate::hypervisor::{DomainBackend, DomainRef, Scope};

/// Makes a call and returns its result.
pub(super) async fn make<C: DomainBackend>(
    control: &C,
    domain: &DomainRef,
    action: &Action,
) -> Return {
    let result = match action {
        Action::SetVcpus { count, persist } => {
            control.set_vcpus(domain, *count, Scope::of(*persist)).await
        }
        Action::OnlineVcpus { ids } => control.set_guest_vcpus(domain, ids, true).await,
        Action::ResizeVirtioMem { alias, requested } => {
            control.resize_virtio_mem(domain, alias, *requested).await
        }
        Action::AttachDimm { alias, size, node } => {
            let xml = device_xml::dimm(alias, *size, *node);
            control.attach_device(domain, &xml, Scope::Live).await
        }
    };
    match result {
        Ok(()) => Return::Done,
        Err(error) => Return::Failed(error),
    }
}
