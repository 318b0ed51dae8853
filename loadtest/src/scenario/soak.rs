//! The soak scenario: half an hour of cold starts, overflows, streams, disconnects, large bodies and reloads, with
//! gaps in which the model server is stopped. None of it may leak resources.

mod account;
mod client;
mod findings;

use std::collections::VecDeque;
use std::fs;
use std::time::Duration;

use tokio::runtime;
use tokio::task::JoinSet;
use tokio::time::sleep;

use account::RouteTotals;
use client::{ClientKind, ClientOutcome, MODEL, send};
use findings::{SoakCycle, SoakResults, SoakTally};

use crate::admin;
use crate::census::ProcessStats;
use crate::clock::Instant;
use crate::contender::StartedContender;
use crate::error::LoadtestError;
use crate::findings::Findings;
use crate::procfs::Meter;
use crate::setup::Setup;

/// Queue bound; further requests are rejected.
const SOAK_QUEUE_BOUND: usize = 32;
const OVERFLOW_REQUESTS: usize = 100;
/// Closed-loop clients while the model server is up.
const SOAK_CLIENTS: usize = 8;
const TIDY_REQUESTS: usize = 100;
/// Time for the model server to be stopped.
const SERVER_STOP_TIMEOUT: Duration = Duration::from_secs(20);

struct SoakRun {
    running: StartedContender,
    tally: SoakTally,
    begin: Instant,
    quick: bool,
}

pub(crate) fn run(setup: &Setup) -> Result<Findings, LoadtestError> {
    let anteroom = setup.anteroom()?;
    let program = anteroom.program().map(|program| program.display().to_string()).unwrap_or_default();
    let nobody = std::net::SocketAddr::from(([127, 0, 0, 1], 9));
    let configuration = configuration(&program, 0);
    let mut running = anteroom.start_with(&configuration, nobody, setup.cores)?;
    admin::await_ready(&mut running, setup)?;
    let duration = Duration::from_secs(setup.seconds(35, 1800).into());
    let meter = Meter { cores: setup.cores, contender: running.process.as_ref().map(|process| process.id()) };
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| LoadtestError::io("make a runtime", error))?;
    let failed = |error| LoadtestError::io("read the times of processes", error);
    let before = meter.read().map_err(failed)?;
    let mut stage =
        SoakRun { running, tally: SoakTally::default(), begin: Instant::now(), quick: setup.quick };
    let mut cycles: Vec<SoakCycle> = Vec::new();
    let soaked = runtime.block_on(async {
        while stage.begin.elapsed() < duration {
            if cycles.len().is_multiple_of(5) {
                eprintln!(
                    "soak: cycle {}, {} s of {duration:?}",
                    cycles.len() + 1,
                    stage.begin.elapsed().as_secs()
                );
            }
            let cycle = stage.cycle(setup, cycles.len()).await?;
            cycles.push(cycle);
        }
        Ok(())
    });
    soaked.map_err(|error| stage.running.explain("anteroom", error))?;
    let elapsed = stage.begin.elapsed().as_secs_f64();
    let account = stage.account()?;
    let spent = before.until(&meter.read().map_err(failed)?);
    let others = spent.others.as_secs_f64() / elapsed;
    Ok(SoakResults { elapsed, cycles, tally: stage.tally, account, others }.findings())
}

/// Returns the configuration. `change` makes each reloaded one different.
fn configuration(program: &str, change: usize) -> String {
    format!(
        "listen: 127.0.0.1:{{listen}}\nadmin: 127.0.0.1:{{admin}}\nworkers: 1\nhistory: {{ requests: 50 }}\nroutes:\n  \
         - name: {MODEL}\n    match: {{ models: [{MODEL}] }}\n    hold: {{ maxRequests: {SOAK_QUEUE_BOUND}, maxBytes: {}MiB }}\n    \
         concurrency: {{ max: 16, rampStart: 16 }}\n    target:\n      process:\n        command:\n          - \"{program}\"\n          \
         - sim\n          - --model={MODEL}\n          - --port={{port}}\n          - --load-time=300ms\n          \
         - --time-to-first-token=5ms\n          - --inter-token-time=2ms\n          - --tokens=16\n        \
         idleTimeout: 300ms\n        stopTimeout: 2s\n",
        100 + change % 100
    )
}

// === impl SoakTally ===

impl SoakTally {
    fn add(&mut self, outcome: ClientOutcome) -> Result<(), String> {
        self.sent += 1;
        match outcome {
            ClientOutcome::Answered => self.answered += 1,
            ClientOutcome::Full => self.full += 1,
            ClientOutcome::Left => self.left += 1,
            ClientOutcome::Wrong(why) => return Err(why),
        }
        Ok(())
    }
}

// === impl SoakRun ===

impl SoakRun {
    fn unsound(&self, why: String) -> LoadtestError {
        let log = self.running.process.as_ref().map(|process| process.log()).unwrap_or_default();
        LoadtestError::unsound("soak", format!("{why}\n{log}"))
    }

    fn account(&self) -> Result<RouteTotals, LoadtestError> {
        RouteTotals::of(self.running.admin).map_err(|error| LoadtestError::io("read the metrics", error))
    }

    fn census(&self) -> Result<ProcessStats, LoadtestError> {
        let pid = self.running.process.as_ref().map(|process| process.id());
        ProcessStats::of(pid.unwrap_or_else(std::process::id))
            .map_err(|error| LoadtestError::io("look at anteroom", error))
    }

