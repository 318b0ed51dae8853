//! State of a target, published by its watcher (launcher, prober, Kubernetes) and read by the request path.

mod cut;
mod discovery;
mod endpoint;
mod failure;
mod front;
mod models;
mod obstacle;
mod ramp;
mod scale;
mod slots;
mod start;
mod trial;

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
pub use cut::Cut;
pub use discovery::{
    Discovered, DiscoveredEndpoint, Discovery, DiscoveryProblem, NoDiscovery, Protocol, Selection,
};
pub use endpoint::Endpoint;
pub use failure::Cause;
use failure::LastFailure;
pub use front::{Front, FrontKind};
pub use models::{ListedModels, ModelList};
pub use obstacle::Obstacle;
use parking_lot::Mutex;
pub use ramp::Level;
pub use scale::{NoScale, Replicas, Scale, ScaleError, ScaleFuture};
pub use start::{Observation, OutputTail, PartObservation, PodStart, PodWarning, Stamp};
use strum::IntoStaticStr;
use tokio::{sync::watch, time::Instant};
pub use trial::TrialResult;

use crate::domain::Reason;

/// Endpoints of a target and its progress towards readiness.
pub struct TargetState {
    endpoints: ArcSwap<Vec<Arc<Endpoint>>>,
    status: Mutex<Status>,
    obstacles: Mutex<Obstacles>,
    /// The obstacle to report: that of the cluster if there is one, else that of the probes.
    obstacle: watch::Sender<Option<Arc<Obstacle>>>,
    last_failure: LastFailure,
    /// Addresses that refused the last connection attempt, each with the time of the first refusal; bounded.
    refusing: Mutex<BTreeMap<Box<str>, Instant>>,
    models: ListedModels,
    on_change: OnceLock<Box<dyn Fn(Change) + Send + Sync>>,
}

/// Reported obstacles to the start of a target.
#[derive(Default)]
struct Obstacles {
    /// Reported by the cluster. Takes precedence: it explains more.
    cluster: Option<Arc<Obstacle>>,
    /// Reported by the proxy's own probes.
    probe: Option<Arc<Obstacle>>,
}

/// Status of a target, for users and the API.
#[derive(Clone, Debug, Default, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Status {
    /// Nothing runs and nothing is requested.
    #[default]
    Idle,
    /// Starting up.
    Starting,
    /// At least one endpoint accepts requests.
    Ready,
    /// Running, but unable to serve: vLLM's sleep mode.
    Sleeping,
    /// Shutting down or going to sleep.
    Stopping,
    /// Failed to start; the next attempt waits.
    Failed(Arc<str>),
}

/// A change made by a publisher.
#[derive(Clone, Debug)]
pub enum Change {
    /// An endpoint may accept more requests than before.
    Room,
    /// An obstacle appeared, changed or disappeared.
    Obstacle,
    /// The status changed.
    Status,
    /// The activation failed, and held requests fail with it. The duration is the time until the next attempt; `None`
    /// if that would fail for the same reason.
    Failed(Reason, Option<Duration>),
}

// === impl TargetState ===

impl Default for TargetState {
    fn default() -> Self {
        Self {
            endpoints: ArcSwap::default(),
            status: Mutex::default(),
            obstacles: Mutex::default(),
            obstacle: watch::Sender::default(),
            last_failure: LastFailure::default(),
            refusing: Mutex::default(),
            models: ListedModels::default(),
            on_change: OnceLock::new(),
        }
    }
}

impl TargetState {
    /// Sets the callback for changes, which runs on the publisher's thread. Later calls are ignored.
    pub fn subscribe(&self, on_change: impl Fn(Change) + Send + Sync + 'static) {
        let _ = self.on_change.set(Box::new(on_change));
    }

    /// Returns the known endpoints.
    pub fn endpoints(&self) -> Guard<Arc<Vec<Arc<Endpoint>>>> {
        self.endpoints.load()
    }

    /// Returns the models that the target's servers list.
    pub const fn models(&self) -> &ListedModels {
        &self.models
    }

