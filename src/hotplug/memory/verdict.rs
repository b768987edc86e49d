//! Rules for memory: the next step and the verdict.

use std::cmp::Ordering;
use std::time::Duration;

use super::diagnosis;
use super::evidence::{GuestTotal, MemoryFacts, Need, held, planned_dimm};
use crate::hotplug::history::Return;
use crate::hotplug::outcome::{Conclusion, Diagnosis, Ruling};
use crate::hotplug::{AcpiAnswer, Action, History, Require, Verdict, lifecycle};
use crate::units::{Bytes, Timestamp, seconds};

/// Minimum time since the last change of a balloon that is idle. QEMU sends `BALLOON_CHANGE` at most once
/// per second (`monitor_qapi_event_conf`, monitor/monitor.c); until it arrives, the guest's total
/// lacks memory that no figure explains.
const BALLOON_IDLE: Duration = Duration::from_secs(2);

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
        if rules.is_changed_by_another() {
            return Ruling::Conclude(
                Conclusion::new(
                    Verdict::HypervisorError,
                    format!("another client of libvirt changed the memory to {shown} meanwhile"),
                )
                .because(diagnosis::changed_by_another(shown)),
            );
        }
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

    /// True if the amount in the live XML is not what the completed calls of this operation set.
    fn is_changed_by_another(&self) -> bool {
        let latest = self.history.latest();
        let is_settled = match self.history.changes().next_back() {
            Some(call) => {
                matches!(&call.returned, Some((at, Return::Done)) if latest.at >= *at)
            }
            None => latest.at > self.history.before.at,
        };
        is_settled && !self.history.plan_is_running()
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
        let fits = facts.total == GuestTotal::Fits && self.balloon_is_idle();
        let online = taken && (direction == Ordering::Less || fits);
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
        proven.then(|| {
            if online && direction != Ordering::Less {
                let elapsed = self.elapsed();
                format!("{what}, and the guest's own total shows it{elapsed}")
            } else if online {
                format!("{what}{}", self.elapsed())
            } else if self.history.terms.require == Require::Accepted {
                format!("{what}, as libvirt reports")
            } else {
                format!("{what}, and the guest confirmed it{}", self.elapsed())
            }
        })
    }

    /// True unless nothing was added and the balloon may be taking memory just now.
    fn balloon_is_idle(&self) -> bool {
        let latest = self.history.latest();
        if self.over || self.direction() != Ordering::Equal || held(latest) == Bytes::ZERO {
            return true;
        }
        let still = self.facts.still.map(|since| since.after(BALLOON_IDLE));
        still.is_some_and(|until| latest.at >= until)
    }

    /// True if the request depends on DIMMs: libvirt shows their size, not their use.
    fn depends_on_dimms(&self) -> bool {
        let has_dimms = self.history.latest().domain.memory.dimms().next().is_some();
        planned_dimm(self.history).is_some() || (self.history.plan.actions.is_empty() && has_dimms)
    }

    fn elapsed(&self) -> String {
        match (self.history.changes().next(), self.facts.latest) {
            (Some(call), Some(latest)) => {
                format!(" after {}", seconds(latest.ended().since(call.started)))
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
                let verdict = match silent_for(self.history) {
                    Some(_) => Verdict::GuestSilent,
                    None => Verdict::Pending,
                };
                Conclusion::new(
                    verdict,
                    format!(
                        "the guest was asked to return {wanted} and returned nothing before the \
                         deadline"
                    ),
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
                    .because(self.no_source()),
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
                .because(self.no_source()),
            ),
            GuestTotal::Unclear(missing) => {
                let still = facts.still.max(since);
                self.after(still, BALLOON_IDLE, "the balloon to become idle", || {
                    Conclusion::new(
                        Verdict::Unverifiable,
                        format!(
                            "the memory is plugged, and {missing} are missing from the guest's \
                             own total, which its kernel may have reserved at boot"
                        ),
                    )
                    .because(diagnosis::unclear())
                })
            }
            GuestTotal::Short { grew, missing } => self.after(
                since,
                offline,
                "the guest to bring the memory online",
                || self.short(grew, missing),
            ),
            // Reports arrive every few seconds; wait for three of them.
            GuestTotal::Stale => {
                let period = self.history.latest().domain.balloon.stats_period;
                let turns = Duration::from_secs(3 * u64::from(period.unwrap_or(0)));
                self.after(
                    since,
                    offline.max(turns),
                    "a report of the guest's balloon driver",
                    || self.stale(),
                )
            }
            GuestTotal::Fits => {
                let until = facts.still.map(|since| since.after(BALLOON_IDLE));
                Ruling::wait_until_observed_after("the balloon to become idle", until, self.now)
            }
        }
    }

    fn no_source(&self) -> Diagnosis {
        let latest = self.history.latest();
        let failed = self.history.calls().iter().find_map(|call| {
            let is_period = matches!(call.action, Action::SetStatsPeriod { .. });
            call.error().filter(|_| is_period)
        });
        match failed {
            _ if !latest.domain.balloon.present => diagnosis::no_balloon(),
            Some(_) => diagnosis::no_statistics(),
            None => diagnosis::no_balloon_driver(),
        }
    }

    /// Returns the finding for a guest whose last report is older than the change.
    fn stale(&self) -> Conclusion {
        let latest = self.history.latest();
        let period = latest.domain.balloon.stats_period;
        let message = match latest.memory_report() {
            Some(report) => format!(
                "the memory is plugged, and the guest's last report of its total is older than \
                 that: it was made {} before the last observation",
                seconds(report.age)
            ),
            None => "the memory is plugged, and the guest has not reported its total since it was \
                     reset"
                .to_owned(),
        };
        Conclusion::new(Verdict::Unverifiable, message)
            .because(diagnosis::no_report(period, self.history.by_another))
    }

    /// Returns the finding for a total that is not what it should be.
    fn short(&self, grew: Bytes, missing: Bytes) -> Conclusion {
        let wanted = self.size.saturating_sub(self.before);
        let diagnosis = self.why_short(missing);
        if wanted == Bytes::ZERO {
            let memory = &self.history.latest().domain.memory;
            let hot = memory.plugged().saturating_sub(memory.boot);
            let earlier = self.history.earlier.map(|earlier| earlier.verdict);
            let is_part = earlier.map_or(missing < hot.saturating_sub(hot.part(8)), |verdict| {
                verdict == Verdict::PartiallyApplied
            });
            let verdict = if is_part {
                Verdict::PartiallyApplied
            } else {
                Verdict::GuestOffline
            };
            Conclusion::new(
                verdict,
                format!(
                    "the guest has {}, and {missing} are missing from its own total",
                    self.size
                ),
            )
        } else if grew >= wanted.part(8) {
            Conclusion::new(
                Verdict::PartiallyApplied,
                format!("the guest has {wanted} more and uses {grew} of it"),
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
        let held = held(latest);
        match (
            held > Bytes::ZERO && held >= missing.part(2),
            planned_dimm(self.history),
        ) {
            (true, _) => diagnosis::ballooned(held, latest),
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

/// Returns the age of the guest's last report if the next one is overdue although the guest runs.
fn silent_for(history: &History) -> Option<Duration> {
    let latest = history.latest();
    let reports = latest.domain.balloon.stats_period.is_some();
    let report = latest.memory_report().filter(|_| reports)?;
    (latest.domain.state.runs() && !report.is_current).then_some(report.age)
}

/// Adds what is known about a guest that died or had too little memory.
pub(super) fn explain(history: &History, size: Bytes, finding: Conclusion) -> Conclusion {
    let Some(first) = history.changes().next().map(|call| call.started) else {
        return finding;
    };
    let before = &history.before;
    let is_verified = finding.verdict == Verdict::Verified;
    let has_ended = matches!(
        finding.verdict,
        Verdict::DomainNotRunning | Verdict::DomainNotFound
    );
    let reset = history.reset().filter(|reset| *reset >= first);
    if let Some(need) = Need::to_describe(history, size)
        && !is_verified
        && finding.verdict != Verdict::HypervisorError
    {
        return finding.because(diagnosis::too_large_to_describe(&need));
    }
    let shrinks = size < before.domain.memory.plugged();
    let report = before.memory_report();
    let figures = report.and_then(|report| Some((report, report.used()?)));
    let was_below = figures.is_some_and(|(report, used)| {
        let taken = before.domain.memory.plugged().saturating_sub(size);
        report.total.saturating_sub(taken) < used
    });
    if let Some(reset) = reset.filter(|_| shrinks || !is_verified) {
        let after = reset.since(first);
        return finding.because(diagnosis::was_reset(after, figures));
    }
    if has_ended && shrinks && was_below {
        return finding.because(diagnosis::ended_below_use(figures));
    }
    match silent_for(history) {
        Some(age) if !has_ended && (!is_verified || shrinks) => {
            finding.because(diagnosis::not_reporting(age, figures))
        }
        _ => finding,
    }
}
