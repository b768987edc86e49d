//! The documents that KubeVirt's node-labeller leaves on a node.
//!
//! virt-handler's init container runs `virsh` in the virt-launcher image and redirects its output to
//! three files, once at each start of the pod. So the files describe what a new VM of KubeVirt runs
//! with, also on a node without VMs.
//!
//! ```text
//!              changed            unchanged for 2 s
//!  readable ───────────▶ changing ─────────────────▶ readable
//!                           │ still changing after MAX_WAIT: an error, for this reading
//! ```
//!
//! The shell truncates a file before virsh writes it, so a file is used only if all three have been
//! unchanged for [`STABLE`]. A file that is empty, too large, not a regular file or not UTF-8 is an
//! error; a document that is cut off is one of its parser. No text is kept in memory.
//!
//! Reading blocks for regular files of at most [`MAX_BYTES`]; a FIFO or a symbolic link is not opened.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, sleep};

use crate::domain::CallError;
use crate::files::open_regular;
use crate::xml::MAX_BYTES;

/// Time without a change after which a file counts as complete.
const STABLE: Duration = Duration::from_secs(2);
/// Maximum wait for that. A script that writes for longer is read by a later probe.
const MAX_WAIT: Duration = Duration::from_secs(6);
/// Interval between observations during the wait.
const OBSERVE: Duration = Duration::from_millis(250);

/// One of the files, by the command that writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DocumentFile {
    /// `virsh capabilities`
    Capabilities,
    /// `virsh domcapabilities`
    DomainCapabilities,
    /// `virsh hypervisor-cpu-baseline --features`
    SupportedFeatures,
}

impl DocumentFile {
    pub const ALL: [Self; 3] = [
        Self::Capabilities,
        Self::DomainCapabilities,
        Self::SupportedFeatures,
    ];

    /// Returns the file's name (node-labeller.sh).
    pub fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "capabilities.xml",
            Self::DomainCapabilities => "virsh_domcapabilities.xml",
            Self::SupportedFeatures => "supported_features.xml",
        }
    }
}

/// A state of the three files. Equal if none was written in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileStates([Option<FileState>; 3]);

/// The identity and last change of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileState {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Also set by a change whose author sets the time of modification.
    changed: (i64, i64),
}

impl FileState {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// True if the last change is at least [`STABLE`] ago. False if the clock was set back.
    fn is_old(&self, now: Duration) -> bool {
        let seconds = u64::try_from(self.changed.0).unwrap_or_default();
        let changed = Duration::from_secs(seconds);
        // A whole second more for the fraction.
        changed + STABLE + Duration::from_secs(1) <= now
    }
}

/// The directory with the documents.
pub struct DocumentDirectory {
    path: PathBuf,
    /// The last observed state, and since when it has been the same.
    observed: Mutex<Option<(FileStates, Instant)>>,
}

impl DocumentDirectory {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            observed: Mutex::new(None),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self, file: DocumentFile) -> PathBuf {
        self.path.join(file.name())
    }

    /// True if the directory has any of the files, or may have them and cannot be searched.
    pub fn has_files(&self) -> bool {
        DocumentFile::ALL
            .into_iter()
            .any(|file| match fs::symlink_metadata(self.file(file)) {
                Ok(_) => true,
                Err(error) => error.kind() == ErrorKind::PermissionDenied,
            })
    }

    /// Returns the present state of the files.
    pub fn states(&self) -> FileStates {
        FileStates(DocumentFile::ALL.map(|file| {
            let metadata = fs::symlink_metadata(self.file(file)).ok()?;
            Some(FileState::of(&metadata))
        }))
    }

    /// Returns the text of a file. Waits while any of the files changes.
    ///
    /// # Errors
    /// `Unreadable` with the reason.
    pub async fn read(&self, file: DocumentFile) -> Result<String, CallError> {
        let path = self.file(file);
        let unreadable = |text: String| CallError::Unreadable {
            document: path.display().to_string(),
            text,
        };
        let until = Instant::now() + MAX_WAIT;
        loop {
            if let Some(states) = self.stable_states() {
                let text = read_text(&path);
                if self.states() == states {
                    return text.map_err(unreadable);
                }
            }
            if Instant::now() >= until {
                return Err(unreadable(
                    "the files of this directory are being written".to_owned(),
                ));
            }
            sleep(OBSERVE).await;
        }
    }

    /// Observes the files, and returns their state if it has been the same for [`STABLE`].
    fn stable_states(&self) -> Option<FileStates> {
        let (states, now) = (self.states(), Instant::now());
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        let since = match &*observed {
            Some((before, since)) if *before == states => *since,
            _ => now,
        };
        *observed = Some((states.clone(), since));
        let clock = SystemTime::now().duration_since(UNIX_EPOCH);
        let clock = clock.unwrap_or_default();
        let is_old = states.0.iter().flatten().all(|state| state.is_old(clock));
        (is_old || now.duration_since(since) >= STABLE).then_some(states)
    }
}

