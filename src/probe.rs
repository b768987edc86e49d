//! The prober: reads every fact of a node once.
//!
//! ```text
//! host::read ─────────── files and devices of the host, below the root
//! NodeSource::versions ─ unreachable? ──▶ all sources below fail for the same reason
//!   │                    nothing runs that has any? ──▶ not read, which is no failure
//!   ├─ capabilities ──── choose the query: native architecture, usual machine type, best domain type
//!   ├─ domain_capabilities(query)
//!   │    └─ baseline_cpu(host model) ── skipped without a host model
//!   ├─ native_arguments(domain with 256 vCPUs) ── kept while the versions stay the same
//!   └─ running_domains
//! ```
//!
//! A [`NodeSource`] returns documents as text; [`crate::capability`] and [`crate::domain`] parse
//! them. Any implementation serves, whether it calls libvirt, reads files or runs an emulator.
//! [`LabelSource`] is the one of the labels.
//!
//! A running domain that cannot be read is in [`Reading::unreadable`] and is no failure: its owner
//! may have written what cannot be read. A connection whose domains cannot be read makes the source
//! `domains` fail, so that no label is removed; the domains of the others are known, and readiness
//! does not wait for it: the connection may be a tenant's.
//!
//! Every call of the source has its own deadline. Reading the host takes some dozen short system
//! calls, which do not wait for a device. A source that fails, or whose document is malformed, is
//! recorded in [`Reading::failures`], and its facts stay unknown. The prober does not retry: its
//! caller decides when to probe again.

mod launcher_versions;
mod metrics;
mod source;

pub use self::metrics::ProbeMetrics;
pub use self::source::{LabelSource, LaunchersSeen, ObserveLaunchers};
use std::path::PathBuf;
use std::sync::Arc;

use tracing::debug;

use crate::capability::eim::{dry_run_domain, from_native_arguments};
use crate::capability::{
    Capabilities, CpuDefinition, DomainCapabilities, Eim, NodeFacts, Version, is_q35,
};
use crate::domain::{DomainRef, NodeRequirements};
use crate::host;
use crate::hypervisor::{
    CallError, ConnectionId, DomainCapabilitiesQuery, NodeSource, UnreadableDomain, Versions,
};
use crate::label::{CapabilitiesInUse, FactSource};
use crate::telemetry::now_seconds;
use crate::xml::DocumentError;

/// First libvirt whose domain capabilities can list features that the hypervisor supports and does
/// not enable by default. hypervisor-cpu-baseline then returns all supported features.
const LISTS_SUPPORTED_FEATURES: Version = Version::new(12, 5, 0);

/// Maximum number of connections that a failure names.
const NAMED: usize = 3;

/// `VIR_ERR_CONFIG_UNSUPPORTED`, libvirt's error for a definition that it would not start.
const CONFIG_UNSUPPORTED: &str = "67";

/// A source that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFailure {
    pub source: FactSource,
    /// The label value in metrics.
    pub code: &'static str,
    pub message: String,
    /// True if the rest of the source was read, so that readiness does not wait for it.
    pub is_partial: bool,
}

impl SourceFailure {
    fn of_call(source: FactSource, error: &CallError) -> Self {
        Self {
            source,
            code: error.code(),
            message: error.to_string(),
            is_partial: false,
        }
    }

    /// Returns the failure of connections whose domains are unknown.
    fn of_connections(unreachable: &[(ConnectionId, String)]) -> Self {
        let named = unreachable.iter().take(NAMED);
        let named: Vec<String> = named.map(|(id, why)| format!("{id} {why}")).collect();
        let others = match unreachable.len().saturating_sub(NAMED) {
            0 => String::new(),
            others => format!("; and {others} more"),
        };
        Self {
            source: FactSource::Domains,
            code: "unavailable",
            message: format!(
                "domains of a connection are unknown: {}{others}",
                named.join("; ")
            ),
            is_partial: true,
        }
    }

    fn malformed(source: FactSource, error: &DocumentError) -> Self {
        Self {
            source,
            code: "malformed",
            message: error.to_string(),
            is_partial: false,
        }
    }
}

/// The result of one probe.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    pub facts: NodeFacts,
    /// Capabilities that any running domain uses.
    pub in_use: CapabilitiesInUse,
    pub domains: Vec<DomainUsage>,
    /// `None` if the domains could not be listed.
    pub running_domains: Option<usize>,
    /// The running domains whose definitions cannot be read. Each is in `domains` too.
    pub unreadable: Vec<UnreadDomain>,
    pub failures: Vec<SourceFailure>,
    /// Sources that were not read, because nothing can answer at present.
    pub unread: Vec<FactSource>,
    /// True if documents were read from files and not from libvirt.
    pub from_files: bool,
}

/// The capabilities that one running domain uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainUsage {
    pub id: DomainRef,
    pub in_use: CapabilitiesInUse,
}

/// A running domain whose definition cannot be read, so that its use of capabilities is unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadDomain {
    pub id: DomainRef,
    /// The label value in metrics.
    pub code: &'static str,
    pub message: String,
}

