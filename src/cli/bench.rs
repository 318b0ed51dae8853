//! `anteroom bench`: its subcommands.

use std::process::ExitCode;

/// Measures cold starts, and says what the measurements mean.
#[derive(Debug, clap::Subcommand)]
pub(super) enum BenchCommand {}

/// Runs one.
pub(super) async fn run(command: BenchCommand) -> ExitCode {
    match command {}
}
