//! What a pod asks of its node, as Kubernetes' scheduler reads it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use super::offer::{ARCH_LABEL, go_arch};
use super::{Check, CpuRequirement, Requirement};
use crate::capability::Accelerator;
use crate::label::LabelKey;
use crate::label::prefix::{CPU_FEATURE, CPU_MODEL, MACHINE, MACHINE_ALIAS, NODE};

/// A node's labels.
pub type Labels = BTreeMap<String, String>;

/// A required node affinity: a node that one of the terms matches will do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Affinity {
    /// The alternatives.
    pub terms: Vec<Term>,
}

/// One alternative: all of it must match. An empty one matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Term {
    /// About labels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Expression>,
    /// About the name of the node, `metadata.name`, each with one value.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_fields: Vec<Expression>,
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Expression {
    /// The label's key.
    pub key: String,
    /// How it is compared.
    pub operator: Operator,
    /// With what.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a label is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Operator {
    /// It is there, with one of the values.
    In,
    /// It is not there, or with none of the values.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
    /// It is there, a number, and larger than the value.
    Gt,
}

impl Expression {
    fn new<const N: usize>(key: impl Into<String>, operator: Operator, values: [&str; N]) -> Self {
        Self {
            key: key.into(),
            operator,
            values: values.map(str::to_owned).into(),
        }
    }

    /// The name of a node, or any but that.
    pub fn name(operator: Operator, node: &str) -> Self {
        Self::new("metadata.name", operator, [node])
    }

    /// As the scheduler does it (`Requirement.Matches`, Kubernetes
    /// apimachinery/pkg/labels/selector.go).
    fn matches(&self, value: Option<&str>) -> bool {
        let listed = |value: &str| self.values.iter().any(|have| have == value);
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::Gt => {
                let number = |text: &str| text.parse::<i64>().ok();
                let than = self.values.first().and_then(|text| number(text));
                match (value.and_then(number), than) {
                    (Some(value), Some(than)) => value > than,
                    _ => false,
                }
            }
        }
    }
}

impl Term {
    fn matches(&self, node: &str, labels: &Labels) -> bool {
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
    /// What a domain needs, as far as labels of our own schema say it.
    ///
    /// `meanings` are the canonical names that the domain's machine type, if it is an alias, means
    /// on the nodes there are: an alias means on each node what that node's label says.
    pub fn of(domain: &Requirement, meanings: &BTreeSet<String>) -> Self {
        let mut terms = Vec::new();
        let named = domain.machine_on(domain.arch.as_deref());
        let as_named = [None];
        let meanings = meanings.iter().map(|name| Some(name.as_str()));
        let machines: Vec<Option<&str>> = match meanings.len() {
            0 => as_named.into(),
            _ => meanings.collect(),
        };
        for meaning in machines {
            for cpu in cpus(domain) {
                let mut expressions = host(domain);
                if let Some(named) = named {
                    let alias = format!("{MACHINE_ALIAS}/{named}");
                    let means = |name| Expression::new(alias, Operator::In, [name]);
                    expressions.extend(meaning.map(means));
                    expressions.push(machine(domain, meaning.unwrap_or(named)));
                }
                expressions.extend(cpu);
                expressions.extend(devices(domain));
                terms.push(Term {
                    match_expressions: expressions,
                    match_fields: Vec::new(),
                });
            }
        }
        Self { terms }
    }

    /// Whether the scheduler would take the node.
    pub fn matches(&self, node: &str, labels: &Labels) -> bool {
        self.terms.iter().any(|term| term.matches(node, labels))
    }
}

/// In a pod's `spec.affinity.nodeAffinity`.
impl Serialize for Affinity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let terms = BTreeMap::from([("nodeSelectorTerms", &self.terms)]);
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("requiredDuringSchedulingIgnoredDuringExecution", &terms)?;
        map.end()
    }
}

fn of_node(name: &str) -> String {
    format!("{NODE}/{name}")
}

fn host(domain: &Requirement) -> Vec<Expression> {
    let mut expressions = Vec::new();
    if let Some(arch) = domain.arch.as_deref() {
        expressions.push(Expression::new(ARCH_LABEL, Operator::In, [go_arch(arch)]));
    }
    if let Some(wanted) = domain.virt_type.as_deref() {
        let word =
            Accelerator::of_domain_type(wanted).map_or(wanted, |accelerator| accelerator.as_str());
        let key = of_node("accelerator");
        expressions.push(Expression::new(key, Operator::In, [word]));
    }
    expressions
}

