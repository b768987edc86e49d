//! The node affinity of a pod, as Kubernetes' scheduler evaluates it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use super::Requirement;
use super::offer::{ARCH_LABEL, NodeLabels, go_arch};
use super::rules::tsc_range;
use crate::capability::Accelerator;
use crate::domain::{CpuCheck, CpuRequirement};
use crate::label::prefix::{CPU_FEATURE, CPU_MODEL, HYPERV, MACHINE, MACHINE_ALIAS, NODE};
use crate::label::{LabelKey, LabelValue};

/// A required node affinity: a node must match one of the terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Affinity {
    /// The alternatives. An empty list would match no node, which Kubernetes does not accept.
    pub terms: Vec<Term>,
}

/// One alternative, all of whose expressions must match. An empty one matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Term {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Expression>,
    /// Expressions on the node's name, `metadata.name`, with one value each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_fields: Vec<Expression>,
}

/// A condition on a label or a field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Expression {
    pub key: String,
    pub operator: Operator,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// The operator of an [`Expression`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Operator {
    /// The label exists and has one of the values.
    In,
    /// The label does not exist or has none of the values.
    NotIn,
    Exists,
    DoesNotExist,
    /// The label exists and is a number above the value.
    Gt,
    /// The label exists and is a number below the value.
    Lt,
}

impl Expression {
    /// Returns a condition on a label; `None` if key or value is not a valid label.
    fn label<const N: usize>(
        prefix: &str,
        name: &str,
        operator: Operator,
        values: [&str; N],
    ) -> Option<Self> {
        let value = |text: &str| Some(LabelValue::new(text).ok()?.as_str().to_owned());
        Some(Self {
            key: LabelKey::new(prefix, name).ok()?.as_str().to_owned(),
            operator,
            values: values.into_iter().map(value).collect::<Option<_>>()?,
        })
    }

    /// Returns a condition on the node's name.
    pub fn name(operator: Operator, node: &str) -> Self {
        Self {
            key: "metadata.name".to_owned(),
            operator,
            values: vec![node.to_owned()],
        }
    }

    /// Evaluates the condition like the scheduler (`Requirement.Matches`, Kubernetes
    /// apimachinery/pkg/labels/selector.go).
    fn matches(&self, value: Option<&str>) -> bool {
        let listed = |value: &str| self.values.iter().any(|have| have == value);
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::Gt | Operator::Lt => {
                let number = |text: &str| text.parse::<i64>().ok();
                let limit = self.values.first().and_then(|text| number(text));
                let holds = |(value, limit): (i64, i64)| match self.operator {
                    Operator::Lt => value < limit,
                    _ => value > limit,
                };
                value.and_then(number).zip(limit).is_some_and(holds)
            }
        }
    }
}

impl Term {
    fn matches(&self, node: &str, labels: &NodeLabels) -> bool {
        let label = |expression: &Expression| {
            expression.matches(labels.get(&expression.key).map(String::as_str))
        };
        let is_empty = self.match_expressions.is_empty() && self.match_fields.is_empty();
        !is_empty
            && self.match_expressions.iter().all(label)
            && self.match_fields.iter().all(|f| f.matches(Some(node)))
    }
}

impl Affinity {
    /// Returns the affinity for a domain, by virtnode's own labels.
    ///
    /// If the domain's machine type is an alias, `meanings` are its canonical names on the nodes of
    /// the cluster; each node's label maps the alias to one of them.
    pub fn of(domain: &Requirement, meanings: &BTreeSet<String>) -> Self {
        let named = domain.machine_on(domain.arch.as_deref());
        let meanings = meanings.iter().map(|name| Some(name.as_str()));
        let as_named = [None].into_iter().filter(|_| meanings.len() == 0);
        let mut terms = Vec::new();
        for meaning in meanings.clone().chain(as_named) {
            let alternatives = cpus(domain).into_iter().flat_map(|cpu| {
                let with = move |tsc| [cpu.clone(), tsc].concat();
                tsc(domain).into_iter().map(with)
            });
            for cpu in alternatives {
                let mut conditions = host(domain);
                if let Some(named) = named {
                    conditions.extend(meaning.map(|name| is_in(MACHINE_ALIAS, named, name)));
                    conditions.push(machine(domain, meaning.unwrap_or(named)));
                }
                conditions.extend(cpu);
                conditions.extend(enlightenments(domain));
                conditions.extend(devices(domain));
                let all: Option<Vec<Expression>> = conditions.into_iter().collect();
                terms.extend(all.map(|match_expressions| Term {
                    match_expressions,
                    match_fields: Vec::new(),
                }));
            }
        }
        Self { terms }
    }

