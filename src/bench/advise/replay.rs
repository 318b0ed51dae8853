//! The replay: what becomes of given requests under given settings. Pure, discrete-event, and the same every time.
//!
//! One route, whose replicas are [starting, ready or leaving](Stage). A request goes to a ready replica that has room,
//! else it is held, within the bounds; at zero, it has the first replica started. More of them come and go as the
//! [`Hpa`] would have it. When there has been no request for the idle time, all of them go.

mod fleet;
mod hpa;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

use fleet::Fleet;
pub use fleet::GpuTime;
use hpa::Hpa;

/// A request of the log. Times are in milliseconds here, those of the clock from the beginning of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When it came.
    pub at: u64,
    /// From its dispatch to the end of its answer.
    pub service: u64,
}

/// What is tried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// Replicas that stay, whoever wants them.
    pub floor: u32,
    /// No more replicas than this, which is at least 1 and at least the floor.
    pub max_replicas: u32,
    /// How long nobody has wanted anything when all replicas go, if the floor is zero.
    pub idle: u64,
    /// They go only at multiples of this (KEDA's polls); 1: at once.
    pub poll: u64,
    /// `concurrency.max`: requests in flight on one replica.
    pub concurrency: u32,
    /// `hold.maxRequests`.
    pub hold_requests: usize,
    /// `hold.timeout`.
    pub hold: u64,
    /// `scaling.target`.
    pub target: u32,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was dispatched after this long.
    Served(u64),
    /// It was held for `hold.timeout` in vain.
    TimedOut,
    /// There was no room to hold it.
    Refused,
}

/// What came of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Of each request, in the order of the arrivals.
    pub fates: Vec<Fate>,
    /// How many requests found nothing ready.
    pub met_cold: usize,
    /// How often the first replica was started.
    pub cold_starts: usize,
    /// How many were held at once at the most.
    pub held_peak: usize,
    /// How many replicas there were at once at the most.
    pub replicas_peak: u32,
    /// How long replicas were up within the window, and what for.
    pub gpu: GpuTime,
}

/// What happens by itself, in the order in which it is looked at when it is at the same time: what makes room comes
/// before what needs it, and a request before what would have it wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// A request on this replica has been answered.
    Answered(u64),
    /// This replica is ready.
    Ready(u64),
    /// The first of those who are held gives up.
    GiveUp,
    /// The next request comes.
    Arrive,
    /// The HPA looks.
    Look,
    /// Nobody has wanted anything for so long.
    Zero,
}

struct Replay<'a, S> {
    arrivals: &'a [Arrival],
    window: u64,
    settings: &'a Settings,
    start_up: S,
    now: u64,
    next: usize,
    /// Who is held, first come first.
    held: VecDeque<usize>,
    fates: Vec<Option<Fate>>,
    due: BinaryHeap<Reverse<(u64, Step)>>,
    fleet: Fleet,
    hpa: Hpa,
    /// When anything was last wanted, or became ready.
    wanted: u64,
    met_cold: usize,
    cold_starts: usize,
    held_peak: usize,
    replicas_peak: u32,
}

