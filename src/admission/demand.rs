//! Demand of a route: its requests, lease and linger, and the other replicas.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::Gate;
use crate::demand::Counts;

/// Counts an open stream of KEDA until it is dropped.
pub struct OpenStream(Arc<Gate>);

/// A job that a model server continues after its response. Counts as demand until dropped.
pub struct BackgroundJob(Arc<Gate>);

impl Gate {
    /// Interval at which a subscriber checks for the end of demand without a linger: the end of the last request sends no
    /// notification.
    const IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(50);

    /// Time within which this replica is expected to see an endpoint that another one has found ready.
    const PEER_READY_GRACE: Duration = Duration::from_secs(10);

    /// Returns the demand of this replica.
    pub fn counts(&self) -> Counts {
        let scaling = self.policy.load().scaling;
        // Reads held before in flight: a request dispatched in between counts twice rather than not at all.
        let held = self.held() as u64;
        let in_flight = self.demand_in_flight();
        let request_rate = scaling
            .request_rate
            .map(|rate| self.demand.request_rate(self.counters.wanted(), rate.window.get()));
        Counts {
            held,
            held_with_room: self.count_held_with_room(held),
            in_flight,
            is_kept_alive: !self.demand.kept_alive_for(scaling.linger.get()).is_zero(),
            activations: self.demand.activations(),
            request_rate: request_rate.unwrap_or_default(),
            server_queue: if scaling.server_queue { self.demand.server_queue() } else { 0 },
            ready: self.target.is_up(),
            streams: self.demand.streams(),
        }
    }

    /// Returns the number of held requests that ready endpoints are about to admit; these are no demand for further
    /// replicas. An endpoint without a response head for 10 s has no such room.
    fn count_held_with_room(&self, held: u64) -> u64 {
        if held == 0 {
            return 0;
        }
        if self.target.is_up() {
            return held.min(self.target.room_soon());
        }
        // Another replica of this proxy may notice a new endpoint first.
        let is_recent = |since: Instant| since.elapsed() < Self::PEER_READY_GRACE;
        if self.demand.peers_ready_since().is_some_and(is_recent) { held } else { 0 }
    }

    /// Returns the demand of all replicas.
    pub fn counts_everywhere(&self) -> Counts {
        self.counts().plus(self.demand.peers())
    }

    /// Returns the demand of this replica. If it is false, the next request publishes an edge.
    pub fn counts_or_mark_idle(&self) -> Counts {
        self.demand.observe(|| self.counts())
    }

    /// Ends the `signal` phase of a pending activation: the scaler was notified of the demand, or has scaled.
    pub fn record_scaler_notified(&self) {
        if let Some(since) = self.demand.activation_since() {
            self.cold_starts.record_push(since);
        }
    }

    /// Returns a lower bound, above zero, of the time until the demand of this replica can become false.
    pub fn active_for_at_least(&self) -> Duration {
        let linger = self.policy.load().scaling.linger.get();
        if self.requests() > 0 {
            return linger.max(Self::IDLE_CHECK_INTERVAL);
        }
        match self.demand.kept_alive_for(linger) {
            Duration::ZERO => Self::IDLE_CHECK_INTERVAL,
            // The resolution of tokio's timers.
            left => left.max(Duration::from_millis(1)),
        }
    }

    /// Samples the request rate, if the policy scales by it; about once a second.
    pub fn sample_rate(&self) {
        if let Some(rate) = self.policy.load().scaling.request_rate {
            self.demand.sample(self.counters.wanted(), rate.window.get());
        }
    }
}

// === impl BackgroundJob ===

impl BackgroundJob {
    /// Maximum number of jobs counted per route.
    const MAX_JOBS: u64 = 1024;

    /// Counts a job, unless the route has too many.
    pub fn begin(gate: &Arc<Gate>) -> Option<Self> {
        // Built first, so that dropping it on failure takes the count back.
        let job = Self(gate.clone());
        let before = gate.background_jobs.fetch_add(1, Ordering::SeqCst);
        (before < Self::MAX_JOBS).then_some(job)
    }

    /// Returns the gate.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.0
    }
}

impl Drop for BackgroundJob {
    fn drop(&mut self) {
        // Restarts the linger.
        self.0.demand.record_activity();
        self.0.background_jobs.fetch_sub(1, Ordering::SeqCst);
    }
}

