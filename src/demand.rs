//! Demand of a route: its requests, kept alive by the lease of an activation and by the linger.

mod counts;
mod idle;
mod rate;
mod receiver;
mod value;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

pub use counts::Counts;
use idle::IdleFlag;
pub use rate::Rate;
pub use receiver::PushReceiver;
pub use value::{Capacity, queue_depth, request_rate};

/// Demand of one route, except for the counts of requests, which the gate has.
pub struct Demand {
    created: Instant,
    /// Milliseconds from `created` to the last arrival or end of a request; 0 before the first one.
    last_activity_ms: AtomicU64,
    idle: IdleFlag,
    activation: Mutex<Activation>,
    arrivals: watch::Sender<u64>,
    changes: watch::Sender<u64>,
    edges: ArcSwapOption<watch::Sender<u64>>,
    /// Requests queued in the model servers.
    server_queue: AtomicU64,
    rate: Mutex<Rate>,
    peers: Mutex<PeerDemand>,
    /// Open streams of `StreamIsActive`.
    streams: AtomicU64,
    /// Rising edges and activations sent over these streams.
    pushes: AtomicU64,
    /// ScaledObjects that name the route; empty outside a cluster.
    receivers: Mutex<Vec<PushReceiver>>,
}

/// A change of demand. [`Demand::publish`] maps it to the subscribers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DemandEvent {
    /// A request made demand true, or requested an activation.
    Risen,
    /// A request was enqueued, or requested an activation again.
    Enqueued,
    /// KEDA was sent a rising edge or an activation.
    Pushed,
    /// Anything but a request changed: policy, lease, peers, server queue, ScaledObjects.
    InputChanged,
}

/// The demand of all other replicas.
#[derive(Default)]
struct PeerDemand {
    counts: Counts,
    /// Start of the current period in which at least one other replica has a ready endpoint.
    ready_since: Option<Instant>,
}

#[derive(Default)]
struct Activation {
    /// Arrival of the request that started the pending activation.
    since: Option<Instant>,
    /// Activations requested so far.
    count: u64,
    /// End of the lease, until which demand stays true without requests.
    lease: Option<Instant>,
}

// === impl Demand ===

