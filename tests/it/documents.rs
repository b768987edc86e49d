//! Real documents: every one is read, what is derived from it is legal and the same each time,
//! and no damage to it makes the reader panic.

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

/// The facts of one document of any kind; `None` for one of a kind that is none of ours.
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
        "the same facts, other labels"
    );
    for key in derivation.labels.keys() {
        assert!(is_ours(key), "{key} would not be cleaned up");
        assert!(FAMILIES.contains(&family(key)), "{key} is of no family");
    }
}

/// `VIRTNODE_CORPUS` names a directory with other documents to try; without it, our fixtures.
#[test]
fn every_document_of_a_corpus_is_read() {
    let corpus = std::env::var_os("VIRTNODE_CORPUS").map_or_else(fixtures, PathBuf::from);
    let mut read = 0;
    for path in xml_files(&corpus) {
        let name = path.display().to_string();
        let bytes = fs::read(&path).unwrap();
        match facts(&name, &bytes) {
            Some(Ok(facts)) => check_labels(&facts),
            Some(Err(error)) => panic!("{error}"),
            None => continue,
        }
        read += 1;
    }
    assert!(read > 0, "no document in {}", corpus.display());
    println!("{read} documents of {} read", corpus.display());
}

#[test]
fn our_fixtures_hold_nothing_unknown() {
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

/// One label a line; these snapshots are what a cluster would see of the two captured hosts.
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
fn labels_of_debian_13() {
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
fn labels_of_debian_12() {
    let versions = (Version::new(9, 0, 0), Version::new(7, 2, 19));
    let facts = node(
        "debian12-libvirt-9.0.0-qemu-7.2",
        "dc-x86_64-q35-kvm.xml",
        versions,
    );
    insta::assert_snapshot!("debian12-native", snapshot(&facts, Schema::Native));
    insta::assert_snapshot!("debian12-kubevirt", snapshot(&facts, Schema::Kubevirt));
}

/// Elements and values that 11.3 did not have, and one that is gone: software emulation has no
/// enlightenments.
#[test]
fn what_libvirt_12_says_is_read() {
    let file = "debian-sid-libvirt-12.8.0-qemu-11.1/dc-x86_64-q35-qemu.xml";
    let bytes = fs::read(fixtures().join(file)).unwrap();
    let document = DomainCapabilities::parse(file, &bytes).unwrap();
    assert!(document.devices["hostdev"].offers("iommufd", "no"));
    assert!(document.devices["disk"].offers("bus", "nvme"));
    assert!(document.devices["console"].offers("type", "pty"));
    assert_eq!(document.os.sections["varstore"].supported, Some(false));
    assert_eq!(document.hyperv, None);
}

/// A kind of damage to a document.
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

    /// Whatever happened to a document, reading it ends with facts or an error that names it, and
    /// what is derived from the facts is legal.
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
        // Whichever parser gets it: a file may be given under the wrong flag.
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
