//! The `anteroom` binary: arguments.

use std::process::ExitCode;

use anteroom::{
    guardian::{self, GuardianArgs},
    sim::{self, SimArgs},
};
use clap::Parser;

/// A waiting room in front of LLM serving that scales to zero without losing a request.
#[derive(Parser)]
#[command(version)]
enum Cli {
    /// Serve as a stand-in for vLLM, without a model
    Sim(SimArgs),
    /// Run a command, and end all that it started when standard input closes
    #[command(hide = true)]
    Guardian(GuardianArgs),
}

fn main() -> ExitCode {
    match Cli::parse() {
        Cli::Sim(args) => serve_sim(args),
        Cli::Guardian(args) => guardian::run(&args),
    }
}

#[tokio::main]
async fn serve_sim(args: SimArgs) -> ExitCode {
    match sim::run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("anteroom sim: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
