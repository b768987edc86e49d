//! Whether domains here can have more than 255 vCPUs: extended interrupt mode of the virtual IOMMU.
//!
//! libvirt has no word for it in its capabilities. It can be told from the versions, and better
//! from a dry run: libvirt is asked for the command line of a domain with 256 vCPUs.

use std::fmt;
use std::str::FromStr;

use quick_xml::Writer;
use quick_xml::events::BytesText;
use serde::{Serialize, Serializer};

use super::Version;

/// libvirt adds the IOMMU with EIM and the split I/O APIC to a q35 domain without `<iommu>` that
/// needs them ("qemu: Automatically add IOMMU when needed", NEWS of 10.10.0).
const LIBVIRT_ADDS_IT: Version = Version::new(10, 10, 0);
/// `<driver intremap= eim=>` and `<ioapic driver='qemu'/>` are known (NEWS of 3.4.0).
const LIBVIRT_KNOWS_IT: Version = Version::new(3, 4, 0);
/// The first QEMU whose q35 has more than 255 vCPUs and whose intel-iommu has `eim`.
const QEMU_HAS_IT: Version = Version::new(2, 8, 0);
/// The smallest number of vCPUs that needs EIM; 255 is the largest that does not
/// (`QEMU_MAX_VCPUS_WITHOUT_EIM`, libvirt's qemu_validate.h).
const NEEDS_IT: &str = "256";

/// How a domain here gets extended interrupt mode, which x86 needs for more than 255 vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eim {
    /// libvirt adds what is needed by itself.
    Auto,
    /// Only if the domain's XML asks for it.
    Explicit,
    /// Not at all.
    None,
}

impl Eim {
    /// What the versions let expect; an unknown QEMU is taken for one that this libvirt supports.
    pub fn from_versions(libvirt: Version, qemu: Option<Version>) -> Self {
        if qemu.is_some_and(|qemu| qemu < QEMU_HAS_IT) || libvirt < LIBVIRT_KNOWS_IT {
            Self::None
        } else if libvirt < LIBVIRT_ADDS_IT {
            Self::Explicit
        } else {
            Self::Auto
        }
    }

    /// The word as in the label `virtnode.io/eim` and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Explicit => "explicit",
            Self::None => "none",
        }
    }
}

impl FromStr for Eim {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Auto, Self::Explicit, Self::None]
            .into_iter()
            .find(|eim| eim.as_str() == text)
            .ok_or_else(|| format!("'{text}' is none of auto, explicit and none"))
    }
}

