//! Snapshots of a target: published by whoever watches it (launcher, prober, Kubernetes), read by the request path.

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
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use trial::Trial;
pub use trial::Verdict;

use crate::{domain::Reason, pick::Load};

/// One address of a model server, ready or not.
///
/// Ready and in-flight are touched by every core, in sequentially consistent order: whoever retires an endpoint first
/// takes `ready` away and then waits for `in_flight` to be zero, and whoever acquires it does the reverse.
pub struct Endpoint {
    id: u64,
    /// `host:port`, to connect to.
    address: Box<str>,
    protocol: Protocol,
    /// What is known of it as a gateway, if it may be one.
    front: Option<Box<Front>>,
    ready: AtomicBool,
    in_flight: AtomicU32,
    ramp: Ramp,
    /// How many may be on one server.
    max: AtomicU32,
    /// How many servers it stands for: more than one, or none now, if it is a gateway.
    servers: AtomicU32,
    /// Failed dispatches in a row.
    failures: AtomicU32,
    trial: Trial,
    connections: Connections,
    /// Wakes the owner (launcher, prober): in doubt, suspect, or the last request in flight ended.
    attention: Notify,
}

/// What is known of a target's endpoints and of how it comes up.
pub struct TargetState {
    endpoints: ArcSwap<Vec<Arc<Endpoint>>>,
    status: Mutex<Status>,
    obstacles: Mutex<Obstacles>,
    /// What of these stands in the way, if it is down.
    obstacle: watch::Sender<Option<Arc<Obstacle>>>,
    last_failure: LastFailure,
    /// Where nobody listened when last asked, and since when; a few of them.
    refusing: Mutex<BTreeMap<Box<str>, Instant>>,
    models: ListedModels,
    on_change: OnceLock<Box<dyn Fn(Change) + Send + Sync>>,
}

/// What is said to stand in the way of a target.
#[derive(Default)]
struct Obstacles {
    /// By the cluster. It explains more.
    cluster: Option<Arc<Obstacle>>,
    /// By our own probes.
    probe: Option<Arc<Obstacle>>,
}

/// Where a target stands, in one word for people and for the API.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// Nothing runs, nothing is asked for.
    #[default]
    Idle,
    /// On its way up.
    Starting,
    /// At least one endpoint takes requests.
    Ready,
    /// It runs, without what it needs to take requests: vLLM's sleep mode.
    Sleeping,
    /// On its way down, or falling asleep.
    Stopping,
    /// It could not be started; the next try waits.
    Failed(Arc<str>),
}

/// What a publisher changed.
#[derive(Clone, Debug)]
pub enum Change {
    /// An endpoint may take more than before.
    Room,
    /// Something stands in the way, or does no more.
    Obstacle,
    /// It stands elsewhere.
    Status,
    /// The activation has failed: who waits for it need not wait on. The time is until the next try; `None`: that would
    /// fail in the same way.
    Failed(Reason, Option<Duration>),
}

// === impl Endpoint ===

impl Endpoint {
    /// The first back-off after a failure.
    pub const BACKOFF: Duration = Duration::from_millis(50);
    const MAX_BACKOFF: Duration = Duration::from_secs(1);

    /// An endpoint that is not ready yet.
    pub fn new(address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::speaking(Protocol::Http1, address, max)
    }

    /// One that is a gateway, or may be one.
    pub fn fronting(kind: FrontKind, address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::made(Protocol::Http1, Some(kind), address, max)
    }

    /// One that wants to be spoken to in this way.
    pub fn speaking(protocol: Protocol, address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::made(protocol, None, address, max)
    }

