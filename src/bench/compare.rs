//! `anteroom bench compare`: which phases of two runs differ, by how much, and whether that is noise.

mod differ;
#[cfg(test)]
mod tests;
mod text;

use std::{path::PathBuf, process::ExitCode};

use self::differ::{Comparison, Limits};
use super::results::Run;
use crate::{
    domain::Period,
    terminal::{Paint, say},
};

/// Compares two runs: which phases changed, by how much, and whether that is noise.
///
/// A phase has changed if the two-sided test of Mann and Whitney says so at --alpha, corrected by Holm over everything
/// that is compared, and if its median differs by at least --threshold and --floor. Exits 0 if nothing became slower
/// and cold starts do not fail more often, 1 if something did, and 2 if there is nothing to compare.
#[derive(Clone, Debug, clap::Args)]
pub struct CompareArgs {
    /// The run before, as `bench cold-start --json` wrote it
    #[arg(value_name = "BEFORE.json")]
    pub before: PathBuf,

    /// The run after
    #[arg(value_name = "AFTER.json")]
    pub after: PathBuf,

    /// How often it may see a difference, somewhere among all phases, where there is none
    #[arg(long, value_name = "P", default_value = "0.05", value_parser = alpha)]
    pub alpha: f64,

    /// How much a median must differ, of the median before
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = percent)]
    pub threshold: f64,

    /// And how much at least: what nobody would notice is no regression
    #[arg(long, value_name = "DURATION", default_value = "10ms")]
    pub floor: Period,

    /// Print the comparison as JSON
    #[arg(long)]
    pub json: bool,
}

fn alpha(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(alpha) if alpha > 0.0 && alpha < 1.0 => Ok(alpha),
        _ => Err("write a number between 0 and 1, such as 0.05".to_owned()),
    }
}

/// A share, from a number of percent.
fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').trim().parse::<f64>() {
        Ok(percent) if percent >= 0.0 && percent.is_finite() => Ok(percent / 100.0),
        _ => Err("write a number of percent, such as 5%".to_owned()),
    }
}

/// Compares, and tells what it found.
pub fn run(args: &CompareArgs) -> ExitCode {
    let limits = Limits {
        alpha: args.alpha,
        threshold: args.threshold,
        floor_ms: args.floor.get().as_secs_f64() * 1e3,
    };
    let both = Run::read(&args.before).and_then(|before| Ok((before, Run::read(&args.after)?)));
    let comparison = match both.and_then(|(before, after)| Comparison::of(&before, &after, limits)) {
        Ok(comparison) => comparison,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    if args.json {
        match serde_json::to_string_pretty(&comparison) {
            Ok(text) => say(&text),
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::from(2);
            }
        }
    } else {
        text::lines(&comparison, Paint::for_stdout()).iter().for_each(|line| say(line));
    }
    if comparison.regression { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
