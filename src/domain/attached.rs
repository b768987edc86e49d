//! Devices that clients attach and detach: disks and network interfaces.

use super::definition::DomainDefinition;
use crate::units::words;

/// Maximum number of devices of one domain that are listed, above what its buses have room for.
const MAX_DEVICES: usize = 256;

words! {
    /// The kind of a device that can be detached.
    #[derive(PartialOrd, Ord, Hash)]
    pub enum AttachedKind {
        Disk = "disk",
        Interface = "interface",
    }
}

/// A disk or network interface. Live XML and definition have the same kind and key for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedDevice {
    pub kind: AttachedKind,
    /// A disk's target (`vda`), an interface's hardware address: unique in a domain.
    pub key: String,
    /// The live device's name in QEMU. A definition has only names that begin with `ua-`.
    pub alias: Option<String>,
}

impl AttachedDevice {
    /// True if both are the same device, in the live XML or in the definition.
    pub fn is(&self, other: &Self) -> bool {
        (self.kind, &self.key) == (other.kind, &other.key)
    }
}

impl DomainDefinition {
    /// Returns the disks and interfaces of the domain.
    pub fn attached(&self) -> Vec<AttachedDevice> {
        let devices = self.devices.specs.iter().filter_map(|spec| {
            let (kind, key) = match spec.kind.as_str() {
                "disk" => (AttachedKind::Disk, spec.target.clone()?),
                "interface" => (AttachedKind::Interface, spec.mac.clone()?),
                _ => return None,
            };
            Some(AttachedDevice {
                kind,
                key,
                alias: spec.alias.clone(),
            })
        });
        devices.take(MAX_DEVICES).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_is_the_same_in_live_xml_and_definition() {
        let read = |aliases: [&str; 2]| {
            let [disk, nic] = aliases;
            let xml = format!(
                "<domain><name>d</name><devices>\
                 <disk type='file' device='disk'><target dev='vda' bus='virtio'/>{disk}</disk>\
                 <interface type='network'><mac address='52:54:00:00:00:01'/>{nic}</interface>\
                 <disk type='file' device='cdrom'/></devices></domain>"
            );
            DomainDefinition::parse("d", xml.as_bytes(), |definition| Ok(definition.attached()))
                .unwrap()
        };
        let live = read(["<alias name='virtio-disk0'/>", "<alias name='ua-net'/>"]);
        let defined = read(["", "<alias name='ua-net'/>"]);
        assert_eq!(live.len(), 2);
        assert!(live[0].is(&defined[0]) && live[1].is(&defined[1]));
        assert!(!live[0].is(&live[1]));
        assert_eq!(live[0].alias.as_deref(), Some("virtio-disk0"));
        assert_eq!(live[1].key, "52:54:00:00:00:01");
    }
}
