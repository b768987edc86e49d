//! Rules for memory: the next step and the verdict.

use std::cmp::Ordering;
use std::time::Duration;

use super::diagnosis;
use super::evidence::{Signs, Total, planned_dimm};
use crate::hotplug::outcome::{Diagnosis, Finding, Ruling};
use crate::hotplug::{Answer, History, Require, Verdict, lifecycle};
use crate::units::Bytes;
use crate::units::Timestamp;
use crate::units::seconds;

/// Returns the next step of a request for `size` of memory.
pub(super) fn judge(history: &History, size: Bytes, now: Timestamp) -> Ruling {
    let case = Case {
        history,
        signs: Signs::read(history, size),
        size,
        before: history.before.domain.memory.plugged(),
        now,
        over: history.is_over(now),
    };
    if let Some(proof) = case.proof() {
        return Ruling::Found(Finding::new(Verdict::Verified, proof));
    }
    if let Some(finding) = lifecycle::at_deadline(history).filter(|_| case.over) {
        return Ruling::Found(finding);
    }
    if !history.latest().domain.state.runs() {
        return Ruling::wait(history.latest().awaiting());
    }
    if case.signs.latest.is_none() {
        return Ruling::wait("a look at the domain");
    }
    if case.signs.asked != size {
        let shown = case.signs.asked;
        return case.wait_or("libvirt to change the memory", || {
            Finding::new(
                Verdict::HypervisorError,
                format!("libvirt shows {shown} where {size} were asked for"),
            )
        });
    }
    if let Some(finding) = case.refused() {
        return Ruling::Found(finding);
    }
    match case.signs.plugged.cmp(&size) {
        Ordering::Equal => case.unused(),
        _ if case.direction() == Ordering::Less => case.shrink(),
        _ => case.grow(),
    }
}

struct Case<'h> {
    history: &'h History,
    signs: Signs<'h>,
    size: Bytes,
    before: Bytes,
    now: Timestamp,
    over: bool,
}

