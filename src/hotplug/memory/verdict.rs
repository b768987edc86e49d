//! Rules for memory: the next step and the verdict.

use std::cmp::Ordering;
use std::time::Duration;

use super::diagnosis;
use super::evidence::{GuestTotal, MemoryFacts, planned_dimm};
use crate::hotplug::outcome::{Conclusion, Diagnosis, Ruling};
use crate::hotplug::{AcpiAnswer, History, Require, Verdict, lifecycle};
use crate::units::Bytes;
use crate::units::Timestamp;
use crate::units::seconds;

/// Returns the next step of a request for `size` of memory.
pub(super) fn judge(history: &History, size: Bytes, now: Timestamp) -> Ruling {
    let rules = MemoryRules {
        history,
        facts: MemoryFacts::read(history, size),
        size,
        before: history.before.domain.memory.plugged(),
        now,
        over: history.is_over(now),
    };
    if let Some(proof) = rules.proof() {
        return Ruling::Conclude(Conclusion::new(Verdict::Verified, proof));
    }
    if let Some(finding) = lifecycle::at_deadline(history).filter(|_| rules.over) {
        return Ruling::Conclude(finding);
    }
    if !history.latest().domain.state.runs() {
        return Ruling::wait(history.latest().awaiting());
    }
    if rules.facts.latest.is_none() {
        return Ruling::wait("an observation of the domain");
    }
    if rules.facts.asked != size {
        let shown = rules.facts.asked;
        return rules.wait_or("libvirt to change the memory", || {
            Conclusion::new(
                Verdict::HypervisorError,
                format!("libvirt shows {shown} where {size} were asked for"),
            )
        });
    }
    if let Some(finding) = rules.refused() {
        return Ruling::Conclude(finding);
    }
    match rules.facts.plugged.cmp(&size) {
        Ordering::Equal => rules.unused(),
        _ if rules.direction() == Ordering::Less => rules.shrink(),
        _ => rules.grow(),
    }
}

struct MemoryRules<'h> {
    history: &'h History,
    facts: MemoryFacts<'h>,
    size: Bytes,
    before: Bytes,
    now: Timestamp,
    over: bool,
}

