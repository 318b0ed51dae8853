//! Runs scenarios: those that can share the cluster several at a time, then the disruptive ones one by one.

use std::{panic, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    task::{JoinError, JoinSet, spawn_blocking},
    time::{Instant, timeout},
};

use crate::{scenario::Scenario, world::TestCluster};

/// Timeout of a scenario, well above the duration of any.
const SCENARIO_TIMEOUT: Duration = Duration::from_secs(300);

/// Scenario with its name.
#[derive(Clone, Copy)]
pub(crate) struct ScenarioEntry {
    pub(crate) name: &'static str,
    pub(crate) run: fn(Scenario) -> Pin<Box<dyn Future<Output = ()>>>,
}

/// Result of a scenario.
struct ScenarioResult {
    name: &'static str,
    took: Duration,
    failed: bool,
}

/// Runs all scenarios and returns true if all passed. The last line has the format of other test runners.
pub(crate) async fn run(
    world: Arc<TestCluster>,
    together: &[ScenarioEntry],
    alone: &[ScenarioEntry],
    jobs: usize,
) -> bool {
    let mut ended = Vec::new();
    let mut running = JoinSet::new();
    for &entry in together {
        if running.len() == jobs {
            ended.extend(running.join_next().await.map(Result::unwrap));
        }
        running.spawn(one(world.clone(), entry));
    }
    ended.extend(running.join_all().await);
    for &entry in alone {
        ended.push(one(world.clone(), entry).await);
    }
    let failed: Vec<_> = ended.iter().filter(|one| one.failed).map(|one| one.name).collect();
    let longest = ended.iter().max_by_key(|one| one.took);
    if let Some(longest) = longest {
        println!("the longest: {}, {:.1} s", longest.name, longest.took.as_secs_f64());
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!("{} passed, {} failed", ended.len() - failed.len(), failed.len());
    failed.is_empty()
}

async fn one(world: Arc<TestCluster>, entry: ScenarioEntry) -> ScenarioResult {
    let began = Instant::now();
    let scenario = Scenario::new(world, entry.name).await;
    // On a separate thread, so that its futures need not be `Send`.
    let (runtime, its) = (Handle::current(), scenario.clone());
    let work =
        spawn_blocking(move || runtime.block_on(async { timeout(SCENARIO_TIMEOUT, (entry.run)(its)).await }));
    let failure = match work.await {
        Ok(Ok(())) => None,
        Ok(Err(_)) => Some(format!("not over within {SCENARIO_TIMEOUT:?}")),
        Err(error) => Some(words(error)),
    };
    let took = began.elapsed();
    match &failure {
        None => println!("test {} ... ok ({:.1} s)", entry.name, took.as_secs_f64()),
        Some(failure) => {
            let report = scenario.report().await;
            println!("test {} ... FAILED ({:.1} s)\n{failure}\n{report}", entry.name, took.as_secs_f64());
        }
    }
    scenario.clean_up().await;
    ScenarioResult { name: entry.name, took, failed: failure.is_some() }
}

fn words(error: JoinError) -> String {
    let Ok(panic) = error.try_into_panic() else { return "it was cancelled".into() };
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned())).unwrap_or_default()
}

/// Prints panics immediately, so that they appear even if the rest hangs.
pub(crate) fn print_panics() {
    panic::set_hook(Box::new(|info| eprintln!("{info}")));
}
