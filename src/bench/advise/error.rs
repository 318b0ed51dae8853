//! Errors of `bench advise`.

use thiserror::Error;

/// Error of `bench advise`.
#[derive(Debug, Error)]
pub(super) enum AdviseError {
    /// A file or an admin API cannot be read or has invalid content.
    #[error("{0}")]
    Input(String),
    /// Conflicting arguments.
    #[error("{0}")]
    Arguments(String),
    /// The JSON output cannot be written.
    #[error("{0}: {1}")]
    Output(String, std::io::Error),
}
