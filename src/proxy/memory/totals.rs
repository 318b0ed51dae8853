//! Bytes in use by kind, their bounds, and the search for room.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
};

use parking_lot::Mutex;

use super::arriving::{Arriving, Newcomer};

/// Memory that all clients occupy, in bytes.
#[derive(Debug)]
pub struct Memory {
    max: AtomicUsize,
    /// Bytes of bodies and heads.
    pub(super) requests: AtomicUsize,
    /// Of `requests`, the bytes bounded by three quarters of `max`.
    pub(super) unfinished: AtomicUsize,
    /// Of `unfinished`, the bytes of incomplete heads and of requests whose bodies are awaited.
    pub(super) heads: AtomicUsize,
    pub(super) waiting: Mutex<Waiting>,
    /// Of `unfinished`, the parts of streamed bodies. Bounded by a quarter of `max`, as they are not evicted.
    pub(super) kept: AtomicUsize,
    pub(super) answers: AtomicUsize,
    /// Bytes of admitted requests, besides their bodies.
    pub(super) request_states: AtomicUsize,
    /// Bytes buffered for clients that do not read, by `UnreadKind`.
    pub(super) unread: [AtomicUsize; 2],
    pub(super) arriving: Mutex<Arriving>,
}

/// Waiting connections and requests, by age.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) all: BTreeMap<u64, WaitingEntry>,
    pub(super) newest: u64,
}

/// A connection or request that waits.
#[derive(Debug)]
pub(super) struct WaitingEntry {
    pub(super) bytes: usize,
    /// Task to wake on eviction.
    pub(super) task: Waker,
}

/// Divisor of the memory: a scan, which visits all unfinished bodies, evicts at least this part if possible.
const EVICTED_PART: usize = 64;

// === impl Memory ===

impl Memory {
    /// Creates the accounting. `max`: bytes of all request bodies.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max: AtomicUsize::new(max),
            requests: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(0),
            heads: AtomicUsize::new(0),
            waiting: Mutex::default(),
            kept: AtomicUsize::new(0),
            answers: AtomicUsize::new(0),
            request_states: AtomicUsize::new(0),
            unread: <_>::default(),
            arriving: Mutex::default(),
        })
    }

    /// Changes the bound. Evicts nothing.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    pub(super) fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// Returns the bytes of all request bodies in memory.
    pub fn bodies(&self) -> usize {
        self.requests.load(Ordering::Relaxed).saturating_sub(self.heads.load(Ordering::Relaxed))
    }

    /// Returns the bytes in use, by kind.
    pub fn kinds(&self) -> [(&'static str, usize); 7] {
        let heads = self.heads.load(Ordering::Relaxed);
        let unfinished = self.unfinished.load(Ordering::Relaxed).saturating_sub(heads);
        let answers = self.answers.load(Ordering::Relaxed);
        let [relays, tunnels] = self.unread.each_ref().map(|bytes| bytes.load(Ordering::Relaxed));
        [
            ("body", self.bodies().saturating_sub(unfinished)),
            ("unfinished_body", unfinished),
            ("head", heads),
            ("request", self.request_states.load(Ordering::Relaxed)),
            ("answer", answers),
            ("relay", relays),
            ("tunnel", tunnels),
        ]
    }

    /// Takes memory for `newcomer`, or for a head if `None`, and evicts others if necessary.
    pub(super) fn take_or_evict(
        &self,
        bytes: usize,
        is_unfinished: bool,
        newcomer: Option<Newcomer<'_>>,
    ) -> bool {
        let missing = || self.missing(bytes, is_unfinished);
        self.find_room(bytes, newcomer, missing, || self.take(bytes, is_unfinished))
    }

    pub(super) fn find_room(
        &self,
        bytes: usize,
        newcomer: Option<Newcomer<'_>>,
        missing: impl Fn() -> usize,
        take: impl Fn() -> bool,
    ) -> bool {
        take() || (self.evict_for(newcomer, bytes) && take()) || (self.evict_waiting(missing()) && take())
    }

    /// Returns the number of bytes that do not fit.
    fn missing(&self, bytes: usize, is_unfinished: bool) -> usize {
        let of_all = (self.requests.load(Ordering::Relaxed) + bytes).saturating_sub(self.max());
        if is_unfinished { of_all.max(self.missing_unfinished(bytes)) } else { of_all }
    }

    pub(super) fn missing_unfinished(&self, bytes: usize) -> usize {
        (self.unfinished.load(Ordering::Relaxed) + bytes).saturating_sub(self.max_unfinished())
    }

    fn max_unfinished(&self) -> usize {
        self.max() / 4 * 3
    }

    fn take(&self, bytes: usize, is_unfinished: bool) -> bool {
        if is_unfinished && !self.take_unfinished(bytes) {
            return false;
        }
        let is_taken = take(&self.requests, bytes, self.max());
        if !is_taken && is_unfinished {
            self.unfinished.fetch_sub(bytes, Ordering::Relaxed);
        }
        is_taken
    }

    pub(super) fn give_back(&self, bytes: usize, is_unfinished: bool) {
        self.requests.fetch_sub(bytes, Ordering::Relaxed);
        if is_unfinished {
            self.unfinished.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    pub(super) fn take_unfinished(&self, bytes: usize) -> bool {
        take(&self.unfinished, bytes, self.max_unfinished())
    }

    pub(super) fn take_kept(&self, bytes: usize) -> bool {
        let is_taken = take(&self.kept, bytes, self.max() / 4);
        if is_taken && !self.take(bytes, true) {
            self.kept.fetch_sub(bytes, Ordering::Relaxed);
            return false;
        }
        is_taken
    }

    /// Evicts bodies for a newcomer that needs `bytes` more. Returns `true` if it evicted any.
    fn evict_for(&self, newcomer: Option<Newcomer<'_>>, bytes: usize) -> bool {
        let wanted = bytes.max(self.max() / EVICTED_PART);
        let freed = self.arriving.lock().evict(newcomer, bytes, wanted);
        self.give_back(freed, true);
        freed > 0
    }
}

/// Adds `bytes` to `used`, unless the sum exceeds `max`.
pub(super) fn take(used: &AtomicUsize, bytes: usize, max: usize) -> bool {
    let fits = |used: usize| used.checked_add(bytes).filter(|used| *used <= max);
    used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
}
