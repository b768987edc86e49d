//! vCPUs: limits and plan, evidence, verdict, diagnosis, timeline.

mod diagnosis;
mod evidence;
mod life;
mod preflight;
mod timeline;
mod verdict;

pub(super) use evidence::{peripheral, vcpu_of};
pub use life::VcpuLife;

use super::kind::{ResourceKind, Wanted};
use super::outcome::Ruling;
use super::resource::Resource;
use super::{Action, Amount, Evidence, History, Host, Infeasible, Observation, Plan, Scope};
use crate::units::Timestamp;

/// A request for a total number of vCPUs.
pub(super) struct VcpuResource {
    pub(super) count: u32,
    /// True if vCPUs that the guest leaves offline are brought online through its agent.
    pub(super) online: bool,
}

impl Resource for VcpuResource {
    fn kind(&self) -> ResourceKind {
        ResourceKind::Vcpus
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            guest_cpus: true,
            ..Wanted::default()
        }
    }

    fn requested(&self) -> Amount {
        Amount::Vcpus {
            vcpus: self.count,
            online: None,
        }
    }

    fn amount(&self, seen: &Observation) -> Amount {
        Amount::Vcpus {
            vcpus: seen.domain.vcpus.plugged(),
            online: seen.guest().map(|guest| guest.online.len()),
        }
    }

    fn preflight(&self, seen: &Observation, host: &Host, scope: Scope) -> Result<Plan, Infeasible> {
        preflight::preflight(self.count, seen, host, scope)
    }

    fn is_reached(&self, history: &History) -> bool {
        let seen = history.fresh();
        seen.is_some_and(|seen| seen.domain.vcpus.plugged() == self.count)
    }

    fn judge(&self, history: &History, now: Timestamp) -> Ruling {
        verdict::judge(history, self.count, self.online, now)
    }

    fn settle(&self, history: &History) -> Option<Action> {
        verdict::settle(history, self.count)
    }

    fn timeline(&self, history: &History) -> Vec<Evidence> {
        timeline::timeline(history)
    }
}
