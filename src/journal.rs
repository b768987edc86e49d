//! The journal: one file for each operation, so that none is lost whatever ends this program.
//!
//! A file is written whole beside its place, synced, renamed into it, and the directory synced:
//! what [`Journal::write`] returned for survives a power cut. What cannot be read is moved aside
//! and said so, never deleted.

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

/// Where it is, below the state directory.
pub const DIRECTORY: &str = "operations";

/// How many operations are kept.
const MOST: usize = 1000;

/// No file of ours is larger: a history has bounds, and this is far above them.
const LARGEST: u64 = 64 << 20;

/// How much all files together may take before the oldest finished ones go.
const MOST_BYTES: u64 = 256 << 20;

/// Version of the file format that is written. Version 1 is read as well.
const VERSION: u32 = 2;

/// What is kept of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// What was asked for.
    pub order: Order,
    /// How far it is, and what came of it.
    pub record: Record,
    /// What was seen and done, from before the first call on, as long as it is of use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<History>,
}

/// What could not be done with the journal.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An entry is larger than one ever is.
    #[error("the entry of operation {id} takes {size} bytes, more than the {LARGEST} there may be")]
    TooLarge {
        /// Whose it is.
        id: OperationId,
        /// How large it would be.
        size: u64,
    },
    /// An entry cannot be written as JSON.
    #[error("the entry of operation {id} cannot be written: {problem}")]
    Unwritable {
        /// Whose it is.
        id: OperationId,
        /// Why not.
        problem: String,
    },
}

/// The journal in its directory.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    sizes: Mutex<Sizes>,
}

/// What each file takes, and all of them together.
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
    /// Opens the journal below the state directory, in `operations/`, and makes it if there is
    /// none.
    ///
    /// # Errors
    /// A directory that cannot be made or listed.
    pub fn open(state_directory: &Path) -> Result<Self, JournalError> {
        let directory = state_directory.join(DIRECTORY);
        fs::create_dir_all(&directory).map_err(io_error("make", &directory))?;
        let journal = Self {
            directory,
            sizes: Mutex::default(),
        };
        journal.clear_drafts()?;
        Ok(journal)
    }

    /// Every operation that there is a readable file of, the oldest first. What is no such file
    /// is moved aside.
    ///
    /// # Errors
    /// A directory that cannot be listed.
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

    /// Writes an entry, so that it survives whatever happens from now on.
    ///
    /// # Errors
    /// The file system said no; what was there before is there still.
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
        if size > LARGEST {
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

    /// Which of the operations that have their verdict, given the oldest first, must go so that
    /// the journal keeps within its bounds.
    pub fn surplus(&self, finished: impl IntoIterator<Item = OperationId>) -> Vec<OperationId> {
        let sizes = self.sizes();
        let (mut count, mut total) = (sizes.each.len(), sizes.total);
        let mut surplus = Vec::new();
        for id in finished {
            if count <= MOST && total <= MOST_BYTES {
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

    /// Takes an operation out.
    ///
    /// # Errors
    /// The file system said no.
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

    /// The files that are named like an operation's, the oldest operation first.
    fn files(&self) -> Result<Vec<(PathBuf, OperationId)>, JournalError> {
        let mut files = BTreeSet::new();
        for name in self.names()? {
            let id = name
                .strip_suffix(".json")
                .and_then(|stem| stem.parse::<OperationId>().ok());
            match id {
                Some(id) => drop(files.insert((id, name))),
                None if name.starts_with("unreadable-") => {}
                None => warn!(name, "the journal's directory holds what is not ours"),
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

    /// Whoever wrote them ended before they were whole: what they were to replace is there.
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
                "a file of the journal cannot be read and was moved aside"
            ),
            Err(why) => error!(
                file = %path.display(), problem, %why,
                "a file of the journal cannot be read, nor moved aside"
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
    file.take(LARGEST + 1)
        .read_to_end(&mut text)
        .map_err(|error| error.to_string())?;
    let size = text.len() as u64;
    if size > LARGEST {
        return Err("it is too large".to_owned());
    }
    let entry = parse(&text)?;
    if entry.record.id != *id {
        return Err(format!("it is about operation {}", entry.record.id));
    }
    Ok((entry, size))
}

fn parse(text: &[u8]) -> Result<Entry, String> {
    let header: Header = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    match header.version {
        1 => v1::parse(text),
        VERSION => serde_json::from_slice(text).map(|file: Versioned<Entry>| file.entry),
        version => return Err(format!("its version {version} is unknown")),
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
