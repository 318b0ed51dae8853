//! Bodies that their readers wait for, and which of them are given up when there is no room for another one.

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

use super::Owner;
use crate::places::Source;

/// The bodies that their readers wait for.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    all: HashMap<usize, Arc<Arrival>>,
    /// No source is kept without a body.
    sources: HashMap<Source, SourceShare>,
    /// The last scan that found none to evict.
    fruitless: Option<Scan>,
}

/// The bodies of one source that their readers wait for.
#[derive(Debug, Default)]
struct SourceShare {
    count: usize,
    bytes: Arc<AtomicUsize>,
    /// Bytes by route, for those that have bodies here: how many, and their bytes.
    routes: HashMap<usize, (usize, Arc<AtomicUsize>)>,
    /// The last scan for a route of this source that found none to evict.
    fruitless: Option<Scan>,
}

/// A scan for bodies to evict.
#[derive(Debug)]
struct Scan {
    at: Instant,
    /// The fewest bytes that a source had to hold to give up a slow body, or the bytes of the newcomer's route. With more, the
    /// same scan finds nothing either.
    least: usize,
}

/// A body that its reader waits for.
#[derive(Debug)]
pub(super) struct Arrival {
    state: Mutex<ArrivalState>,
    reader: AtomicWaker,
    /// Bytes of all bodies of its source.
    of_source: Arc<AtomicUsize>,
    /// Of these, bytes of its route.
    of_route: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct ArrivalState {
    /// Bytes that have arrived; 0 once it is evicted.
    bytes: usize,
    /// When the last [`PROGRESS_BYTES`] had arrived, and how many bytes there were then.
    progressed: (Instant, usize),
    /// The same for the last [`GROWTH_PART`] of its size.
    grown: (Instant, usize),
    is_evicted: bool,
}

/// A body stalls unless as much arrives within [`STALL_TIMEOUT`].
const PROGRESS_BYTES: usize = 16 << 10;

/// A body is slow unless this part of its size arrives within [`STALL_TIMEOUT`]: at 1 MiB, 26 KB/s. Its size is bounded, so that
/// one that is not slow doubles in 30 s at most, and ends.
const GROWTH_PART: usize = 8;

/// How long a body may be without progress before another one takes its memory, if there is too little.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The shortest time between two scans that find none to evict.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);

// === impl Arriving ===

impl Arriving {
    /// From now on the reader of a body with so many bytes waits for more.
    pub(super) fn add(&mut self, owner: Owner, bytes: usize) -> Arc<Arrival> {
        let share = self.sources.entry(owner.source).or_default();
        share.count += 1;
        share.bytes.fetch_add(bytes, Ordering::Relaxed);
        let (count, of_route) = share.routes.entry(owner.route).or_default();
        *count += 1;
        of_route.fetch_add(bytes, Ordering::Relaxed);
        let of_route = of_route.clone();
        let begun = (Instant::now(), bytes);
        let state = ArrivalState { bytes, progressed: begun, grown: begun, is_evicted: false };
        let of_source = share.bytes.clone();
        let arrival =
            Arc::new(Arrival { state: Mutex::new(state), reader: AtomicWaker::new(), of_source, of_route });
        self.all.insert(key(&arrival), arrival.clone());
        arrival
    }

