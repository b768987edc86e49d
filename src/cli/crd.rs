//! `virtnode crd`: the definitions of the custom resources, as `manifests/base/crds.yaml` holds them.

use anyhow::Context;

use super::Exit;
use super::output::print;
use crate::cluster::objects::definitions;

const HEAD: &str = "\
# Made by `virtnode crd`. An API server drops what it is too old to know: selectableFields before
# 1.31, x-kubernetes-validations before 1.25. kubectl wants --validate=false for such a server.
";

/// Prints every definition.
pub(super) fn run() -> anyhow::Result<Exit> {
    print(HEAD)?;
    for definition in definitions() {
        let yaml = serde_saphyr::to_string(&definition)
            .context("a definition cannot be written as YAML")?;
        print(&format!("---\n{yaml}"))?;
    }
    Ok(Exit::Done)
}
