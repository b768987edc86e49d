//! The first messages on a launcher's socket, without libvirt's client library.
//!
//! `virConnectOpen` waits for a daemon that does not answer forever, on a thread that cannot be
//! cancelled. So a launcher is first asked for its ways of authentication, the first question of
//! every client, which costs no thread: only a daemon that answers is given one.
//!
//! A message is a length, then the numbers of program, version, procedure, type, serial and status, in
//! four bytes each, then the body (libvirt: virnetprotocol.x). At most [`MAX_REPLY`] bytes are read.

use std::io::{self, ErrorKind};

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Size of a header, with the length.
const HEADER: usize = 28;
const HEADER_LENGTH: u32 = 28;
/// Maximum size of the reply: a list has at most 20 ways of authentication
/// (`REMOTE_AUTH_TYPE_LIST_MAX`).
const MAX_REPLY: usize = HEADER + 4 + 20 * 4;

/// `REMOTE_PROGRAM` and `REMOTE_PROTOCOL_VERSION` (libvirt: remote_protocol.x).
const PROGRAM: u32 = 0x2000_8086;
const VERSION: u32 = 1;
/// `REMOTE_PROC_AUTH_LIST` and `REMOTE_PROC_CONNECT_CLOSE`.
const AUTH_LIST: u32 = 66;
const CONNECT_CLOSE: u32 = 2;
/// `VIR_NET_CALL` and `VIR_NET_REPLY`.
const CALL: u32 = 0;
const REPLY: u32 = 1;
/// `VIR_NET_OK`.
const OK: u32 = 0;
/// `REMOTE_AUTH_NONE`.
const NO_AUTHENTICATION: u32 = 0;

/// Reason for a launcher's libvirt having no connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OpenError {
    /// File mode, authentication or the daemon itself refuses this client.
    #[error("it refuses this client: {0}")]
    Refused(String),
    /// A daemon listens and does not answer.
    #[error("it does not answer")]
    Silent,
    /// No daemon listens, or it ended meanwhile.
    #[error("it cannot be reached: {0}")]
    Gone(String),
}

/// Asks the daemon for its ways of authentication. Has no deadline of its own.
pub(super) async fn greet(socket: &str) -> Result<(), OpenError> {
    let mut stream = UnixStream::connect(socket).await.map_err(|e| failed(&e))?;
    let asked = ask(&mut stream).await;
    let ways = asked.map_err(|error| match error.kind() {
        // A daemon that accepts only certain clients closes the others' connections.
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            OpenError::Refused("it closed the connection".to_owned())
        }
        ErrorKind::InvalidData => OpenError::Refused(error.to_string()),
        _ => failed(&error),
    })?;
    if !ways.contains(&NO_AUTHENTICATION) {
        return Err(OpenError::Refused("it asks for authentication".to_owned()));
    }
    // Otherwise the daemon logs the end of the connection as an error.
    let farewell = message(CONNECT_CLOSE, 1);
    if stream.write_all(&farewell).await.is_ok() {
        let mut end = [0; HEADER];
        stream.read_exact(&mut end).await.ok();
    }
    Ok(())
}

async fn ask(stream: &mut UnixStream) -> io::Result<Vec<u32>> {
    stream.write_all(&message(AUTH_LIST, 0)).await?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let length = u32::from_be_bytes(length);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if !(HEADER..=MAX_REPLY).contains(&length) {
        return Err(malformed("its answer has a wrong length"));
    }
    let mut rest = vec![0; length - 4];
    stream.read_exact(&mut rest).await?;
    parse(&rest)
}

/// Returns the ways of authentication in a reply without its length.
fn parse(reply: &[u8]) -> io::Result<Vec<u32>> {
    let words: Vec<u32> = reply
        .chunks_exact(4)
        .map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    match words[..] {
        [
            PROGRAM,
            VERSION,
            AUTH_LIST,
            REPLY,
            _,
            OK,
            count,
            ref ways @ ..,
        ] if usize::try_from(count) == Ok(ways.len()) => Ok(ways.to_vec()),
        [PROGRAM, VERSION, AUTH_LIST, REPLY, ..] => Err(malformed("it answers with an error")),
        _ => Err(malformed("it does not speak libvirt's protocol")),
    }
}

fn message(procedure: u32, serial: u32) -> [u8; HEADER] {
    let words = [HEADER_LENGTH, PROGRAM, VERSION, procedure, CALL, serial, OK];
    let mut message = [0; HEADER];
    for (bytes, word) in message.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    message
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

fn failed(error: &io::Error) -> OpenError {
    match error.kind() {
        ErrorKind::PermissionDenied => OpenError::Refused(error.to_string()),
        // The queue of the socket is full: the daemon accepts nobody.
        ErrorKind::WouldBlock => OpenError::Silent,
        _ => OpenError::Gone(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use tokio::net::UnixListener;

    use super::*;

    fn reply(words: &[u32]) -> Vec<u8> {
        let length = 4 + 4 * u32::try_from(words.len()).unwrap();
        let words = [&[length], words].concat();
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    const LIST: [u32; 6] = [PROGRAM, VERSION, AUTH_LIST, REPLY, 0, OK];

    /// Answers one client with these bytes and closes the connection.
    async fn answer(bytes: Vec<u8>) -> Result<(), OpenError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let daemon = async {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut question = [0; HEADER];
            client.read_exact(&mut question).await.unwrap();
            assert_eq!(question, message(AUTH_LIST, 0));
            client.write_all(&bytes).await.unwrap();
        };
        let (_, greeted) = tokio::join!(daemon, greet(path.to_str().unwrap()));
        greeted
    }

    #[rstest]
    #[case::none(reply(&[&LIST[..], &[1, 0]].concat()), "")]
    #[case::one_of_two(reply(&[&LIST[..], &[2, 2, 0]].concat()), "")]
    #[case::polkit(reply(&[&LIST[..], &[1, 2]].concat()), "authentication")]
    #[case::error(reply(&[PROGRAM, VERSION, AUTH_LIST, REPLY, 0, 1, 7]), "with an error")]
    #[case::wrong_count(reply(&[&LIST[..], &[9, 0]].concat()), "with an error")]
    #[case::other_protocol(reply(&[1, 2, 3, 4, 5, 6, 7]), "libvirt's protocol")]
    #[case::too_long(u32::MAX.to_be_bytes().into(), "wrong length")]
    #[case::too_short(reply(&[]), "wrong length")]
    #[case::closed(Vec::new(), "closed the connection")]
    #[case::cut(reply(&LIST)[..12].into(), "closed the connection")]
    #[tokio::test]
    async fn answer_decides(#[case] bytes: Vec<u8>, #[case] refusal: &str) {
        match answer(bytes).await {
            Ok(()) => assert_eq!(refusal, ""),
            Err(OpenError::Refused(reason)) => {
                assert!(!refusal.is_empty() && reason.contains(refusal), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn socket_that_nobody_serves_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        for path in [path.to_str().unwrap(), "/does/not/exist"] {
            assert!(matches!(greet(path).await, Err(OpenError::Gone(_))));
        }
    }
}
