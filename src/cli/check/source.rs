//! The domain to check: a file, a running domain, or a description on the command line.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::capability::is_x86;
use crate::cli::input::DocumentInput;
use crate::cli::{Exit, Failure};
use crate::compat::{MinimalDefinition, Requirement};
use crate::domain::VcpuTopology;
use crate::hotplug::HotplugRequest;
use crate::units::{Bytes, whole_number};
use crate::xml::MAX_BYTES;

/// Memory of a described domain unless the description says otherwise.
const DEFAULT_MEMORY: Bytes = Bytes::new(1 << 30);

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Domain (a file, a running domain, or a description)")]
pub(in crate::cli) struct DomainSource {
    /// Domain definition, as `virsh dumpxml` prints it; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["domain", "DESCRIPTION"])]
    domain_xml: Option<PathBuf>,

    /// Running domain of this node, by name or UUID: checks whether it would start here again, or,
    /// with --vcpus or --memory, whether hotplug can give it that total now
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = [
            "machine", "arch", "domain_type", "current_vcpus", "sockets", "dies", "cores",
            "threads", "cpu_model", "cpu_mode", "cpu_feature",
        ]
    )]
    domain: Option<String>,

    #[command(flatten)]
    description: DomainDescription,
}

#[derive(Debug, Clone, Default, PartialEq, Args)]
#[group(id = "DESCRIPTION", multiple = true)]
struct DomainDescription {
    /// Machine type: q35, pc-i440fx-10.0 … [default: libvirt's]
    #[arg(long, value_name = "TYPE")]
    machine: Option<String>,

    /// Guest architecture [default: the node's own]
    #[arg(long, value_name = "ARCH")]
    arch: Option<String>,

    /// Domain type: kvm, qemu … [default: the fastest that the node supports]
    #[arg(long, value_name = "TYPE")]
    domain_type: Option<String>,

    /// Maximum number of vCPUs [default: the product of the topology, or 1]; with --domain, the
    /// total to plug or unplug now
    #[arg(long, value_name = "N", value_parser = whole_number(0..=u32::MAX))]
    vcpus: Option<u32>,

    /// Number of vCPUs at boot [default: all]
    #[arg(long, value_name = "N", value_parser = whole_number(0..=u32::MAX))]
    current_vcpus: Option<u32>,

    /// CPU topology: sockets
    #[arg(long, value_name = "N", value_parser = whole_number(0..=u32::MAX))]
    sockets: Option<u32>,

    /// CPU topology: dies per socket
    #[arg(long, value_name = "N", value_parser = whole_number(0..=u32::MAX))]
    dies: Option<u32>,

    /// CPU topology: cores per die
    #[arg(long, value_name = "N", value_parser = whole_number(0..=u32::MAX))]
    cores: Option<u32>,

    /// CPU topology: threads per core
    #[arg(long, value_name = "N", value_parser = whole_number(0..=u32::MAX))]
    threads: Option<u32>,

    /// Memory, with a binary unit: 4GiB, 4Gi [default: 1GiB]; with --domain, the total to plug or
    /// unplug now
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,

    /// Named CPU model
    #[arg(long, value_name = "MODEL", conflicts_with = "cpu_mode")]
    cpu_model: Option<String>,

    /// CPU mode without a model: host-model, host-passthrough, maximum
    #[arg(long, value_name = "MODE")]
    cpu_mode: Option<String>,

    /// CPU feature to require in addition to a model or mode; can be repeated
    #[arg(long, value_name = "NAME")]
    cpu_feature: Vec<String>,
}

pub(in crate::cli) struct CheckedDomain {
    pub(in crate::cli) requirement: Requirement,
    pub(super) xml: String,
    /// True if the domain is only described, and so has no name of its own.
    pub(super) is_described: bool,
}

impl CheckedDomain {
    /// Parses a definition. `origin` names it in errors.
    pub(super) fn parse(origin: &str, xml: String) -> anyhow::Result<Self> {
        Ok(Self {
            requirement: Requirement::parse(origin, xml.as_bytes())?,
            xml,
            is_described: false,
        })
    }

