//! The journal: one file per operation, so that no operation is lost when virtnode or the node
//! stops.
//!
//! The journal owns its directory, and locks it: a second process that executes operations could
//! execute the same ones. A file is written beside its final path, synced and renamed, and
//! then the directory is synced: an entry survives a power failure once [`Journal::write`] returns.
//! All functions block on the file system. If a write fails, the previous version of the entry
//! stays. A file that cannot be read is moved aside and logged, never deleted. Anything that is not a
//! regular file is logged and left alone.
//!
//! A full disk still has room for an empty file. If a verdict cannot be written, an empty file keeps
//! it and its time in its name. So the next start, which finds the operation without a verdict,
//! neither executes it again nor gives it a later time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::{error, warn};

use crate::files::{self, PRIVATE_DIRECTORY, PRIVATE_FILE, PUBLIC_DIRECTORY};
use crate::hotplug::{History, VcpuLife, Verdict};
use crate::operation::{OperationId, Order, Record};
use crate::units::Timestamp;

mod v1;

/// Name of the directory below the state directory.
pub const DIRECTORY: &str = "operations";

/// Maximum number of entries.
const MAX_ENTRIES: usize = 1000;

/// Maximum size of an entry in bytes, far above what the bounds of a history allow.
const MAX_ENTRY_BYTES: u64 = 64 << 20;

/// Maximum size of all entries in bytes. Above it the oldest finished entries are removed.
const MAX_TOTAL_BYTES: u64 = 256 << 20;

/// Maximum number of unexpected files that are named in a log line.
const MAX_NAMED: usize = 8;

/// Version of the file format that is written. Version 1 is read as well.
const VERSION: u32 = 2;

/// The persistent state of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    pub order: Order,
    pub record: Record,
    /// The history from before the first call, as long as it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<History>,
    /// The vCPUs that the domain had since its emulator started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_life: Option<VcpuLife>,
}

#[derive(Debug, Error)]
pub enum JournalError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "the entry of operation {id} takes {size} bytes, more than the maximum of {MAX_ENTRY_BYTES}"
    )]
    TooLarge { id: OperationId, size: u64 },
    #[error("the entry of operation {id} cannot be written: {problem}")]
    Unwritable { id: OperationId, problem: String },
    #[error(
        "another virtnode process uses {0}: stop it, or give this one a state directory of its own"
    )]
    Locked(PathBuf),
}

/// A verdict that could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptVerdict {
    pub verdict: Verdict,
    pub at: Timestamp,
}

#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    sizes: Mutex<Sizes>,
    /// The locked directory.
    lock: Mutex<Option<File>>,
    /// Verdicts that could not be written.
    kept: Mutex<BTreeMap<OperationId, KeptVerdict>>,
}

/// The sizes of the files in bytes.
#[derive(Debug, Default)]
struct Sizes {
    each: BTreeMap<OperationId, u64>,
    total: u64,
}

impl Sizes {
    fn set(&mut self, id: &OperationId, size: Option<u64>) {
        let before = match size {
            Some(size) => self.each.insert(id.clone(), size),
            None => self.each.remove(id),
        };
        self.total = (self.total + size.unwrap_or(0)).saturating_sub(before.unwrap_or(0));
    }
}

#[derive(Serialize, Deserialize)]
struct Versioned<E> {
    version: u32,
    entry: E,
}

/// The part of a file that every version has.
#[derive(Deserialize)]
struct Header {
    version: u32,
}

impl Journal {
    /// Opens the journal in `operations/` below the state directory, and creates that directory.
    ///
    /// # Errors
    /// The directory cannot be created or listed, or another process has opened the journal.
    pub fn open(state_directory: &Path) -> Result<Self, JournalError> {
        files::create_directory(state_directory, PUBLIC_DIRECTORY)
            .map_err(io_error("create", state_directory))?;
        let journal = Self::at(state_directory.join(DIRECTORY));
        let directory = &journal.directory;
        files::create_directory(directory, PRIVATE_DIRECTORY)
            .map_err(io_error("create", directory))?;
        deny_writes_of_others(directory);
        *journal.lock() = Some(lock(directory)?);
        journal.clear_leftovers()?;
        Ok(journal)
    }

