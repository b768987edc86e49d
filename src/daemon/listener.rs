//! The accept loop, which limits the number of connections, the time for a request's head and the
//! age of a connection. `axum::serve` limits none of them.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tower::ServiceExt;
use tracing::debug;

/// Timeout for a request's head, and for the next request on an idle connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
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

    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Peer)>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send {
        Self::accept(self)
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionLimits {
    /// Maximum number of concurrent connections. Further ones wait in the kernel's queue.
    pub(super) connections: usize,
    /// Maximum age of a connection, so that a client that reads slowly does not occupy one forever.
    pub(super) age: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 64,
            age: Duration::from_secs(300),
        }
    }
}

/// Serves forever. Dropping the future closes every connection.
pub(super) async fn serve(listener: impl Accept, router: Router, limits: ConnectionLimits) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES);
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, for example: closing connections free some.
                debug!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = router
            .clone()
            .map_request(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(peer.clone());
                request
            });
        let service = TowerToHyperService::new(service);
        let server = server.clone();
        connections.spawn(async move {
            let mut stream = stream;
            let connection = server.serve_connection(TokioIo::new(&mut stream), service);
            let served = timeout(limits.age, connection).await;
            if let Ok(outcome) = served {
                if let Err(error) = outcome {
                    debug!(%error, "connection failed");
                }
                let _late = timeout(LINGER, close(stream)).await;
            }
            drop(permit);
        });
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
