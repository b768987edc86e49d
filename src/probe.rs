//! Reading all the facts of a node: which questions are asked, in which order, and what a failed
//! one means for the rest.

use std::path::PathBuf;
use std::sync::Arc;

use tracing::debug;

use crate::capability::eim::{dry_run_domain, from_native_arguments};
use crate::capability::{
    Capabilities, CpuDefinition, DomainCapabilities, Eim, NodeFacts, Version, is_q35, is_x86,
};
use crate::domain::NodeRequirements;
use crate::host;
use crate::hypervisor::{CallError, DomainCapabilitiesQuery, NodeSource, Versions};
use crate::label::{CapabilitiesInUse, FactSource};
use crate::telemetry::Metrics;
use crate::telemetry::metrics::now_seconds;
use crate::xml::DocumentError;

/// From this libvirt on, domain capabilities can list features that the hypervisor supports and
/// does not turn on by itself; hypervisor-cpu-baseline then prints all it can give.
const LISTS_SUPPORTED_FEATURES: Version = Version::new(12, 5, 0);

/// `VIR_ERR_CONFIG_UNSUPPORTED`: what every refusal of a definition comes as.
const CONFIG_UNSUPPORTED: &str = "67";

/// A source that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFailure {
    /// Which one.
    pub source: FactSource,
    /// The bounded word for why.
    pub code: &'static str,
    /// Why, as a sentence.
    pub message: String,
}

/// The answer to a call, or why there is none.
fn called<T>(source: FactSource, answer: Result<T, CallError>) -> Result<T, SourceFailure> {
    answer.map_err(|error| SourceFailure {
        source,
        code: error.code(),
        message: error.to_string(),
    })
}

/// The facts in a document, or why it cannot be read.
fn understood<T>(source: FactSource, parsed: Result<T, DocumentError>) -> Result<T, SourceFailure> {
    parsed.map_err(|error| SourceFailure {
        source,
        code: "malformed",
        message: error.to_string(),
    })
}

/// What a probe brought.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// The facts, as far as they could be read.
    pub facts: NodeFacts,
    /// What running domains stand on.
    pub in_use: CapabilitiesInUse,
    /// Each of them.
    pub domains: Vec<DomainUsage>,
    /// How many domains run; `None` if that could not be read.
    pub running_domains: Option<usize>,
    /// The sources that could not be read.
    pub failures: Vec<SourceFailure>,
}

/// What one running domain stands on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainUsage {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// What it needs of the node.
    pub in_use: CapabilitiesInUse,
}

/// Asks a hypervisor and the host for everything.
pub struct Prober<H> {
    hypervisor: Arc<H>,
    metrics: Arc<Metrics>,
    root: PathBuf,
    /// The answer of the dry run, for as long as the versions behind it are the same.
    dry_run: Option<(Versions, Option<Eim>)>,
}

impl<H: NodeSource> Prober<H> {
    /// For a hypervisor, and a host whose file system begins at `root`.
    pub fn new(hypervisor: Arc<H>, metrics: Arc<Metrics>, root: PathBuf) -> Self {
        Self {
            hypervisor,
            metrics,
            root,
            dry_run: None,
        }
    }

    /// Forgets what depends on more than versions, such as a new connection may bring.
    pub fn forget(&mut self) {
        self.dry_run = None;
    }

    /// Reads everything once. Never fails as a whole: what could not be read is in the reading's
    /// failures, and the rest is there.
    pub async fn read(&mut self) -> Reading {
        let mut reading = Reading::default();
        let host = host::read(&self.root);
        reading.facts.kvm_max_vcpus = host.kvm_max_vcpus;
        reading.facts.host = Some(host);
        self.succeeded(FactSource::Host);

        let versions = called(FactSource::Versions, self.hypervisor.versions().await);
        if let Some(versions) = self.record(&mut reading, FactSource::Versions, versions) {
            reading.facts.libvirt_version = Some(versions.libvirt);
            reading.facts.hypervisor_version = versions.hypervisor;
        }
        if reading
            .failures
            .iter()
            .any(|failure| failure.code == "unavailable")
        {
            // The others would fail alike, each after its own wait.
            for source in [
                FactSource::Capabilities,
                FactSource::DomainCapabilities,
                FactSource::CpuBaseline,
                FactSource::Domains,
            ] {
                let cause = reading.failures[0].clone();
                self.failed(&mut reading, SourceFailure { source, ..cause });
            }
            return reading;
        }
        self.read_documents(&mut reading).await;
        self.read_domains(&mut reading).await;
        reading
    }

