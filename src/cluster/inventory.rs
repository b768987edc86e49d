//! All nodes of a cluster, as far as it takes to choose one: names, labels, whether they take
//! pods, and their `NodeVirtualization`. Live by lists in pages, or from what `kubectl` prints.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::api::{Api, ListParams};
use serde::Deserialize;
use serde_json::Value;

use super::objects::{Condition, NodeVirtualization, NodeVirtualizationStatus};
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
pub struct NodeSeen {
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
    pub nodes: Vec<NodeSeen>,
    /// What is told of them beside labels, by name of the node.
    pub virtualizations: BTreeMap<String, NodeVirtualizationStatus>,
}

/// Objects, and where the next page begins.
type Page<T> = kube::Result<(Vec<T>, Option<String>)>;

impl Cluster {
    /// Every node with its labels.
    ///
    /// # Errors
    /// Any [`ClusterError`] but a conflict.
    pub async fn list_nodes(&self) -> Result<Vec<NodeSeen>, ClusterError> {
        let object = all("Nodes", "nodes");
        self.all_pages(object, async |proceed: Option<String>| {
            let mut uri = format!("/api/v1/nodes?limit={PAGE}");
            if let Some(proceed) = proceed {
                uri.push_str("&continue=");
                uri.push_str(&proceed); // base64 for URLs
            }
            let request = http::Request::get(uri).header(http::header::ACCEPT, AS_TABLE);
            let request = request.body(Vec::new()).map_err(kube::Error::HttpError)?;
            let table: Table = self.client.request(request).await?;
            let status = table.column("Status");
            let nodes = table.rows.into_iter().map(|row| row.into_node(status));
            Ok((nodes.collect(), table.metadata.proceed))
        })
        .await
    }

    /// What every node's daemon tells of it, by name of the node.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if the cluster does not know the kind; otherwise any.
    pub async fn list_virtualizations(
        &self,
    ) -> Result<BTreeMap<String, NodeVirtualizationStatus>, ClusterError> {
        let api = Api::<NodeVirtualization>::all(self.client.clone());
        let object = all("NodeVirtualizations", "nodevirtualizations.virtnode.io");
        let list = self.all_pages(object, async |proceed: Option<String>| {
            let mut parameters = ListParams::default().limit(PAGE);
            parameters.continue_token = proceed;
            let page = api.list(&parameters).await?;
            let named = |object: NodeVirtualization| {
                let name = object.metadata.name.unwrap_or_default();
                (name, object.spec.facts)
            };
            let items = page.items.into_iter().map(named).collect();
            Ok((items, page.metadata.continue_))
        });
        Ok(list.await?.into_iter().collect())
    }

    async fn all_pages<T>(
        &self,
        object: Object,
        page: impl AsyncFn(Option<String>) -> Page<T>,
    ) -> Result<Vec<T>, ClusterError> {
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
struct Table {
    #[serde(default)]
    metadata: ListMeta,
    column_definitions: Vec<Column>,
    #[serde(default)]
    rows: Vec<Row>,
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
struct Row {
    cells: Vec<Value>,
    object: Item,
}

impl Table {
    fn column(&self, name: &str) -> Option<usize> {
        let mut columns = self.column_definitions.iter();
        columns.position(|column| column.name == name)
    }
}

impl Row {
    /// The status is as in `Ready,SchedulingDisabled` (`printNode`, Kubernetes
    /// pkg/printers/internalversion/printers.go).
    fn into_node(self, status: Option<usize>) -> NodeSeen {
        let status = status.and_then(|at| self.cells.get(at)?.as_str());
        let has = |word: &str| status.is_some_and(|status| status.split(',').any(|w| w == word));
        NodeSeen {
            ready: status.map(|_| has("Ready")),
            cordoned: has("SchedulingDisabled"),
            name: self.object.metadata.name,
            labels: self.object.metadata.labels,
        }
    }
}

/// A Node, a NodeVirtualization, or a list of such.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Item {
    kind: String,
    metadata: Metadata,
    spec: NodeSpec,
    // No field of a Node's status has the name of one of these but `conditions`, which are of the
    // same shape.
    status: NodeVirtualizationStatus,
    items: Vec<Item>,
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

impl Inventory {
    /// What `kubectl get nodes -o json` prints, or `kubectl get nodes,nodevirtualizations -o json`.
    ///
    /// # Errors
    /// Text that is no JSON of that shape, with its place.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let mut inventory = Self::default();
        inventory.take(serde_json::from_slice(json)?);
        Ok(inventory)
    }

    fn take(&mut self, item: Item) {
        match item.kind.as_str() {
            "Node" => {
                let ready = Condition::find(&item.status.conditions, "Ready");
                self.nodes.push(NodeSeen {
                    ready: ready.map(|ready| ready.status == "True"),
                    cordoned: item.spec.unschedulable,
                    name: item.metadata.name,
                    labels: item.metadata.labels,
                });
            }
            "NodeVirtualization" => {
                let name = item.metadata.name;
                self.virtualizations.insert(name, item.status);
            }
            _ => item.items.into_iter().for_each(|item| self.take(item)),
        }
    }
}
