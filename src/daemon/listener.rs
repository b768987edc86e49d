//! The accept loop, which limits the number of connections, the time for a request's head, the time
//! for which a client reads nothing, and the age of a connection. `axum::serve` limits none of them.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tower::ServiceExt;
use tracing::debug;

use super::stream::WriteTimeout;

/// Timeout for a request's head, and for the next request on an idle connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for a client to accept at least one byte of an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of a request's head, and of an answer's buffer.
const BUFFER_BYTES: usize = 16 * 1024;

/// Timeout for a client to read the last answer and close, and maximum number of bytes that it may
/// send meanwhile.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 1024 * 1024;

/// Binds the address. The unspecified IPv6 address accepts IPv4 as well, and falls back to it on a
/// machine without IPv6.
pub(super) async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error)
            if address.ip().is_unspecified()
                && address.is_ipv6()
                && error.kind() != io::ErrorKind::AddrInUse =>
        {
            TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port())).await
        }
        outcome => outcome,
    }
}

/// A source of connections.
pub(super) trait Accept: Send {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// Identity of the client, added to each request as an extension.
    type Peer: Clone + Send + Sync + 'static;

    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Stream, Self::Peer)>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    fn accept(&mut self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send {
        Self::accept(self)
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionLimits {
    /// Maximum number of concurrent connections.
    pub(super) connections: usize,
    pub(super) when_full: WhenFull,
    /// True if a connection serves more than one request. Otherwise a client cannot occupy the event
    /// loop with requests in advance whose answers it does not read.
    pub(super) keep_alive: bool,
    /// Maximum age of a connection, so that a client that reads slowly does not occupy one forever.
    pub(super) age: Duration,
}

/// Treatment of a new connection when there are as many as allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WhenFull {
    /// It waits in the kernel's queue.
    Wait,
    /// It replaces the connection that has been without a new request for the longest time. So
    /// clients that read or write slowly keep no other client out.
    ReplaceOldest,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 64,
            when_full: WhenFull::ReplaceOldest,
            keep_alive: false,
            age: Duration::from_secs(300),
        }
    }
}

/// The open connections.
#[derive(Default)]
struct OpenConnections {
    tasks: JoinSet<()>,
    open: HashMap<Id, OpenConnection>,
    clock: Arc<RequestClock>,
}

struct OpenConnection {
    task: AbortHandle,
    last_request: Arc<AtomicU64>,
}

/// Counts requests and new connections of all clients, for their order.
#[derive(Default)]
struct RequestClock(AtomicU64);

impl RequestClock {
    fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

impl OpenConnections {
    fn remove_ended(&mut self) {
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            self.ended(ended);
        }
    }

    fn ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
        self.open.remove(&id);
    }

    async fn wait_for_place(&mut self, limit: usize) {
        while self.open.len() >= limit {
            match self.tasks.join_next_with_id().await {
                Some(ended) => self.ended(ended),
                None => return,
            }
        }
    }

    fn make_room(&mut self, limit: usize) {
        while self.open.len() >= limit {
            let last_request =
                |(_, open): &(&Id, &OpenConnection)| open.last_request.load(Ordering::Relaxed);
            let Some(oldest) = self.open.iter().min_by_key(last_request) else {
                return;
            };
            let id = *oldest.0;
            if let Some(oldest) = self.open.remove(&id) {
                oldest.task.abort();
            }
        }
    }
}

/// Serves forever. Dropping the future closes every connection.
pub(super) async fn serve(mut listener: impl Accept, router: Router, limits: ConnectionLimits) {
    let mut connections = OpenConnections::default();
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        // Its formatter panics before 1970, and no client needs it.
        .auto_date_header(false)
        .keep_alive(limits.keep_alive)
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES);
    loop {
        if limits.when_full == WhenFull::Wait {
            connections.wait_for_place(limits.connections).await;
        }
        let accepted = listener.accept().await;
        connections.remove_ended();
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, for example: closing connections free some.
                debug!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        connections.make_room(limits.connections);
        let clock = Arc::clone(&connections.clock);
        let last_request = Arc::new(AtomicU64::new(clock.tick()));
        let requested = Arc::clone(&last_request);
        let service = router
            .clone()
            .map_request(move |mut request: Request<Incoming>| {
                requested.store(clock.tick(), Ordering::Relaxed);
                request.extensions_mut().insert(peer.clone());
                request
            });
        let service = TowerToHyperService::new(service);
        let server = server.clone();
        let task = connections.tasks.spawn(async move {
            let mut stream = WriteTimeout::new(stream, WRITE_TIMEOUT);
            let connection = server.serve_connection(TokioIo::new(&mut stream), service);
            let served = timeout(limits.age, connection).await;
            if let Ok(outcome) = served {
                if let Err(error) = outcome {
                    debug!(%error, "connection failed");
                }
                let _late = timeout(LINGER, close(stream)).await;
            }
        });
        let open = OpenConnection { task, last_request };
        connections.open.insert(open.task.id(), open);
    }
}

/// Closes the connection after the client does. The kernel resets a connection that is closed with
/// unread bytes, and the reset can overtake the answer, so that the client of a rejected request
/// would not see why (RFC 9112, section 9.6).
async fn close<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> io::Result<()> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut sink()).await?;
    Ok(())
}
