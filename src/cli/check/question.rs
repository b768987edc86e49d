//! What is asked about: a file, a running domain, or a description on the command line.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;

use crate::capability::is_x86;
use crate::cli::{Exit, Failure};
use crate::compat::{MinimalDefinition, Requirement};
use crate::domain::VcpuTopology;
use crate::units::Bytes;
use crate::xml::MAX_BYTES;

/// What a domain has that is described and not said to have anything else.
const USUAL_MEMORY: Bytes = Bytes::new(1 << 30);

/// One of three ways to ask.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "The domain: a file, a running one, or a description")]
pub(in crate::cli) struct Question {
    /// A definition, as `virsh dumpxml` prints it; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["domain", "DESCRIPTION"])]
    domain_xml: Option<PathBuf>,

    /// A running domain of this node, by name or UUID: would it start here again as it is
    #[arg(long, value_name = "NAME", conflicts_with = "DESCRIPTION")]
    domain: Option<String>,

    #[command(flatten)]
    description: Description,
}

#[derive(Debug, Clone, Default, PartialEq, Args)]
#[group(id = "DESCRIPTION", multiple = true)]
struct Description {
    /// The machine type: q35, pc-i440fx-10.0 … [default: libvirt's]
    #[arg(long, value_name = "TYPE")]
    machine: Option<String>,

    /// The guest architecture [default: the node's own]
    #[arg(long, value_name = "ARCH")]
    arch: Option<String>,

    /// The domain type: kvm, qemu … [default: the best there is]
    #[arg(long, value_name = "TYPE")]
    domain_type: Option<String>,

    /// The most vCPUs that there can ever be [default: what the topology multiplies out to, or 1]
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,

    /// The vCPUs to start with [default: all]
    #[arg(long, value_name = "N")]
    current_vcpus: Option<u32>,

    /// Sockets of the domain
    #[arg(long, value_name = "N")]
    sockets: Option<u32>,

    /// Dies of a socket
    #[arg(long, value_name = "N")]
    dies: Option<u32>,

    /// Cores of a die
    #[arg(long, value_name = "N")]
    cores: Option<u32>,

    /// Threads of a core
    #[arg(long, value_name = "N")]
    threads: Option<u32>,

    /// The memory, with a unit: 4GiB, 4Gi [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,

    /// A named CPU model
    #[arg(long, value_name = "MODEL", conflicts_with = "cpu_mode")]
    cpu_model: Option<String>,

    /// A CPU mode without a model: host-model, host-passthrough, maximum
    #[arg(long, value_name = "MODE")]
    cpu_mode: Option<String>,

    /// A CPU feature that is required, beside a model or mode; may be given several times
    #[arg(long, value_name = "NAME")]
    cpu_feature: Vec<String>,
}

/// A domain that is asked about.
pub(in crate::cli) struct Asked {
    pub(in crate::cli) requirement: Requirement,
    pub(super) xml: String,
    /// Whether it is only described, and so has no name of its own.
    pub(super) is_described: bool,
}

impl Asked {
    pub(in crate::cli) fn parse(
        what: &str,
        xml: String,
        is_described: bool,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            requirement: Requirement::parse(what, xml.as_bytes())?,
            xml,
            is_described,
        })
    }
}

impl Question {
    /// Whether there is a question at all.
    pub(super) fn validate(&self) -> Result<(), Failure> {
        let described = self.description != Description::default();
        if self.domain_xml.is_some() || self.domain.is_some() || described {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Usage,
            "which domain? Give --domain-xml FILE (- for standard input), --domain NAME for a \
             running one, or describe one: --machine q35 --vcpus 300",
        ))
    }

    /// The running domain that is asked about.
    pub(super) fn running(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// The domain from a file or a description; `None` if a running one is asked about.
    /// `native` is the node's own architecture, `best_type` knows the best domain type of one.
    pub(super) fn offline(
        &self,
        native: Option<&str>,
        best_type: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Option<Asked>> {
        if self.domain.is_some() {
            return Ok(None);
        }
        if let Some(path) = &self.domain_xml {
            let (name, xml) = read(path)?;
            return Asked::parse(&name, xml, false).map(Some);
        }
        let definition = self.description.define(native, best_type);
        Asked::parse("the description", definition.to_xml(), true).map(Some)
    }
}

impl Description {
    fn define(
        &self,
        native: Option<&str>,
        best_type: impl Fn(&str) -> Option<String>,
    ) -> MinimalDefinition {
        let arch = self.arch.as_deref().or(native);
        let parts = [self.sockets, self.dies, self.cores, self.threads];
        let [sockets, dies, cores, threads] = parts.map(|part| part.unwrap_or(1));
        let shape = VcpuTopology {
            sockets,
            dies,
            cores,
            threads,
            ..VcpuTopology::default()
        };
        let topology = parts.iter().any(Option::is_some).then_some(shape);
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
            memory: self.memory.unwrap_or(USUAL_MEMORY),
            cpu_mode: self.cpu_mode.clone(),
            cpu_model: self.cpu_model.clone(),
            features: self.cpu_feature.clone(),
        }
    }
}

/// A document and what to call it. One that is too large is not read whole.
pub(in crate::cli) fn read(path: &Path) -> anyhow::Result<(String, String)> {
    let limit = MAX_BYTES as u64 + 1;
    let mut bytes = Vec::new();
    let name = if path == Path::new("-") {
        let input = std::io::stdin().lock();
        input
            .take(limit)
            .read_to_end(&mut bytes)
            .context("cannot read standard input")?;
        "standard input".to_owned()
    } else {
        let name = path.display().to_string();
        let file = std::fs::File::open(path).with_context(|| format!("cannot read {name}"))?;
        file.take(limit)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {name}"))?;
        name
    };
    if bytes.len() > MAX_BYTES {
        bail!("{name}: is larger than {} MiB", MAX_BYTES / 1024 / 1024);
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok((name, text)),
        Err(error) => bail!(
            "{name}: is not UTF-8 after byte {}",
            error.utf8_error().valid_up_to()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// libvirt refuses ACPI for Arm's guests without UEFI, and for others altogether.
    #[test]
    fn only_x86_is_described_with_acpi() {
        for (arch, native, acpi) in [
            (None, None, true),
            (None, Some("x86_64"), true),
            (None, Some("aarch64"), false),
            (Some("aarch64"), Some("x86_64"), false),
            (Some("i686"), Some("s390x"), true),
        ] {
            let description = Description {
                arch: arch.map(str::to_owned),
                ..Description::default()
            };
            let xml = description.define(native, |_| None).to_xml();
            assert_eq!(xml.contains("<acpi/>"), acpi, "{xml}");
        }
    }
}
