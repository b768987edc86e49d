//! Requests about a domain in a KubeVirt launcher, whose owner is KubeVirt.
//!
//! virtnode never takes KubeVirt's place: its spec of the machine keeps the old number, and its next
//! hotplug sets that number again. So a change is off by default, limited to the vCPUs of the running
//! domain, and each rejection names the command that asks KubeVirt for the same.

use super::{HotplugRequest, Infeasible, Observation, Rejection};
use crate::domain::{Job, VcpuTopology};

/// Maximum length of a name or a namespace in Kubernetes.
const NAME_MAX: usize = 253;

/// The right to change a launcher's domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LauncherRight {
    /// The configuration allows no changes in launchers.
    Off,
    /// The API server does not confirm which virtual machine it is, for this reason.
    Unverified(String),
    Granted,
}

/// Returns the reason against a request about a launcher's domain, if there is one. `claimed` are the
/// namespace and the name of the virtual machine in the domain's name, which a launcher can choose.
pub fn check_launcher(
    request: &HotplugRequest,
    persistent: bool,
    right: &LauncherRight,
    claimed: Option<(&str, &str)>,
    seen: &Observation,
) -> Option<Rejection> {
    let reason = match (right, request) {
        (_, HotplugRequest::Memory { .. }) => {
            "the domain belongs to KubeVirt, and the memory limit of its pod does not grow with it: \
             QEMU would be killed beyond the limit"
                .to_owned()
        }
        (LauncherRight::Off, _) => {
            "the domain belongs to KubeVirt, and virtnode changes none of its domains \
             (launchers.hotplug is false)"
                .to_owned()
        }
        (LauncherRight::Unverified(reason), _) => {
            format!("the domain belongs to KubeVirt and cannot be verified: {reason}")
        }
        _ if persistent => {
            "the domain belongs to KubeVirt, which writes its definition at each start: only the \
             running domain can be changed"
                .to_owned()
        }
        (LauncherRight::Granted, HotplugRequest::Vcpus { online: true, .. }) => {
            "the domain belongs to KubeVirt, and virtnode has no guest agent change anything there: \
             ask without online"
                .to_owned()
        }
        (LauncherRight::Granted, HotplugRequest::Vcpus { .. }) => {
            return is_migrating(seen).then_some(Rejection::Migrating);
        }
    };
    let topology = seen.domain.cpu.topology.unwrap_or_default();
    let remedy = remedy(request, claimed, topology);
    Some(Infeasible::Launcher { reason, remedy }.into())
}

/// True for a domain that comes from another node, or goes to one.
fn is_migrating(seen: &Observation) -> bool {
    matches!(seen.job, Some(Job::MigrationIn | Job::MigrationOut))
}

/// Returns the way to ask KubeVirt. Only plain names and numbers are part of a command.
fn remedy(
    request: &HotplugRequest,
    claimed: Option<(&str, &str)>,
    topology: VcpuTopology,
) -> String {
    let change = match request {
        HotplugRequest::Vcpus { count, .. } => {
            let VcpuTopology {
                dies,
                clusters,
                cores,
                threads,
                ..
            } = topology;
            let per_socket = [dies, clusters, cores, threads].into_iter();
            let per_socket = per_socket.fold(1_u32, u32::saturating_mul).max(1);
            let is_whole = *count > 0 && count.is_multiple_of(per_socket);
            is_whole.then(|| format!(r#""cpu":{{"sockets":{}}}"#, count / per_socket))
        }
        HotplugRequest::Memory { size, .. } => {
            Some(format!(r#""memory":{{"guest":"{}"}}"#, size.quantity()))
        }
    };
    let names = claimed.filter(|(namespace, name)| is_plain(namespace) && is_plain(name));
    match (names, change) {
        (Some((namespace, name)), Some(change)) => format!(
            "ask KubeVirt: kubectl -n {namespace} patch vm {name} --type merge -p \
             '{{\"spec\":{{\"template\":{{\"spec\":{{\"domain\":{{{change}}}}}}}}}}}'"
        ),
        _ => "ask KubeVirt: change spec.template.spec.domain of its VirtualMachine".to_owned(),
    }
}

/// True for a name that Kubernetes allows, which needs no quotes in a shell.
fn is_plain(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len())
        && !name.starts_with('-')
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.')
}
