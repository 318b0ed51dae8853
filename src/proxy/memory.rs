//! Accounting of the memory that clients occupy, by kind, bounded by `limits.maxBufferedBytes`.
//!
//! - Request bodies, held or in flight, may take all of it.
//! - Bodies still arriving, and parts of streamed bodies kept for a retry, may take three quarters of it, which leaves
//!   room for complete bodies.
//! - When a newcomer finds no room, unfinished bodies are evicted, those that grow slowest first. Candidates are bodies
//!   that received less than 16 KiB in 5 s; bodies that grew by less than an eighth of their size in 5 s, of sources
//!   that hold at least as much as the newcomer's, including its own; bodies whose source holds more than the
//!   newcomer's even without them; and bodies of the newcomer's source whose route holds more there than the newcomer's
//!   route even without them.
//! - Incomplete heads share those three quarters. If there is still no room, those that have waited longest are
//!   evicted.
//! - HTTP/2 requests, and requests with large heads, share them while their bodies are awaited. Once admitted, they may
//!   take a further quarter.
//! - The proxy's own responses may take a further eighth until they have been sent, so that a full budget can still be
//!   reported. HTTP/2 clients that do not read them get no more.
//! - Responses of model servers and WebSockets may take a further quarter while their clients do not read. Above half
//!   of it, those whose clients have been behind for 5 s are ended; above all of it, those behind for 1 s.

mod arriving;
mod requests;
mod unread;
mod waiting;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use arriving::{Arrival, Arriving};
use bytes::Bytes;
use parking_lot::Mutex;
pub use requests::RequestShare;
pub(super) use requests::request_bytes;
use thiserror::Error;
pub use unread::{UnreadKind, UnreadShare};
use waiting::Waiting;
pub use waiting::WaitingShare;

use crate::{
    config::budget::{ANSWER_COST_BYTES, max_answer_bytes},
    places::Source,
};

/// Memory that all clients occupy, in bytes.
#[derive(Debug)]
pub struct Memory {
    max: AtomicUsize,
    /// Bytes of bodies and heads.
    requests: AtomicUsize,
    /// Of `requests`, the bytes bounded by three quarters of `max`.
    unfinished: AtomicUsize,
    /// Of `unfinished`, the bytes of incomplete heads and of requests whose bodies are awaited.
    heads: AtomicUsize,
    waiting: Mutex<Waiting>,
    /// Of `unfinished`, the parts of streamed bodies. Bounded by a quarter of `max`, as they are not evicted.
    kept: AtomicUsize,
    answers: AtomicUsize,
    /// Bytes of admitted requests, besides their bodies.
    request_states: AtomicUsize,
    /// Bytes buffered for clients that do not read, by [`UnreadKind`].
    unread: [AtomicUsize; 2],
    arriving: Mutex<Arriving>,
}

/// Bytes reserved for one request body, released on drop.
#[derive(Debug)]
pub struct Share {
    memory: Arc<Memory>,
    owner: Owner,
    bytes: ShareBytes,
}

/// Parties that share the memory of unfinished bodies: sources, and the routes within a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Source of the body.
    pub source: Source,
    /// Address of the route's gate; 0 while the route is unknown.
    pub route: usize,
}

/// Bytes of a share, by how they are counted.
#[derive(Debug)]
enum ShareBytes {
    Finished(usize),
    /// Parts of a streamed body, kept for a retry.
    Kept(usize),
    /// An unfinished body, which may be evicted.
    Arriving(Arc<Arrival>),
}

/// A response of the proxy, counted until its bytes are sent.
struct Counted {
    bytes: Bytes,
    memory: Arc<Memory>,
    cost: usize,
}