/// Replays the arrivals, which are in order. `start_up` says how long a replica takes until requests are sent to it, by
/// the moment at which it is asked for and its number among those of that moment. GPU time is counted within
/// `0..window`; who comes or ends later has a fate all the same.
pub fn replay(
    arrivals: &[Arrival],
    window: u64,
    settings: &Settings,
    start_up: impl FnMut(u64, u64) -> u64,
) -> Replayed {
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
        fleet: Fleet::up(settings.floor),
        hpa: Hpa::new(settings),
        wanted: 0,
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
        while let Some((at, step)) = self.upcoming() {
            if at >= self.window && self.is_over() {
                break;
            }
            self.advance(at);
            match step {
                Step::Answered(replica) => {
                    self.due.pop();
                    self.fleet.answered(replica);
                    self.wanted = at;
                    self.dispatch();
                }
                Step::Ready(replica) => {
                    self.due.pop();
                    // It may have been taken away again while it started.
                    if self.fleet.ready(replica) {
                        self.wanted = at;
                        self.dispatch();
                    }
                }
                Step::GiveUp => {
                    if let Some(request) = self.held.pop_front() {
                        self.end(request, Fate::TimedOut);
                        self.wanted = at;
                    }
                }
                Step::Arrive => self.arrive(),
                Step::Look => self.look(),
                Step::Zero => self.fleet.remove_all(),
            }
        }
        self.advance(self.window);
    }

    /// What comes next, and when.
    fn upcoming(&self) -> Option<(u64, Step)> {
        let due = self.due.peek().map(|Reverse(due)| *due);
        let give_up = self
            .held
            .front()
            .map(|first| (self.arrivals[*first].at.saturating_add(self.settings.hold), Step::GiveUp));
        let arrive = self.arrivals.get(self.next).map(|arrival| (arrival.at, Step::Arrive));
        let look = self.hpa.next_look(self.now, &self.fleet, self.held.len()).map(|at| (at, Step::Look));
        let zero = self.zero().map(|at| (at, Step::Zero));
        [due, give_up, arrive, look, zero].into_iter().flatten().min()
    }

    /// When all replicas go, if nothing happens before.
    fn zero(&self) -> Option<u64> {
        let idle = self.settings.floor == 0 && self.held.is_empty() && self.fleet.in_flight() == 0;
        // A start is seen through, whoever has left meanwhile.
        (idle && self.fleet.has_ready()).then(|| {
            let until = self.wanted.saturating_add(self.settings.idle);
            until.checked_next_multiple_of(self.settings.poll.max(1)).unwrap_or(u64::MAX)
        })
    }

    /// Whether every request has its fate, and no answer is under way.
    fn is_over(&self) -> bool {
        self.next == self.arrivals.len() && self.held.is_empty() && self.fleet.in_flight() == 0
    }

    fn advance(&mut self, to: u64) {
        self.fleet.spend(self.now.min(self.window), to.min(self.window));
        self.now = self.now.max(to);
    }

    fn arrive(&mut self) {
        let request = self.next;
        self.next += 1;
        self.wanted = self.now;
        self.met_cold += usize::from(!self.fleet.has_ready());
        self.held.push_back(request);
        self.dispatch();
        if self.held.len() > self.settings.hold_requests {
            self.held.pop_back();
            self.end(request, Fate::Refused);
        }
        self.held_peak = self.held_peak.max(self.held.len());
        if self.fleet.wanted() == 0 {
            self.cold_starts += 1;
            self.start(1);
        }
    }

    /// Sends those who are held to whoever has room.
    fn dispatch(&mut self) {
        while let Some(request) = self.held.front().copied() {
            let Some(replica) = self.fleet.take(self.settings.concurrency) else { return };
            self.held.pop_front();
            let Arrival { at, service } = self.arrivals[request];
            self.end(request, Fate::Served(self.now - at));
            self.due.push(Reverse((self.now.saturating_add(service), Step::Answered(replica))));
        }
    }

    fn look(&mut self) {
        let wanted = self.hpa.look(self.now, &self.fleet, self.held.len());
        let current = self.fleet.wanted();
        if wanted > current {
            self.start(wanted - current);
        }
        for _ in wanted..current {
            self.fleet.remove_one();
        }
    }

    fn start(&mut self, count: u32) {
        for nth in 0..count {
            let takes = (self.start_up)(self.now, nth.into());
            let replica = self.fleet.start();
            self.due.push(Reverse((self.now.saturating_add(takes), Step::Ready(replica))));
        }
        self.replicas_peak = self.replicas_peak.max(self.fleet.wanted());
    }

    fn end(&mut self, request: usize, fate: Fate) {
        debug_assert_eq!(self.fates[request], None, "request {request} ended before");
        self.fates[request] = Some(fate);
    }

    fn result(self) -> Replayed {
        Replayed {
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
