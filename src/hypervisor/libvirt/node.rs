//! [`NodeSource`] by way of libvirt.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Libvirt;
use super::call::Call;
use super::limits::Class;
use super::session::Session;
use crate::compat::CpuComparison;
use crate::domain::NodeRequirements;
use crate::hypervisor::{
    CallError, ConnectionState, DomainCapabilitiesQuery, DomainRef, NodeSource, RunningDomain,
    RunningDomains, UnreadableDomain, Versions,
};

/// Maximum number of definitions read at a time: leaves room in the class for changes.
const READ_AT_A_TIME: usize = 2;

/// Timeout for starting a domain. QEMU allocates huge and locked pages before it answers, about a
/// gigabyte a second, and libvirt waits at least 30 s for its monitor.
const TRIAL_DEADLINE: Duration = Duration::from_secs(120);

impl Libvirt {
    async fn document<T, W>(&self, name: &'static str, work: W) -> Result<T, CallError>
    where
        T: Send + 'static,
        W: FnOnce(&Session) -> Result<T, CallError> + Send + 'static,
    {
        let call = self.call(name, Class::Control);
        self.connection.call(call, work).await
    }

    /// Starts a transient domain, paused, and destroys it. libvirt destroys it as well when this
    /// connection ends.
    ///
    /// # Errors
    /// `Failed` with the message of libvirt and QEMU if the domain does not start.
    pub async fn try_start(&self, domain: String) -> Result<(), CallError> {
        let call = Call {
            deadline: TRIAL_DEADLINE,
            ..self.call("try-start", Class::Change)
        };
        let work = move |session: &Session| session.try_start(&domain);
        self.connection.call(call, work).await
    }

    /// Returns a call that is about no single domain.
    pub(super) fn call(&self, name: &'static str, class: Class) -> Call {
        Call {
            name,
            class,
            domain: None,
            deadline: class.deadline(&self.connection.shared().config),
            wait: None,
            agent_place: None,
        }
    }

    /// Reads a domain's requirements, at most until the deadline of the whole reading.
    async fn requirements(
        &self,
        domain: &DomainRef,
        until: Instant,
    ) -> Result<Result<NodeRequirements, UnreadableDomain>, CallError> {
        let call = Call {
            domain: Some(domain.uuid.clone()),
            deadline: until.saturating_duration_since(Instant::now()),
            ..self.call("domain", Class::Change)
        };
        let domain = domain.clone();
        self.connection
            .call(call, move |session| session.requirements(&domain))
            .await
    }

    /// Returns the live XML of a domain, without secrets: a document for dry runs.
    ///
    /// # Errors
    /// As of every call about a domain.
    pub async fn live_xml(&self, domain: &DomainRef) -> Result<String, CallError> {
        self.about(Class::Change, "domain", domain, Session::live_xml)
            .await
    }
}

impl NodeSource for Libvirt {
    async fn versions(&self) -> Result<Option<Versions>, CallError> {
        self.document("versions", Session::versions).await.map(Some)
    }

    async fn capabilities(&self) -> Result<String, CallError> {
        self.document("capabilities", Session::capabilities).await
    }

    async fn domain_capabilities(
        &self,
        query: DomainCapabilitiesQuery,
    ) -> Result<String, CallError> {
        self.document("domain-capabilities", move |session| {
            session.domain_capabilities(&query)
        })
        .await
    }

    async fn baseline_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> Result<String, CallError> {
        self.document("baseline-cpu", move |session| {
            session.baseline_cpu(&query, &cpu)
        })
        .await
    }

    async fn compare_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> Result<CpuComparison, CallError> {
        self.document("compare-cpu", move |session| {
            session.compare_cpu(&query, &cpu)
        })
        .await
    }

    async fn native_arguments(&self, domain: String) -> Result<String, CallError> {
        self.document("native-arguments", move |session| {
            session.native_arguments(&domain)
        })
        .await
    }

    async fn running_domains(&self) -> Result<RunningDomains, CallError> {
        let call = self.call("running-domains", Class::Control);
        let until = Instant::now() + call.deadline;
        let running = self.connection.call(call, Session::running).await?;
        let known = self.definitions.of(running.generation);
        let domains = stream::iter(running.domains)
            .map(|(id, domain)| {
                let known = known.get(&domain.uuid).filter(|(at, _)| *at == id);
                let known = known.map(|(_, requirements)| requirements.clone());
                async move {
                    let read = match known {
                        Some(known) => Ok(Ok(known)),
                        None => self.requirements(&domain, until).await,
                    };
                    (id, domain, read)
                }
            })
            .buffer_unordered(READ_AT_A_TIME);
        let domains: Vec<_> = domains.collect().await;
        let mut read = HashMap::new();
        let mut answer = Vec::with_capacity(domains.len());
        for (id, domain, requirements) in domains {
            let requirements = match requirements {
                Ok(requirements) => requirements,
                // It ended meanwhile.
                Err(CallError::NotFound(_) | CallError::NotRunning(_)) => continue,
                Err(error @ CallError::Unavailable(_)) => return Err(error),
                Err(error) => Err(error.into()),
            };
            if let Ok(requirements) = &requirements {
                read.insert(domain.uuid.clone(), (id, requirements.clone()));
            }
            answer.push(RunningDomain {
                id: domain,
                requirements,
            });
        }
        self.definitions.replace(running.generation, read);
        Ok(RunningDomains {
            domains: answer,
            unreachable: Vec::new(),
        })
    }

    fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.connection.shared().health.subscribe()
    }
}

/// Requirements of running domains, read once for each start of a domain: reading a definition waits
/// for libvirt's lock on the domain.
#[derive(Default)]
pub(super) struct Definitions(Mutex<(u64, Requirements)>);

/// By UUID, with the ID under which it was read.
type Requirements = HashMap<String, (u32, NodeRequirements)>;

impl Definitions {
    /// Returns what was read over connections of this generation.
    fn of(&self, generation: u64) -> Requirements {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0 == generation {
            known.1.clone()
        } else {
            HashMap::new()
        }
    }

    fn replace(&self, generation: u64, requirements: Requirements) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (generation, requirements);
    }
}
