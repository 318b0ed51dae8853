//! `anteroom bench`: its subcommands.

use std::process::ExitCode;

use crate::bench::{
    self, ColdStartArgs,
    advise::{self, AdviseArgs, TraceArgs},
};

/// Measures cold starts, and says what the measurements mean.
#[derive(Debug, clap::Subcommand)]
pub(super) enum BenchCommand {
    ColdStart(Box<ColdStartArgs>),
    /// What an idle time, a floor and bounds of holding would have cost, and how long requests would have waited.
    Advise(Box<AdviseArgs>),
    /// Print a made-up log of requests, to try `advise` with.
    Trace(TraceArgs),
}

/// Runs one.
pub(super) async fn run(command: BenchCommand) -> ExitCode {
    match command {
        BenchCommand::ColdStart(args) => bench::cold_start(*args).await,
        BenchCommand::Advise(args) => advise::run(*args).await,
        BenchCommand::Trace(args) => advise::trace(&args),
    }
}
