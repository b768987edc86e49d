//! One thing that was found when a domain was held against a node.

use serde::Serialize;

/// Whether a domain would run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Feasibility {
    /// It would.
    Feasible,
    /// It would not: at least one finding blocks it.
    Infeasible,
    /// Nothing is known to block it, and something that could is not known.
    Unknown,
}

/// What a finding means for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleSeverity {
    /// The domain does not run here as it is.
    Blocks,
    /// It may not: what decides is not known.
    Unknown,
    /// It runs, and not as one may think.
    Warning,
    /// Good to know.
    Note,
}

/// When it would fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// libvirt refuses the definition.
    Define,
    /// libvirt takes the definition and refuses to start it; a dry run shows that too.
    Start,
    /// libvirt starts the emulator, and that gives up. No dry run shows it.
    Emulator,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleFinding {
    /// What it means for the answer.
    pub severity: RuleSeverity,
    /// The bounded word for the rule.
    pub code: RuleCode,
    /// What is so, with the limit, as a sentence without its full stop.
    pub message: String,
    /// What libvirt or QEMU will say, word for word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
    /// When they will say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl RuleFinding {
    /// A finding of this severity; words and remedy are added.
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

    /// What libvirt says when it refuses the definition.
    #[must_use]
    pub fn at_define(mut self, words: impl Into<String>) -> Self {
        self.words = Some(words.into());
        self.stage = Some(Stage::Define);
        self
    }

    /// What libvirt says when it refuses to start the domain.
    #[must_use]
    pub fn at_start(mut self, words: impl Into<String>) -> Self {
        self.words = Some(words.into());
        self.stage = Some(Stage::Start);
        self
    }

    /// What QEMU says when it gives up; libvirt puts its own words around it.
    #[must_use]
    pub fn in_emulator(mut self, words: impl Into<String>) -> Self {
        self.words = Some(words.into());
        self.stage = Some(Stage::Emulator);
        self
    }

    /// When it will fail, where the words are not known.
    #[must_use]
    pub fn stage(mut self, stage: Stage) -> Self {
        self.stage = Some(stage);
        self
    }

    /// What to do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// The rule behind a finding: a closed list for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleCode {
    /// The driver runs no guests of that type.
    DomainType,
    /// No emulator for the architecture.
    Architecture,
    /// The machine type.
    Machine,
    /// The machine type is going to be dropped.
    MachineDeprecated,
    /// An alias, which means something else on another node.
    MachineAlias,
    /// The numbers of vCPUs, by themselves.
    Vcpus,
    /// More vCPUs than the machine type has.
    VcpusMachine,
    /// More vCPUs than KVM has.
    VcpusKvm,
    /// More than 255 vCPUs on a machine type that cannot.
    VcpusQ35,
    /// More than 255 vCPUs without extended interrupt mode.
    Eim,
    /// Interrupt remapping without a split I/O APIC, or without itself.
    InterruptRemapping,
    /// A virtual IOMMU that the machine type or libvirt does not have.
    Iommu,
    /// A version 2 interrupt controller on Arm.
    Gic,
    /// The arrangement of vCPUs.
    Topology,
    /// An APIC ID that the guest's CPU cannot have.
    ApicId,
    /// The CPU mode.
    CpuMode,
    /// The CPU model.
    CpuModel,
    /// A CPU feature.
    CpuFeature,
    /// The CPU's vendor.
    CpuVendor,
    /// Whether the domain can be migrated later.
    Migratable,
    /// A Hyper-V enlightenment.
    Enlightenment,
    /// Memory.
    Memory,
    /// Memory devices, their slots and `<maxMemory>`.
    MemoryDevices,
    /// Where memory comes from.
    MemoryBacking,
    /// Firmware and secure boot.
    Firmware,
    /// Devices of the host.
    HostDevice,
    /// Confidential guests.
    LaunchSecurity,
    /// What QEMU is given behind libvirt's back.
    RawArguments,
    /// What the hypervisor itself said, where it says other than was computed.
    Hypervisor,
}
