//! The client of the daemon's local API.

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
use crate::daemon::api::{OperationList, Problem};
use crate::operation::Record;

/// No answer is larger: a thousand records with all their evidence are less.
const ANSWER_MAX_BYTES: usize = 64 * 1024 * 1024;
/// No record is larger.
const LINE_MAX_BYTES: usize = 1024 * 1024;

/// A connection to the daemon.
pub(super) struct Local(SendRequest<Full<Bytes>>);

/// Whether a daemon answers there.
pub(super) enum Found {
    /// One does.
    Daemon(Local),
    /// None does, for this reason.
    Nobody(String),
}

impl Local {
    /// Connects, if somebody is there.
    pub(super) async fn find(socket: &Path) -> anyhow::Result<Found> {
        let stream = match UnixStream::connect(socket).await {
            Ok(stream) => stream,
            Err(error) => {
                let problem = match error.kind() {
                    io::ErrorKind::NotFound => "there is no socket",
                    io::ErrorKind::ConnectionRefused => "nobody answers at the socket",
                    io::ErrorKind::PermissionDenied => bail!(
                        "the socket {} may not be opened: use sudo, or a user of api.allowedUids \
                         or api.allowedGids in the daemon's configuration",
                        socket.display()
                    ),
                    _ => bail!("cannot connect to {}: {error}", socket.display()),
                };
                return Ok(Found::Nobody(format!("{problem} {}", socket.display())));
            }
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its errors come back from the requests as well.
        tokio::spawn(async move { connection.await.ok() });
        Ok(Found::Daemon(Self(sender)))
    }

    /// Connects, or says what to do.
    pub(super) async fn connect(socket: &Path) -> anyhow::Result<Self> {
        match Self::find(socket).await? {
            Found::Daemon(local) => Ok(local),
            Found::Nobody(problem) => bail!(
                "{problem}: start the daemon (virtnode run), or use --direct to do without it"
            ),
        }
    }

    /// Asks for an operation.
    pub(super) async fn submit(
        &mut self,
        path: &str,
        body: &serde_json::Value,
    ) -> anyhow::Result<Record> {
        let answer = self.send(Method::POST, path, body.to_string()).await?;
        read(answer).await
    }

    /// The operations that the daemon knows.
    pub(super) async fn operations(&mut self) -> anyhow::Result<Vec<Record>> {
        let answer = self.send(Method::GET, "/v1/operations", String::new());
        let list: OperationList = read(answer.await?).await?;
        Ok(list.operations)
    }

    /// Follows an operation.
    pub(super) async fn follow(&mut self, record: &Record) -> anyhow::Result<Progress> {
        let path = format!("/v1/operations/{}/progress", record.id);
        let body = self.send(Method::GET, &path, String::new()).await?;
        Ok(Progress {
            body,
            rest: Vec::new(),
        })
    }

    /// The body of a good answer; an error if it is none.
    async fn send(&mut self, method: Method, path: &str, body: String) -> anyhow::Result<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let lost = "the daemon went away; the operation, if it was begun, is in its journal";
        self.0.ready().await.context(lost)?;
        let answer = self.0.send_request(request).await.context(lost)?;
        let (head, body) = answer.into_parts();
        if head.status.is_success() {
            return Ok(body);
        }
        let problem: Problem = read(body).await?;
        let exit = match (head.status, problem.code.as_str()) {
            (StatusCode::BAD_REQUEST, _) => Exit::Usage,
            _ => Exit::Failed,
        };
        Err(Failure::new(exit, problem.message).into())
    }
}

async fn read<T: DeserializeOwned>(body: Incoming) -> anyhow::Result<T> {
    let bytes = Limited::new(body, ANSWER_MAX_BYTES).collect().await;
    let bytes = bytes.map_err(|error| anyhow::anyhow!("the daemon's answer broke off: {error}"))?;
    serde_json::from_slice(&bytes.to_bytes()).context("the daemon's answer is not understood")
}

/// An operation's states as they come.
pub(super) struct Progress {
    body: Incoming,
    rest: Vec<u8>,
}

impl Progress {
    /// As a stream.
    pub(super) fn states(self) -> BoxStream<'static, anyhow::Result<Record>> {
        stream::try_unfold(self, async |mut progress| {
            let next = progress.next().await?;
            Ok(next.map(|record| (record, progress)))
        })
        .boxed()
    }

    /// The next one; `None` when there are no more.
    async fn next(&mut self) -> anyhow::Result<Option<Record>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let record = serde_json::from_slice(&line);
                return Ok(Some(
                    record.context("the daemon's record is not understood")?,
                ));
            }
            if self.rest.len() > LINE_MAX_BYTES {
                bail!("the daemon's record is longer than there can be");
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.context("the daemon went away; see virtnode operations")?;
                    if let Some(data) = frame.data_ref() {
                        self.rest.extend_from_slice(data);
                    }
                }
            }
        }
    }
}
