//! Documents from files or standard input, bounded in size.

use std::fs::File;
use std::io::{Read, stdin};
use std::path::Path;

use anyhow::{Context, bail};

use super::{Exit, Failure};

/// The bytes of a document, and its name for error messages.
pub(super) struct DocumentInput {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

impl DocumentInput {
    /// Reads a file, or standard input if the path is `-`, of at most `limit` bytes.
    pub(super) fn read(path: &Path, limit: u64) -> anyhow::Result<Self> {
        if is_stdin(path) {
            return Self::read_from("standard input".to_owned(), 0, stdin().lock(), limit);
        }
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        Self::read_from(name, size, file, limit)
    }

    fn read_from(
        name: String,
        expected: u64,
        source: impl Read,
        limit: u64,
    ) -> anyhow::Result<Self> {
        // One byte more than the file has room for, so that its end is seen without growing.
        let capacity = usize::try_from(expected.min(limit) + 1).unwrap_or_default();
        let mut bytes = Vec::with_capacity(capacity);
        source
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {name}"))?;
        if bytes.len() as u64 > limit {
            bail!("{name}: is larger than {} MiB", limit >> 20);
        }
        Ok(Self { name, bytes })
    }

    /// Returns the name and the text.
    pub(super) fn into_text(self) -> anyhow::Result<(String, String)> {
        let Self { name, bytes } = self;
        match String::from_utf8(bytes) {
            Ok(text) => Ok((name, text)),
            Err(error) => bail!(
                "{name}: is not UTF-8 after byte {}",
                error.utf8_error().valid_up_to()
            ),
        }
    }
}

/// Returns an error if more than one of these options reads standard input.
pub(super) fn ensure_one_stdin<'a>(
    options: impl IntoIterator<Item = (&'a str, &'a Path)>,
) -> Result<(), Failure> {
    let names = options
        .into_iter()
        .filter_map(|(name, path)| is_stdin(path).then_some(name));
    let names: Vec<&str> = names.collect();
    if names.len() <= 1 {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Usage,
        format!(
            "only one option can read standard input (-), not both {}",
            names.join(" and ")
        ),
    ))
}

fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}
