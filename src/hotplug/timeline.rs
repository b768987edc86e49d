//! The evidence of an operation for people: in order of time, without repetitions.

use super::history::Return;
use super::{AcpiAnswer, Action, Event, Evidence, History, Ost, Source};
use crate::units::{Timestamp, bounded, json_bytes, seconds};

/// Maximum number of entries. The first and the last are kept.
const MAX_ENTRIES: usize = 64;

/// Maximum size of the evidence in bytes of JSON, so that a record stays below 16 KiB.
const MAX_BYTES: usize = 8 << 10;

/// Maximum size of an entry's text in bytes of JSON. A longer one is a list of numbers or a message
/// from outside.
const MAX_DETAIL: usize = 400;

/// Bytes of an entry's JSON without its text: names, source, time, punctuation.
const ENTRY_BYTES: usize = 96;

/// Evidence in any order.
#[derive(Debug, Default)]
pub(super) struct Timeline(Vec<Evidence>);

impl Timeline {
    /// Starts with the evidence that every kind of resource has: the calls, in the words of
    /// `describe`, and the domain's events, with `describe_event` for those of the resource.
    pub(super) fn of(
        history: &History,
        describe: impl Fn(&Action) -> Option<String>,
        describe_event: impl Fn(&Event) -> Option<(Source, String)>,
    ) -> Self {
        let mut timeline = Self::default();
        // Those of another client are not known.
        let calls = history.calls().iter().filter(|_| !history.by_another);
        for call in calls {
            let Some(what) = describe(&call.action) else {
                continue;
            };
            let how = match &call.returned {
                None => "no answer yet".to_owned(),
                Some((at, how)) => {
                    let how = match how {
                        Return::Done => "accepted".to_owned(),
                        Return::Failed(error) => match error.text() {
                            Some(text) => format!("failed: {text}"),
                            None if error.is_lost() => "the answer was lost".to_owned(),
                            None => "no answer in time".to_owned(),
                        },
                    };
                    let took = seconds(at.since(call.started));
                    format!("{how} (after {took})")
                }
            };
            // The guest may react before the call returns: an effect never stands before its cause.
            let at = call.started;
            timeline.add(Source::HypervisorCall, at, format!("{what}: {how}"));
        }
        for (at, event) in history.all_events() {
            let entry = lifecycle(event).map(|detail| (Source::Lifecycle, detail));
            if let Some((source, detail)) = entry.or_else(|| describe_event(event)) {
                timeline.add(source, at, detail);
            }
        }
        timeline
    }

    pub(super) fn add(&mut self, source: Source, time: Timestamp, detail: impl Into<String>) {
        self.0.push(Evidence {
            source,
            detail: bounded(&detail.into(), MAX_DETAIL),
            time,
        });
    }

    /// Sorts the evidence by time and drops what repeats the same source's previous entry.
    pub(super) fn finish(mut self) -> Vec<Evidence> {
        // Of the same millisecond, an observation before a call stands first.
        self.0
            .sort_by_key(|piece| (piece.time, piece.source == Source::HypervisorCall));
        let mut news: Vec<Evidence> = Vec::new();
        for piece in self.0 {
            let last = news.iter().rev().find(|have| have.source == piece.source);
            if last.is_none_or(|last| last.detail != piece.detail) {
                news.push(piece);
            }
        }
        limited(news)
    }
}

/// Returns as many of the first and last entries as the limits allow.
fn limited(mut entries: Vec<Evidence>) -> Vec<Evidence> {
    let (mut first, mut last, mut bytes) = (0, 0, 0);
    while first + last < entries.len().min(MAX_ENTRIES) {
        let at = if last < first {
            entries.len() - 1 - last
        } else {
            first
        };
        bytes += ENTRY_BYTES + json_bytes(&entries[at].detail);
        if bytes > MAX_BYTES {
            break;
        }
        if last < first {
            last += 1;
        } else {
            first += 1;
        }
    }
    let tail = entries.split_off(entries.len() - last);
    entries.truncate(first);
    entries.extend(tail);
    entries
}

fn lifecycle(event: &Event) -> Option<String> {
    Some(match event {
        Event::Reset => "the guest was reset".to_owned(),
        Event::Stopped(why) => format!("the domain ended: {why}"),
        Event::Paused => "the domain was paused".to_owned(),
        Event::Resumed => "the domain was resumed".to_owned(),
        _ => return None,
    })
}

/// Describes an answer through ACPI about a named device.
pub(super) fn ost_detail(ost: &Ost, name: &str) -> Option<(Source, String)> {
    let to = match ost.answer()? {
        AcpiAnswer::Added | AcpiAnswer::NotAdded => "plug",
        AcpiAnswer::Leaving | AcpiAnswer::Gone | AcpiAnswer::Kept => "eject",
    };
    let (text, status) = (ost.status_text(), ost.status);
    Some((
        Source::AcpiOst,
        format!("{name}: {to}: {text} ({status:#x})"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_drops_repetitions_and_is_bounded() {
        let mut timeline = Timeline::default();
        let at = Timestamp::from_millis;
        timeline.add(Source::LiveXml, at(1), "1 vCPU");
        timeline.add(Source::GuestAgent, at(2), "online 0");
        timeline.add(Source::LiveXml, at(3), "1 vCPU");
        timeline.add(Source::LiveXml, at(4), "3 vCPUs");
        let evidence = timeline.finish();
        let times: Vec<_> = evidence.iter().map(|have| have.time.as_millis()).collect();
        assert_eq!(times, [1, 2, 4]);
        let mut timeline = Timeline::default();
        for n in 0..1000 {
            timeline.add(Source::VcpuTime, at(n), format!("{n}"));
        }
        let evidence = timeline.finish();
        assert_eq!(evidence.len(), MAX_ENTRIES);
        assert_eq!(evidence[0].detail, "0");
        assert_eq!(evidence[MAX_ENTRIES - 1].detail, "999");

        let mut timeline = Timeline::default();
        for n in 0..1000 {
            let source = Source::HypervisorCall;
            timeline.add(source, at(n), format!("{n}{}", "\u{1}".repeat(10_000)));
        }
        let evidence = timeline.finish();
        let json = serde_json::to_string(&evidence).unwrap();
        assert!(json.len() <= MAX_BYTES, "{}", json.len());
        assert!(evidence.first().unwrap().detail.starts_with('0'));
        assert!(evidence.last().unwrap().detail.starts_with("999"));
    }
}
