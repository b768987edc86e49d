//! An open virConnect and the calls about the node that are made over it. Everything here blocks.

use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

use super::events::{self, Publisher};
use super::{LibvirtConfig, event_loop, failure};
use crate::capability::Version;
use crate::compat::CpuComparison;
use crate::ffi::{
    CloseReason, CpuTarget, Subscription, Watched, baseline_hypervisor_cpu, compare_hypervisor_cpu,
};
use crate::hypervisor::{CallError, DomainCapabilitiesQuery, DomainRef, Versions};

/// The first libvirt with `EXPAND_CPU_FEATURES`, and with `SUPPORTED_CPU_FEATURES`.
const KNOWS_EXPAND: Version = Version::new(12, 2, 0);
const KNOWS_SUPPORTED: Version = Version::new(12, 5, 0);

/// A session. Several threads make calls over it at the same time.
pub(super) struct Session {
    /// Declared before the connection, since it must be dropped first.
    subscription: Option<Subscription>,
    pub(super) connect: Watched,
    pub(super) libvirt: Version,
    generation: u64,
}

impl Session {
    /// Opens a connection for reading and writing, which domain capabilities need. `on_close` must
    /// not block.
    ///
    /// # Errors
    /// `Unavailable`, or `Denied` if libvirt's authentication or access control refuses.
    pub(super) fn open(
        config: &LibvirtConfig,
        generation: u64,
        on_close: impl Fn(CloseReason) + Send + Sync + 'static,
    ) -> Result<Self, CallError> {
        event_loop::ensure().map_err(CallError::Unavailable)?;
        no_nul("open", [Some(config.uri.as_str())])?;
        let uri = Some(config.uri.as_str()).filter(|uri| !uri.is_empty());
        let connect = Connect::open(uri).map_err(|error| failure::classify_open(&error))?;
        let unless_unsupported = |error: Error| match failure::classify("open", &error, true) {
            CallError::Unsupported { .. } => Ok(()),
            _ => Err(failure::classify_open(&error)),
        };
        // Drivers inside this process support neither keepalive nor a close callback.
        let keepalive = config.keepalive;
        let seconds = i32::try_from(keepalive.interval.as_secs()).unwrap_or(i32::MAX);
        connect
            .set_keep_alive(seconds, keepalive.count)
            .or_else(unless_unsupported)?;
        let connect = match Watched::new(connect, on_close) {
            Ok(watched) => watched,
            Err((connect, error)) => {
                unless_unsupported(error)?;
                Watched::unwatched(connect)
            }
        };
        let libvirt = connect
            .lib_version()
            .map_err(|error| failure::classify_open(&error))?;
        Ok(Self {
            subscription: None,
            connect,
            libvirt: Version::from_libvirt(libvirt.into()).unwrap_or(Version::new(0, 0, 0)),
            generation,
        })
    }

    /// Subscribes to the connection's events. Logs those that this libvirt does not have.
    ///
    /// # Errors
    /// `Unavailable` if the connection ended meanwhile.
    pub(super) fn listen(mut self, publisher: &Publisher) -> Result<Self, CallError> {
        let events = publisher.clone();
        let subscription =
            Subscription::new(&self.connect, &events::monitor_events(), move |event| {
                events.publish(event);
            })
            .map_err(|error| failure::classify_open(&error))?;
        for (event, error) in subscription.refused() {
            if !self.is_alive() {
                return Err(failure::classify_open(error));
            }
            publisher.refused(event, error.message());
        }
        self.subscription = Some(subscription);
        Ok(self)
    }

    /// True if the connection is open, as far as the client library knows. Does not block.
    pub(super) fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    fn classify(&self, call: &'static str, error: &Error) -> CallError {
        failure::classify(call, error, self.is_alive())
    }

    pub(super) fn versions(&self) -> Result<Versions, CallError> {
        let hypervisor = match self.connect.hyp_version() {
            Ok(number) => Version::from_libvirt(number.into()),
            // Without an installed emulator there is no version of one.
            Err(_) if self.is_alive() => None,
            Err(error) => return Err(self.classify("versions", &error)),
        };
        Ok(Versions {
            libvirt: self.libvirt,
            hypervisor,
        })
    }

    pub(super) fn capabilities(&self) -> Result<String, CallError> {
        let answer = self.connect.capabilities();
        answer.map_err(|error| self.classify("capabilities", &error))
    }

    pub(super) fn domain_capabilities(
        &self,
        query: &DomainCapabilitiesQuery,
    ) -> Result<String, CallError> {
        const CALL: &str = "domain-capabilities";
        let [arch, machine, virt_type] = target(CALL, query)?;
        with_flags(flags(self.libvirt, query), |flags| {
            self.connect
                .domain_capabilities(None, arch, machine, virt_type, flags)
        })
        .map_err(|error| self.classify(CALL, &error))
    }

    pub(super) fn baseline_cpu(
        &self,
        query: &DomainCapabilitiesQuery,
        cpu: &str,
    ) -> Result<String, CallError> {
        const CALL: &str = "baseline-cpu";
        let flags = sys::VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES;
        baseline_hypervisor_cpu(&self.connect, target(CALL, query)?, cpu, flags)
            .map_err(|error| self.classify(CALL, &error))
    }

    pub(super) fn compare_cpu(
        &self,
        query: &DomainCapabilitiesQuery,
        cpu: &str,
    ) -> Result<CpuComparison, CallError> {
        const CALL: &str = "compare-cpu";
        let flags = sys::VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE;
        match compare_hypervisor_cpu(&self.connect, target(CALL, query)?, cpu, flags) {
            Ok(sys::VIR_CPU_COMPARE_IDENTICAL) => Ok(CpuComparison::Identical),
            Ok(sys::VIR_CPU_COMPARE_SUPERSET) => Ok(CpuComparison::Superset),
            Ok(_) => Ok(CpuComparison::Incompatible {
                words: String::new(),
            }),
            Err(error) if error.code().to_raw() == sys::VIR_ERR_CPU_INCOMPATIBLE => {
                Ok(CpuComparison::Incompatible {
                    words: error.message().to_owned(),
                })
            }
            Err(error) => Err(self.classify(CALL, &error)),
        }
    }

