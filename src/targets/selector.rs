//! Label selectors in the syntax of `kubectl get --selector`.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use crate::units::ParseError;

/// A conjunction of conditions on labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    text: String,
    conditions: Vec<LabelCondition>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct LabelCondition {
    key: String,
    /// The values of which the label has one; `None` if any value will do.
    values: Option<BTreeSet<String>>,
    /// True if the condition is reversed: a label without a value satisfies it too.
    negated: bool,
}

impl Selector {
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.conditions.iter().all(|condition| {
            let found = match (labels.get(&condition.key), &condition.values) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(value), Some(values)) => values.contains(value),
            };
            found != condition.negated
        })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

const EXPECTED: &str = "is not a valid selector, expected conditions like pool=virt, pool!=virt, \
                        pool in (virt,edge), pool notin (virt), pool or !pool, separated by commas";

impl FromStr for Selector {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError::new(text, EXPECTED);
        let conditions: Option<Vec<LabelCondition>> = split(text)
            .ok_or_else(bad)?
            .into_iter()
            .map(condition)
            .collect();
        Ok(Self {
            conditions: conditions.ok_or_else(bad)?,
            text: text.to_owned(),
        })
    }
}

/// Splits at commas outside of parentheses; `None` if these are not paired.
fn split(text: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let mut begin = 0;
    let mut is_inside = false;
    for (at, character) in text.char_indices() {
        match character {
            '(' if is_inside => return None,
            '(' => is_inside = true,
            ')' if !is_inside => return None,
            ')' => is_inside = false,
            ',' if !is_inside => {
                parts.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    (!is_inside).then_some(parts)
}

fn condition(text: &str) -> Option<LabelCondition> {
    let text = text.trim();
    if let Some(list) = text.strip_suffix(')') {
        let (key, list) = list.split_once('(')?;
        let mut words = key.split_ascii_whitespace();
        let (key, operator) = (words.next()?, words.next()?);
        let negated = match operator {
            "in" => false,
            "notin" => true,
            _ => return None,
        };
        let values: Option<BTreeSet<String>> = list
            .split(',')
            .map(|value| self::value(value.trim()))
            .collect();
        return Some(LabelCondition {
            key: self::key(key).filter(|_| words.next().is_none())?,
            values: Some(values?),
            negated,
        });
    }
    let (name, value, negated) = if let Some((name, value)) = text.split_once("!=") {
        (name, Some(value), true)
    } else if let Some((name, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        (name, Some(value), false)
    } else {
        match text.strip_prefix('!') {
            Some(name) => (name, None, true),
            None => (text, None, false),
        }
    };
    let values = match value {
        Some(value) => Some([self::value(value.trim())?].into()),
        None => None,
    };
    Some(LabelCondition {
        key: key(name.trim())?,
        values,
        negated,
    })
}

fn key(text: &str) -> Option<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    (!text.is_empty() && text.chars().all(is_part)).then(|| text.to_owned())
}

/// A value may be empty.
fn value(text: &str) -> Option<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    text.chars().all(is_part).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("pool=virt", true)]
    #[case("pool==virt", true)]
    #[case("pool!=virt", false)]
    #[case("pool", true)]
    #[case("!pool", false)]
    #[case("zone", false)]
    #[case("!zone", true)]
    #[case("zone!=a", true)]
    #[case("pool in (virt, edge)", true)]
    #[case("pool in(edge)", false)]
    #[case("pool notin (edge)", true)]
    #[case("zone notin (edge)", true)]
    #[case("pool in (edge,virt),!zone , node.io/x=", true)]
    #[case("pool=virt,zone=a", false)]
    fn labels_match_as_kubectl_matches_them(#[case] text: &str, #[case] matches: bool) {
        let labels = [("pool", "virt"), ("node.io/x", "")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let selector: Selector = text.parse().unwrap();
        assert_eq!(selector.matches(&labels.into()), matches);
    }

    #[rstest]
    #[case("")]
    #[case("pool=virt,")]
    #[case("pool in virt")]
    #[case("pool in (virt")]
    #[case("pool of (virt)")]
    #[case("pool in x (virt)")]
    #[case("po ol=virt")]
    #[case("pool=vi rt")]
    #[case("(pool)")]
    #[case("a=b=c")]
    fn text_that_is_no_selector_is_rejected_with_the_syntax(#[case] text: &str) {
        let error = text.parse::<Selector>().unwrap_err().to_string();
        assert!(error.contains("is not a valid selector"), "{error}");
    }
}
