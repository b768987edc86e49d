//! Findings of the doctor. `Check`, `Severity`, `Place` and the field names are a contract: JSON
//! output, metric labels and docs/doctor.md use them. The texts are prose.

pub(super) use crate::units::counted;

use serde::Serialize;

use super::observed::ObservedDomain;
use crate::domain::ConnectionId;
use crate::units::words;

macro_rules! checks {
    ($($variant:ident, $name:literal, $looks_at:literal;)*) => {
        words! {
            /// A check, as named in JSON, in the metric and in docs/doctor.md.
            #[derive(PartialOrd, Ord, Hash)]
            pub enum Check {
                $(#[doc = $looks_at] $variant = $name,)*
            }
        }

        impl Check {
            /// Returns the description in docs/doctor.md.
            pub fn looks_at(self) -> &'static str {
                match self { $(Self::$variant => $looks_at,)* }
            }
        }
    };
}

checks! {
    VirtualizationExtensions, "virtualization-extensions", "the CPU's virtualization extensions, as each architecture shows them: `vmx` or `svm` on x86, EL2 on arm64 (visible only through /dev/kvm), `sie` on s390x, hypervisor mode on Power, `h` on RISC-V; a working KVM overrides a missing flag";
    KvmModule, "kvm-module", "the KVM module for this CPU is loaded";
    KvmDevice, "kvm-device", "/dev/kvm exists, is KVM's device, and can be opened by the user that libvirt runs QEMU as";
    Nested, "nested", "guests can run guests (module parameter `nested`)";
    Iommu, "iommu", "the IOMMU settings on the kernel command line agree with what sysfs shows";
    Vfio, "vfio", "devices can be passed through (vfio, iommufd), and their isolation is not disabled";
    Hugepages, "hugepages", "reserved huge pages, and a mounted hugetlbfs for each of their sizes";
    LibvirtConnection, "libvirt-connection", "libvirt answers: socket, permissions, polkit";
    LibvirtDaemons, "libvirt-daemons", "the daemons that a domain needs are running, and libvirtd and virtqemud do not run at the same time";
    Versions, "versions", "features missing from these versions of libvirt and QEMU: more than 255 vCPUs (EIM) without additional XML, virtio-mem";
    LabelDocuments, "label-documents", "the documents of KubeVirt's node-labeller, where labels follow them: readable, and for the same QEMU as the host's libvirt";
    ProbeAge, "probe-age", "age of the daemon's last reading of each label source";
    Labels, "labels", "labels rejected as invalid, and labels left to another owner";
    Domains, "domains", "libvirt answers queries about each running domain, and its definition can be read";
    GuestAgent, "guest-agent", "the guest agent of each running domain answers, and its configuration does not block `guest-get-vcpus`; an agent that could not be asked is listed as skipped";
    VcpusOnline, "vcpus-online", "each guest uses its plugged vCPUs (`nr_cpus`, offline CPUs)";
    VirtioMem, "virtio-mem", "each guest has taken the memory that its virtio-mem devices request";
    MachineTypes, "machine-types", "running domains whose machine type is deprecated, or no longer exists in this QEMU";
    ExternalChanges, "external-changes", "changes that other clients of libvirt made and that guests have not taken, as the daemon verified them (`externalChanges.enabled`)";
}

words! {
    #[derive(PartialOrd, Ord, Hash)]
    pub enum Severity {
        Ok = "ok",
        /// Works, but not as well as it could or not for much longer. A problem inside a guest is at
        /// most a warning: the node itself is healthy.
        Warning = "warning",
        Error = "error",
    }
}

/// The place to run a remedy's commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// On this machine, as root.
    Host,
    /// In the guest, as its root.
    Guest,
    /// Out of reach of a command: in the firmware, or on the hypervisor that this machine runs under.
    Outside,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remedy {
    pub place: Place,
    /// Instructions, or notes on the commands; whole sentences.
    pub text: String,
    /// Shell commands, in the order to run them. Names in them are quoted.
    pub commands: Vec<String>,
}

impl Remedy {
    /// Omits commands on the host for the domain of a launcher: virsh reaches it only inside the pod.
    fn for_domain_on(self, connection: &ConnectionId) -> Self {
        let is_elsewhere = connection.is_launcher() && self.place == Place::Host;
        if !is_elsewhere || self.commands.is_empty() {
            return self;
        }
        let text = format!(
            "In the container compute of the virt-launcher pod, use virsh: {}",
            self.text
        );
        Self::words(Place::Outside, text.trim_end_matches([' ', ':']))
    }

