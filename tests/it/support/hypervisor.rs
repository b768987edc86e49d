//! A hypervisor in memory: real documents, and faults on demand.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use virtnode::capability::Version;
use virtnode::compat::CpuComparison;
use virtnode::hypervisor::{
    CallError, ConnectionState, DomainCapabilitiesQuery, NodeSource, RunningDomain, RunningDomains,
    Versions,
};

/// The answers, which a test changes between probes.
pub(crate) struct Answers {
    pub(crate) versions: Result<Option<Versions>, CallError>,
    pub(crate) capabilities: Result<String, CallError>,
    pub(crate) domain_capabilities: Result<String, CallError>,
    pub(crate) domains: Vec<RunningDomain>,
    /// Number of queries for the capabilities.
    pub(crate) asked: usize,
}

/// A hypervisor in memory.
pub(crate) struct InMemory {
    answers: Mutex<Answers>,
    connection: watch::Sender<ConnectionState>,
}

impl InMemory {
    /// Returns a hypervisor with the answers of the captured Debian 13 host, without running domains.
    pub(crate) fn debian_13() -> Self {
        let fixture = "debian13-libvirt-11.3.0-qemu-10.0";
        let versions = (Version::new(11, 3, 0), Version::new(10, 0, 2));
        Self::captured(fixture, "dc-x86_64-q35-kvm.xml", versions)
    }

    /// The same of a captured Debian sid, with libvirt 12.8.
    pub(crate) fn debian_sid() -> Self {
        let fixture = "debian-sid-libvirt-12.8.0-qemu-11.1";
        let versions = (Version::new(12, 8, 0), Version::new(11, 1, 0));
        Self::captured(fixture, "dc-x86_64-q35-qemu.xml", versions)
    }

    fn captured(fixture: &str, document: &str, versions: (Version, Version)) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(fixture);
        let read = |file: &str| Ok(fs::read_to_string(directory.join(file)).unwrap());
        Self {
            answers: Mutex::new(Answers {
                versions: Ok(Some(Versions {
                    libvirt: versions.0,
                    hypervisor: Some(versions.1),
                })),
                capabilities: read("capabilities.xml"),
                domain_capabilities: read(document),
                domains: Vec::new(),
                asked: 0,
            }),
            connection: watch::Sender::new(ConnectionState::Up(1)),
        }
    }

    /// Changes the answers.
    pub(crate) fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes every line of the capabilities with this machine.
    pub(crate) fn drop_machine(&self, machine: &str) {
        let mut answers = self.answers();
        let name = format!(">{machine}<");
        let capabilities = answers.capabilities.as_ref().unwrap();
        let kept = capabilities.lines().filter(|line| !line.contains(&name));
        answers.capabilities = Ok(kept.collect::<Vec<_>>().join("\n"));
    }
}

impl NodeSource for InMemory {
    async fn versions(&self) -> Result<Option<Versions>, CallError> {
        self.answers().versions.clone()
    }

    async fn capabilities(&self) -> Result<String, CallError> {
        let mut answers = self.answers();
        answers.asked += 1;
        answers.capabilities.clone()
    }

    async fn domain_capabilities(&self, _: DomainCapabilitiesQuery) -> Result<String, CallError> {
        self.answers().domain_capabilities.clone()
    }

    async fn baseline_cpu(
        &self,
        _: DomainCapabilitiesQuery,
        _: String,
    ) -> Result<String, CallError> {
        let text = "not in memory".to_owned();
        Err(CallError::Unsupported {
            call: "baseline-cpu".into(),
            text,
        })
    }

    async fn compare_cpu(
        &self,
        _: DomainCapabilitiesQuery,
        _: String,
    ) -> Result<CpuComparison, CallError> {
        let text = "not in memory".to_owned();
        Err(CallError::Unsupported {
            call: "compare-cpu".into(),
            text,
        })
    }

    async fn native_arguments(&self, _: String) -> Result<String, CallError> {
        Ok("/usr/bin/qemu-system-x86_64 -device intel-iommu,intremap=on,eim=on".to_owned())
    }

    async fn running_domains(&self) -> Result<RunningDomains, CallError> {
        Ok(RunningDomains {
            domains: self.answers().domains.clone(),
            unreachable: Vec::new(),
        })
    }

    fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.connection.subscribe()
    }
}
