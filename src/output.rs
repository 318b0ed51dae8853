//! Output files of commands.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use thiserror::Error;

/// A file opened before the work starts, so that an unwritable path fails early. Keeps its content until written.
pub(crate) struct OutputFile {
    file: File,
    path: PathBuf,
}

/// Error of opening or writing an output file.
#[derive(Debug, Error)]
#[error("cannot write {}: {source}; choose a writable file in an existing directory", .path.display())]
pub(crate) struct OutputError {
    path: PathBuf,
    source: io::Error,
}

// === impl OutputFile ===

impl OutputFile {
    /// Opens or creates the file.
    pub(crate) fn open(path: &Path) -> Result<Self, OutputError> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|source| OutputError { path: path.to_owned(), source })?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Replaces the content.
    pub(crate) fn write(&mut self, text: &[u8]) -> Result<(), OutputError> {
        // A pipe or a terminal cannot be truncated.
        let truncate = |file: &File| if file.metadata()?.is_file() { file.set_len(0) } else { Ok(()) };
        let written = truncate(&self.file).and_then(|()| self.file.write_all(text));
        written.map_err(|source| OutputError { path: self.path.clone(), source })
    }

    /// Replaces the content with a value as pretty-printed JSON.
    pub(crate) fn write_json(&mut self, value: &impl serde::Serialize) -> Result<(), OutputError> {
        let text = serde_json::to_vec_pretty(value).map(|mut text| {
            text.push(b'\n');
            text
        });
        match text {
            Ok(text) => self.write(&text),
            Err(error) => Err(OutputError { path: self.path.clone(), source: error.into() }),
        }
    }
}