    /// True if the scheduler would accept the node.
    pub fn matches(&self, node: &str, labels: &NodeLabels) -> bool {
        self.terms.iter().any(|term| term.matches(node, labels))
    }
}

/// The form of a pod's `spec.affinity.nodeAffinity`.
impl Serialize for Affinity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let terms = BTreeMap::from([("nodeSelectorTerms", &self.terms)]);
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("requiredDuringSchedulingIgnoredDuringExecution", &terms)?;
        map.end()
    }
}

/// A condition on a label, or `None` if the label is not valid, so that no node matches.
type LabelCondition = Option<Expression>;

fn exists(prefix: &str, name: &str) -> LabelCondition {
    Expression::label(prefix, name, Operator::Exists, [])
}

fn is_in(prefix: &str, name: &str, value: &str) -> LabelCondition {
    Expression::label(prefix, name, Operator::In, [value])
}

fn is_above(prefix: &str, name: &str, value: u64) -> LabelCondition {
    Expression::label(prefix, name, Operator::Gt, [value.to_string().as_str()])
}

fn host(domain: &Requirement) -> Vec<LabelCondition> {
    let arch = domain.arch.as_deref().map(|arch| {
        let (prefix, name) = ARCH_LABEL.split_once('/')?;
        is_in(prefix, name, go_arch(arch))
    });
    let accelerator = domain.virt_type.as_deref().map(|wanted| {
        let word = Accelerator::of_domain_type(wanted).map_or(wanted, |best| best.as_str());
        is_in(NODE, "accelerator", word)
    });
    arch.into_iter().chain(accelerator).collect()
}

fn machine(domain: &Requirement, name: &str) -> LabelCondition {
    match domain.vcpus.maximum {
        // Every machine type allows one, even if its label says `unknown`.
        0 | 1 => exists(MACHINE, name),
        most => is_above(MACHINE, name, most - 1),
    }
}

/// Returns the alternatives for the CPU.
fn cpus(domain: &Requirement) -> Vec<Vec<LabelCondition>> {
    let cpu = &domain.cpu;
    let is_tcg = domain.virt_type.as_deref() == Some("qemu");
    let check = cpu.effective_check(is_tcg);
    let mode = match (cpu.mode.as_deref(), cpu.model.as_deref()) {
        (None | Some("custom"), None) => return vec![Vec::new()],
        (mode, _) => mode.unwrap_or("custom"),
    };
    let features = features(cpu, mode, check);
    let mut alternatives = Vec::new();
    match (mode, cpu.model.as_deref()) {
        ("custom", Some(model)) => {
            let accepts_any = check == CpuCheck::None
                || (cpu.matching.as_deref() == Some("minimum") && check == CpuCheck::Full);
            let vendor = cpu.vendor.as_deref();
            let vendor = vendor.filter(|_| check != CpuCheck::None && !is_tcg);
            let vendor = vendor.map(|vendor| is_in(NODE, "cpu-vendor", vendor));
            let rest: Vec<LabelCondition> = vendor.into_iter().chain(features).collect();
            let with =
                |first: Option<LabelCondition>| first.into_iter().chain(rest.clone()).collect();
            if accepts_any {
                alternatives.push(with(None));
            } else {
                alternatives.push(with(Some(exists(CPU_MODEL, model))));
                // A model that is not usable as it is has no label, but the domain may tolerate
                // the missing features: this is usual for a running domain with host-model.
                if cpu.tolerates_missing_features() {
                    alternatives.push(with(Some(is_in(NODE, "host-model", model))));
                }
            }
        }
        ("host-model", _) => {
            let first = exists(NODE, "host-model");
            alternatives.push([first].into_iter().chain(features).collect());
        }
        _ => alternatives.push(features),
    }
    alternatives
}

