//! Unfinished bodies, and the choice of bodies to evict when a newcomer finds no room.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::places::Source;

/// Parties that share the memory of unfinished bodies: sources, and the routes within a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Source of the body.
    pub source: Source,
    /// Address of the route's gate; 0 while the route is unknown.
    pub route: usize,
}

/// Bodies whose readers wait for more data.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    all: HashMap<usize, Arc<ArrivingBody>>,
    /// Shares of the sources that have a body in `all`.
    sources: HashMap<Source, SourceShare>,
    /// Last scan that found nothing to evict.
    fruitless: Option<EvictionScan>,
}

/// Unfinished bodies of one source.
#[derive(Debug, Default)]
struct SourceShare {
    count: usize,
    bytes: Arc<AtomicUsize>,
    /// Number and bytes of the bodies, by route.
    routes: HashMap<usize, (usize, Arc<AtomicUsize>)>,
    /// Last scan for a route of this source that found nothing to evict.
    fruitless: Option<EvictionScan>,
}

/// A scan for bodies to evict.
#[derive(Debug)]
struct EvictionScan {
    at: Instant,
    /// Bytes that the newcomer's source held, or its route for [`SourceShare::fruitless`]. A newcomer whose source or
    /// route holds more may evict fewer bodies, so the result applies to it, too.
    least_bytes: usize,
}

/// A body whose reader waits for more data.
#[derive(Debug)]
pub(super) struct ArrivingBody {
    state: Mutex<ArrivingBodyState>,
    reader: AtomicWaker,
    /// Bytes of all unfinished bodies of its source.
    bytes_of_source: Arc<AtomicUsize>,
    /// Of these, the bytes of its route.
    bytes_of_route: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct ArrivingBodyState {
    /// Bytes that have arrived; 0 after eviction.
    bytes: usize,
    /// Time at which the body last had grown by [`PROGRESS_BYTES`], and its size at that time.
    last_progress: (Instant, usize),
    /// Time at which the body last had grown by one part in [`GROWTH_DIVISOR`], and its size at that time.
    last_growth: (Instant, usize),
    is_evicted: bool,
}

/// A body that needs more memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Newcomer<'a> {
    pub(super) owner: Owner,
    /// Its entry, if its reader waits for more data.
    pub(super) arrival: Option<&'a Arc<ArrivingBody>>,
}

/// Bytes that must arrive within [`STALL_TIMEOUT`], or the body is stalled.
const PROGRESS_BYTES: usize = 16 << 10;

/// Divisor of a body's size: a body that does not grow by this part within [`STALL_TIMEOUT`] is slow. At 1 MiB that is
/// 26 KB/s. A body that is not slow doubles within 30 s, and reaches its end as its size is bounded.
const GROWTH_DIVISOR: usize = 8;

/// Time without progress after which a body may be evicted, if memory is short.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Minimum time between scans that find nothing to evict.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);

// === impl Arriving ===

impl Arriving {
    /// Registers a body of `bytes` bytes whose reader waits for more.
    pub(super) fn add(&mut self, owner: Owner, bytes: usize) -> Arc<ArrivingBody> {
        let share = self.sources.entry(owner.source).or_default();
        share.count += 1;
        share.bytes.fetch_add(bytes, Ordering::Relaxed);
        let (count, of_route) = share.routes.entry(owner.route).or_default();
        *count += 1;
        of_route.fetch_add(bytes, Ordering::Relaxed);
        let of_route = of_route.clone();
        let begun = (Instant::now(), bytes);
        let state = ArrivingBodyState { bytes, last_progress: begun, last_growth: begun, is_evicted: false };
        let of_source = share.bytes.clone();
        let arrival = Arc::new(ArrivingBody {
            state: Mutex::new(state),
            reader: AtomicWaker::new(),
            bytes_of_source: of_source,
            bytes_of_route: of_route,
        });
        self.all.insert(key(&arrival), arrival.clone());
        arrival
    }

    /// Removes a body, which is not evicted from here on.
    pub(super) fn remove(&mut self, owner: Owner, arrival: &Arc<ArrivingBody>) {
        self.all.remove(&key(arrival));
        arrival.bytes_of_source.fetch_sub(arrival.bytes(), Ordering::Relaxed);
        arrival.bytes_of_route.fetch_sub(arrival.bytes(), Ordering::Relaxed);
        if let Entry::Occupied(mut share) = self.sources.entry(owner.source) {
            share.get_mut().count -= 1;
            if share.get().count == 0 {
                share.remove();
            } else if let Entry::Occupied(mut route) = share.get_mut().routes.entry(owner.route) {
                route.get_mut().0 -= 1;
                if route.get().0 == 0 {
                    route.remove();
                }
            }
        }
    }

