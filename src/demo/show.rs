//! Progress of the first burst: a live display on a terminal, otherwise one line per change.

use std::time::Duration;

use super::{
    client::ClientState,
    live::LiveLines,
    view::{MAX_SHOWN_REQUESTS, RouteView},
};
use crate::{
    coldstart::Phase,
    terminal::{duration, fit, is_live, say},
};

/// Display of the first burst.
pub(super) enum BurstDisplay {
    Live(LiveLines),
    Lines(LinePrinter),
}

/// Prints a line per change. The fields are what has been printed.
#[derive(Default)]
pub(super) struct LinePrinter {
    phases: usize,
    heartbeats: u32,
    first_token: bool,
    done: Vec<bool>,
}

// === impl BurstDisplay ===

impl BurstDisplay {
    pub(super) fn new(requests: usize) -> Self {
        if is_live() { Self::Live(LiveLines::new(requests)) } else { Self::Lines(LinePrinter::new(requests)) }
    }

    /// Returns the interval of updates.
    pub(super) const fn interval(&self) -> Duration {
        match self {
            Self::Live(_) => Duration::from_millis(50),
            Self::Lines(_) => Duration::from_millis(10),
        }
    }

    pub(super) fn update(&mut self, view: &RouteView, clients: &[ClientState], elapsed: Duration) {
        match self {
            Self::Live(live) => live.update(view, clients, elapsed),
            Self::Lines(lines) => lines.update(view, clients, elapsed),
        }
    }

    /// Ends the display and keeps its last state.
    pub(super) fn finish(self) {
        if let Self::Live(live) = self {
            live.finish();
        }
    }

    /// Like [`BurstDisplay::finish`], after Ctrl-C.
    pub(super) fn freeze(self) {
        if let Self::Live(live) = self {
            live.freeze();
        }
    }
}

// === impl LinePrinter ===

impl LinePrinter {
    fn new(requests: usize) -> Self {
        Self { done: vec![false; requests], ..Self::default() }
    }

    fn update(&mut self, view: &RouteView, clients: &[ClientState], elapsed: Duration) {
        self.heartbeats(clients, elapsed);
        self.phases(view);
        if let Some(first) =
            clients.iter().filter_map(|client| client.first_token).min().filter(|_| !self.first_token)
        {
            self.first_token = true;
            print_at(first, "first token received");
        }
        let new = clients.iter().enumerate().filter(|(index, _)| !self.done[*index]);
        let mut new: Vec<_> = new.filter_map(|(index, client)| Some((client.done?, index, client))).collect();
        new.sort_by_key(|(done, index, _)| (*done, *index));
        for (done, index, client) in new {
            self.done[index] = true;
            self.done(index + 1, client, done);
        }
    }

    fn phases(&mut self, view: &RouteView) {
        let Some(cold_start) = &view.cold_start else { return };
        for span in cold_start.finished_phases().skip(self.phases) {
            self.phases += 1;
            let end = Duration::from_secs_f64((span.start_ms + span.duration_ms) / 1e3);
            let event = match span.name {
                Phase::Signal => "no model server: requests are held, the launcher is notified",
                Phase::Start => "the model server's process runs and loads",
                Phase::Load => "the model server is ready",
                Phase::Dispatch => "the held requests are dispatched",
                Phase::FirstByte => "the first answer starts",
                // The first token is reported by the client; other phases do not occur here.
                _ => continue,
            };
            print_at(end, event);
        }
    }

    fn heartbeats(&mut self, clients: &[ClientState], elapsed: Duration) {
        let Some(first) = clients.first() else { return };
        if first.heartbeats == self.heartbeats {
            return;
        }
        self.heartbeats = first.heartbeats;
        // Prints the first three heartbeats, then every tenth.
        if self.heartbeats <= 3 || self.heartbeats.is_multiple_of(10) {
            print_at(elapsed, &format!("#1 receives the heartbeat “: {}”", first.heartbeat));
        }
    }

    fn done(&self, number: usize, client: &ClientState, done: Duration) {
        if let Some(error) = &client.error {
            print_at(done, &format!("#{number} failed: {error}"));
        } else if self.done.len() <= MAX_SHOWN_REQUESTS {
            print_at(done, &format!("#{number:<2} {}", fit(client.text.trim(), 62)));
        } else if self.done.iter().all(|done| *done) {
            print_at(done, &format!("all {} answered", self.done.len()));
        }
    }
}

/// Prints a line with the time since the burst.
fn print_at(elapsed: Duration, event: &str) {
    say(&format!("{:>9}  {event}", duration(elapsed.as_secs_f64() * 1e3)));
}
