//! [`DomainBackend`] by way of libvirt.

use tokio::sync::watch;

use super::Libvirt;
use super::call::Call;
use super::limits::{AgentPlace, Class};
use super::session::Session;
use crate::hotplug::Action;
use crate::hypervisor::{
    CallError, ConnectionState, DomainBackend, DomainRef, DomainStats, Notices, ObservationQuery,
    Seen,
};

impl Libvirt {
    /// Makes a call about a domain, after the domain's earlier calls of the same class.
    pub(super) async fn about<T: Send + 'static>(
        &self,
        class: Class,
        name: &'static str,
        domain: &DomainRef,
        work: impl FnOnce(&Session, &DomainRef) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, CallError> {
        let call = Call {
            domain: Some(domain.uuid.clone()),
            ..self.call(name, class)
        };
        let domain = domain.clone();
        self.connection
            .call(call, move |session| work(session, &domain))
            .await
    }
}

impl DomainBackend for Libvirt {
    async fn find(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        let name_or_uuid = name_or_uuid.to_owned();
        let call = self.call("find-domain", Class::Control);
        self.connection
            .call(call, move |session| session.find_domain(&name_or_uuid))
            .await
            .and_then(|domain| self.if_taken(domain))
    }

    async fn observe(&self, domain: &DomainRef, query: ObservationQuery) -> Seen {
        let definition = query.definition;
        let read = move |session: &Session, domain: &_| session.domain(domain, definition);
        let live = self.about(Class::Change, "domain", domain, read);
        let statistics = self.about(
            Class::Statistics,
            "domain-stats",
            domain,
            Session::domain_stats,
        );
        let question = Call {
            domain: Some(domain.uuid.clone()),
            wait: query.agent,
            agent_place: query.background.then_some(AgentPlace::Background),
            ..self.call("guest-vcpus", Class::Agent)
        };
        let agent = {
            let domain = domain.clone();
            let ask = move |session: &Session| session.guest_vcpus(&domain);
            self.connection.call(question, ask)
        };
        let answers = self.about(Class::Change, "acpi-answers", domain, Session::acpi_answers);
        query.observe(live, statistics, agent, answers).await
    }

    async fn statistics(&self) -> Result<Vec<DomainStats>, CallError> {
        let call = self.call("all-domain-stats", Class::Statistics);
        let domains = self
            .connection
            .call(call, Session::all_domain_stats)
            .await?;
        Ok(self.take(domains))
    }

    async fn apply(&self, domain: &DomainRef, action: &Action) -> Result<(), CallError> {
        let (class, name) = match action {
            Action::SetVcpus { .. } => (Class::Change, "set-vcpus"),
            Action::OnlineVcpus { .. } => (Class::Agent, "set-guest-vcpus"),
            Action::ResizeVirtioMem { .. } => (Class::Change, "update-device"),
            Action::AttachDimm { .. } => (Class::Change, "attach-device"),
            Action::SetStatsPeriod { .. } => (Class::Change, "set-stats-period"),
        };
        let (action, target) = (action.clone(), domain.clone());
        let call = self.call(name, class);
        let call = match class {
            // libvirt asks the agent at least twice.
            Class::Agent => Call {
                deadline: 2 * call.deadline,
                agent_place: Some(AgentPlace::Slow),
                ..call
            },
            _ => call,
        };
        let call = Call {
            domain: Some(domain.uuid.clone()),
            ..call
        };
        let work = move |session: &Session, domain: &DomainRef| match action {
            Action::SetVcpus { count, persist } => session.set_vcpus(domain, count, persist),
            Action::OnlineVcpus { ids } => session.set_guest_vcpus(domain, &ids, true),
            Action::ResizeVirtioMem {
                alias,
                requested,
                persist,
            } => session.resize_virtio_mem(domain, &alias, requested, persist),
            Action::AttachDimm {
                alias,
                size,
                node,
                persist,
            } => session.attach_dimm(domain, &alias, size, node, persist),
            Action::SetStatsPeriod { seconds, .. } => session.set_stats_period(domain, seconds),
        };
        self.connection
            .call(call, move |session| work(session, &target))
            .await
    }

    fn events(&self) -> Notices {
        self.connection.shared().publisher.subscribe()
    }

    fn health(&self) -> watch::Receiver<ConnectionState> {
        self.connection.shared().health.subscribe()
    }
}
