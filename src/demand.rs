//! Demand: what a scaler reads. Counts of requests, kept alive by the lease and the linger.

mod counts;
mod rate;
mod receiver;
mod value;

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

pub use counts::Counts;
pub use rate::Rate;
pub use receiver::PushReceiver;
pub use value::{Capacity, queue_depth, request_rate};

/// The demand of one route, but for the counts, which live where the requests do.
pub struct Demand {
    base: Instant,
    /// When the last request came or went, in milliseconds from `base`; 0: never. One store a request.
    last: AtomicU64,
    /// Whether demand was found false, and nobody has been told of a request since.
    resting: AtomicBool,
    raised: Mutex<Raised>,
    /// Rises with every signal.
    signals: watch::Sender<u64>,
    /// Rises when demand may have become true or false.
    changes: watch::Sender<u64>,
    on_edge: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// What the model servers say of their own queues.
    server_queue: AtomicU64,
    rate: Mutex<Rate>,
    peers: Mutex<Peers>,
    /// Streams that a scaler has open here.
    streams: AtomicU64,
    /// Times that one of them was told that demand has become true.
    pushes: AtomicU64,
    /// What the cluster shows of the ScaledObjects that name the route; none where there is no cluster.
    receivers: Mutex<Vec<PushReceiver>>,
}

/// The demand of all other replicas.
#[derive(Default)]
struct Peers {
    counts: Counts,
    /// Since when one of them has had a ready endpoint.
    ready_since: Option<Instant>,
}

#[derive(Default)]
struct Raised {
    /// The first request that found nothing ready.
    since: Option<Instant>,
    /// How many times there was a first one.
    activations: u64,
    /// Until when demand is true whoever is left: the lease of the activation.
    lease: Option<Instant>,
}

// === impl Demand ===

impl Default for Demand {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            last: AtomicU64::new(0),
            resting: AtomicBool::new(true),
            raised: Mutex::default(),
            signals: watch::Sender::new(0),
            changes: watch::Sender::new(0),
            on_edge: OnceLock::new(),
            server_queue: AtomicU64::new(0),
            rate: Mutex::default(),
            peers: Mutex::default(),
            streams: AtomicU64::new(0),
            pushes: AtomicU64::new(0),
            receivers: Mutex::default(),
        }
    }
}

