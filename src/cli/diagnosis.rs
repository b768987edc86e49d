//! A diagnosis as a person reads it. Pure: findings in, text out.

use std::fmt::Write;

use super::report::plain;
use crate::doctor::checks::{DoctorReport, Finding, Place, Remedy, Severity, Unseen};

/// The widest line of words; commands stay whole, to be copied.
const WIDTH: usize = 96;
/// As far as the texts of troubles are moved to the right.
const INDENT: &str = "    ";
/// Domains with the same trouble that are named.
const NAMED: usize = 8;

/// The whole of a diagnosis: what is wrong first, the worst at the top, then what could not be
/// looked at, then what is well.
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
            write_trouble(text, &alike)?;
            rest = others;
        }
    }
    write_unseen(text, &diagnosis.unseen)?;
    let well: Vec<&Finding> = diagnosis
        .findings
        .iter()
        .filter(|finding| finding.severity == Severity::Ok)
        .collect();
    if !well.is_empty() {
        writeln!(text, "Looked at, and nothing to do:")?;
        let width = well.iter().map(|finding| finding.check.name().len()).max();
        for finding in well {
            let name = finding.check.name();
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
    let plural = |count: usize, noun: &str| match count {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    };
    let unseen = match diagnosis.unseen.len() {
        0 => String::new(),
        count => format!(", {count} not looked at"),
    };
    writeln!(
        text,
        "{}, {}, {} ok{unseen}.",
        plural(count(Severity::Error), "error"),
        plural(count(Severity::Warning), "warning"),
        count(Severity::Ok),
    )
}

/// Whether two troubles are the same one with two domains.
fn are_alike(one: &Finding, other: &Finding) -> bool {
    one.check == other.check
        && one.what == other.what
        && one.domain.is_some() == other.domain.is_some()
        && one.remedy.as_ref().map(|r| &r.text) == other.remedy.as_ref().map(|r| &r.text)
}

fn write_trouble(text: &mut String, alike: &[&Finding]) -> std::fmt::Result {
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
    let severity = first.severity.name().to_uppercase();
    let head = format!("{severity} {}:{who} {}", first.check, plain(&first.what));
    wrap(text, &head, "", INDENT)?;
    if let Some(why) = &first.why {
        wrap(text, &plain(why), INDENT, INDENT)?;
    }
    if let Some(remedy) = &first.remedy {
        write_remedy(text, remedy, alike)?;
    }
    writeln!(text)
}

fn write_remedy(text: &mut String, remedy: &Remedy, alike: &[&Finding]) -> std::fmt::Result {
    let cure = match remedy.place {
        Place::Host => "Cure, as root here:",
        Place::Guest => "Cure, as root in the guest:",
        Place::Outside => "Cure, not from here:",
    };
    if remedy.commands.is_empty() {
        return wrap(
            text,
            &format!("{cure} {}", plain(&remedy.text)),
            INDENT,
            INDENT,
        );
    }
    writeln!(text, "{INDENT}{cure}")?;
    // Those that name a domain are there for each.
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
        writeln!(text, "{INDENT}  # and so on; --output json has them all")?;
    }
    if remedy.text.is_empty() {
        return Ok(());
    }
    wrap(text, &plain(&remedy.text), INDENT, INDENT)
}

fn write_unseen(text: &mut String, unseen: &[Unseen]) -> std::fmt::Result {
    if unseen.is_empty() {
        return Ok(());
    }
    writeln!(text, "Not looked at:")?;
    let mut rest: Vec<&Unseen> = unseen.iter().collect();
    while let Some(first) = rest.first().copied() {
        let (alike, others): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|other| other.what == first.what);
        rest = others;
        let names: Vec<&str> = alike.iter().map(|unseen| unseen.check.name()).collect();
        let mut line = format!("{}: {}", names.join(", "), plain(&first.what));
        if let Some(remedy) = &first.remedy {
            let _ok = match remedy.commands.as_slice() {
                [] => write!(line, ". {}", remedy.text),
                commands => write!(
                    line,
                    ". To see it: {}. {}",
                    commands.join("; "),
                    remedy.text
                ),
            };
        }
        wrap(text, line.trim_end(), "  ", INDENT)?;
    }
    writeln!(text)
}

/// Writes words in lines that are not too wide. What is between backquotes stays on one line.
fn wrap(text: &mut String, words: &str, first: &str, others: &str) -> std::fmt::Result {
    let mut line = first.to_owned();
    let mut is_empty = true;
    for word in unbroken(words) {
        let is_too_long = line.chars().count() + 1 + word.chars().count() > WIDTH;
        if !is_empty && is_too_long {
            writeln!(text, "{line}")?;
            line = others.to_owned();
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(&word);
        is_empty = false;
    }
    writeln!(text, "{line}")
}

/// The words, those between backquotes as one.
fn unbroken(words: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut in_quotes = false;
    for word in words.split(' ').filter(|word| !word.is_empty()) {
        match all.last_mut() {
            Some(last) if in_quotes => {
                last.push(' ');
                last.push_str(word);
            }
            _ => all.push(word.to_owned()),
        }
        in_quotes ^= word.matches('`').count() % 2 == 1;
    }
    all
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
            why: Some("Nobody can tell.".to_owned()),
            remedy: Some(Remedy::on_host([command], "Then wait.")),
        }
    }

    #[test]
    fn domains_with_the_same_trouble_are_told_together_and_errors_first() {
        let diagnosis = DoctorReport {
            findings: vec![
                finding(Some("b"), Severity::Warning, "cure b"),
                finding(Some("a\u{1b}[2J"), Severity::Warning, "cure a"),
                finding(None, Severity::Error, "cure all"),
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
    Nobody can tell.
    Cure, as root here:
      cure all
    Then wait.

WARNING guest-agent: 2 domains (b, a\\u{1b}[2J): its agent does not answer
    Nobody can tell.
    Cure, as root here:
      cure b
      cure a
    Then wait.

Not looked at:
  iommu: nothing

Looked at, and nothing to do:
  guest-agent  its agent does not answer

1 error, 2 warnings, 1 ok, 1 not looked at.
";
        assert_eq!(show(&diagnosis), expected);
    }

    #[test]
    fn what_is_to_be_copied_stays_on_one_line() {
        let mut text = String::new();
        let words = format!(
            "{} `echo 'a b c' >file`, then {}",
            "x".repeat(80),
            "y".repeat(80)
        );
        wrap(&mut text, &words, "", "  ").unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[1], "  `echo 'a b c' >file`, then");
    }
}
