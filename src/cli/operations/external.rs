//! `virtnode operations --external`.

use std::fmt::Write;

use crate::cli::output::table;
use crate::domain::{DomainRef, plain};
use crate::external::ExternalRecord;
use crate::hotplug::Amount;
use crate::units::shortened;

/// Maximum width of a cell in characters. JSON has the whole text.
const CELL_MAX: usize = 40;

/// Formats changes by other clients for people.
pub(super) fn show(changes: &[ExternalRecord]) -> String {
    if changes.is_empty() {
        return "No changes by other clients since the daemon started.\n".to_owned();
    }
    let rows = changes.iter().map(|record| {
        let change = &record.change;
        let verdict = change
            .verdict
            .map_or("in progress", |verdict| verdict.as_str());
        let found = if change.found { ", found" } else { "" };
        vec![
            change.noticed.to_string(),
            shortened(&plain(&domain(record)), CELL_MAX),
            format!("{} {}{found}", change.action, change.resource),
            shortened(&plain(&amounts(record)), CELL_MAX),
            verdict.to_owned(),
        ]
    });
    let header = ["NOTICED", "DOMAIN", "CHANGE", "AMOUNT", "VERDICT"];
    let mut text = table(&header, rows);
    for record in changes {
        // Writing to a string does not fail.
        let _ok = details(&mut text, record);
    }
    text
}

/// Adds the reason and the remedy of a change that the guest has not taken.
fn details(text: &mut String, record: &ExternalRecord) -> std::fmt::Result {
    let change = &record.change;
    let Some(verdict) = change.verdict.filter(|_| change.is_not_taken()) else {
        return Ok(());
    };
    let message = change.message.as_deref().unwrap_or_default();
    let domain = plain(&domain(record));
    writeln!(text, "\n{domain}: {verdict}: {}", plain(message))?;
    if let Some(diagnosis) = &change.diagnosis {
        writeln!(text, "  Diagnosis: {}", plain(&diagnosis.seen))?;
        writeln!(text, "  Remedy:    {}", plain(&diagnosis.remedy))?;
    }
    Ok(())
}

/// Returns the domain's name for people.
fn domain(record: &ExternalRecord) -> String {
    let domain = &record.domain;
    let domain = DomainRef {
        connection: domain.connection.clone(),
        uuid: domain.uuid.clone().unwrap_or_default(),
        name: domain.name.clone(),
    };
    domain.display_name().into_owned()
}

fn amounts(record: &ExternalRecord) -> String {
    let change = &record.change;
    let hypervisor_has = |amount: Amount| match amount {
        Amount::Vcpus { vcpus, .. } => vcpus.to_string(),
        Amount::Memory { memory, .. } => memory.to_string(),
    };
    match (&change.device, change.before, change.requested) {
        (Some(device), ..) => device.clone(),
        (None, Some(before), Some(requested)) if !change.found => {
            format!("{} → {}", hypervisor_has(before), hypervisor_has(requested))
        }
        (None, _, Some(requested)) => hypervisor_has(requested),
        (None, ..) => String::new(),
    }
}
