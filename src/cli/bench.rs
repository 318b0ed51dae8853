//! `anteroom bench`: its subcommands.

use std::process::ExitCode;

use crate::bench::{
    self, ColdStartArgs, CompareArgs,
    advise::{self, AdviseArgs, TraceArgs},
};

/// Measures cold starts and evaluates the results.
#[derive(Debug, clap::Subcommand)]
pub(super) enum BenchCommand {
    ColdStart(Box<ColdStartArgs>),
    Compare(CompareArgs),
    Advise(Box<AdviseArgs>),
    Trace(TraceArgs),
}

/// Runs a subcommand.
pub(super) async fn run(command: BenchCommand) -> ExitCode {
    match command {
        BenchCommand::ColdStart(args) => bench::cold_start(*args).await,
        BenchCommand::Compare(args) => bench::compare(&args),
        BenchCommand::Advise(args) => advise::run(*args).await,
        BenchCommand::Trace(args) => advise::trace(&args),
    }
}
