//! Errors that end a run early.

use std::io;
use std::path::PathBuf;

/// Error that ends the run: a measurement that cannot be trusted is discarded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadtestError {
    #[error("cannot find {program}: {remedy}")]
    Missing { program: PathBuf, remedy: String },

    #[error("{contender} did not start: {why}{}", below(log))]
    Start { contender: &'static str, why: String, log: String },

    #[error("{contender} ended while it was measured: {why}{}", below(log))]
    Ended { contender: &'static str, why: String, log: String },

    #[error(
        "{contender} with {connections} connection(s): {errors} wrong of {requests} answers, the first: {first}"
    )]
    Answers { contender: &'static str, connections: usize, errors: u64, requests: u64, first: String },

    #[error("{contender} with {connections} connection(s): {missing} request(s) never answered")]
    Unanswered { contender: &'static str, connections: usize, missing: usize },

    #[error("{contender} with {streams} streams: {missing} event(s) did not arrive in time")]
    Events { contender: &'static str, streams: usize, missing: u64 },

    #[error("two cores are required, but the process may use only {0}")]
    Cores(usize),

    #[error("this scenario measures anteroom: add it to --contenders")]
    NotMeasured,

    #[error("cargo build of anteroom: {0}; pass the path of a built one with --anteroom")]
    Build(std::process::ExitStatus),

    #[error("the {scenario} scenario was stopped: {why}")]
    Unsound { scenario: &'static str, why: String },

    #[error("anteroom: {0}")]
    Wrong(String),

    #[error("interrupted")]
    Interrupted,

    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
}

// === impl LoadtestError ===

impl LoadtestError {
    /// Creates the error for an observation that invalidates the figures of the scenario.
    pub(crate) fn unsound(scenario: &'static str, why: impl Into<String>) -> Self {
        Self::Unsound { scenario, why: why.into() }
    }

    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }
}

fn below(log: &str) -> String {
    if log.is_empty() { " (no output)".into() } else { format!("\n{log}") }
}