    pub fn on_host<C: Into<String>>(
        commands: impl IntoIterator<Item = C>,
        text: impl Into<String>,
    ) -> Self {
        Self::at(Place::Host, commands, text)
    }

    pub fn in_guest<C: Into<String>>(
        commands: impl IntoIterator<Item = C>,
        text: impl Into<String>,
    ) -> Self {
        Self::at(Place::Guest, commands, text)
    }

    /// A remedy without commands.
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

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: Check,
    pub severity: Severity,
    /// Name of the affected domain, chosen by a tenant. `None`: the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    pub what: String,
    /// Consequence; absent if the severity is ok.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<Remedy>,
}

/// A check that could not decide, which is not a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unseen {
    pub check: Check,
    /// The missing observation and the reason.
    pub what: String,
    /// Makes the observation possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<Remedy>,
}

/// All findings, in the order of the checks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DoctorReport {
    /// A check has at least one finding, or is in `unseen`.
    pub findings: Vec<Finding>,
    pub unseen: Vec<Unseen>,
}

impl DoctorReport {
    pub fn worst(&self) -> Severity {
        let severities = self.findings.iter().map(|finding| finding.severity);
        severities.max().unwrap_or(Severity::Ok)
    }

    pub fn count(&self, check: Check, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|finding| (finding.check, finding.severity) == (check, severity))
            .count()
    }

    /// Sorts by check, the most severe finding of a check first.
    pub(super) fn sort(&mut self) {
        self.findings
            .sort_by_key(|finding| (finding.check, std::cmp::Reverse(finding.severity)));
        self.unseen.sort_by_key(|unseen| unseen.check);
    }

    pub(super) fn ok(&mut self, check: Check, what: impl Into<String>) {
        self.add(check, Severity::Ok, None, what.into(), None);
    }

    /// Adds a warning or an error about the node.
    pub(super) fn problem(
        &mut self,
        check: Check,
        severity: Severity,
        what: impl Into<String>,
        why: &str,
        remedy: Remedy,
    ) {
        self.add(check, severity, None, what.into(), Some((why, remedy)));
    }

    /// Adds a warning or an error about a domain.
    pub(super) fn domain_problem(
        &mut self,
        (check, severity): (Check, Severity),
        domain: &ObservedDomain,
        what: impl Into<String>,
        why: &str,
        remedy: Remedy,
    ) {
        let problem = Some((why, remedy.for_domain_on(&domain.connection)));
        self.add(check, severity, Some(&domain.name), what.into(), problem);
    }

    fn add(
        &mut self,
        check: Check,
        severity: Severity,
        domain: Option<&String>,
        what: String,
        problem: Option<(&str, Remedy)>,
    ) {
        let (why, remedy) = problem.unzip();
        self.findings.push(Finding {
            check,
            severity,
            domain: domain.cloned(),
            what,
            why: why.map(str::to_owned),
            remedy,
        });
    }

    pub(super) fn unseen(&mut self, check: Check, what: impl Into<String>, remedy: Option<Remedy>) {
        self.unseen.push(Unseen {
            check,
            what: what.into(),
            remedy,
        });
    }

    /// True if the check has added an entry.
    pub(super) fn covers(&self, check: Check) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
            || self.unseen.iter().any(|unseen| unseen.check == check)
    }
}

/// Quotes a word for a shell, unless it is safe as it is.
pub(super) fn quoted(word: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    if !word.is_empty() && word.chars().all(safe) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_word_cannot_end_its_quotes() {
        assert_eq!(quoted("qemu:///system"), "qemu:///system");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("x'; rm -rf /; '"), r"'x'\''; rm -rf /; '\'''");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn check_names_are_unique_metric_label_values() {
        let names: std::collections::BTreeSet<_> = Check::ALL.iter().map(|c| c.as_str()).collect();
        assert_eq!(names.len(), Check::ALL.len());
        for name in names {
            let is_word = |c: char| c.is_ascii_lowercase() || c == '-';
            assert!(name.chars().all(is_word), "{name}");
        }
    }
}
