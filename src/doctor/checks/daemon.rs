//! The daemon of this node: how fresh its knowledge is, and its labels.

use std::collections::BTreeMap;
use std::time::Duration;

use super::finding::{Check, DoctorReport, Place, Remedy, Severity, counted};
use super::observed::{Daemon, Observed};

/// A reading this old is late whatever the time between probes is: one that failed is tried again
/// within seconds.
const LATE: Duration = Duration::from_secs(300);
/// From then on labels may be wrong; the alert on stale labels has the same time.
const STALE: Duration = Duration::from_secs(1800);

pub(super) fn check_probes(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::ProbeAge;
    let (metrics, now, interval) = match &observed.daemon {
        Daemon::None => {
            let remedy = match observed.host.virtnode_unit && observed.host.systemd {
                true => Remedy::on_host(["systemctl enable --now virtnode.service"], ""),
                false => Remedy::on_host(
                    ["virtnode run"],
                    "It stays in the foreground; in a cluster the DaemonSet runs it.",
                ),
            };
            return diagnosis.trouble(
                check,
                Severity::Warning,
                "no virtnode daemon answers on this node",
                "Nobody keeps this node's labels true, or finishes what was begun.",
                remedy,
            );
        }
        Daemon::Unreadable(why) => {
            return diagnosis.unseen(
                check,
                format!("a daemon runs, and its metrics cannot be read: {why}"),
                Some(Remedy::words(
                    Place::Host,
                    "Give this command the daemon's --listen address.",
                )),
            );
        }
        Daemon::Runs {
            metrics,
            now,
            interval,
        } => (metrics, *now, *interval),
    };
    let times = series(metrics, "virtnode_probe_last_success_timestamp_seconds");
    let late = LATE.max(interval.saturating_mul(3)).as_secs_f64();
    let mut oldest: Option<(String, f64)> = None;
    let mut never = Vec::new();
    for (labels, at) in times {
        let source = label(&labels, "source").unwrap_or_default();
        if at <= 0.0 {
            never.push(source);
        } else if oldest.as_ref().is_none_or(|(_, age)| now - at > *age) {
            oldest = Some((source, now - at));
        }
    }
    let look = || {
        Remedy::on_host(
            match observed.host.systemd {
                true => vec!["journalctl -u virtnode.service -n 50"],
                false => Vec::new(),
            },
            "The daemon's log says why; if libvirt is at fault, that is a finding of its own here.",
        )
    };
    let why = "Labels stay as they were, whatever has changed since.";
    if !never.is_empty() {
        let what = format!("the daemon could never read {}", never.join(", "));
        return diagnosis.trouble(check, Severity::Error, what, why, look());
    }
    match oldest {
        None => diagnosis.unseen(check, "what answers has none of virtnode's metrics", None),
        Some((source, age)) if age > late => {
            let severity = match age > STALE.as_secs_f64().max(late) {
                true => Severity::Error,
                false => Severity::Warning,
            };
            let what = format!("the daemon last read {source} {} ago", ago(age));
            diagnosis.trouble(check, severity, what, why, look());
        }
        Some((source, age)) => {
            diagnosis.ok(
                check,
                format!("the oldest reading ({source}) is {} old", ago(age)),
            );
        }
    }
}

pub(super) fn check_labels(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::Labels;
    let mut told = false;
    if !observed.rejected.is_empty() {
        told = true;
        let count = observed.rejected.len();
        let some: Vec<String> = observed
            .rejected
            .iter()
            .take(3)
            .map(|rejected| format!("{}={}", rejected.key, rejected.value))
            .collect();
        let more = count - some.len();
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        diagnosis.trouble(
            check,
            Severity::Warning,
            format!("{} left out: {}{more}", counted(count, "label"), some.join(", ")),
            "Their names or values can be no labels, and are not mangled into others; nobody can \
             select on them.",
            Remedy::on_host(
                ["virtnode labels --output json"],
                "It lists each with its reason. There is nothing to cure but to choose another name \
                 where it is yours, such as an own machine type or CPU model.",
            ),
        );
    }
    let given_up = match &observed.daemon {
        Daemon::Runs { metrics, .. } => conflicts(metrics),
        Daemon::None | Daemon::Unreadable(_) => 0,
    };
    if given_up > 0 {
        told = true;
        diagnosis.trouble(
            check,
            Severity::Warning,
            format!(
                "{} left to other owners since the daemon started",
                counted(given_up, "label")
            ),
            "Another field manager owns them on the Node with another value, so that the Node does \
             not say what this machine can do.",
            Remedy::on_host(
                ["kubectl get node \"$(hostname)\" -o yaml --show-managed-fields"],
                "It shows which manager; have it let go of them (two labellers with the same keys: \
                 switch one off), or let virtnode take them: forceConflicts: true.",
            ),
        );
    }
    if told {
        return;
    }
    match (&observed.facts.capabilities, &observed.daemon) {
        (Some(_), Daemon::Runs { .. }) => diagnosis.ok(check, "none left out, none left to others"),
        (Some(_), _) => diagnosis.ok(check, "none left out"),
        (None, _) => diagnosis.unseen(
            check,
            "what labels there are, which rests on libvirt: see libvirt-connection",
            None,
        ),
    }
}

/// How many labels were given up.
fn conflicts(metrics: &str) -> usize {
    let dropped = series(metrics, "virtnode_label_conflicts_total")
        .filter(|(labels, _)| label(labels, "action").as_deref() == Some("dropped"))
        .map(|(_, count)| count)
        .sum::<f64>();
    // Counts are small whole numbers; what is not is not believed.
    (0..=1_000_u16)
        .find(|count| f64::from(*count) >= dropped)
        .map_or(1_000, usize::from)
}

/// The series of a metric: labels and value.
fn series<'m>(metrics: &'m str, name: &'m str) -> impl Iterator<Item = (String, f64)> + 'm {
    metrics.lines().filter_map(move |line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        let labels = labels.strip_prefix('{')?.strip_suffix('}')?;
        Some((labels.to_owned(), value.parse().ok()?))
    })
}

/// A label's value; those here are plain words.
fn label(labels: &str, name: &str) -> Option<String> {
    let pairs: BTreeMap<&str, &str> = labels
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .collect();
    Some(pairs.get(name)?.trim_matches('"').to_owned())
}

/// Seconds for people.
fn ago(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}
