//! The node's daemon: age of its readings, and its labels.

use std::collections::BTreeMap;
use std::time::Duration;

use super::finding::{Check, DoctorReport, Place, Remedy, Severity, counted};
use super::observed::{Daemon, Observed};

/// Minimum age of a late reading, whatever the probe interval: the daemon retries a failed reading
/// within seconds.
const LATE: Duration = Duration::from_secs(300);
/// Age from which labels may be wrong, as in the alert VirtnodeLabelsStale.
const STALE: Duration = Duration::from_secs(1800);

pub(super) fn check_probes(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::ProbeAge;
    let (metrics, now, interval) = match &observed.daemon {
        Daemon::None => {
            let remedy = if observed.host.virtnode_unit && observed.host.systemd {
                Remedy::on_host(["systemctl enable --now virtnode.service"], "")
            } else {
                Remedy::on_host(
                    ["virtnode run"],
                    "This runs in the foreground; in a cluster the DaemonSet runs it.",
                )
            };
            return report.problem(
                check,
                Severity::Warning,
                "no virtnode daemon answers on this node",
                "This node's labels are not kept up to date, and unfinished operations get no \
                 verdict.",
                remedy,
            );
        }
        Daemon::Unreadable(why) => {
            return report.unseen(
                check,
                format!("a daemon is running, but its metrics cannot be read: {why}"),
                Some(Remedy::words(
                    Place::Host,
                    "Pass the daemon's address to this command with --listen.",
                )),
            );
        }
        Daemon::Runs {
            metrics,
            now,
            interval,
        } => (metrics, *now, *interval),
    };
    let late = LATE.max(interval.saturating_mul(3)).as_secs_f64();
    let mut oldest: Option<(&str, f64)> = None;
    let mut never = Vec::new();
    for (labels, at) in series(metrics, "virtnode_probe_last_success_timestamp_seconds") {
        let source = label(labels, "source").unwrap_or_default();
        if at <= 0.0 {
            never.push(source);
        } else if oldest.is_none_or(|(_, age)| now - at > age) {
            oldest = Some((source, now - at));
        }
    }
    let log = observed
        .host
        .systemd
        .then_some("journalctl -u virtnode.service -n 50");
    let remedy = Remedy::on_host(
        log,
        "The daemon's log has the reason. If libvirt is the cause, it has a finding of its own here.",
    );
    let why = "Labels keep their last values and do not follow changes.";
    if !never.is_empty() {
        let what = format!("the daemon has never read {}", never.join(", "));
        return report.problem(check, Severity::Error, what, why, remedy);
    }
    match oldest {
        None => report.unseen(check, "the answer contains no metrics of virtnode", None),
        Some((source, age)) if age > late => {
            let severity = if age > STALE.as_secs_f64().max(late) {
                Severity::Error
            } else {
                Severity::Warning
            };
            let what = format!("the daemon last read {source} {} ago", rounded(age));
            report.problem(check, severity, what, why, remedy);
        }
        Some((source, age)) => report.ok(
            check,
            format!("the oldest reading ({source}) is {} old", rounded(age)),
        ),
    }
}

