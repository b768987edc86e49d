//! Forwards the messages of one connection, in both directions, through the filter.
//!
//! A direction reads only after what it read before was written. So a connection holds at most one
//! request and what one read returned, and a slow peer slows down its own connection.

use std::io;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;

use super::filter::{Refusal, Replies, Requests};

/// Maximum number of bytes of one read.
const READ_BYTES: usize = 16 * 1024;
/// Timeout for a peer to accept any bytes.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// The end of a connection.
#[derive(Debug)]
pub(super) enum Ended {
    /// A peer closed it.
    Closed,
    /// This peer accepts no data.
    Stalled(&'static str),
    /// This peer sent a message that is not allowed.
    Refused(&'static str, Refusal),
}

/// Forwards messages until either side ends or is not allowed to go on.
pub(super) async fn relay(client: &UnixStream, daemon: &UnixStream, allow_changes: bool) -> Ended {
    let (mut requests, mut replies) = (Requests::new(allow_changes), Replies::new(allow_changes));
    let to_daemon = Direction {
        from: client,
        to: daemon,
        sides: ["client", "launcher"],
    };
    let to_client = Direction {
        from: daemon,
        to: client,
        sides: ["launcher", "client"],
    };
    tokio::select! {
        ended = to_daemon.forward(|input, passed| requests.push(input, passed)) => ended,
        ended = to_client.forward(|input, passed| replies.push(input, passed)) => ended,
    }
}

struct Direction<'s> {
    from: &'s UnixStream,
    to: &'s UnixStream,
    /// Names of both, for the log.
    sides: [&'static str; 2],
}

impl Direction<'_> {
    async fn forward(
        &self,
        mut filter: impl FnMut(&[u8], &mut Vec<u8>) -> Result<(), Refusal>,
    ) -> Ended {
        let [from, to] = self.sides;
        loop {
            if self.from.readable().await.is_err() {
                return Ended::Closed;
            }
            // Allocated for the bytes on their way, so that idle connections hold none.
            let mut passed = Vec::new();
            match self.read(&mut filter, &mut passed) {
                Ok(Some(())) => {}
                Ok(None) => return Ended::Closed,
                Err(refusal) => return Ended::Refused(from, refusal),
            }
            let mut rest = &passed[..];
            while !rest.is_empty() {
                match timeout(WRITE_TIMEOUT, self.write(rest)).await {
                    Ok(Ok(written)) => rest = &rest[written..],
                    Ok(Err(_)) => return Ended::Closed,
                    Err(_) => return Ended::Stalled(to),
                }
            }
        }
    }

    /// Reads what is there into `passed`, by way of the filter. `None` at the end.
    fn read(
        &self,
        filter: &mut impl FnMut(&[u8], &mut Vec<u8>) -> Result<(), Refusal>,
        passed: &mut Vec<u8>,
    ) -> Result<Option<()>, Refusal> {
        // On the stack of this call, not in the task.
        let mut buffer = [0; READ_BYTES];
        match self.from.try_read(&mut buffer) {
            Ok(0) => Ok(None),
            Ok(length) => filter(&buffer[..length], passed).map(Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(())),
            Err(_) => Ok(None),
        }
    }

    async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.to.writable().await?;
            match self.to.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
        }
    }
}
