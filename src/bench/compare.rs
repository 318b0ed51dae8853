//! `anteroom bench compare`: significance and size of the differences between two runs.

mod comparison;
#[cfg(test)]
mod tests;
mod text;

use std::{path::PathBuf, process::ExitCode};

use self::comparison::{Comparison, Thresholds};
use super::results::Run;
use crate::{
    domain::Period,
    terminal::{Paint, print, say, width},
};

/// Compares two runs and reports significant changes of each phase.
///
/// A phase has changed if a two-sided Mann-Whitney test is significant at --alpha, with Holm's correction over all
/// comparisons, and its median differs by at least --threshold and --floor. Exits 1 if a phase became slower or cold starts
/// fail more often, 3 if the runs have too few cycles to show a slowdown of --threshold, 2 if there is nothing to compare, and
/// 0 otherwise.
#[derive(Clone, Debug, clap::Args)]
pub struct CompareArgs {
    /// Baseline run, from `bench cold-start --json`
    #[arg(value_name = "BEFORE.json")]
    pub before: PathBuf,

    /// Run to compare with the baseline
    #[arg(value_name = "AFTER.json")]
    pub after: PathBuf,

    /// Significance level: probability of any false alarm, over all phases together
    #[arg(long, value_name = "P", default_value = "0.05", value_parser = alpha)]
    pub alpha: f64,

    /// Smallest relative change of a median that is reported
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = percent)]
    pub threshold: f64,

    /// Smallest absolute change of a median that is reported
    #[arg(long, value_name = "DURATION", default_value = "10ms")]
    pub floor: Period,

    /// Print the comparison as JSON
    #[arg(long)]
    pub json: bool,
}

/// Exit code if a regression cannot be ruled out. Clap exits with 2.
const INCONCLUSIVE_CODE: u8 = 3;

fn alpha(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(alpha) if alpha > 0.0 && alpha < 1.0 => Ok(alpha),
        _ => Err("write a number between 0 and 1, such as 0.05".to_owned()),
    }
}

/// Parses a percentage into a ratio.
fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').trim().parse::<f64>() {
        Ok(percent) if percent >= 0.0 && percent.is_finite() => Ok(percent / 100.0),
        _ => Err("write a percentage, such as 5%".to_owned()),
    }
}

/// Runs the command.
pub fn run(args: &CompareArgs) -> ExitCode {
    let thresholds = Thresholds {
        alpha: args.alpha,
        threshold: args.threshold,
        floor_ms: args.floor.get().as_secs_f64() * 1e3,
    };
    let both = Run::read(&args.before).and_then(|before| Ok((before, Run::read(&args.after)?)));
    let comparison = match both.and_then(|(before, after)| Comparison::of(&before, &after, thresholds)) {
        Ok(comparison) => comparison,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    if args.json {
        match serde_json::to_string_pretty(&comparison) {
            Ok(text) => print(&format!("{text}\n")),
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::from(2);
            }
        }
    } else {
        text::lines(&comparison, Paint::for_stdout(), width()).iter().for_each(|line| say(line));
    }
    match (comparison.regression, comparison.inconclusive) {
        (true, _) => ExitCode::FAILURE,
        (false, Some(_)) => ExitCode::from(INCONCLUSIVE_CODE),
        (false, None) => ExitCode::SUCCESS,
    }
}
