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
    /// The domain's name: tenants' text.
    pub name: String,
    /// The domain's UUID in its usual spelling.
    pub uuid: String,
    /// The statistics.
    pub parameters: Vec<Parameter>,
}

/// `virConnectGetAllDomainStats`: the groups `stats` (`VIR_DOMAIN_STATS_*`) of the domains that
/// `flags` (`VIR_CONNECT_GET_ALL_DOMAINS_STATS_*`) choose.
///
/// # Errors
/// libvirt's own.
pub fn all_domain_stats(
    connect: &Connect,
    stats: u32,
    flags: u32,
) -> Result<Vec<DomainRecord>, Error> {
    let mut records = ptr::null_mut();
    // SAFETY: the connection is alive, and `records` is for libvirt to fill in.
    let length = unsafe {
        sys::virConnectGetAllDomainStats(connect.as_ptr(), stats, &raw mut records, flags)
    };
    // SAFETY: both come from one such call.
    unsafe { take_records(records, length) }
}

/// `virDomainListGetStats` of one domain; nothing if it is no more.
///
/// # Errors
/// libvirt's own.
pub fn domain_stats(
    domain: &Domain,
    stats: u32,
    flags: u32,
) -> Result<Option<DomainRecord>, Error> {
    let mut records = ptr::null_mut();
    // SAFETY: the domain is alive; the list ends with a null pointer; `records` is for libvirt to
    // fill in.
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
/// Both are what one of libvirt's calls for statistics gave, and are given up.
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
        // SAFETY: there are as many pointers as libvirt said, each to a record of its own, with a
        // live domain and as many parameters as it says.
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

/// A domain's name and UUID, of which the client library has a copy: libvirtd is not asked.
///
/// # Safety
/// `domain` is alive for the time of the call.
pub(super) unsafe fn identity(domain: sys::virDomainPtr) -> (String, String) {
    let mut uuid = [0; sys::VIR_UUID_STRING_BUFLEN as usize];
    // SAFETY: the domain is alive; the name lives as long; the buffer is as long as libvirt
    // wants, and stays an empty text if the call fails.
    unsafe {
        let name = copied(sys::virDomainGetName(domain));
        sys::virDomainGetUUIDString(domain, uuid.as_mut_ptr());
        (
            name.unwrap_or_default(),
            copied(uuid.as_ptr()).unwrap_or_default(),
        )
    }
}

/// `virDomainGetState`: the state of the domain, and the reason for it, whose meaning depends on
/// the state. The `virt` crate's own call hides its errors.
///
/// # Errors
/// libvirt's own.
pub fn state(domain: &Domain) -> Result<(u32, u32), Error> {
    let (mut state, mut reason): (c_int, c_int) = (0, 0);
    // SAFETY: the domain is alive; both places are for libvirt to fill in.
    done(unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut reason, 0) })?;
    let number = |number| u32::try_from(number).unwrap_or_default();
    Ok((number(state), number(reason)))
}

/// `virDomainGetGuestVcpus`: what the guest agent says about the guest's CPUs, as `vcpus`,
/// `online` and `offlinable`, each a text as `0-2,5`.
///
/// # Errors
/// libvirt's own; `VIR_ERR_AGENT_UNRESPONSIVE` and its like where the agent does not answer.
pub fn guest_vcpus(domain: &Domain) -> Result<Vec<Parameter>, Error> {
    let mut found = ptr::null_mut();
    let mut length: c_uint = 0;
    // SAFETY: the domain is alive; both places are for libvirt to fill in.
    let result =
        unsafe { sys::virDomainGetGuestVcpus(domain.as_ptr(), &raw mut found, &raw mut length, 0) };
    if result < 0 {
        return Err(Error::last_error());
    }
    let length = c_int::try_from(length).unwrap_or(0);
    // SAFETY: libvirt filled in as many; they are ours, and freed after the copy.
    unsafe {
        let copy = parameters::read(found, length);
        sys::virTypedParamsFree(found, length);
        Ok(copy)
    }
}

/// `virDomainSetGuestVcpus`: has the guest agent bring the CPUs of `cpus`, `0-2,5`, online or
/// take them offline.
///
/// # Errors
/// libvirt's own, as of [`guest_vcpus`].
pub fn set_guest_vcpus(domain: &Domain, cpus: &str, online: bool) -> Result<(), Error> {
    let cpus = CString::new(cpus)?;
    // SAFETY: the domain is alive, and so is the text, which ends with a NUL.
    let result = unsafe {
        sys::virDomainSetGuestVcpus(domain.as_ptr(), cpus.as_ptr(), c_int::from(online), 0)
    };
    done(result)
}

/// `virDomainGetJobStats`: the operation of the job that is being done to the domain
/// (`virDomainJobOperation`, 0 if libvirt does not say); `None` if there is none.
///
/// # Errors
/// libvirt's own; `VIR_ERR_OPERATION_INVALID` also for a domain that comes from another host.
pub fn job(domain: &Domain) -> Result<Option<u64>, Error> {
    let (mut kind, mut length): (c_int, c_int) = (0, 0);
    let mut found = ptr::null_mut();
    // SAFETY: the domain is alive; the places are for libvirt to fill in.
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
    // SAFETY: libvirt filled in as many; they are ours, and freed after the copy.
    let parameters = unsafe {
        let copy = parameters::read(found, length);
        sys::virTypedParamsFree(found, length);
        copy
    };
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