impl Demand {
    /// A request came or went.
    pub fn touch(&self) {
        let elapsed = self.base.elapsed().as_millis();
        self.last.store(u64::try_from(elapsed).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// A request wants the target, and the counts say so already. Who listens is told at once if demand had been found
    /// false. Every warm request comes here, so this costs one load.
    ///
    /// The counts and `resting` are in sequentially consistent order: of a request that sees nobody resting and a
    /// listener that sees no request, at least one sees the other.
    pub fn rise(&self) {
        if self.resting.load(Ordering::SeqCst) && self.resting.swap(false, Ordering::SeqCst) {
            self.edge();
        }
    }

    fn edge(&self) {
        self.changed();
        if let Some(on_edge) = self.on_edge.get() {
            on_edge();
        }
    }

    /// Demand was found false: the next request is told. Who says so looks at the counts once more afterwards.
    pub fn rest(&self) {
        self.resting.store(true, Ordering::SeqCst);
    }

    /// Who else is told when a request makes demand true or asks for an activation, and when a stream was told, at once and on the thread of the request. Only the first one
    /// counts.
    pub fn subscribe(&self, on_edge: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_edge.set(Box::new(on_edge));
    }

    /// Changes when demand may have become true or false, and when what is said of it may be another. It may become
    /// false with time alone, of which nothing tells.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Makes who listens look again.
    pub fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Nothing is ready, and a request wants it: whoever starts the target is told at once. The lease keeps demand
    /// true for `lease`, even if every client hangs up, until the activation ends.
    pub fn signal(&self, lease: Duration) {
        let now = Instant::now();
        let mut raised = self.raised.lock();
        let is_first = raised.since.is_none();
        raised.since.get_or_insert(now);
        raised.lease.get_or_insert(now + lease);
        raised.activations += u64::from(is_first);
        drop(raised);
        if is_first {
            // Also when demand was true already: what it was true for is not there.
            self.resting.store(false, Ordering::SeqCst);
            self.edge();
        } else {
            self.rise();
        }
        self.signals.send_modify(|signals| *signals += 1);
    }

    /// Somebody waits although something is up: there is not enough of it.
    pub fn stir(&self) {
        self.signals.send_modify(|signals| *signals += 1);
    }

    /// Since when something is wanted that is not there.
    pub fn raised_since(&self) -> Option<Instant> {
        self.raised.lock().since
    }

    /// The activation has ended, for good or bad: no lease any more.
    pub fn settle(&self) {
        let mut raised = self.raised.lock();
        raised.since = None;
        let lease = raised.lease.take();
        drop(raised);
        if lease.is_some() {
            self.changed();
        }
    }

    /// How many activations were asked for.
    pub fn activations(&self) -> u64 {
        self.raised.lock().activations
    }

    /// Changes with every signal, and with every request that waits while something is up.
    pub fn signals(&self) -> watch::Receiver<u64> {
        self.signals.subscribe()
    }

    /// Whether the lease of an activation is running.
    pub fn is_leased(&self) -> bool {
        self.lease_left().is_some()
    }

    fn lease_left(&self) -> Option<Duration> {
        let left = self.raised.lock().lease?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// How long no request has come or gone; `None` if there never was one.
    pub fn quiet_for(&self) -> Option<Duration> {
        match self.last.load(Ordering::Relaxed) {
            0 => None,
            last => Some(self.base.elapsed().saturating_sub(Duration::from_millis(last))),
        }
    }

    /// How long lease and linger keep demand true without a request; zero if neither does.
    pub fn lasts_for(&self, linger: Duration) -> Duration {
        let linger = self.quiet_for().map_or(Duration::ZERO, |quiet| linger.saturating_sub(quiet));
        linger.max(self.lease_left().unwrap_or_default())
    }

    /// Whether demand is true: something is held or in flight, or the lease runs, or the last request was less than
    /// `linger` ago.
    pub fn is_active(&self, requests: u64, linger: Duration) -> bool {
        requests > 0 || !self.lasts_for(linger).is_zero()
    }

    /// How many requests wait in the model servers themselves, by their own metrics.
    pub fn server_queue(&self) -> u64 {
        self.server_queue.load(Ordering::Relaxed)
    }

    /// The model servers say that so many wait.
    pub fn set_server_queue(&self, waiting: u64) {
        let before = self.server_queue.swap(waiting, Ordering::Relaxed);
        if (before == 0) != (waiting == 0) {
            self.changed();
        }
    }

    /// Takes down how many requests were admitted up to now, about once a second.
    pub fn sample(&self, admitted: u64, window: Duration) {
        self.rate.lock().sample(Instant::now(), admitted, window);
    }

    /// Requests per second over `window`.
    pub fn request_rate(&self, admitted: u64, window: Duration) -> f64 {
        self.rate.lock().per_second(Instant::now(), admitted, window)
    }

    /// The demand of all other replicas together.
    pub fn peers(&self) -> Counts {
        self.peers.lock().counts
    }

    /// Since when another replica has had a ready endpoint; `None` if none has.
    pub fn peers_ready_since(&self) -> Option<Instant> {
        self.peers.lock().ready_since
    }

    /// What the other replicas together have become.
    pub fn set_peers(&self, counts: Counts) {
        let mut peers = self.peers.lock();
        let before = std::mem::replace(&mut peers.counts, counts);
        peers.ready_since = counts.ready.then(|| peers.ready_since.unwrap_or_else(Instant::now));
        drop(peers);
        if before.is_active() != counts.is_active() || before.activations < counts.activations {
            self.changed();
        }
    }

    /// How many streams a scaler has open to this replica.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    pub(crate) fn stream_opened(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stream_closed(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// How often a stream of this replica was told that demand has become true, or of an activation.
    pub fn pushes(&self) -> u64 {
        self.pushes.load(Ordering::Relaxed)
    }

    /// What the cluster shows of the ScaledObject with this name; `None`: nothing.
    pub fn receiver(&self, namespace: &str, name: &str) -> Option<PushReceiver> {
        let receivers = self.receivers.lock();
        receivers.iter().find(|known| known.namespace == namespace && known.name == name).cloned()
    }

    /// What the cluster shows of the ScaledObjects that name the route.
    pub fn receivers(&self) -> Vec<PushReceiver> {
        self.receivers.lock().clone()
    }

    /// The cluster shows these ScaledObjects that name the route.
    pub fn set_receivers(&self, receivers: Vec<PushReceiver>) {
        let mut known = self.receivers.lock();
        if *known != receivers {
            *known = receivers;
            drop(known);
            self.changed();
        }
    }

    /// A stream was told that demand has become true, or of an activation.
    pub fn pushed(&self) {
        self.pushes.fetch_add(1, Ordering::Relaxed);
        if let Some(on_edge) = self.on_edge.get() {
            on_edge();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_lease_outlives_the_clients_and_the_linger_the_last_request() {
        let demand = Demand::default();
        let linger = Duration::from_secs(60);
        assert!(!demand.is_active(0, linger), "nobody ever came");
        let mut signals = demand.signals();
        demand.touch();
        demand.signal(Duration::from_secs(1800));
        assert!(signals.has_changed().unwrap());
        signals.mark_unchanged();
        tokio::time::advance(Duration::from_secs(1799)).await;
        assert!(demand.is_active(0, linger), "1799 s of 1800 s");
        assert_eq!(demand.lasts_for(linger), Duration::from_secs(1), "1800 - 1799");
        demand.signal(Duration::from_secs(1800));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!demand.is_active(0, linger), "a second signal does not prolong the lease");
        demand.settle();
        demand.touch();
        tokio::time::advance(Duration::from_millis(59_999)).await;
        assert!(demand.is_active(0, linger));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!demand.is_active(0, linger), "60 s after the last request");
        assert!(demand.is_active(1, linger));
    }

    #[tokio::test]
    async fn only_the_first_rise_after_a_rest_is_told() {
        let demand = Demand::default();
        let told = std::sync::Arc::new(AtomicU64::new(0));
        demand.subscribe({
            let told = told.clone();
            move || {
                told.fetch_add(1, Ordering::Relaxed);
            }
        });
        for expected in [1, 2] {
            demand.rise();
            demand.rise();
            assert_eq!((told.load(Ordering::Relaxed), *demand.changes().borrow()), (expected, expected));
            demand.rest();
            demand.rest();
        }
    }
}
