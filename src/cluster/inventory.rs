//! The nodes of a cluster with everything needed to choose one: name, labels, readiness, and
//! `NodeVirtualization`. Read from the API server page by page, or from the output of `kubectl`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::Error as _;
use serde_json::value::RawValue;

use super::answer::AnswerMax;
use super::objects::NodeVirtualizationStatus;
use super::{ApiObject, Cluster, ClusterError};

/// Objects in a page, as `kubectl` requests them.
const PAGE: u32 = 500;
/// Maximum pages of a list: 20 times the nodes of the largest supported cluster.
const PAGES_MAX: usize = 200;
/// Maximum bytes of a page: a NodeVirtualization has at most 64 KiB, and annotations.
const PAGE_MAX_BYTES: usize = 64 << 20;
/// Timeout for all pages of a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// Requests the table of `kubectl get nodes`: the status column, and the metadata, which is a small
/// part of a Node.
const AS_TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io";

/// A node of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSummary {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// The kubelet's Ready condition; `None` if unknown.
    pub ready: Option<bool>,
    /// True if the scheduler places no new pods on it.
    pub cordoned: bool,
}

/// The nodes of a cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeInventory {
    pub nodes: Vec<NodeSummary>,
    pub virtualizations: Virtualizations,
    /// Errors about items of lists that were skipped.
    pub skipped: Vec<String>,
}

/// The status of each `NodeVirtualization` by name of the node, or the error if it cannot be parsed.
pub type Virtualizations = BTreeMap<String, Result<NodeVirtualizationStatus, String>>;

/// Objects, and the token of the next page.
type Page<T> = (Vec<T>, Option<String>);

impl Cluster {
    /// Lists every node with its labels.
    ///
    /// # Errors
    /// Any [`ClusterError`] but a conflict.
    pub async fn list_nodes(&self) -> Result<Vec<NodeSummary>, ClusterError> {
        let object = all_of("Nodes", "nodes");
        let path = "/api/v1/nodes";
        self.all_pages(object, path, AS_TABLE, |text| {
            let table: Table<'_> = serde_json::from_str(text)?;
            let status = table.column("Status");
            let nodes = table.rows.into_iter().map(|row| row.into_node(status));
            Ok((nodes.collect(), table.metadata.proceed))
        })
        .await
    }

    /// Lists every `NodeVirtualization`. One that cannot be parsed does not affect the others.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if the cluster has no definition of the kind; otherwise any.
    pub async fn list_virtualizations(&self) -> Result<Virtualizations, ClusterError> {
        let object = all_of("NodeVirtualizations", "nodevirtualizations.virtnode.io");
        let path = "/apis/virtnode.io/v1alpha1/nodevirtualizations";
        let list = self.all_pages(object, path, "application/json", |text| {
            let list: List<'_> = serde_json::from_str(text)?;
            let read = |item: Item<'_>| (item.metadata.name, read(item.status));
            Ok((
                list.items.into_iter().map(read).collect(),
                list.metadata.proceed,
            ))
        });
        Ok(list.await?.into_iter().collect())
    }

    /// Lists all objects, page by page. `read` parses a page.
    async fn all_pages<T>(
        &self,
        object: ApiObject,
        path: &str,
        accept: &'static str,
        read: impl Fn(&str) -> serde_json::Result<Page<T>>,
    ) -> Result<Vec<T>, ClusterError> {
        let page = async |proceed: Option<String>| {
            let mut uri = format!("{path}?limit={PAGE}");
            if let Some(proceed) = proceed {
                uri.push_str("&continue=");
                uri.push_str(&proceed); // base64 for URLs
            }
            let request = http::Request::get(uri)
                .header(http::header::ACCEPT, accept)
                .extension(AnswerMax(PAGE_MAX_BYTES));
            let request = request.body(Vec::new()).map_err(kube::Error::HttpError)?;
            let text = self.client.request_text(request).await?;
            read(&text).map_err(kube::Error::SerdeError)
        };
        let list = async {
            let mut items = Vec::new();
            let mut proceed = None;
            for _ in 0..PAGES_MAX {
                let answer = self.call_about(object.clone(), "list", page(proceed.take()));
                let (more, next) = answer.await?;
                items.extend(more);
                proceed = next.filter(|next| !next.is_empty());
                if proceed.is_none() {
                    return Ok(items);
                }
            }
            Err(ClusterError::Rejected {
                verb: "list",
                object: object.clone(),
                message: format!("the list has more than {PAGES_MAX} pages of {PAGE}"),
                retry_after: None,
            })
        };
        match tokio::time::timeout(LIST_TIMEOUT, list).await {
            Ok(answer) => answer,
            Err(_) => Err(ClusterError::Timeout {
                verb: "list",
                object: object.clone(),
                after: LIST_TIMEOUT,
            }),
        }
    }
}