impl Default for Demand {
    fn default() -> Self {
        Self {
            created: Instant::now(),
            last_activity_ms: AtomicU64::new(0),
            idle: IdleFlag::new(true),
            activation: Mutex::default(),
            arrivals: watch::Sender::new(0),
            changes: watch::Sender::new(0),
            edges: ArcSwapOption::empty(),
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
    /// Notifies the subscribers of `event`, synchronously.
    pub(crate) fn publish(&self, event: DemandEvent) {
        match event {
            DemandEvent::Risen => {
                increment(&self.changes);
                self.increment_edges();
            }
            DemandEvent::Enqueued => increment(&self.arrivals),
            DemandEvent::Pushed => self.increment_edges(),
            DemandEvent::InputChanged => increment(&self.changes),
        }
    }

    fn increment_edges(&self) {
        if let Some(edges) = &*self.edges.load() {
            increment(edges);
        }
    }

    /// Replaces the channel that `DemandEvent::Risen` and `DemandEvent::Pushed` increment beside the route's own;
    /// all routes of a directory share one.
    pub(crate) fn set_edges(&self, edges: Arc<watch::Sender<u64>>) {
        self.edges.store(Some(edges));
    }

    /// Subscribes to `DemandEvent::Risen` and `DemandEvent::InputChanged`. Expiry of the lease or the linger sends no
    /// notification.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Subscribes to `DemandEvent::Enqueued`.
    pub fn arrivals(&self) -> watch::Receiver<u64> {
        self.arrivals.subscribe()
    }

    /// Restarts the linger, at the arrival and at the end of a request. Costs one store.
    pub fn record_activity(&self) {
        let elapsed = self.created.elapsed().as_millis();
        self.last_activity_ms.store(u64::try_from(elapsed).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// Publishes `DemandEvent::Risen` for the first request since demand was read as false. The request must be counted
    /// already. Costs a warm request one load.
    pub fn notify_if_idle(&self) {
        if self.idle.clear() {
            self.publish(DemandEvent::Risen);
        }
    }

    /// Returns the result of `read`. If that is no demand, the next request publishes an edge.
    pub fn observe(&self, read: impl Fn() -> Counts) -> Counts {
        self.idle.observe(read, Counts::is_active, || self.publish(DemandEvent::Risen))
    }

    /// Requests an activation for a request that no endpoint is ready for. The first one starts a lease, which keeps
    /// demand true until [`Self::end_activation`] even if every client disconnects; later ones do not extend it.
    pub fn request_activation(&self, lease: Duration) {
        let now = Instant::now();
        let mut activation = self.activation.lock();
        let is_first = activation.since.is_none();
        activation.since.get_or_insert(now);
        activation.lease.get_or_insert(now + lease);
        activation.count += u64::from(is_first);
        drop(activation);
        if is_first {
            // Publishes an edge even if demand was true already: that demand may date from an endpoint since lost.
            self.idle.clear();
            self.publish(DemandEvent::Risen);
        } else {
            self.notify_if_idle();
        }
        self.publish(DemandEvent::Enqueued);
    }

    /// Ends the activation and its lease.
    pub fn end_activation(&self) {
        let mut activation = self.activation.lock();
        activation.since = None;
        let lease = activation.lease.take();
        drop(activation);
        if lease.is_some() {
            self.publish(DemandEvent::InputChanged);
        }
    }

    /// Returns the time of the request that started the pending activation.
    pub fn activation_since(&self) -> Option<Instant> {
        self.activation.lock().since
    }

    /// Returns the number of activations requested so far.
    pub fn activations(&self) -> u64 {
        self.activation.lock().count
    }

    /// Returns true while the lease of an activation runs.
    pub fn is_leased(&self) -> bool {
        self.lease_left().is_some()
    }

    fn lease_left(&self) -> Option<Duration> {
        let left = self.activation.lock().lease?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Returns the time since the last arrival or end of a request; `None` before the first one.
    pub fn since_last_activity(&self) -> Option<Duration> {
        match self.last_activity_ms.load(Ordering::Relaxed) {
            0 => None,
            last => Some(self.created.elapsed().saturating_sub(Duration::from_millis(last))),
        }
    }

    /// Returns the time for which lease or linger keep demand true without a request.
    pub fn kept_alive_for(&self, linger: Duration) -> Duration {
        let linger = self.since_last_activity().map_or(Duration::ZERO, |since| linger.saturating_sub(since));
        linger.max(self.lease_left().unwrap_or_default())
    }

    /// Returns true if there are requests, the lease runs, or the last request is less than `linger` ago.
    pub fn is_active(&self, requests: u64, linger: Duration) -> bool {
        requests > 0 || !self.kept_alive_for(linger).is_zero()
    }

    /// Returns the number of requests queued in the model servers, by their own metrics.
    pub fn server_queue(&self) -> u64 {
        self.server_queue.load(Ordering::Relaxed)
    }

    /// Sets the number of requests queued in the model servers.
    pub fn set_server_queue(&self, waiting: u64) {
        let before = self.server_queue.swap(waiting, Ordering::Relaxed);
        if (before == 0) != (waiting == 0) {
            self.publish(DemandEvent::InputChanged);
        }
    }

    /// Samples the counter of admitted requests, about once a second.
    pub fn sample(&self, admitted: u64, window: Duration) {
        self.rate.lock().sample(Instant::now(), admitted, window);
    }

    /// Returns requests per second over `window`.
    pub fn request_rate(&self, admitted: u64, window: Duration) -> f64 {
        self.rate.lock().per_second(Instant::now(), admitted, window)
    }

    /// Returns the sum over all other replicas.
    pub fn peers(&self) -> Counts {
        self.peers.lock().counts
    }

    /// Returns the start of the current period in which at least one other replica has a ready endpoint.
    pub fn peers_ready_since(&self) -> Option<Instant> {
        self.peers.lock().ready_since
    }

    /// Sets the sum over all other replicas.
    pub fn set_peers(&self, counts: Counts) {
        let mut peers = self.peers.lock();
        let before = std::mem::replace(&mut peers.counts, counts);
        peers.ready_since = counts.ready.then(|| peers.ready_since.unwrap_or_else(Instant::now));
        drop(peers);
        if before.is_active() != counts.is_active() || before.activations < counts.activations {
            self.publish(DemandEvent::InputChanged);
        }
    }

    /// Returns the number of streams that KEDA has open to this replica.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    pub(crate) fn add_stream(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn remove_stream(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// Returns the number of rising edges and activations sent over streams of this replica.
    pub fn pushes(&self) -> u64 {
        self.pushes.load(Ordering::Relaxed)
    }

    /// Counts a rising edge or an activation that was sent over a stream.
    pub fn record_push(&self) {
        self.pushes.fetch_add(1, Ordering::Relaxed);
        self.publish(DemandEvent::Pushed);
    }

    /// Returns the ScaledObject of this name, if the cluster has it.
    pub fn receiver(&self, namespace: &str, name: &str) -> Option<PushReceiver> {
        let receivers = self.receivers.lock();
        receivers.iter().find(|known| known.namespace == namespace && known.name == name).cloned()
    }

    /// Returns the ScaledObjects that name the route.
    pub fn receivers(&self) -> Vec<PushReceiver> {
        self.receivers.lock().clone()
    }

    /// Replaces the ScaledObjects that name the route.
    pub fn set_receivers(&self, receivers: Vec<PushReceiver>) {
        let mut known = self.receivers.lock();
        if *known != receivers {
            *known = receivers;
            drop(known);
            self.publish(DemandEvent::InputChanged);
        }
    }
}

fn increment(version: &watch::Sender<u64>) {
    version.send_modify(|version| *version += 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lease_and_linger_keep_demand_true() {
        let demand = Demand::default();
        let linger = Duration::from_secs(60);
        assert!(!demand.is_active(0, linger), "no request yet");
        let mut arrivals = demand.arrivals();
        demand.record_activity();
        demand.request_activation(Duration::from_secs(1800));
        assert!(arrivals.has_changed().unwrap());
        arrivals.mark_unchanged();
        tokio::time::advance(Duration::from_secs(1799)).await;
        assert!(demand.is_active(0, linger), "1799 s of 1800 s");
        assert_eq!(demand.kept_alive_for(linger), Duration::from_secs(1), "1800 - 1799");
        demand.request_activation(Duration::from_secs(1800));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!demand.is_active(0, linger), "a second request does not extend the lease");
        demand.end_activation();
        demand.record_activity();
        tokio::time::advance(Duration::from_millis(59_999)).await;
        assert!(demand.is_active(0, linger));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!demand.is_active(0, linger), "60 s after the last request");
        assert!(demand.is_active(1, linger));
    }

    #[tokio::test]
    async fn first_request_after_idle_publishes_an_edge() {
        let demand = Demand::default();
        let edges = Arc::new(watch::Sender::new(0));
        demand.set_edges(edges.clone());
        for expected in [1, 2] {
            demand.notify_if_idle();
            demand.notify_if_idle();
            assert_eq!((*edges.borrow(), *demand.changes().borrow()), (expected, expected));
            assert!(!demand.observe(Counts::default).is_active());
            assert!(!demand.observe(Counts::default).is_active());
        }
    }

    #[tokio::test]
    async fn events_reach_their_subscribers() {
        let demand = Demand::default();
        let edges = Arc::new(watch::Sender::new(0));
        // The last channel replaces the others, and setting it again changes nothing.
        demand.set_edges(Arc::new(watch::Sender::new(0)));
        demand.set_edges(edges.clone());
        demand.set_edges(edges.clone());
        let (mut changes, mut arrivals, mut edges) = (demand.changes(), demand.arrivals(), edges.subscribe());
        for (event, expected) in [
            (DemandEvent::Risen, (true, false, true)),
            (DemandEvent::Enqueued, (false, true, false)),
            (DemandEvent::Pushed, (false, false, true)),
            (DemandEvent::InputChanged, (true, false, false)),
        ] {
            demand.publish(event);
            let [has_changes, has_arrivals, has_edges] =
                [&mut changes, &mut arrivals, &mut edges].map(|subscriber| {
                    let has_changed = subscriber.has_changed().unwrap();
                    subscriber.mark_unchanged();
                    has_changed
                });
            assert_eq!((has_changes, has_arrivals, has_edges), expected, "{event:?}");
        }
    }
}
