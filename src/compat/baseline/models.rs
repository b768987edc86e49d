//! The features of libvirt's x86 CPU models.
//!
//! `x86_models.txt` was printed by libvirt 12.8 (`scripts/cpu-models.py`). It never decides if a model
//! runs on a node: that is for the node's own libvirt to say. It orders models, and keeps features that a
//! model has anyway out of a definition. A model that it lacks is used without that knowledge.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

/// The features of a named model.
#[derive(Debug, Clone, Default)]
pub(super) struct ModelFeatures {
    pub(super) vendor: Option<&'static str>,
    pub(super) features: BTreeSet<&'static str>,
    /// Features that newer QEMUs have removed from the model: whether a domain has them depends on the
    /// versions of libvirt and QEMU.
    pub(super) removed: BTreeSet<&'static str>,
}

const TABLE: &str = include_str!("x86_models.txt");

static MODELS: LazyLock<BTreeMap<&'static str, ModelFeatures>> = LazyLock::new(|| {
    let mut models: BTreeMap<&str, ModelFeatures> = BTreeMap::new();
    for line in TABLE.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(name), Some(vendor), Some(base)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let mut model = ModelFeatures {
            vendor: Some(vendor).filter(|vendor| *vendor != "-"),
            features: models
                .get(base)
                .map(|base| base.features.clone())
                .unwrap_or_default(),
            removed: BTreeSet::new(),
        };
        for word in words {
            let (sign, feature) = word.split_at(1);
            match sign {
                "+" => drop(model.features.insert(feature)),
                "-" => drop(model.features.remove(feature)),
                _ => drop(model.removed.insert(feature)),
            }
        }
        models.insert(name, model);
    }
    models
});

/// Returns the features of a model; `None` for a model that the table lacks.
pub(super) fn features_of(architecture: &str, model: &str) -> Option<&'static ModelFeatures> {
    MODELS
        .get(model)
        .filter(|_| matches!(architecture, "x86_64" | "i686"))
}

/// Features of the models in the table that libvirt 9.0 does not know. So are all that begin with `vmx-`.
const AFTER_LIBVIRT_9: [&str; 77] = [
    "ace2",
    "amd-psfd",
    "amx-avx512",
    "amx-bf16-alias",
    "amx-complex",
    "amx-complex-alias",
    "amx-fp16",
    "amx-fp16-alias",
    "amx-fp8",
    "amx-int8-alias",
    "amx-movrs",
    "amx-tf32",
    "apx-nci-ndd-nf",
    "apxf",
    "auto-ibrs",
    "avx-ifma",
    "avx-ne-convert",
    "avx-vnni-int16",
    "avx-vnni-int8",
    "avx10",
    "avx10-128",
    "avx10-256",
    "avx10-512",
    "avx10-vnni-int",
    "bhi-ctrl",
    "bhi-no",
    "cet-ibt",
    "cet-ss",
    "cmpccxadd",
    "ddpd-u",
    "fbsdp-no",
    "fdp-excptn-only",
    "flush-l1d",
    "fred",
    "fs-gs-base-ns",
    "fsrc",
    "fsrs",
    "fzrm",
    "gds-no",
    "ibpb-brtype",
    "intel-psfd",
    "ipred-ctrl",
    "its-no",
    "lam",
    "lfence-always-serializing",
    "lkgs",
    "mcdt-no",
    "movrs",
    "no-nested-data-bp",
    "null-sel-clr-base",
    "overflow-recov",
    "pbrsb-no",
    "perfmon-v2",
    "phe",
    "phe-en",
    "pmm",
    "pmm-en",
    "prefetchi",
    "prefetchiti",
    "psdp-no",
    "rfds-no",
    "rrsba-ctrl",
    "sbdr-ssdp-no",
    "sbpb",
    "sha512",
    "sm3",
    "sm4",
    "srso-user-kernel-no",
    "stibp-always-on",
    "succor",
    "vnmi",
    "wrmsrns",
    "xcrypt",
    "xcrypt-en",
    "xstore",
    "xstore-en",
    "zero-fcs-fds",
];

/// True for the name of a feature that every libvirt since 9.0 knows.
pub(super) fn is_established(feature: &str) -> bool {
    static ALL: LazyLock<BTreeSet<&'static str>> = LazyLock::new(|| {
        let features = MODELS
            .values()
            .flat_map(|m| m.features.iter().chain(&m.removed));
        let is_old = |name: &&str| !name.starts_with("vmx-") && !AFTER_LIBVIRT_9.contains(name);
        features.copied().filter(is_old).collect()
    });
    ALL.contains(feature)
}

/// True for a name with a version, such as `EPYC-v2`.
pub(super) fn is_versioned(name: &str) -> bool {
    let version = name.rsplit_once("-v").map(|(_, version)| version);
    version.is_some_and(|version| {
        !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// Returns the position of an s390x model in the order of generations; `None` for other models.
///
/// The names are those of QEMU (target/s390x/cpu_models.c); of one generation the larger machine counts as
/// newer. A `-base` model has the same features in
/// every QEMU, so libvirt's own baseline uses no other.
pub(super) fn s390x_generation(name: &str) -> Option<(usize, bool)> {
    const GENERATIONS: [&str; 33] = [
        "z900", "z900.2", "z900.3", "z800", "z990", "z990.2", "z990.3", "z890", "z990.4", "z890.2",
        "z990.5", "z890.3", "z9EC", "z9EC.2", "z9BC", "z9EC.3", "z9BC.2", "z10EC", "z10EC.2",
        "z10BC", "z10EC.3", "z10BC.2", "z196", "z196.2", "z114", "zEC12", "zEC12.2", "zBC12",
        "z13", "z13.2", "z13s", "z14", "z14.2",
    ];
    const LATER: [&str; 7] = [
        "z14ZR1", "gen15b", "gen15a", "gen16b", "gen16a", "gen17b", "gen17a",
    ];
    let (name, is_base) = match name.strip_suffix("-base") {
        Some(name) => (name, true),
        None => (name, false),
    };
    let mut all = GENERATIONS.iter().chain(&LATER);
    all.position(|generation| *generation == name)
        .map(|position| (position, is_base))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_table_is_a_model_with_features() {
        assert_eq!(MODELS.len(), TABLE.lines().count());
        assert!(MODELS.values().all(|model| model.features.contains("fpu")));
        let bases = TABLE.lines().filter_map(|line| line.split(' ').nth(2));
        assert!(
            bases
                .into_iter()
                .all(|base| base == "-" || MODELS.contains_key(base))
        );
    }

    #[test]
    fn features_accumulate_over_the_models_of_a_line() {
        let milan = features_of("x86_64", "EPYC-Milan").unwrap();
        assert_eq!(milan.vendor, Some("AMD"));
        assert!(milan.features.is_superset(&["avx2", "pku", "svm"].into()));
        assert!(!milan.features.contains("avx512f"));
        let skylake = features_of("x86_64", "Skylake-Client").unwrap();
        assert!(skylake.removed.contains("mpx") && !skylake.features.contains("mpx"));
        assert!(features_of("s390x", "EPYC").is_none());
    }

    #[test]
    fn newer_generations_of_s390x_come_later() {
        let order = [
            "z13-base",
            "z14-base",
            "gen15a-base",
            "gen16a-base",
            "gen17a-base",
        ];
        let positions = order.map(|name| s390x_generation(name).unwrap());
        assert!(positions.is_sorted());
        assert_eq!(s390x_generation("qemu"), None);
    }
}
