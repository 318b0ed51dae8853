//! Anteroom in a real cluster: etcd, the control plane of Kubernetes and KEDA as processes, nodes that run simulated
//! model servers, and end-to-end scenarios.
//!
//! `tests/cluster/run` builds the programs and runs this in separate namespaces; `tests/cluster/README.md` explains how
//! to write a scenario.

#![allow(clippy::unwrap_used, reason = "a scenario that cannot go on has failed")]
#![allow(dead_code, reason = "helpers are there before the scenarios that use them")]

mod anteroom;
mod api;
mod chart;
mod client;
mod cloud;
mod dns;
mod envoy;
mod in_cluster;
mod measure;
mod model;
mod node;
mod plane;
mod push_scaler;
mod record;
mod relay;
mod routes;
mod runner;
mod scenario;
mod scenarios;
mod serving;
mod shell;
mod wait;
mod world;

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use runner::ScenarioEntry;
use world::TestCluster;

/// Scenarios in a real cluster
#[derive(Parser)]
struct TestArgs {
    /// Run only scenarios whose name contains one of these
    filters: Vec<String>,

    /// List the scenarios without running any
    #[arg(long)]
    list: bool,

    /// Maximum number of scenarios that run in parallel
    #[arg(long, default_value_t = 2)]
    jobs: usize,

    /// Measure N cold starts for each way whose name contains one of the filters, and run no scenario
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "20")]
    measure: Option<usize>,

    /// Keep the cluster running after the scenarios, until a signal, for inspection
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = TestArgs::parse();
    let chosen = |entries: &[ScenarioEntry]| -> Vec<ScenarioEntry> {
        let wanted = |entry: &&ScenarioEntry| {
            arguments.filters.is_empty() || arguments.filters.iter().any(|filter| entry.name.contains(filter))
        };
        entries.iter().filter(wanted).copied().collect()
    };
    let (together, alone) = (chosen(scenarios::PARALLEL_SCENARIOS), chosen(scenarios::SERIAL_SCENARIOS));
    if arguments.list {
        together.iter().chain(&alone).for_each(|entry| println!("{}", entry.name));
        return ExitCode::SUCCESS;
    }
    let [Some(run), Some(bin)] = ["ANTEROOM_CLUSTER_RUN", "ANTEROOM_CLUSTER_BIN"].map(std::env::var_os)
    else {
        eprintln!("this needs a namespace of its own and the programs of a cluster: use tests/cluster/run");
        return ExitCode::FAILURE;
    };
    let (run, bin) = (PathBuf::from(run), PathBuf::from(bin));
    runner::print_panics();

    let [mut int, mut term] =
        [SignalKind::interrupt(), SignalKind::terminate()].map(|kind| signal(kind).unwrap());
    let work = async {
        let world = Arc::new(TestCluster::start(&run, &bin).await);
        let passed = match arguments.measure {
            Some(number) => {
                measure::run(world.clone(), number, &arguments.filters).await;
                true
            }
            None => runner::run(world.clone(), &together, &alone, arguments.jobs).await,
        };
        if arguments.keep {
            println!("kept; the logs are in {}", run.join("logs").display());
            std::future::pending::<()>().await;
        }
        passed
    };
    // This process is the init process of its PID namespace: all others end with it.
    let passed = tokio::select! {
        biased;
        _ = int.recv() => false,
        _ = term.recv() => false,
        passed = work => passed,
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
