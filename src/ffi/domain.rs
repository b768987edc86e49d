//! Calls about domains.

use std::ffi::{CString, c_int, c_uint};
use std::ptr;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::parameters::copied;
use super::parameters::{self, Parameter};

/// The statistics of one domain (`virDomainStatsRecord`).
#[derive(Debug, Clone, PartialEq)]
pub struct DomainRecord {
    /// The domain's name: untrusted text.
    pub name: String,
    /// The domain's UUID in its usual spelling.
    pub uuid: String,
    /// The statistics.
    pub parameters: Vec<Parameter>,
}

/// Returns the groups `stats` (`VIR_DOMAIN_STATS_*`) of the domains that `flags`
/// (`VIR_CONNECT_GET_ALL_DOMAINS_STATS_*`) select (`virConnectGetAllDomainStats`).
///
/// # Errors
/// libvirt's error.
pub fn all_domain_stats(
    connect: &Connect,
    stats: u32,
    flags: u32,
) -> Result<Vec<DomainRecord>, Error> {
    let mut records = ptr::null_mut();
    // SAFETY: the connection is alive, and `records` is an out-parameter.
    let length = unsafe {
        sys::virConnectGetAllDomainStats(connect.as_ptr(), stats, &raw mut records, flags)
    };
    // SAFETY: both come from one such call.
    unsafe { take_records(records, length) }
}

/// Returns the statistics of one domain (`virDomainListGetStats`); `None` if it no longer exists.
///
/// # Errors
/// libvirt's error.
pub fn domain_stats(
    domain: &Domain,
    stats: u32,
    flags: u32,
) -> Result<Option<DomainRecord>, Error> {
    let mut records = ptr::null_mut();
    // SAFETY: the domain is alive; the list ends with a null pointer; `records` is an
    // out-parameter.
    let length = unsafe {
        let mut domains = [domain.as_ptr(), ptr::null_mut()];
        sys::virDomainListGetStats(domains.as_mut_ptr(), stats, &raw mut records, flags)
    };
    // SAFETY: both come from one such call.
    unsafe { take_records(records, length) }.map(|records| records.into_iter().next())
}

/// Copies the records and frees them.
///
/// # Safety
/// Both come from one of libvirt's calls for statistics, and are not used afterward.
unsafe fn take_records(
    records: *mut sys::virDomainStatsRecordPtr,
    length: c_int,
) -> Result<Vec<DomainRecord>, Error> {
    let Ok(length) = usize::try_from(length) else {
        return Err(Error::last_error());
    };
    if records.is_null() {
        return Ok(Vec::new());
    }
    let copy = (0..length).map(|index| {
        // SAFETY: the list has `length` pointers, each to a record of its own with a live domain
        // and `nparams` parameters.
        unsafe {
            let record = &**records.add(index);
            let (name, uuid) = identity(record.dom);
            DomainRecord {
                name,
                uuid,
                parameters: parameters::read(record.params, record.nparams),
            }
        }
    });
    let copy = copy.collect();
    // SAFETY: the list is ours, ends with a null pointer, and nothing refers to it from here on. This
    // frees the records, their parameters and their references to domains.
    unsafe { sys::virDomainStatsRecordListFree(records) };
    Ok(copy)
}

/// Returns a domain's name and UUID from the client library, without a call to libvirtd.
///
/// # Safety
/// `domain` is alive during the call.
pub(super) unsafe fn identity(domain: sys::virDomainPtr) -> (String, String) {
    let mut uuid = [0; sys::VIR_UUID_STRING_BUFLEN as usize];
    // SAFETY: the domain is alive; the name lives as long; the buffer is as long as libvirt
    // requires, and stays an empty text if the call fails.
    unsafe {
        let name = copied(sys::virDomainGetName(domain));
        sys::virDomainGetUUIDString(domain, uuid.as_mut_ptr());
        (
            name.unwrap_or_default(),
            copied(uuid.as_ptr()).unwrap_or_default(),
        )
    }
}

/// Returns the state of the domain and its reason, whose meaning depends on the state
/// (`virDomainGetState`). The `virt` crate's own call hides its errors.
///
/// # Errors
/// libvirt's error.
pub fn state(domain: &Domain) -> Result<(u32, u32), Error> {
    let (mut state, mut reason): (c_int, c_int) = (0, 0);
    // SAFETY: the domain is alive; both places are out-parameters.
    done(unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut reason, 0) })?;
    let number = |number| u32::try_from(number).unwrap_or_default();
    Ok((number(state), number(reason)))
}

