//! The calls about domains, over one session. Everything here blocks.

use std::time::{Duration, Instant};

use virt::domain::Domain as VirtDomain;
use virt::error::Error;
use virt::sys;

use super::limits::{AGENT_ANSWER, AGENT_CHANGE};
use super::session::{Session, no_nul};
use super::{failure, xml};
use crate::capability::Version;
use crate::domain::{
    Domain, DomainDefinition, DomainState, IdSet, Job, NodeRequirements, PauseReason, Stats,
    is_uuid,
};
use crate::ffi::{self, DomainRecord};
use crate::hotplug::{GuestVcpus, Ost};
use crate::hypervisor::{CallError, DomainRef, DomainStats, LiveDomain, UnreadableDomain};
use crate::units::KiB;
use crate::xml::DocumentError;

/// The first libvirt with `VIR_ERR_AGENT_COMMAND_FAILED`.
const NUMBERS_AGENT_ERRORS: Version = Version::new(11, 2, 0);

/// The groups of the bulk statistics, and the flag not to wait for a job on a domain.
const STATS: u32 =
    sys::VIR_DOMAIN_STATS_STATE | sys::VIR_DOMAIN_STATS_VCPU | sys::VIR_DOMAIN_STATS_BALLOON;
const STATS_FLAGS: u32 = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;

impl Session {
    fn classify_domain(
        &self,
        call: &'static str,
        domain: Option<&VirtDomain>,
        error: &Error,
        began: Instant,
    ) -> CallError {
        let took = began.elapsed();
        let classified = failure::classify_domain(call, error, took, self.is_alive(), || {
            domain.is_none_or(|domain| domain.is_active().unwrap_or(true))
        });
        match classified {
            // This libvirt has a number for errors of the agent: the agent answered nonsense.
            CallError::AgentRefused { call, text }
                if failure::is_internal(error) && self.libvirt >= NUMBERS_AGENT_ERRORS =>
            {
                CallError::AgentSilent { call, text }
            }
            other => other,
        }
    }

