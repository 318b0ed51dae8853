//! Progress and remaining time of a run.

use std::{io::IsTerminal as _, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::bench::results::{Cycle, CycleVerdict};

/// Progress output on standard error: a bar on a terminal, otherwise one line per cycle.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    cycles: usize,
    pace: Mutex<CyclePace>,
}

/// Mean duration of cycles.
struct CyclePace {
    began: Instant,
    cycle_began: Instant,
    done: usize,
}

// === impl Progress ===

impl Progress {
    pub(super) fn new(cycles: usize) -> Self {
        let live =
            std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bar = live.then(|| {
            let style = ProgressStyle::with_template("{bar:20} {pos}/{len}  {wide_msg}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("█▌─");
            ProgressBar::with_draw_target(Some(cycles as u64), ProgressDrawTarget::stderr_with_hz(10))
                .with_style(style)
        });
        let now = Instant::now();
        Self { bar, cycles, pace: Mutex::new(CyclePace { began: now, cycle_began: now, done: 0 }) }
    }

    /// Shows the current activity. Only on a terminal.
    pub(super) fn show(&self, activity: &str) {
        if let Some(bar) = &self.bar {
            let left = self
                .pace
                .lock()
                .time_left(self.cycles)
                .map_or_else(String::new, |left| format!("  ·  about {} left", rough_duration(left)));
            bar.set_message(format!("{activity}{left}"));
        }
    }

    /// Reports a finished cycle.
    pub(super) fn finish_cycle(&self, cycle: &Cycle) {
        let line = line(cycle, self.cycles);
        let mut pace = self.pace.lock();
        pace.done += 1;
        pace.cycle_began = Instant::now();
        match &self.bar {
            Some(bar) => {
                bar.println(line);
                bar.inc(1);
            }
            None => eprintln!("{line}"),
        }
    }

    /// Removes the bar. After Ctrl-C, leaves it as it is: the terminal has written `^C` into it.
    pub(super) fn finish(&self, interrupted: bool) {
        if let Some(bar) = &self.bar {
            if interrupted {
                bar.set_draw_target(ProgressDrawTarget::hidden());
                eprintln!();
            }
            bar.finish_and_clear();
        }
    }
}

// === impl CyclePace ===

impl CyclePace {
    /// Estimates the remaining time. Returns `None` before the end of the first cycle.
    fn time_left(&self, cycles: usize) -> Option<Duration> {
        let done = u32::try_from(self.done).ok().filter(|done| *done > 0)?;
        let each = self.cycle_began.duration_since(self.began) / done;
        let left = each * u32::try_from(cycles.saturating_sub(self.done)).unwrap_or(u32::MAX);
        Some(left.saturating_sub(self.cycle_began.elapsed().min(each)))
    }
}

/// Summarizes a cycle in one line.
fn line(cycle: &Cycle, cycles: usize) -> String {
    let width = cycles.to_string().len();
    let head = format!("cycle {:>width$}/{cycles}", cycle.number);
    if cycle.verdict != CycleVerdict::Cold {
        let why = cycle.error.as_deref().unwrap_or_default();
        return format!("{head}  {}, does not count: {why}", cycle.verdict.label());
    }
    let answered = cycle.requests.iter().filter(|request| request.error.is_none()).count();
    let all = cycle.requests.len();
    let first = cycle.requests.iter().filter_map(|request| Some(request.sent_ms + request.ttft_ms?));
    let token = match first.reduce(f64::min) {
        Some(ms) => format!("first token after {:.2} s", ms / 1e3),
        None => {
            let ends = cycle.requests.iter().map(|request| request.sent_ms + request.total_ms);
            format!("first answer after {:.2} s", ends.fold(f64::INFINITY, f64::min) / 1e3)
        }
    };
    let failed = match cycle.requests.iter().find_map(|request| request.error.as_deref()) {
        Some(error) => format!(": {error}"),
        None => String::new(),
    };
    format!("{head}  {token}, {answered} of {all} answered{failed}")
}

/// Formats a duration in seconds below two minutes, in minutes above.
fn rough_duration(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds => format!("{:.0} min", seconds / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_left_follows_the_mean_cycle() {
        let began = Instant::now();
        let pace = |done: usize, seconds| CyclePace {
            began,
            cycle_began: began + Duration::from_secs(seconds),
            done,
        };
        assert_eq!(pace(0, 0).time_left(10), None);
        // Two cycles in 20 s: eight more take 80 s, of which 4 s have passed.
        tokio::time::advance(Duration::from_secs(24)).await;
        assert_eq!(pace(2, 20).time_left(10), Some(Duration::from_secs(76)));
        // A cycle longer than the mean counts as one mean cycle: 7 × 10 s remain.
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(pace(2, 20).time_left(10), Some(Duration::from_secs(70)));
        assert_eq!(rough_duration(Duration::from_secs(119)), "119 s");
        assert_eq!(rough_duration(Duration::from_secs(300)), "5 min");
    }
}
