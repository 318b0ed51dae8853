//! May a request enter? The gate of a route gives tickets to those that wait and permits to those that go.

mod demand;
mod directory;
mod permit;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use permit::Kind;
pub use permit::Permit;
use tokio_util::sync::CancellationToken;

pub use demand::{BackgroundJob, OpenStream};
pub use directory::{Directory, Gates};

use crate::{
    coldstart::{ColdStarts, Tracker},
    demand::Demand,
    domain::{ObstacleKind, Policy, RouteKey, WhenPaused},
    error::{MAX_RETRY_AFTER, ProxyError},
    hold::{Bounds, Full, HoldQueue, Place, Released, Ticket},
    pick::{Load as _, pick},
    state::{Change, Endpoint, Obstacle, TargetState},
    telemetry::RouteCounters,
};

/// The live side of a route: its queue, its endpoints, its demand and its counts. It outlives reloads of the
/// configuration; requests hold it.
pub struct Gate {
    key: RouteKey,
    policy: ArcSwap<Policy>,
    target: TargetState,
    queue: Arc<HoldQueue<Permit>>,
    demand: Demand,
    cold_starts: Tracker,
    counters: RouteCounters,
    draining: AtomicBool,
    /// Nobody is held any more, whoever comes back.
    evicting: AtomicBool,
    /// The same, for those who wait for it.
    evicted: CancellationToken,
    /// What gets requests that waited in vain.
    fallback: ArcSwapOption<Endpoint>,
    /// How many are in flight there.
    fallen_back: AtomicU64,
    /// How many in flight are no demand.
    quiet: AtomicU64,
    /// Jobs of `POST /v1/responses` that run on after their answer.
    background: AtomicU64,
}

// === impl Gate ===

impl Gate {
    /// The gate of a route that nothing is known of yet.
    pub fn new(key: RouteKey, policy: Policy, cold_starts: Arc<ColdStarts>) -> Arc<Self> {
        let gate = Arc::new(Self {
            cold_starts: Tracker::new(key.clone(), cold_starts),
            key,
            policy: ArcSwap::from_pointee(policy),
            target: TargetState::default(),
            queue: Arc::default(),
            demand: Demand::default(),
            counters: RouteCounters::default(),
            draining: AtomicBool::new(false),
            evicting: AtomicBool::new(false),
            evicted: CancellationToken::new(),
            fallback: ArcSwapOption::empty(),
            fallen_back: AtomicU64::new(0),
            quiet: AtomicU64::new(0),
            background: AtomicU64::new(0),
        });
        gate.set_fallback(&gate.policy.load());
        let watched = Arc::downgrade(&gate);
        gate.target.subscribe(move |change| {
            if let Some(gate) = watched.upgrade() {
                gate.target_changed(change);
            }
        });
        gate
    }

    /// Which route this is.
    pub const fn key(&self) -> &RouteKey {
        &self.key
    }

    /// The policies as they are now.
    pub fn policy(&self) -> Guard<Arc<Policy>> {
        self.policy.load()
    }

    /// New policies, from a reload: held requests keep the deadline that they came in with.
    pub fn set_policy(&self, policy: Policy) {
        let max = policy.concurrency.max;
        self.set_fallback(&policy);
        self.policy.store(Arc::new(policy));
        self.target.set_max(max);
        self.demand.changed();
        self.give_up_if_paused();
    }

    /// The endpoints, for who publishes them.
    pub const fn target(&self) -> &TargetState {
        &self.target
    }

    /// The demand, but for the counts.
    pub const fn demand(&self) -> &Demand {
        &self.demand
    }

    /// The cold starts of this route.
    pub const fn cold_starts(&self) -> &Tracker {
        &self.cold_starts
    }

    /// What is counted.
    pub const fn counters(&self) -> &RouteCounters {
        &self.counters
    }

    /// How many requests are held.
    pub fn held(&self) -> usize {
        self.queue.len()
    }

    /// How many bytes of bodies are held.
    pub fn held_bytes(&self) -> usize {
        self.queue.bytes()
    }

    /// How long the oldest held request has waited.
    pub fn oldest_held(&self) -> Option<Duration> {
        self.queue.oldest().map(|since| since.elapsed())
    }

    /// How many requests are in flight: on the target or its fallback, wanted or quiet.
    pub fn in_flight(&self) -> u64 {
        self.target.in_flight() + self.fallen_back.load(Ordering::SeqCst)
    }

