//! Real documents: each parses, the derived labels are valid and deterministic, and a damaged
//! document never makes the parser panic.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::Index;
use virtnode::capability::{Capabilities, CpuDefinition, DomainCapabilities, NodeFacts, Version};
use virtnode::label::{FAMILIES, Policy, Schema, derive, family, is_ours};
use virtnode::xml::DocumentError;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn xml_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(xml_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "xml") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Parses a document of any known kind; `None` for an unknown kind.
fn facts(name: &str, bytes: &[u8]) -> Option<Result<NodeFacts, DocumentError>> {
    let has = |root: &str| {
        bytes
            .windows(root.len())
            .take(4096)
            .any(|at| at == root.as_bytes())
    };
    let facts = NodeFacts {
        libvirt_version: Some(Version::new(11, 3, 0)),
        hypervisor_version: Some(Version::new(10, 0, 2)),
        ..NodeFacts::default()
    };
    Some(if has("<domainCapabilities") {
        DomainCapabilities::parse(name, bytes).map(|document| NodeFacts {
            domain_capabilities: vec![document],
            ..facts
        })
    } else if has("<capabilities") {
        Capabilities::parse(name, bytes).map(|document| NodeFacts {
            capabilities: Some(document),
            ..facts
        })
    } else if has("<cpu") {
        CpuDefinition::parse(name, bytes).map(|document| NodeFacts {
            baseline_cpu: Some(document),
            ..facts
        })
    } else {
        return None;
    })
}

fn check_labels(facts: &NodeFacts) {
    let policy = Policy {
        schema: Schema::Both,
        guest_architectures: vec!["aarch64".into(), "x86_64".into()],
        ..Policy::default()
    };
    let derivation = derive(facts, &policy);
    assert_eq!(
        derivation,
        derive(facts, &policy),
        "derivation is not deterministic"
    );
    for key in derivation.labels.keys() {
        assert!(is_ours(key), "cleanup would not remove {key}");
        assert!(FAMILIES.contains(&family(key)), "{key} has no known family");
    }
}

/// `VIRTNODE_CORPUS` can name a directory with other documents than the fixtures.
#[test]
fn every_document_of_corpus_parses() {
    let corpus = std::env::var_os("VIRTNODE_CORPUS").map_or_else(fixtures, PathBuf::from);
    let mut parsed = 0;
    for path in xml_files(&corpus) {
        let name = path.display().to_string();
        let bytes = fs::read(&path).unwrap();
        match facts(&name, &bytes) {
            Some(Ok(facts)) => check_labels(&facts),
            Some(Err(error)) => panic!("{error}"),
            None => continue,
        }
        parsed += 1;
    }
    assert!(parsed > 0, "no document in {}", corpus.display());
    println!("{parsed} documents of {} parsed", corpus.display());
}

#[test]
fn fixtures_have_no_unknown_elements() {
    for path in xml_files(&fixtures()) {
        let name = path.display().to_string();
        let bytes = fs::read(&path).unwrap();
        let facts = facts(&name, &bytes)
            .expect("a known kind of document")
            .unwrap();
        let unknown = facts.capabilities.map_or(0, |c| c.unknown_elements)
            + facts
                .domain_capabilities
                .iter()
                .map(|d| d.unknown_elements)
                .sum::<usize>();
        assert_eq!(unknown, 0, "{name}");
    }
}

fn node(directory: &str, document: &str, versions: (Version, Version)) -> NodeFacts {
    let read = |file: &str| fs::read(fixtures().join(directory).join(file)).unwrap();
    NodeFacts {
        libvirt_version: Some(versions.0),
        hypervisor_version: Some(versions.1),
        capabilities: Some(Capabilities::parse("caps", &read("capabilities.xml")).unwrap()),
        domain_capabilities: vec![DomainCapabilities::parse("dc", &read(document)).unwrap()],
        ..NodeFacts::default()
    }
}

/// Returns the labels that a cluster would get for a captured host, one per line.
fn snapshot(facts: &NodeFacts, schema: Schema) -> String {
    let derivation = derive(
        facts,
        &Policy {
            schema,
            ..Policy::default()
        },
    );
    assert_eq!(derivation.rejected, []);
    derivation
        .labels
        .iter()
        .map(|(key, value)| format!("{key}={value}\n"))
        .collect()
}

#[test]
fn debian_13_yields_the_snapshot() {
    let versions = (Version::new(11, 3, 0), Version::new(10, 0, 2));
    let facts = node(
        "debian13-libvirt-11.3.0-qemu-10.0",
        "dc-x86_64-q35-kvm.xml",
        versions,
    );
    insta::assert_snapshot!("debian13-native", snapshot(&facts, Schema::Native));
    insta::assert_snapshot!("debian13-kubevirt", snapshot(&facts, Schema::Kubevirt));
}

