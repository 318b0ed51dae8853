//! State of a target, published by its watcher (launcher, prober, Kubernetes) and read by the request path.

mod cut;
mod discovery;
mod failure;
mod front;
mod models;
mod obstacle;
mod ramp;
mod scale;
mod start;
mod trial;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
use cut::Connections;
pub use cut::Cut;
pub use discovery::{Discovered, DiscoveredEndpoint, Discovery, NoDiscovery, Problem, Protocol, Selection};
pub use failure::Cause;
use failure::LastFailure;
pub use front::{Front, FrontKind};
pub use models::{ListedModels, Listing};
pub use obstacle::Obstacle;
use parking_lot::Mutex;
pub use ramp::Level;
use ramp::Ramp;
pub use scale::{NoScale, Replicas, Scale, ScaleError, Scaling};
pub use start::{PartSeen, PodStart, PodWarning, Seen, Stamp, Tail};
use strum::IntoStaticStr;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use trial::Trial;
pub use trial::Verdict;

use crate::{domain::Reason, pick::Load};

/// One address of a model server, ready or not.
///
/// `ready` and `in_flight` are written by all cores in sequentially consistent order: retiring an endpoint clears
/// `ready` before it waits for `in_flight` to reach zero; acquiring it does the reverse.
pub struct Endpoint {
    id: u64,
    /// `host:port`.
    address: Box<str>,
    protocol: Protocol,
    /// State of a gateway; `None` if the endpoint is a single server.
    front: Option<Box<Front>>,
    ready: AtomicBool,
    in_flight: AtomicU32,
    ramp: Ramp,
    /// Limit of requests in flight per server.
    max: AtomicU32,
    /// Number of servers it stands for. For a gateway it may be zero or more than one.
    servers: AtomicU32,
    /// Consecutive failed dispatches.
    failures: AtomicU32,
    trial: Trial,
    connections: Connections,
    /// Wakes the owner (launcher, prober) when the endpoint is doubted or suspect, or when the last request in flight
    /// ended.
    attention: Notify,
}

/// Endpoints of a target and its progress towards readiness.
pub struct TargetState {
    endpoints: ArcSwap<Vec<Arc<Endpoint>>>,
    status: Mutex<Status>,
    obstacles: Mutex<Obstacles>,
    /// The relevant one of `obstacles`.
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

// === impl Endpoint ===

impl Endpoint {
    /// Backoff after the first failure.
    pub const BACKOFF: Duration = Duration::from_millis(50);
    const MAX_BACKOFF: Duration = Duration::from_secs(1);

    /// Creates an HTTP/1.1 endpoint that is not ready yet.
    pub fn new(address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::speaking(Protocol::Http1, address, max)
    }

    /// Creates an endpoint that is or may be a gateway.
    pub fn fronting(kind: FrontKind, address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::with_front(Protocol::Http1, Some(kind), address, max)
    }

    /// Creates an endpoint with the given protocol.
    pub fn speaking(protocol: Protocol, address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::with_front(protocol, None, address, max)
    }

