//! What happens, while it happens: a live display on a terminal, lines elsewhere.

use std::time::Duration;

use super::{client::Seen, live::Live, stage::Stage};
use crate::{
    coldstart::{ColdStart, Phase},
    state::Status,
    terminal::{duration, fit, is_live, say},
};

/// The route at one moment.
pub(super) struct View {
    pub(super) status: Status,
    pub(super) phase: Option<(Phase, Duration)>,
    pub(super) cold_start: Option<ColdStart>,
    pub(super) held: usize,
    pub(super) in_flight: u64,
    /// Those that take requests.
    pub(super) endpoints: usize,
}

/// Shows the first requests.
pub(super) enum Show {
    Live(Live),
    Lines(Lines),
}

/// A line for each change.
#[derive(Default)]
pub(super) struct Lines {
    phases: usize,
    heartbeats: u32,
    first_token: bool,
    done: Vec<bool>,
}

/// Answers are shown one by one up to so many requests.
pub(super) const FEW: usize = 16;

// === impl View ===

impl View {
    pub(super) fn of(stage: &Stage) -> Self {
        let gate = &stage.gate;
        let endpoints = gate.target().endpoints();
        Self {
            status: gate.target().status(),
            phase: gate.cold_starts().phase(),
            cold_start: stage.cold_start(),
            held: gate.held(),
            in_flight: gate.in_flight(),
            endpoints: endpoints.iter().filter(|endpoint| endpoint.is_ready()).count(),
        }
    }
}

// === impl Show ===

impl Show {
    pub(super) fn new(requests: usize) -> Self {
        if is_live() { Self::Live(Live::new(requests)) } else { Self::Lines(Lines::new(requests)) }
    }

    /// How often it wants to look.
    pub(super) const fn every(&self) -> Duration {
        match self {
            Self::Live(_) => Duration::from_millis(50),
            Self::Lines(_) => Duration::from_millis(10),
        }
    }

    pub(super) fn update(&mut self, view: &View, seen: &[Seen], elapsed: Duration) {
        match self {
            Self::Live(live) => live.update(view, seen, elapsed),
            Self::Lines(lines) => lines.update(view, seen, elapsed),
        }
    }

    /// What is shown last stays.
    pub(super) fn finish(self) {
        if let Self::Live(live) = self {
            live.finish();
        }
    }

    /// As [`Show::finish`], after a Ctrl-C.
    pub(super) fn freeze(self) {
        if let Self::Live(live) = self {
            live.freeze();
        }
    }
}

// === impl Lines ===

impl Lines {
    fn new(requests: usize) -> Self {
        Self { done: vec![false; requests], ..Self::default() }
    }

    fn update(&mut self, view: &View, seen: &[Seen], elapsed: Duration) {
        self.heartbeats(seen, elapsed);
        self.phases(view);
        if let Some(first) =
            seen.iter().filter_map(|seen| seen.first_token).min().filter(|_| !self.first_token)
        {
            self.first_token = true;
            at(first, "the first token arrives");
        }
        let new = seen.iter().enumerate().filter(|(index, _)| !self.done[*index]);
        let mut new: Vec<_> = new.filter_map(|(index, seen)| Some((seen.done?, index, seen))).collect();
        new.sort_by_key(|(done, index, _)| (*done, *index));
        for (done, index, seen) in new {
            self.done[index] = true;
            self.done(index + 1, seen, done);
        }
    }

    fn phases(&mut self, view: &View) {
        let Some(cold_start) = &view.cold_start else { return };
        for span in cold_start.finished_phases().skip(self.phases) {
            self.phases += 1;
            let end = Duration::from_secs_f64((span.start_ms + span.duration_ms) / 1e3);
            let what = match span.name {
                Phase::Signal => "nothing is up: the requests are held, and the launcher is told at once",
                Phase::Start => "the model server's process runs, and loads",
                Phase::Load => "the model server is ready",
                Phase::Dispatch => "the held requests are sent to it",
                Phase::FirstByte => "the first answer begins",
                // The client tells of the token; the rest is of clusters.
                _ => continue,
            };
            at(end, what);
        }
    }

    fn heartbeats(&mut self, seen: &[Seen], elapsed: Duration) {
        let Some(first) = seen.first() else { return };
        if first.heartbeats == self.heartbeats {
            return;
        }
        self.heartbeats = first.heartbeats;
        // In a long load, not every one.
        if self.heartbeats <= 3 || self.heartbeats.is_multiple_of(10) {
            at(elapsed, &format!("#1 hears in its stream “: {}”", first.heartbeat));
        }
    }

    fn done(&self, number: usize, seen: &Seen, done: Duration) {
        if let Some(error) = &seen.error {
            at(done, &format!("#{number} failed: {error}"));
        } else if self.done.len() <= FEW {
            at(done, &format!("#{number:<2} {}", fit(seen.text.trim(), 62)));
        } else if self.done.iter().all(|done| *done) {
            at(done, &format!("all {} have their answers", self.done.len()));
        }
    }
}

/// A line that begins with a time since the requests were sent.
pub(super) fn at(elapsed: Duration, what: &str) {
    say(&format!("{:>9}  {what}", duration(elapsed.as_secs_f64() * 1e3)));
}