    async fn read_documents(&mut self, reading: &mut Reading) {
        let document = called(
            FactSource::Capabilities,
            self.hypervisor.capabilities().await,
        )
        .and_then(|text| {
            let parsed = Capabilities::parse("libvirt's capabilities", text.as_bytes());
            understood(FactSource::Capabilities, parsed)
        });
        reading.facts.capabilities = self.record(reading, FactSource::Capabilities, document);
        let query = default_query(&reading.facts);
        let answer = self.hypervisor.domain_capabilities(query.clone()).await;
        let document = called(FactSource::DomainCapabilities, answer).and_then(|text| {
            let name = "libvirt's domain capabilities";
            understood(
                FactSource::DomainCapabilities,
                DomainCapabilities::parse(name, text.as_bytes()),
            )
        });
        let document = self.record(reading, FactSource::DomainCapabilities, document);
        match document {
            Some(document) => {
                self.read_baseline(reading, &query, &document).await;
                reading.facts.domain_capabilities.push(document);
            }
            None => self.failed(
                reading,
                SourceFailure {
                    source: FactSource::CpuBaseline,
                    code: "unavailable",
                    message: "hypervisor-cpu-baseline needs the domain capabilities".to_owned(),
                },
            ),
        }
        reading.facts.eim = self.read_eim(&reading.facts, &query).await;
    }

    /// Every CPU feature the hypervisor can give, where the architecture has such an answer.
    async fn read_baseline(
        &self,
        reading: &mut Reading,
        query: &DomainCapabilitiesQuery,
        document: &DomainCapabilities,
    ) {
        let all = DomainCapabilitiesQuery {
            supported_features: true,
            ..query.clone()
        };
        let lists_all = reading
            .facts
            .libvirt_version
            .is_some_and(|version| version >= LISTS_SUPPORTED_FEATURES);
        let wider = if lists_all {
            let answer = self.hypervisor.domain_capabilities(all).await;
            answer.ok().and_then(|text| {
                DomainCapabilities::parse("libvirt's domain capabilities", text.as_bytes()).ok()
            })
        } else {
            None
        };
        let host_model = wider.as_ref().unwrap_or(document).cpu.host_model.as_ref();
        let Some(cpu) = host_model.and_then(|host_model| host_model.to_cpu_xml()) else {
            // No host model, no baseline: so it is with Arm, and no fault.
            self.succeeded(FactSource::CpuBaseline);
            return;
        };
        let answer = self.hypervisor.baseline_cpu(query.clone(), cpu).await;
        if let Err(CallError::Unsupported { text, .. }) = &answer {
            debug!(message = %text, "hypervisor-cpu-baseline has no answer here");
            self.succeeded(FactSource::CpuBaseline);
            return;
        }
        let cpu = called(FactSource::CpuBaseline, answer).and_then(|text| {
            let parsed = CpuDefinition::parse("libvirt's CPU baseline", text.as_bytes());
            understood(FactSource::CpuBaseline, parsed)
        });
        reading.facts.baseline_cpu = self.record(reading, FactSource::CpuBaseline, cpu);
    }

