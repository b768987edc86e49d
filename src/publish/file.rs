//! Label sets in files: `labels.json` in the state directory, and a file for Node Feature Discovery in
//! `features.d` if that directory exists.
//!
//! A file is replaced by rename, so that a reader or a crash sees either the old or the new content.
//! A file whose content is current is not written. Calls block on the file system.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files::{self, PUBLIC_DIRECTORY, PUBLIC_FILE};
use crate::label::{LabelKey, LabelSet, LabelValue, RejectedLabel, RetainedLabel, is_ours};

/// File name in the state directory.
pub const LABELS_FILE: &str = "labels.json";

/// File name in the state directory of the labels that are published on the Node.
pub const NODE_LABELS_FILE: &str = "node-labels.json";

/// File name in `features.d`.
const FEATURES_FILE: &str = "virtnode";

/// Maximum size of a feature file; Node Feature Discovery ignores larger ones
/// (source/local/local.go).
const FEATURES_MAX_BYTES: usize = 64 * 1024;

/// Maximum bytes that are read of a file.
const LABELS_MAX_BYTES: u64 = 8 * 1024 * 1024;

#[derive(Debug, Error)]
pub enum FileError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a label set: {source}")]
    Malformed {
        path: PathBuf,
        source: serde_json::Error,
    },
    /// Node Feature Discovery would ignore the file.
    #[error(
        "the labels have {size} bytes, but Node Feature Discovery ignores feature files of more than 64 KiB; {path} was not changed"
    )]
    TooLarge { path: PathBuf, size: usize },
}

impl FileError {
    /// Returns the fixed metrics label.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } | Self::Malformed { .. } => "file",
            Self::TooLarge { .. } => "too-large",
        }
    }
}

/// Content of `labels.json`, and output of `virtnode labels --output json`.
#[derive(Debug, Serialize)]
pub struct LabelReport<'r> {
    /// The published labels.
    pub labels: &'r LabelSet,
    /// Facts that are not valid labels.
    pub rejected: &'r [RejectedLabel],
    /// Published labels that the last probe did not yield.
    pub retained: &'r [RetainedLabel],
    /// Documents that yield no labels, and why; `virtnode labels` only.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub notes: &'r [String],
}

impl<'r> LabelReport<'r> {
    pub fn from_labels(labels: &'r LabelSet) -> Self {
        Self {
            labels,
            rejected: &[],
            retained: &[],
            notes: &[],
        }
    }
}

/// Reads the labels from a file, without keys that are not virtnode's. Returns an empty set if the
/// file does not exist.
///
/// # Errors
/// A file that cannot be read or parsed.
pub fn load(path: &Path) -> Result<LabelSet, FileError> {
    let Some(bytes) = read_bounded(path)? else {
        return Ok(LabelSet::new());
    };
    let stored: StoredLabels =
        serde_json::from_slice(&bytes).map_err(|source| FileError::Malformed {
            path: path.to_owned(),
            source,
        })?;
    let labels = stored.labels.into_iter().filter_map(|(key, value)| {
        let key: LabelKey = key.parse().ok()?;
        let value: LabelValue = value.parse().ok()?;
        is_ours(&key).then_some((key, value))
    });
    Ok(labels.collect())
}

/// Writes a report to a file. Returns false if the file had the same content.
///
/// # Errors
/// Errors of the file system.
pub fn store(path: &Path, report: &LabelReport<'_>) -> Result<bool, FileError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    files::create_directory(directory, PUBLIC_DIRECTORY).map_err(io("create", directory))?;
    let mut text =
        serde_json::to_vec_pretty(report).map_err(|error| io("write", path)(error.into()))?;
    text.push(b'\n');
    replace(path, &text)
}

/// Removes a file. Returns false if it did not exist.
///
/// # Errors
/// Errors of the file system.
pub fn remove(path: &Path) -> Result<bool, FileError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("remove", path)(error)),
    }
}

/// Publishes labels to both files.
#[derive(Debug, Clone)]
pub struct FilePublisher {
    labels: PathBuf,
    features_directory: PathBuf,
}

impl FilePublisher {
    /// Writes to `state_directory`, and to `features_directory` if that directory exists at the time of
    /// writing.
    pub fn new(state_directory: &Path, features_directory: &Path) -> Self {
        Self {
            labels: state_directory.join(LABELS_FILE),
            features_directory: features_directory.to_owned(),
        }
    }

    /// Returns the path of `labels.json`.
    pub fn path(&self) -> &Path {
        &self.labels
    }

    /// Reads the published labels with [`load`].
    ///
    /// # Errors
    /// As [`load`].
    pub fn load(&self) -> Result<LabelSet, FileError> {
        load(&self.labels)
    }

    /// Updates both files. Returns true if one of them was written.
    ///
    /// # Errors
    /// The first file that cannot be written.
    pub fn publish(&self, report: &LabelReport<'_>) -> Result<bool, FileError> {
        let wrote_labels = store(&self.labels, report)?;
        let wrote_features = self.features_directory.is_dir() && {
            let path = self.features_directory.join(FEATURES_FILE);
            let text = feature_lines(report.labels);
            if text.len() > FEATURES_MAX_BYTES {
                return Err(FileError::TooLarge {
                    path,
                    size: text.len(),
                });
            }
            replace(&path, text.as_bytes())?
        };
        Ok(wrote_labels || wrote_features)
    }

