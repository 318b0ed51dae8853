//! A file that a command writes its results to.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Opened before anything is done, so that nothing is done in vain. What is in it stays until there is something new.
pub(crate) struct OutputFile {
    file: File,
    path: PathBuf,
}

/// It cannot be had.
#[derive(Debug, Error)]
#[error("cannot write {}: {source}; give a file in a folder that is there", .path.display())]
pub(crate) struct OutputError {
    path: PathBuf,
    source: io::Error,
}

// === impl OutputFile ===

impl OutputFile {
    /// Opens or makes it.
    ///
    /// # Errors
    /// When that is not allowed.
    pub(crate) fn open(path: &Path) -> Result<Self, OutputError> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|source| OutputError { path: path.to_owned(), source })?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Puts this in place of what was in it.
    ///
    /// # Errors
    /// When there is no room, or nobody reads it any more.
    pub(crate) fn write(&mut self, text: &[u8]) -> Result<(), OutputError> {
        // A pipe or a terminal has no length.
        let empty = |file: &File| if file.metadata()?.is_file() { file.set_len(0) } else { Ok(()) };
        let written = empty(&self.file).and_then(|()| self.file.write_all(text));
        written.map_err(|source| OutputError { path: self.path.clone(), source })
    }

    /// Puts a value in place of what was in it, as JSON for people to read, too.
    ///
    /// # Errors
    /// As with [`Self::write`].
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