    /// Asks libvirt whether it would start a q35 domain with 256 vCPUs, and what it would add.
    /// `None` where that is no question or there is no clear answer; the versions decide then.
    async fn read_eim(
        &mut self,
        facts: &NodeFacts,
        query: &DomainCapabilitiesQuery,
    ) -> Option<Eim> {
        let versions = Versions {
            libvirt: facts.libvirt_version?,
            hypervisor: facts.hypervisor_version,
        };
        let machine = query.machine.as_deref().filter(|machine| is_q35(machine))?;
        let virt_type = query.virt_type.as_deref()?;
        if let Some((of, answer)) = self.dry_run
            && of == versions
        {
            return answer;
        }
        let would_start = async |explicit| {
            let domain = dry_run_domain(virt_type, machine, explicit);
            self.hypervisor.native_arguments(domain).await
        };
        let answer = match would_start(false).await {
            Ok(arguments) if from_native_arguments(&arguments) => Some(Eim::Auto),
            Err(error) if is_refusal(&error) => match would_start(true).await {
                Ok(_) => Some(Eim::Explicit),
                Err(error) if is_refusal(&error) => Some(Eim::None),
                Err(_) => None,
            },
            // A libvirt that is slow with this one is not asked again at every probe.
            Ok(_) | Err(CallError::Overdue { .. }) => None,
            Err(_) => return None,
        };
        self.dry_run = Some((versions, answer));
        answer
    }

    async fn read_domains(&self, reading: &mut Reading) {
        let domains = called(FactSource::Domains, self.hypervisor.running_domains().await);
        let Some(domains) = self.record(reading, FactSource::Domains, domains) else {
            return;
        };
        reading.running_domains = Some(domains.len());
        for domain in domains {
            let name = format!("domain {}", domain.uuid);
            let needs = NodeRequirements::parse(&name, domain.xml.as_bytes());
            match understood(FactSource::Domains, needs) {
                Ok(needs) => {
                    let in_use = CapabilitiesInUse {
                        machines: needs.machine.into_iter().collect(),
                        cpu_models: needs.cpu_model.into_iter().collect(),
                        cpu_features: needs.cpu_features.into_iter().collect(),
                    };
                    reading.in_use.extend(&in_use);
                    reading.domains.push(DomainUsage {
                        name: domain.name,
                        uuid: domain.uuid,
                        in_use,
                    });
                }
                Err(failure) => self.failed(reading, failure),
            }
        }
    }

    /// Counts an outcome, and keeps a failure in the reading.
    fn record<T>(
        &self,
        reading: &mut Reading,
        source: FactSource,
        outcome: Result<T, SourceFailure>,
    ) -> Option<T> {
        match outcome {
            Ok(value) => {
                self.succeeded(source);
                Some(value)
            }
            Err(failure) => {
                self.failed(reading, failure);
                None
            }
        }
    }

    fn succeeded(&self, source: FactSource) {
        self.metrics
            .probe_attempts
            .with_label_values(&[source.as_str()])
            .inc();
        self.metrics
            .probe_last_success
            .with_label_values(&[source.as_str()])
            .set(now_seconds());
    }

    fn failed(&self, reading: &mut Reading, failure: SourceFailure) {
        let source = failure.source.as_str();
        self.metrics
            .probe_attempts
            .with_label_values(&[source])
            .inc();
        self.metrics
            .probe_failures
            .with_label_values(&[source, failure.code])
            .inc();
        reading.failures.push(failure);
    }
}

/// Whether libvirt understood the domain and would not start it.
fn is_refusal(error: &CallError) -> bool {
    match error {
        CallError::Failed { code, .. } => code == CONFIG_UNSUPPORTED,
        error => matches!(error, CallError::Unsupported { .. }),
    }
}

/// Asks for the machine type that new guests use and the best domain type, and leaves to libvirt
/// what is unknown.
fn default_query(facts: &NodeFacts) -> DomainCapabilitiesQuery {
    let arch = facts.native_arch();
    let listed = arch.map(|arch| facts.machines(arch)).unwrap_or_default();
    let usual: &[&str] = match arch {
        Some(arch) if is_x86(arch) => &["q35", "pc"],
        Some("s390x") => &["s390-ccw-virtio"],
        Some("ppc64" | "ppc64le") => &["pseries"],
        _ => &["virt"],
    };
    let machine = usual
        .iter()
        .find(|name| listed.iter().any(|machine| machine.name == **name));
    DomainCapabilitiesQuery {
        arch: arch.map(str::to_owned),
        machine: machine.map(|name| (*name).to_owned()),
        virt_type: arch
            .and_then(|arch| facts.best_domain_type(arch))
            .map(str::to_owned),
        expand_features: true,
        supported_features: false,
    }
}
