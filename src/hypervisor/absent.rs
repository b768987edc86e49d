//! [`NodeSource`] of a node without a libvirt of its own.

use tokio::sync::watch;

use super::{
    CallError, ConnectionState, DomainCapabilitiesQuery, NodeSource, RunningDomain, Versions,
};
use crate::compat::CpuComparison;

/// A hypervisor that the configuration says does not exist. Every call fails at once.
#[derive(Debug)]
pub struct AbsentHypervisor(watch::Sender<ConnectionState>);

impl Default for AbsentHypervisor {
    fn default() -> Self {
        Self(watch::Sender::new(ConnectionState::Absent))
    }
}

fn absent<T>() -> Result<T, CallError> {
    let reason = "this node has no libvirt of its own (connect: none)";
    Err(CallError::Unavailable(reason.to_owned()))
}

impl NodeSource for AbsentHypervisor {
    async fn versions(&self) -> Result<Versions, CallError> {
        absent()
    }

    async fn capabilities(&self) -> Result<String, CallError> {
        absent()
    }

    async fn domain_capabilities(&self, _: DomainCapabilitiesQuery) -> Result<String, CallError> {
        absent()
    }

    async fn baseline_cpu(
        &self,
        _: DomainCapabilitiesQuery,
        _: String,
    ) -> Result<String, CallError> {
        absent()
    }

    async fn compare_cpu(
        &self,
        _: DomainCapabilitiesQuery,
        _: String,
    ) -> Result<CpuComparison, CallError> {
        absent()
    }

    async fn native_arguments(&self, _: String) -> Result<String, CallError> {
        absent()
    }

    async fn running_domains(&self) -> Result<Vec<RunningDomain>, CallError> {
        absent()
    }

    fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.0.subscribe()
    }
}
