//! Anteroom in a real cluster: etcd, the control plane of Kubernetes and KEDA as processes, nodes that run real model
//! servers' stand-ins, and scenarios that go through all of it.
//!
//! `tests/cluster/run` builds what is needed and runs this in namespaces of its own; `tests/cluster/README.md` says how
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

use runner::Entry;
use world::World;

/// Scenarios in a real cluster
#[derive(Parser)]
struct Arguments {
    /// Run only scenarios whose name has one of these in it
    filters: Vec<String>,

    /// Say which there are, and run none
    #[arg(long)]
    list: bool,

    /// How many run at the same time, of those that may
    #[arg(long, default_value_t = 2)]
    jobs: usize,

    /// Measure so many cold starts of each way that has one of the filters in its name, and run no scenario
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "20")]
    measure: Option<usize>,

    /// After the scenarios leave the cluster as it is, until a signal: to look at it
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let chosen = |entries: &[Entry]| -> Vec<Entry> {
        let wanted = |entry: &&Entry| {
            arguments.filters.is_empty() || arguments.filters.iter().any(|filter| entry.name.contains(filter))
        };
        entries.iter().filter(wanted).copied().collect()
    };
    let (together, alone) = (chosen(scenarios::TOGETHER), chosen(scenarios::ALONE));
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
    runner::tell_panics();

    let [mut int, mut term] =
        [SignalKind::interrupt(), SignalKind::terminate()].map(|kind| signal(kind).unwrap());
    let work = async {
        let world = Arc::new(World::start(&run, &bin).await);
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
    // This process is the first of its namespace: whatever it leaves behind ends with it.
    let passed = tokio::select! {
        biased;
        _ = int.recv() => false,
        _ = term.recv() => false,
        passed = work => passed,
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