pub(super) fn check_labels(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::Labels;
    let rejected = &observed.rejected;
    if !rejected.is_empty() {
        let shown = rejected.iter().take(3);
        let shown: Vec<String> = shown
            .map(|label| format!("{}={}", label.key, label.value))
            .collect();
        let more = match rejected.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        report.problem(
            check,
            Severity::Warning,
            format!("{} rejected: {}{more}", counted(rejected.len(), "label"), shown.join(", ")),
            "Their keys or values are not valid Kubernetes labels, so no pod can select on them. \
             virtnode does not change names to make them fit.",
            Remedy::on_host(
                ["virtnode labels --output json"],
                "This lists each rejected label with the reason. If the name is yours, such as a \
                 custom machine type or CPU model, choose a valid one; otherwise nothing can be done.",
            ),
        );
    }
    let conflicts = match &observed.daemon {
        Daemon::Runs { metrics, .. } => dropped_labels(metrics),
        Daemon::None | Daemon::Unreadable(_) => 0,
    };
    if conflicts > 0 {
        report.problem(
            check,
            Severity::Warning,
            format!("{} left to other owners since the daemon started", counted(conflicts, "label")),
            "Another field manager owns them on the Node with another value, so the Node's labels do \
             not describe this machine.",
            Remedy::on_host(
                ["kubectl get node \"$(hostname)\" -o yaml --show-managed-fields"],
                "This shows the other manager. If two labelers write the same keys, disable one of \
                 them; to let virtnode take the keys over, set forceConflicts: true.",
            ),
        );
    }
    if report.covers(check) {
        return;
    }
    match (&observed.facts.capabilities, &observed.daemon) {
        (Some(_), Daemon::Runs { .. }) => {
            report.ok(check, "none rejected, none left to other owners")
        }
        (Some(_), _) => report.ok(check, "none rejected"),
        (None, _) => report.unseen(
            check,
            "labels cannot be derived without libvirt: see libvirt-connection",
            None,
        ),
    }
}

pub(super) fn check_external_changes(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::ExternalChanges;
    let metrics = match &observed.daemon {
        Daemon::Runs { metrics, .. } => metrics,
        Daemon::None | Daemon::Unreadable(_) => {
            return report.unseen(
                check,
                "only a running daemon verifies them: see probe-age",
                None,
            );
        }
    };
    let mut by_resource: BTreeMap<&str, usize> = BTreeMap::new();
    for (labels, value) in series(metrics, "virtnode_domain_change_not_taken") {
        // The last label. The others have names that tenants chose.
        let resource = labels.rsplit_once("resource=").map(|(_, word)| word);
        let resource = resource.unwrap_or_default().trim_matches('"');
        *by_resource.entry(resource).or_default() += usize::from(value > 0.0);
    }
    let all: usize = by_resource.values().sum();
    if all == 0 {
        return report.ok(
            check,
            "no guest is known to lack a change that another client made",
        );
    }
    let listed = by_resource
        .iter()
        .map(|(word, count)| format!("{word} {count}"));
    let listed: Vec<String> = listed.collect();
    report.problem(
        check,
        Severity::Warning,
        format!(
            "{} by other clients not taken by the guest: {}",
            counted(all, "change"),
            listed.join(", ")
        ),
        "libvirt, and whatever made the change, report success; the guest does not use what it was \
         given, or still has the device that was detached.",
        Remedy::on_host(
            ["virtnode operations --external"],
            "This lists each with its domain, the cause and the remedy.",
        ),
    );
}

/// Returns the number of labels left to other owners, at most 1,000.
fn dropped_labels(metrics: &str) -> usize {
    let dropped = series(metrics, "virtnode_label_conflicts_total")
        .filter(|(labels, _)| label(labels, "action") == Some("dropped"))
        .map(|(_, count)| count)
        .sum::<f64>();
    // A conversion from f64 without a lossy cast.
    (0..=1_000_u16)
        .find(|count| f64::from(*count) >= dropped)
        .map_or(1_000, usize::from)
}

/// Returns labels and value of each series of a metric in the text format.
fn series<'m>(metrics: &'m str, name: &'m str) -> impl Iterator<Item = (&'m str, f64)> + 'm {
    metrics.lines().filter_map(move |line| {
        let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        let labels = labels.strip_prefix('{')?.strip_suffix('}')?;
        Some((labels, value.parse().ok()?))
    })
}

/// Returns the value of a label, which has no escapes in the metrics read here.
fn label<'m>(labels: &'m str, name: &str) -> Option<&'m str> {
    labels
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .find_map(|(key, value)| (key == name).then(|| value.trim_matches('"')))
}

fn rounded(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}
