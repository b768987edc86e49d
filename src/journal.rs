//! The journal: one file per operation, so that no operation is lost when virtnode or the node
//! stops.
//!
//! The journal owns its directory. A file is written beside its final path, synced and renamed, and
//! then the directory is synced: an entry survives a power failure once [`Journal::write`] returns.
//! All functions block on the file system. If a write fails, the previous version of the entry
//! stays. A file that cannot be read is moved aside and logged, never deleted.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::{error, warn};

use crate::hotplug::History;
use crate::operation::{OperationId, Order, Record};

mod v1;

/// Name of the directory below the state directory.
pub const DIRECTORY: &str = "operations";

/// Maximum number of entries.
const MAX_ENTRIES: usize = 1000;

/// Maximum size of an entry in bytes, far above what the bounds of a history allow.
const MAX_ENTRY_BYTES: u64 = 64 << 20;

/// Maximum size of all entries in bytes. Above it the oldest finished entries are removed.
const MAX_TOTAL_BYTES: u64 = 256 << 20;

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
}

#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    sizes: Mutex<Sizes>,
}

/// The sizes of the files in bytes.
#[derive(Debug, Default)]
struct Sizes {
    each: std::collections::BTreeMap<OperationId, u64>,
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
    /// The directory cannot be created or listed.
    pub fn open(state_directory: &Path) -> Result<Self, JournalError> {
        let directory = state_directory.join(DIRECTORY);
        fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
        let journal = Self {
            directory,
            sizes: Mutex::default(),
        };
        journal.clear_drafts()?;
        Ok(journal)
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
                Err(problem) => self.move_aside(&path, &problem),
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
            Ok(()) => self.sizes().set(id, Some(size)),
            Err(_) => drop(fs::remove_file(&draft)),
        }
        written
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
                Ok(())
            }
        }
    }

    fn sizes(&self) -> std::sync::MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, id: &OperationId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Returns the files that are named like an operation, the oldest first.
    fn files(&self) -> Result<Vec<(PathBuf, OperationId)>, JournalError> {
        let mut files = BTreeSet::new();
        for name in self.names()? {
            let id = name
                .strip_suffix(".json")
                .and_then(|stem| stem.parse::<OperationId>().ok());
            match id {
                Some(id) => drop(files.insert((id, name))),
                None if name.starts_with("unreadable-") => {}
                None => warn!(name, "unexpected file in the journal directory"),
            }
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

    /// Removes drafts of writes that were interrupted. The entries that they were to replace still
    /// exist.
    fn clear_drafts(&self) -> Result<(), JournalError> {
        for name in self.names()? {
            if name.starts_with('.') && name.ends_with(".draft") {
                let path = self.directory.join(name);
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
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

fn write_synced(path: &Path, text: &[u8]) -> Result<(), JournalError> {
    let mut file = File::create(path).map_err(io_error("create", path))?;
    file.write_all(text)
        .and_then(|()| file.sync_all())
        .map_err(io_error("write", path))
}

fn read(path: &Path, id: &OperationId) -> Result<(Entry, u64), String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut text = Vec::new();
    file.take(MAX_ENTRY_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(|error| error.to_string())?;
    let size = text.len() as u64;
    if size > MAX_ENTRY_BYTES {
        return Err("the file is too large".to_owned());
    }
    let entry = parse(&text)?;
    if entry.record.id != *id {
        return Err(format!("the file is about operation {}", entry.record.id));
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
