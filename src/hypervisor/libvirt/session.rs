//! One open connection and the calls made over it. Everything here blocks.

use std::collections::HashMap;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::notices::{self, Announcer};
use super::{LibvirtConfig, event_loop, failure};
use crate::capability::Version;
use crate::compat::CpuComparison;
use crate::ffi::{
    CloseReason, Subscription, Watched, baseline_hypervisor_cpu, compare_hypervisor_cpu,
};
use crate::hypervisor::{CallError, DomainCapabilitiesQuery, RunningDomain, Versions};

/// The first libvirt with `EXPAND_CPU_FEATURES`, and with `SUPPORTED_CPU_FEATURES`.
const KNOWS_EXPAND: Version = Version::new(12, 2, 0);
const KNOWS_SUPPORTED: Version = Version::new(12, 5, 0);

pub(super) struct Session {
    /// Before the connection, for it is to be dropped first.
    subscription: Option<Subscription>,
    pub(super) connect: Watched,
    libvirt: Version,
    /// Live definitions by UUID, each with the ID it was read under: a domain gets another ID
    /// each time it starts. A new connection reads anew, as libvirtd may count from 1 again.
    domains: HashMap<String, (u32, RunningDomain)>,
}

impl Session {
    /// Opens, for reading and writing: domain capabilities need it. `on_close` must not block.
    ///
    /// # Errors
    /// `Unavailable`, or `Denied` where libvirt wants to know who asks.
    pub(super) fn open(
        config: &LibvirtConfig,
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
        // Drivers inside this process have no other side that could go away.
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
            domains: HashMap::new(),
        })
    }

    /// Has the events of this connection told. What this libvirt does not tell is logged.
    ///
    /// # Errors
    /// `Unavailable` if the connection ended meanwhile.
    pub(super) fn listen(mut self, notices: &Announcer) -> Result<Self, CallError> {
        let announcer = notices.clone();
        let subscription =
            Subscription::new(&self.connect, &notices::monitor_events(), move |told| {
                announcer.announce(told);
            })
            .map_err(|error| failure::classify_open(&error))?;
        for (event, error) in subscription.refused() {
            if !self.is_alive() {
                return Err(failure::classify_open(error));
            }
            notices.refused(event, error.message());
        }
        self.subscription = Some(subscription);
        Ok(self)
    }

    /// Whether the connection still is; asks nobody.
    pub(super) fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    fn classify(&self, call: &'static str, error: &Error) -> CallError {
        failure::classify(call, error, self.is_alive())
    }

    pub(super) fn versions(&self) -> Result<Versions, CallError> {
        let hypervisor = match self.connect.hyp_version() {
            Ok(number) => Version::from_libvirt(number.into()),
            // Without an emulator there is no version of one; libvirt's is known all the same.
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
        let (arch, machine, virt_type) = choice(CALL, query)?;
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
        let (arch, machine, virt_type) = choice(CALL, query)?;
        let flags = sys::VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES;
        baseline_hypervisor_cpu(&self.connect, arch, machine, virt_type, cpu, flags)
            .map_err(|error| self.classify(CALL, &error))
    }

    pub(super) fn compare_cpu(
        &self,
        query: &DomainCapabilitiesQuery,
        cpu: &str,
    ) -> Result<CpuComparison, CallError> {
        const CALL: &str = "compare-cpu";
        let (arch, machine, virt_type) = choice(CALL, query)?;
        let flags = sys::VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE;
        let answer = compare_hypervisor_cpu(&self.connect, arch, machine, virt_type, cpu, flags);
        match answer {
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

    pub(super) fn native_arguments(&self, domain: &str) -> Result<String, CallError> {
        let answer = self.connect.domain_xml_to_native("qemu-argv", domain, 0);
        answer.map_err(|error| self.classify("native-arguments", &error))
    }

    pub(super) fn running_domains(&mut self) -> Result<Vec<RunningDomain>, CallError> {
        let active = self
            .connect
            .list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            .map_err(|error| self.classify("running-domains", &error))?;
        let mut known = std::mem::take(&mut self.domains);
        for domain in active {
            match read_domain(&domain, &mut known) {
                Ok(Some((id, domain))) => {
                    self.domains.insert(domain.uuid.clone(), (id, domain));
                }
                Ok(None) => {}
                Err(error) if failure::is_gone(&error) => {}
                Err(error) => {
                    // Those that are known need not be read again: the next time only this one
                    // can hold it up, which is new and has something done to it just now.
                    self.domains.extend(known);
                    return Err(self.classify("running-domains", &error));
                }
            }
        }
        let domains = self.domains.values().map(|(_, domain)| domain.clone());
        Ok(domains.collect())
    }
}

/// The domain as it is known under its present ID, else read from libvirt; `None` if it ended.
/// Without `VIR_DOMAIN_XML_SECURE`, so there are no secrets in it.
fn read_domain(
    domain: &Domain,
    known: &mut HashMap<String, (u32, RunningDomain)>,
) -> Result<Option<(u32, RunningDomain)>, Error> {
    let Some(id) = domain.id() else {
        return Ok(None);
    };
    let uuid = domain.uuid_string()?;
    if let Some(same) = known.remove(&uuid).filter(|(known_id, _)| *known_id == id) {
        return Ok(Some(same));
    }
    let domain = RunningDomain {
        name: domain.name()?,
        xml: domain.xml_desc(0)?,
        uuid,
    };
    Ok(Some((id, domain)))
}

/// The flags of what is asked for that this libvirt knows: bits that it does not are an error.
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

/// Asks with flags, and without any if they may be what was refused: a driver of a new libvirt
/// may not know them.
fn with_flags<T>(flags: u32, ask: impl Fn(u32) -> Result<T, Error>) -> Result<T, Error> {
    match ask(flags) {
        Err(error) if flags != 0 && failure::may_be_about_flags(&error) => ask(0),
        answer => answer,
    }
}

type Choice<'q> = (Option<&'q str>, Option<&'q str>, Option<&'q str>);

/// Architecture, machine and domain type of a query.
fn choice<'q>(
    call: &'static str,
    query: &'q DomainCapabilitiesQuery,
) -> Result<Choice<'q>, CallError> {
    let choice = (
        query.arch.as_deref(),
        query.machine.as_deref(),
        query.virt_type.as_deref(),
    );
    no_nul(call, [choice.0, choice.1, choice.2])?;
    Ok(choice)
}

/// The crate `virt` panics on a text that C cannot hold.
pub(super) fn no_nul<const N: usize>(
    call: &'static str,
    texts: [Option<&str>; N],
) -> Result<(), CallError> {
    match texts.into_iter().flatten().find(|text| text.contains('\0')) {
        None => Ok(()),
        Some(text) => Err(CallError::Failed {
            call: call.into(),
            code: sys::VIR_ERR_INVALID_ARG.to_string(),
            text: format!("{text:?} holds a NUL"),
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
    fn flags_are_those_this_libvirt_knows(#[case] libvirt: &str, #[case] expected: u32) {
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
    fn refused_flags_are_left_out() {
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
    fn a_refusal_without_flags_is_not_asked_again() {
        let asked = RefCell::new(0);
        let answer: Result<(), _> = with_flags(0, |_| {
            *asked.borrow_mut() += 1;
            Err(Error::from(std::ffi::CString::new("\0").unwrap_err()))
        });
        assert!(answer.is_err());
        assert_eq!(asked.take(), 1);
    }
}
