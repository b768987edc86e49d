//! What a probe showed, and what becomes of it beside what was known before.

use super::describe::{describe, holds};
use super::truncate::{STATUS_MAX, truncate};
use crate::cluster::objects::node_virtualization::{HYPERVISOR_CONNECTED, PROBED};
use crate::cluster::objects::{Condition, NodeVirtualizationStatus};
use crate::hypervisor::Connection;
use crate::label::{FactSource, RetainedLabel};
use crate::probe::{Reading, SourceFailure};
use crate::units::{Timestamp, shortened};

/// What one probe showed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// The facts, as far as they could be read.
    pub facts: NodeVirtualizationStatus,
    /// The sources that could not be read.
    pub failures: Vec<SourceFailure>,
    /// When that was.
    pub at: jiff::Timestamp,
}

impl Snapshot {
    /// Of a reading, and of the labels that are kept though it does not call for them. Machine
    /// types of other architectures than the host's are told of those that are `wanted`.
    pub fn new(
        reading: &Reading,
        retained: &[RetainedLabel],
        wanted: &[String],
        at: jiff::Timestamp,
    ) -> Self {
        let mut facts = describe(&reading.facts, wanted);
        facts.holds = holds(retained, &reading.domains);
        Self {
            facts,
            failures: reading.failures.clone(),
            at,
        }
    }

    /// The status to publish, where `before` is what is published now.
    ///
    /// A part whose source could not be read stays as it was.
    pub fn status(
        &self,
        before: &NodeVirtualizationStatus,
        connection: Connection,
        now: jiff::Timestamp,
    ) -> NodeVirtualizationStatus {
        let now = Timestamp::from(now);
        let mut status = self.facts.clone();
        let failed: Vec<FactSource> = self.failures.iter().map(|failure| failure.source).collect();
        keep(&mut status, before, &failed);
        status.last_probe_time = match self.failures.is_empty() {
            true => Some(self.at.into()),
            false => before.last_probe_time,
        };
        let conditions = [self.probed(now), connected(connection, now)];
        let after = conditions.map(|condition| condition.after(&before.conditions));
        status.conditions = after.into();
        truncate(&mut status, STATUS_MAX);
        status
    }

    fn probed(&self, now: Timestamp) -> Condition {
        if self.failures.is_empty() {
            return Condition::new(
                PROBED,
                true,
                "EverySourceRead",
                "Every source could be read.",
                now,
            );
        }
        // Which sources, and why: a reason is a word, and `,` and `:` are letters of it.
        let word = |failure: &SourceFailure| {
            format!("{}:{}", camel(failure.source.as_str()), camel(failure.code))
        };
        let reasons: Vec<_> = self.failures.iter().map(word).collect();
        let mut sentences: Vec<&str> = self.failures.iter().map(|f| f.message.as_str()).collect();
        sentences.dedup();
        let text = format!(
            "Facts stay as they were where they cannot be read: {}",
            sentences.join("; ")
        );
        Condition::new(
            PROBED,
            false,
            &reasons.join(","),
            shortened(&text, 1024),
            now,
        )
    }
}

fn connected(connection: Connection, now: Timestamp) -> Condition {
    let (holds, reason, message) = match connection {
        Connection::Up(_) => (true, "Connected", "There is a connection to libvirt."),
        Connection::Down => (
            false,
            "NotConnected",
            "There is no connection to libvirt; virtnode goes on trying.",
        ),
    };
    Condition::new(HYPERVISOR_CONNECTED, holds, reason, message, now)
}

/// Keeps of what is known what rests on a source that failed, as the labels do.
fn keep(
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

fn keep_one<T>(here: &mut Option<T>, before: Option<T>) {
    if before.is_some() {
        *here = before;
    }
}

fn keep_all<T>(here: &mut Vec<T>, before: Vec<T>) {
    if !before.is_empty() {
        *here = before;
    }
}

/// `domain-capabilities` as `DomainCapabilities`.
fn camel(word: &str) -> String {
    let parts = word.split('-').map(|part| {
        let mut letters = part.chars();
        let first = letters.next().map(|letter| letter.to_ascii_uppercase());
        first.into_iter().chain(letters).collect::<String>()
    });
    parts.collect()
}