    /// Evicts bodies, starting with the least recent growth, until `wanted` bytes are free or no candidate is left.
    /// Returns the bytes freed.
    ///
    /// The newcomer needs `bytes` more. Without a newcomer, only stalled bodies are evicted. A scan visits all bodies. If
    /// it finds none to evict, its result applies for [`SCAN_INTERVAL`] to all newcomers whose sources hold as much.
    pub(super) fn evict(&mut self, newcomer: Option<Newcomer<'_>>, bytes: usize, wanted: usize) -> usize {
        let owner = newcomer.map(|newcomer| newcomer.owner);
        let newcomer = newcomer.and_then(|newcomer| newcomer.arrival);
        let now = Instant::now();
        // A slow newcomer evicts no slow body of its own source, and its fruitless scan is not recorded for others.
        let is_slow = newcomer.is_some_and(|newcomer| newcomer.state.lock().is_slow(now));
        let share = owner.and_then(|owner| self.sources.get(&owner.source));
        let own = share.map(|own| own.bytes.clone());
        let own_route = share.zip(owner).and_then(|(share, owner)| share.routes.get(&owner.route));
        let own_route = own_route.map(|(_, bytes)| bytes.clone());
        let of_own_route = || own_route.as_ref().map_or(0, |bytes| bytes.load(Ordering::Relaxed));
        let least = || match (&own, owner) {
            (Some(own), _) => own.load(Ordering::Relaxed) + usize::from(is_slow),
            (None, Some(_)) => 0,
            (None, None) => usize::MAX,
        };
        let is_known = |scan: &Option<EvictionScan>, least: usize| {
            scan.as_ref().is_some_and(|scan| now - scan.at < SCAN_INTERVAL && least >= scan.least_bytes)
        };
        let is_route_known = share.is_none_or(|share| is_known(&share.fruitless, of_own_route()));
        if self.all.is_empty() || (is_known(&self.fruitless, least()) && is_route_known) {
            return 0;
        }
        let newcomer = newcomer.map(key);
        let others = self.all.iter().filter(|(key, _)| Some(**key) != newcomer);
        let mut slowest: Vec<_> =
            others.map(|(_, arrival)| (arrival.state.lock().last_growth.0, arrival)).collect();
        slowest.sort_unstable_by_key(|(grown, _)| *grown);
        let (mut evicted, mut freed) = (0_usize, 0);
        for (_, arrival) in slowest {
            if freed >= wanted {
                break;
            }
            let mut state = arrival.state.lock();
            let of_source = arrival.bytes_of_source.load(Ordering::Relaxed);
            let may_go = state.is_stalled(now)
                || (state.is_slow(now) && of_source >= least())
                || of_source.saturating_sub(state.bytes) >= least().saturating_add(bytes)
                || (own.as_ref().is_some_and(|own| Arc::ptr_eq(own, &arrival.bytes_of_source))
                    && arrival.bytes_of_route.load(Ordering::Relaxed).saturating_sub(state.bytes)
                        >= of_own_route().saturating_add(bytes));
            if may_go && state.bytes > 0 {
                freed += arrival.evict(&mut state);
                evicted += 1;
            }
        }
        if evicted > 0 {
            self.fruitless = None;
            self.sources.values_mut().for_each(|share| share.fruitless = None);
            tracing::debug!(evicted, freed, "evicted slow bodies to free memory for others");
        } else if !is_slow {
            self.fruitless = Some(EvictionScan { at: now, least_bytes: least() });
            let of_own_route = of_own_route();
            if let Some(share) = owner.and_then(|owner| self.sources.get_mut(&owner.source)) {
                share.fruitless = Some(EvictionScan { at: now, least_bytes: of_own_route });
            }
        }
        freed
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.sources.is_empty()
    }
}

// === impl ArrivingBody ===

impl ArrivingBody {
    /// Returns the bytes that have arrived; 0 after eviction.
    pub(super) fn bytes(&self) -> usize {
        self.state.lock().bytes
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.state.lock().is_evicted
    }

    /// Adds reserved bytes. Returns `false` if the body has been evicted.
    pub(super) fn add(&self, bytes: usize) -> bool {
        let mut state = self.state.lock();
        if state.is_evicted {
            return false;
        }
        state.bytes += bytes;
        self.bytes_of_source.fetch_add(bytes, Ordering::Relaxed);
        self.bytes_of_route.fetch_add(bytes, Ordering::Relaxed);
        if state.bytes - state.last_progress.1 >= PROGRESS_BYTES {
            state.last_progress = (Instant::now(), state.bytes);
            if state.bytes - state.last_growth.1 >= state.last_growth.1 / GROWTH_DIVISOR {
                state.last_growth = state.last_progress;
            }
        }
        true
    }

    /// Completes once the body is evicted.
    pub(super) fn poll_evicted(&self, cx: &Context<'_>) -> Poll<()> {
        self.reader.register(cx.waker());
        if self.is_evicted() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Marks the body as evicted, and returns the bytes it had.
    fn evict(&self, state: &mut ArrivingBodyState) -> usize {
        let bytes = std::mem::take(&mut state.bytes);
        self.bytes_of_source.fetch_sub(bytes, Ordering::Relaxed);
        self.bytes_of_route.fetch_sub(bytes, Ordering::Relaxed);
        state.is_evicted = true;
        self.reader.wake();
        bytes
    }
}

// === impl ArrivingBodyState ===

impl ArrivingBodyState {
    fn is_stalled(&self, now: Instant) -> bool {
        now.duration_since(self.last_progress.0) >= STALL_TIMEOUT
    }

    fn is_slow(&self, now: Instant) -> bool {
        now.duration_since(self.last_growth.0) >= STALL_TIMEOUT
    }
}

fn key(arrival: &Arc<ArrivingBody>) -> usize {
    Arc::as_ptr(arrival).addr()
}
