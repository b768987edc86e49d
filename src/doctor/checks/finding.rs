//! What a diagnosis consists of.

use std::fmt;

use serde::{Serialize, Serializer};

macro_rules! checks {
    ($($variant:ident, $name:literal, $looks_at:literal;)*) => {
        /// What is looked at. The names are a contract: in JSON, in the metric, in docs/doctor.md.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Check {
            $(#[doc = $looks_at] $variant,)*
        }

        impl Check {
            /// All of them, in the order in which they are told.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The bounded word for it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What is looked at, as docs/doctor.md has it.
            pub fn looks_at(self) -> &'static str {
                match self { $(Self::$variant => $looks_at,)* }
            }
        }
    };
}

checks! {
    VirtualizationExtensions, "virtualization-extensions", "whether the CPU can run guests, the way each architecture shows it: `vmx` or `svm` on x86, EL2 on arm64 (known only by /dev/kvm), `sie` on s390x, hypervisor mode on Power, `h` on RISC-V; that KVM works counts for more than a flag";
    KvmModule, "kvm-module", "whether the module of KVM for this CPU is loaded";
    KvmDevice, "kvm-device", "whether /dev/kvm is there, is KVM's, and may be opened by the user that libvirt runs QEMU as";
    Nested, "nested", "whether guests can run guests: the module's parameter `nested`";
    Iommu, "iommu", "what the kernel command line asks of the IOMMU against what sysfs shows";
    Vfio, "vfio", "whether devices can be passed through (vfio, iommufd), and whether their isolation was switched off";
    Hugepages, "hugepages", "reserved huge pages, and whether hugetlbfs is mounted for each size of them";
    LibvirtConnection, "libvirt-connection", "whether libvirt answers here: socket, rights, polkit";
    LibvirtDaemons, "libvirt-daemons", "whether the daemons that a domain needs are there, and not both libvirtd and virtqemud";
    Versions, "versions", "what the versions of libvirt and QEMU lack: more than 255 vCPUs (EIM) without words in the XML, virtio-mem";
    ProbeAge, "probe-age", "how long ago the daemon last read each source of its labels";
    Labels, "labels", "labels that were left out because they can be none, and labels that were left to another owner";
    Domains, "domains", "whether libvirt answers about each running domain";
    GuestAgent, "guest-agent", "whether the guest agent of each running domain answers";
    VcpusOnline, "vcpus-online", "whether each guest uses the vCPUs that are plugged (`nr_cpus`, offline CPUs)";
    VirtioMem, "virtio-mem", "whether each guest took the memory that its virtio-mem devices ask it to take";
    MachineTypes, "machine-types", "whether running domains have a machine type that is deprecated, or that this QEMU does not have any more";
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Check {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Looked at, and nothing to do.
    Ok,
    /// It works, but less well than it could, or not for much longer. What is wrong inside a guest
    /// is never more than this: the node is well.
    Warning,
    /// Something does not work.
    Error,
}

impl Severity {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ok, Self::Warning, Self::Error];

    /// The bounded word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// Where a remedy's commands are to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// On this machine, as root.
    Host,
    /// In the guest, as its root.
    Guest,
    /// Nowhere that a command reaches: in the firmware, on the machine that this one is a guest of.
    Outside,
}

/// What cures it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remedy {
    /// Where.
    pub place: Place,
    /// What to do, or what to know beside the commands; whole sentences.
    pub text: String,
    /// Commands for a shell, to be run in this order. Names in them are quoted.
    pub commands: Vec<String>,
}

impl Remedy {
    /// Commands for this machine.
    pub fn on_host<C: Into<String>>(
        commands: impl IntoIterator<Item = C>,
        text: impl Into<String>,
    ) -> Self {
        Self::at(Place::Host, commands, text)
    }

    /// Commands for the guest.
    pub fn in_guest<C: Into<String>>(
        commands: impl IntoIterator<Item = C>,
        text: impl Into<String>,
    ) -> Self {
        Self::at(Place::Guest, commands, text)
    }

    /// Words alone.
    pub fn words(place: Place, text: impl Into<String>) -> Self {
        Self::at(place, <[String; 0]>::default(), text)
    }

    fn at<C: Into<String>>(
        place: Place,
        commands: impl IntoIterator<Item = C>,
        text: impl Into<String>,
    ) -> Self {
        Self {
            place,
            text: text.into(),
            commands: commands.into_iter().map(Into::into).collect(),
        }
    }
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// By which check.
    pub check: Check,
    /// How bad it is.
    pub severity: Severity,
    /// The domain it is about, by name: tenants' text. `None`: the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// What was seen.
    pub what: String,
    /// Why it matters; not told where nothing is to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What cures it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<Remedy>,
}

/// Something that could not be looked at, which is no finding: it may be well or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unseen {
    /// What for.
    pub check: Check,
    /// What could not be seen, and why.
    pub what: String,
    /// What would make it visible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<Remedy>,
}

/// All that was found, in the order of the checks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DoctorReport {
    /// What was found. Each check has at least one finding or is among the unseen.
    pub findings: Vec<Finding>,
    /// What could not be looked at.
    pub unseen: Vec<Unseen>,
}

impl DoctorReport {
    /// The worst of what was found.
    pub fn worst(&self) -> Severity {
        let severities = self.findings.iter().map(|finding| finding.severity);
        severities.max().unwrap_or(Severity::Ok)
    }

    /// How many findings of a check are this bad.
    pub fn count(&self, check: Check, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|finding| (finding.check, finding.severity) == (check, severity))
            .count()
    }

    /// In the order of the checks; the worst of a check first.
    pub(super) fn sort(&mut self) {
        self.findings
            .sort_by_key(|finding| (finding.check, std::cmp::Reverse(finding.severity)));
        self.unseen.sort_by_key(|unseen| unseen.check);
    }

    pub(super) fn ok(&mut self, check: Check, what: impl Into<String>) {
        self.findings.push(Finding {
            check,
            severity: Severity::Ok,
            domain: None,
            what: what.into(),
            why: None,
            remedy: None,
        });
    }

    pub(super) fn trouble(
        &mut self,
        check: Check,
        severity: Severity,
        what: impl Into<String>,
        why: impl Into<String>,
        remedy: Remedy,
    ) {
        self.findings.push(Finding {
            check,
            severity,
            domain: None,
            what: what.into(),
            why: Some(why.into()),
            remedy: Some(remedy),
        });
    }

    pub(super) fn unseen(&mut self, check: Check, what: impl Into<String>, remedy: Option<Remedy>) {
        self.unseen.push(Unseen {
            check,
            what: what.into(),
            remedy,
        });
    }

    /// Whether a check has said anything.
    pub(super) fn knows(&self, check: Check) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
            || self.unseen.iter().any(|unseen| unseen.check == check)
    }
}

/// A word for a shell: as it is where that is safe, else in single quotes.
pub(super) fn quoted(word: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    if !word.is_empty() && word.chars().all(safe) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// "1 domain", "2 domains".
pub(super) fn counted(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_cannot_break_out_of_its_quotes() {
        assert_eq!(quoted("qemu:///system"), "qemu:///system");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("x'; rm -rf /; '"), r"'x'\''; rm -rf /; '\'''");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn names_of_checks_are_words_of_a_metric_and_unique() {
        let names: std::collections::BTreeSet<_> = Check::ALL.iter().map(|c| c.name()).collect();
        assert_eq!(names.len(), Check::ALL.len());
        for name in names {
            let is_word = |c: char| c.is_ascii_lowercase() || c == '-';
            assert!(name.chars().all(is_word), "{name}");
        }
    }
}
