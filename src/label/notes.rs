//! Explains which documents yield no labels, and why.

use super::{LabelSet, Policy};
use crate::capability::{Accelerator, DomainCapabilities, NodeFacts};

/// Returns a sentence for each document that yields no labels, or fewer than its kind does, and for
/// an empty result. `labels` are those derived from the facts.
pub fn notes(facts: &NodeFacts, policy: &Policy, labels: &LabelSet) -> Vec<String> {
    let mut notes = Vec::new();
    let native = facts.native_arch();
    let has_document = facts.capabilities.is_some() || !facts.domain_capabilities.is_empty();
    if native.is_none() && has_document {
        notes.push(
            "no document has the node's architecture (<arch>), without which neither machine types \
             nor CPU models are known: give the output of `virsh capabilities`, or domain \
             capabilities with <arch>"
                .to_owned(),
        );
    }
    if let (Some(capabilities), Some(native)) = (&facts.capabilities, native) {
        let types: Vec<&str> = capabilities
            .guests
            .iter()
            .filter(|guest| guest.arch == native)
            .map(|guest| guest.os_type.as_str())
            .collect();
        if types.is_empty() {
            notes.push(format!(
                "the capabilities list no guests for {native}: the hypervisor has no emulator for it"
            ));
        } else if facts.machines(native).is_empty() {
            notes.push(format!(
                "the capabilities list no machine types for guests of type hvm on {native}, only \
                 guests of type {}",
                types.join(", ")
            ));
        }
    }
    let documents = facts.domain_capabilities.iter();
    let is_empty = labels.is_empty();
    notes.extend(documents.filter_map(|document| unused(facts, policy, document, is_empty)));
    if labels.is_empty() && notes.is_empty() {
        notes.push("the given facts yield no labels".to_owned());
    }
    notes.dedup();
    notes
}

/// Returns the reason if a document of domain capabilities yields no labels.
fn unused(
    facts: &NodeFacts,
    policy: &Policy,
    document: &DomainCapabilities,
    is_empty: bool,
) -> Option<String> {
    let native = facts.native_arch()?;
    let arch = document.arch.as_deref().unwrap_or(native);
    let machine = document
        .machine
        .as_deref()
        .unwrap_or("an unnamed machine type");
    let virt_type = document.virt_type.as_deref();
    if arch != native {
        let is_published = policy.guest_architectures.iter().any(|other| other == arch);
        return (!is_published).then(|| {
            format!(
                "the domain capabilities for {machine} describe {arch} guests, but the node is \
                 {native}: they yield no labels"
            )
        });
    }
    let best = facts.best_domain_type(native);
    if let Some(virt_type) = virt_type
        && best != Some(virt_type)
    {
        return Some(format!(
            "the domain capabilities for {machine} describe domains of type {virt_type}, but the \
             best type of the node is {}: they yield no labels",
            best.unwrap_or("unknown")
        ));
    }
    let is_foreign = virt_type.is_some_and(|name| Accelerator::of_domain_type(name).is_none());
    (is_foreign && is_empty).then(|| {
        format!(
            "the domain capabilities are for domain type {}, which is not QEMU's: they yield no \
             labels",
            virt_type.unwrap_or_default()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability::Capabilities;
    use crate::label::derive;

    fn facts(capabilities: Option<&str>, documents: &[&str]) -> NodeFacts {
        NodeFacts {
            capabilities: capabilities
                .map(|text| Capabilities::parse("c", text.as_bytes()).unwrap()),
            domain_capabilities: documents
                .iter()
                .map(|text| DomainCapabilities::parse("d", text.as_bytes()).unwrap())
                .collect(),
            ..NodeFacts::default()
        }
    }

    fn notes_of(facts: &NodeFacts) -> Vec<String> {
        let policy = Policy::default();
        notes(facts, &policy, &derive(facts, &policy).labels)
    }

    const HVM: &str = "<capabilities><host><cpu><arch>x86_64</arch></cpu></host><guest>\
        <os_type>hvm</os_type><arch name='x86_64'><machine maxCpus='255'>pc</machine>\
        <domain type='kvm'/></arch></guest></capabilities>";

    #[test]
    fn document_that_yields_nothing_is_named_with_the_reason() {
        for (capabilities, document, expected) in [
            (
                None,
                "<domainCapabilities><cpu/></domainCapabilities>",
                "architecture",
            ),
            (
                Some("<capabilities><host><cpu><arch>x86_64</arch></cpu></host></capabilities>"),
                "",
                "no guests",
            ),
            (
                Some(
                    "<capabilities><host><cpu><arch>x86_64</arch></cpu></host><guest>\
                     <os_type>exe</os_type><arch name='x86_64'><domain type='lxc'/></arch></guest>\
                     </capabilities>",
                ),
                "",
                "only guests of type exe",
            ),
            (
                None,
                "<domainCapabilities><domain>bhyve</domain><arch>x86_64</arch></domainCapabilities>",
                "bhyve",
            ),
            (
                Some(HVM),
                "<domainCapabilities><domain>kvm</domain><arch>aarch64</arch></domainCapabilities>",
                "aarch64 guests",
            ),
            (
                Some(HVM),
                "<domainCapabilities><domain>qemu</domain><arch>x86_64</arch></domainCapabilities>",
                "domains of type qemu",
            ),
        ] {
            let documents: &[&str] = if document.is_empty() {
                &[]
            } else {
                &[document]
            };
            let notes = notes_of(&facts(capabilities, documents));
            assert!(
                notes.iter().any(|note| note.contains(expected)),
                "{expected}: {notes:?}"
            );
        }
    }

    #[test]
    fn documents_of_the_node_need_no_note() {
        let document = "<domainCapabilities><domain>kvm</domain><machine>pc</machine>\
                        <arch>x86_64</arch></domainCapabilities>";
        assert_eq!(
            notes_of(&facts(Some(HVM), &[document])),
            Vec::<String>::new()
        );
    }
}
