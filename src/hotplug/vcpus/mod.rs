//! vCPUs: limits and plan, what the history shows, what that proves, what is wrong.

mod diagnosis;
mod evidence;
mod preflight;
mod verdict;

pub(super) use evidence::{extent, shows, trail};
pub(super) use preflight::preflight;
pub(super) use verdict::judge;