    /// Reads a definition from a file or standard input.
    pub(in crate::cli) fn read(path: &Path) -> anyhow::Result<Self> {
        let (name, xml) = DocumentInput::read(path, MAX_BYTES as u64)?.into_text()?;
        Self::parse(&name, xml)
    }
}

impl DomainSource {
    /// Returns an error if the command line names no domain.
    pub(super) fn validate(&self) -> Result<(), Failure> {
        let described = self.description != DomainDescription::default();
        if self.domain_xml.is_some() || self.domain.is_some() || described {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Usage,
            "no domain given: use --domain-xml FILE (- for standard input), --domain NAME for a \
             running one, or describe one: --machine q35 --vcpus 300",
        ))
    }

    /// Returns the path of the definition, if the domain comes from a file.
    pub(super) fn document(&self) -> Option<&Path> {
        self.domain_xml.as_deref()
    }

    /// Returns the name of the running domain, if that is the source.
    pub(super) fn running(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// Returns the changes of a running domain that the command line asks about.
    pub(super) fn changes(&self) -> Vec<HotplugRequest> {
        if self.domain.is_none() {
            return Vec::new();
        }
        let vcpus = self.description.vcpus.map(|count| HotplugRequest::Vcpus {
            count,
            online: false,
        });
        let memory = self
            .description
            .memory
            .map(|size| HotplugRequest::Memory { size, force: false });
        vcpus.into_iter().chain(memory).collect()
    }

    /// Returns the domain from a file or a description. Returns `None` for a running domain.
    ///
    /// `native` is the node's own architecture; `best_type` returns the best domain type of an
    /// architecture.
    pub(super) fn without_libvirt(
        &self,
        native: Option<&str>,
        best_type: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Option<CheckedDomain>> {
        if self.domain.is_some() {
            return Ok(None);
        }
        if let Some(path) = &self.domain_xml {
            return CheckedDomain::read(path).map(Some);
        }
        let definition = self.description.define(native, best_type);
        let domain = CheckedDomain::parse("the description", definition.to_xml())?;
        Ok(Some(CheckedDomain {
            is_described: true,
            ..domain
        }))
    }
}

impl DomainDescription {
    fn define(
        &self,
        native: Option<&str>,
        best_type: impl Fn(&str) -> Option<String>,
    ) -> MinimalDefinition {
        let arch = self.arch.as_deref().or(native);
        let levels = [self.sockets, self.dies, self.cores, self.threads];
        let [sockets, dies, cores, threads] = levels.map(|level| level.unwrap_or(1));
        let shape = VcpuTopology {
            sockets,
            dies,
            cores,
            threads,
            ..VcpuTopology::default()
        };
        let topology = levels.iter().any(Option::is_some).then_some(shape);
        let product = topology.map(|shape| u32::try_from(shape.product()).unwrap_or(u32::MAX));
        MinimalDefinition {
            virt_type: self
                .domain_type
                .clone()
                .or_else(|| best_type(arch?))
                .unwrap_or_else(|| "kvm".to_owned()),
            arch: self.arch.clone(),
            acpi: arch.is_none_or(is_x86),
            machine: self.machine.clone(),
            vcpus: self.vcpus.or(product).unwrap_or(1),
            current: self.current_vcpus,
            topology,
            memory: self.memory.unwrap_or(DEFAULT_MEMORY),
            cpu_mode: self.cpu_mode.clone(),
            cpu_model: self.cpu_model.clone(),
            features: self.cpu_feature.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// libvirt rejects ACPI for Arm guests without UEFI, and for other architectures always.
    #[test]
    fn only_x86_description_enables_acpi() {
        for (arch, native, acpi) in [
            (None, None, true),
            (None, Some("x86_64"), true),
            (None, Some("aarch64"), false),
            (Some("aarch64"), Some("x86_64"), false),
            (Some("i686"), Some("s390x"), true),
        ] {
            let description = DomainDescription {
                arch: arch.map(str::to_owned),
                ..DomainDescription::default()
            };
            let xml = description.define(native, |_| None).to_xml();
            assert_eq!(xml.contains("<acpi/>"), acpi, "{xml}");
        }
    }
}
