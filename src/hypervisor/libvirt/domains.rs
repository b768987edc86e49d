//! The calls about domains, over one connection. Everything here blocks.

use std::time::{Duration, Instant};

use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::device::with_requested;
use super::failure;
use super::session::{Session, no_nul};
use crate::domain::{BalloonStats, DomainState, IdSet, Job, PauseReason, Stats, is_uuid};
use crate::ffi::{self, DomainRecord};
use crate::hotplug::{GuestVcpus, Ost};
use crate::hypervisor::{CallError, DomainRef, DomainStats, LiveDomain, Scope};
use crate::units::{Bytes, KiB};

/// What is asked of the bulk statistics, and how: never waiting behind what is being done to a
/// domain.
const STATS: u32 =
    sys::VIR_DOMAIN_STATS_STATE | sys::VIR_DOMAIN_STATS_VCPU | sys::VIR_DOMAIN_STATS_BALLOON;
const STATS_FLAGS: u32 = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;

impl Session {
    fn classify_domain(
        &self,
        call: &'static str,
        domain: Option<&Domain>,
        error: &Error,
        began: Instant,
    ) -> CallError {
        failure::classify_domain(call, error, began.elapsed(), self.is_alive(), || {
            domain.is_none_or(|domain| domain.is_active().unwrap_or(true))
        })
    }

    /// Does `work` with a domain.
    fn with<T>(
        &self,
        call: &'static str,
        domain: &DomainRef,
        work: impl FnOnce(&Domain) -> Result<T, Error>,
    ) -> Result<T, CallError> {
        let began = Instant::now();
        let domain = self
            .connect
            .lookup_domain_by_uuid_string(&domain.uuid)
            .map_err(|error| self.classify_domain(call, None, &error, began))?;
        work(&domain).map_err(|error| self.classify_domain(call, Some(&domain), &error, began))
    }

    pub(super) fn find_domain(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        const CALL: &str = "find-domain";
        if no_nul(CALL, [Some(name_or_uuid)]).is_err() {
            // libvirt could not be asked for it.
            let message = format!("no domain has the name {name_or_uuid:?}");
            return Err(CallError::NotFound(message));
        }
        let began = Instant::now();
        let by_uuid = match is_uuid(name_or_uuid) {
            true => self.connect.lookup_domain_by_uuid_string(name_or_uuid).ok(),
            false => None,
        };
        let found = by_uuid.map_or_else(|| self.connect.lookup_domain_by_name(name_or_uuid), Ok);
        found
            .and_then(|domain| identity(&domain))
            .map_err(|error| self.classify_domain(CALL, None, &error, began))
    }

    pub(super) fn domain(&self, domain: &DomainRef) -> Result<LiveDomain, CallError> {
        self.with("domain", domain, |domain| {
            let (state, reason) = ffi::state(domain)?;
            let state = DomainState::from_libvirt(state);
            Ok(LiveDomain {
                id: identity(domain)?,
                state,
                reason: PauseReason::from_libvirt(state, reason),
                persistent: domain.is_persistent()?,
                xml: domain.xml_desc(0)?,
                job: job(domain),
            })
        })
    }

    pub(super) fn all_domain_stats(&self) -> Result<Vec<DomainStats>, CallError> {
        let flags = STATS_FLAGS | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE;
        let began = Instant::now();
        let records = ffi::all_domain_stats(&self.connect, STATS, flags)
            .map_err(|error| self.classify_domain("all-domain-stats", None, &error, began))?;
        Ok(records.into_iter().map(stats).collect())
    }

    pub(super) fn domain_stats(&self, id: &DomainRef) -> Result<DomainStats, CallError> {
        let record = self.with("domain-stats", id, |domain| {
            ffi::domain_stats(domain, STATS, STATS_FLAGS)
        })?;
        // A domain that ended after it was looked up is left out.
        record
            .map(stats)
            .ok_or_else(|| CallError::NotFound(format!("{id} ended")))
    }

    pub(super) fn memory_stats(&self, domain: &DomainRef) -> Result<BalloonStats, CallError> {
        let told = self.with("memory-stats", domain, |domain| domain.memory_stats(0))?;
        let mut stats = BalloonStats::default();
        for stat in told {
            let size = || KiB::new(stat.val).map(Bytes::from);
            match stat.tag {
                sys::VIR_DOMAIN_MEMORY_STAT_ACTUAL_BALLOON => stats.current = size(),
                sys::VIR_DOMAIN_MEMORY_STAT_AVAILABLE => stats.total = size(),
                sys::VIR_DOMAIN_MEMORY_STAT_USABLE => stats.usable = size(),
                sys::VIR_DOMAIN_MEMORY_STAT_LAST_UPDATE => stats.updated = Some(stat.val),
                _ => {}
            }
        }
        Ok(stats)
    }

    pub(super) fn guest_vcpus(&self, domain: &DomainRef) -> Result<GuestVcpus, CallError> {
        const CALL: &str = "guest-vcpus";
        let told = self.with(CALL, domain, ffi::guest_vcpus)?;
        let text = |name| {
            let parameter = told.iter().find(|parameter| parameter.name == name);
            parameter
                .and_then(|parameter| parameter.value.text())
                .unwrap_or_default()
        };
        GuestVcpus::from_libvirt(text("vcpus"), text("online")).map_err(|error| {
            CallError::AgentSilent {
                call: CALL.into(),
                text: error.to_string(),
            }
        })
    }

