//! Extracts the part of a definition that libvirt checks in a dry run.
//!
//! It contains the subjects of the rules: vCPUs, memory, CPU, features, machine type, virtual IOMMU
//! and memory devices. Disks, networks, host devices, files, names and UUIDs are omitted, so that
//! the dry run touches none of them and its result does not depend on them.

use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::{Reader, Writer, XmlVersion};

/// Name of the domain in the dry run, which defines nothing.
const NAME: &str = "virtnode-dry-run";

/// Returns the covered elements of a definition, in their order; `None` if it is not well-formed,
/// which [`super::Requirement::parse`] reports in detail.
pub fn dry_run_xml(definition: &str) -> Option<String> {
    let mut reader = Reader::from_str(definition);
    let mut writer = Writer::new(Vec::new());
    let mut path: Vec<String> = Vec::new();
    let mut dropped = 0_usize;
    loop {
        match reader.read_event().ok()? {
            Event::Start(start) => {
                if dropped > 0 || !is_kept(&path, &start) {
                    dropped += 1;
                    continue;
                }
                write_start(&mut writer, &start, &path)?;
                path.push(start.name().0.to_owned());
            }
            Event::Empty(start) => {
                if dropped == 0 && is_kept(&path, &start) {
                    let name = start.name().0.to_owned();
                    write_start(&mut writer, &start, &path)?;
                    let end = Event::End(BytesEnd::new(name));
                    writer.write_event(end).ok()?;
                }
            }
            Event::End(end) => match dropped {
                0 => {
                    writer.write_event(Event::End(end)).ok()?;
                    path.pop();
                }
                _ => dropped -= 1,
            },
            event @ (Event::Text(_) | Event::CData(_) | Event::GeneralRef(_)) => {
                if dropped == 0 && path.len() > 1 {
                    writer.write_event(event).ok()?;
                }
            }
            Event::Eof => break,
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
        }
    }
    String::from_utf8(writer.into_inner()).ok()
}

fn is_kept(path: &[String], start: &BytesStart<'_>) -> bool {
    let name = start.name().0;
    let is = |attribute: &str, value: &str| value_of(start, attribute).as_deref() == Some(value);
    match path.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => name == "domain",
        ["domain"] => matches!(
            name,
            "memory"
                | "currentMemory"
                | "maxMemory"
                | "vcpu"
                | "vcpus"
                | "os"
                | "cpu"
                | "features"
                | "devices"
        ),
        ["domain", "os"] => name == "type",
        ["domain", "devices"] => match name {
            "iommu" | "memballoon" => true,
            "controller" => is("type", "usb") && is("model", "none"),
            "memory" => is("model", "dimm") || is("model", "virtio-mem"),
            _ => false,
        },
        // Addresses and aliases belong to a running domain; a source is a file or a page size.
        ["domain", "devices", ..] => !matches!(name, "address" | "alias" | "source" | "stats"),
        _ => true,
    }
}

/// Writes the start tag. Of `<domain>`, `<os>` and `<vcpu>` it keeps only the attributes that the
/// rules cover.
fn write_start(
    writer: &mut Writer<Vec<u8>>,
    start: &BytesStart<'_>,
    path: &[String],
) -> Option<()> {
    let name = start.name().0;
    let keeps = |attribute: &str| match (path.len(), name) {
        (0, _) => attribute == "type",
        (1, "vcpu") => attribute == "current",
        (1, "os") => false, // libvirt would choose a firmware
        _ => !attribute.starts_with("xmlns"),
    };
    let mut copy = BytesStart::new(name.to_owned());
    for attribute in start.attributes().with_checks(false) {
        let attribute = attribute.ok()?;
        if keeps(attribute.key.0) {
            let value = attribute.normalized_value(XmlVersion::Implicit1_0).ok()?;
            copy.push_attribute((attribute.key.0, value.as_ref()));
        }
    }
    writer.write_event(Event::Start(copy)).ok()?;
    if path.is_empty() {
        let element = writer.create_element("name");
        element.write_text_content(BytesText::new(NAME)).ok()?;
    }
    Some(())
}

fn value_of(start: &BytesStart<'_>, name: &str) -> Option<String> {
    let attribute = start.try_get_attribute(name).ok()??;
    let value = attribute.normalized_value(XmlVersion::Implicit1_0).ok()?;
    Some(value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uncovered_elements_are_omitted() {
        let xml = "<?xml version='1.0'?><!-- x --><domain type='kvm' id='7' xmlns:qemu='q'>
  <name>secret &amp; co</name><uuid>1</uuid>
  <vcpu placement='auto' cpuset='0-3' current='1'>4</vcpu>
  <os firmware='efi'><type machine='q35'>hvm</type><loader>/x</loader></os>
  <cpu mode='custom'><model>EPYC</model><topology sockets='4' cores='1' threads='1'/></cpu>
  <devices>
    <emulator>/evil</emulator>
    <disk type='file'><source file='/x'/></disk>
    <hostdev mode='subsystem' type='pci'/>
    <controller type='usb' model='none'/><controller type='pci' index='1'/>
    <memory model='dimm'><source><pagesize>2</pagesize></source>
      <target><size unit='MiB'>64</size></target><alias name='dimm0'/></memory>
    <memory model='nvdimm'><source><path>/x</path></source></memory>
    <iommu model='intel'><driver intremap='on'/><address type='pci'/></iommu>
  </devices>
  <qemu:commandline><qemu:arg value='-evil'/></qemu:commandline>
</domain>";
        let asked = dry_run_xml(xml).unwrap();
        let flat: String = asked.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(
            flat.replace("> <", "><"),
            "<domain type=\"kvm\"><name>virtnode-dry-run</name><vcpu \
             current=\"1\">4</vcpu><os><type machine=\"q35\">hvm</type></os><cpu \
             mode=\"custom\"><model>EPYC</model><topology sockets=\"4\" cores=\"1\" \
             threads=\"1\"></topology></cpu><devices><controller type=\"usb\" \
             model=\"none\"></controller><memory model=\"dimm\"><target><size \
             unit=\"MiB\">64</size></target></memory><iommu model=\"intel\"><driver \
             intremap=\"on\"></driver></iommu></devices></domain>"
        );
    }

    #[test]
    fn malformed_definition_yields_none() {
        assert_eq!(dry_run_xml("<domain><a"), None);
    }
}
