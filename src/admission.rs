//! Admission: the gate of a route hands tickets to held requests and permits to dispatched ones.

mod demand;
mod directory;
mod gate;
mod permit;
mod quiet;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use gate::PermitKind;
pub use gate::{Gate, Permit};
use quiet::QuietRequests;
use tokio_util::sync::CancellationToken;

pub use demand::{BackgroundJob, OpenStream};
pub use directory::{Directory, Gates};

use crate::{
    coldstart::{ColdStarts, Tracker},
    demand::{Demand, DemandEvent},
    domain::{ObstacleKind, Policy, RouteKey, WhenPaused},
    error::{MAX_RETRY_AFTER, ProxyError},
    hold::{Bounds, Full, QueuePosition, ReleaseOutcome, Ticket},
    pick::{Load as _, pick},
    state::{Change, Endpoint, Obstacle, TargetState},
    telemetry::RouteCounters,
};

// === impl Gate ===

impl Gate {
    /// Creates the gate of a route without endpoints.
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
            evicted: CancellationToken::new(),
            fallback: ArcSwapOption::empty(),
            in_flight_on_fallback: AtomicU64::new(0),
            quiet: QuietRequests::default(),
            background_jobs: AtomicU64::new(0),
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

    /// Returns the key of the route.
    pub const fn key(&self) -> &RouteKey {
        &self.key
    }

    /// Returns the current policies.
    pub fn policy(&self) -> Guard<Arc<Policy>> {
        self.policy.load()
    }

    /// Replaces the policies. Held requests keep their deadline.
    pub fn set_policy(&self, policy: Policy) {
        let max = policy.concurrency.max;
        self.set_fallback(&policy);
        self.policy.store(Arc::new(policy));
        self.target.set_max(max);
        self.demand.publish(DemandEvent::InputChanged);
        self.fail_held_if_paused();
    }

    /// Returns the endpoints.
    pub const fn target(&self) -> &TargetState {
        &self.target
    }

    /// Returns the demand, without the counts of requests.
    pub const fn demand(&self) -> &Demand {
        &self.demand
    }

    /// Returns the tracker of cold starts.
    pub const fn cold_starts(&self) -> &Tracker {
        &self.cold_starts
    }

    /// Returns the counters of the metrics.
    pub const fn counters(&self) -> &RouteCounters {
        &self.counters
    }

    /// Returns the number of held requests.
    pub fn held(&self) -> usize {
        self.queue.len()
    }

    /// Returns the bytes of held bodies.
    pub fn held_bytes(&self) -> usize {
        self.queue.bytes()
    }

    /// Returns the age of the oldest held request.
    pub fn oldest_held(&self) -> Option<Duration> {
        self.queue.oldest().map(|since| since.elapsed())
    }

    /// Returns the number of requests in flight on the target and its fallback, quiet ones included.
    pub fn in_flight(&self) -> u64 {
        self.target.in_flight() + self.in_flight_on_fallback.load(Ordering::SeqCst)
    }

    /// Returns the number of requests in flight that are demand, and of background jobs.
    pub fn demand_in_flight(&self) -> u64 {
        self.quiet.subtract_from(|| self.in_flight()) + self.background_jobs.load(Ordering::SeqCst)
    }

    /// Returns the number of requests that are demand, held or in flight.
    pub fn requests(&self) -> u64 {
        self.held() as u64 + self.demand_in_flight()
    }

    /// Admits a request to an endpoint with room, unless other requests are held. The returned position is for
    /// [`Self::readmit`].
    pub fn enter(self: &Arc<Self>) -> Option<(Permit, QueuePosition)> {
        self.enter_for(None)
    }

    /// Like [`Self::enter`], for a request bound to endpoint `pin`. If the target no longer has that endpoint, the
    /// request goes to any other, which reports the missing state to the client.
    pub fn enter_for(self: &Arc<Self>, pin: Option<u64>) -> Option<(Permit, QueuePosition)> {
        if !self.queue.is_empty() {
            return None;
        }
        let permit = self.try_permit(pin)?;
        self.demand.record_activity();
        self.counters.admit();
        self.demand.notify_if_idle();
        Some((permit, self.queue.place()))
    }

    /// Admits a request that is not demand to an endpoint with room. It neither wakes the target nor keeps it up.
    pub fn enter_quietly(self: &Arc<Self>) -> Option<Permit> {
        let endpoint = self.acquire(None)?;
        let permit = Permit::new(self, endpoint, PermitKind::Quiet);
        self.counters.admit_without_demand();
        Some(permit)
    }