    pub(super) fn acpi_answers(&self, domain: &DomainRef) -> Result<Vec<Ost>, CallError> {
        const CALL: &str = "acpi-answers";
        const QUERY: &str = r#"{"execute":"query-acpi-ospm-status"}"#;
        let answer = self.with(CALL, domain, |domain| domain.qemu_monitor_command(QUERY, 0))?;
        Ost::from_query(&answer).map_err(|error| CallError::Failed {
            call: CALL.into(),
            code: sys::VIR_ERR_INTERNAL_ERROR.to_string(),
            text: error.to_string(),
        })
    }

    pub(super) fn set_guest_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: &IdSet,
        online: bool,
    ) -> Result<(), CallError> {
        self.with("set-guest-vcpus", domain, |domain| {
            ffi::set_guest_vcpus(domain, &vcpus.to_string(), online)
        })
    }

    pub(super) fn set_agent_timeout(
        &self,
        domain: &DomainRef,
        timeout: Duration,
    ) -> Result<(), CallError> {
        let seconds = timeout.as_secs() + u64::from(timeout.subsec_nanos() > 0);
        // 0 would be not to wait at all.
        let seconds = i32::try_from(seconds.max(1)).unwrap_or(i32::MAX);
        self.with("agent-timeout", domain, |domain| {
            ffi::set_agent_response_timeout(domain, seconds)
        })
    }

    pub(super) fn set_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: u32,
        scope: Scope,
    ) -> Result<(), CallError> {
        self.with("set-vcpus", domain, |domain| {
            // The bits are those of all changes (`VIR_DOMAIN_VCPU_LIVE`, `_CONFIG`).
            domain.set_vcpus_flags(vcpus, flags(scope))
        })
    }

    pub(super) fn update_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        self.with("update-device", domain, |domain| {
            domain.update_device_flags(xml, flags(scope))
        })
    }

    pub(super) fn resize_virtio_mem(
        &self,
        domain: &DomainRef,
        alias: &str,
        requested: KiB,
    ) -> Result<(), CallError> {
        const CALL: &str = "update-device";
        let xml = self.with(CALL, domain, |domain| domain.xml_desc(0))?;
        let device = with_requested(&xml, alias, requested);
        let device = device.ok_or_else(|| CallError::Failed {
            call: CALL.into(),
            code: sys::VIR_ERR_DEVICE_MISSING.to_string(),
            text: format!("there is no virtio-mem device with the alias {alias:?}"),
        })?;
        self.update_device(domain, &device, Scope::Live)
    }

    pub(super) fn attach_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        self.with("attach-device", domain, |domain| {
            domain.attach_device_flags(xml, flags(scope))
        })
    }

    pub(super) fn detach_device(
        &self,
        domain: &DomainRef,
        alias: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        self.with("detach-device", domain, |domain| {
            ffi::detach_device_alias(domain, alias, flags(scope))
        })
    }
}

/// Its name and UUID, which libvirt told when it was looked up: nobody is asked.
fn identity(domain: &Domain) -> Result<DomainRef, Error> {
    Ok(DomainRef::on_host(domain.name()?, domain.uuid_string()?))
}

/// Returns the background job on a domain. A driver that has no such call reports none.
fn job(domain: &Domain) -> Option<Job> {
    match ffi::job(domain) {
        Ok(operation) => operation.map(Job::from_libvirt),
        Err(error) if failure::is_migration_in(&error) && domain.is_active().unwrap_or(false) => {
            Some(Job::MigrationIn)
        }
        Err(_) => None,
    }
}

fn flags(scope: Scope) -> u32 {
    match scope {
        Scope::Live => sys::VIR_DOMAIN_AFFECT_LIVE,
        Scope::LiveAndConfig => sys::VIR_DOMAIN_AFFECT_LIVE | sys::VIR_DOMAIN_AFFECT_CONFIG,
    }
}

fn stats(record: DomainRecord) -> DomainStats {
    let numbers = || {
        record
            .parameters
            .iter()
            .filter_map(|parameter| Some((parameter.name.as_str(), parameter.value.number()?)))
    };
    let state = numbers().find(|(name, _)| *name == "state.state");
    let state = state.and_then(|(_, number)| u32::try_from(number).ok());
    DomainStats {
        state: state.map_or(DomainState::Unknown, DomainState::from_libvirt),
        stats: Stats::from_parameters(numbers()),
        id: DomainRef::on_host(record.name, record.uuid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::{Parameter, Value};

    #[test]
    fn a_uuid_is_told_from_a_name() {
        assert!(is_uuid("6f9f6bcb-5d8e-4a5a-9b0e-0d9a0e4e1c11"));
        for name in [
            "",
            "guest",
            "6f9f6bcb05d8e04a5a09b0e00d9a0e4e1c110000",
            "6f9f6bcb-5d8e-4a5a-9b0e-0d9a0e4e1cg1",
            "ääääääääääääääääää",
        ] {
            assert!(!is_uuid(name), "{name}");
        }
    }

    #[test]
    fn what_is_no_number_is_no_statistic() {
        let parameter = |name: &str, value| Parameter {
            name: name.to_owned(),
            value,
        };
        let stats = stats(DomainRecord {
            name: "d".to_owned(),
            uuid: "u".to_owned(),
            parameters: vec![
                parameter("state.state", Value::Number(3)),
                parameter("vcpu.0.time", Value::Negative(-1)),
                parameter("vcpu.1.time", Value::Number(10)),
                parameter("balloon.current", Value::Text("1".to_owned())),
            ],
        });
        assert_eq!(stats.state, DomainState::Paused);
        assert_eq!(stats.stats.vcpus.len(), 1);
        assert_eq!(stats.stats.balloon.current, None);
    }
}