    fn made(
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

    /// One that nobody watches over: a Service, of which it is taken for granted that it answers.
    pub fn unwatched(address: impl Into<Box<str>>) -> Arc<Self> {
        let endpoint = Self::new(address, u32::MAX);
        endpoint.ready.store(true, Ordering::SeqCst);
        endpoint
    }

    /// Unique in this process.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// `host:port`, to connect to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether it takes requests.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }

    /// How it wants to be spoken to.
    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// What is known of it as a gateway, if it may be one.
    pub fn front(&self) -> Option<&Front> {
        self.front.as_deref()
    }

    /// Whether it is one process or one pod. Behind what may be a gateway it may be another one each time.
    pub const fn is_single(&self) -> bool {
        self.front.is_none()
    }

    /// How many requests are in flight on it.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// How many it may have in flight now.
    pub fn limit(&self) -> u32 {
        self.ramp.limit()
    }

    /// How many servers it stands for: more than one, or none now, if it is a gateway.
    pub fn servers(&self) -> u32 {
        self.servers.load(Ordering::Relaxed)
    }

    /// How many it may have in flight when it is past the ramp.
    fn most(&self) -> u32 {
        self.max.load(Ordering::Relaxed).saturating_mul(self.servers.load(Ordering::Relaxed))
    }

    /// Takes one place, to be given back with [`Self::release`].
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

    /// Gives a place back.
    pub fn release(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && !self.is_ready() {
            self.attention.notify_one();
        }
    }

    /// Whether it may have all in flight that it ever may.
    pub fn is_wide(&self) -> bool {
        self.limit() >= self.most()
    }

    /// How many more requests it will soon take: up to the maximum, if the ramp goes on.
    pub fn room_soon(&self) -> u32 {
        if self.is_ready() && (self.is_wide() || self.ramp.progresses()) {
            self.most().saturating_sub(self.in_flight())
        } else {
            0
        }
    }

    /// How long the limit does not grow with time, because more requests have just failed.
    pub fn ramp_pause(&self) -> Duration {
        self.ramp.pause()
    }

    /// Where on the ramp a request stands that has just got its place.
    pub fn level(&self) -> Level {
        self.ramp.level(self.in_flight())
    }

    /// A request that went out at this level came back with its first byte: forgets failures, and lets twice as many be in
    /// flight as have been answered, up to the maximum. Returns whether the number grew.
    pub fn succeeded(&self, level: Level) -> bool {
        if self.failures.load(Ordering::Relaxed) > 0 || self.is_doubted() {
            self.failures.store(0, Ordering::Relaxed);
            self.vouch();
        }
        self.ramp.answered(level, self.most())
    }

    /// A request that went out at this level failed: perhaps there were too many. `start` are never too many.
    pub fn failed_at(&self, level: Level, start: u32) {
        self.ramp.failed(level, start);
    }

    /// It failed a request before answering: it gets nothing until its owner has seen it answer again, and then one
    /// request at first.
    pub fn suspect(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.ramp.restart();
        self.retire();
        self.attention.notify_one();
    }

    /// How long its owner leaves it alone before asking again: nothing, or 50 ms doubling to 1 s with each failure.
    pub fn backoff(&self) -> Duration {
        match self.failures.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            failures => Self::MAX_BACKOFF.min(Self::BACKOFF * 2_u32.saturating_pow(failures - 1)),
        }
    }

    /// Takes no more requests; [`Self::attention`] wakes when the last one in flight has ended.
    pub fn retire(&self) {
        self.ready.store(false, Ordering::SeqCst);
        self.settle();
    }

    /// Waits until the owner should look: it is in doubt or suspect, or, not being ready, its last request ended.
    pub async fn attention(&self) {
        self.attention.notified().await;
    }
}

impl Load for Arc<Endpoint> {
    /// What is in doubt takes only what nothing else has room for: see `Gate::acquire`.
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
    /// Who is told of changes, at once and on the publisher's thread. Only the first one counts.
    pub fn subscribe(&self, on_change: impl Fn(Change) + Send + Sync + 'static) {
        let _ = self.on_change.set(Box::new(on_change));
    }

    /// The endpoints that are known now.
    pub fn endpoints(&self) -> Guard<Arc<Vec<Arc<Endpoint>>>> {
        self.endpoints.load()
    }

    /// The models that its servers list.
    pub const fn models(&self) -> &ListedModels {
        &self.models
    }

    /// Whether any endpoint takes requests, full or not.
    pub fn is_up(&self) -> bool {
        self.endpoints.load().iter().any(|endpoint| endpoint.is_ready())
    }

    /// How many requests are in flight on the known endpoints.
    pub fn in_flight(&self) -> u64 {
        self.endpoints.load().iter().map(|endpoint| u64::from(endpoint.in_flight())).sum()
    }

    /// How many more requests the known endpoints will soon take.
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

    /// Forgets an endpoint: it has been retired, and nothing is in flight on it.
    pub fn remove(&self, endpoint: &Arc<Endpoint>) {
        self.endpoints
            .rcu(|known| known.iter().filter(|known| known.id != endpoint.id).cloned().collect::<Vec<_>>());
        // What waits for this one alone may go to another.
        self.tell(Change::Room);
    }

    /// The endpoint takes requests, `limit` at first; `None`: again, at least one beside those that are in flight.
    pub fn ready(&self, endpoint: &Endpoint, limit: Option<u32>) {
        match limit {
            Some(limit) => endpoint.ramp.begin(limit.min(endpoint.most())),
            None => endpoint.ramp.resume(endpoint.in_flight(), endpoint.most()),
        }
        endpoint.connections.reopen();
        endpoint.ready.store(true, Ordering::SeqCst);
        self.last_failure.forget();
        self.set_probe_obstacle(None);
        self.set_status(Status::Ready);
        self.tell(Change::Room);
    }

    /// The endpoint bears what it has: it may have more in flight.
    pub fn widen(&self, endpoint: &Endpoint) {
        if endpoint.ramp.widen(endpoint.most()) {
            self.tell(Change::Room);
        }
    }

    /// A new maximum per endpoint, from a reload.
    pub fn set_max(&self, max: u32) {
        for endpoint in self.endpoints.load().iter() {
            let before = endpoint.most();
            endpoint.max.store(max, Ordering::Relaxed);
            let (limit, most) = (endpoint.limit(), endpoint.most());
            if limit == before || limit > most {
                endpoint.ramp.set_limit(most);
            }
        }
        self.tell(Change::Room);
    }

