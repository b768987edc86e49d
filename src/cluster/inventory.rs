//! All nodes of a cluster, as far as it takes to choose one: names, labels, whether they take
//! pods, and their `NodeVirtualization`. Live by lists in pages, or from what `kubectl` prints.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::Error as _;
use serde_json::value::RawValue;

use super::objects::NodeVirtualizationStatus;
use super::{Cluster, ClusterError, Object};

/// How many objects there are in a page.
const PAGE: u32 = 500;
/// No cluster has more pages than that; one that says so is not to be believed.
const MOST_PAGES: usize = 200;
/// The longest time for all pages of a list.
const WHOLE_LIST: Duration = Duration::from_secs(60);
/// Asks for what `kubectl get nodes` shows: a row with the status, and the metadata, which is a
/// small part of a Node.
const AS_TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io";

/// A node of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSummary {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether its kubelet says that it is ready; `None` if that is not told.
    pub ready: Option<bool>,
    /// Whether it takes no new pods.
    pub cordoned: bool,
}

/// What is known of all nodes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inventory {
    /// The nodes.
    pub nodes: Vec<NodeSummary>,
    /// What is told of them beside labels, by name of the node.
    pub virtualizations: Virtualizations,
}

/// What each node's `NodeVirtualization` says, by name of the node; or what is wrong with it.
pub type Virtualizations = BTreeMap<String, Result<NodeVirtualizationStatus, String>>;

/// Objects, and where the next page begins.
type Page<T> = (Vec<T>, Option<String>);

impl Cluster {
    /// Every node with its labels.
    ///
    /// # Errors
    /// Any [`ClusterError`] but a conflict.
    pub async fn list_nodes(&self) -> Result<Vec<NodeSummary>, ClusterError> {
        let object = all("Nodes", "nodes");
        let path = "/api/v1/nodes";
        self.all_pages(object, path, AS_TABLE, |text| {
            let table: Table<'_> = serde_json::from_str(text)?;
            let status = table.column("Status");
            let nodes = table.rows.into_iter().map(|row| row.into_node(status));
            Ok((nodes.collect(), table.metadata.proceed))
        })
        .await
    }

    /// What every node's daemon tells of it. One that cannot be read keeps nobody from the others.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if the cluster does not know the kind; otherwise any.
    pub async fn list_virtualizations(&self) -> Result<Virtualizations, ClusterError> {
        let object = all("NodeVirtualizations", "nodevirtualizations.virtnode.io");
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

    /// Every object of a list, page by page; `read` takes a page apart.
    async fn all_pages<T>(
        &self,
        object: Object,
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
            let request = http::Request::get(uri).header(http::header::ACCEPT, accept);
            let request = request.body(Vec::new()).map_err(kube::Error::HttpError)?;
            let text = self.client.request_text(request).await?;
            read(&text).map_err(kube::Error::SerdeError)
        };
        let list = async {
            let mut items = Vec::new();
            let mut proceed = None;
            for _ in 0..MOST_PAGES {
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
                message: format!("it does not end after {MOST_PAGES} pages of {PAGE}"),
                retry_after: None,
            })
        };
        match tokio::time::timeout(WHOLE_LIST, list).await {
            Ok(answer) => answer,
            Err(_) => Err(ClusterError::Timeout {
                verb: "list",
                object: object.clone(),
                after: WHOLE_LIST,
            }),
        }
    }
}

fn all(kind: &'static str, resource: &'static str) -> Object {
    Object {
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
    object: Head,
}

/// What of an object is metadata alone.
#[derive(Deserialize)]
struct Head {
    metadata: Metadata,
}

impl Table<'_> {
    fn column(&self, name: &str) -> Option<usize> {
        let mut columns = self.column_definitions.iter();
        columns.position(|column| column.name == name)
    }
}

impl Row<'_> {
    /// The status is as in `Ready,SchedulingDisabled`, with `NotReady` for a kubelet that says so or
    /// is not heard of, and `Unknown` for a Node of which that is not told (`printNode`, Kubernetes
    /// pkg/printers/internalversion/printers.go).
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

/// Objects of one kind.
#[derive(Deserialize)]
struct List<'t> {
    #[serde(default)]
    metadata: ListMeta,
    #[serde(default, borrow)]
    items: Vec<Item<'t>>,
}

