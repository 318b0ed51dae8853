//! `anteroom bench advise`: estimates cost and waiting times of idle timeouts, replica floors and hold limits by replaying
//! a request log with measured start-up times.
//!
//! ```text
//! arrivals (log or synthetic) ─┐
//! records (start-ups) ─────────┼─▶ grid: replay × settings × seeds ─▶ choice ─▶ text, JSON
//! arguments (settings, goal) ──┘
//! ```

mod advice;
mod args;
mod arrivals;
mod choice;
mod draw;
mod error;
mod grid;
mod inputs;
mod json;
mod records;
mod replay;
mod synthetic;
mod text;

use std::process::ExitCode;

use advice::Advice;
pub use args::{AdviseArgs, TraceArgs};
use args::{CostBudget, ScaledBy, SyntheticLog, WaitGoal};
use choice::{Choice, Goal, SettingsGrid};
use error::AdviseError;
use inputs::AdviseInputs;
use replay::ReplaySettings;

use crate::terminal::{print, say};

/// Runs `bench advise`.
pub async fn run(args: AdviseArgs) -> ExitCode {
    match advise(&args).await {
        Ok((text, reached)) => {
            text.lines().for_each(say);
            if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs `bench trace`.
pub fn trace(args: &TraceArgs) -> ExitCode {
    let SyntheticLog::OfficeWeek = args.name;
    print(&synthetic::office_week(args.seed).to_csv());
    ExitCode::SUCCESS
}

/// Returns the output, and `false` if no setting reaches the goal.
async fn advise(args: &AdviseArgs) -> Result<(String, bool), AdviseError> {
    let settings = settings_grid(args)?.settings();
    let goal = goal(args)?;
    let inputs = AdviseInputs::read(args).await?;
    let load = inputs.load(args.gpus);
    let seeds: Vec<u64> =
        (args.seed..).take(if load.is_deterministic() { 1 } else { args.seeds as usize }).collect();
    let candidates = choice::candidates(&load, &settings, &seeds);
    // The baseline has the hold limits of the first candidate; `idle` is unused with a floor.
    let always_on = ReplaySettings { floor: 1, idle: u64::MAX, ..settings[0] };
    let always_on = load.figures(&always_on, &seeds);
    let mut advice =
        Advice { args, inputs: &inputs, load: &load, candidates, always_on, goal, choice: None, seeds };
    let windows_per_month = advice.windows_per_month();
    let choice =
        goal.and_then(|goal| choice::choose(&advice.candidates, goal, args.max_lost, windows_per_month));
    advice.choice = choice;
    let reached = !matches!(choice, Some(Choice::Closest(_)));
    let text = match &args.json {
        Some(path) if path.as_os_str() == "-" => json::render(&advice),
        Some(path) => {
            std::fs::write(path, json::render(&advice))
                .map_err(|error| AdviseError::Output(path.display().to_string(), error))?;
            text::render(&advice)
        }
        None => text::render(&advice),
    };
    Ok((text, reached))
}

/// Builds the grid of settings to replay.
fn settings_grid(args: &AdviseArgs) -> Result<SettingsGrid, AdviseError> {
    let invalid = |text: String| Err(AdviseError::Arguments(text));
    let ms = |period: &crate::domain::Period| u64::try_from(period.get().as_millis()).unwrap_or(u64::MAX);
    let is_keda = args.scale_by == ScaledBy::Keda;
    let mut idle: Vec<u64> = args.idle.iter().map(ms).collect();
    idle.sort_unstable();
    idle.dedup();
    let linger = ms(&args.linger);
    if let Some(short) = idle.first().filter(|idle| is_keda && **idle < linger) {
        return invalid(format!(
            "--idle {} is shorter than --linger {}: with KEDA, demand lasts for the linger after the last request; raise \
             --idle or reduce --linger, which must be at least twice the pollingInterval",
            text::period(*short),
            args.linger
        ));
    }
    if is_keda && ms(&args.polling_interval).saturating_mul(2) > linger {
        return invalid(format!(
            "--linger {} is less than twice --polling-interval {}: KEDA could scale to zero between two requests, which the \
             replay does not model",
            args.linger, args.polling_interval
        ));
    }
    let default = if is_keda { vec![0, 1, 2] } else { vec![0] };
    let mut floors = if args.floor.is_empty() { default } else { args.floor.clone() };
    floors.sort_unstable();
    floors.dedup();
    if let Some(floor) = floors.iter().find(|floor| !is_keda && **floor > 0) {
        return invalid(format!(
            "--floor {floor}: a floor needs KEDA (minReplicaCount); without KEDA the last replica always stops"
        ));
    }
    let max_replicas = if is_keda { args.max_replicas } else { 1 };
    if let Some(floor) = floors.iter().find(|floor| **floor > max_replicas) {
        return invalid(format!("--floor {floor} is above --max-replicas {max_replicas}"));
    }
    let first = |list: &[u32]| list.first().copied().unwrap_or(1);
    Ok(SettingsGrid {
        base: ReplaySettings {
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

/// Builds the goal from `--goal` or `--budget`.
fn goal(args: &AdviseArgs) -> Result<Option<Goal>, AdviseError> {
    if let Some(WaitGoal(quantile, within)) = args.goal {
        return Ok(Some(Goal::Wait(quantile, u64::try_from(within.get().as_millis()).unwrap_or(u64::MAX))));
    }
    let Some(CostBudget { amount, is_hours }) = args.budget else { return Ok(None) };
    match (is_hours, args.gpu_hour_price) {
        (true, _) => Ok(Some(Goal::GpuHours(amount))),
        (false, Some(price)) if price > 0.0 => Ok(Some(Goal::GpuHours(amount / price))),
        (false, _) => Err(AdviseError::Arguments(
            "a --budget in money needs --gpu-hour-price; for GPU hours, write 300h/month".into(),
        )),
    }
}

#[cfg(test)]
mod tests;