pub struct Prober<S> {
    node_source: Arc<S>,
    metrics: Arc<ProbeMetrics>,
    /// Root of the host's file system.
    root: PathBuf,
    /// Result of the dry run with these versions.
    dry_run: Option<(Versions, Option<Eim>)>,
}

impl<S: NodeSource> Prober<S> {
    pub fn new(node_source: Arc<S>, metrics: Arc<ProbeMetrics>, root: PathBuf) -> Self {
        Self {
            node_source,
            metrics,
            root,
            dry_run: None,
        }
    }

    /// Discards the result of the dry run, which a new connection or a changed emulator can
    /// invalidate without a change of version.
    pub fn invalidate(&mut self) {
        self.dry_run = None;
    }

    /// Probes once. A failure of one source does not affect the facts of the others.
    pub async fn read(&mut self) -> Reading {
        let mut reading = Reading::default();
        let host = host::read(&self.root);
        reading.facts.kvm_max_vcpus = host.kvm_max_vcpus;
        reading.facts.host = Some(host);
        self.succeeded(FactSource::Host);

        match self.node_source.versions().await {
            Ok(None) => self.not_read(&mut reading, FactSource::Versions),
            Ok(Some(versions)) => {
                self.succeeded(FactSource::Versions);
                reading.facts.libvirt_version = Some(versions.libvirt);
                reading.facts.hypervisor_version = versions.hypervisor;
            }
            // The other calls would fail in the same way, each after its own wait.
            Err(error) if error.is_lost() => {
                for source in FactSource::ALL {
                    if source != FactSource::Host {
                        self.failed(&mut reading, SourceFailure::of_call(source, &error));
                    }
                }
                return reading;
            }
            Err(error) => {
                let failure = SourceFailure::of_call(FactSource::Versions, &error);
                self.failed(&mut reading, failure);
            }
        }
        reading.from_files = self.node_source.reads_files();
        self.read_documents(&mut reading).await;
        self.read_domains(&mut reading).await;
        reading
    }

    async fn read_documents(&mut self, reading: &mut Reading) {
        let answer = self.node_source.capabilities().await;
        reading.facts.capabilities = self.parse(
            reading,
            FactSource::Capabilities,
            answer,
            Capabilities::parse,
        );
        let mut query = default_query(&reading.facts);
        let answer = self.node_source.domain_capabilities(query.clone()).await;
        let document = self.parse(
            reading,
            FactSource::DomainCapabilities,
            answer,
            DomainCapabilities::parse,
        );
        if let Some(document) = document {
            // Documents on disk are for a domain type that was chosen when they were written.
            if document.virt_type.is_some() && document.virt_type != query.virt_type {
                query.virt_type.clone_from(&document.virt_type);
                reading.facts.domain_type.clone_from(&document.virt_type);
            }
            self.read_baseline(reading, &query, &document).await;
            reading.facts.domain_capabilities.push(document);
        } else {
            let failure = SourceFailure {
                source: FactSource::CpuBaseline,
                code: "unavailable",
                message: "hypervisor-cpu-baseline needs the domain capabilities".to_owned(),
                is_partial: false,
            };
            self.failed(reading, failure);
        }
        reading.facts.eim = self.read_eim(&reading.facts, &query).await;
    }

    /// Reads all CPU features that the hypervisor supports. Architectures without a host model,
    /// such as Arm, have no baseline, which is not a failure.
    async fn read_baseline(
        &self,
        reading: &mut Reading,
        query: &DomainCapabilitiesQuery,
        document: &DomainCapabilities,
    ) {
        let lists_supported = reading
            .facts
            .libvirt_version
            .is_some_and(|version| version >= LISTS_SUPPORTED_FEATURES);
        let extended = if lists_supported {
            let query = DomainCapabilitiesQuery {
                supported_features: true,
                ..query.clone()
            };
            let answer = self.node_source.domain_capabilities(query).await;
            let name = FactSource::DomainCapabilities.as_str();
            let parse = |text: String| DomainCapabilities::parse(name, text.as_bytes()).ok();
            answer.ok().and_then(parse)
        } else {
            None
        };
        let host_model = extended
            .as_ref()
            .unwrap_or(document)
            .cpu
            .host_model
            .as_ref();
        let Some(cpu) = host_model.and_then(|host_model| host_model.to_cpu_xml()) else {
            self.succeeded(FactSource::CpuBaseline);
            return;
        };
        let answer = self.node_source.baseline_cpu(query.clone(), cpu).await;
        if let Err(CallError::Unsupported { text, .. }) = &answer {
            debug!(reason = %text, "hypervisor-cpu-baseline is not supported on this node");
            self.succeeded(FactSource::CpuBaseline);
            return;
        }
        reading.facts.baseline_cpu = self.parse(
            reading,
            FactSource::CpuBaseline,
            answer,
            CpuDefinition::parse,
        );
    }