fn machine(domain: &Requirement, name: &str) -> Expression {
    let key = format!("{MACHINE}/{name}");
    match domain.vcpus.maximum {
        // Every machine type has one, also where the number is not known.
        0 | 1 => Expression::new(key, Operator::Exists, []),
        most => Expression::new(key, Operator::Gt, [(most - 1).to_string().as_str()]),
    }
}

/// The alternatives for the CPU.
fn cpus(domain: &Requirement) -> Vec<Vec<Expression>> {
    let cpu = &domain.cpu;
    let check = cpu.effective_check(domain.virt_type.as_deref() == Some("qemu"));
    let mode = match (cpu.mode.as_deref(), cpu.model.as_deref()) {
        (None | Some("custom"), None) => return vec![Vec::new()],
        (mode, _) => mode.unwrap_or("custom"),
    };
    let exists = |key| Expression::new(key, Operator::Exists, []);
    let features = features(cpu, mode, check);
    let mut alternatives = Vec::new();
    match (mode, cpu.model.as_deref()) {
        ("custom", Some(model)) => {
            let any_will_do = check == Check::None
                || (cpu.matching.as_deref() == Some("minimum") && check == Check::Full);
            let vendor = cpu
                .vendor
                .as_deref()
                .filter(|_| check != Check::None && domain.virt_type.as_deref() != Some("qemu"))
                .map(|vendor| Expression::new(of_node("cpu-vendor"), Operator::In, [vendor]));
            let rest: Vec<Expression> = vendor.into_iter().chain(features).collect();
            let with = |first: Option<Expression>| first.into_iter().chain(rest.clone()).collect();
            match any_will_do {
                true => alternatives.push(with(None)),
                false => {
                    alternatives.push(with(Some(exists(format!("{CPU_MODEL}/{model}")))));
                    // Not usable as it is, and so in no label of its own, but without what the
                    // domain does without: the usual thing for a domain of the mode host-model.
                    if cpu.gives_up_features() {
                        let key = of_node("host-model");
                        let same = Expression::new(key, Operator::In, [model]);
                        alternatives.push(with(Some(same)));
                    }
                }
            }
        }
        ("host-model", _) => {
            let first = exists(of_node("host-model"));
            alternatives.push([first].into_iter().chain(features).collect());
        }
        _ => alternatives.push(features),
    }
    alternatives
}

fn features(cpu: &CpuRequirement, mode: &str, check: Check) -> Vec<Expression> {
    let is_plain = matches!(mode, "maximum" | "host-passthrough");
    let check = match check {
        Check::Partial if is_plain => Check::None,
        check => check,
    };
    let mut wanted: Vec<&str> = match check {
        Check::None => Vec::new(),
        Check::Partial => cpu.required().collect(),
        Check::Full => cpu.required().chain(cpu.forced()).collect(),
    };
    wanted.sort_unstable();
    wanted.dedup();
    let unwanted = cpu
        .forbidden()
        .filter(|_| check == Check::Partial || mode == "host-model");
    let expression = |name: &str, operator| {
        let key = LabelKey::new(CPU_FEATURE, name).ok()?;
        Some(Expression::new(key.as_str(), operator, []))
    };
    let wanted = wanted
        .into_iter()
        .filter_map(|name| expression(name, Operator::Exists));
    let unwanted = unwanted.filter_map(|name| expression(name, Operator::DoesNotExist));
    wanted.chain(unwanted).collect()
}

fn devices(domain: &Requirement) -> Vec<Expression> {
    let mut expressions = Vec::new();
    let exists = |name: &str| Expression::new(of_node(name), Operator::Exists, []);
    if domain.host_devices.vfio() > 0 {
        expressions.push(exists("vfio"));
        let groups = of_node("iommu-groups");
        expressions.push(Expression::new(groups, Operator::Gt, ["0"]));
    }
    if domain.host_devices.iommufd {
        expressions.push(exists("iommufd"));
    }
    expressions.extend(domain.launch_security.as_deref().map(exists));
    expressions
}
