//! Memory: limits and plan, evidence, verdict, diagnosis, timeline.

mod diagnosis;
mod evidence;
mod preflight;
mod prepare;
mod timeline;
mod verdict;

pub use preflight::attachable_memory;

use super::kind::{ResourceKind, Wanted};
use super::outcome::{Conclusion, Ruling};
use super::resource::Resource;
use super::{Amount, Evidence, History, Host, Infeasible, Observation, Plan, Scope};
use crate::units::{Bytes, Timestamp};

/// A request for a total amount of memory: boot memory and memory devices.
#[derive(Debug, Clone, Copy)]
pub(super) struct MemoryResource {
    pub(super) size: Bytes,
    /// True if the guest may be left with less than it uses.
    pub(super) force: bool,
}

impl Resource for MemoryResource {
    fn kind(&self) -> ResourceKind {
        ResourceKind::Memory
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            host_memory: true,
            ..Wanted::default()
        }
    }

    fn requested(&self) -> Amount {
        Amount::Memory {
            memory: self.size,
            guest_total: None,
        }
    }

    fn amount(&self, seen: &Observation) -> Amount {
        Amount::Memory {
            memory: seen.domain.memory.plugged(),
            guest_total: seen.guest_total(),
        }
    }

    fn preflight(&self, seen: &Observation, host: &Host, scope: Scope) -> Result<Plan, Infeasible> {
        preflight::preflight(*self, seen, host, scope)
    }

    fn prepare(&self, history: &History, now: Timestamp) -> Option<Ruling> {
        prepare::prepare(self, history, now)
    }

    fn explain(&self, history: &History, finding: Conclusion) -> Conclusion {
        verdict::explain(history, self.size, finding)
    }

    fn is_reached(&self, history: &History) -> bool {
        let seen = history.fresh();
        seen.is_some_and(|seen| seen.domain.memory.asked() == self.size)
    }

    fn judge(&self, history: &History, now: Timestamp) -> Ruling {
        verdict::judge(history, self.size, now)
    }

    fn timeline(&self, history: &History) -> Vec<Evidence> {
        timeline::timeline(history, self.size)
    }
}