    /// Returns a permit on the fallback, if the route has one, for a request whose wait has failed.
    pub fn fall_back(self: &Arc<Self>) -> Option<Permit> {
        let endpoint = self.fallback.load_full().filter(|fallback| fallback.acquire())?;
        Some(Permit::new(self, endpoint, PermitKind::Fallback))
    }

    /// Requests an activation for a request that is not held.
    pub fn wake(&self) {
        if self.paused().is_some() {
            // The request will have ended before autoscaling is resumed, so it creates no demand.
            return;
        }
        self.demand.record_activity();
        if !self.target.is_up() {
            self.demand.request_activation(self.policy.load().readiness.activation_timeout.get());
            if self.target.is_up() {
                // An endpoint became ready meanwhile, perhaps before the lease started.
                self.demand.end_activation();
            }
        }
        self.demand.notify_if_idle();
        self.fail_held_if_paused();
    }

    /// Enqueues a request. `wait` is false for a request that is rejected instead of held.
    ///
    /// # Errors
    /// [`ProxyError::Draining`], [`ProxyError::AutoscalingPaused`], [`ProxyError::NoWait`],
    /// [`ProxyError::HoldQueueFull`] (no endpoint is ready) or [`ProxyError::Saturated`] (all ready endpoints are
    /// full).
    pub fn hold(self: &Arc<Self>, bytes: usize, wait: bool) -> Result<Ticket<Permit>, ProxyError> {
        self.hold_for(None, bytes, wait)
    }

