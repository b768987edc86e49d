//! `virtnode labels`.

use clap::Args;

use super::offline::OfflineDocuments;
use super::output::{OutputOption, complain, table};
use super::{Exit, conclude, probe_labels, runtime};
use crate::config::Config;
use crate::label::{
    CapabilitiesInUse, FactSource, LabelSet, ProbeResult, PublishedLabels, RejectedLabel, derive,
    notes,
};
use crate::probe::Reading;
use crate::publish::file::{FilePublisher, LabelReport};

#[derive(Debug, Args)]
pub(super) struct LabelsCommand {
    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    offline: OfflineDocuments,
}

impl LabelsCommand {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        if let Some(facts) = self.offline.read([])? {
            let derivation = derive(&facts, &config.policy);
            let mut published = PublishedLabels::default();
            published.update(ProbeResult {
                labels: &derivation.labels,
                failed: &[],
                unread: &[],
                in_use: &CapabilitiesInUse::default(),
            });
            let notes = notes(&facts, &config.policy, &derivation.labels);
            for note in &notes {
                complain(&format!("virtnode: {note}"));
            }
            self.print(&published, &derivation.rejected, &notes)?;
            // An empty answer is none.
            return Ok(if derivation.labels.is_empty() {
                Exit::Failed
            } else {
                Exit::Done
            });
        }
        let reading = runtime()?.block_on(probe_labels(config));
        let exit = conclude(&reading, config);
        // Without libvirt an empty table would look like an answer.
        if exit == Exit::Unreachable {
            return Ok(exit);
        }
        let (published, rejected) = decide(&reading, config);
        self.print(&published, &rejected, &[])?;
        Ok(exit)
    }

    fn print(
        &self,
        published: &PublishedLabels,
        rejected: &[RejectedLabel],
        notes: &[String],
    ) -> anyhow::Result<()> {
        let report = LabelReport {
            labels: published.labels(),
            rejected,
            retained: published.retained(),
            notes,
        };
        self.output.print(&report, || show(&report))
    }
}

/// Returns the labels that the daemon would publish after this probe, given those that it published
/// before.
fn decide(reading: &Reading, config: &Config) -> (PublishedLabels, Vec<RejectedLabel>) {
    let file = FilePublisher::new(&config.state_directory, &config.features_directory);
    let before = file.load().unwrap_or_else(|_| LabelSet::new());
    let derivation = derive(&reading.facts, &config.policy);
    let failed: Vec<FactSource> = reading
        .failures
        .iter()
        .map(|failure| failure.source)
        .collect();
    let mut published = PublishedLabels::starting_from(before);
    published.update(ProbeResult {
        labels: &derivation.labels,
        failed: &failed,
        unread: &reading.unread,
        in_use: &reading.in_use,
    });
    (published, derivation.rejected)
}

fn show(report: &LabelReport<'_>) -> String {
    let rows = report
        .labels
        .iter()
        .map(|(key, value)| vec![key.to_string(), value.to_string()]);
    let mut text = table(&["LABEL", "VALUE"], rows);
    if !report.retained.is_empty() {
        text.push_str("\nKept, although the last probe does not yield them:\n");
        let rows = report
            .retained
            .iter()
            .map(|r| vec![r.key.to_string(), r.reason.to_string()]);
        text.push_str(&table(&["LABEL", "REASON"], rows));
    }
    if !report.rejected.is_empty() {
        text.push_str("\nRejected, because they are not valid labels:\n");
        let rows = report.rejected.iter().map(|rejected| {
            vec![
                rejected.key.escape_debug().to_string(),
                rejected.value.escape_debug().to_string(),
                rejected.reason.to_string(),
            ]
        });
        text.push_str(&table(&["LABEL", "VALUE", "REASON"], rows));
    }
    text
}
