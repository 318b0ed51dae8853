//! Live display: the route, the phases of its cold start, and one line per request.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use owo_colors::Style;

use super::{
    client::ClientState,
    view::{MAX_SHOWN_REQUESTS, RouteView},
    waterfall,
};
use crate::{
    coldstart::Phase,
    terminal::{Paint, duration, fit, fit_end, say, size},
};

/// Lines updated in place.
pub(super) struct LiveLines {
    lines: ProgressBar,
    /// Number of requests with their own line.
    shown: usize,
    paint: Paint,
}

/// Phases of a process target.
const PHASES: [Phase; 6] =
    [Phase::Signal, Phase::Start, Phase::Load, Phase::Dispatch, Phase::FirstByte, Phase::FirstToken];

/// Rows other than requests, including the shell prompt.
const OTHER_ROWS: usize = 6;

// === impl LiveLines ===

impl LiveLines {
    pub(super) fn new(requests: usize) -> Self {
        let shown = requests.min(MAX_SHOWN_REQUESTS).min(size().1.saturating_sub(OTHER_ROWS).max(1));
        Self { lines: message_line(), shown, paint: Paint::for_stdout() }
    }

    pub(super) fn update(&self, view: &RouteView, clients: &[ClientState], elapsed: Duration) {
        // Some terminals wrap a line of the full width.
        let width = size().0.saturating_sub(1);
        let mut lines = vec![self.route(view, elapsed), self.phases(view, width), String::new()];
        let (shown, others) = clients.split_at(self.shown);
        lines.extend(
            shown.iter().enumerate().map(|(index, client)| self.request(index + 1, client, elapsed, width)),
        );
        if !others.is_empty() {
            lines.push(self.others(others, clients.len()));
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

    fn route(&self, view: &RouteView, elapsed: Duration) -> String {
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

    /// Renders finished phases with their duration, the current one in bold and later ones dimmed. Omits the durations if
    /// the line would be too long.
    fn phases(&self, view: &RouteView, width: usize) -> String {
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

    fn request(&self, number: usize, client: &ClientState, elapsed: Duration, width: usize) -> String {
        let at = seconds(client.done.unwrap_or(elapsed));
        let before = format!("  #{number:<3} {at:>7} ");
        let room = width.saturating_sub(before.chars().count() + 3);
        let (mark, text) = match (&client.error, client.done) {
            (Some(error), _) => (self.paint.bad("✗"), self.paint.bad(&fit(error, room))),
            (None, Some(_)) => (self.paint.good("✓"), fit(client.text.trim(), room)),
            (None, None) if client.tokens > 0 => {
                (self.paint.paint("●", Style::new().green()), fit_end(client.text.trim(), room))
            }
            (None, None) if client.heartbeats > 0 => (
                self.paint.paint("○", Style::new().yellow()),
                self.paint.dim(&fit(&format!(": {}", client.heartbeat), room)),
            ),
            (None, None) => (self.paint.paint("○", Style::new().yellow()), self.paint.dim("waiting")),
        };
        format!("{}{mark} {text}", self.paint.dim(&before))
    }

    fn others(&self, clients: &[ClientState], all: usize) -> String {
        let count = |which: fn(&ClientState) -> bool| clients.iter().filter(|client| which(client)).count();
        let waiting = count(|client| client.done.is_none() && client.tokens == 0);
        let streaming = count(|client| client.done.is_none() && client.tokens > 0);
        let failed = count(|client| client.error.is_some());
        let done = clients.len() - waiting - streaming - failed;
        let failed = if failed > 0 {
            format!(", {}", self.paint.bad(&format!("{failed} failed")))
        } else {
            String::new()
        };
        format!(
            "  {}  {waiting} waiting, {streaming} streaming, {done} done{failed}",
            self.paint.dim(&format!("and {} more of {all}:", clients.len())),
        )
    }
}

/// Creates a bar that shows only its message.
pub(super) fn message_line() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout_with_hz(20)).with_style(style)
}

/// Keeps the lines without redrawing: after Ctrl-C, the terminal has written `^C` into them.
pub(super) fn freeze(lines: &ProgressBar) {
    lines.set_draw_target(ProgressDrawTarget::hidden());
    lines.abandon();
    say("");
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