    fn with_front(
        protocol: Protocol,
        front: Option<FrontKind>,
        address: impl Into<Box<str>>,
        max: u32,
    ) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            address: address.into(),
            protocol,
            front: front.map(|kind| Box::new(Front::new(kind))),
            ready: AtomicBool::new(false),
            in_flight: AtomicU32::new(0),
            ramp: Ramp::new(max),
            max: AtomicU32::new(max),
            servers: AtomicU32::new(1),
            failures: AtomicU32::new(0),
            trial: Trial::default(),
            connections: Connections::default(),
            attention: Notify::new(),
        })
    }

    /// Creates an endpoint that is always ready and has no owner, such as a fallback Service.
    pub fn unwatched(address: impl Into<Box<str>>) -> Arc<Self> {
        let endpoint = Self::new(address, u32::MAX);
        endpoint.ready.store(true, Ordering::SeqCst);
        endpoint
    }

    /// Returns an identifier unique in this process.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Returns `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns whether it accepts requests.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }

    /// Returns its protocol.
    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Returns the state of a gateway; `None` if the endpoint is a single server.
    pub fn front(&self) -> Option<&Front> {
        self.front.as_deref()
    }

    /// Returns whether every request reaches the same process or pod.
    pub const fn is_single(&self) -> bool {
        self.front.is_none()
    }

    /// Returns the number of requests in flight.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Returns the current limit of requests in flight.
    pub fn limit(&self) -> u32 {
        self.ramp.limit()
    }

    /// Returns the number of servers it stands for. For a gateway it may be zero or more than one.
    pub fn servers(&self) -> u32 {
        self.servers.load(Ordering::Relaxed)
    }

    /// Returns the limit of requests in flight at the end of the ramp.
    fn max_in_flight(&self) -> u32 {
        self.max.load(Ordering::Relaxed).saturating_mul(self.servers.load(Ordering::Relaxed))
    }

    /// Reserves a slot, which must be returned with [`Self::release`].
    pub fn acquire(&self) -> bool {
        let mut in_flight = self.in_flight.load(Ordering::SeqCst);
        while in_flight < self.limit() && self.is_ready() {
            match self.in_flight.compare_exchange_weak(
                in_flight,
                in_flight + 1,
                Ordering::SeqCst,
                Ordering::SeqCst,
            ) {
                Ok(_) if self.is_ready() => return true,
                Ok(_) => {
                    self.release();
                    return false;
                }
                Err(now) => in_flight = now,
            }
        }
        false
    }

    /// Returns a slot.
    pub fn release(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && !self.is_ready() {
            self.attention.notify_one();
        }
    }

    /// Returns whether the limit has reached its maximum.
    pub fn is_wide(&self) -> bool {
        self.limit() >= self.max_in_flight()
    }

    /// Returns the number of further requests it is about to accept, assuming that a ramp in progress continues.
    pub fn room_soon(&self) -> u32 {
        if self.is_ready() && (self.is_wide() || self.ramp.progresses()) {
            self.max_in_flight().saturating_sub(self.in_flight())
        } else {
            0
        }
    }

    /// Returns the remaining time in which the limit does not grow, after failures at a higher one.
    pub fn ramp_pause(&self) -> Duration {
        self.ramp.pause()
    }

    /// Returns the ramp level of a request that has just acquired its slot.
    pub fn level(&self) -> Level {
        self.ramp.level(self.in_flight())
    }

    /// Records the first byte of a response to a request dispatched at `level`: clears failures and raises the limit to
    /// twice the number of responses. Returns whether the limit grew.
    pub fn succeeded(&self, level: Level) -> bool {
        if self.failures.load(Ordering::Relaxed) > 0 || self.is_doubted() {
            self.failures.store(0, Ordering::Relaxed);
            self.vouch();
        }
        self.ramp.answered(level, self.max_in_flight())
    }

    /// Records the failure of a request dispatched at `level`, which may have exceeded the server's capacity. Up to
    /// `start` requests never do.
    pub fn failed_at(&self, level: Level, start: u32) {
        self.ramp.failed(level, start);
    }

    /// Records a failure before the response. The endpoint gets no requests until its owner has seen it respond, and
    /// then one at first.
    pub fn suspect(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.ramp.restart();
        self.retire();
        self.attention.notify_one();
    }

    /// Returns the backoff before the owner probes again: zero, or 50 ms doubling to 1 s with each failure.
    pub fn backoff(&self) -> Duration {
        match self.failures.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            failures => Self::MAX_BACKOFF.min(Self::BACKOFF * 2_u32.saturating_pow(failures - 1)),
        }
    }

    /// Stops accepting requests; [`Self::attention`] wakes when the last one in flight has ended.
    pub fn retire(&self) {
        self.ready.store(false, Ordering::SeqCst);
        self.settle();
    }

    /// Waits until the owner should check the endpoint: it is doubted or suspect, or its last request ended while it
    /// was not ready.
    pub async fn attention(&self) {
        self.attention.notified().await;
    }
}

impl Load for Arc<Endpoint> {
    /// A doubted endpoint only gets requests for which nothing else has room: see `Gate::acquire`.
    fn room(&self) -> Option<u32> {
        let in_flight = self.in_flight();
        (in_flight < self.limit() && self.is_ready() && !self.is_doubted()).then_some(in_flight)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("address", &self.address)
            .field("ready", &self.is_ready())
            .field("in_flight", &self.in_flight())
            .field("limit", &self.limit())
            .finish_non_exhaustive()
    }
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

    /// Returns the models that its servers list.
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

    /// Marks an endpoint as ready, with an initial `limit`. `None` resumes a former one with at least one slot beyond
    /// those in use.
    pub fn ready(&self, endpoint: &Endpoint, limit: Option<u32>) {
        match limit {
            Some(limit) => endpoint.ramp.begin(limit.min(endpoint.max_in_flight())),
            None => endpoint.ramp.resume(endpoint.in_flight(), endpoint.max_in_flight()),
        }
        endpoint.connections.reopen();
        endpoint.ready.store(true, Ordering::SeqCst);
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
        // Addresses of deleted pods stay until they are displaced.
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

    /// Subscribes to the obstacle.
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

    #[test]
    fn backoff_doubles_from_50_ms_to_1_s() {
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        let backoffs = [50, 100, 200, 400, 800, 1000, 1000];
        for expected in backoffs {
            endpoint.suspect();
            assert_eq!(endpoint.backoff().as_millis(), expected);
        }
    }
}
