//! The accept loop: bounded in connections, and in the time a client may take to say what it
//! wants. `axum::serve` bounds neither.

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

/// For a request's head to arrive, and for an idle connection to send the next one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A request's head, and what is buffered of an answer.
const BUFFER_BYTES: usize = 16 * 1024;

/// For a client to read a last answer and close, and what it may go on to send meanwhile.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 1024 * 1024;

/// Listens. On every address means IPv6 and IPv4; on a machine without IPv6 it means IPv4.
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

/// Where connections come from.
pub(super) trait Listener: Send {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// What is known of who made it; a request's extension.
    type Peer: Clone + Send + Sync + 'static;

    /// The next one.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Peer)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send {
        Self::accept(self)
    }
}

/// What bounds clients beside the time for a request's head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Connections at a time; more wait in the kernel's queue.
    pub(super) connections: usize,
    /// No connection is older: a client that reads slowly does not keep its place for ever.
    pub(super) age: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 64,
            age: Duration::from_secs(300),
        }
    }
}

/// Serves for ever. Dropping the future closes every connection.
pub(super) async fn serve(listener: impl Listener, router: Router, bounds: Bounds) {
    let places = Arc::new(Semaphore::new(bounds.connections));
    let mut connections = JoinSet::new();
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, say: others will be given back.
                debug!(%error, "a connection was not accepted");
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
            let ended = timeout(bounds.age, connection).await;
            if let Ok(outcome) = ended {
                if let Err(error) = outcome {
                    debug!(%error, "a connection ended early");
                }
                let _late = timeout(LINGER, close(stream)).await;
            }
            drop(place);
        });
    }
}

/// Closes once the client has. A socket that is closed with bytes in it that nobody read is reset,
/// and a reset can overtake the answer: a request that is refused half-read would often end
/// without a word (RFC 9112, 9.6).
async fn close<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> io::Result<()> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut sink()).await?;
    Ok(())
}
