//! Facts from documents instead of from this machine.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use super::Failure;
use super::input::{DocumentInput, ensure_one_stdin};
use crate::capability::{Capabilities, CpuDefinition, DomainCapabilities, Eim, NodeFacts, Version};
use crate::documents::DocumentFile;
use crate::units::whole_number;
use crate::xml::MAX_BYTES;

/// Options that name documents and facts. With any of them libvirt and the host are not asked.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Offline documents (with any of these, this machine is not probed)")]
pub(super) struct OfflineDocuments {
    /// Directory with the three documents that KubeVirt's node-labeller writes
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["capabilities", "domain_capabilities", "supported_features"]
    )]
    documents: Option<PathBuf>,

    /// Output of `virsh capabilities`; - reads standard input
    #[arg(long, value_name = "FILE")]
    capabilities: Option<PathBuf>,

    /// Output of `virsh domcapabilities`; - reads standard input; can be repeated
    #[arg(long, value_name = "FILE")]
    domain_capabilities: Vec<PathBuf>,

    /// Output of `virsh hypervisor-cpu-baseline --features`; - reads standard input
    #[arg(long, value_name = "FILE")]
    supported_features: Option<PathBuf>,

    /// Maximum number of vCPUs of the node's KVM (KVM_CAP_MAX_VCPUS)
    #[arg(long, value_name = "N", value_parser = whole_number(1..=u32::MAX))]
    kvm_max_vcpus: Option<u32>,

    /// Extended interrupt mode (EIM) of domains: auto, explicit or none
    #[arg(long, value_name = "MODE", value_parser = Eim::from_str)]
    eim: Option<Eim>,

    /// Version of the node's libvirt
    #[arg(long, value_name = "VERSION")]
    libvirt_version: Option<Version>,

    /// Version of the node's QEMU
    #[arg(long, value_name = "VERSION")]
    qemu_version: Option<Version>,
}

impl OfflineDocuments {
    /// Reads the documents into facts. Returns `None` if no option was given. Facts without an
    /// option are unknown. `other` are further options of the command that name a document.
    pub(super) fn read<'a>(
        &'a self,
        other: impl IntoIterator<Item = (&'a str, &'a Path)>,
    ) -> anyhow::Result<Option<NodeFacts>> {
        self.check_stdin(other)?;
        if let Some(directory) = &self.documents {
            let mut facts = self.in_directory(directory).facts()?;
            let document = facts.domain_capabilities.first();
            facts.domain_type = document.and_then(|document| document.virt_type.clone());
            return Ok(Some(facts));
        }
        let facts = self.facts()?;
        // An empty document is a document.
        let has_document = self.capabilities.is_some() || self.supported_features.is_some();
        Ok((has_document || facts != NodeFacts::default()).then_some(facts))
    }

    /// Returns these options with the documents of KubeVirt's node-labeller, which writes no
    /// features on some architectures.
    fn in_directory(&self, directory: &Path) -> Self {
        let file = |file: DocumentFile| directory.join(file.name());
        let supported_features = file(DocumentFile::SupportedFeatures);
        Self {
            documents: None,
            capabilities: Some(file(DocumentFile::Capabilities)),
            domain_capabilities: vec![file(DocumentFile::DomainCapabilities)],
            supported_features: supported_features.exists().then_some(supported_features),
            ..self.clone()
        }
    }

    fn facts(&self) -> anyhow::Result<NodeFacts> {
        let capabilities = self.capabilities.as_deref();
        let supported_features = self.supported_features.as_deref();
        let domain_capabilities: Vec<DomainCapabilities> = self
            .domain_capabilities
            .iter()
            .map(|path| read(path, DomainCapabilities::parse))
            .collect::<anyhow::Result<_>>()?;
        Ok(NodeFacts {
            libvirt_version: self.libvirt_version,
            hypervisor_version: self.qemu_version,
            eim: self.eim,
            kvm_max_vcpus: self.kvm_max_vcpus,
            capabilities: capabilities
                .map(|path| read(path, Capabilities::parse))
                .transpose()?,
            domain_capabilities,
            domain_type: None,
            baseline_cpu: supported_features
                .map(|path| read(path, CpuDefinition::parse))
                .transpose()?,
            host: None,
        })
    }

    fn check_stdin<'a>(
        &'a self,
        other: impl IntoIterator<Item = (&'a str, &'a Path)>,
    ) -> Result<(), Failure> {
        let named = |name: &'static str, path: &'a Option<PathBuf>| {
            path.as_deref().map(|path| (name, path))
        };
        let domain_capabilities = self.domain_capabilities.iter();
        ensure_one_stdin(
            named("--capabilities", &self.capabilities)
                .into_iter()
                .chain(domain_capabilities.map(|path| ("--domain-capabilities", path.as_path())))
                .chain(named("--supported-features", &self.supported_features))
                .chain(other),
        )
    }
}

fn read<T>(
    path: &Path,
    parse: impl Fn(&str, &[u8]) -> Result<T, crate::xml::DocumentError>,
) -> anyhow::Result<T> {
    let DocumentInput { name, bytes } = DocumentInput::read(path, MAX_BYTES as u64)?;
    Ok(parse(&name, &bytes)?)
}