    /// Looks a domain up and does `work` with it.
    fn with<T>(
        &self,
        call: &'static str,
        domain: &DomainRef,
        work: impl FnOnce(&VirtDomain) -> Result<T, Error>,
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
            // Not a name that libvirt can be asked for.
            let message = format!("no domain has the name {name_or_uuid:?}");
            return Err(CallError::NotFound(message));
        }
        let began = Instant::now();
        let by_uuid = if is_uuid(name_or_uuid) {
            self.connect.lookup_domain_by_uuid_string(name_or_uuid).ok()
        } else {
            None
        };
        let found = by_uuid.map_or_else(|| self.connect.lookup_domain_by_name(name_or_uuid), Ok);
        found
            .and_then(|domain| identity(&domain))
            .map_err(|error| self.classify_domain(CALL, None, &error, began))
    }

    /// Reads the live domain and, if `definition` is true, the devices of its persistent definition.
    pub(super) fn domain(
        &self,
        domain: &DomainRef,
        definition: bool,
    ) -> Result<LiveDomain, CallError> {
        let answers = self.with("domain", domain, |domain| {
            let (state, reason) = ffi::state(domain)?;
            let state = DomainState::from_libvirt(state);
            let persistent = domain.is_persistent()?;
            let live = (
                identity(domain)?,
                state,
                PauseReason::from_libvirt(state, reason),
                persistent,
                domain.xml_desc(0)?,
            );
            let defined = if definition && persistent {
                Some(domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?)
            } else {
                None
            };
            Ok((live, defined, job(domain)))
        })?;
        let ((id, state, reason, persistent, xml), defined, job) = answers;
        let invalid = |error: DocumentError| malformed("domain", error.to_string());
        let (mut domain, attached) = DomainDefinition::parse(&id.name, xml.as_bytes(), |live| {
            let attached = live.attached();
            Ok((Domain::from_definition(live, state)?, attached))
        })
        .map_err(invalid)?;
        let defined = defined.map(|xml| {
            DomainDefinition::parse(&id.name, xml.as_bytes(), |defined| Ok(defined.attached()))
        });
        // The reader of the XML trims white space around the name.
        domain.name.clone_from(&id.name);
        Ok(LiveDomain {
            id,
            domain,
            reason,
            persistent,
            job,
            attached,
            defined: defined.transpose().map_err(invalid)?,
        })
    }

    /// Returns the live XML, without secrets.
    pub(super) fn live_xml(&self, domain: &DomainRef) -> Result<String, CallError> {
        self.with("domain", domain, |domain| domain.xml_desc(0))
    }

    /// Reads the properties of the node that a running domain depends on.
    pub(super) fn requirements(
        &self,
        domain: &DomainRef,
    ) -> Result<Result<NodeRequirements, UnreadableDomain>, CallError> {
        let xml = self.live_xml(domain)?;
        let name = format!("domain {}", domain.uuid);
        Ok(NodeRequirements::parse(&name, xml.as_bytes())
            .map_err(|error| UnreadableDomain::Malformed(error.to_string())))
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
        // libvirt leaves out a domain that ended after the lookup.
        record
            .map(stats)
            .ok_or_else(|| CallError::NotFound(format!("{id} ended")))
    }

    pub(super) fn guest_vcpus(&self, domain: &DomainRef) -> Result<GuestVcpus, CallError> {
        const CALL: &str = "guest-vcpus";
        let answer = self.with(CALL, domain, |domain| {
            with_agent_timeout(domain, AGENT_ANSWER, || ffi::guest_vcpus(domain))
        })?;
        let text = |name| {
            let parameter = answer.iter().find(|parameter| parameter.name == name);
            parameter
                .and_then(|parameter| parameter.value.text())
                .unwrap_or_default()
        };
        GuestVcpus::from_libvirt(text("vcpus"), text("online")).map_err(|error| {
            CallError::AgentRefused {
                call: CALL.into(),
                text: error.to_string(),
            }
        })
    }

    pub(super) fn acpi_answers(&self, domain: &DomainRef) -> Result<Vec<Ost>, CallError> {
        const CALL: &str = "acpi-answers";
        const QUERY: &str = r#"{"execute":"query-acpi-ospm-status"}"#;
        let answer = self.with(CALL, domain, |domain| domain.qemu_monitor_command(QUERY, 0))?;
        Ost::from_query(&answer).map_err(|error| malformed(CALL, error.to_string()))
    }

    pub(super) fn set_guest_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: &IdSet,
        online: bool,
    ) -> Result<(), CallError> {
        self.with("set-guest-vcpus", domain, |domain| {
            with_agent_timeout(domain, AGENT_CHANGE, || {
                ffi::set_guest_vcpus(domain, &vcpus.to_string(), online)
            })
        })
    }

    pub(super) fn set_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: u32,
        persist: bool,
    ) -> Result<(), CallError> {
        // The bits are those of all changes (`VIR_DOMAIN_VCPU_LIVE`, `_CONFIG`). Without `HOTPLUGGABLE`
        // the vCPUs that are added to the definition cannot be unplugged after the next start.
        let flags = if persist {
            affects(true) | sys::VIR_DOMAIN_VCPU_HOTPLUGGABLE
        } else {
            affects(false)
        };
        self.with("set-vcpus", domain, |domain| {
            domain.set_vcpus_flags(vcpus, flags)
        })
    }

    pub(super) fn resize_virtio_mem(
        &self,
        domain: &DomainRef,
        alias: &str,
        requested: KiB,
        persist: bool,
    ) -> Result<(), CallError> {
        self.update_virtio_mem(domain, alias, requested, 0, sys::VIR_DOMAIN_AFFECT_LIVE)?;
        if persist {
            // In one call libvirt takes the live device's address for a change of the definition's,
            // which has none ("cannot modify memory address", libvirt 11.3).
            let inactive = sys::VIR_DOMAIN_XML_INACTIVE;
            let config = sys::VIR_DOMAIN_AFFECT_CONFIG;
            self.update_virtio_mem(domain, alias, requested, inactive, config)?;
        }
        Ok(())
    }

    /// Changes a device in the live or the inactive definition, as `xml` and `affects` select.
    fn update_virtio_mem(
        &self,
        domain: &DomainRef,
        alias: &str,
        requested: KiB,
        xml: u32,
        affects: u32,
    ) -> Result<(), CallError> {
        const CALL: &str = "update-device";
        let definition = self.with(CALL, domain, |domain| domain.xml_desc(xml))?;
        let device = xml::with_requested(&definition, alias, requested);
        let device = device.ok_or_else(|| CallError::Failed {
            call: CALL.into(),
            code: sys::VIR_ERR_DEVICE_MISSING.to_string(),
            text: format!("there is no virtio-mem device with the alias {alias:?}"),
        })?;
        self.with(CALL, domain, |domain| {
            domain.update_device_flags(&device, affects)
        })
    }

    pub(super) fn attach_dimm(
        &self,
        domain: &DomainRef,
        alias: &str,
        size: KiB,
        node: Option<u32>,
        persist: bool,
    ) -> Result<(), CallError> {
        const CALL: &str = "attach-device";
        no_nul(CALL, [Some(alias)])?;
        let device = xml::dimm(alias, size, node);
        self.with(CALL, domain, |domain| {
            domain.attach_device_flags(&device, affects(persist))
        })
    }

    pub(super) fn set_stats_period(
        &self,
        domain: &DomainRef,
        seconds: u32,
    ) -> Result<(), CallError> {
        self.with("set-stats-period", domain, |domain| {
            ffi::set_stats_period(domain, seconds, sys::VIR_DOMAIN_AFFECT_LIVE)
        })
    }
}