    /// Returns whether any endpoint is ready, at capacity or not.
    pub fn is_up(&self) -> bool {
        self.endpoints.load().iter().any(|endpoint| endpoint.is_ready())
    }

    /// Returns the number of requests in flight on all known endpoints.
    pub fn in_flight(&self) -> u64 {
        self.endpoints.load().iter().map(|endpoint| u64::from(endpoint.in_flight())).sum()
    }

    /// Returns the number of further requests the known endpoints are about to accept.
    pub fn room_soon(&self) -> u64 {
        self.endpoints.load().iter().map(|endpoint| u64::from(endpoint.room_soon())).sum()
    }

    /// Adds an endpoint, ready or not.
    pub fn add(&self, endpoint: &Arc<Endpoint>) {
        self.endpoints.rcu(|known| {
            let mut known = Vec::clone(known);
            known.push(endpoint.clone());
            known
        });
    }

    /// Removes an endpoint that is retired and has nothing in flight.
    pub fn remove(&self, endpoint: &Arc<Endpoint>) {
        self.endpoints
            .rcu(|known| known.iter().filter(|known| known.id != endpoint.id).cloned().collect::<Vec<_>>());
        // Requests that wait for this endpoint may go to another.
        self.notify(Change::Room);
    }

    /// Marks an endpoint as ready, with an initial `limit`. `None` keeps the former limit, raised if possible to one
    /// slot beyond those in use.
    pub fn ready(&self, endpoint: &Endpoint, limit: Option<u32>) {
        match limit {
            Some(limit) => endpoint.ramp.begin(limit.min(endpoint.max_in_flight())),
            None => endpoint.ramp.resume(endpoint.in_flight(), endpoint.max_in_flight()),
        }
        endpoint.connections.reopen();
        endpoint.slots.open();
        self.last_failure.forget();
        self.set_probe_obstacle(None);
        self.set_status(Status::Ready);
        self.notify(Change::Room);
    }

    /// Raises the limit of an endpoint that copes with its load.
    pub fn widen(&self, endpoint: &Endpoint) {
        if endpoint.ramp.widen(endpoint.max_in_flight()) {
            self.notify(Change::Room);
        }
    }

    /// Sets the maximum per endpoint, after a reload.
    pub fn set_max(&self, max: u32) {
        for endpoint in self.endpoints.load().iter() {
            let before = endpoint.max_in_flight();
            endpoint.max.store(max, Ordering::Relaxed);
            let (limit, max) = (endpoint.limit(), endpoint.max_in_flight());
            if limit == before || limit > max {
                endpoint.ramp.set_limit(max);
            }
        }
        self.notify(Change::Room);
    }

    /// Sets the number of servers behind a gateway. A new server adds `start` to the current limit, which then grows as
    /// for any endpoint; a lost one takes its share away.
    pub fn set_servers(&self, gateway: &Endpoint, servers: u32, start: u32) {
        let before = gateway.servers.swap(servers, Ordering::Relaxed);
        let more = start.saturating_mul(servers.saturating_sub(before));
        gateway.ramp.set_limit(gateway.limit().saturating_add(more).min(gateway.max_in_flight()));
        if more > 0 {
            self.notify(Change::Room);
        }
    }

    /// Records a failed activation; the next attempt follows after `retry_after`. Held requests fail with the reason
    /// and the last lines of output.
    pub fn failed(&self, reason: Reason, last_lines: &[String], cause: Cause, retry_after: Duration) {
        const MAX_LINES: usize = 10;
        let retry_after = (!self.last_failure.record(&reason, cause)).then_some(retry_after);
        self.set_status(Status::Failed(reason.full().clone()));
        let detailed = match &last_lines[last_lines.len().saturating_sub(MAX_LINES)..] {
            [] => reason,
            lines => {
                let full = format!("{reason}\nIts last lines:\n{}", lines.join("\n"));
                Reason::with_output(reason.brief(), &full)
            }
        };
        self.notify(Change::Failed(detailed, retry_after));
    }