    /// How many servers stand behind a gateway now. Each that is new adds `start` to what it may have in flight, which
    /// then grows as with any new server; each that has gone takes its share away.
    pub fn set_servers(&self, gateway: &Endpoint, servers: u32, start: u32) {
        let before = gateway.servers.swap(servers, Ordering::Relaxed);
        let more = start.saturating_mul(servers.saturating_sub(before));
        gateway.ramp.set_limit(gateway.limit().saturating_add(more).min(gateway.most()));
        if more > 0 {
            self.tell(Change::Room);
        }
    }

    /// The activation has failed; the next try comes after `retry_after`. Who waited is told the reason and the last
    /// lines that the target printed; everybody else reads them in the record.
    pub fn failed(&self, reason: Reason, last_lines: &[String], cause: Cause, retry_after: Duration) {
        const TOLD: usize = 10;
        let retry_after = (!self.last_failure.record(&reason, cause)).then_some(retry_after);
        self.set_status(Status::Failed(reason.full().clone()));
        let told = match &last_lines[last_lines.len().saturating_sub(TOLD)..] {
            [] => reason,
            lines => {
                let full = format!("{reason}\nIts last lines:\n{}", lines.join("\n"));
                Reason::with_output(reason.brief(), &full)
            }
        };
        self.tell(Change::Failed(told, retry_after));
    }

    /// Where the target stands.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Says where the target stands.
    pub fn set_status(&self, status: Status) {
        *self.status.lock() = status;
        self.tell(Change::Status);
    }

    /// What stands in the way of the target, as far as is known.
    pub fn obstacle(&self) -> Option<Arc<Obstacle>> {
        self.obstacle.borrow().clone()
    }

    /// Says what stands in the way as the cluster has it, or that nothing does. The same obstacle keeps the time since when
    /// it does.
    pub fn set_obstacle(&self, obstacle: Option<Obstacle>) {
        self.change_obstacles(|Obstacles { cluster, .. }| {
            *cluster = obstacle.map(|new| match cluster.take() {
                Some(known) if known.is_same(&new) => known,
                Some(known) if known.kind == new.kind => Arc::new(Obstacle { since: known.since, ..new }),
                _ => Arc::new(new),
            });
        });
    }

    /// Says what stands in the way as our own probes have it.
    pub fn set_probe_obstacle(&self, obstacle: Option<Arc<Obstacle>>) {
        self.change_obstacles(|known| known.probe = obstacle);
    }

    /// The probes that found this are over, whatever others have found meanwhile.
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
            self.tell(Change::Obstacle);
        }
    }

    /// Somebody has asked at `address`: whether the connection was refused.
    pub fn set_refusing(&self, address: &str, is_refused: bool) {
        const MOST: usize = 16;
        let mut refusing = self.refusing.lock();
        if !is_refused {
            refusing.remove(address);
            return;
        }
        refusing.entry(address.into()).or_insert_with(Instant::now);
        // Pods that have gone stay until there is no room.
        if refusing.len() > MOST
            && let Some(oldest) =
                refusing.iter().min_by_key(|(_, since)| **since).map(|(address, _)| address.clone())
        {
            refusing.remove(&oldest);
        }
    }

    /// Where nobody has listened for so long, each time that was asked.
    pub fn refusing_for(&self, at_least: Duration) -> Vec<Box<str>> {
        let refusing = self.refusing.lock();
        let lasting = refusing.iter().filter(|(_, since)| since.elapsed() >= at_least);
        lasting.map(|(address, _)| address.clone()).collect()
    }

    /// Changes with what stands in the way.
    pub fn obstacles(&self) -> watch::Receiver<Option<Arc<Obstacle>>> {
        self.obstacle.subscribe()
    }

    fn tell(&self, change: Change) {
        if let Some(on_change) = self.on_change.get() {
            on_change(change);
        }
    }
}

// === impl Status ===

impl Status {
    /// One word.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Sleeping => "sleeping",
            Self::Stopping => "stopping",
            Self::Failed(_) => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn addresses_that_refuse_are_few_and_the_latest() {
        let target = TargetState::default();
        for number in 0..20 {
            target.set_refusing(&format!("10.0.0.{number}:8000"), true);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        target.set_refusing("10.0.0.19:8000", false);
        let refusing = target.refusing_for(Duration::from_secs(5));
        assert_eq!(refusing.len(), 12, "16 are kept; of these, 4 to 15 and not 16 to 19 for so long");
        assert!(!refusing.contains(&"10.0.0.3:8000".into()) && refusing.contains(&"10.0.0.4:8000".into()));
    }

    #[test]
    fn the_backoff_doubles_from_50_ms_to_1_s() {
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        let backoffs = [50, 100, 200, 400, 800, 1000, 1000];
        for expected in backoffs {
            endpoint.suspect();
            assert_eq!(endpoint.backoff().as_millis(), expected);
        }
    }
}