fn all_of(kind: &'static str, resource: &'static str) -> ApiObject {
    ApiObject {
        kind,
        resource,
        name: "of the cluster".to_owned(),
    }
}

/// `meta.k8s.io/v1 Table`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Table<'t> {
    #[serde(default)]
    metadata: ListMeta,
    column_definitions: Vec<Column>,
    #[serde(default, borrow)]
    rows: Vec<Row<'t>>,
}

#[derive(Default, Deserialize)]
struct ListMeta {
    #[serde(rename = "continue")]
    proceed: Option<String>,
}

#[derive(Deserialize)]
struct Column {
    name: String,
}

#[derive(Deserialize)]
struct Row<'t> {
    #[serde(borrow)]
    cells: Vec<&'t RawValue>,
    object: RowObject,
}

#[derive(Deserialize)]
struct RowObject {
    metadata: Metadata,
}

impl Table<'_> {
    fn column(&self, name: &str) -> Option<usize> {
        let mut columns = self.column_definitions.iter();
        columns.position(|column| column.name == name)
    }
}

impl Row<'_> {
    /// Parses the status column, such as `Ready,SchedulingDisabled`. `NotReady` includes a kubelet
    /// that has stopped reporting; `Unknown` is a Node without a Ready condition (`printNode`,
    /// Kubernetes pkg/printers/internalversion/printers.go).
    fn into_node(self, status: Option<usize>) -> NodeSummary {
        let status: Option<String> =
            status.and_then(|at| serde_json::from_str(self.cells.get(at)?.get()).ok());
        let has = |word: &str| {
            let words = status.as_deref().unwrap_or_default().split(',');
            words.into_iter().any(|have| have == word)
        };
        NodeSummary {
            ready: match (has("Ready"), has("NotReady")) {
                (false, false) => None,
                (ready, _) => Some(ready),
            },
            cordoned: has("SchedulingDisabled"),
            name: self.object.metadata.name,
            labels: self.object.metadata.labels,
        }
    }
}

#[derive(Deserialize)]
struct List<'t> {
    #[serde(default)]
    metadata: ListMeta,
    #[serde(default, borrow)]
    items: Vec<Item<'t>>,
}

/// A Node, a NodeVirtualization, or a list of them.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Item<'t> {
    kind: String,
    metadata: Metadata,
    spec: NodeSpec,
    /// Parsed later: most of a Node's status is its list of images.
    #[serde(borrow)]
    status: Option<&'t RawValue>,
    #[serde(borrow)]
    items: Vec<Item<'t>>,
}