    /// Returns the status.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Sets the status.
    pub fn set_status(&self, status: Status) {
        *self.status.lock() = status;
        self.notify(Change::Status);
    }

    /// Returns the known obstacle to the start.
    pub fn obstacle(&self) -> Option<Arc<Obstacle>> {
        self.obstacle.borrow().clone()
    }

    /// Sets or clears the obstacle reported by the cluster. A repeated one keeps its start time.
    pub fn set_obstacle(&self, obstacle: Option<Obstacle>) {
        self.change_obstacles(|Obstacles { cluster, .. }| {
            *cluster = obstacle.map(|new| match cluster.take() {
                Some(known) if known.is_same(&new) => known,
                Some(known) if known.kind == new.kind => Arc::new(Obstacle { since: known.since, ..new }),
                _ => Arc::new(new),
            });
        });
    }

    /// Sets or clears the obstacle reported by the proxy's own probes.
    pub fn set_probe_obstacle(&self, obstacle: Option<Arc<Obstacle>>) {
        self.change_obstacles(|known| known.probe = obstacle);
    }

    /// Clears this probe obstacle, unless another one has replaced it.
    pub fn withdraw_probe_obstacle(&self, obstacle: &Arc<Obstacle>) {
        self.change_obstacles(|Obstacles { probe, .. }| {
            probe.take_if(|known| Arc::ptr_eq(known, obstacle));
        });
    }

    fn change_obstacles(&self, change: impl FnOnce(&mut Obstacles)) {
        let mut obstacles = self.obstacles.lock();
        change(&mut obstacles);
        let now = obstacles.cluster.as_ref().or(obstacles.probe.as_ref()).cloned();
        let changed = self.obstacle.send_if_modified(|known| {
            let is_same = match (&known, &now) {
                (Some(known), Some(now)) => known.is_same(now),
                (known, now) => known.is_none() && now.is_none(),
            };
            if !is_same {
                *known = now;
            }
            !is_same
        });
        drop(obstacles);
        if changed {
            self.notify(Change::Obstacle);
        }
    }

    /// Records whether a connection attempt to `address` was refused.
    pub fn set_refusing(&self, address: &str, is_refused: bool) {
        const MAX_ADDRESSES: usize = 16;
        let mut refusing = self.refusing.lock();
        if !is_refused {
            refusing.remove(address);
            return;
        }
        refusing.entry(address.into()).or_insert_with(Instant::now);
        // Addresses of deleted pods are not removed, only evicted by newer ones.
        if refusing.len() > MAX_ADDRESSES
            && let Some(oldest) =
                refusing.iter().min_by_key(|(_, since)| **since).map(|(address, _)| address.clone())
        {
            refusing.remove(&oldest);
        }
    }

    /// Returns addresses that have refused every connection attempt for at least this long.
    pub fn refusing_for(&self, at_least: Duration) -> Vec<Box<str>> {
        let refusing = self.refusing.lock();
        let lasting = refusing.iter().filter(|(_, since)| since.elapsed() >= at_least);
        lasting.map(|(address, _)| address.clone()).collect()
    }

    /// Subscribes to changes of the obstacle.
    pub fn obstacles(&self) -> watch::Receiver<Option<Arc<Obstacle>>> {
        self.obstacle.subscribe()
    }

    fn notify(&self, change: Change) {
        if let Some(on_change) = self.on_change.get() {
            on_change(change);
        }
    }
}

// === impl Status ===

impl Status {
    /// Returns the name used in the API.
    pub fn name(&self) -> &'static str {
        self.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refusing_addresses_are_bounded_to_the_latest() {
        let target = TargetState::default();
        for number in 0..20 {
            target.set_refusing(&format!("10.0.0.{number}:8000"), true);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        target.set_refusing("10.0.0.19:8000", false);
        let refusing = target.refusing_for(Duration::from_secs(5));
        assert_eq!(refusing.len(), 12, "16 are kept, 4 to 19, of which 4 to 15 have refused for 5 s");
        assert!(!refusing.contains(&"10.0.0.3:8000".into()) && refusing.contains(&"10.0.0.4:8000".into()));
    }
}