/// Returns the flags for a change of the running domain and, if it persists, of its definition.
fn affects(persist: bool) -> u32 {
    if persist {
        sys::VIR_DOMAIN_AFFECT_LIVE | sys::VIR_DOMAIN_AFFECT_CONFIG
    } else {
        sys::VIR_DOMAIN_AFFECT_LIVE
    }
}

/// Makes a call to a guest agent that has only so much time for each of its answers.
///
/// libvirt keeps one number for a domain and all its clients, and cannot be asked for it. So its
/// default is put back after the call: another client's freeze of file systems may take longer.
fn with_agent_timeout<T>(
    domain: &VirtDomain,
    answer: Duration,
    call: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let seconds = i32::try_from(answer.as_secs()).unwrap_or(i32::MAX);
    ffi::set_agent_timeout(domain, seconds)?;
    let outcome = call();
    // It fails only if the domain ended.
    ffi::set_agent_timeout(domain, sys::VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK).ok();
    outcome
}

/// Returns an error for an answer of libvirt that cannot be parsed.
fn malformed(call: &'static str, text: String) -> CallError {
    CallError::Failed {
        call: call.into(),
        code: "malformed".to_owned(),
        text,
    }
}

/// Returns a domain's name and UUID, which the client library has since the lookup.
fn identity(domain: &VirtDomain) -> Result<DomainRef, Error> {
    Ok(DomainRef::on_host(domain.name()?, domain.uuid_string()?))
}

/// Returns the background job on a domain. A driver that has no such call reports none.
fn job(domain: &VirtDomain) -> Option<Job> {
    match ffi::job(domain) {
        Ok(operation) => operation.map(Job::from_libvirt),
        Err(error) if failure::is_migration_in(&error) && domain.is_active().unwrap_or(false) => {
            Some(Job::MigrationIn)
        }
        Err(_) => None,
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
    fn only_uuids_have_the_form_of_a_uuid() {
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
    fn values_that_are_not_numbers_are_left_out() {
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