impl Case<'_> {
    /// Compares the requested amount with the original one.
    fn direction(&self) -> Ordering {
        self.size.cmp(&self.before)
    }

    /// Returns the reason why the request is proven.
    fn proof(&self) -> Option<String> {
        let signs = &self.signs;
        if signs.latest.is_none() || signs.asked != self.size {
            return None;
        }
        let (difference, direction) = (self.size.abs_diff(self.before), self.direction());
        let what = match direction {
            Ordering::Equal => format!("{} plugged already", self.size),
            Ordering::Greater => format!("{difference} added"),
            Ordering::Less => format!("{difference} given back"),
        };
        let taken = signs.plugged == self.size;
        let online = taken
            && match (direction, signs.total) {
                (Ordering::Less, _) | (_, Total::Fits) => true,
                // Without a total, the driver's report counts; a DIMM has no driver.
                (_, Total::Unknown) => !self.rests_on_dimms(),
                (_, Total::Stale | Total::Short(_)) => false,
            };
        let moved = match direction {
            Ordering::Greater => signs.plugged > self.before,
            Ordering::Less => signs.plugged < self.before,
            Ordering::Equal => taken,
        };
        let by_driver = moved && !self.rests_on_dimms();
        let confirmed = matches!(signs.dimm, Some((_, Answer::Added, _)));
        let proven = match self.history.terms.require {
            Require::Accepted => !self.history.plan_is_running(),
            Require::Acknowledged => online || by_driver || confirmed,
            Require::Online => online,
        };
        proven.then(|| match (online, self.history.terms.require) {
            (true, _) => match (direction, signs.total) {
                (Ordering::Greater | Ordering::Equal, Total::Fits) => {
                    format!("{what}, and the guest's own total shows it{}", self.took())
                }
                (Ordering::Greater | Ordering::Equal, _) => format!(
                    "{what}, by the word of the guest's driver{}; its total tells nothing",
                    self.took()
                ),
                _ => format!("{what}{}", self.took()),
            },
            (false, Require::Accepted) => format!("{what}, by libvirt's word"),
            (false, _) => format!("the guest confirmed it{}", self.took()),
        })
    }

    /// True if the request depends on DIMMs: libvirt shows their size, not their use.
    fn rests_on_dimms(&self) -> bool {
        let has_dimms = self.history.latest().domain.memory.dimms().next().is_some();
        planned_dimm(self.history).is_some() || (self.history.plan.actions.is_empty() && has_dimms)
    }

    fn took(&self) -> String {
        match (self.history.calls().first(), self.signs.latest) {
            (Some(call), Some(latest)) => {
                format!(" after {}", seconds(latest.at.since(call.started)))
            }
            _ => String::new(),
        }
    }

    fn refused(&self) -> Option<Finding> {
        let (_, answer, ost) = self.signs.dimm?;
        let status = ost.status_text();
        (answer == Answer::NotAdded).then(|| {
            Finding::new(
                Verdict::GuestRefused,
                format!("the guest refused the DIMM ({status})"),
            )
            .because(diagnosis::dimm_refused(status))
        })
    }

    /// The guest has not taken all of it.
    fn grow(&self) -> Ruling {
        let taken = self.signs.plugged.saturating_sub(self.before);
        let wanted = self.size.abs_diff(self.before);
        if taken == Bytes::ZERO {
            return self.wait_or("the guest to take memory", || {
                Finding::new(
                    Verdict::GuestSilent,
                    format!(
                        "the guest was asked to take {wanted} and took nothing until the deadline"
                    ),
                )
                .because(diagnosis::no_driver())
            });
        }
        self.stalled("the guest to take more memory", || {
            Finding::new(
                Verdict::PartiallyApplied,
                format!("the guest took {taken} of {wanted}"),
            )
            .because(diagnosis::stalled())
        })
    }

    /// The guest has not returned all of it.
    fn shrink(&self) -> Ruling {
        let left = self.signs.plugged.saturating_sub(self.size);
        let wanted = self.size.abs_diff(self.before);
        let given = self.before.saturating_sub(self.signs.plugged);
        if given == Bytes::ZERO {
            return self.wait_or("the guest to give memory back", || {
                Finding::new(
                    Verdict::Pending,
                    format!("the guest was asked to give {wanted} back and gave nothing until the deadline"),
                )
                .because(diagnosis::nothing_given_back())
            });
        }
        self.stalled("the guest to give more memory back", || {
            Finding::new(
                Verdict::PartiallyApplied,
                format!("the guest gave {given} of {wanted} back, {left} are left"),
            )
            .because(diagnosis::unmovable(left))
        })
    }

    /// All of it is plugged, and its use is not proven.
    fn unused(&self) -> Ruling {
        let signs = &self.signs;
        let offline = self.history.terms.patience.offline;
        let confirmed = signs.dimm.map(|(at, ..)| at);
        if self.rests_on_dimms() && planned_dimm(self.history).is_some() && confirmed.is_none() {
            return self.wait_or("the guest to take the DIMM", || {
                match (self.history.monitor_events, signs.total) {
                    (false, Total::Unknown) => Finding::new(
                        Verdict::Unverifiable,
                        "libvirt plugged the DIMM, and this domain has nothing that tells more",
                    )
                    .because(diagnosis::no_source()),
                    _ => Finding::new(
                        Verdict::GuestSilent,
                        "libvirt plugged the DIMM, and the guest gave no sign until the deadline",
                    )
                    .because(diagnosis::dimm_ignored()),
                }
            });
        }
        // The later of the guest's confirmation and the plugged amount.
        let since = confirmed.max(signs.reached);
        match signs.total {
            Total::Unknown => Ruling::Found(
                Finding::new(
                    Verdict::Unverifiable,
                    "the memory is plugged, and nothing tells whether the guest uses it",
                )
                .because(diagnosis::no_source()),
            ),
            Total::Short(grew) => self.after(
                since,
                offline,
                "the guest to bring the memory online",
                || self.short(grew),
            ),
            // Statistics arrive every few seconds; wait for three of them.
            Total::Stale => {
                let period = self
                    .history
                    .latest()
                    .domain
                    .balloon
                    .stats_period
                    .unwrap_or(0);
                let turns = Duration::from_secs(3 * u64::from(period));
                self.after(
                    since,
                    offline.max(turns),
                    "newer statistics of the guest",
                    || {
                        Finding::new(
                            Verdict::Unverifiable,
                            "the memory is plugged, and the guest has stopped telling its total",
                        )
                        .because(diagnosis::no_source())
                    },
                )
            }
            Total::Fits => Ruling::wait("another look at the domain"),
        }
    }

    /// Returns the finding for a total that did not grow as expected.
    fn short(&self, grew: Bytes) -> Finding {
        let wanted = self.size.saturating_sub(self.before);
        let missing = wanted.saturating_sub(grew);
        let diagnosis = self.why_short(missing);
        if wanted > Bytes::ZERO && grew >= wanted.part(8) {
            Finding::new(
                Verdict::PartiallyApplied,
                format!("the guest has {wanted} more and uses {grew} of it"),
            )
        } else if wanted == Bytes::ZERO {
            Finding::new(
                Verdict::GuestOffline,
                format!("the guest has {} and its own total is far less", self.size),
            )
        } else {
            Finding::new(
                Verdict::GuestOffline,
                format!("the guest took {wanted} and does not use it"),
            )
        }
        .because(diagnosis)
    }

    fn why_short(&self, missing: Bytes) -> Diagnosis {
        let latest = self.history.latest();
        let plugged = latest.domain.memory.plugged();
        let balloon = latest
            .stats
            .as_ref()
            .and_then(|stats| stats.balloon.current);
        let held = plugged.saturating_sub(balloon.unwrap_or(plugged));
        match (
            held > Bytes::ZERO && held >= missing.part(2),
            planned_dimm(self.history),
        ) {
            (true, _) => diagnosis::ballooned(held),
            (_, Some((alias, size))) => diagnosis::dimm_unused(alias, size, missing),
            _ => diagnosis::offline(missing),
        }
    }

    /// Returns the finding once nothing has moved for a while, or at the deadline.
    fn stalled(&self, awaiting: &str, finding: impl FnOnce() -> Finding) -> Ruling {
        self.after(
            self.signs.moved,
            self.history.terms.patience.stalled,
            awaiting,
            finding,
        )
    }

    /// Returns the finding once an observation was started after the grace period, or at the
    /// deadline, and waits before.
    fn after(
        &self,
        since: Option<Timestamp>,
        patience: Duration,
        awaiting: &str,
        finding: impl FnOnce() -> Finding,
    ) -> Ruling {
        let until = since.map(|since| self.history.patient_until(since, patience));
        let looked = until.zip(self.signs.latest);
        let looked = looked.is_some_and(|(until, latest)| latest.at >= until);
        if self.over || looked {
            Ruling::Found(finding())
        } else {
            Ruling::wait_until_then_look(awaiting, until, self.now)
        }
    }

    /// Returns the finding at the deadline, and waits before.
    fn wait_or(&self, awaiting: &str, finding: impl FnOnce() -> Finding) -> Ruling {
        if self.over {
            Ruling::Found(finding())
        } else {
            Ruling::wait(awaiting)
        }
    }
}
