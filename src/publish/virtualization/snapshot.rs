//! The result of a probe, and its merge with the published status. Pure.

use super::describe::{describe, label_holders};
use super::truncate::{STATUS_MAX, truncate};
use crate::cluster::objects::node_virtualization::{HYPERVISOR_CONNECTED, PROBED};
use crate::cluster::objects::{Condition, NodeVirtualizationStatus};
use crate::hypervisor::ConnectionState;
use crate::label::{FactSource, RetainedLabel};
use crate::probe::{Reading, SourceFailure};
use crate::units::{Timestamp, counted, shortened};

/// Maximum characters of a condition's message.
const MESSAGE_MAX: usize = 1024;

/// The result of one probe.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// The facts from the sources that could be read.
    pub facts: NodeVirtualizationStatus,
    pub failures: Vec<SourceFailure>,
    /// Sources that were not read, because nothing can answer at present.
    pub unread: Vec<FactSource>,
    /// Names of running domains that cannot be read: untrusted text.
    pub unreadable: Vec<String>,
    /// Time of the probe.
    pub at: jiff::Timestamp,
}

impl Snapshot {
    /// `retained` are published labels that the reading does not yield. Machine types are listed for
    /// the host's architecture and for `architectures`.
    pub fn new(
        reading: &Reading,
        retained: &[RetainedLabel],
        architectures: &[String],
        at: jiff::Timestamp,
    ) -> Self {
        let mut facts = describe(&reading.facts, architectures);
        facts.holds = label_holders(retained, &reading.domains);
        Self {
            facts,
            failures: reading.failures.clone(),
            unread: reading.unread.clone(),
            unreadable: unreadable_names(reading),
            at,
        }
    }

    /// Returns the status to publish in place of `before`. Facts whose source failed are kept from
    /// `before`.
    pub fn status(
        &self,
        before: &NodeVirtualizationStatus,
        connection: ConnectionState,
        now: jiff::Timestamp,
    ) -> NodeVirtualizationStatus {
        let now = Timestamp::from(now);
        let mut status = self.facts.clone();
        let failed: Vec<FactSource> = self.failures.iter().map(|failure| failure.source).collect();
        keep_failed_sources(&mut status, before, &[&failed[..], &self.unread].concat());
        status.last_probe_time = if failed.is_empty() {
            Some(self.at.into())
        } else {
            before.last_probe_time
        };
        let conditions = [self.probed(now), connected(connection, now)];
        let after = conditions.map(|condition| condition.after(&before.conditions));
        status.conditions = after.into();
        truncate(&mut status, STATUS_MAX);
        status
    }

    fn probed(&self, now: Timestamp) -> Condition {
        if self.failures.is_empty() {
            let mut text = "All sources were read.".to_owned();
            if !self.unreadable.is_empty() {
                text = format!(
                    "All sources were read, but not the definitions of {}: labels that these \
                     domains may depend on are not removed. {}",
                    counted(self.unreadable.len(), "running domain"),
                    self.unreadable.join(", ")
                );
            }
            let text = shortened(&text, MESSAGE_MAX);
            return Condition::new(PROBED, true, "EverySourceRead", text, now);
        }
        // A reason may contain `,` and `:`.
        let word = |failure: &SourceFailure| {
            format!(
                "{}:{}",
                camel_case(failure.source.as_str()),
                camel_case(failure.code)
            )
        };
        let reasons: Vec<_> = self.failures.iter().map(word).collect();
        let mut sentences: Vec<&str> = self.failures.iter().map(|f| f.message.as_str()).collect();
        sentences.dedup();
        let text = format!(
            "Some sources cannot be read, and their facts are kept: {}",
            sentences.join("; ")
        );
        Condition::new(
            PROBED,
            false,
            &reasons.join(","),
            shortened(&text, MESSAGE_MAX),
            now,
        )
    }
}

/// Returns some names of the domains that cannot be read, safe to print.
fn unreadable_names(reading: &Reading) -> Vec<String> {
    let mut names: Vec<String> = reading
        .unreadable
        .iter()
        .map(|domain| format!("{:?}", domain.id.display_name()))
        .collect();
    names.sort_unstable();
    names
}

fn connected(connection: ConnectionState, now: Timestamp) -> Condition {
    let (holds, reason, message) = match connection {
        ConnectionState::Up(_) => (true, "Connected", "libvirt is connected."),
        ConnectionState::Absent => (
            true,
            "NotNeeded",
            "The node has no libvirt of its own; its facts have other sources.",
        ),
        ConnectionState::Down => (
            false,
            "NotConnected",
            "libvirt is not connected; virtnode keeps reconnecting.",
        ),
    };
    Condition::new(HYPERVISOR_CONNECTED, holds, reason, message, now)
}

/// Keeps facts whose source failed, as the labels do.
fn keep_failed_sources(
    status: &mut NodeVirtualizationStatus,
    before: &NodeVirtualizationStatus,
    failed: &[FactSource],
) {
    use FactSource::{Capabilities, CpuBaseline, DomainCapabilities, Domains, Host, Versions};
    let fails = |sources: &[FactSource]| sources.iter().any(|source| failed.contains(source));
    let models = [Capabilities, DomainCapabilities];
    let machines = [Versions, Capabilities, DomainCapabilities, Host];
    let before = before.clone();
    if !failed.is_empty() {
        status.omitted = before.omitted;
    }
    if fails(&[Versions]) {
        keep_one(&mut status.versions.libvirt, before.versions.libvirt);
        keep_one(&mut status.versions.qemu, before.versions.qemu);
    }
    if fails(&[Capabilities]) {
        keep_one(&mut status.architecture, before.architecture);
        keep_one(&mut status.accelerator, before.accelerator);
        keep_one(&mut status.tsc, before.tsc);
    }
    if fails(&machines) {
        keep_one(&mut status.eim, before.eim);
        keep_one(&mut status.max_vcpus, before.max_vcpus);
        keep_all(&mut status.guests, before.guests);
    }
    if fails(&models) {
        keep_all(&mut status.security, before.security);
        keep_one(&mut status.cpu.vendor, before.cpu.vendor);
        keep_one(&mut status.cpu.host_model, before.cpu.host_model);
        keep_one(&mut status.cpu.usable_models, before.cpu.usable_models);
        keep_all(&mut status.cpu.models, before.cpu.models);
    }
    if fails(&models) || fails(&[CpuBaseline]) {
        keep_all(&mut status.cpu.features, before.cpu.features);
    }
    if fails(&models) || fails(&[Host]) {
        keep_all(&mut status.cpu.hyperv, before.cpu.hyperv);
    }
    if fails(&[Host]) {
        keep_one(&mut status.iommu, before.iommu);
        keep_one(&mut status.nested, before.nested);
        keep_one(&mut status.kvm_max_vcpus, before.kvm_max_vcpus);
    }
    if fails(&[Domains]) {
        keep_all(&mut status.holds, before.holds);
    }
}

fn keep_one<T>(value: &mut Option<T>, before: Option<T>) {
    if before.is_some() {
        *value = before;
    }
}

fn keep_all<T>(values: &mut Vec<T>, before: Vec<T>) {
    if !before.is_empty() {
        *values = before;
    }
}

/// Converts `domain-capabilities` to `DomainCapabilities`.
fn camel_case(word: &str) -> String {
    let parts = word.split('-').map(|part| {
        let mut letters = part.chars();
        let first = letters.next().map(|letter| letter.to_ascii_uppercase());
        first.into_iter().chain(letters).collect::<String>()
    });
    parts.collect()
}