impl MemoryRules<'_> {
    /// Compares the requested amount with the original one.
    fn direction(&self) -> Ordering {
        self.size.cmp(&self.before)
    }

    /// Returns the reason why the request is proven.
    fn proof(&self) -> Option<String> {
        let facts = &self.facts;
        if facts.latest.is_none() || facts.asked != self.size {
            return None;
        }
        let (difference, direction) = (self.size.abs_diff(self.before), self.direction());
        let what = match direction {
            Ordering::Equal => format!("{} plugged already", self.size),
            Ordering::Greater => format!("{difference} added"),
            Ordering::Less => format!("{difference} returned"),
        };
        let taken = facts.plugged == self.size;
        let online = taken
            && match (direction, facts.total) {
                (Ordering::Less, _) | (_, GuestTotal::Fits) => true,
                // Without a total, the driver's report counts; a DIMM has no driver.
                (_, GuestTotal::Unknown) => !self.depends_on_dimms(),
                (_, GuestTotal::Stale | GuestTotal::Short(_)) => false,
            };
        let moved = match direction {
            Ordering::Greater => facts.plugged > self.before,
            Ordering::Less => facts.plugged < self.before,
            Ordering::Equal => taken,
        };
        let by_driver = moved && !self.depends_on_dimms();
        let confirmed = matches!(facts.dimm, Some((_, AcpiAnswer::Added, _)));
        let proven = match self.history.terms.require {
            Require::Accepted => !self.history.plan_is_running(),
            Require::Acknowledged => online || by_driver || confirmed,
            Require::Online => online,
        };
        proven.then(|| match (online, self.history.terms.require) {
            (true, _) => match (direction, facts.total) {
                (Ordering::Greater | Ordering::Equal, GuestTotal::Fits) => {
                    format!(
                        "{what}, and the guest's own total shows it{}",
                        self.elapsed()
                    )
                }
                (Ordering::Greater | Ordering::Equal, _) => format!(
                    "{what}, as the guest's driver reports{}; there is no total to confirm it",
                    self.elapsed()
                ),
                _ => format!("{what}{}", self.elapsed()),
            },
            (false, Require::Accepted) => format!("{what}, as libvirt reports"),
            (false, _) => format!("the guest confirmed it{}", self.elapsed()),
        })
    }

    /// True if the request depends on DIMMs: libvirt shows their size, not their use.
    fn depends_on_dimms(&self) -> bool {
        let has_dimms = self.history.latest().domain.memory.dimms().next().is_some();
        planned_dimm(self.history).is_some() || (self.history.plan.actions.is_empty() && has_dimms)
    }

    fn elapsed(&self) -> String {
        match (self.history.calls().first(), self.facts.latest) {
            (Some(call), Some(latest)) => {
                format!(" after {}", seconds(latest.at.since(call.started)))
            }
            _ => String::new(),
        }
    }

    fn refused(&self) -> Option<Conclusion> {
        let (_, answer, ost) = self.facts.dimm?;
        let status = ost.status_text();
        (answer == AcpiAnswer::NotAdded).then(|| {
            Conclusion::new(
                Verdict::GuestRefused,
                format!("the guest refused the DIMM ({status})"),
            )
            .because(diagnosis::dimm_refused(status))
        })
    }

    /// The guest has not taken all of it.
    fn grow(&self) -> Ruling {
        let taken = self.facts.plugged.saturating_sub(self.before);
        let wanted = self.size.abs_diff(self.before);
        if taken == Bytes::ZERO {
            return self.wait_or("the guest to take memory", || {
                Conclusion::new(
                    Verdict::GuestSilent,
                    format!(
                        "the guest was asked to take {wanted} and took nothing before the deadline"
                    ),
                )
                .because(diagnosis::no_driver())
            });
        }
        self.stalled("the guest to take more memory", || {
            Conclusion::new(
                Verdict::PartiallyApplied,
                format!("the guest took {taken} of {wanted}"),
            )
            .because(diagnosis::stalled())
        })
    }

    /// The guest has not returned all of it.
    fn shrink(&self) -> Ruling {
        let left = self.facts.plugged.saturating_sub(self.size);
        let wanted = self.size.abs_diff(self.before);
        let given = self.before.saturating_sub(self.facts.plugged);
        if given == Bytes::ZERO {
            return self.wait_or("the guest to return memory", || {
                Conclusion::new(
                    Verdict::Pending,
                    format!("the guest was asked to return {wanted} and returned nothing before the deadline"),
                )
                .because(diagnosis::nothing_returned())
            });
        }
        self.stalled("the guest to return more memory", || {
            Conclusion::new(
                Verdict::PartiallyApplied,
                format!("the guest returned {given} of {wanted}, {left} remain"),
            )
            .because(diagnosis::unmovable(left))
        })
    }

    /// All of it is plugged, and its use is not proven.
    fn unused(&self) -> Ruling {
        let facts = &self.facts;
        let offline = self.history.terms.patience.offline;
        let confirmed = facts.dimm.map(|(at, ..)| at);
        if self.depends_on_dimms() && planned_dimm(self.history).is_some() && confirmed.is_none() {
            return self.wait_or("the guest to take the DIMM", || {
                match (self.history.monitor_events, facts.total) {
                    (false, GuestTotal::Unknown) => Conclusion::new(
                        Verdict::Unverifiable,
                        "libvirt plugged the DIMM, and this domain has no other source of evidence",
                    )
                    .because(diagnosis::no_source()),
                    _ => Conclusion::new(
                        Verdict::GuestSilent,
                        "libvirt plugged the DIMM, and the guest did not react before the deadline",
                    )
                    .because(diagnosis::dimm_ignored()),
                }
            });
        }
        // The later of the guest's confirmation and the plugged amount.
        let since = confirmed.max(facts.reached);
        match facts.total {
            GuestTotal::Unknown => Ruling::Conclude(
                Conclusion::new(
                    Verdict::Unverifiable,
                    "the memory is plugged, and no source shows if the guest uses it",
                )
                .because(diagnosis::no_source()),
            ),
            GuestTotal::Short(grew) => self.after(
                since,
                offline,
                "the guest to bring the memory online",
                || self.short(grew),
            ),
            // Statistics arrive every few seconds; wait for three of them.
            GuestTotal::Stale => {
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
                        Conclusion::new(
                            Verdict::Unverifiable,
                            "the memory is plugged, and the guest has stopped reporting its total",
                        )
                        .because(diagnosis::no_source())
                    },
                )
            }
            GuestTotal::Fits => Ruling::wait("another observation of the domain"),
        }
    }

    /// Returns the finding for a total that did not grow as expected.
    fn short(&self, grew: Bytes) -> Conclusion {
        let wanted = self.size.saturating_sub(self.before);
        let missing = wanted.saturating_sub(grew);
        let diagnosis = self.why_short(missing);
        if wanted > Bytes::ZERO && grew >= wanted.part(8) {
            Conclusion::new(
                Verdict::PartiallyApplied,
                format!("the guest has {wanted} more and uses {grew} of it"),
            )
        } else if wanted == Bytes::ZERO {
            Conclusion::new(
                Verdict::GuestOffline,
                format!("the guest has {} and its own total is far less", self.size),
            )
        } else {
            Conclusion::new(
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
    fn stalled(&self, awaiting: &str, finding: impl FnOnce() -> Conclusion) -> Ruling {
        self.after(
            self.facts.moved,
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
        finding: impl FnOnce() -> Conclusion,
    ) -> Ruling {
        let until = since.map(|since| self.history.patient_until(since, patience));
        let looked = until.zip(self.facts.latest);
        let looked = looked.is_some_and(|(until, latest)| latest.at >= until);
        if self.over || looked {
            Ruling::Conclude(finding())
        } else {
            Ruling::wait_until_observed_after(awaiting, until, self.now)
        }
    }

    /// Returns the finding at the deadline, and waits before.
    fn wait_or(&self, awaiting: &str, finding: impl FnOnce() -> Conclusion) -> Ruling {
        if self.over {
            Ruling::Conclude(finding())
        } else {
            Ruling::wait(awaiting)
        }
    }
}