    /// Determines by dry runs if a q35 domain can have 256 vCPUs, and if libvirt adds what it needs.
    /// `None` if the result is inconclusive; the versions decide then.
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
        if let Some((of, eim)) = self.dry_run
            && of == versions
        {
            return eim;
        }
        let dry_run = async |explicit| {
            let domain = dry_run_domain(virt_type, machine, explicit);
            self.node_source.native_arguments(domain).await
        };
        let eim = match dry_run(false).await {
            Ok(arguments) if from_native_arguments(&arguments) => Some(Eim::Auto),
            Err(error) if is_rejection(&error) => match dry_run(true).await {
                Ok(_) => Some(Eim::Explicit),
                Err(error) if is_rejection(&error) => Some(Eim::None),
                Err(_) => None,
            },
            // A timeout is kept too, so that not every probe waits for it.
            Ok(_) | Err(CallError::Overdue { .. }) => None,
            Err(_) => return None,
        };
        self.dry_run = Some((versions, eim));
        eim
    }

    async fn read_domains(&self, reading: &mut Reading) {
        let running = match self.node_source.running_domains().await {
            Ok(running) => running,
            Err(error) => {
                let failure = SourceFailure::of_call(FactSource::Domains, &error);
                return self.failed(reading, failure);
            }
        };
        if running.unreachable.is_empty() {
            self.succeeded(FactSource::Domains);
        } else {
            let failure = SourceFailure::of_connections(&running.unreachable);
            self.failed(reading, failure);
            reading.in_use.extend(&CapabilitiesInUse::unknown());
        }
        reading.running_domains = Some(running.domains.len());
        for domain in running.domains {
            let in_use = match domain.requirements {
                Ok(requirements) => in_use_by(requirements),
                // A tenant's domain is no failure of the node's source.
                Err(error) => {
                    reading.unreadable.push(UnreadDomain {
                        id: domain.id.clone(),
                        code: match &error {
                            UnreadableDomain::Malformed(_) => "malformed",
                            UnreadableDomain::Call(error) => error.code(),
                        },
                        message: error.to_string(),
                    });
                    CapabilitiesInUse::unknown()
                }
            };
            reading.in_use.extend(&in_use);
            reading.domains.push(DomainUsage {
                id: domain.id,
                in_use,
            });
        }
    }

    /// Parses the document of a source, and records the outcome.
    fn parse<T>(
        &self,
        reading: &mut Reading,
        source: FactSource,
        answer: Result<String, CallError>,
        parse: impl Fn(&str, &[u8]) -> Result<T, DocumentError>,
    ) -> Option<T> {
        let parsed = answer
            .map_err(|error| SourceFailure::of_call(source, &error))
            .and_then(|text| {
                parse(source.as_str(), text.as_bytes())
                    .map_err(|error| SourceFailure::malformed(source, &error))
            });
        match parsed {
            Ok(document) => {
                self.succeeded(source);
                Some(document)
            }
            Err(failure) => {
                self.failed(reading, failure);
                None
            }
        }
    }

    fn succeeded(&self, source: FactSource) {
        let labels = &[source.as_str()];
        self.metrics.attempts.with_label_values(labels).inc();
        self.metrics
            .last_success
            .with_label_values(labels)
            .set(now_seconds());
    }

    /// Records a source that nothing can answer at present: it has no age.
    fn not_read(&self, reading: &mut Reading, source: FactSource) {
        let labels = &[source.as_str()];
        // Fails only if the series does not exist.
        let _absent = self.metrics.last_success.remove_label_values(labels);
        reading.unread.push(source);
    }

    fn failed(&self, reading: &mut Reading, failure: SourceFailure) {
        let source = failure.source.as_str();
        self.metrics.attempts.with_label_values(&[source]).inc();
        self.metrics
            .failures
            .with_label_values(&[source, failure.code])
            .inc();
        reading.failures.push(failure);
    }
}

fn in_use_by(requirements: NodeRequirements) -> CapabilitiesInUse {
    CapabilitiesInUse {
        machines: requirements.machine.into_iter().collect(),
        cpu_models: requirements.cpu_model.into_iter().collect(),
        cpu_features: requirements.cpu_features.into_iter().collect(),
        enlightenments: requirements.enlightenments.into_iter().collect(),
        security: requirements.launch_security.into_iter().collect(),
        real_time: requirements.real_time,
        unknown: false,
    }
}

/// True if the source accepted the call, but would not start the domain.
fn is_rejection(error: &CallError) -> bool {
    match error {
        CallError::Failed { code, .. } => code == CONFIG_UNSUPPORTED,
        error => matches!(error, CallError::Unsupported { .. }),
    }
}

/// Chooses the native architecture, the machine type that new guests usually have, and the best
/// domain type. The source chooses whatever is unknown.
fn default_query(facts: &NodeFacts) -> DomainCapabilitiesQuery {
    let arch = facts.native_arch();
    DomainCapabilitiesQuery {
        arch: arch.map(str::to_owned),
        machine: facts.usual_machine().map(|machine| machine.name),
        virt_type: arch
            .and_then(|arch| facts.best_domain_type(arch))
            .map(str::to_owned),
        expand_features: true,
        supported_features: false,
    }
}
