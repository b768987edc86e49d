//! Findings: the results of single rules.

use serde::Serialize;

/// The feasibility of running a domain on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Feasibility {
    Feasible,
    /// At least one finding blocks the domain.
    Infeasible,
    /// No finding blocks the domain, but a property that could is unknown.
    Unknown,
}

impl Feasibility {
    /// Returns the feasibility that findings imply: the worst one decides.
    pub(super) fn of(findings: &[RuleFinding]) -> Self {
        match findings.iter().map(|finding| finding.severity).min() {
            Some(RuleSeverity::Blocks) => Self::Infeasible,
            Some(RuleSeverity::Unknown) => Self::Unknown,
            _ => Self::Feasible,
        }
    }
}

/// The effect of a finding on the feasibility, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleSeverity {
    /// The domain cannot run on the node as it is.
    Blocks,
    /// The domain may fail to run: a property of the node is unknown.
    Unknown,
    /// The domain runs, but not as its definition suggests.
    Warning,
    /// Informative.
    Note,
}

/// The point at which a domain fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// libvirt rejects the definition.
    Define,
    /// libvirt accepts the definition and rejects the start. A dry run shows it.
    Start,
    /// libvirt fails to prepare the host: cgroups, CPU affinity, huge pages, files, devices. No
    /// dry run shows it.
    Launch,
    /// libvirt starts the emulator, which exits. No dry run shows it.
    Emulator,
}

/// The result of one rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleFinding {
    pub severity: RuleSeverity,
    /// The fixed identifier of the rule, for scripts.
    pub code: RuleCode,
    /// A sentence with the limit, without its period.
    pub message: String,
    /// The error message of libvirt or QEMU, verbatim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
    /// The point at which libvirt or QEMU reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl RuleFinding {
    /// Returns a finding without words, stage and remedy.
    pub fn new(severity: RuleSeverity, code: RuleCode, message: impl Into<String>) -> Self {
        Self {
            severity,
            code,
            message: message.into(),
            words: None,
            stage: None,
            remedy: None,
        }
    }

    /// Returns a finding that blocks the domain.
    pub fn blocking(code: RuleCode, message: impl Into<String>) -> Self {
        Self::new(RuleSeverity::Blocks, code, message)
    }

    /// Returns a finding for an unknown property of the node.
    pub fn unknown(code: RuleCode, message: impl Into<String>) -> Self {
        Self::new(RuleSeverity::Unknown, code, message)
    }

    /// Returns a warning.
    pub fn warning(code: RuleCode, message: impl Into<String>) -> Self {
        Self::new(RuleSeverity::Warning, code, message)
    }

    /// Returns a note.
    pub fn note(code: RuleCode, message: impl Into<String>) -> Self {
        Self::new(RuleSeverity::Note, code, message)
    }

    /// Sets libvirt's message on rejecting the definition.
    #[must_use]
    pub fn at_define(self, words: impl Into<String>) -> Self {
        self.with_words(Stage::Define, words.into())
    }

    /// Sets libvirt's message on rejecting the start.
    #[must_use]
    pub fn at_start(self, words: impl Into<String>) -> Self {
        self.with_words(Stage::Start, words.into())
    }

    /// Sets QEMU's message on exit; libvirt quotes it in its own.
    #[must_use]
    pub fn in_emulator(self, words: impl Into<String>) -> Self {
        self.with_words(Stage::Emulator, words.into())
    }

    fn with_words(mut self, stage: Stage, words: String) -> Self {
        self.words = Some(words);
        self.stage(stage)
    }

    /// Sets the stage of a failure whose message is unknown.
    #[must_use]
    pub fn stage(mut self, stage: Stage) -> Self {
        self.stage = Some(stage);
        self
    }

    /// Sets the remedy.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// A part of the definition or of the node that no rule and no answer of libvirt covers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotChecked {
    /// The subject, a noun phrase.
    pub what: String,
    /// The reason, a clause without its period.
    pub why: String,
}

impl NotChecked {
    pub fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            why: why.into(),
        }
    }
}

/// The identifier of a rule: a closed list for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleCode {
    DomainType,
    Architecture,
    Machine,
    MachineDeprecated,
    /// The meaning of an alias differs between nodes.
    MachineAlias,
    /// Numbers of vCPUs that contradict each other.
    Vcpus,
    /// The machine type's maximum.
    VcpusMachine,
    /// KVM's maximum.
    VcpusKvm,
    /// More than 255 vCPUs without q35.
    VcpusQ35,
    /// More than 255 vCPUs without extended interrupt mode.
    Eim,
    /// Extended interrupt mode without interrupt remapping, or remapping without a split I/O APIC.
    InterruptRemapping,
    Iommu,
    /// Arm's interrupt controller.
    Gic,
    Topology,
    ApicId,
    CpuMode,
    CpuModel,
    CpuFeature,
    CpuVendor,
    Migratable,
    Enlightenment,
    Memory,
    /// Memory devices, their slots and `<maxMemory>`.
    MemoryDevices,
    MemoryBacking,
    Firmware,
    HostDevice,
    /// A device, or a property of it, that the emulator or the machine type lacks.
    Device,
    /// Host CPUs that the domain is pinned to.
    HostCpus,
    /// Host NUMA nodes that hold the domain's memory.
    HostNodes,
    /// The guest's time stamp counter.
    Tsc,
    /// The width of physical addresses.
    PhysicalAddress,
    /// Confidential guests.
    LaunchSecurity,
    /// QEMU arguments that libvirt does not interpret.
    RawArguments,
    /// A result of libvirt's that differs from the computed one.
    Hypervisor,
}