/// Error for a response that exceeds the memory of unread responses.
#[derive(Debug, Error)]
#[error("no memory is left for answers that are not read")]
pub struct AnswersFull;

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

    fn max(&self) -> usize {
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

    /// Creates an empty share for a body that is read to its end before it is sent.
    pub(super) fn share(self: &Arc<Self>, owner: Owner) -> Share {
        Share { memory: self.clone(), owner, bytes: ShareBytes::Finished(0) }
    }

    /// Creates an empty share for the kept parts of a streamed body, until its reader [waits](Share::wait).
    pub(super) fn kept_share(self: &Arc<Self>, owner: Owner) -> Share {
        Share { memory: self.clone(), owner, bytes: ShareBytes::Kept(0) }
    }

    /// Counts a response of the proxy until its bytes are sent. Bytes with other owners add nothing to its fixed cost.
    ///
    /// # Errors
    /// There is no room. Does not apply to the only response of its connection (`is_only`), as connections bound those.
    pub(super) fn answer(self: &Arc<Self>, bytes: Bytes, is_only: bool) -> Result<Bytes, AnswersFull> {
        let cost = ANSWER_COST_BYTES + if bytes.is_unique() { bytes.len() } else { 0 };
        let max = if is_only { usize::MAX } else { self.max_answers() };
        if !take(&self.answers, cost, max) {
            return Err(AnswersFull);
        }
        Ok(Bytes::from_owner(Counted { bytes, memory: self.clone(), cost }))
    }

    /// Returns `true` if unread responses take more than half of their bound, so that they must end sooner.
    pub(super) fn is_short_of_answers(&self) -> bool {
        self.answers.load(Ordering::Relaxed) > self.max_answers() / 2
    }

    fn max_answers(&self) -> usize {
        max_answer_bytes(self.max())
    }

    /// Takes memory for `newcomer`, or for a head if `None`, and evicts others if necessary.
    fn take_or_evict(&self, bytes: usize, is_unfinished: bool, newcomer: Option<&Share>) -> bool {
        let missing = || self.missing(bytes, is_unfinished);
        self.find_room(bytes, newcomer, missing, || self.take(bytes, is_unfinished))
    }

    fn find_room(
        &self,
        bytes: usize,
        newcomer: Option<&Share>,
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

    fn missing_unfinished(&self, bytes: usize) -> usize {
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

    fn give_back(&self, bytes: usize, is_unfinished: bool) {
        self.requests.fetch_sub(bytes, Ordering::Relaxed);
        if is_unfinished {
            self.unfinished.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    fn take_unfinished(&self, bytes: usize) -> bool {
        take(&self.unfinished, bytes, self.max_unfinished())
    }

    fn take_kept(&self, bytes: usize) -> bool {
        let is_taken = take(&self.kept, bytes, self.max() / 4);
        if is_taken && !self.take(bytes, true) {
            self.kept.fetch_sub(bytes, Ordering::Relaxed);
            return false;
        }
        is_taken
    }

    /// Evicts bodies for a newcomer that needs `bytes` more. Returns `true` if it evicted any.
    fn evict_for(&self, newcomer: Option<&Share>, bytes: usize) -> bool {
        let arrival = newcomer.and_then(|newcomer| match &newcomer.bytes {
            ShareBytes::Arriving(arrival) => Some(arrival),
            _ => None,
        });
        let wanted = bytes.max(self.max() / EVICTED_PART);
        let owner = newcomer.map(|newcomer| newcomer.owner);
        let freed = self.arriving.lock().evict(owner, arrival, bytes, wanted);
        self.give_back(freed, true);
        freed > 0
    }
}

fn take(used: &AtomicUsize, bytes: usize, max: usize) -> bool {
    let fits = |used: usize| used.checked_add(bytes).filter(|used| *used <= max);
    used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
}

// === impl Share ===

impl Share {
    /// Reserves more bytes. Returns `false`, and reserves none, if there is no room or the body has been evicted.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        let memory = &self.memory;
        let is_taken = match &self.bytes {
            // Parts kept only for a retry evict nothing.
            ShareBytes::Kept(_) => memory.take_kept(bytes),
            body => memory.take_or_evict(bytes, matches!(body, ShareBytes::Arriving(_)), Some(self)),
        };
        match &mut self.bytes {
            _ if !is_taken => false,
            ShareBytes::Finished(all) | ShareBytes::Kept(all) => {
                *all += bytes;
                true
            }
            ShareBytes::Arriving(arrival) => {
                let is_kept = arrival.add(bytes);
                if !is_kept {
                    memory.give_back(bytes, true);
                }
                is_kept
            }
        }
    }

    /// Returns the reserved bytes.
    pub(super) fn bytes(&self) -> usize {
        match &self.bytes {
            ShareBytes::Finished(bytes) | ShareBytes::Kept(bytes) => *bytes,
            ShareBytes::Arriving(arrival) => arrival.bytes(),
        }
    }

    /// Returns the bound of all request bodies, in bytes.
    pub(super) fn max(&self) -> usize {
        self.memory.max()
    }

    /// Makes the body evictable, as its reader waits for more of it. Returns `false` if there is no room for an
    /// unfinished body of this size.
    pub(super) fn wait(&mut self) -> bool {
        let bytes = match self.bytes {
            // Nothing to evict, or evictable already.
            ShareBytes::Finished(0) | ShareBytes::Arriving(_) => return true,
            ShareBytes::Finished(bytes) => {
                let memory = &self.memory;
                let missing = || memory.missing_unfinished(bytes);
                if !memory.find_room(bytes, Some(self), missing, || memory.take_unfinished(bytes)) {
                    return false;
                }
                bytes
            }
            ShareBytes::Kept(bytes) => {
                self.memory.kept.fetch_sub(bytes, Ordering::Relaxed);
                bytes
            }
        };
        self.bytes = ShareBytes::Arriving(self.memory.arriving.lock().add(self.owner, bytes));
        true
    }

    /// Completes once the body is evicted.
    pub(super) fn poll_evicted(&self, cx: &Context<'_>) -> Poll<()> {
        let ShareBytes::Arriving(arrival) = &self.bytes else { return Poll::Pending };
        arrival.poll_evicted(cx)
    }

    /// Ends evictability, as the whole body has arrived. Returns `false` if the body has been evicted.
    pub(super) fn finish(&mut self) -> bool {
        let (bytes, is_whole) = match &self.bytes {
            ShareBytes::Finished(_) => return true,
            ShareBytes::Kept(bytes) => {
                self.memory.kept.fetch_sub(*bytes, Ordering::Relaxed);
                (*bytes, true)
            }
            ShareBytes::Arriving(arrival) => {
                self.memory.arriving.lock().remove(self.owner, arrival);
                (arrival.bytes(), !arrival.is_evicted())
            }
        };
        self.memory.unfinished.fetch_sub(bytes, Ordering::Relaxed);
        self.bytes = ShareBytes::Finished(bytes);
        is_whole
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.finish();
        self.memory.give_back(self.bytes(), false);
    }
}

// === impl Counted ===

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.memory.answers.fetch_sub(self.cost, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
