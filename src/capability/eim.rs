//! Extended interrupt mode (EIM) of the virtual IOMMU, which an x86 domain needs for more than 255
//! vCPUs.
//!
//! libvirt's capabilities do not mention EIM. Its availability follows from the versions, or more
//! reliably from a dry run: libvirt converts a domain with 256 vCPUs to QEMU's command line.

use quick_xml::escape::escape;

use super::Version;
use crate::units::words;

/// First libvirt that adds an IOMMU with EIM and the split I/O APIC to a q35 domain that needs them
/// and has no `<iommu>` ("qemu: Automatically add IOMMU when needed", NEWS of 10.10.0).
const LIBVIRT_ADDS_EIM: Version = Version::new(10, 10, 0);
/// First libvirt with `<driver intremap= eim=>` and `<ioapic driver='qemu'/>` (NEWS of 3.4.0).
const LIBVIRT_ACCEPTS_EIM: Version = Version::new(3, 4, 0);
/// First QEMU whose q35 machine has more than 255 vCPUs and whose intel-iommu has `eim`.
const QEMU_SUPPORTS_EIM: Version = Version::new(2, 8, 0);
/// Smallest number of vCPUs that needs EIM (`QEMU_MAX_VCPUS_WITHOUT_EIM` + 1, libvirt's
/// qemu_validate.h).
const VCPUS_NEEDING_EIM: u32 = 256;

words! {
    /// Availability of EIM to domains on this node: the label `virtnode.io/eim`.
    pub enum Eim {
        /// libvirt adds EIM when a domain needs it.
        Auto = "auto",
        /// The domain's XML must request EIM.
        Explicit = "explicit",
        /// EIM is not available.
        None = "none",
    }
    else "is not one of auto, explicit, none"
}

impl Eim {
    /// Derives EIM from the versions. An unknown QEMU counts as one that this libvirt supports.
    pub fn from_versions(libvirt: Version, qemu: Option<Version>) -> Self {
        if qemu.is_some_and(|qemu| qemu < QEMU_SUPPORTS_EIM) || libvirt < LIBVIRT_ACCEPTS_EIM {
            Self::None
        } else if libvirt < LIBVIRT_ADDS_EIM {
            Self::Explicit
        } else {
            Self::Auto
        }
    }
}

/// Writes the smallest domain that needs EIM. libvirt converts it to QEMU's arguments and never
/// starts it.
///
/// With `explicit` the XML requests the IOMMU, EIM and the split I/O APIC, as a libvirt that does
/// not add them requires.
pub fn dry_run_domain(virt_type: &str, machine: &str, explicit: bool) -> String {
    let (virt_type, machine) = (escape(virt_type), escape(machine));
    let requested = if explicit {
        "<features><ioapic driver=\"qemu\"/></features><devices><iommu model=\"intel\">\
         <driver intremap=\"on\" eim=\"on\"/></iommu></devices>"
    } else {
        ""
    };
    format!(
        "<domain type=\"{virt_type}\"><name>virtnode-dry-run</name>\
         <memory unit=\"MiB\">16</memory><vcpu current=\"1\">{VCPUS_NEEDING_EIM}</vcpu>\
         <os><type arch=\"x86_64\" machine=\"{machine}\">hvm</type></os>{requested}</domain>"
    )
}

/// True if these arguments of QEMU (libvirt's `qemu-argv`) include an IOMMU with extended interrupt
/// mode: intel-iommu with `eim` or amd-iommu with `xtsup`. `-device` has two formats:
/// `intel-iommu,intremap=on,eim=on` and `{"driver":"intel-iommu","eim":"on"}`.
pub fn from_native_arguments(arguments: &str) -> bool {
    split_shell_words(arguments)
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

/// Splits a command line that libvirt quoted for a shell: with single quotes, double quotes and
/// backslashes, including a backslash at the end of a line.
fn split_shell_words(line: &str) -> Vec<String> {
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
    fn versions_determine_eim(
        #[case] libvirt: &str,
        #[case] qemu: Option<&str>,
        #[case] expected: Eim,
    ) {
        let qemu = qemu.map(|text| text.parse().unwrap());
        assert_eq!(Eim::from_versions(libvirt.parse().unwrap(), qemu), expected);
    }

    #[test]
    fn dry_run_domain_requests_eim_only_if_explicit() {
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
    fn dry_run_domain_escapes_names() {
        assert!(dry_run_domain("qemu", "a\"<b", false).contains("machine=\"a&quot;&lt;b\""));
    }

    #[test]
    fn captured_libvirt_arguments_are_parsed() {
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
    fn both_formats_of_device_are_parsed(#[case] arguments: &str, #[case] expected: bool) {
        assert_eq!(from_native_arguments(arguments), expected);
    }
}
