//! [`DomainBackend`] by way of libvirt.

use std::time::Duration;

use tokio::sync::watch;

use super::Libvirt;
use super::connection::Call;
use super::limits::Class;
use super::session::Session;
use crate::domain::{BalloonStats, IdSet};
use crate::hotplug::{GuestVcpus, Ost};
use crate::hypervisor::{
    CallError, Connection, DomainBackend, DomainRef, DomainStats, LiveDomain, Notices, Scope,
};
use crate::units::KiB;

impl Libvirt {
    /// Makes a call about a domain, after the domain's earlier calls of the same class.
    async fn about<T: Send + 'static>(
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
    async fn find_domain(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        let name_or_uuid = name_or_uuid.to_owned();
        let call = self.call("find-domain", Class::Control);
        self.connection
            .call(call, move |session| session.find_domain(&name_or_uuid))
            .await
    }

    async fn domain(&self, domain: &DomainRef) -> Result<LiveDomain, CallError> {
        self.about(Class::Change, "domain", domain, Session::domain)
            .await
    }

    async fn all_domain_stats(&self) -> Result<Vec<DomainStats>, CallError> {
        let call = self.call("all-domain-stats", Class::Statistics);
        self.connection.call(call, Session::all_domain_stats).await
    }

    async fn domain_stats(&self, domain: &DomainRef) -> Result<DomainStats, CallError> {
        let work = Session::domain_stats;
        self.about(Class::Statistics, "domain-stats", domain, work)
            .await
    }

    async fn memory_stats(&self, domain: &DomainRef) -> Result<BalloonStats, CallError> {
        let work = Session::memory_stats;
        self.about(Class::Change, "memory-stats", domain, work)
            .await
    }

    async fn guest_vcpus(&self, domain: &DomainRef) -> Result<GuestVcpus, CallError> {
        let work = Session::guest_vcpus;
        self.about(Class::Agent, "guest-vcpus", domain, work).await
    }

    async fn acpi_answers(&self, domain: &DomainRef) -> Result<Vec<Ost>, CallError> {
        let work = Session::acpi_answers;
        self.about(Class::Change, "acpi-answers", domain, work)
            .await
    }

    async fn set_guest_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: &IdSet,
        online: bool,
    ) -> Result<(), CallError> {
        let vcpus = vcpus.clone();
        self.about(
            Class::Agent,
            "set-guest-vcpus",
            domain,
            move |session, domain| session.set_guest_vcpus(domain, &vcpus, online),
        )
        .await
    }

    async fn set_agent_timeout(
        &self,
        domain: &DomainRef,
        timeout: Duration,
    ) -> Result<(), CallError> {
        self.about(
            Class::Agent,
            "agent-timeout",
            domain,
            move |session, domain| session.set_agent_timeout(domain, timeout),
        )
        .await
    }

    async fn set_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: u32,
        scope: Scope,
    ) -> Result<(), CallError> {
        self.about(
            Class::Change,
            "set-vcpus",
            domain,
            move |session, domain| session.set_vcpus(domain, vcpus, scope),
        )
        .await
    }

    async fn update_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        let xml = xml.to_owned();
        self.about(
            Class::Change,
            "update-device",
            domain,
            move |session, domain| session.update_device(domain, &xml, scope),
        )
        .await
    }

    async fn resize_virtio_mem(
        &self,
        domain: &DomainRef,
        alias: &str,
        requested: KiB,
    ) -> Result<(), CallError> {
        let alias = alias.to_owned();
        self.about(
            Class::Change,
            "update-device",
            domain,
            move |session, domain| session.resize_virtio_mem(domain, &alias, requested),
        )
        .await
    }

    async fn attach_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        let xml = xml.to_owned();
        self.about(
            Class::Change,
            "attach-device",
            domain,
            move |session, domain| session.attach_device(domain, &xml, scope),
        )
        .await
    }

    async fn detach_device(
        &self,
        domain: &DomainRef,
        alias: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        let alias = alias.to_owned();
        self.about(
            Class::Change,
            "detach-device",
            domain,
            move |session, domain| session.detach_device(domain, &alias, scope),
        )
        .await
    }

    fn notices(&self) -> Notices {
        self.connection.shared().publisher.subscribe()
    }

    fn listening(&self) -> watch::Receiver<Connection> {
        self.connection.shared().health.subscribe()
    }
}
