//! The subset of `kubectl kustomize` that `manifests/` uses. Unknown features are rejected, and so are
//! paths outside the directory, as in kustomize.
//!
//! Debian and Ubuntu have no common kubectl with a sufficiently new kustomize.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    resources: Vec<PathBuf>,
    #[serde(default)]
    patches: Vec<Patch>,
    #[serde(default)]
    config_map_generator: Vec<GeneratedMap>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    path: PathBuf,
    /// If present, the file is a list of operations (RFC 6902), otherwise a partial object.
    target: Option<Target>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Operation {
    op: String,
    path: String,
    value: Value,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GeneratedMap {
    name: String,
    namespace: String,
    files: Vec<String>,
    options: MapOptions,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MapOptions {
    disable_name_suffix_hash: bool,
    labels: BTreeMap<String, String>,
}

/// Returns the objects of a directory with a `kustomization.yaml`, in the order of its resources.
pub(crate) fn render(directory: &Path) -> anyhow::Result<Vec<Value>> {
    let text = fs::read_to_string(directory.join("kustomization.yaml"))
        .with_context(|| format!("no kustomization in {}", directory.display()))?;
    let kustomization: Kustomization =
        serde_saphyr::from_str(&text).with_context(|| directory.display().to_string())?;
    ensure!(kustomization.api_version == "kustomize.config.k8s.io/v1beta1");
    ensure!(kustomization.kind == "Kustomization");
    let mut objects = Vec::new();
    for resource in &kustomization.resources {
        let path = directory.join(resource).canonicalize();
        let path = path.with_context(|| format!("{} in {directory:?}", resource.display()))?;
        let own = directory.canonicalize()?;
        if path.is_dir() {
            ensure!(!own.starts_with(&path), "{path:?} contains {own:?}");
            objects.extend(render(&path)?);
        } else {
            ensure!(path.starts_with(&own), "{path:?} is not below {own:?}");
            objects.extend(documents(&path)?);
        }
    }
    for patch in &kustomization.patches {
        let path = directory.join(&patch.path);
        if let Some(target) = &patch.target {
            let is_target = |object: &&mut Value| {
                object["kind"] == target.kind && object["metadata"]["name"] == target.name
            };
            let object = objects.iter_mut().find(is_target);
            let object = object.with_context(|| format!("nothing to patch: {target:?}"))?;
            let operations: Vec<Operation> = serde_saphyr::from_str(&fs::read_to_string(&path)?)?;
            for operation in operations {
                ensure!(operation.op == "replace", "{operation:?}");
                let place = object.pointer_mut(&operation.path);
                *place.with_context(|| format!("no {}", operation.path))? = operation.value;
            }
            continue;
        }
        for patch in documents(&path)? {
            let object = objects.iter_mut().find(|object| same(object, &patch));
            merge(
                object.with_context(|| format!("nothing to patch: {patch}"))?,
                patch,
            );
        }
    }
    for map in &kustomization.config_map_generator {
        ensure!(map.options.disable_name_suffix_hash, "a name with a hash");
        let mut data = Map::new();
        for file in &map.files {
            let (key, path) = file.split_once('=').context("a file without a key")?;
            data.insert(key.into(), fs::read_to_string(directory.join(path))?.into());
        }
        objects.push(json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": data,
            "metadata": {"name": map.name, "namespace": map.namespace, "labels": map.options.labels},
        }));
    }
    Ok(objects)
}

/// Returns the only object of a kind.
pub(crate) fn only<'o>(objects: &'o [Value], kind: &str) -> anyhow::Result<&'o Value> {
    let mut of_kind = objects.iter().filter(|object| object["kind"] == kind);
    match (of_kind.next(), of_kind.next()) {
        (Some(object), None) => Ok(object),
        (found, _) => bail!(
            "{} of kind {kind}",
            if found.is_some() { "several" } else { "none" }
        ),
    }
}

fn documents(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    super::kube::documents(&text).with_context(|| path.display().to_string())
}

fn same(object: &Value, patch: &Value) -> bool {
    let of = |value: &Value, pointer| value.pointer(pointer).cloned();
    [
        "/apiVersion",
        "/kind",
        "/metadata/name",
        "/metadata/namespace",
    ]
    .iter()
    .all(|pointer| of(object, pointer) == of(patch, pointer))
}

/// Strategic merge: maps by key, `null` removes, lists of mounts by path and of other named items by
/// name (new items first, `$patch: delete` removes), other lists are replaced.
fn merge(into: &mut Value, patch: Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                match value {
                    Value::Null => drop(into.remove(&key)),
                    value => merge(into.entry(key).or_insert(Value::Null), value),
                }
            }
        }
        (Value::Array(into), Value::Array(patch)) if merge_key(into, &patch).is_some() => {
            let key = merge_key(into, &patch).unwrap_or_default();
            let mut added = 0;
            for value in patch {
                let at = into.iter().position(|old| old[key] == value[key]);
                match at {
                    Some(at) if value["$patch"] == "delete" => drop(into.remove(at)),
                    Some(at) => merge(&mut into[at], value),
                    None => {
                        into.insert(added, value);
                        added += 1;
                    }
                }
            }
        }
        (into, patch) => *into = patch,
    }
}

/// Returns the field that identifies the items of both lists.
fn merge_key(into: &[Value], patch: &[Value]) -> Option<&'static str> {
    let have = |key: &str| into.iter().chain(patch).all(|value| value[key].is_string());
    // Mounts have names too.
    ["mountPath", "name"].into_iter().find(|key| have(key))
}
