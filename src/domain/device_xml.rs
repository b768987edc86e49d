//! Device XML for libvirt, from typed values.

use quick_xml::escape::escape;
use quick_xml::events::{BytesText, Event};
use quick_xml::{Reader, Writer, XmlVersion};
use thiserror::Error;

use crate::units::{Bytes, KiB};

/// A device that cannot be written for libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DeviceXmlError {
    /// The live XML has no such device, or it has no size that can be asked for.
    #[error("the domain has no virtio-mem device {0:?}")]
    NoDevice(String),
    /// The live XML is none.
    #[error("the domain's XML cannot be read: {0}")]
    Malformed(String),
}

/// A DIMM to be attached.
pub fn dimm(alias: &str, size: KiB, node: Option<u32>) -> String {
    let node = node.map_or(String::new(), |node| format!("<node>{node}</node>"));
    format!(
        "<memory model='dimm'><target><size unit='KiB'>{}</size>{node}</target>\
         <alias name='{}'/></memory>",
        kib(size),
        escape(alias)
    )
}

/// The memory device of that alias, as the live XML has it, with another requested size. libvirt
/// takes an update only if all else is as it is (`qemuDomainChangeMemoryLiveValidateChange`), what
/// this program does not know of included.
///
/// # Errors
/// There is no such device, or no such document.
pub fn resized(live_xml: &str, alias: &str, requested: KiB) -> Result<String, DeviceXmlError> {
    let malformed = |error: &dyn std::fmt::Display| DeviceXmlError::Malformed(error.to_string());
    let mut reader = Reader::from_str(live_xml);
    let mut path: Vec<String> = Vec::new();
    let mut copy: Option<Copy> = None;
    loop {
        let event = reader.read_event().map_err(|error| malformed(&error))?;
        if let Event::Start(start) = &event {
            path.push(start.name().as_ref().to_owned());
            if is_at(&path, &["domain", "devices", "memory"]) {
                copy = Some(Copy::default());
            }
        }
        if let Some(copy) = &mut copy {
            copy.take(&event, &path, alias, requested)
                .map_err(|error| malformed(&error))?;
        }
        match event {
            Event::End(_) => {
                let ends = is_at(&path, &["domain", "devices", "memory"]);
                path.pop();
                let found = copy.take_if(|copy| ends && copy.is_it && copy.has_requested);
                if let Some(copy) = found {
                    let text = String::from_utf8(copy.writer.into_inner());
                    return text.map_err(|error| malformed(&error));
                }
                if ends {
                    copy = None;
                }
            }
            Event::Eof => return Err(DeviceXmlError::NoDevice(alias.to_owned())),
            _ => {}
        }
    }
}

/// A device as far as it was copied.
struct Copy {
    writer: Writer<Vec<u8>>,
    is_it: bool,
    has_requested: bool,
}

impl Default for Copy {
    fn default() -> Self {
        Self {
            writer: Writer::new(Vec::new()),
            is_it: false,
            has_requested: false,
        }
    }
}

impl Copy {
    fn take(
        &mut self,
        event: &Event<'_>,
        path: &[String],
        alias: &str,
        requested: KiB,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let inside = path.get(2..).unwrap_or_default();
        if let Event::Start(element) | Event::Empty(element) = event {
            let is_child = match event {
                Event::Start(_) => inside.len() == 2,
                _ => inside.len() == 1,
            };
            if is_child && element.name().as_ref() == "alias" {
                let name = element.try_get_attribute("name")?;
                let name = name
                    .map(|name| {
                        name.normalized_value(XmlVersion::Implicit1_0)
                            .map(|name| name.into_owned())
                    })
                    .transpose()?;
                self.is_it |= name.as_deref() == Some(alias);
            }
        }
        if !is_at(inside, &["memory", "target", "requested"]) {
            self.writer.write_event(event.borrow())?;
            return Ok(());
        }
        // The unit stays what libvirt always writes: KiB.
        match event {
            Event::Start(_) => {
                let start = quick_xml::events::BytesStart::new("requested")
                    .with_attributes([("unit", "KiB")]);
                self.writer.write_event(Event::Start(start))?;
                let text = kib(requested).to_string();
                self.writer
                    .write_event(Event::Text(BytesText::new(&text)))?;
                self.has_requested = true;
            }
            Event::End(_) => self.writer.write_event(event.borrow())?,
            _ => {}
        }
        Ok(())
    }
}

fn is_at(path: &[String], names: &[&str]) -> bool {
    path.len() == names.len() && path.iter().zip(names).all(|(have, name)| have == name)
}

fn kib(size: KiB) -> u64 {
    Bytes::from(size).get() / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE: &str = "<domain id='1'><name>a</name><devices>\
        <memory model='virtio-mem'><target><size unit='KiB'>4096</size>\
        <requested unit='KiB'>0</requested></target><alias name='virtiomem0'/></memory>\
        <memory model='virtio-mem' access='shared'><source><nodemask>0-1</nodemask></source>\
        <target dynamicMemslots='yes'><size unit='KiB'>2097152</size><node>0</node>\
        <block unit='KiB'>2048</block><requested unit='KiB'>1024</requested>\
        <current unit='KiB'>0</current></target><alias name='ua-&amp;1'/>\
        <address type='pci' bus='0x03'/></memory></devices></domain>";

    #[test]
    fn only_the_requested_size_of_that_device_changes() {
        let xml = resized(LIVE, "ua-&1", KiB::new(524_288).unwrap()).unwrap();
        let begin = LIVE.find("<memory model='virtio-mem' access").unwrap();
        let end = LIVE.find("</devices>").unwrap();
        let expected = LIVE[begin..end].replace(
            "<requested unit='KiB'>1024</requested>",
            "<requested unit=\"KiB\">524288</requested>",
        );
        assert_eq!(xml, expected);
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        let size = KiB::new(2048).unwrap();
        assert_eq!(
            resized(LIVE, "ua-2", size),
            Err(DeviceXmlError::NoDevice("ua-2".to_owned()))
        );
        assert!(matches!(
            resized("<domain><a></b>", "x", size),
            Err(DeviceXmlError::Malformed(_))
        ));
    }

    #[test]
    fn a_dimm_is_written_with_what_it_needs() {
        assert_eq!(
            dimm("ua-'<&", KiB::new(262_144).unwrap(), Some(0)),
            "<memory model='dimm'><target><size unit='KiB'>262144</size><node>0</node></target>\
             <alias name='ua-&apos;&lt;&amp;'/></memory>"
        );
    }
}