/// A list whose items are parsed one by one.
#[derive(Default, Deserialize)]
#[serde(default)]
struct LooseList<'t> {
    kind: String,
    #[serde(borrow)]
    items: Option<Vec<&'t RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: String,
    labels: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeSpec {
    unschedulable: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeStatus {
    conditions: Vec<NodeCondition>,
}

/// Without the times, which may be null.
#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

/// Parses the status of a NodeVirtualization.
fn read(status: Option<&RawValue>) -> Result<NodeVirtualizationStatus, String> {
    let text = status.map_or("{}", RawValue::get);
    serde_json::from_str(text).map_err(|error| error.to_string())
}

impl NodeInventory {
    /// Parses the output of `kubectl get nodes -o json`, of `kubectl get nodes,nodevirtualizations -o
    /// json`, of both in sequence, or the API server's own lists.
    ///
    /// # Errors
    /// Text that is not JSON of this shape, with the position. A malformed item of a list is not an
    /// error: see [`NodeInventory::skipped`]; nor is a malformed status of a NodeVirtualization.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        // Almost every list is well-formed, and parsing it item by item takes one pass more.
        Self::parse_strictly(json).or_else(|_| Self::parse_item_by_item(json))
    }

    fn parse_strictly(json: &[u8]) -> Result<Self, serde_json::Error> {
        let mut inventory = Self::default();
        for item in serde_json::Deserializer::from_slice(json).into_iter() {
            inventory.add(item?, "")?;
        }
        Ok(inventory)
    }

    /// Parses text with a malformed item: other items of its list are not affected.
    fn parse_item_by_item(json: &[u8]) -> Result<Self, serde_json::Error> {
        let mut inventory = Self::default();
        for text in serde_json::Deserializer::from_slice(json).into_iter::<&RawValue>() {
            let text = text?.get();
            match serde_json::from_str::<LooseList<'_>>(text) {
                Ok(LooseList {
                    kind,
                    items: Some(items),
                }) => inventory.add_each(&kind, &items),
                _ => inventory.add(serde_json::from_str(text)?, "")?,
            }
        }
        Ok(inventory)
    }

    fn add_each(&mut self, list: &str, items: &[&RawValue]) {
        let kind = list.strip_suffix("List").unwrap_or_default();
        for (number, text) in items.iter().enumerate() {
            let added =
                serde_json::from_str::<Item<'_>>(text.get()).and_then(|item| self.add(item, kind));
            if let Err(error) = added {
                self.skipped
                    .push(format!("item {number} of the list: {error}"));
            }
        }
    }

    /// Objects in the API server's own lists have no kind; `list_kind` is the kind of the list.
    fn add(&mut self, item: Item<'_>, list_kind: &str) -> Result<(), serde_json::Error> {
        let kind = match item.kind.as_str() {
            "" => list_kind,
            kind => kind,
        };
        match kind {
            "Node" | "NodeVirtualization" if item.metadata.name.is_empty() => {
                let problem = format!("a {kind} has no metadata.name");
                return Err(serde_json::Error::custom(problem));
            }
            "Node" => {
                let text = item.status.map_or("{}", RawValue::get);
                let status: NodeStatus = serde_json::from_str(text)?;
                let mut conditions = status.conditions.iter();
                let ready = conditions.find(|condition| condition.kind == "Ready");
                self.nodes.push(NodeSummary {
                    ready: ready.map(|ready| ready.status == "True"),
                    cordoned: item.spec.unschedulable,
                    name: item.metadata.name,
                    labels: item.metadata.labels,
                });
            }
            "NodeVirtualization" => {
                let facts = read(item.status);
                self.virtualizations.insert(item.metadata.name, facts);
            }
            list => {
                let kind = list.strip_suffix("List").unwrap_or_default().to_owned();
                for item in item.items {
                    self.add(item, &kind)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const NODE: &str = r#"{"kind": "Node", "metadata": {"name": "a", "labels": {"x": "1"}},
        "spec": {"unschedulable": true, "podCIDR": "10.0.0.0/24"},
        "status": {"conditions": [{"type": "Ready", "status": "Unknown", "lastHeartbeatTime": null}],
            "images": [{}]}}"#;
    const VIRTUALIZATION: &str = r#"{"kind": "NodeVirtualization", "metadata": {"name": "a"},
        "status": {"architecture": "x86_64", "ofTomorrow": [1]}}"#;

    #[rstest]
    #[case("both in one list", format!(r#"{{"kind": "List", "items": [{NODE}, {VIRTUALIZATION}]}}"#))]
    #[case("one after the other", format!("{NODE}\n{VIRTUALIZATION}\n"))]
    #[case(
        "the API server's own lists",
        format!(
            r#"{{"kind": "NodeList", "items": [{}]}} {{"kind": "NodeVirtualizationList", "items": [{}]}}"#,
            NODE.replace(r#""kind": "Node","#, ""),
            VIRTUALIZATION.replace(r#""kind": "NodeVirtualization","#, "")
        )
    )]
    fn every_output_format_is_parsed(#[case] _how: &str, #[case] text: String) {
        let inventory = NodeInventory::parse(text.as_bytes()).unwrap();
        let node = NodeSummary {
            name: "a".to_owned(),
            labels: [("x".to_owned(), "1".to_owned())].into(),
            ready: Some(false),
            cordoned: true,
        };
        assert_eq!(inventory.nodes, [node]);
        let status = inventory.virtualizations["a"].as_ref().unwrap();
        assert_eq!(status.architecture.as_deref(), Some("x86_64"));
    }

    #[rstest]
    #[case(r#"{"architecture": 3}"#)]
    #[case(r#"{"guests": {}}"#)]
    #[case("[1]")]
    fn malformed_virtualization_does_not_affect_others(#[case] status: &str) {
        let bad = format!(
            r#"{{"kind": "NodeVirtualization", "metadata": {{"name": "b"}}, "status": {status}}}"#
        );
        let inventory =
            NodeInventory::parse(format!("{NODE}{bad}{VIRTUALIZATION}").as_bytes()).unwrap();
        assert!(inventory.virtualizations["b"].is_err());
        assert!(inventory.virtualizations["a"].is_ok());
        assert_eq!(inventory.nodes.len(), 1);
    }

    #[test]
    fn malformed_items_of_a_list_are_skipped_and_counted() {
        let list = format!(
            r#"{{"kind": "List", "items": [{{"kind": "Node", "metadata": {{}}}}, {NODE},
               {{"kind": "Node", "metadata": {{"labels": {{"x": 1}}}}}}, 7, {VIRTUALIZATION}]}}"#
        );
        let inventory = NodeInventory::parse(list.as_bytes()).unwrap();
        assert_eq!(inventory.nodes.len(), 1);
        assert!(inventory.virtualizations["a"].is_ok());
        let skipped: Vec<&str> = inventory.skipped.iter().map(|it| &it[..19]).collect();
        assert_eq!(
            skipped,
            [
                "item 0 of the list:",
                "item 2 of the list:",
                "item 3 of the list:"
            ]
        );
    }

    #[rstest]
    #[case(r#"{"kind": "Node", "metadata": {}}"#, "a Node has no metadata.name")]
    #[case(
        r#"{"kind": "Node", "metadata": {"labels": {"x": 1}}}"#,
        "invalid type: integer `1`, expected a string at line 1 column 47"
    )]
    #[case(r#"{"kind": "List", "items": [{"kind": "Node""#, "EOF while parsing")]
    #[case("NAME   STATUS\na      Ready", "expected value at line 1 column 1")]
    fn malformed_text_is_rejected_with_its_position(#[case] text: &str, #[case] problem: &str) {
        let error = NodeInventory::parse(text.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains(problem), "{error}");
    }

    #[rstest]
    #[case("Ready", Some(true), false)]
    #[case("NotReady", Some(false), false)]
    #[case("Ready,SchedulingDisabled", Some(true), true)]
    #[case("NotReady,SchedulingDisabled", Some(false), true)]
    #[case("Unknown", None, false)]
    fn status_column_yields_readiness(
        #[case] status: &str,
        #[case] ready: Option<bool>,
        #[case] cordoned: bool,
    ) {
        let text = format!(
            r#"{{"columnDefinitions": [{{"name": "Name"}}, {{"name": "Status"}}],
               "rows": [{{"cells": ["a", "{status}"], "object": {{"metadata": {{"name": "a"}}}}}}]}}"#
        );
        let table: Table<'_> = serde_json::from_str(&text).unwrap();
        let column = table.column("Status");
        let node = table.rows.into_iter().next().unwrap().into_node(column);
        assert_eq!((node.ready, node.cordoned), (ready, cordoned));
    }
}
