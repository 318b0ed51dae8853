//! What a route asks for: its requests, with the lease, the linger and the other replicas.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::Gate;
use crate::demand::Counts;

/// A stream that a scaler has open for a route. Dropping it closes it.
pub struct OpenStream(Arc<Gate>);

/// A job that a model server does after it has answered the request for it. Until this is dropped it is demand.
pub struct BackgroundJob(Arc<Gate>);

impl Gate {
    /// How soon after a request demand could be false at the earliest, where there is no linger: nothing tells that the
    /// last request has ended, so who waits for it looks this often.
    const LOOK: Duration = Duration::from_millis(50);

    /// How long after another replica has found an endpoint ready this one is expected to find it, too.
    const FOUND_BY_ALL: Duration = Duration::from_secs(10);

    /// The demand of this replica.
    pub fn counts(&self) -> Counts {
        let scaling = self.policy.load().scaling;
        // Held before in flight: a request that goes from one to the other is counted twice then, never not at all.
        let held = self.held() as u64;
        let in_flight = self.wanting_in_flight();
        let request_rate = scaling
            .request_rate
            .map(|rate| self.demand.request_rate(self.counters.wanted(), rate.window.get()));
        Counts {
            held,
            soon: self.soon(held),
            in_flight,
            lasting: !self.demand.lasts_for(scaling.linger.get()).is_zero(),
            activations: self.demand.activations(),
            request_rate: request_rate.unwrap_or_default(),
            server_queue: if scaling.server_queue { self.demand.server_queue() } else { 0 },
            ready: self.target.is_up(),
            streams: self.demand.streams(),
        }
    }

    /// How many of these held requests ready endpoints will soon take: they are no demand for more endpoints. One that
    /// answers nothing, 10 s after it opened, hides no backlog.
    fn soon(&self, held: u64) -> u64 {
        if held == 0 {
            return 0;
        }
        if self.target.is_up() {
            return held.min(self.target.room_soon());
        }
        // Another replica of ours has heard of the endpoint first.
        let is_found = |since: Instant| since.elapsed() < Self::FOUND_BY_ALL;
        if self.demand.peers_ready_since().is_some_and(is_found) { held } else { 0 }
    }

    /// The demand of all replicas.
    pub fn counts_everywhere(&self) -> Counts {
        self.counts().plus(self.demand.peers())
    }

    /// The demand of this replica, for who listens to its changes: if it is false, the first request that makes it true
    /// is told.
    pub fn watched_counts(&self) -> Counts {
        let counts = self.counts();
        if counts.is_active() {
            return counts;
        }
        self.demand.rest();
        let counts = self.counts();
        if counts.is_active() {
            // It came between the two looks, and may have found nobody resting.
            self.demand.rise();
        }
        counts
    }

    /// A scaler was told of the demand, or has done what it asks for. That ends the signal if something is wanted that
    /// is not there.
    pub fn scaler_knows(&self) {
        if let Some(raised) = self.demand.raised_since() {
            self.cold_starts.pushed(raised);
        }
    }

    /// Within what time the demand of this replica cannot become false by itself. Not zero.
    pub fn lasts_at_least(&self) -> Duration {
        let linger = self.policy.load().scaling.linger.get();
        if self.requests() > 0 {
            return linger.max(Self::LOOK);
        }
        match self.demand.lasts_for(linger) {
            Duration::ZERO => Self::LOOK,
            // Timers count whole milliseconds.
            left => left.max(Duration::from_millis(1)),
        }
    }

    /// Takes down the request rate, if it is asked for; about once a second.
    pub fn sample_rate(&self) {
        if let Some(rate) = self.policy.load().scaling.request_rate {
            self.demand.sample(self.counters.wanted(), rate.window.get());
        }
    }
}

// === impl BackgroundJob ===

impl BackgroundJob {
    /// The most of a route that are followed.
    const MOST: u64 = 1024;

    /// Counts a job of this route, unless there are too many.
    pub fn begin(gate: &Arc<Gate>) -> Option<Self> {
        // Counted in any case until this is dropped.
        let job = Self(gate.clone());
        let before = gate.background.fetch_add(1, Ordering::SeqCst);
        (before < Self::MOST).then_some(job)
    }

    /// The route.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.0
    }
}

impl Drop for BackgroundJob {
    fn drop(&mut self) {
        // The linger counts from here.
        self.0.demand.touch();
        self.0.background.fetch_sub(1, Ordering::SeqCst);
    }
}

// === impl OpenStream ===

impl OpenStream {
    /// A scaler opens a stream for this route.
    pub fn new(gate: Arc<Gate>) -> Self {
        gate.demand.stream_opened();
        Self(gate)
    }

    /// The route.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.0
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.demand.stream_closed();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::{
        coldstart::ColdStarts,
        demand::{Capacity, queue_depth},
        domain::Policy,
        hold::Released,
        state::Endpoint,
    };

