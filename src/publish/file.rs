//! Label sets in files: `labels.json` in the state directory, and Node Feature Discovery's
//! `features.d` where that exists.
//!
//! Files are written beside their place and renamed into it, so that a reader sees the old or the
//! new one and a crash leaves one of them. A file that is right is not touched.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::label::{LabelKey, LabelSet, LabelValue, RejectedLabel, RetainedLabel, is_ours};

/// The name in the state directory.
pub const LABELS_FILE: &str = "labels.json";

/// The name in the state directory of what the Node has from us.
pub const NODE_LABELS_FILE: &str = "node-labels.json";

/// The name in `features.d`.
const FEATURES_FILE: &str = "virtnode";

/// Node Feature Discovery reads no feature file that is larger (source/local/local.go).
const FEATURES_MAX_BYTES: usize = 64 * 1024;

/// No file of ours is larger.
const LABELS_MAX_BYTES: u64 = 8 * 1024 * 1024;

/// Labels that could not be written to a file, or not read back.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file system said no.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// There is something else at the file's place.
    #[error("{path} holds no label set: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Node Feature Discovery would not read the file.
    #[error(
        "the labels take {size} bytes, and Node Feature Discovery reads feature files of at most 64 KiB; {path} was left as it was"
    )]
    TooLarge {
        /// The feature file.
        path: PathBuf,
        /// How large it would be.
        size: usize,
    },
}

impl FileError {
    /// The bounded word for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } | Self::Malformed { .. } => "file",
            Self::TooLarge { .. } => "too-large",
        }
    }
}

/// What `labels.json` holds, and `virtnode labels --output json` prints.
#[derive(Debug, Serialize)]
pub struct LabelReport<'r> {
    /// The labels that are published.
    pub labels: &'r LabelSet,
    /// What could be no label.
    pub rejected: &'r [RejectedLabel],
    /// Those among the labels that are kept though the last probe does not call for them.
    pub retained: &'r [RetainedLabel],
}

impl<'r> LabelReport<'r> {
    /// A report of labels alone.
    pub fn of(labels: &'r LabelSet) -> Self {
        Self {
            labels,
            rejected: &[],
            retained: &[],
        }
    }
}

/// The labels in a file, under `labels`; none if there is no file. Keys that are none of ours are
/// left out.
///
/// # Errors
/// A file that cannot be read or holds something else.
pub fn load(path: &Path) -> Result<LabelSet, FileError> {
    let malformed = |problem: String| FileError::Malformed {
        path: path.to_owned(),
        problem,
    };
    let Some(bytes) = read_bounded(path)? else {
        return Ok(LabelSet::new());
    };
    let stored: Stored =
        serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    let labels = stored.labels.into_iter().filter_map(|(key, value)| {
        let key: LabelKey = key.parse().ok()?;
        let value: LabelValue = value.parse().ok()?;
        is_ours(&key).then_some((key, value))
    });
    Ok(labels.collect())
}

/// Writes a report to a file, if it is another one than the file holds. Answers whether it was
/// written.
///
/// # Errors
/// What the file system says.
pub fn store(path: &Path, report: &LabelReport<'_>) -> Result<bool, FileError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(io("create", directory))?;
    let mut text =
        serde_json::to_vec_pretty(report).map_err(|error| io("write", path)(error.into()))?;
    text.push(b'\n');
    replace(path, &text)
}

/// Removes a file. Answers whether it was there.
///
/// # Errors
/// What the file system says.
pub fn remove(path: &Path) -> Result<bool, FileError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("remove", path)(error)),
    }
}

/// The two files.
#[derive(Debug, Clone)]
pub struct FilePublisher {
    labels: PathBuf,
    features_directory: PathBuf,
}

impl FilePublisher {
    /// For `labels.json` in `state_directory`, and a file in `features_directory` if that
    /// directory exists at the time of writing.
    pub fn new(state_directory: &Path, features_directory: &Path) -> Self {
        Self {
            labels: state_directory.join(LABELS_FILE),
            features_directory: features_directory.to_owned(),
        }
    }

    /// Where the labels are.
    pub fn path(&self) -> &Path {
        &self.labels
    }

    /// The labels that were published before, as [`load`] finds them.
    ///
    /// # Errors
    /// As [`load`].
    pub fn load(&self) -> Result<LabelSet, FileError> {
        load(&self.labels)
    }

    /// Brings both files up to date. Answers whether anything had to be written.
    ///
    /// # Errors
    /// The first file that could not be written.
    pub fn publish(&self, report: &LabelReport<'_>) -> Result<bool, FileError> {
        let wrote_labels = store(&self.labels, report)?;
        let wrote_features = self.features_directory.is_dir() && {
            let path = self.features_directory.join(FEATURES_FILE);
            let text = features(report.labels);
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

    /// Removes both files. Answers with those that were there.
    ///
    /// # Errors
    /// The first file that could not be removed.
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
struct Stored {
    labels: BTreeMap<String, String>,
}

/// One `key=value` a line (Node Feature Discovery's customization guide, "local feature source").
fn features(labels: &LabelSet) -> String {
    labels
        .iter()
        .map(|(key, value)| format!("{key}={value}\n"))
        .collect()
}

fn replace(path: &Path, content: &[u8]) -> Result<bool, FileError> {
    if read_bounded(path)?.as_deref() == Some(content) {
        return Ok(false);
    }
    // A leading dot: Node Feature Discovery does not read such files (source/local/local.go).
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.new"));
    let mut file = fs::File::create(&beside).map_err(io("create", &beside))?;
    file.write_all(content).map_err(io("write", &beside))?;
    file.sync_all().map_err(io("write", &beside))?;
    fs::rename(&beside, path).map_err(io("replace", path))?;
    Ok(true)
}

fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    let file = match fs::File::open(path) {
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
        publisher.publish(&LabelReport::of(labels))
    }

    #[test]
    fn what_is_written_is_read_back_and_not_written_twice() {
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
    fn a_touched_file_is_put_right() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        publish(&publisher, &labels()).unwrap();
        fs::write(publisher.path(), "{}").unwrap();
        assert!(publish(&publisher, &labels()).unwrap());
        assert_eq!(publisher.load().unwrap(), labels());
    }

    #[test]
    fn feature_discovery_gets_a_file_where_it_looks_for_one() {
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
    fn a_set_too_large_for_feature_discovery_leaves_its_file_alone() {
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
    fn foreign_keys_and_other_content_are_not_taken_for_ours() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher(directory.path());
        fs::create_dir(directory.path().join("state")).unwrap();
        let text = r#"{"labels": {"virtnode.io/eim": "auto", "example.com/a": "b", "bad": "x"}}"#;
        fs::write(publisher.path(), text).unwrap();
        assert_eq!(publisher.load().unwrap().len(), 1);
        fs::write(publisher.path(), "not json").unwrap();
        let error = publisher.load().unwrap_err();
        assert!(error.to_string().contains("holds no label set"), "{error}");
    }
}
