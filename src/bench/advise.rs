//! `anteroom bench advise`: what idle time, floor and bounds of holding would have cost, and how long requests would
//! have waited. A log of arrivals is replayed with start-ups as they were measured.
//!
//! ```text
//! arrivals (log or synthetic) ─┐
//! records (start-ups) ─────────┼─▶ grid: replay × settings × seeds ─▶ choice ─▶ text, JSON
//! arguments (settings, goal) ──┘
//! ```

mod args;
mod arrivals;
mod choice;
mod draw;
mod grid;
mod inputs;
mod json;
mod records;
mod replay;
mod synthetic;
mod text;

use std::{io::Write as _, process::ExitCode};

use thiserror::Error;

pub use args::{AdviseArgs, TraceArgs};
use args::{Budget, ScaledBy, Synthetic, WaitGoal};
use choice::{Candidate, Choice, Goal, Grid, MONTH};
use grid::{Figures, Load};
use inputs::Inputs;
use replay::Settings;

/// Why there is no advice.
#[derive(Debug, Error)]
enum AdviseError {
    /// A file, an answer, or what is in it.
    #[error("{0}")]
    Input(String),
    /// Arguments that do not go together.
    #[error("{0}")]
    Arguments(String),
    /// The JSON could not be written.
    #[error("{0}: {1}")]
    Output(String, std::io::Error),
}

/// What was found out, for who writes it down.
struct Advice<'a> {
    args: &'a AdviseArgs,
    inputs: &'a Inputs,
    load: &'a Load,
    candidates: Vec<Candidate>,
    /// One replica that is always up.
    always_on: Figures,
    goal: Option<Goal>,
    choice: Option<Choice>,
    seeds: Vec<u64>,
}

/// Advises.
pub async fn run(args: AdviseArgs) -> ExitCode {
    match advise(&args).await {
        Ok((text, reached)) => {
            // A reader that has gone wants no more.
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
            if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Prints a made-up log.
pub fn trace(args: &TraceArgs) -> ExitCode {
    let Synthetic::OfficeWeek = args.name;
    let _ = std::io::stdout().lock().write_all(synthetic::office_week(args.seed).to_csv().as_bytes());
    ExitCode::SUCCESS
}

/// What is to be printed, and whether no goal has been missed.
async fn advise(args: &AdviseArgs) -> Result<(String, bool), AdviseError> {
    let settings = grid(args)?.settings();
    let goal = goal(args)?;
    let inputs = Inputs::read(args).await?;
    let load = inputs.load(args.gpus);
    let seeds: Vec<u64> =
        (args.seed..).take(if load.is_certain() { 1 } else { args.seeds as usize }).collect();
    let candidates = choice::candidates(&load, &settings, &seeds);
    // The bounds are those of the first candidate: a floor is about idle time, and there is none.
    let always_on = Settings { floor: 1, idle: u64::MAX, ..settings[0] };
    let always_on = load.figures(&always_on, &seeds);
    let month = MONTH * 3.6e6 / load.window.max(1) as f64;
    let choice = goal.and_then(|goal| choice::choose(&candidates, goal, args.max_lost, month));
    let advice = Advice { args, inputs: &inputs, load: &load, candidates, always_on, goal, choice, seeds };
    let reached = !matches!(choice, Some(Choice::Closest(_)));
    let text = match &args.json {
        Some(path) if path.as_os_str() == "-" => json::of(&advice),
        Some(path) => {
            std::fs::write(path, json::of(&advice))
                .map_err(|error| AdviseError::Output(path.display().to_string(), error))?;
            text::of(&advice)
        }
        None => text::of(&advice),
    };
    Ok((text, reached))
}

/// What is tried.
fn grid(args: &AdviseArgs) -> Result<Grid, AdviseError> {
    let told = |text: String| Err(AdviseError::Arguments(text));
    let ms = |period: &crate::domain::Period| u64::try_from(period.get().as_millis()).unwrap_or(u64::MAX);
    let is_keda = args.scale_by == ScaledBy::Keda;
    let mut idle: Vec<u64> = args.idle.iter().map(ms).collect();
    idle.sort_unstable();
    idle.dedup();
    let linger = ms(&args.linger);
    if let Some(short) = idle.first().filter(|idle| is_keda && **idle < linger) {
        return told(format!(
            "--idle {}: with KEDA demand lasts for the linger ({}) after the last request, so the idle time cannot be \
             shorter; leave it out, or say a --linger, which must be twice the pollingInterval",
            text::period(*short),
            args.linger
        ));
    }
    if is_keda && ms(&args.polling_interval).saturating_mul(2) > linger {
        return told(format!(
            "--linger {} is less than two of --polling-interval {}: a poll could fall between two requests, and KEDA would \
             scale to zero under a trickle of them, which is not replayed",
            args.linger, args.polling_interval
        ));
    }
    let default = if is_keda { vec![0, 1, 2] } else { vec![0] };
    let mut floors = if args.floor.is_empty() { default } else { args.floor.clone() };
    floors.sort_unstable();
    floors.dedup();
    if let Some(floor) = floors.iter().find(|floor| !is_keda && **floor > 0) {
        return told(format!(
            "--floor {floor}: a floor is KEDA's minReplicaCount; without KEDA the last replica always goes"
        ));
    }
    let max_replicas = if is_keda { args.max_replicas } else { 1 };
    if let Some(floor) = floors.iter().find(|floor| **floor > max_replicas) {
        return told(format!("--floor {floor} is above --max-replicas {max_replicas}"));
    }
    let first = |list: &[u32]| list.first().copied().unwrap_or(1);
    Ok(Grid {
        base: Settings {
            floor: 0,
            max_replicas,
            idle: 0,
            poll: if is_keda { ms(&args.polling_interval).max(1) } else { 1 },
            concurrency: first(&args.concurrency),
            hold_requests: first(&args.hold_max_requests) as usize,
            hold: args.hold_timeout.first().map_or(0, ms),
            target: args.target,
        },
        floors,
        idle,
        concurrency: args.concurrency.clone(),
        hold: args.hold_timeout.iter().map(ms).collect(),
        hold_requests: args.hold_max_requests.iter().map(|count| *count as usize).collect(),
    })
}

/// What is to be reached.
fn goal(args: &AdviseArgs) -> Result<Option<Goal>, AdviseError> {
    if let Some(WaitGoal(quantile, within)) = args.goal {
        return Ok(Some(Goal::Wait(quantile, u64::try_from(within.get().as_millis()).unwrap_or(u64::MAX))));
    }
    let Some(Budget { amount, is_hours }) = args.budget else { return Ok(None) };
    match (is_hours, args.gpu_hour_price) {
        (true, _) => Ok(Some(Goal::GpuHours(amount))),
        (false, Some(price)) if price > 0.0 => Ok(Some(Goal::GpuHours(amount / price))),
        (false, _) => Err(AdviseError::Arguments(
            "a --budget of money needs the --gpu-hour-price; 300h/month is one of GPU hours".into(),
        )),
    }
}

// === impl Advice ===

impl Advice<'_> {
    /// How many times the window goes into a month.
    fn month(&self) -> f64 {
        MONTH * 3.6e6 / self.load.window.max(1) as f64
    }

    /// How many days the window has.
    fn days(&self) -> f64 {
        self.load.window.max(1) as f64 / 8.64e7
    }

    /// What is spared against one replica that is always up; negative: more.
    fn saved(&self, figures: &Figures) -> f64 {
        1.0 - figures.gpu_hours.middle / self.always_on.gpu_hours.middle.max(f64::MIN_POSITIVE)
    }
}

#[cfg(test)]
mod tests;
