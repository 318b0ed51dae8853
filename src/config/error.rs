//! What is wrong with a configuration.

use std::io;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {name}: {source}")]
    Read {
        /// The file as it was given.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// The file was read and makes no sense.
    #[error("{name}: {message}")]
    Invalid {
        /// The file as it was given.
        name: String,
        /// What is wrong.
        message: String,
    },
}