/// Returns the guest agent's report on the guest's CPUs (`virDomainGetGuestVcpus`): `vcpus`, `online`
/// and `offlinable`, each a text like `0-2,5`.
///
/// # Errors
/// libvirt's error; `VIR_ERR_AGENT_UNRESPONSIVE` or a similar one if the agent does not answer.
pub fn guest_vcpus(domain: &Domain) -> Result<Vec<Parameter>, Error> {
    let mut found = ptr::null_mut();
    let mut length: c_uint = 0;
    // SAFETY: the domain is alive; both places are out-parameters.
    let result =
        unsafe { sys::virDomainGetGuestVcpus(domain.as_ptr(), &raw mut found, &raw mut length, 0) };
    done(result)?;
    // SAFETY: libvirt returned this number of parameters, which the caller owns.
    Ok(unsafe { parameters::take(found, c_int::try_from(length).unwrap_or(0)) })
}

/// Has the guest agent bring `cpus`, such as `0-2,5`, online or offline (`virDomainSetGuestVcpus`).
///
/// # Errors
/// As [`guest_vcpus`].
pub fn set_guest_vcpus(domain: &Domain, cpus: &str, online: bool) -> Result<(), Error> {
    let cpus = CString::new(cpus)?;
    // SAFETY: the domain is alive, and so is the text, which ends with a NUL.
    let result = unsafe {
        sys::virDomainSetGuestVcpus(domain.as_ptr(), cpus.as_ptr(), c_int::from(online), 0)
    };
    done(result)
}

/// `virDomainAgentSetResponseTimeout`: the number of seconds that libvirt waits for an answer of
/// the guest agent to each command, from any client; `VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK`,
/// libvirt's default, means no timeout. libvirt does not report the present number.
///
/// # Errors
/// libvirt's own.
pub fn set_agent_timeout(domain: &Domain, seconds: c_int) -> Result<(), Error> {
    // SAFETY: the domain is alive.
    done(unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), seconds, 0) })
}

/// `virDomainSetMemoryStatsPeriod`: how often the balloon's driver reports, in seconds; 0 ends it.
///
/// # Errors
/// libvirt's own, also for a domain without a virtio balloon.
pub fn set_stats_period(domain: &Domain, seconds: u32, flags: u32) -> Result<(), Error> {
    let seconds = c_int::try_from(seconds).unwrap_or(c_int::MAX);
    // SAFETY: the domain is alive.
    done(unsafe { sys::virDomainSetMemoryStatsPeriod(domain.as_ptr(), seconds, flags) })
}

/// Returns the operation of the job on the domain (`virDomainJobOperation`, 0 if libvirt does not
/// report it), from `virDomainGetJobStats`; `None` without a job.
///
/// # Errors
/// libvirt's error; `VIR_ERR_OPERATION_INVALID` also for a domain that migrates to this host.
pub fn job(domain: &Domain) -> Result<Option<u64>, Error> {
    let (mut kind, mut length): (c_int, c_int) = (0, 0);
    let mut found = ptr::null_mut();
    // SAFETY: the domain is alive; the places are out-parameters.
    let result = unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &raw mut kind,
            &raw mut found,
            &raw mut length,
            0,
        )
    };
    done(result)?;
    // SAFETY: libvirt returned this number of parameters, which the caller owns.
    let parameters = unsafe { parameters::take(found, length) };
    // libvirt also reports the completed job once.
    let runs = [sys::VIR_DOMAIN_JOB_BOUNDED, sys::VIR_DOMAIN_JOB_UNBOUNDED];
    if !u32::try_from(kind).is_ok_and(|kind| runs.contains(&kind)) {
        return Ok(None);
    }
    let operation = parameters
        .iter()
        .find(|parameter| parameter.name == "operation");
    let number = operation.and_then(|parameter| parameter.value.number());
    Ok(Some(number.unwrap_or(0)))
}

fn done(result: c_int) -> Result<(), Error> {
    match result {
        0.. => Ok(()),
        _ => Err(Error::last_error()),
    }
}
