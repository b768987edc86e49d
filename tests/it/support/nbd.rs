//! A disk that fails: a server of QEMU's network block devices
//! (NetworkBlockDevice/nbd, doc/proto.md) whose reads end with an I/O error until it is repaired.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const SIZE: u64 = 1 << 20;
/// Options and their replies.
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const GO: u32 = 7;
const ACKNOWLEDGED: u32 = 1;
const INFORMATION: u32 = 3;
const UNSUPPORTED: u32 = 0x8000_0001;
/// Requests and their replies.
const REQUEST_BYTES: usize = 28;
const REPLY: u32 = 0x6744_6698;
const READ: u16 = 0;
const DISCONNECT: u16 = 2;
const EIO: u32 = 5;

/// A disk of 1 MiB behind a socket. Its thread ends with the test's process.
pub(crate) struct FailingDisk(Arc<AtomicBool>);

impl FailingDisk {
    /// Starts the server.
    pub(crate) fn serve(socket: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        // QEMU may run as another user.
        fs::set_permissions(socket, fs::Permissions::from_mode(0o666))?;
        let fails = Arc::new(AtomicBool::new(true));
        let shared = Arc::clone(&fails);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that disconnects ends only its own connection.
                serve(stream, &shared).ok();
            }
        });
        Ok(Self(fails))
    }

    /// Makes reads succeed.
    pub(crate) fn repair(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

fn serve(mut stream: UnixStream, fails: &AtomicBool) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let _flags: [u8; 4] = take(&mut stream)?;
    loop {
        let magic = u64::from_be_bytes(take(&mut stream)?);
        if magic != OPTION {
            return Ok(());
        }
        let option = u32::from_be_bytes(take(&mut stream)?);
        let length = u32::from_be_bytes(take(&mut stream)?);
        let mut details = vec![0; length as usize];
        stream.read_exact(&mut details)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let length = u32::try_from(data.len()).unwrap_or(0);
            let words = [option, kind, length].map(u32::to_be_bytes).concat();
            stream.write_all(&[&OPTION_REPLY.to_be_bytes()[..], &words, data].concat())
        };
        if option != GO {
            reply(UNSUPPORTED, &[])?;
            continue;
        }
        // The export's size and flags: it is read-only.
        reply(
            INFORMATION,
            &[&[0, 0][..], &SIZE.to_be_bytes(), &[0, 3]].concat(),
        )?;
        reply(ACKNOWLEDGED, &[])?;
        break;
    }
    loop {
        let request: [u8; REQUEST_BYTES] = take(&mut stream)?;
        let (kind, cookie) = ([request[6], request[7]], &request[8..16]);
        let length = [request[24], request[25], request[26], request[27]];
        let (kind, length) = (u16::from_be_bytes(kind), u32::from_be_bytes(length));
        let error = match kind {
            READ if fails.load(Ordering::SeqCst) => EIO,
            DISCONNECT => return Ok(()),
            _ => 0,
        };
        let reply = [REPLY, error].map(u32::to_be_bytes).concat();
        stream.write_all(&[&reply[..], cookie].concat())?;
        if (kind, error) == (READ, 0) {
            stream.write_all(&vec![0; length as usize])?;
        }
    }
}

fn take<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
