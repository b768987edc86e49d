//! Client of the daemon's local API.

use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use axum::body::Bytes;
use axum::http::{Method, Request, StatusCode, header};
use futures::stream::{self, BoxStream, StreamExt};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{Exit, Failure};
use crate::daemon::api::{ApiProblem, ExternalChangeList, OperationList};
use crate::external::ExternalRecord;
use crate::operation::Record;

/// Maximum size of an answer. A thousand operations with all their evidence are smaller.
const ANSWER_MAX_BYTES: usize = 64 * 1024 * 1024;
/// Maximum size of one operation in a progress stream.
const LINE_MAX_BYTES: usize = 1024 * 1024;

/// An open connection to the daemon.
pub(super) struct ApiClient(SendRequest<Full<Bytes>>);

pub(super) enum DaemonLookup {
    Running(ApiClient),
    /// No daemon runs, for this reason.
    Absent(String),
}

impl ApiClient {
    /// Connects to the daemon, if one runs.
    pub(super) async fn find(socket: &Path) -> anyhow::Result<DaemonLookup> {
        let stream = match UnixStream::connect(socket).await {
            Ok(stream) => stream,
            Err(error) => {
                let socket = socket.display();
                return match error.kind() {
                    io::ErrorKind::NotFound => Ok(DaemonLookup::Absent(format!(
                        "the socket {socket} does not exist"
                    ))),
                    io::ErrorKind::ConnectionRefused => Ok(DaemonLookup::Absent(format!(
                        "no daemon answers at the socket {socket}"
                    ))),
                    io::ErrorKind::PermissionDenied => bail!(
                        "permission denied on the socket {socket}: use sudo, or a user of \
                         api.allowedUids or api.allowedGids in the daemon's configuration"
                    ),
                    _ => bail!("cannot connect to {socket}: {error}"),
                };
            }
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // The requests return the errors of the connection.
        tokio::spawn(async move { connection.await.ok() });
        Ok(DaemonLookup::Running(Self(sender)))
    }

    /// Connects to the daemon. The error says how to start one or do without.
    pub(super) async fn connect(socket: &Path) -> anyhow::Result<Self> {
        match Self::find(socket).await? {
            DaemonLookup::Running(client) => Ok(client),
            DaemonLookup::Absent(problem) => {
                bail!(
                    "{problem}: start the daemon (virtnode run), or use --direct to run without it"
                )
            }
        }
    }

    /// Submits an operation.
    pub(super) async fn submit(
        &mut self,
        path: &str,
        body: &serde_json::Value,
    ) -> anyhow::Result<Record> {
        let answer = self.send(Method::POST, path, body.to_string()).await?;
        read(answer).await
    }

    pub(super) async fn operations(&mut self) -> anyhow::Result<Vec<Record>> {
        let answer = self.send(Method::GET, "/v1/operations", String::new());
        let list: OperationList = read(answer.await?).await?;
        Ok(list.operations)
    }

    pub(super) async fn external_changes(&mut self) -> anyhow::Result<Vec<ExternalRecord>> {
        let answer = self.send(Method::GET, "/v1/external-changes", String::new());
        let list: ExternalChangeList = read(answer.await?).await?;
        Ok(list.changes)
    }

    /// Returns the states of an operation, as they change.
    pub(super) async fn follow(
        &mut self,
        record: &Record,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<Record>>> {
        let path = format!("/v1/operations/{}/progress", record.id);
        let body = self.send(Method::GET, &path, String::new()).await?;
        let lines = ProgressStream {
            body,
            unread: Vec::new(),
        };
        let states = stream::try_unfold(lines, async |mut lines| {
            let next = lines.next().await?;
            Ok(next.map(|record| (record, lines)))
        });
        Ok(states.boxed())
    }

    /// Sends a request and returns the body of the answer, or its error.
    async fn send(&mut self, method: Method, path: &str, body: String) -> anyhow::Result<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let lost =
            "the daemon closed the connection; an operation that was submitted is in its journal";
        self.0.ready().await.context(lost)?;
        let answer = self.0.send_request(request).await.context(lost)?;
        let (head, body) = answer.into_parts();
        if head.status.is_success() {
            return Ok(body);
        }
        let problem: ApiProblem = read(body).await?;
        let exit = match (head.status, problem.code.as_str()) {
            (StatusCode::BAD_REQUEST, _) => Exit::Usage,
            _ => Exit::Failed,
        };
        Err(Failure::new(exit, problem.message).into())
    }
}

async fn read<T: DeserializeOwned>(body: Incoming) -> anyhow::Result<T> {
    let bytes = Limited::new(body, ANSWER_MAX_BYTES).collect().await;
    let bytes =
        bytes.map_err(|error| anyhow::anyhow!("the daemon's answer is incomplete: {error}"))?;
    serde_json::from_slice(&bytes.to_bytes()).context("cannot parse the daemon's answer")
}

/// The body of a progress request: JSON lines, one for each state of an operation.
struct ProgressStream {
    body: Incoming,
    unread: Vec<u8>,
}

impl ProgressStream {
    /// Returns the next state, or `None` at the end.
    async fn next(&mut self) -> anyhow::Result<Option<Record>> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                let record = serde_json::from_slice(&line);
                return Ok(Some(record.context("cannot parse the daemon's operation")?));
            }
            if self.unread.len() > LINE_MAX_BYTES {
                bail!("the daemon's operation is larger than 1 MiB");
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame
                        .context("the daemon closed the connection; see virtnode operations")?;
                    if let Some(data) = frame.data_ref() {
                        self.unread.extend_from_slice(data);
                    }
                }
            }
        }
    }
}
