//! Discrete-event simulation of one route under given settings. Pure and deterministic.
//!
//! A request is dispatched to a ready replica with free capacity, or held within the limits. At zero, it starts the first
//! replica. The [`Hpa`] adds and removes further replicas. After the idle time without requests, all replicas stop.

mod fleet;
mod hpa;
mod settings;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

use fleet::Fleet;
pub use fleet::GpuTime;
use hpa::Hpa;
pub use settings::ReplaySettings;

/// A request. All times of this module are in milliseconds, relative to the start of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    pub at: u64,
    /// Time from dispatch to the end of the answer.
    pub service: u64,
}

/// Outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestFate {
    /// Dispatched after this wait.
    Served(u64),
    /// Held for `hold.timeout`.
    TimedOut,
    /// Rejected by the full hold queue.
    Rejected,
}

/// Outcome of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayOutcome {
    /// One per request, in order of arrival.
    pub fates: Vec<RequestFate>,
    /// Number of requests that arrived without a ready replica.
    pub met_cold: usize,
    /// Number of starts from zero.
    pub cold_starts: usize,
    /// Peak number of held requests.
    pub held_peak: usize,
    /// Peak number of replicas.
    pub replicas_peak: u32,
    /// Replica time within the window.
    pub gpu: GpuTime,
}

/// Events, in the order of processing at equal times: those that free capacity come before those that need it, arrivals
/// before scale-down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ReplayEvent {
    /// A request on this replica ends.
    Answered(u64),
    /// This replica becomes ready.
    Ready(u64),
    /// The oldest held request times out.
    HoldTimeout,
    /// The next request arrives.
    Arrive,
    /// The HPA syncs.
    HpaSync,
    /// The idle time has passed.
    ScaleToZero,
}

struct Replay<'a, S> {
    arrivals: &'a [Arrival],
    window: u64,
    settings: &'a ReplaySettings,
    start_up: S,
    now: u64,
    next: usize,
    /// Held requests, in FIFO order.
    held: VecDeque<usize>,
    fates: Vec<Option<RequestFate>>,
    due: BinaryHeap<Reverse<(u64, ReplayEvent)>>,
    fleet: Fleet,
    hpa: Hpa,
    /// Time of the last demand, or of the last replica becoming ready.
    last_active: u64,
    met_cold: usize,
    cold_starts: usize,
    held_peak: usize,
    replicas_peak: u32,
}

/// Replays the arrivals, which must be sorted. `start_up(at, nth)` returns the start-up time of the `nth` replica started at
/// time `at`. GPU time is counted within `0..window`; requests beyond it are simulated as well.
pub fn replay(
    arrivals: &[Arrival],
    window: u64,
    settings: &ReplaySettings,
    start_up: impl FnMut(u64, u64) -> u64,
) -> ReplayOutcome {
    let mut replay = Replay {
        arrivals,
        window,
        settings,
        start_up,
        now: 0,
        next: 0,
        held: VecDeque::new(),
        fates: vec![None; arrivals.len()],
        due: BinaryHeap::new(),
        fleet: Fleet::with_ready(settings.floor),
        hpa: Hpa::new(settings),
        last_active: 0,
        met_cold: 0,
        cold_starts: 0,
        held_peak: 0,
        replicas_peak: settings.floor,
    };
    replay.run();
    replay.result()
}

