//! The display on a terminal: the route, the phases of its cold start, and a line for each request.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use owo_colors::Style;

use super::{
    client::Seen,
    show::{FEW, View},
    waterfall,
};
use crate::{
    coldstart::Phase,
    terminal::{Paint, duration, fit, fit_end, say, size},
};

/// Lines that change in place, all at once.
pub(super) struct Live {
    lines: ProgressBar,
    /// How many requests have a line of their own.
    shown: usize,
    paint: Paint,
}

/// The phases of a process.
const PHASES: [Phase; 6] =
    [Phase::Signal, Phase::Start, Phase::Load, Phase::Dispatch, Phase::FirstByte, Phase::FirstToken];

/// Rows for all but the requests, the shell's prompt included.
const OTHER_ROWS: usize = 6;

// === impl Live ===

impl Live {
    pub(super) fn new(requests: usize) -> Self {
        let shown = requests.min(FEW).min(size().1.saturating_sub(OTHER_ROWS).max(1));
        Self { lines: line(), shown, paint: Paint::for_stdout() }
    }

    pub(super) fn update(&self, view: &View, seen: &[Seen], elapsed: Duration) {
        // One column less, or some terminals wrap.
        let width = size().0.saturating_sub(1);
        let mut lines = vec![self.route(view, elapsed), self.phases(view, width), String::new()];
        let (shown, others) = seen.split_at(self.shown);
        lines.extend(
            shown.iter().enumerate().map(|(index, seen)| self.request(index + 1, seen, elapsed, width)),
        );
        if !others.is_empty() {
            lines.push(self.others(others, seen.len()));
        }
        self.lines.set_message(lines.join("\n"));
    }

    pub(super) fn finish(self) {
        self.lines.abandon();
        say("");
    }

    pub(super) fn freeze(self) {
        freeze(&self.lines);
    }

    fn route(&self, view: &View, elapsed: Duration) -> String {
        format!(
            "  {}  {:>7}   {:<10}  held {:<4}  in flight {:<4}  endpoints {}",
            self.paint.bold("demo"),
            seconds(elapsed),
            view.status.name(),
            view.held,
            view.in_flight,
            view.endpoints,
        )
    }

    /// What is over is in its colour with its time, what runs is bright, what is to come is dim. Where that is too long,
    /// the times are left out: the waterfall has them.
    fn phases(&self, view: &View, width: usize) -> String {
        let parts = |times: bool| {
            PHASES.map(|phase| {
                let (name, style) = (phase.name(), waterfall::style(phase));
                match view.cold_start.as_ref().and_then(|record| record.phase(phase)) {
                    Some(span) if times => (format!("{name} {}", duration(span.duration_ms)), style),
                    Some(_) => (format!("{name} ✓"), style),
                    None if view.phase.is_some_and(|(running, _)| running == phase) => {
                        (format!("{name} …"), style.bold())
                    }
                    None => (name.to_owned(), Style::new().dimmed()),
                }
            })
        };
        let long = |parts: &[(String, Style)]| {
            parts.iter().map(|(text, _)| text.chars().count() + 3).sum::<usize>() > width
        };
        let parts = Some(parts(true)).filter(|parts| !long(parts)).unwrap_or_else(|| parts(false));
        let parts = parts.map(|(text, style)| self.paint.paint(&text, style));
        format!("  {}", parts.join(&self.paint.dim(" ▸ ")))
    }

    fn request(&self, number: usize, seen: &Seen, elapsed: Duration, width: usize) -> String {
        let at = seconds(seen.done.unwrap_or(elapsed));
        let before = format!("  #{number:<3} {at:>7} ");
        let room = width.saturating_sub(before.chars().count() + 3);
        let (mark, rest) = match (&seen.error, seen.done) {
            (Some(error), _) => (self.paint.bad("✗"), self.paint.bad(&fit(error, room))),
            (None, Some(_)) => (self.paint.good("✓"), fit(seen.text.trim(), room)),
            (None, None) if seen.tokens > 0 => {
                (self.paint.paint("●", Style::new().green()), fit_end(seen.text.trim(), room))
            }
            (None, None) if seen.heartbeats > 0 => (
                self.paint.paint("○", Style::new().yellow()),
                self.paint.dim(&fit(&format!(": {}", seen.heartbeat), room)),
            ),
            (None, None) => (self.paint.paint("○", Style::new().yellow()), self.paint.dim("waits")),
        };
        format!("{}{mark} {rest}", self.paint.dim(&before))
    }

    fn others(&self, seen: &[Seen], all: usize) -> String {
        let count = |which: fn(&Seen) -> bool| seen.iter().filter(|seen| which(seen)).count();
        let waiting = count(|seen| seen.done.is_none() && seen.tokens == 0);
        let streaming = count(|seen| seen.done.is_none() && seen.tokens > 0);
        let failed = count(|seen| seen.error.is_some());
        let done = seen.len() - waiting - streaming - failed;
        let failed = if failed > 0 {
            format!(", {}", self.paint.bad(&format!("{failed} failed")))
        } else {
            String::new()
        };
        format!(
            "  {}  {waiting} wait, {streaming} stream, {done} done{failed}",
            self.paint.dim(&format!("and {} more of {all}:", seen.len())),
        )
    }
}

/// Shows its message on the terminal, and nothing else.
pub(super) fn line() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout_with_hz(20)).with_style(style)
}

/// Leaves the lines as they are. After a Ctrl-C they cannot be drawn anew: the terminal has written `^C` into them.
pub(super) fn freeze(lines: &ProgressBar) {
    lines.set_draw_target(ProgressDrawTarget::hidden());
    lines.abandon();
    say("");
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