    /// How many of those in flight want the target, and jobs that run in the background.
    pub fn wanting_in_flight(&self) -> u64 {
        // The quiet ones first: one that begins meanwhile is then counted as wanting, rather than another one not.
        let quiet = self.quiet.load(Ordering::SeqCst);
        self.in_flight().saturating_sub(quiet) + self.background.load(Ordering::SeqCst)
    }

    /// How many requests want the target: held and in flight.
    pub fn requests(&self) -> u64 {
        self.held() as u64 + self.wanting_in_flight()
    }

    /// Lets a request in to an endpoint that has room, unless others wait for one. The place is where it may come
    /// back to.
    pub fn enter(self: &Arc<Self>) -> Option<(Permit, Place)> {
        self.enter_for(None)
    }

    /// The same, for a request that has to go to this endpoint. Once the target does not have it any more, any other does:
    /// what it kept has gone with it, and a server is to say so.
    pub fn enter_for(self: &Arc<Self>, pin: Option<u64>) -> Option<(Permit, Place)> {
        if !self.queue.is_empty() {
            return None;
        }
        let permit = self.try_permit(pin)?;
        self.demand.touch();
        self.counters.admit();
        self.demand.rise();
        Some((permit, self.queue.place()))
    }

    /// Lets a request in that is no demand, to an endpoint that has room. It neither wakes the target nor keeps it up.
    pub fn enter_quietly(self: &Arc<Self>) -> Option<Permit> {
        let endpoint = self.acquire(None)?;
        let permit = Permit::new(self, endpoint, Kind::Quiet);
        self.counters.admit_quietly();
        Some(permit)
    }

    /// Sends a request that waited in vain, and has left the queue, to the fallback, if there is one.
    pub fn fall_back(self: &Arc<Self>) -> Option<Permit> {
        let endpoint = self.fallback.load_full().filter(|fallback| fallback.acquire())?;
        Some(Permit::new(self, endpoint, Kind::Fallback))
    }

    /// Wakes the target for a request that does not wait for it: the next one should find it up.
    pub fn wake(&self) {
        if self.paused().is_some() {
            // Nobody is left who wants it when autoscaling is resumed.
            return;
        }
        self.demand.touch();
        if !self.target.is_up() {
            self.demand.signal(self.policy.load().readiness.activation_timeout.get());
            if self.target.is_up() {
                // As for those who wait: no lease for what came up just now.
                self.demand.settle();
            }
        }
        self.demand.rise();
        self.give_up_if_paused();
    }

    /// Lets a request into the queue. `wait` is false for one that would rather be refused than wait.
    ///
    /// # Errors
    /// [`ProxyError::Draining`], [`ProxyError::AutoscalingPaused`], [`ProxyError::NoWait`],
    /// [`ProxyError::HoldQueueFull`] (nothing is up) or [`ProxyError::Saturated`] (up, but full).
    pub fn hold(self: &Arc<Self>, bytes: usize, wait: bool) -> Result<Ticket<Permit>, ProxyError> {
        self.hold_for(None, bytes, wait)
    }

