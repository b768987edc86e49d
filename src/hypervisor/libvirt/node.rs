//! [`NodeSource`] by way of libvirt.

use std::sync::Arc;

use tokio::sync::watch;

use super::Libvirt;
use super::connection::Call;
use super::limits::Class;
use super::session::Session;
use crate::compat::CpuComparison;
use crate::hypervisor::{
    CallError, Connection, DomainCapabilitiesQuery, NodeSource, RunningDomain, Versions,
};

impl Libvirt {
    async fn document<T, W>(&self, name: &'static str, work: W) -> Result<T, CallError>
    where
        T: Send + 'static,
        W: FnOnce(&Session) -> Result<T, CallError> + Send + 'static,
    {
        let call = self.call(name, Class::Control);
        self.connection.call(call, work).await
    }

    /// Returns a call that is about no single domain.
    pub(super) fn call(&self, name: &'static str, class: Class) -> Call {
        Call {
            name,
            class,
            domain: None,
            deadline: class.deadline(&self.connection.shared().config),
        }
    }
}

impl NodeSource for Libvirt {
    async fn versions(&self) -> Result<Versions, CallError> {
        self.document("versions", Session::versions).await
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

    async fn running_domains(&self) -> Result<Vec<RunningDomain>, CallError> {
        // Reading a live definition waits for libvirt's lock on the domain.
        let call = Call {
            deadline: self.connection.shared().config.call_deadline,
            ..self.call("running-domains", Class::Change)
        };
        let shared = Arc::clone(self.connection.shared());
        self.connection
            .call(call, move |session| {
                session.running_domains(&shared.definitions)
            })
            .await
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.connection.shared().health.subscribe()
    }
}
