//! Formats a diagnosis for people.

use std::fmt::Write;

use crate::cli::output::wrap;
use crate::doctor::checks::{DoctorReport, Finding, Place, Remedy, Severity, Unseen};
use crate::domain::plain;
use crate::units::counted;

const INDENT: &str = "    ";
/// Maximum number of domains that a finding names, so that it stays readable on a terminal.
const NAMED: usize = 8;

/// Formats a diagnosis: problems first, the most severe at the top, then skipped checks, then
/// passed ones.
pub(super) fn show(diagnosis: &DoctorReport) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ok = write(&mut text, diagnosis);
    text
}

fn write(text: &mut String, diagnosis: &DoctorReport) -> std::fmt::Result {
    for severity in [Severity::Error, Severity::Warning] {
        let mut rest: Vec<&Finding> = diagnosis
            .findings
            .iter()
            .filter(|finding| finding.severity == severity)
            .collect();
        while let Some(first) = rest.first().copied() {
            let (alike, others): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|other| are_alike(first, other));
            write_problem(text, &alike)?;
            rest = others;
        }
    }
    write_unseen(text, &diagnosis.unseen)?;
    let passed: Vec<&Finding> = diagnosis
        .findings
        .iter()
        .filter(|finding| finding.severity == Severity::Ok)
        .collect();
    if !passed.is_empty() {
        writeln!(text, "Passed:")?;
        let width = passed
            .iter()
            .map(|finding| finding.check.as_str().len())
            .max();
        for finding in passed {
            let name = finding.check.as_str();
            writeln!(
                text,
                "  {name:width$}  {}",
                plain(&finding.what),
                width = width.unwrap_or(0)
            )?;
        }
        writeln!(text)?;
    }
    let count = |severity: Severity| {
        let of = diagnosis.findings.iter().filter(|f| f.severity == severity);
        of.count()
    };
    let unseen = match diagnosis.unseen.len() {
        0 => String::new(),
        count => format!(", {count} skipped"),
    };
    writeln!(
        text,
        "{}, {}, {} ok{unseen}.",
        counted(count(Severity::Error), "error"),
        counted(count(Severity::Warning), "warning"),
        count(Severity::Ok),
    )
}

/// Returns true if two findings are the same problem of two domains.
fn are_alike(one: &Finding, other: &Finding) -> bool {
    one.check == other.check
        && one.what == other.what
        && one.domain.is_some() == other.domain.is_some()
        && one.remedy.as_ref().map(|r| &r.text) == other.remedy.as_ref().map(|r| &r.text)
}

fn write_problem(text: &mut String, alike: &[&Finding]) -> std::fmt::Result {
    let Some(first) = alike.first() else {
        return Ok(());
    };
    let names: Vec<String> = alike
        .iter()
        .filter_map(|finding| finding.domain.as_deref().map(plain))
        .collect();
    let who = match names.as_slice() {
        [] => String::new(),
        [name] => format!(" {name}:"),
        names => {
            let mut list = names[..names.len().min(NAMED)].join(", ");
            if names.len() > NAMED {
                let _ok = write!(list, " and {} more", names.len() - NAMED);
            }
            format!(" {} domains ({list}):", names.len())
        }
    };
    let severity = first.severity.as_str().to_uppercase();
    let head = format!("{severity} {}:{who} {}", first.check, plain(&first.what));
    wrap(text, "", INDENT, &head);
    if let Some(why) = &first.why {
        wrap(text, INDENT, INDENT, &plain(why));
    }
    if let Some(remedy) = &first.remedy {
        write_remedy(text, remedy, alike)?;
    }
    writeln!(text)
}

fn write_remedy(text: &mut String, remedy: &Remedy, alike: &[&Finding]) -> std::fmt::Result {
    let heading = match remedy.place {
        Place::Host => "Fix, as root on this host:",
        Place::Guest => "Fix, as root in the guest:",
        Place::Outside => "Fix, outside this host:",
    };
    if remedy.commands.is_empty() {
        wrap(
            text,
            INDENT,
            INDENT,
            &format!("{heading} {}", plain(&remedy.text)),
        );
        return Ok(());
    }
    writeln!(text, "{INDENT}{heading}")?;
    // A command that names a domain is listed once per domain.
    let mut commands: Vec<&String> = Vec::new();
    for finding in alike.iter().take(NAMED) {
        for command in finding.remedy.iter().flat_map(|remedy| &remedy.commands) {
            if !commands.contains(&command) {
                commands.push(command);
            }
        }
    }
    for command in commands {
        writeln!(text, "{INDENT}  {command}")?;
    }
    if alike.len() > NAMED {
        writeln!(text, "{INDENT}  # and so on: --output json lists them all")?;
    }
    if !remedy.text.is_empty() {
        wrap(text, INDENT, INDENT, &plain(&remedy.text));
    }
    Ok(())
}

fn write_unseen(text: &mut String, unseen: &[Unseen]) -> std::fmt::Result {
    if unseen.is_empty() {
        return Ok(());
    }
    writeln!(text, "Skipped:")?;
    let mut rest: Vec<&Unseen> = unseen.iter().collect();
    while let Some(first) = rest.first().copied() {
        let (alike, others): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|other| other.what == first.what);
        rest = others;
        let names: Vec<&str> = alike.iter().map(|unseen| unseen.check.as_str()).collect();
        let mut line = format!("{}: {}", names.join(", "), plain(&first.what));
        if let Some(remedy) = &first.remedy {
            let _ok = match remedy.commands.as_slice() {
                [] => write!(line, ". {}", remedy.text),
                commands => write!(
                    line,
                    ". To run the check: {}. {}",
                    commands.join("; "),
                    remedy.text
                ),
            };
        }
        wrap(text, "  ", INDENT, line.trim_end());
    }
    writeln!(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::checks::Check;

    fn finding(domain: Option<&str>, severity: Severity, command: &str) -> Finding {
        Finding {
            check: Check::GuestAgent,
            severity,
            domain: domain.map(str::to_owned),
            what: "its agent does not answer".to_owned(),
            why: Some("The guest is opaque.".to_owned()),
            remedy: Some(Remedy::on_host([command], "Then wait.")),
        }
    }

    #[test]
    fn same_problem_of_two_domains_yields_one_entry_after_errors() {
        let diagnosis = DoctorReport {
            findings: vec![
                finding(Some("b"), Severity::Warning, "fix b"),
                finding(Some("a\u{1b}[2J"), Severity::Warning, "fix a"),
                finding(None, Severity::Error, "fix all"),
                Finding {
                    severity: Severity::Ok,
                    ..finding(None, Severity::Ok, "")
                },
            ],
            unseen: vec![Unseen {
                check: Check::Iommu,
                what: "nothing".to_owned(),
                remedy: None,
            }],
        };
        let expected = "\
ERROR guest-agent: its agent does not answer
    The guest is opaque.
    Fix, as root on this host:
      fix all
    Then wait.

WARNING guest-agent: 2 domains (b, a\\u{1b}[2J): its agent does not answer
    The guest is opaque.
    Fix, as root on this host:
      fix b
      fix a
    Then wait.

Skipped:
  iommu: nothing

Passed:
  guest-agent  its agent does not answer

1 error, 2 warnings, 1 ok, 1 skipped.
";
        assert_eq!(show(&diagnosis), expected);
    }
}