#[test]
fn debian_12_yields_the_snapshot() {
    let versions = (Version::new(9, 0, 0), Version::new(7, 2, 19));
    let facts = node(
        "debian12-libvirt-9.0.0-qemu-7.2",
        "dc-x86_64-q35-kvm.xml",
        versions,
    );
    insta::assert_snapshot!("debian12-native", snapshot(&facts, Schema::Native));
    insta::assert_snapshot!("debian12-kubevirt", snapshot(&facts, Schema::Kubevirt));
}

/// libvirt 12 has elements and values that 11.3 lacks, and no enlightenments with software emulation.
#[test]
fn elements_of_libvirt_12_are_parsed() {
    let file = "debian-sid-libvirt-12.8.0-qemu-11.1/dc-x86_64-q35-qemu.xml";
    let bytes = fs::read(fixtures().join(file)).unwrap();
    let document = DomainCapabilities::parse(file, &bytes).unwrap();
    assert!(document.devices["hostdev"].offers("iommufd", "no"));
    assert!(document.devices["disk"].offers("bus", "nvme"));
    assert!(document.devices["console"].offers("type", "pty"));
    assert_eq!(document.os.sections["varstore"].supported, Some(false));
    assert_eq!(document.hyperv, None);
}

#[derive(Debug, Clone)]
enum Damage {
    Cut(Index),
    Remove(Index, u8),
    Repeat(Index, u8),
    Byte(Index, u8),
    Insert(Index, &'static str),
}

fn damage() -> impl Strategy<Value = Damage> {
    let place = any::<Index>;
    let texts = prop::sample::select(vec![
        "<",
        ">",
        "&",
        "'",
        "\"",
        "</",
        "/>",
        "]]>",
        "<!DOCTYPE x>",
        "<!--",
        "&amp;",
        "&#0;",
        "&#x110000;",
        "\u{0}",
        "\u{fffd}",
        "<cpu>",
        "</cpu>",
        " supported='maybe'",
        "99999999999999999999",
        "-1",
        "<![CDATA[",
        "<?xml version='1.0'?>",
    ]);
    prop_oneof![
        place().prop_map(Damage::Cut),
        (place(), any::<u8>()).prop_map(|(at, length)| Damage::Remove(at, length)),
        (place(), any::<u8>()).prop_map(|(at, length)| Damage::Repeat(at, length)),
        (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        (place(), texts).prop_map(|(at, text)| Damage::Insert(at, text)),
    ]
}

fn apply(document: &mut Vec<u8>, damage: &Damage) {
    if document.is_empty() {
        return;
    }
    let place = |index: &Index| index.index(document.len());
    match damage {
        Damage::Cut(at) => document.truncate(place(at)),
        Damage::Remove(at, length) => {
            let at = place(at);
            let end = (at + usize::from(*length)).min(document.len());
            document.drain(at..end);
        }
        Damage::Repeat(at, length) => {
            let at = place(at);
            let end = (at + usize::from(*length)).min(document.len());
            let part = document[at..end].to_vec();
            document.splice(at..at, part);
        }
        Damage::Byte(at, byte) => {
            let at = place(at);
            document[at] = *byte;
        }
        Damage::Insert(at, text) => {
            let at = place(at);
            document.splice(at..at, text.bytes());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Parsing yields facts with valid labels, or an error that names the document.
    #[test]
    fn damaged_documents_never_panic(
        which in any::<Index>(),
        damages in prop::collection::vec(damage(), 1..6),
    ) {
        let files = xml_files(&fixtures());
        let mut document = fs::read(which.get(&files)).unwrap();
        for damage in &damages {
            apply(&mut document, damage);
        }
        // A user can pass a file with the wrong flag, so every parser must cope.
        let capabilities = Capabilities::parse("the document", &document);
        let domain = DomainCapabilities::parse("the document", &document);
        let cpu = CpuDefinition::parse("the document", &document);
        let errors = [
            capabilities.as_ref().err(),
            domain.as_ref().err(),
            cpu.as_ref().err(),
        ];
        for error in errors.into_iter().flatten() {
            prop_assert!(error.to_string().starts_with("the document: "), "{error}");
        }
        check_labels(&NodeFacts {
            capabilities: capabilities.ok(),
            domain_capabilities: domain.into_iter().collect(),
            baseline_cpu: cpu.ok(),
            ..NodeFacts::default()
        });
    }
}