fn features(cpu: &CpuRequirement, mode: &str, check: CpuCheck) -> Vec<LabelCondition> {
    let is_plain = matches!(mode, "maximum" | "host-passthrough");
    let check = match check {
        CpuCheck::Partial if is_plain => CpuCheck::None,
        check => check,
    };
    let mut wanted: Vec<&str> = match check {
        CpuCheck::None => Vec::new(),
        CpuCheck::Partial => cpu.required().collect(),
        CpuCheck::Full => cpu.required().chain(cpu.forced()).collect(),
    };
    wanted.sort_unstable();
    wanted.dedup();
    let wanted = wanted.into_iter().map(|name| exists(CPU_FEATURE, name));
    // An invalid label is on no node, so its absence needs no condition.
    let unwanted = cpu
        .forbidden()
        .filter(|_| check == CpuCheck::Partial || mode == "host-model")
        .filter_map(|name| Expression::label(CPU_FEATURE, name, Operator::DoesNotExist, []))
        .map(Some);
    wanted.chain(unwanted).collect()
}

/// Returns the alternatives for the time stamp counter: libvirt scales it, or its frequency is close
/// enough. Without the label libvirt did not measure it, and accepts every frequency.
fn tsc(domain: &Requirement) -> Vec<Vec<LabelCondition>> {
    let Some(wanted) = domain.tsc_frequency else {
        return vec![Vec::new()];
    };
    let (lowest, highest) = hosts_within_tolerance(wanted);
    let number = |operator, value: u64| {
        let value = value.to_string();
        Expression::label(NODE, "tsc-frequency-hz", operator, [value.as_str()])
    };
    let scales = Expression::label(NODE, "tsc-scaling", Operator::NotIn, ["false"]);
    let is_close = vec![
        number(Operator::Gt, lowest.saturating_sub(1)),
        number(Operator::Lt, highest.saturating_add(1)),
    ];
    vec![vec![scales], is_close]
}

/// Returns the lowest and the highest frequency of a host on which libvirt accepts the guest's
/// frequency without scaling. Both bounds of the tolerance rise with the host's frequency.
fn hosts_within_tolerance(wanted: u64) -> (u64, u64) {
    let first = |holds: &dyn Fn(u64) -> bool| {
        let (mut low, mut high) = (wanted / 2, wanted.saturating_mul(2));
        while low < high {
            let middle = low + (high - low) / 2;
            if holds(middle) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        low
    };
    let lowest = first(&|host| tsc_range(host).1 >= wanted);
    let too_high = first(&|host| tsc_range(host).0 > wanted);
    (lowest, too_high.saturating_sub(1))
}

fn enlightenments(domain: &Requirement) -> impl Iterator<Item = LabelCondition> {
    // Software emulation ignores them.
    let is_tcg = domain.virt_type.as_deref() == Some("qemu");
    let names = domain.special_enlightenments().filter(move |_| !is_tcg);
    names.map(|name| exists(HYPERV, name))
}

fn devices(domain: &Requirement) -> Vec<LabelCondition> {
    let mut conditions = Vec::new();
    if domain.host_devices.vfio() > 0 {
        conditions.push(exists(NODE, "vfio"));
        conditions.push(is_above(NODE, "iommu-groups", 0));
    }
    if domain.host_devices.iommufd {
        conditions.push(exists(NODE, "iommufd"));
    }
    let security = domain.launch_security.as_deref();
    conditions.extend(security.map(|kind| exists(NODE, kind)));
    conditions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_within_tolerance_are_exactly_those_that_libvirt_accepts() {
        for wanted in [1_000_000_000, 2_596_769_030, 2_599_999_999] {
            let (lowest, highest) = hosts_within_tolerance(wanted);
            let accepts = |host: u64| {
                let (low, high) = tsc_range(host);
                (low..=high).contains(&wanted)
            };
            assert!(accepts(lowest) && accepts(highest), "{wanted}");
            assert!(!accepts(lowest - 1) && !accepts(highest + 1), "{wanted}");
        }
    }
}