    /// Like [`Self::hold`], for a request bound to endpoint `pin`.
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
            // Creates no demand: it would start the target when autoscaling is resumed, after the request has ended.
            return Err(ProxyError::AutoscalingPaused {
                route: self.key.clone(),
                reason: obstacle.message.clone(),
            });
        }
        if !wait {
            self.wake();
            return Err(ProxyError::NoWait {
                route: self.key.clone(),
                retry_after: self.cold_starts.time_left(),
            });
        }
        self.demand.record_activity();
        let policy = self.policy.load();
        let bounds = Bounds { requests: policy.hold.max_requests, bytes: policy.hold.max_bytes.get() };
        let ticket = self.queue.join_for(pin, bytes, bounds).map_err(|full| self.full_error(full, up))?;
        self.counters.admit();
        self.after_enqueue(&policy);
        Ok(ticket)
    }

    /// Enqueues a request again at its old position, ahead of all requests admitted after it, because its dispatch
    /// failed before the first byte of the response.
    pub fn readmit(self: &Arc<Self>, place: QueuePosition, bytes: usize) -> Ticket<Permit> {
        self.readmit_for(None, place, bytes)
    }

    /// Like [`Self::readmit`], for a request bound to endpoint `pin`.
    pub fn readmit_for(
        self: &Arc<Self>,
        pin: Option<u64>,
        place: QueuePosition,
        bytes: usize,
    ) -> Ticket<Permit> {
        let ticket = self.queue.rejoin_for(pin, place, bytes);
        self.after_enqueue(&self.policy.load());
        ticket
    }

    /// Schedules an update of the dashboard.
    pub fn mark_dirty(&self) {
        self.cold_starts.pulse().notify_change();
    }

    /// Starts draining: from now on, a request is rejected instead of held while no endpoint is ready.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.mark_dirty();
    }

    /// Fails the held requests near the end of draining, and returns their number.
    pub fn evict(&self) -> usize {
        self.evicted.cancel();
        self.queue.release_all(|| ReleaseOutcome::Draining)
    }

    /// Waits for [`Self::evict`], at which tasks that do not end by themselves must stop. Cancel-safe.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// Publishes the demand of a request that has been enqueued. The endpoints are read after the enqueueing, and the queue
    /// is read after the last endpoint has retired, so that at least one side sees the other.
    fn after_enqueue(self: &Arc<Self>, policy: &Policy) {
        if !self.target.is_up() {
            self.demand.request_activation(policy.readiness.activation_timeout.get());
            self.cold_starts.record_held(self.queue.len());
            if self.target.is_up() {
                // An endpoint became ready meanwhile, perhaps before the lease started.
                self.demand.end_activation();
            }
        } else {
            self.demand.publish(DemandEvent::Enqueued);
        }
        self.demand.notify_if_idle();
        self.release_held();
        self.mark_dirty();
        if self.evicted.is_cancelled() {
            self.evict();
        }
        // A pause that started between the check and the enqueueing has failed all other held requests, but missed this
        // one.
        self.fail_held_if_paused();
    }

    /// Returns the pause of autoscaling, if the target is down and the policy rejects requests during a pause.
    fn paused(&self) -> Option<Arc<Obstacle>> {
        let obstacle = self.target.obstacle()?;
        let reject = self.policy.load().when_paused == WhenPaused::Reject;
        (reject && obstacle.kind == ObstacleKind::AutoscalingPaused && !self.target.is_up())
            .then_some(obstacle)
    }

    /// Fails the held requests if autoscaling is paused and no endpoint is up. Loss of the last endpoint does not call
    /// this, so the watcher of the pause must call it periodically.
    pub fn fail_held_if_paused(&self) {
        let Some(obstacle) = self.paused() else { return };
        // Updates the record first: a client may read it as soon as its request has failed.
        self.cold_starts.failed(obstacle.message.full().clone(), Vec::new());
        self.demand.end_activation();
        self.queue.release_all(|| ReleaseOutcome::Failed(obstacle.message.clone(), Some(MAX_RETRY_AFTER)));
    }

    fn try_permit(self: &Arc<Self>, pin: Option<u64>) -> Option<Permit> {
        let endpoint = self.acquire(pin)?;
        self.cold_starts.dispatched();
        Some(Permit::new(self, endpoint, PermitKind::Demand))
    }

    fn acquire(&self, pin: Option<u64>) -> Option<Arc<Endpoint>> {
        let endpoints = self.target.endpoints();
        let pinned = pin.and_then(|pin| endpoints.iter().find(|endpoint| endpoint.id() == pin));
        if let Some(pinned) = pinned {
            return pinned.acquire().then(|| pinned.clone());
        }
        while let Some(endpoint) = pick(&endpoints, fastrand::u64(..)) {
            // Another thread may have taken the last place meanwhile.
            if endpoint.acquire() {
                return Some(endpoint.clone());
            }
        }
        // A doubted endpoint is usually alive, so dispatching to it beats holding the request.
        endpoints.iter().find(|endpoint| endpoint.is_doubted() && endpoint.acquire()).cloned()
    }

    /// Returns true if another endpoint has room and is not doubted.
    pub fn has_room_beside(&self, endpoint: &Endpoint) -> bool {
        let endpoints = self.target.endpoints();
        endpoints.iter().any(|other| other.id() != endpoint.id() && other.in_flight_if_room().is_some())
    }

    /// Replaces the fallback if its address has changed; otherwise the old one keeps its connections.
    fn set_fallback(&self, policy: &Policy) {
        let address = policy.intercept.as_ref().and_then(|intercept| intercept.fallback.as_deref());
        if self.fallback.load().as_ref().map(|known| known.address()) != address {
            self.fallback.store(address.map(Endpoint::unwatched));
        }
    }

    fn release_held(self: &Arc<Self>) {
        self.queue.release_for(|pin| self.try_permit(pin));
    }

    fn target_changed(self: &Arc<Self>, change: Change) {
        self.mark_dirty();
        match change {
            Change::Status => {}
            Change::Room => self.release_held(),
            Change::Obstacle => {
                if let Some(obstacle) =
                    self.target.obstacle().filter(|obstacle| obstacle.kind.prevents_start())
                {
                    self.cold_starts.set_obstacle(obstacle.message.full().clone());
                }
                self.fail_held_if_paused();
            }
            Change::Failed(reason, retry_after) => {
                self.queue.release_all(|| ReleaseOutcome::Failed(reason.clone(), retry_after));
            }
        }
    }

    fn full_error(&self, full: Full, up: bool) -> ProxyError {
        let hold = self.policy.load().hold;
        let reason = match full {
            Full::Requests => format!("{} requests are held already", hold.max_requests),
            Full::Bytes => format!("with this request, the held bodies would exceed {}", hold.max_bytes),
        };
        let route = self.key.clone();
        if up {
            return ProxyError::Saturated { route, reason };
        }
        ProxyError::HoldQueueFull { route, reason, retry_after: self.cold_starts.time_left() }
    }
}

#[cfg(test)]
mod tests;