    /// Reads the entries of a journal that another process may have open, the oldest first, and
    /// changes nothing. Files that cannot be read are logged.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn read(state_directory: &Path) -> Result<Vec<Entry>, JournalError> {
        let journal = Self::at(state_directory.join(DIRECTORY));
        let mut entries = Vec::new();
        for (path, id) in journal.files()? {
            match read(&path, &id) {
                Ok((entry, _)) => entries.push(entry),
                Err(problem) => warn!(file = %path.display(), %problem, "unreadable journal file"),
            }
        }
        Ok(entries)
    }

    fn at(directory: PathBuf) -> Self {
        Self {
            directory,
            sizes: Mutex::default(),
            lock: Mutex::default(),
            kept: Mutex::default(),
        }
    }

    /// Lets another process, or another executor, open the journal.
    pub fn release(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<File>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the readable entries, the oldest first, and moves the other files aside.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn entries(&self) -> Result<Vec<Entry>, JournalError> {
        let mut entries = Vec::new();
        for (path, id) in self.files()? {
            match read(&path, &id) {
                Ok((entry, size)) => {
                    self.sizes().set(&id, Some(size));
                    entries.push(entry);
                }
                Err(ReadError::NotRegular) => {
                    error!(file = %path.display(), "not a regular file, ignored");
                }
                Err(problem) => self.move_aside(&path, &problem.to_string()),
            }
        }
        Ok(entries)
    }

    /// Writes an entry durably.
    ///
    /// # Errors
    /// The file system failed, or the entry is too large. The previous version of the entry stays.
    pub fn write(&self, entry: &Entry) -> Result<(), JournalError> {
        let id = &entry.record.id;
        let versioned = Versioned {
            version: VERSION,
            entry,
        };
        let text = serde_json::to_vec(&versioned).map_err(|error| JournalError::Unwritable {
            id: id.clone(),
            problem: error.to_string(),
        })?;
        let size = text.len() as u64;
        if size > MAX_ENTRY_BYTES {
            return Err(JournalError::TooLarge {
                id: id.clone(),
                size,
            });
        }
        let path = self.path(id);
        let draft = self.directory.join(format!(".{id}.draft"));
        let written = write_synced(&draft, &text)
            .and_then(|()| fs::rename(&draft, &path).map_err(io_error("rename", &draft)))
            .and_then(|()| self.sync_directory());
        match &written {
            Ok(()) => {
                self.sizes().set(id, Some(size));
                if entry.record.is_done() {
                    self.forget_verdict(id);
                }
            }
            Err(_) => drop(fs::remove_file(&draft)),
        }
        written
    }

    /// Keeps a verdict that could not be written. Does nothing if an earlier one is kept.
    pub fn keep_verdict(&self, record: &Record) {
        let (Some(verdict), Some(at)) = (record.verdict, record.finished) else {
            return;
        };
        let mut all = self.kept();
        if all.contains_key(&record.id) {
            return;
        }
        let kept = KeptVerdict { verdict, at };
        let path = self.kept_path(&record.id, kept);
        match files::create(&path, PRIVATE_FILE) {
            Ok(_) => drop(all.insert(record.id.clone(), kept)),
            Err(error) => warn!(%error, file = %path.display(), "cannot keep a verdict"),
        }
    }

    /// Returns the first verdict of an operation if that could not be written.
    pub fn kept_verdict(&self, id: &OperationId) -> Option<KeptVerdict> {
        self.kept().get(id).copied()
    }

    fn forget_verdict(&self, id: &OperationId) {
        if let Some(kept) = self.kept().remove(id) {
            drop(fs::remove_file(self.kept_path(id, kept)));
        }
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<OperationId, KeptVerdict>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept_path(&self, id: &OperationId, kept: KeptVerdict) -> PathBuf {
        let (verdict, millis) = (kept.verdict.as_str(), kept.at.as_millis());
        self.directory.join(format!(".{id}.{verdict}.{millis}"))
    }

    /// Returns the finished operations to remove so that the journal stays within its limits.
    /// `finished` starts with the oldest.
    pub fn surplus(&self, finished: impl IntoIterator<Item = OperationId>) -> Vec<OperationId> {
        let sizes = self.sizes();
        let (mut count, mut total) = (sizes.each.len(), sizes.total);
        let mut surplus = Vec::new();
        for id in finished {
            if count <= MAX_ENTRIES && total <= MAX_TOTAL_BYTES {
                break;
            }
            if let Some(size) = sizes.each.get(&id) {
                count -= 1;
                total -= size;
                surplus.push(id);
            }
        }
        surplus
    }

    /// Removes an entry.
    ///
    /// # Errors
    /// The file system failed.
    pub fn remove(&self, id: &OperationId) -> Result<(), JournalError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &path)(error))
            }
            _ => {
                self.sizes().set(id, None);
                self.forget_verdict(id);
                Ok(())
            }
        }
    }

    fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, id: &OperationId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Returns the files that are named like an operation, the oldest first.
    fn files(&self) -> Result<Vec<(PathBuf, OperationId)>, JournalError> {
        let mut files = BTreeSet::new();
        let mut unexpected = Vec::new();
        for name in self.names()? {
            let id = name
                .strip_suffix(".json")
                .and_then(|stem| stem.parse::<OperationId>().ok());
            match id {
                Some(id) => drop(files.insert((id, name))),
                None if name.starts_with("unreadable-") || is_own_temporary(&name) => {}
                None => unexpected.push(name),
            }
        }
        if !unexpected.is_empty() {
            let count = unexpected.len();
            unexpected.truncate(MAX_NAMED);
            warn!(count, names = ?unexpected, "unexpected files in the journal directory, ignored");
        }
        let with_path = |(id, name): (OperationId, String)| (self.directory.join(name), id);
        Ok(files.into_iter().map(with_path).collect())
    }

    fn names(&self) -> Result<Vec<String>, JournalError> {
        let list = fs::read_dir(&self.directory).map_err(io_error("list", &self.directory))?;
        let name = |file: io::Result<fs::DirEntry>| {
            let file = file.map_err(io_error("list", &self.directory))?;
            Ok(file.file_name().to_string_lossy().into_owned())
        };
        list.map(name).collect()
    }

    /// Removes drafts of writes that were interrupted: the entries that they were to replace still
    /// exist. Reads the verdicts that could not be written.
    fn clear_leftovers(&self) -> Result<(), JournalError> {
        for name in self.names()? {
            let path = self.directory.join(&name);
            let obsolete = match kept_verdict_of(&name) {
                Some((id, kept)) if self.path(&id).exists() => {
                    self.kept().insert(id, kept);
                    false
                }
                Some(_) => true,
                None => is_own_temporary(&name),
            };
            if obsolete && let Err(error) = fs::remove_file(&path) {
                error!(file = %path.display(), %error, "cannot remove a leftover, ignored");
            }
        }
        Ok(())
    }

    fn move_aside(&self, path: &Path, problem: &str) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let free = |number: &u32| {
            let aside = self.directory.join(format!("unreadable-{name}.{number}"));
            !aside.exists()
        };
        let number = (0..=u32::MAX).find(free).unwrap_or_default();
        let aside = self.directory.join(format!("unreadable-{name}.{number}"));
        match fs::rename(path, &aside) {
            Ok(()) => error!(
                file = %path.display(), aside = %aside.display(), problem,
                "unreadable journal file moved aside"
            ),
            Err(why) => error!(
                file = %path.display(), problem, %why,
                "unreadable journal file cannot be moved aside"
            ),
        }
    }

    fn sync_directory(&self) -> Result<(), JournalError> {
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io_error("sync", &self.directory))
    }
}

