//! vCPUs: limits and plan, what the history shows, what that proves, what is wrong.

mod diagnosis;
mod evidence;
mod preflight;
mod timeline;
mod verdict;

pub(super) use evidence::{extent, shows};
pub(super) use preflight::preflight;
pub(super) use timeline::timeline;
pub(super) use verdict::{judge, settle};
