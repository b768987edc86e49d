//! `virtnode labels`.

use clap::Args;

use super::offline::Offline;
use super::output::{Output, print, print_value, table};
use super::{Exit, conclude, probe};
use crate::config::Config;
use crate::label::{
    CapabilitiesInUse, FactSource, LabelSet, ProbeResult, PublishedLabels, RejectedLabel, derive,
};
use crate::probe::Reading;
use crate::publish::file::{FilePublisher, LabelReport};

/// The arguments of `virtnode labels`.
#[derive(Debug, Args)]
pub(super) struct Labels {
    /// How the labels are printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,

    #[command(flatten)]
    offline: Offline,
}

impl Labels {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        if let Some(facts) = self.offline.read()? {
            let derivation = derive(&facts, &config.policy);
            let mut published = PublishedLabels::default();
            published.update(ProbeResult {
                labels: &derivation.labels,
                failed: &[],
                in_use: &CapabilitiesInUse::default(),
            });
            self.print(&published, &derivation.rejected)?;
            return Ok(Exit::Done);
        }
        let reading = probe(config)?;
        let exit = conclude(&reading, config);
        // With nothing known of the hypervisor an empty table would look like an answer.
        if exit == Exit::Unreachable {
            return Ok(exit);
        }
        let (published, rejected) = decide(&reading, config);
        self.print(&published, &rejected)?;
        Ok(exit)
    }

    fn print(&self, published: &PublishedLabels, rejected: &[RejectedLabel]) -> anyhow::Result<()> {
        let report = LabelReport {
            labels: published.labels(),
            rejected,
            retained: published.retained(),
        };
        match self.output {
            Output::Table => print(&show(&report)),
            output => print_value(&report, output),
        }
    }
}

/// What the daemon would publish after this reading, given what it published before.
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
        text.push_str("\nKept though the last probe does not call for them:\n");
        let rows = report
            .retained
            .iter()
            .map(|r| vec![r.key.to_string(), r.reason.code().to_owned()]);
        text.push_str(&table(&["LABEL", "REASON"], rows));
    }
    if !report.rejected.is_empty() {
        text.push_str("\nLeft out, since they can be no labels:\n");
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
