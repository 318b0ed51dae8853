//! The `anteroom` binary: arguments.

use anteroom::sim::{self, SimArgs};
use clap::Parser;
use std::process::ExitCode;

/// A waiting room in front of LLM serving that scales to zero without losing a request.
#[derive(Parser)]
#[command(version)]
enum Cli {
    /// Serve as a stand-in for vLLM, without a model
    Sim(SimArgs),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli::Sim(args) = Cli::parse();
    match sim::run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("anteroom sim: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
