//! Names that people use for a domain, and the choice among the domains that have one. Pure.

use std::borrow::Cow;

use crate::domain::{ConnectionId, DomainRef};
use crate::hypervisor::CallError;

/// A domain that has the name, with the age rank of its connection.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) domain: DomainRef,
    pub(super) rank: u64,
}

/// Returns libvirt's name for `namespace/name` in a launcher. Any other text stays as it is.
pub(super) fn libvirt_name<'n>(connection: &ConnectionId, name_or_uuid: &'n str) -> Cow<'n, str> {
    match name_or_uuid.split_once('/') {
        Some((namespace, name)) if connection.is_launcher() && !name.contains('/') => {
            format!("{namespace}_{name}").into()
        }
        _ => name_or_uuid.into(),
    }
}

/// Returns the only domain. Of launchers' domains with one name, the newest launcher's is meant.
///
/// # Errors
/// There is no domain, or there are several; then with the names of two.
pub(super) fn choose(text: &str, mut found: Vec<Candidate>) -> Result<DomainRef, CallError> {
    let newest = |candidate: &Candidate, others: &[Candidate]| {
        let rank = |candidate: &Candidate| (candidate.rank, candidate.domain.connection.clone());
        let of_same_name = others.iter().filter(|other| {
            other.domain.connection.is_launcher() && other.domain.name == candidate.domain.name
        });
        of_same_name.map(rank).max() <= Some(rank(candidate))
    };
    let hidden: Vec<bool> = found
        .iter()
        .map(|candidate| candidate.domain.connection.is_launcher() && !newest(candidate, &found))
        .collect();
    let mut hidden = hidden.into_iter();
    found.retain(|_| !hidden.next().unwrap_or(false));
    let mut found = found.into_iter().map(|candidate| candidate.domain);
    let Some(first) = found.next() else {
        return Err(CallError::NotFound(format!("no domain is {text:?}")));
    };
    let Some(second) = found.next() else {
        return Ok(first);
    };
    let described = |domain: &DomainRef| {
        format!(
            "{:?} ({}, {})",
            domain.display_name(),
            domain.connection,
            domain.uuid
        )
    };
    Err(CallError::Ambiguous(format!(
        "{text:?} is both {} and {}: use a name that only one of them has",
        described(&first),
        described(&second)
    )))
}