impl<S: FnMut(u64, u64) -> u64> Replay<'_, S> {
    fn run(&mut self) {
        while let Some((at, step)) = self.next_event() {
            if at >= self.window && self.is_finished() {
                break;
            }
            self.advance(at);
            match step {
                ReplayEvent::Answered(replica) => {
                    self.due.pop();
                    self.fleet.release(replica);
                    self.last_active = at;
                    self.dispatch();
                }
                ReplayEvent::Ready(replica) => {
                    self.due.pop();
                    // The replica may have been removed while it was starting.
                    if self.fleet.set_ready(replica) {
                        self.last_active = at;
                        self.dispatch();
                    }
                }
                ReplayEvent::HoldTimeout => {
                    if let Some(request) = self.held.pop_front() {
                        self.finish(request, RequestFate::TimedOut);
                        self.last_active = at;
                    }
                }
                ReplayEvent::Arrive => self.arrive(),
                ReplayEvent::HpaSync => self.hpa_sync(),
                ReplayEvent::ScaleToZero => self.fleet.remove_all(),
            }
        }
        self.advance(self.window);
    }

    /// Returns the next event and its time.
    fn next_event(&self) -> Option<(u64, ReplayEvent)> {
        let due = self.due.peek().map(|Reverse(due)| *due);
        let hold_timeout = self.held.front().map(|first| {
            (self.arrivals[*first].at.saturating_add(self.settings.hold), ReplayEvent::HoldTimeout)
        });
        let arrive = self.arrivals.get(self.next).map(|arrival| (arrival.at, ReplayEvent::Arrive));
        let hpa_sync =
            self.hpa.next_sync(self.now, &self.fleet, self.held.len()).map(|at| (at, ReplayEvent::HpaSync));
        let zero = self.scale_to_zero_at().map(|at| (at, ReplayEvent::ScaleToZero));
        [due, hold_timeout, arrive, hpa_sync, zero].into_iter().flatten().min()
    }

    /// Returns the time of scale to zero if nothing happens before.
    fn scale_to_zero_at(&self) -> Option<u64> {
        let idle = self.settings.floor == 0 && self.held.is_empty() && self.fleet.in_flight() == 0;
        // A start is completed even if all its requests are lost.
        (idle && self.fleet.has_ready()).then(|| {
            let until = self.last_active.saturating_add(self.settings.idle);
            until.checked_next_multiple_of(self.settings.poll.max(1)).unwrap_or(u64::MAX)
        })
    }

    /// Returns whether all requests have ended.
    fn is_finished(&self) -> bool {
        self.next == self.arrivals.len() && self.held.is_empty() && self.fleet.in_flight() == 0
    }

    fn advance(&mut self, to: u64) {
        self.fleet.add_time(self.now.min(self.window), to.min(self.window));
        self.now = self.now.max(to);
    }

    fn arrive(&mut self) {
        let request = self.next;
        self.next += 1;
        self.last_active = self.now;
        self.met_cold += usize::from(!self.fleet.has_ready());
        self.held.push_back(request);
        self.dispatch();
        if self.held.len() > self.settings.hold_requests {
            self.held.pop_back();
            self.finish(request, RequestFate::Rejected);
        }
        self.held_peak = self.held_peak.max(self.held.len());
        if self.fleet.desired() == 0 {
            self.cold_starts += 1;
            self.start(1);
        }
    }

    /// Dispatches held requests to replicas with free capacity.
    fn dispatch(&mut self) {
        while let Some(request) = self.held.front().copied() {
            let Some(replica) = self.fleet.acquire(self.settings.concurrency) else { return };
            self.held.pop_front();
            let Arrival { at, service } = self.arrivals[request];
            self.finish(request, RequestFate::Served(self.now - at));
            self.due.push(Reverse((self.now.saturating_add(service), ReplayEvent::Answered(replica))));
        }
    }

    fn hpa_sync(&mut self) {
        let desired = self.hpa.sync(self.now, &self.fleet, self.held.len());
        let current = self.fleet.desired();
        if desired > current {
            self.start(desired - current);
        }
        for _ in desired..current {
            self.fleet.remove_one();
        }
    }

    fn start(&mut self, count: u32) {
        for nth in 0..count {
            let start_up = (self.start_up)(self.now, nth.into());
            let replica = self.fleet.start();
            self.due.push(Reverse((self.now.saturating_add(start_up), ReplayEvent::Ready(replica))));
        }
        self.replicas_peak = self.replicas_peak.max(self.fleet.desired());
    }

    fn finish(&mut self, request: usize, fate: RequestFate) {
        debug_assert_eq!(self.fates[request], None, "request {request} has ended");
        self.fates[request] = Some(fate);
    }

    fn result(self) -> ReplayOutcome {
        ReplayOutcome {
            fates: self.fates.into_iter().flatten().collect(),
            met_cold: self.met_cold,
            cold_starts: self.cold_starts,
            held_peak: self.held_peak,
            replicas_peak: self.replicas_peak,
            gpu: self.fleet.gpu_time(),
        }
    }
}

#[cfg(test)]
mod against_proxy;
#[cfg(test)]
mod tests;