    /// The same, for a request that has to go to this endpoint.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub fn hold_for(
        self: &Arc<Self>,
        pin: Option<u64>,
        bytes: usize,
        wait: bool,
    ) -> Result<Ticket<Permit>, ProxyError> {
        let up = self.target.is_up();
        if self.draining.load(Ordering::SeqCst) && !up {
            return Err(ProxyError::Draining { admitted: false });
        }
        if let Some(obstacle) = self.paused() {
            // Without a trace in the demand: what nobody waits for is not started when autoscaling is resumed.
            return Err(ProxyError::AutoscalingPaused {
                route: self.key.clone(),
                reason: obstacle.message.clone(),
            });
        }
        if !wait {
            // It may not wait, but it has a right to the target.
            self.wake();
            return Err(ProxyError::NoWait {
                route: self.key.clone(),
                retry_after: self.cold_starts.time_left(),
            });
        }
        self.demand.touch();
        let policy = self.policy.load();
        let bounds = Bounds { requests: policy.hold.max_requests, bytes: policy.hold.max_bytes.get() };
        let ticket = self.queue.join_for(pin, bytes, bounds).map_err(|full| self.full(full, up))?;
        self.counters.admit();
        self.wanted(&policy);
        Ok(ticket)
    }

    /// Takes a request back whose dispatch failed before its first byte: ahead of all that were admitted after it.
    pub fn readmit(self: &Arc<Self>, place: Place, bytes: usize) -> Ticket<Permit> {
        self.readmit_for(None, place, bytes)
    }

    /// The same, for a request that has to go to this endpoint.
    pub fn readmit_for(self: &Arc<Self>, pin: Option<u64>, place: Place, bytes: usize) -> Ticket<Permit> {
        let ticket = self.queue.rejoin_for(pin, place, bytes);
        self.wanted(&self.policy.load());
        ticket
    }

    /// Something that is shown of it has changed.
    pub fn stirred(&self) {
        self.cold_starts.pulse().beat();
    }

    /// We are about to stop: what cannot be served now is refused from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.stirred();
    }

    /// The held requests have waited as long as draining allows.
    pub fn evict(&self) -> usize {
        self.evicting.store(true, Ordering::SeqCst);
        self.evicted.cancel();
        self.queue.release_all(|| Released::Draining)
    }

    /// Waits until draining is nearly over, and what would go on without end is to end. Cancel-safe.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// Says that somebody has joined the queue. Whoever retires the last endpoint looks at the queue afterwards, and
    /// whether one is up is looked at here after joining, so at least one sees the other.
    fn wanted(self: &Arc<Self>, policy: &Policy) {
        if !self.target.is_up() {
            self.demand.signal(policy.readiness.activation_timeout.get());
            self.cold_starts.held(self.queue.len());
            if self.target.is_up() {
                // It came up just now, perhaps before the signal: no lease for what is there.
                self.demand.settle();
            }
        } else {
            self.demand.stir();
        }
        self.demand.rise();
        self.pump();
        self.stirred();
        if self.evicting.load(Ordering::SeqCst) {
            self.evict();
        }
        // The pause may have come between the look at it and the joining; then it found nobody waiting.
        self.give_up_if_paused();
    }

    /// The pause under which nothing starts the target, if it is down and requests are not to wait for the end of it.
    fn paused(&self) -> Option<Arc<Obstacle>> {
        let obstacle = self.target.obstacle()?;
        let reject = self.policy.load().when_paused == WhenPaused::Reject;
        (reject && obstacle.kind == ObstacleKind::AutoscalingPaused && !self.target.is_up())
            .then_some(obstacle)
    }

    /// Tells those who wait if they do so in vain: autoscaling is paused, and nothing is up. An endpoint that goes away
    /// does not say so here, so whoever watches the pause looks again from time to time.
    pub fn give_up_if_paused(&self) {
        let Some(obstacle) = self.paused() else { return };
        // The record first, so that who is told finds it.
        self.cold_starts.failed(obstacle.message.full().clone(), Vec::new());
        self.demand.settle();
        self.queue.release_all(|| Released::Failed(obstacle.message.clone(), Some(MAX_RETRY_AFTER)));
    }

    fn try_permit(self: &Arc<Self>, pin: Option<u64>) -> Option<Permit> {
        let endpoint = self.acquire(pin)?;
        self.cold_starts.dispatched();
        Some(Permit::new(self, endpoint, Kind::Demand))
    }

    fn acquire(&self, pin: Option<u64>) -> Option<Arc<Endpoint>> {
        let endpoints = self.target.endpoints();
        let pinned = pin.and_then(|pin| endpoints.iter().find(|endpoint| endpoint.id() == pin));
        if let Some(pinned) = pinned {
            return pinned.acquire().then(|| pinned.clone());
        }
        while let Some(endpoint) = pick(&endpoints, fastrand::u64(..)) {
            // Another core may have taken the last place since it was looked at; then we look again.
            if endpoint.acquire() {
                return Some(endpoint.clone());
            }
        }
        // One that is in doubt mostly lives, and holding requests back from it would punish them for another one.
        endpoints.iter().find(|endpoint| endpoint.is_doubted() && endpoint.acquire()).cloned()
    }

    /// Whether any endpoint but this one has room, and is not in doubt.
    pub fn has_room_beside(&self, endpoint: &Endpoint) -> bool {
        let endpoints = self.target.endpoints();
        endpoints.iter().any(|other| other.id() != endpoint.id() && other.room().is_some())
    }

    /// Where requests in flight of this kind are counted besides.
    const fn apart(&self, kind: Kind) -> Option<&AtomicU64> {
        match kind {
            Kind::Demand => None,
            Kind::Quiet => Some(&self.quiet),
            Kind::Fallback => Some(&self.fallen_back),
        }
    }

    /// The fallback of these policies. The same address stays the same endpoint, with its connections.
    fn set_fallback(&self, policy: &Policy) {
        let address = policy.intercept.as_ref().and_then(|intercept| intercept.fallback.as_deref());
        if self.fallback.load().as_ref().map(|known| known.address()) != address {
            self.fallback.store(address.map(Endpoint::unwatched));
        }
    }

    fn pump(self: &Arc<Self>) {
        if !self.queue.is_empty() {
            self.queue.release_for(|pin| self.try_permit(pin));
        }
    }

    fn target_changed(self: &Arc<Self>, change: Change) {
        self.stirred();
        match change {
            Change::Status => {}
            Change::Room => self.pump(),
            Change::Obstacle => {
                if let Some(obstacle) = self.target.obstacle().filter(|obstacle| obstacle.kind.hinders()) {
                    self.cold_starts.hindered(obstacle.message.full().clone());
                }
                self.give_up_if_paused();
            }
            Change::Failed(reason, retry_after) => {
                self.queue.release_all(|| Released::Failed(reason.clone(), retry_after));
            }
        }
    }

    fn full(&self, full: Full, up: bool) -> ProxyError {
        let hold = self.policy.load().hold;
        let reason = match full {
            Full::Requests => format!("{} requests wait already", hold.max_requests),
            Full::Bytes => format!("with this one, more than {} of requests would wait", hold.max_bytes),
        };
        let route = self.key.clone();
        if up {
            return ProxyError::Saturated { route, reason };
        }
        ProxyError::HoldQueueFull { route, reason, retry_after: self.cold_starts.time_left() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Intercept;

    fn gate() -> Arc<Gate> {
        Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}))
    }

    #[tokio::test]
    async fn a_permit_that_comes_back_lets_the_next_one_go() {
        let gate = gate();
        let endpoint = Endpoint::new("127.0.0.1:1", 1);
        gate.target().add(&endpoint);
        let (mut first, mut second) = (gate.hold(1, true).unwrap(), gate.hold(1, true).unwrap());
        assert!(gate.demand().is_leased());
        gate.target().ready(&endpoint, Some(1));
        let Released::Dispatch(permit) = first.released().await else { panic!("not released") };
        assert_eq!((gate.held(), gate.in_flight()), (1, 1));
        assert!(gate.enter().is_none(), "who waits goes first");
        drop(permit);
        let Released::Dispatch(permit) = second.released().await else { panic!("not released") };
        drop(permit);
        assert_eq!((gate.held(), gate.in_flight()), (0, 0));
        assert!(gate.enter().is_some());
    }

    #[tokio::test]
    async fn nobody_comes_back_to_a_queue_that_was_evicted() {
        let gate = gate();
        let mut held = gate.hold(1, true).unwrap();
        gate.drain();
        assert!(matches!(gate.hold(1, true), Err(ProxyError::Draining { admitted: false })));
        assert_eq!(gate.evict(), 1);
        assert!(matches!(held.released().await, Released::Draining));
        assert!(matches!(gate.readmit(held.place(), 1).released().await, Released::Draining));
        assert_eq!(gate.held(), 0);
    }

    #[tokio::test]
    async fn who_may_not_wait_wakes_the_target_all_the_same() {
        let gate = gate();
        assert!(matches!(gate.hold(1, false), Err(ProxyError::NoWait { .. })));
        assert!(gate.demand().is_leased());
        assert_eq!((gate.held(), gate.counters().admitted()), (0, 0));
    }
    #[tokio::test]
    async fn a_quiet_request_is_in_flight_and_no_demand() {
        let gate = gate();
        assert!(gate.enter_quietly().is_none(), "nothing is up");
        let endpoint = Endpoint::new("127.0.0.1:1", 1);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        let permit = gate.enter_quietly().unwrap();
        permit.first_byte();
        assert_eq!((gate.in_flight(), gate.wanting_in_flight(), gate.requests()), (1, 0, 0));
        assert!(gate.enter_quietly().is_none(), "the limit holds for it, too");
        drop(permit);
        assert_eq!((gate.in_flight(), gate.wanting_in_flight()), (0, 0));
        assert!(gate.demand().quiet_for().is_none() && gate.demand().raised_since().is_none());
        assert_eq!((gate.counters().admitted(), gate.counters().wanted()), (1, 0));
        assert!(!gate.counts().is_active());
    }

    #[tokio::test]
    async fn what_goes_to_the_fallback_is_in_flight_and_demand() {
        let gate = gate();
        assert!(gate.fall_back().is_none());
        let policy = |fallback: &str| {
            let intercept = Intercept { fallback: Some(fallback.into()), ..Intercept::default() };
            Policy { intercept: Some(Arc::new(intercept)), ..Policy::default() }
        };
        gate.set_policy(policy("elsewhere:80"));
        let permit = gate.fall_back().unwrap();
        assert_eq!((gate.in_flight(), gate.requests()), (1, 1));
        permit.suspect();
        let id = permit.endpoint().id();
        gate.set_policy(policy("elsewhere:80"));
        assert_eq!(gate.fall_back().unwrap().endpoint().id(), id, "its connections can be used again");
        gate.set_policy(policy("otherwhere:80"));
        assert_eq!(gate.fall_back().unwrap().endpoint().address(), "otherwhere:80");
        assert_eq!(gate.in_flight(), 1, "at the one before");
        drop(permit);
        assert_eq!(gate.in_flight(), 0);
    }

    fn paused() -> Option<Obstacle> {
        Some(Obstacle::new(ObstacleKind::AutoscalingPaused, "ScaledObject `a/b` is paused"))
    }

    #[tokio::test]
    async fn under_a_pause_at_zero_nobody_enters_and_nothing_is_woken() {
        let gate = gate();
        gate.target().set_obstacle(paused());
        for wait in [true, false] {
            let Err(ProxyError::AutoscalingPaused { reason, .. }) = gate.hold(1, wait) else {
                panic!("let in")
            };
            assert_eq!(&*reason, "ScaledObject `a/b` is paused");
        }
        gate.wake();
        assert!(gate.enter().is_none());
        assert_eq!(
            (gate.demand().raised_since(), gate.demand().quiet_for()),
            (None, None),
            "not even the linger"
        );
        let endpoint = Endpoint::new("127.0.0.1:1", 1);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        let (permit, _) = gate.enter().expect("what is up serves");
        let held = gate.hold(1, true).expect("and may be waited for");
        drop((permit, held));
        endpoint.retire();
        gate.target().set_obstacle(None);
        assert!(gate.hold(1, true).is_ok(), "resumed");
    }

    #[tokio::test]
    async fn who_waits_when_a_pause_comes_is_told_at_once() {
        let gate = gate();
        let mut held = gate.hold(1, true).unwrap();
        gate.cold_starts().begin(tokio::time::Instant::now(), 1);
        gate.target().set_obstacle(paused());
        let Released::Failed(reason, retry_after) = held.released().await else { panic!("not told") };
        assert_eq!((&*reason, retry_after), ("ScaledObject `a/b` is paused", Some(MAX_RETRY_AFTER)));
        assert!(!gate.demand().is_leased());
        assert!(gate.cold_starts().phase().is_none(), "the cold start is over");
        // The endpoint that kept others waiting goes away under the pause.
        let endpoint = Endpoint::new("127.0.0.1:1", 0);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        let mut held = gate.hold(1, true).unwrap();
        gate.give_up_if_paused();
        assert_eq!(gate.held(), 1, "it is up");
        endpoint.retire();
        gate.give_up_if_paused();
        assert!(matches!(held.released().await, Released::Failed(..)));
    }

    #[tokio::test]
    async fn who_is_to_wait_for_the_end_of_a_pause_does() {
        let gate = Gate::new(
            "tiny".into(),
            Policy { when_paused: WhenPaused::Hold, ..Policy::default() },
            ColdStarts::new(|_| {}),
        );
        gate.target().set_obstacle(paused());
        let mut held = gate.hold(1, true).unwrap();
        assert!(gate.demand().is_leased(), "KEDA is told as soon as it asks again");
        gate.give_up_if_paused();
        assert_eq!(gate.held(), 1);
        gate.set_policy(Policy::default());
        assert!(matches!(held.released().await, Released::Failed(..)), "until the route says otherwise");
    }
}
