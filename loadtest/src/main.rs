//! Measures Anteroom against plain reverse proxies on this machine.
//!
//! One thread on one core runs both the clients and the model server behind the proxy; the contender under test has a
//! core of its own. `loadtest help` lists the scenarios:
//!
//! ```sh
//! cargo build --release && cargo run --release -p anteroom-loadtest -- warm --quick
//! ```

mod admin;
mod attacker;
mod backend;
mod census;
mod cli;
mod clients;
mod clock;
mod contender;
mod cores;
mod crowd;
mod descriptors;
mod error;
mod findings;
mod footprint;
mod generator;
mod http;
mod http2;
mod keda;
mod listen;
mod machine;
mod member;
mod multiplexed;
mod process;
mod procfs;
mod report;
mod rig;
mod scenario;
mod scene;
mod setup;
mod spread;
mod sse;
mod table;
mod target;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

fn main() -> ExitCode {
    match run(&cli::LoadtestCli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loadtest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &cli::LoadtestCli) -> Result<(), error::LoadtestError> {
    // A signal only sets the flag: the run then ends with an error, and drops stop the started processes.
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(|source| error::LoadtestError::io("handle signals", source))?;
    }
    let options = cli.scenario.options();
    if let Some(file) = &options.json {
        report::check(file)?;
    }
    let setup = setup::Setup::new(&cli.scenario, stop)?;
    let mut report = report::LoadtestReport::new(&setup);
    print!("{}", report.head());
    for run in scenario::of(&cli.scenario) {
        let findings = run(&setup)?;
        print!("{findings}");
        report.add(findings);
        // After each scenario, so that an interrupted run keeps the results so far.
        if let Some(file) = &options.json {
            report.write(file)?;
        }
    }
    let missed = report.missed();
    if missed > 0 {
        println!("\n{} missed", findings::plural(missed, "aim"));
    }
    Ok(())
}