    /// Removes both files. Returns the paths of those that existed.
    ///
    /// # Errors
    /// The first file that cannot be removed.
    pub fn remove(&self) -> Result<Vec<PathBuf>, FileError> {
        let mut removed = Vec::new();
        for path in [
            self.labels.clone(),
            self.features_directory.join(FEATURES_FILE),
        ] {
            if remove(&path)? {
                removed.push(path);
            }
        }
        Ok(removed)
    }
}

#[derive(Deserialize)]
struct StoredLabels {
    labels: BTreeMap<String, String>,
}

/// Formats the labels as `key=value` lines (Node Feature Discovery's customization guide, "local feature source").
fn feature_lines(labels: &LabelSet) -> String {
    labels
        .iter()
        .map(|(key, value)| format!("{key}={value}\n"))
        .collect()
}

fn replace(path: &Path, content: &[u8]) -> Result<bool, FileError> {
    // Anything that cannot be read is replaced, a FIFO for example.
    if matches!(read_bounded(path), Ok(Some(current)) if current == content) {
        return Ok(false);
    }
    // Node Feature Discovery ignores names with a leading dot (source/local/local.go).
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    let created = files::create(&temporary, PUBLIC_FILE);
    let mut file = created.map_err(io("create", &temporary))?;
    file.write_all(content).map_err(io("write", &temporary))?;
    file.sync_all().map_err(io("write", &temporary))?;
    fs::rename(&temporary, path).map_err(io("replace", path))?;
    Ok(true)
}

fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    let file = match files::open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("read", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(LABELS_MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(io("read", path))?;
    Ok(Some(bytes))
}

fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> FileError + use<> {
    let path = path.to_owned();
    move |source| FileError::Io {
        action,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publisher(directory: &Path) -> FilePublisher {
        FilePublisher::new(&directory.join("state"), &directory.join("features.d"))
    }

    fn labels() -> LabelSet {
        let label = |key: &str, value: &str| (key.parse().unwrap(), value.parse().unwrap());
        [
            label("virtnode.io/eim", "auto"),
            label("cpu-model.virtnode.io/EPYC", "true"),
        ]
        .into()
    }

    fn publish(publisher: &FilePublisher, labels: &LabelSet) -> Result<bool, FileError> {
        publisher.publish(&LabelReport::from_labels(labels))
    }

    #[test]
    fn published_labels_are_read_back_and_not_written_twice() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        assert_eq!(publisher.load().unwrap(), LabelSet::new());
        assert!(publish(&publisher, &labels()).unwrap());
        assert!(!publish(&publisher, &labels()).unwrap());
        assert_eq!(publisher.load().unwrap(), labels());
        let names: Vec<_> = fs::read_dir(directory.path().join("state"))
            .unwrap()
            .collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn edited_file_is_restored() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        publish(&publisher, &labels()).unwrap();
        fs::write(publisher.path(), "{}").unwrap();
        assert!(publish(&publisher, &labels()).unwrap());
        assert_eq!(publisher.load().unwrap(), labels());
    }

    #[test]
    fn file_that_is_not_regular_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        fs::create_dir(directory.path().join("state")).unwrap();
        nix::unistd::mkfifo(publisher.path(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(publisher.load().is_err());
        assert!(publish(&publisher, &labels()).unwrap());
        assert_eq!(publisher.load().unwrap(), labels());
    }

    #[test]
    fn feature_file_is_written_if_its_directory_exists() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        fs::create_dir(directory.path().join("features.d")).unwrap();
        publish(&publisher, &labels()).unwrap();
        let path = directory.path().join("features.d/virtnode");
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "cpu-model.virtnode.io/EPYC=true\nvirtnode.io/eim=auto\n"
        );
        let removed = publisher.remove().unwrap();
        assert_eq!(removed, [publisher.path().to_owned(), path]);
        assert!(publisher.remove().unwrap().is_empty());
    }

    #[test]
    fn too_many_labels_leave_the_feature_file_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        fs::create_dir(directory.path().join("features.d")).unwrap();
        publish(&publisher, &labels()).unwrap();
        let many = (0..2000)
            .map(|n| {
                let key = LabelKey::new("cpu-feature.virtnode.io", &format!("f{n:030}"));
                (key.unwrap(), "true".parse().unwrap())
            })
            .collect();
        assert_eq!(publish(&publisher, &many).unwrap_err().code(), "too-large");
        let text = fs::read_to_string(directory.path().join("features.d/virtnode")).unwrap();
        assert_eq!(text.lines().count(), 2);
    }

    #[test]
    fn foreign_keys_are_skipped_and_other_content_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        fs::create_dir(directory.path().join("state")).unwrap();
        let text = r#"{"labels": {"virtnode.io/eim": "auto", "example.com/a": "b", "bad": "x"}}"#;
        fs::write(publisher.path(), text).unwrap();
        assert_eq!(publisher.load().unwrap().len(), 1);
        fs::write(publisher.path(), "not json").unwrap();
        let error = publisher.load().unwrap_err();
        assert!(error.to_string().contains("is not a label set"), "{error}");
    }
}