/// Returns the content of a regular file, or the reason why it is not a document.
fn read_text(path: &Path) -> Result<String, String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = open_regular(path)?;
        file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| match error.kind() {
        ErrorKind::NotFound => "does not exist".to_owned(),
        _ => error.to_string(),
    })?;
    if bytes.len() > MAX_BYTES {
        return Err(format!("is larger than {} MiB", MAX_BYTES >> 20));
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err("is empty".to_owned());
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;
    use tempfile::TempDir;

    use super::*;

    const CAPABILITIES: DocumentFile = DocumentFile::Capabilities;

    fn directory() -> (TempDir, DocumentDirectory) {
        let directory = tempfile::tempdir().unwrap();
        let documents = DocumentDirectory::new(directory.path());
        (directory, documents)
    }

    async fn problem(documents: &DocumentDirectory) -> String {
        documents.read(CAPABILITIES).await.unwrap_err().to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn file_is_read_after_two_seconds_without_a_change() {
        let (_directory, documents) = directory();
        let path = documents.file(CAPABILITIES);
        assert!(!documents.has_files());
        fs::write(&path, "one").unwrap();
        assert!(documents.has_files());
        let start = Instant::now();
        assert_eq!(documents.read(CAPABILITIES).await.unwrap(), "one");
        assert!(start.elapsed() >= STABLE, "{:?}", start.elapsed());
        let start = Instant::now();
        assert_eq!(documents.read(CAPABILITIES).await.unwrap(), "one");
        assert_eq!(start.elapsed(), Duration::ZERO);
        fs::write(&path, "two").unwrap();
        assert_eq!(documents.read(CAPABILITIES).await.unwrap(), "two");
        assert!(start.elapsed() >= STABLE, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn change_of_another_file_delays_the_reading() {
        let (_directory, documents) = directory();
        fs::write(documents.file(CAPABILITIES), "one").unwrap();
        documents.read(CAPABILITIES).await.unwrap();
        fs::write(documents.file(DocumentFile::SupportedFeatures), "").unwrap();
        let start = Instant::now();
        documents.read(CAPABILITIES).await.unwrap();
        assert!(start.elapsed() >= STABLE, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn file_that_keeps_changing_is_an_error_and_ends_the_wait() {
        let (_directory, documents) = directory();
        let path = documents.file(CAPABILITIES);
        fs::write(&path, "x").unwrap();
        let writing = async {
            for round in 2_usize.. {
                fs::write(&path, "x".repeat(round)).unwrap();
                sleep(Duration::from_millis(500)).await;
            }
        };
        let start = Instant::now();
        tokio::select! {
            () = writing => {}
            problem = problem(&documents) => assert!(problem.contains("being written"), "{problem}"),
        }
        assert!(
            start.elapsed() <= MAX_WAIT + OBSERVE,
            "{:?}",
            start.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn strange_file_is_an_error_that_names_it() {
        let (directory, documents) = directory();
        let path = documents.file(CAPABILITIES);
        assert!(
            problem(&documents)
                .await
                .ends_with("capabilities.xml: does not exist")
        );
        fs::write(&path, " \n").unwrap();
        assert!(problem(&documents).await.ends_with("is empty"));
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(problem(&documents).await.ends_with("is not UTF-8"));
        let large = fs::File::create(&path).unwrap();
        large.set_len(MAX_BYTES as u64 + 1).unwrap();
        assert!(problem(&documents).await.ends_with("is larger than 8 MiB"));
        fs::remove_file(&path).unwrap();
        symlink("/etc/hostname", &path).unwrap();
        assert!(problem(&documents).await.ends_with("not a regular file"));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        assert!(problem(&documents).await.ends_with("not a regular file"));
        drop(directory);
        assert!(!documents.has_files());
    }
}