    /// Runs a gap, a cold start, a crowd and an interval of mixed traffic, then takes the census.
    async fn cycle(&mut self, setup: &Setup, number: usize) -> Result<SoakCycle, LoadtestError> {
        let before = self.tally.sent;
        sleep(self.gap(number)).await;
        let proxy = self.running.address;
        let begin = Instant::now();
        let first = tokio::spawn(async move { (send(proxy, ClientKind::Plain).await, begin.elapsed()) });
        // Every other cycle sends more requests than the queue holds.
        let crowd = if number % 2 == 1 { OVERFLOW_REQUESTS } else { SOAK_QUEUE_BOUND / 2 };
        sleep(Duration::from_millis(20)).await;
        let mut held = JoinSet::new();
        for who in 0..crowd {
            let kind = match who % 8 {
                0 => ClientKind::LeavesQueue,
                1 | 2 => ClientKind::Streamed,
                3 => ClientKind::LeavesAnswer,
                _ => ClientKind::Plain,
            };
            held.spawn(send(proxy, kind));
        }
        let (outcome, took) = first.await.map_err(|error| self.unsound(error.to_string()))?;
        let first_served = outcome == ClientOutcome::Answered;
        self.tally.add(outcome).map_err(|why| self.unsound(why))?;
        while let Some(outcome) = held.join_next().await {
            let outcome = outcome.map_err(|error| self.unsound(error.to_string()))?;
            self.tally.add(outcome).map_err(|why| self.unsound(why))?;
        }
        self.run_mixed_traffic(setup, number).await?;
        let account = self.await_quiet(setup).await?;
        self.settle_allocator().await?;
        let SoakTally { sent, answered, full, left, .. } = self.tally;
        Ok(SoakCycle {
            at_s: self.begin.elapsed().as_secs_f64(),
            requests: sent - before,
            first_ms: took.as_secs_f64() * 1e3,
            first_served,
            missing: account.count_discrepancies(sent, answered, full, left),
            census: self.census()?,
        })
    }

    /// Returns the length of a gap: varied, and longer in a full run.
    fn gap(&self, number: usize) -> Duration {
        let most = if self.quick { 400 } else { 15_000 };
        Duration::from_millis(100 + (number as u64 * 7919) % most)
    }

    /// Runs all kinds of requests at once, with a reload in the middle.
    async fn run_mixed_traffic(&mut self, setup: &Setup, number: usize) -> Result<(), LoadtestError> {
        let duration = Duration::from_millis(if self.quick { 1500 } else { 8000 });
        let proxy = self.running.address;
        let begin = Instant::now();
        let mut under_way = JoinSet::new();
        // Kinds of requests that the clients send next, in turn.
        let mut next: VecDeque<ClientKind> = [
            ClientKind::Plain,
            ClientKind::Streamed,
            ClientKind::Plain,
            ClientKind::LeavesAnswer,
            ClientKind::Plain,
            ClientKind::Big,
            ClientKind::Streamed,
            ClientKind::Plain,
            ClientKind::Plain,
            ClientKind::LeavesQueue,
        ]
        .into();
        let mut reloaded = false;
        loop {
            setup.check_stop()?;
            while under_way.len() < SOAK_CLIENTS && begin.elapsed() < duration {
                next.rotate_left(1);
                under_way.spawn(send(proxy, next[0]));
            }
            if !reloaded && begin.elapsed() > duration / 2 {
                self.reload(number + 1)?;
                reloaded = true;
            }
            let Some(outcome) = under_way.join_next().await else { return Ok(()) };
            let outcome = outcome.map_err(|error| self.unsound(error.to_string()))?;
            self.tally.add(outcome).map_err(|why| self.unsound(why))?;
        }
    }

    /// Replaces the configuration file, which Anteroom watches.
    fn reload(&mut self, change: usize) -> Result<(), LoadtestError> {
        let Some(file) = self.running.configuration() else { return Ok(()) };
        let failed = |error| LoadtestError::io(format!("change {}", file.display()), error);
        let text = fs::read_to_string(file).map_err(failed)?;
        let most = |change: usize| format!("maxBytes: {}MiB", 100 + change % 100);
        let changed = text.replace(&most(change - 1), &most(change));
        // Replaced atomically, as by editors and Kubernetes.
        let beside = file.with_extension("new");
        fs::write(&beside, changed).map_err(failed)?;
        fs::rename(&beside, file).map_err(failed)?;
        self.tally.reloads += 1;
        Ok(())
    }

    /// Sends requests that start nothing. The allocator returns freed pages with a delay, and only while its thread
    /// has work; without these requests, the memory would be measured before or after that by chance.
    async fn settle_allocator(&self) -> Result<(), LoadtestError> {
        for _ in 0..TIDY_REQUESTS {
            sleep(Duration::from_millis(5)).await;
            match admin::get(self.running.address, "/v1/models") {
                Ok((200, _)) => {}
                Ok((status, _)) => return Err(self.unsound(format!("GET /v1/models returned {status}"))),
                Err(error) => return Err(LoadtestError::io("ask for the models", error)),
            }
        }
        Ok(())
    }

    /// Waits until no request is in flight and the model server has been stopped.
    async fn await_quiet(&self, setup: &Setup) -> Result<RouteTotals, LoadtestError> {
        let begin = Instant::now();
        loop {
            setup.check_stop()?;
            let account = self.account()?;
            let census = self.census()?;
            if account.is_quiet() && census.descendants == 0 {
                return Ok(account);
            }
            if begin.elapsed() > SERVER_STOP_TIMEOUT {
                let why = format!(
                    "requests are still in flight or the model server is still running: {account:?}, {census:?}"
                );
                return Err(self.unsound(why));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_keeps_the_launcher_port() {
        let text = configuration("/bin/anteroom", 7);
        assert!(text.contains("--port={port}") && text.contains("\"/bin/anteroom\""));
        assert!(text.contains("maxBytes: 107MiB"), "{text}");
    }
}
