//! The documents of KubeVirt's node-labeller: readable, and for the same QEMU as the host's libvirt.

use std::collections::BTreeSet;

use super::finding::{Check, DoctorReport, Place, Remedy, Severity, counted};
use super::observed::{Observed, ObservedDocuments};
use crate::capability::NodeFacts;

pub(super) fn check(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::LabelDocuments;
    let documents = &observed.documents;
    let directory = &documents.directory;
    if !documents.exist {
        if !documents.used {
            let what = format!("{directory} has no documents of KubeVirt; labels follow libvirt");
            return report.ok(check, what);
        }
        return report.problem(
            check,
            Severity::Error,
            format!("{directory} has no documents of KubeVirt"),
            "labels.source: files derives labels from them, so there are none, or published ones \
             keep their last values.",
            rewrite("Check that KubeVirt runs on this node, and that the directory is mounted."),
        );
    }
    for problem in &documents.problems {
        if documents.used {
            report.problem(
                check,
                Severity::Error,
                problem.clone(),
                "Labels derived from this document keep their last values and do not follow changes.",
                rewrite("virt-handler's init container writes the documents at each start."),
            );
        }
    }
    check_difference(observed, documents, report);
    if !report.covers(check) {
        let what = if documents.used {
            format!("labels follow the documents of KubeVirt in {directory}")
        } else {
            format!("labels follow libvirt, not the documents of KubeVirt in {directory}")
        };
        report.ok(check, what);
    }
}

fn rewrite(text: &str) -> Remedy {
    let command = "Restart virt-handler on this node: kubectl -n kubevirt delete pod \
                   -l kubevirt.io=virt-handler --field-selector spec.nodeName=NODE";
    Remedy::words(Place::Outside, format!("{text} {command}"))
}

/// Compares the documents with the libvirt of the host, if it was asked.
fn check_difference(observed: &Observed, documents: &ObservedDocuments, report: &mut DoctorReport) {
    let Some(facts) = &documents.facts else {
        return;
    };
    if observed.facts.capabilities.is_none() || facts.capabilities.is_none() {
        return;
    }
    let Some(difference) = difference(facts, &observed.facts) else {
        return;
    };
    let (why, remedy) = if documents.used {
        (
            "Labels follow the documents: they describe VMs of KubeVirt, not domains of the host's \
             libvirt.",
            "If only KubeVirt runs VMs on this node, set connect: none. If schedulers place domains \
             of the host's libvirt here, set labels.source: libvirt.",
        )
    } else {
        (
            "Labels follow the host's libvirt (labels.source: libvirt): VMs of KubeVirt run with \
             another QEMU.",
            "If KubeVirt's VMs are scheduled by these labels, set labels.source: auto.",
        )
    };
    report.problem(
        Check::LabelDocuments,
        Severity::Warning,
        format!("KubeVirt's documents differ from the host's libvirt: {difference}"),
        why,
        Remedy::words(Place::Host, remedy),
    );
}

/// Returns the differences that labels show; `None` without any.
fn difference(documents: &NodeFacts, libvirt: &NodeFacts) -> Option<String> {
    let mut found = Vec::new();
    let usual = |facts: &NodeFacts| {
        let machine = facts.usual_machine()?;
        Some((machine.name.clone(), machine.canonical_name().to_owned()))
    };
    if let (Some((name, here)), Some((_, there))) = (usual(documents), usual(libvirt))
        && here != there
    {
        found.push(format!(
            "{name} means {here} in the documents and {there} in libvirt"
        ));
    }
    let machines = |facts: &NodeFacts| -> BTreeSet<String> {
        let machines = facts.native_arch().map(|arch| facts.machines(arch));
        let machines = machines.into_iter().flatten();
        machines.map(|machine| machine.name).collect()
    };
    let (here, there) = (machines(documents), machines(libvirt));
    for (only, other, place) in [(&here, &there, "the documents"), (&there, &here, "libvirt")] {
        let count = only.difference(other).count();
        if count > 0 {
            found.push(format!(
                "{} only in {place}",
                counted(count, "machine type")
            ));
        }
    }
    let host_model = |facts: &NodeFacts| {
        let document = facts.primary_document()?;
        document.cpu.host_model.as_ref()?.model.clone()
    };
    if let (Some(here), Some(there)) = (host_model(documents), host_model(libvirt))
        && here != there
    {
        found.push(format!(
            "host-model is {here} in the documents and {there} in libvirt"
        ));
    }
    (!found.is_empty()).then(|| found.join("; "))
}
