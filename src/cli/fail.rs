//! The end of a command that failed.

use std::process::ExitCode;

/// Prints the error and returns the exit code of a failure.
pub(super) fn fail(report: String) -> ExitCode {
    eprintln!("{}", report.trim_end());
    ExitCode::FAILURE
}