    /// Starts a transient domain, paused, and destroys it.
    pub(super) fn try_start(&self, domain: &str) -> Result<(), CallError> {
        const CALL: &str = "try-start";
        no_nul(CALL, [Some(domain)])?;
        let flags = sys::VIR_DOMAIN_START_PAUSED | sys::VIR_DOMAIN_START_AUTODESTROY;
        let created = self.connect.create_domain_xml(domain, flags);
        let started = created.map_err(|error| self.classify(CALL, &error))?;
        started.destroy().or_else(|error| {
            let has_exited = matches!(
                failure::number(&error),
                sys::VIR_ERR_NO_DOMAIN | sys::VIR_ERR_OPERATION_INVALID
            );
            if has_exited {
                Ok(())
            } else {
                Err(self.classify(CALL, &error))
            }
        })
    }

    pub(super) fn native_arguments(&self, domain: &str) -> Result<String, CallError> {
        let answer = self.connect.domain_xml_to_native("qemu-argv", domain, 0);
        answer.map_err(|error| self.classify("native-arguments", &error))
    }

    /// Lists the running domains, each with its ID: a domain gets another one at each start.
    pub(super) fn running(&self) -> Result<RunningIds, CallError> {
        let classify = |error| self.classify("running-domains", &error);
        let active = self
            .connect
            .list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            .map_err(classify)?;
        let mut domains = Vec::with_capacity(active.len());
        for domain in active {
            // It ended meanwhile.
            let Some(id) = domain.id() else { continue };
            let domain = DomainRef::on_host(
                domain.name().map_err(classify)?,
                domain.uuid_string().map_err(classify)?,
            );
            domains.push((id, domain));
        }
        Ok(RunningIds {
            generation: self.generation,
            domains,
        })
    }
}

/// The running domains of one generation of the connection: a restarted libvirtd may count domain
/// IDs from 1 again.
pub(super) struct RunningIds {
    pub(super) generation: u64,
    pub(super) domains: Vec<(u32, DomainRef)>,
}

/// Returns the flags of a query that this libvirt has: it rejects unknown bits.
fn flags(libvirt: Version, query: &DomainCapabilitiesQuery) -> u32 {
    let mut flags = 0;
    if query.expand_features && libvirt >= KNOWS_EXPAND {
        flags |= sys::VIR_CONNECT_GET_DOMAIN_CAPABILITIES_EXPAND_CPU_FEATURES;
    }
    if query.supported_features && libvirt >= KNOWS_SUPPORTED {
        flags |= sys::VIR_CONNECT_GET_DOMAIN_CAPABILITIES_SUPPORTED_CPU_FEATURES;
    }
    flags
}

/// Calls with flags, and again without if libvirt may have rejected the flags: some drivers of a
/// new libvirt do not have them.
fn with_flags<T>(flags: u32, ask: impl Fn(u32) -> Result<T, Error>) -> Result<T, Error> {
    match ask(flags) {
        Err(error) if flags != 0 && failure::may_be_about_flags(&error) => ask(0),
        answer => answer,
    }
}

/// Returns the part of a query that says what the guest would be.
fn target<'q>(
    call: &'static str,
    query: &'q DomainCapabilitiesQuery,
) -> Result<CpuTarget<'q>, CallError> {
    let target = [&query.arch, &query.machine, &query.virt_type].map(|text| text.as_deref());
    no_nul(call, target)?;
    Ok(target)
}

/// Rejects texts with a NUL, on which the crate `virt` panics.
pub(super) fn no_nul<const N: usize>(
    call: &'static str,
    texts: [Option<&str>; N],
) -> Result<(), CallError> {
    match texts.into_iter().flatten().find(|text| text.contains('\0')) {
        None => Ok(()),
        Some(text) => Err(CallError::Failed {
            call: call.into(),
            code: sys::VIR_ERR_INVALID_ARG.to_string(),
            text: format!("{text:?} contains a NUL"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("12.1.0", 0)]
    #[case("12.2.0", 2)]
    #[case("12.5.0", 6)]
    fn flags_unknown_to_libvirt_are_left_out(#[case] libvirt: &str, #[case] expected: u32) {
        let query = DomainCapabilitiesQuery {
            expand_features: true,
            supported_features: true,
            ..Default::default()
        };
        assert_eq!(flags(libvirt.parse().unwrap(), &query), expected);
        let plain = DomainCapabilitiesQuery::default();
        assert_eq!(flags(libvirt.parse().unwrap(), &plain), 0);
    }

    #[test]
    fn rejected_flags_cause_call_without_flags() {
        let asked = RefCell::new(Vec::new());
        let ask = |flags| {
            asked.borrow_mut().push(flags);
            match flags {
                0 => Ok("answer"),
                _ => Err(Error::from(std::ffi::CString::new("\0").unwrap_err())),
            }
        };
        assert_eq!(with_flags(6, ask).unwrap(), "answer");
        assert_eq!(asked.take(), [6, 0]);
    }

    #[test]
    fn rejection_without_flags_is_final() {
        let asked = RefCell::new(0);
        let answer: Result<(), _> = with_flags(0, |_| {
            *asked.borrow_mut() += 1;
            Err(Error::from(std::ffi::CString::new("\0").unwrap_err()))
        });
        assert!(answer.is_err());
        assert_eq!(asked.take(), 1);
    }
}