impl fmt::Display for Eim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Eim {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The smallest domain that needs EIM, to be printed as QEMU's arguments and never started.
///
/// `explicit` asks for the IOMMU, EIM and the split I/O APIC in the XML, as one must where
/// libvirt does not add them.
pub fn dry_run_domain(virt_type: &str, machine: &str, explicit: bool) -> String {
    let mut writer = Writer::new(Vec::new());
    let written = write_domain(&mut writer, virt_type, machine, explicit);
    debug_assert!(written.is_ok(), "writing to memory does not fail");
    String::from_utf8(writer.into_inner()).unwrap_or_default()
}

fn write_domain(
    writer: &mut Writer<Vec<u8>>,
    virt_type: &str,
    machine: &str,
    explicit: bool,
) -> std::io::Result<()> {
    let domain = writer
        .create_element("domain")
        .with_attribute(("type", virt_type));
    domain.write_inner_content(|writer| {
        writer
            .create_element("name")
            .write_text_content(BytesText::new("virtnode-dry-run"))?;
        let memory = writer
            .create_element("memory")
            .with_attribute(("unit", "MiB"));
        memory.write_text_content(BytesText::new("16"))?;
        let vcpu = writer
            .create_element("vcpu")
            .with_attribute(("current", "1"));
        vcpu.write_text_content(BytesText::new(NEEDS_IT))?;
        writer.create_element("os").write_inner_content(|writer| {
            let kind = writer.create_element("type");
            let kind = kind.with_attributes([("arch", "x86_64"), ("machine", machine)]);
            kind.write_text_content(BytesText::new("hvm")).map(|_| ())
        })?;
        if explicit {
            writer
                .create_element("features")
                .write_inner_content(|writer| {
                    let ioapic = writer.create_element("ioapic");
                    ioapic
                        .with_attribute(("driver", "qemu"))
                        .write_empty()
                        .map(|_| ())
                })?;
            writer
                .create_element("devices")
                .write_inner_content(|writer| {
                    let iommu = writer
                        .create_element("iommu")
                        .with_attribute(("model", "intel"));
                    let driver = |writer: &mut Writer<Vec<u8>>| {
                        let driver = writer.create_element("driver");
                        let on = [("intremap", "on"), ("eim", "on")];
                        driver.with_attributes(on).write_empty().map(|_| ())
                    };
                    iommu.write_inner_content(driver).map(|_| ())
                })?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Whether these arguments of QEMU (libvirt's `qemu-argv`) give the domain an IOMMU with extended
/// interrupt mode: intel-iommu's `eim`, amd-iommu's `xtsup`. Both spellings of `-device` are read:
/// `intel-iommu,intremap=on,eim=on` and `{"driver":"intel-iommu","eim":"on"}`.
pub fn from_native_arguments(arguments: &str) -> bool {
    let words = words(arguments);
    words
        .windows(2)
        .filter(|pair| pair[0] == "-device")
        .any(|pair| is_iommu_with_eim(&pair[1]))
}

fn is_iommu_with_eim(device: &str) -> bool {
    let switch = |driver: &str| match driver {
        "intel-iommu" => Some("eim"),
        "amd-iommu" => Some("xtsup"),
        _ => None,
    };
    if device.starts_with('{') {
        let Ok(device) = serde_json::from_str::<serde_json::Value>(device) else {
            return false;
        };
        return device["driver"]
            .as_str()
            .and_then(switch)
            .is_some_and(|switch| {
                device[switch] == "on" || device[switch] == serde_json::Value::Bool(true)
            });
    }
    let mut options = device.split(',');
    let driver = options.next().unwrap_or_default();
    let driver = driver.strip_prefix("driver=").unwrap_or(driver);
    switch(driver)
        .is_some_and(|switch| options.any(|option| option.strip_prefix(switch) == Some("=on")))
}

/// The words of a command line as libvirt prints it for a shell: single and double quotes, and
/// backslashes, also before a line's end.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (Some(end), c) if c == end => quote = None,
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (_, '\\') => match characters.next() {
                Some('\n') | None => {}
                Some(next) => word.get_or_insert_default().push(next),
            },
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                word.get_or_insert_default();
                quote = Some(c);
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("12.8.0", Some("11.1.0"), Eim::Auto)]
    #[case("10.10.0", None, Eim::Auto)]
    #[case("10.9.0", Some("9.1.0"), Eim::Explicit)]
    #[case("3.4.0", Some("2.8.0"), Eim::Explicit)]
    #[case("3.3.0", Some("2.8.0"), Eim::None)]
    #[case("9.0.0", Some("2.7.1"), Eim::None)]
    fn versions_tell_what_to_expect(
        #[case] libvirt: &str,
        #[case] qemu: Option<&str>,
        #[case] expected: Eim,
    ) {
        let qemu = qemu.map(|text| text.parse().unwrap());
        assert_eq!(Eim::from_versions(libvirt.parse().unwrap(), qemu), expected);
    }

    #[test]
    fn the_domain_asks_for_eim_only_when_told() {
        assert_eq!(
            dry_run_domain("qemu", "q35", false),
            "<domain type=\"qemu\"><name>virtnode-dry-run</name><memory unit=\"MiB\">16</memory>\
             <vcpu current=\"1\">256</vcpu><os><type arch=\"x86_64\" machine=\"q35\">hvm</type></os>\
             </domain>"
        );
        assert!(dry_run_domain("kvm", "q35", true).ends_with(
            "<features><ioapic driver=\"qemu\"/></features><devices><iommu model=\"intel\">\
             <driver intremap=\"on\" eim=\"on\"/></iommu></devices></domain>"
        ));
    }

    #[test]
    fn names_are_escaped() {
        assert!(dry_run_domain("qemu", "a\"<b", false).contains("machine=\"a&quot;&lt;b\""));
    }

    #[test]
    fn real_arguments_of_libvirt_are_read() {
        let auto = include_str!("../../tests/fixtures/native/libvirt-11.3.0-q35-256-vcpus.txt");
        assert!(from_native_arguments(auto));
        let small = include_str!("../../tests/fixtures/native/libvirt-11.3.0-q35-1-vcpu.txt");
        assert!(!from_native_arguments(small));
    }

    #[rstest]
    #[case("-device intel-iommu,intremap=on,eim=on", true)]
    #[case(
        "qemu \\\n-device intel-iommu,id=iommu0,intremap=on,eim=on \\\n-m 16",
        true
    )]
    #[case("-device driver=intel-iommu,eim=on", true)]
    #[case("-device intel-iommu,intremap=on,eim=off", false)]
    #[case("-device intel-iommu,intremap=on", false)]
    #[case("-device amd-iommu,intremap=on,xtsup=on", true)]
    #[case("-device amd-iommu,eim=on", false)]
    #[case("-device '{\"driver\":\"amd-iommu\",\"xtsup\":true}'", true)]
    #[case("-device '{\"driver\":\"intel-iommu\",\"eim\":\"off\"}'", false)]
    #[case("-device '{\"driver\":", false)]
    #[case("-name intel-iommu,eim=on", false)]
    #[case("-name 'a -device intel-iommu,eim=on'", false)]
    #[case("-device", false)]
    #[case("", false)]
    fn both_spellings_are_read(#[case] arguments: &str, #[case] expected: bool) {
        assert_eq!(from_native_arguments(arguments), expected);
    }
}
