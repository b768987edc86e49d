//! `virtnode sockets` as a process with the rights of its container.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::ensure;

use super::{Identity, Launchers, QEMU, START, uri};
use crate::support::eventually;

/// A running broker: user 107, group 0, no capabilities. Killed when dropped.
pub(crate) struct Broker {
    directory: PathBuf,
    log: PathBuf,
    process: Child,
}

impl Broker {
    /// Starts a broker for the node's launchers, with further arguments.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) async fn start(node: &Launchers, arguments: &[&str]) -> anyhow::Result<Self> {
        let shared = &node.shared;
        // Like the emptyDir that both containers have.
        let directory = shared.path("served");
        fs::create_dir_all(&directory)?;
        fs::set_permissions(&directory, Permissions::from_mode(0o777))?;
        // The user may not enter the checkout.
        let program = shared.path("virtnode");
        if !program.exists() {
            let built = Path::new(env!("CARGO_BIN_EXE_virtnode"));
            if fs::hard_link(built, &program).is_err() {
                fs::copy(built, &program)?;
            }
        }
        let log = shared.path("broker.log");
        let identity = Identity {
            user: QEMU,
            group: 0,
        };
        let process = identity
            .command(&program)
            .args(["sockets", "--log", "debug"])
            .arg("--directory")
            .arg(node.pods())
            .arg("--serve")
            .arg(&directory)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        let broker = Self {
            directory,
            log,
            process,
        };
        eventually(START, async || {
            ensure!(broker.log().contains("serving sockets"), "{}", broker.log());
            Ok(())
        })
        .await?;
        Ok(broker)
    }

    /// Returns the directory with the served sockets.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the served socket of a pod.
    pub(crate) fn socket(&self, pod: &str) -> PathBuf {
        self.directory.join(format!("{pod}.sock"))
    }

    /// Returns the URI of a pod's libvirt through the broker, once it is served.
    ///
    /// # Errors
    /// It is not served.
    pub(crate) async fn uri(&self, pod: &str) -> anyhow::Result<String> {
        let socket = self.socket(pod);
        eventually(START, async || {
            ensure!(socket.exists(), "not served:\n{}", self.log());
            Ok(())
        })
        .await?;
        Ok(uri(&socket))
    }

    /// Returns its log so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Returns its process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}