// === impl OpenStream ===

impl OpenStream {
    /// Counts a stream of KEDA.
    pub fn new(gate: Arc<Gate>) -> Self {
        gate.demand.add_stream();
        Self(gate)
    }

    /// Returns the gate.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.0
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.demand.remove_stream();
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
        hold::ReleaseOutcome,
        state::Endpoint,
    };

    fn gate() -> Arc<Gate> {
        Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}))
    }

    #[tokio::test(start_paused = true)]
    async fn first_warm_request_after_idle_is_an_edge() {
        let gate = gate();
        let endpoint = Endpoint::new("127.0.0.1:1", 2);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        let mut changes = gate.demand().changes();
        assert!(!gate.counts_or_mark_idle().is_active());
        changes.mark_unchanged();
        let first = gate.enter().unwrap();
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let second = gate.enter().unwrap();
        assert!(gate.counts_or_mark_idle().is_active());
        drop((first, second));
        assert_eq!(gate.active_for_at_least(), Duration::from_secs(60), "the linger");
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(gate.counts_or_mark_idle().is_active(), "59 of 60 s");
        drop(gate.enter().unwrap());
        assert!(!changes.has_changed().unwrap(), "demand stayed true");
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!gate.counts_or_mark_idle().is_active());
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
        assert!(gate.counts_or_mark_idle().is_active(), "the linger of a minute");
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!gate.counts_or_mark_idle().is_active());
        let jobs: Vec<_> =
            (0..BackgroundJob::MAX_JOBS).map(|_| BackgroundJob::begin(&gate).unwrap()).collect();
        assert!(BackgroundJob::begin(&gate).is_none());
        assert_eq!(gate.requests(), BackgroundJob::MAX_JOBS, "a refused job is not counted");
        drop(jobs);
        assert_eq!(gate.requests(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn peers_turn_demand_true_and_false() {
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
    async fn ramp_is_not_demand_while_it_makes_progress() {
        let gate = gate();
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        gate.target().add(&endpoint);
        let mut held: Vec<_> = (0..48).map(|_| gate.hold(1, true).unwrap()).collect();
        let depth = || queue_depth(&gate.counts(), Capacity::from(&**gate.policy()));
        assert_eq!(depth(), 5.0, "at zero: one replica, of 5");
        gate.target().ready(&endpoint, Some(4));
        assert_eq!(
            (gate.counts().held, gate.counts().held_with_room, depth()),
            (44, 44, 3.75),
            "48 × 5 ÷ 64"
        );
        let secs = Duration::from_secs;
        tokio::time::advance(secs(9)).await;
        assert_eq!(depth(), 3.75, "9 s after it opened");
        tokio::time::advance(secs(1)).await;
        assert_eq!(depth(), 44.3125, "stuck: 44 + 4 × 5 ÷ 64");
        let ReleaseOutcome::Dispatch(first) = held[0].released().await else { panic!("not released") };
        // The first response of a round does not raise the limit, but counts as progress.
        first.first_byte();
        assert_eq!(depth(), 3.75);
        tokio::time::advance(secs(10)).await;
        assert_eq!(depth(), 44.3125);
        first.suspect();
        gate.target().ready(&endpoint, None);
        assert_eq!(
            (endpoint.limit(), gate.counts().held_with_room),
            (5, 0),
            "one beside the 4, and no progress"
        );
    }

    const ROUNDS: usize = 30_000;

    #[test]
    fn no_edge_is_missed_between_idle_and_request() {
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
        // Starts both sides within nanoseconds of each other, which a blocking barrier does not.
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
        // Counts misses instead of asserting, as a panic would leave the other thread waiting.
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
                // Varies the offset between the two sides.
                (0..turn % 500).for_each(|_| std::hint::spin_loop());
                let seen = gate.counts_or_mark_idle().is_active();
                meet(1, turn + 2);
                // Whatever the order, the counts include the request or the request published an edge.
                let is_notified = changes.has_changed().unwrap();
                meet(1, turn + 3);
                missed += usize::from(!seen && !is_notified);
            }
        });
        assert_eq!(missed, 0, "of {ROUNDS}");
    }
}
