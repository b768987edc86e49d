//! Facts from files instead of from this machine.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use clap::Args;

use crate::capability::{Capabilities, CpuDefinition, DomainCapabilities, Eim, NodeFacts, Version};
use crate::xml::MAX_BYTES;

/// The flags that name files and facts. With any of them nothing local is asked.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Offline: nothing local is asked with any of these")]
pub(super) struct Offline {
    /// What `virsh capabilities` printed
    #[arg(long, value_name = "FILE")]
    capabilities: Option<PathBuf>,

    /// What `virsh domcapabilities` printed; may be given several times
    #[arg(long, value_name = "FILE")]
    domain_capabilities: Vec<PathBuf>,

    /// What `virsh hypervisor-cpu-baseline --features` printed
    #[arg(long, value_name = "FILE")]
    supported_features: Option<PathBuf>,

    /// KVM_CAP_MAX_VCPUS
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    kvm_max_vcpus: Option<u32>,

    /// How domains get extended interrupt mode: auto, explicit or none
    #[arg(long, value_name = "HOW", value_parser = Eim::from_str)]
    eim: Option<Eim>,

    /// The version of libvirt
    #[arg(long, value_name = "VERSION")]
    libvirt_version: Option<Version>,

    /// The version of QEMU
    #[arg(long, value_name = "VERSION")]
    qemu_version: Option<Version>,
}

impl Offline {
    /// The facts in the files; `None` if no flag was given. What no flag tells is unknown.
    pub(super) fn read(&self) -> anyhow::Result<Option<NodeFacts>> {
        let Self {
            capabilities,
            domain_capabilities,
            supported_features,
            kvm_max_vcpus,
            eim,
            libvirt_version,
            qemu_version,
        } = self;
        let facts = NodeFacts {
            libvirt_version: *libvirt_version,
            hypervisor_version: *qemu_version,
            eim: *eim,
            kvm_max_vcpus: *kvm_max_vcpus,
            capabilities: capabilities
                .as_deref()
                .map(|path| read(path, Capabilities::parse))
                .transpose()?,
            domain_capabilities: domain_capabilities
                .iter()
                .map(|path| read(path, DomainCapabilities::parse))
                .collect::<anyhow::Result<_>>()?,
            baseline_cpu: supported_features
                .as_deref()
                .map(|path| read(path, CpuDefinition::parse))
                .transpose()?,
            host: None,
        };
        Ok((facts != NodeFacts::default()
            || capabilities.is_some()
            || supported_features.is_some())
        .then_some(facts))
    }
}

/// Reads a document. A file that is too large is not read whole.
fn read<T>(
    path: &Path,
    parse: impl Fn(&str, &[u8]) -> Result<T, crate::xml::DocumentError>,
) -> anyhow::Result<T> {
    let name = path.display().to_string();
    let size = std::fs::metadata(path)
        .with_context(|| format!("cannot read {name}"))?
        .len();
    if size > MAX_BYTES as u64 {
        bail!("{name}: is larger than {} MiB", MAX_BYTES / 1024 / 1024);
    }
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {name}"))?;
    Ok(parse(&name, &bytes)?)
}
