//! The XML that libvirt is given: devices to attach, and devices with a change.

use std::ops::Range;

use quick_xml::escape::escape;
use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

use crate::units::{Bytes, KiB};

/// Writes a DIMM to attach.
pub(super) fn dimm(alias: &str, size: KiB, node: Option<u32>) -> String {
    let node = node.map_or(String::new(), |node| format!("<node>{node}</node>"));
    format!(
        "<memory model='dimm'><target><size unit='KiB'>{}</size>{node}</target>\
         <alias name='{}'/></memory>",
        Bytes::from(size).get() / 1024,
        escape(alias)
    )
}

/// Returns the memory device with this alias, with another requested size; `None` if the definition
/// has no such device or it has no requested size.
///
/// libvirt identifies a memory device by all its properties (virDomainMemoryFindByDef) and rejects
/// a change of anything but the requested size (qemuDomainChangeMemoryLiveValidateChange,
/// libvirt 11.3). So everything else stays as libvirt wrote it, byte for byte.
pub(super) fn with_requested(domain: &str, alias: &str, requested: KiB) -> Option<String> {
    let mut reader = Reader::from_str(domain);
    let mut path: Vec<String> = Vec::new();
    let mut device = DevicePosition::default();
    loop {
        let start = position(&reader)?;
        match reader.read_event().ok()? {
            Event::Start(element) => {
                path.push(element.name().as_ref().to_owned());
                device.enter(&path, start, &element, alias);
            }
            Event::Empty(element) => {
                path.push(element.name().as_ref().to_owned());
                device.enter(&path, start, &element, alias);
                path.pop();
            }
            Event::End(_) => {
                let end = position(&reader)?;
                if is(&path, REQUESTED) {
                    device.requested.end = end;
                }
                if is(&path, DEVICE) && device.has_alias && !device.requested.is_empty() {
                    let before = domain.get(device.start..device.requested.start)?;
                    let after = domain.get(device.requested.end..end)?;
                    let requested = requested.get();
                    return Some(format!(
                        "{before}<requested unit='KiB'>{requested}</requested>{after}"
                    ));
                }
                path.pop();
            }
            Event::Eof => return None,
            _ => {}
        }
    }
}

const DEVICE: &[&str] = &["domain", "devices", "memory"];
const ALIAS: &[&str] = &["domain", "devices", "memory", "alias"];
const REQUESTED: &[&str] = &["domain", "devices", "memory", "target", "requested"];

/// The part of the device that was read so far.
#[derive(Default)]
struct DevicePosition {
    start: usize,
    has_alias: bool,
    requested: Range<usize>,
}

impl DevicePosition {
    fn enter(&mut self, path: &[String], start: usize, element: &BytesStart<'_>, alias: &str) {
        if is(path, DEVICE) {
            *self = Self {
                start,
                ..Self::default()
            };
        } else if is(path, REQUESTED) {
            self.requested.start = start;
        } else if is(path, ALIAS) {
            self.has_alias |= has_name(element, alias);
        }
    }
}

fn has_name(element: &BytesStart<'_>, alias: &str) -> bool {
    let name = element.try_get_attribute("name").ok().flatten();
    name.is_some_and(|name| {
        name.normalized_value(XmlVersion::Implicit1_0)
            .is_ok_and(|name| name == alias)
    })
}

fn is(path: &[String], names: &[&str]) -> bool {
    path.len() == names.len() && path.iter().zip(names).all(|(have, name)| have == name)
}

fn position(reader: &Reader<&[u8]>) -> Option<usize> {
    usize::try_from(reader.buffer_position()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain><devices>\
        <memory model='dimm'><target><size unit='KiB'>1</size></target>\
        <alias name='dimm0'/></memory>\
        <memory model='virtio-mem'><target><requested unit='KiB'>0</requested>\
        <current unit='KiB'>0</current></target><alias name='ua-a'/></memory>\
        <memory model='virtio-mem'>\n<target><node>0</node><requested unit='KiB'>4096</requested>\
        </target><alias name='ua-&apos;b'/><address type='pci'/></memory></devices></domain>";

    #[test]
    fn dimm_has_size_node_and_escaped_alias() {
        assert_eq!(
            dimm("ua-'<&", KiB::new(262_144).unwrap(), Some(0)),
            "<memory model='dimm'><target><size unit='KiB'>262144</size><node>0</node></target>\
             <alias name='ua-&apos;&lt;&amp;'/></memory>"
        );
    }

    #[test]
    fn only_the_requested_size_changes() {
        let requested = KiB::new(2048).unwrap();
        assert_eq!(
            with_requested(DOMAIN, "ua-a", requested).unwrap(),
            "<memory model='virtio-mem'><target><requested unit='KiB'>2048</requested>\
             <current unit='KiB'>0</current></target><alias name='ua-a'/></memory>"
        );
        assert_eq!(
            with_requested(DOMAIN, "ua-'b", requested).unwrap(),
            "<memory model='virtio-mem'>\n<target><node>0</node><requested unit='KiB'>2048\
             </requested></target><alias name='ua-&apos;b'/><address type='pci'/></memory>"
        );
    }

    #[test]
    fn device_without_requested_size_is_none() {
        let requested = KiB::new(2048).unwrap();
        for (xml, alias) in [
            (DOMAIN, "ua-c"),
            (DOMAIN, "dimm0"),
            (DOMAIN, ""),
            ("<domain><devices><memory>", "ua-a"),
            ("no xml", "ua-a"),
            ("", "ua-a"),
        ] {
            assert_eq!(with_requested(xml, alias, requested), None, "{alias}");
        }
    }
}