    fn gate() -> Arc<Gate> {
        Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}))
    }

    #[tokio::test(start_paused = true)]
    async fn a_warm_request_after_the_linger_is_an_edge_and_those_after_it_are_none() {
        let gate = gate();
        let endpoint = Endpoint::new("127.0.0.1:1", 2);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        let mut changes = gate.demand().changes();
        assert!(!gate.watched_counts().is_active());
        changes.mark_unchanged();
        let first = gate.enter().unwrap();
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let second = gate.enter().unwrap();
        assert!(gate.watched_counts().is_active());
        drop((first, second));
        assert_eq!(gate.lasts_at_least(), Duration::from_secs(60), "the linger");
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(gate.watched_counts().is_active(), "59 of 60 s");
        drop(gate.enter().unwrap());
        assert!(!changes.has_changed().unwrap(), "it was true all the time");
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!gate.watched_counts().is_active());
        drop(gate.enter().unwrap());
        assert!(changes.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn background_job_is_demand_until_it_ends() {
        let gate = gate();
        let job = BackgroundJob::begin(&gate).unwrap();
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!((gate.counts().in_flight, gate.requests(), gate.in_flight()), (1, 1, 0));
        drop(job);
        assert!(gate.watched_counts().is_active(), "the linger of a minute");
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!gate.watched_counts().is_active());
        let jobs: Vec<_> = (0..BackgroundJob::MOST).map(|_| BackgroundJob::begin(&gate).unwrap()).collect();
        assert!(BackgroundJob::begin(&gate).is_none());
        assert_eq!(gate.requests(), BackgroundJob::MOST, "one too many leaves nothing");
        drop(jobs);
        assert_eq!(gate.requests(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn others_count_and_turn_demand_true_and_false() {
        let gate = gate();
        let mut changes = gate.demand().changes();
        gate.demand().set_peers(Counts { held: 2, ..Counts::default() });
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let _held = gate.hold(1, true).unwrap();
        assert_eq!((gate.counts().held, gate.counts_everywhere().held), (1, 3));
        changes.mark_unchanged();
        gate.demand().set_peers(Counts { held: 1, ..Counts::default() });
        assert!(!changes.has_changed().unwrap(), "true before and after");
        gate.demand().set_peers(Counts::default());
        assert!(changes.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn ramp_is_no_demand_while_heads_come_or_10_s() {
        let gate = gate();
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        gate.target().add(&endpoint);
        let mut held: Vec<_> = (0..48).map(|_| gate.hold(1, true).unwrap()).collect();
        let depth = || queue_depth(&gate.counts(), Capacity::from(&**gate.policy()));
        assert_eq!(depth(), 5.0, "at zero: one replica, of 5");
        gate.target().ready(&endpoint, Some(4));
        assert_eq!((gate.counts().held, gate.counts().soon, depth()), (44, 44, 3.75), "48 × 5 ÷ 64");
        let secs = Duration::from_secs;
        tokio::time::advance(secs(9)).await;
        assert_eq!(depth(), 3.75, "9 s after it opened");
        tokio::time::advance(secs(1)).await;
        assert_eq!(depth(), 44.3125, "it is stuck: 44 + 4 × 5 ÷ 64");
        let Released::Dispatch(first) = held[0].released().await else { panic!("not released") };
        // The first of a round lets nobody go, and shows that it is not stuck.
        first.first_byte();
        assert_eq!(depth(), 3.75);
        tokio::time::advance(secs(10)).await;
        assert_eq!(depth(), 44.3125);
        first.suspect();
        gate.target().ready(&endpoint, None);
        assert_eq!(
            (endpoint.limit(), gate.counts().soon),
            (5, 0),
            "one beside the 4, and nothing comes back"
        );
    }

    const ROUNDS: usize = 30_000;

    #[test]
    fn no_edge_is_missed_between_a_look_and_a_request() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        let policy = Policy {
            scaling: crate::domain::Scaling {
                linger: crate::domain::Period::from_secs(0),
                ..Default::default()
            },
            ..Policy::default()
        };
        let gate = Gate::new("tiny".into(), policy, ColdStarts::new(|_| {}));
        let endpoint = Endpoint::new("127.0.0.1:1", 1);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        // Both sides start a round within nanoseconds of each other, which a blocking barrier does not do.
        let turns = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let meet = |side: usize, turn: usize| {
            turns[side].store(turn, Ordering::SeqCst);
            for spins in 0_u64.. {
                if turns[1 - side].load(Ordering::SeqCst) >= turn {
                    return;
                }
                if spins % 1000 == 999 {
                    std::thread::yield_now();
                }
            }
        };
        // Counted, as a panic would leave the other side waiting.
        let mut missed = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _entered = runtime.handle().enter();
                for turn in (0..ROUNDS).map(|round| 3 * round) {
                    meet(0, turn + 1);
                    let permit = gate.enter().unwrap();
                    meet(0, turn + 2);
                    drop(permit);
                    meet(0, turn + 3);
                }
            });
            for turn in (0..ROUNDS).map(|round| 3 * round) {
                let changes = gate.demand().changes();
                meet(1, turn + 1);
                // The other side takes a while until it is there.
                (0..turn % 500).for_each(|_| std::hint::spin_loop());
                let seen = gate.watched_counts().is_active();
                meet(1, turn + 2);
                // Whatever the order: the look saw the request, or the request told.
                let told = changes.has_changed().unwrap();
                meet(1, turn + 3);
                // Nobody looks after its end, so nobody is resting when the next round begins.
                missed += usize::from(!seen && !told);
            }
        });
        assert_eq!(missed, 0, "of {ROUNDS}");
    }
}