/// A Node, a NodeVirtualization, or a list of such.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Item<'t> {
    kind: String,
    metadata: Metadata,
    spec: NodeSpec,
    /// Of a Node the images are most of it, of which nothing is wanted.
    #[serde(borrow)]
    status: Option<&'t RawValue>,
    #[serde(borrow)]
    items: Vec<Item<'t>>,
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

/// What is wanted of it: the times beside may be null.
#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

/// The facts of a NodeVirtualization.
fn read(status: Option<&RawValue>) -> Result<NodeVirtualizationStatus, String> {
    let text = status.map_or("{}", RawValue::get);
    serde_json::from_str(text).map_err(|error| error.to_string())
}

impl Inventory {
    /// What `kubectl get nodes -o json` prints, or `kubectl get nodes,nodevirtualizations -o json`,
    /// or one after the other, or the API server's own lists.
    ///
    /// # Errors
    /// Text that is no JSON of that shape, with its place. A NodeVirtualization of another shape
    /// is none: see [`Inventory::virtualizations`].
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let mut inventory = Self::default();
        for item in serde_json::Deserializer::from_slice(json).into_iter() {
            inventory.take(item?, "")?;
        }
        Ok(inventory)
    }

    /// The objects of the API server's own lists do not say their kind; the list does.
    fn take(&mut self, item: Item<'_>, of_list: &str) -> Result<(), serde_json::Error> {
        let kind = match item.kind.as_str() {
            "" => of_list,
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
                let of_list = list.strip_suffix("List").unwrap_or_default().to_owned();
                for item in item.items {
                    self.take(item, &of_list)?;
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
    const TOLD: &str = r#"{"kind": "NodeVirtualization", "metadata": {"name": "a"},
        "status": {"architecture": "x86_64", "ofTomorrow": [1]}}"#;

    #[rstest]
    #[case("both in one list", format!(r#"{{"kind": "List", "items": [{NODE}, {TOLD}]}}"#))]
    #[case("one after the other", format!("{NODE}\n{TOLD}\n"))]
    #[case(
        "the API server's own lists",
        format!(
            r#"{{"kind": "NodeList", "items": [{}]}} {{"kind": "NodeVirtualizationList", "items": [{}]}}"#,
            NODE.replace(r#""kind": "Node","#, ""),
            TOLD.replace(r#""kind": "NodeVirtualization","#, "")
        )
    )]
    fn every_way_to_print_nodes_is_read(#[case] _how: &str, #[case] text: String) {
        let inventory = Inventory::parse(text.as_bytes()).unwrap();
        let node = NodeSummary {
            name: "a".to_owned(),
            labels: [("x".to_owned(), "1".to_owned())].into(),
            ready: Some(false),
            cordoned: true,
        };
        assert_eq!(inventory.nodes, [node]);
        let told = inventory.virtualizations["a"].as_ref().unwrap();
        assert_eq!(told.architecture.as_deref(), Some("x86_64"));
    }

    #[rstest]
    #[case(r#"{"architecture": 3}"#)]
    #[case(r#"{"guests": {}}"#)]
    #[case("[1]")]
    fn an_object_of_another_shape_keeps_nobody_from_the_others(#[case] status: &str) {
        let bad = format!(
            r#"{{"kind": "NodeVirtualization", "metadata": {{"name": "b"}}, "status": {status}}}"#
        );
        let inventory = Inventory::parse(format!("{NODE}{bad}{TOLD}").as_bytes()).unwrap();
        assert!(inventory.virtualizations["b"].is_err());
        assert!(inventory.virtualizations["a"].is_ok());
        assert_eq!(inventory.nodes.len(), 1);
    }

    #[rstest]
    #[case(r#"{"kind": "Node", "metadata": {}}"#, "a Node has no metadata.name")]
    #[case(
        r#"{"kind": "Node", "metadata": {"labels": {"x": 1}}}"#,
        "invalid type: integer `1`, expected a string at line 1 column 47"
    )]
    #[case(r#"{"kind": "List", "items": [{"kind": "Node""#, "EOF while parsing")]
    #[case("NAME   STATUS\na      Ready", "expected value at line 1 column 1")]
    fn text_of_another_shape_is_refused_with_its_place(#[case] text: &str, #[case] problem: &str) {
        let error = Inventory::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }

    #[rstest]
    #[case("Ready", Some(true), false)]
    #[case("NotReady", Some(false), false)]
    #[case("Ready,SchedulingDisabled", Some(true), true)]
    #[case("NotReady,SchedulingDisabled", Some(false), true)]
    #[case("Unknown", None, false)]
    fn the_servers_table_says_what_kubectl_shows(
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