    /// Removes a body of that owner: it is not evicted any more.
    pub(super) fn remove(&mut self, owner: Owner, arrival: &Arc<Arrival>) {
        self.all.remove(&key(arrival));
        arrival.of_source.fetch_sub(arrival.bytes(), Ordering::Relaxed);
        arrival.of_route.fetch_sub(arrival.bytes(), Ordering::Relaxed);
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

    /// Evicts bodies, the one that has been growing slowest for longest first, until `wanted` bytes are free or none is left
    /// that may go. The newcomer, of that owner and perhaps one of the bodies, needs `bytes` more; for one without an owner
    /// only what has stalled goes. Returns how many bytes are free now.
    ///
    /// A scan looks at all bodies. One that finds none holds for a while for all newcomers whose sources have as much.
    pub(super) fn evict(
        &mut self,
        owner: Option<Owner>,
        newcomer: Option<&Arc<Arrival>>,
        bytes: usize,
        wanted: usize,
    ) -> usize {
        let now = Instant::now();
        // One that is slow takes nothing from the others of its source. Neither does it say anything for those that are not.
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
        let is_known = |scan: &Option<Scan>, least: usize| {
            scan.as_ref().is_some_and(|scan| now - scan.at < SCAN_INTERVAL && least >= scan.least)
        };
        let is_route_known = share.is_none_or(|share| is_known(&share.fruitless, of_own_route()));
        if self.all.is_empty() || (is_known(&self.fruitless, least()) && is_route_known) {
            return 0;
        }
        let newcomer = newcomer.map(key);
        let others = self.all.iter().filter(|(key, _)| Some(**key) != newcomer);
        let mut slowest: Vec<_> =
            others.map(|(_, arrival)| (arrival.state.lock().grown.0, arrival)).collect();
        slowest.sort_unstable_by_key(|(grown, _)| *grown);
        let (mut evicted, mut freed) = (0_usize, 0);
        for (_, arrival) in slowest {
            if freed >= wanted {
                break;
            }
            let mut state = arrival.state.lock();
            let of_source = arrival.of_source.load(Ordering::Relaxed);
            let may_go = state.is_stalled(now)
                || (state.is_slow(now) && of_source >= least())
                || of_source.saturating_sub(state.bytes) >= least().saturating_add(bytes)
                || (own.as_ref().is_some_and(|own| Arc::ptr_eq(own, &arrival.of_source))
                    && arrival.of_route.load(Ordering::Relaxed).saturating_sub(state.bytes)
                        >= of_own_route().saturating_add(bytes));
            if may_go && state.bytes > 0 {
                freed += arrival.evict(&mut state);
                evicted += 1;
            }
        }
        if evicted > 0 {
            self.fruitless = None;
            self.sources.values_mut().for_each(|share| share.fruitless = None);
            tracing::debug!(evicted, freed, "slow bodies were given up: others need their memory");
        } else if !is_slow {
            self.fruitless = Some(Scan { at: now, least: least() });
            let of_own_route = of_own_route();
            if let Some(share) = owner.and_then(|owner| self.sources.get_mut(&owner.source)) {
                share.fruitless = Some(Scan { at: now, least: of_own_route });
            }
        }
        freed
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.sources.is_empty()
    }
}

// === impl Arrival ===

impl Arrival {
    /// Bytes that have arrived; 0 once it is evicted.
    pub(super) fn bytes(&self) -> usize {
        self.state.lock().bytes
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.state.lock().is_evicted
    }

    /// Adds bytes that have been taken. Returns `false` if it has been evicted.
    pub(super) fn add(&self, bytes: usize) -> bool {
        let mut state = self.state.lock();
        if state.is_evicted {
            return false;
        }
        state.bytes += bytes;
        self.of_source.fetch_add(bytes, Ordering::Relaxed);
        self.of_route.fetch_add(bytes, Ordering::Relaxed);
        if state.bytes - state.progressed.1 >= PROGRESS_BYTES {
            state.progressed = (Instant::now(), state.bytes);
            if state.bytes - state.grown.1 >= state.grown.1 / GROWTH_PART {
                state.grown = state.progressed;
            }
        }
        true
    }

    /// Is ready once it is evicted.
    pub(super) fn poll_evicted(&self, cx: &Context<'_>) -> Poll<()> {
        self.reader.register(cx.waker());
        if self.is_evicted() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Returns the bytes that it had.
    fn evict(&self, state: &mut ArrivalState) -> usize {
        let bytes = std::mem::take(&mut state.bytes);
        self.of_source.fetch_sub(bytes, Ordering::Relaxed);
        self.of_route.fetch_sub(bytes, Ordering::Relaxed);
        state.is_evicted = true;
        self.reader.wake();
        bytes
    }
}

// === impl ArrivalState ===

impl ArrivalState {
    fn is_stalled(&self, now: Instant) -> bool {
        now.duration_since(self.progressed.0) >= STALL_TIMEOUT
    }

    fn is_slow(&self, now: Instant) -> bool {
        now.duration_since(self.grown.0) >= STALL_TIMEOUT
    }
}

fn key(arrival: &Arc<Arrival>) -> usize {
    Arc::as_ptr(arrival).addr()
}