/// True for the names of drafts and of kept verdicts.
fn is_own_temporary(name: &str) -> bool {
    name.starts_with('.') && (name.ends_with(".draft") || kept_verdict_of(name).is_some())
}

fn kept_verdict_of(name: &str) -> Option<(OperationId, KeptVerdict)> {
    let mut parts = name.strip_prefix('.')?.split('.');
    let (id, verdict, millis) = (parts.next()?, parts.next()?, parts.next()?);
    let at = Timestamp::from_millis(millis.parse().ok()?);
    let verdict = Verdict::ALL.into_iter().find(|it| it.as_str() == verdict)?;
    Some((id.parse().ok()?, KeptVerdict { verdict, at }))
}

/// Locks a directory against other processes. The kernel releases the lock when the process ends or
/// executes another program.
fn lock(directory: &Path) -> Result<File, JournalError> {
    let file = File::open(directory).map_err(io_error("open", directory))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(JournalError::Locked(directory.to_owned())),
        // Some network file systems have no locks.
        Err(TryLockError::Error(error)) => {
            warn!(directory = %directory.display(), %error, "cannot lock the journal directory");
        }
    }
    Ok(file)
}

/// Removes write permissions of group and others, which an earlier umask may have left.
fn deny_writes_of_others(directory: &Path) {
    let Ok(found) = fs::metadata(directory) else {
        return;
    };
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o022 == 0 {
        return;
    }
    let restricted = fs::set_permissions(directory, Permissions::from_mode(mode & !0o022));
    let outcome = restricted.map_or_else(|error| error.to_string(), |()| "removed".to_owned());
    warn!(
        directory = %directory.display(), mode = format!("{mode:o}"), outcome,
        "other users could write to the journal directory"
    );
}

fn write_synced(path: &Path, text: &[u8]) -> Result<(), JournalError> {
    let mut file = files::create(path, PRIVATE_FILE).map_err(io_error("create", path))?;
    file.write_all(text)
        .and_then(|()| file.sync_all())
        .map_err(io_error("write", path))
}

/// Reason why a file yields no entry.
#[derive(Debug, Error)]
enum ReadError {
    #[error("not a regular file")]
    NotRegular,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the file is too large")]
    TooLarge,
    #[error("{0}")]
    Malformed(String),
}

fn read(path: &Path, id: &OperationId) -> Result<(Entry, u64), ReadError> {
    let file = match files::open_regular(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            return Err(ReadError::NotRegular);
        }
        opened => opened?,
    };
    let mut text = Vec::new();
    file.take(MAX_ENTRY_BYTES + 1).read_to_end(&mut text)?;
    let size = text.len() as u64;
    if size > MAX_ENTRY_BYTES {
        return Err(ReadError::TooLarge);
    }
    let entry = parse(&text).map_err(ReadError::Malformed)?;
    if entry.record.id != *id {
        let problem = format!("the file is about operation {}", entry.record.id);
        return Err(ReadError::Malformed(problem));
    }
    Ok((entry, size))
}

fn parse(text: &[u8]) -> Result<Entry, String> {
    let header: Header = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    match header.version {
        1 => v1::parse(text),
        VERSION => serde_json::from_slice(text).map(|file: Versioned<Entry>| file.entry),
        version => return Err(format!("unknown version {version}")),
    }
    .map_err(|error| error.to_string())
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    move |source| JournalError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
#[path = "journal/journal_tests.rs"]
mod tests;
