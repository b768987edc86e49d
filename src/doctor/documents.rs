//! Reads the documents of KubeVirt's node-labeller for the doctor.

use std::sync::Arc;

use super::DoctorScope;
use super::checks::observed::ObservedDocuments;
use crate::capability::{Capabilities, CpuDefinition, DomainCapabilities, NodeFacts};
use crate::config::LabelOrigin;
use crate::documents::{DocumentDirectory, DocumentFile};
use crate::xml::DocumentError;

/// Reads the documents once, whether labels are derived from them or not.
pub(super) async fn read_documents(scope: &DoctorScope) -> ObservedDocuments {
    let directory = DocumentDirectory::new(&scope.documents);
    let mut observed = ObservedDocuments {
        directory: scope.documents.display().to_string(),
        exist: directory.has_files(),
        used: match scope.label_origin {
            LabelOrigin::Libvirt => false,
            LabelOrigin::Files => true,
            LabelOrigin::Auto => directory.has_files(),
        },
        ..ObservedDocuments::default()
    };
    if !observed.exist {
        return observed;
    }
    let mut reader = Reader {
        directory: &directory,
        problems: Vec::new(),
    };
    let capabilities = reader.read(DocumentFile::Capabilities, Capabilities::parse);
    let capabilities = capabilities.await;
    let document = reader.read(DocumentFile::DomainCapabilities, DomainCapabilities::parse);
    let document = document.await;
    let mut facts = NodeFacts {
        domain_type: document.as_ref().and_then(|it| it.virt_type.clone()),
        domain_capabilities: document.into_iter().collect(),
        capabilities,
        ..NodeFacts::default()
    };
    if matches!(facts.native_arch(), Some("x86_64" | "s390x")) {
        let features = reader.read(DocumentFile::SupportedFeatures, CpuDefinition::parse);
        facts.baseline_cpu = features.await;
    }
    observed.problems = reader.problems;
    observed.facts = Some(Arc::new(facts));
    observed
}

struct Reader<'d> {
    directory: &'d DocumentDirectory,
    problems: Vec<String>,
}

impl Reader<'_> {
    async fn read<T>(
        &mut self,
        file: DocumentFile,
        parse: impl Fn(&str, &[u8]) -> Result<T, DocumentError>,
    ) -> Option<T> {
        let name = self.directory.file(file).display().to_string();
        let text = self.directory.read(file).await;
        let parsed = text
            .map_err(|error| error.to_string())
            .and_then(|text| parse(&name, text.as_bytes()).map_err(|error| error.to_string()));
        parsed.map_err(|problem| self.problems.push(problem)).ok()
    }
}
