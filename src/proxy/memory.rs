//! Memory that clients make this process keep, counted by kind and bounded by `limits.maxBufferedBytes`.
//!
//! - Bodies of requests, held or in flight, may take all of it.
//! - Bodies that have not all arrived, and parts of streamed bodies kept for another dispatch, may take three quarters of it,
//!   so that finished requests always find some. When there is no room, those that have stalled are evicted.
//! - Heads that have not all arrived share those three quarters. When there is no room, the oldest are evicted.
//! - Answers of ours that have not been sent to their end may take one eighth on top, so that a full budget can still be
//!   reported. Clients of HTTP/2 that read none of them get no more.

mod waiting;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::Instant;
use waiting::Waiting;
pub use waiting::WaitingShare;

/// The memory of all clients.
#[derive(Debug)]
pub struct Memory {
    max: AtomicUsize,
    /// Bytes of bodies and heads.
    requests: AtomicUsize,
    /// Of `requests`, the bytes that may take three quarters only.
    unfinished: AtomicUsize,
    /// Of `unfinished`, the bytes of heads.
    heads: AtomicUsize,
    waiting: Mutex<Waiting>,
    answers: AtomicUsize,
    arriving: Mutex<Arriving>,
}

/// Bytes taken from the memory of all clients; dropping it gives them back.
#[derive(Debug)]
pub struct Share {
    memory: Arc<Memory>,
    bytes: ShareBytes,
}

/// Bytes of a share, and what they count as.
#[derive(Debug)]
enum ShareBytes {
    Finished(usize),
    Unfinished(usize),
    /// Unfinished, and they can be evicted.
    Arriving(Arc<Arrival>),
}

/// The bodies that their readers wait for.
#[derive(Debug, Default)]
struct Arriving {
    all: HashMap<usize, Arc<Arrival>>,
    scanned: Option<Instant>,
}

/// A body that its reader waits for.
#[derive(Debug)]
struct Arrival {
    state: Mutex<ArrivalState>,
    reader: AtomicWaker,
}

#[derive(Debug)]
struct ArrivalState {
    /// Bytes that have arrived; 0 once it is evicted.
    bytes: usize,
    /// When the last [`PROGRESS_BYTES`] had arrived, and how many bytes there were then.
    progressed: (Instant, usize),
    is_evicted: bool,
}

/// An answer that is counted until its bytes have been sent.
struct Counted {
    bytes: Bytes,
    memory: Arc<Memory>,
    cost: usize,
}

/// There is no memory for another answer that nobody reads.
#[derive(Debug, Error)]
#[error("no memory is left for answers that are not read")]
pub struct AnswersFull;

/// Bytes that an unread answer counts for besides its body: the stream's state, its task and its head. An estimate.
pub const ANSWER_COST_BYTES: usize = 4 << 10;

/// A body is making progress while as much arrives within [`STALL_TIMEOUT`].
const PROGRESS_BYTES: usize = 16 << 10;

/// How long a body may make no progress before another one takes its memory, if there is too little.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The shortest time between two scans for stalled bodies.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);

// === impl Memory ===

impl Memory {
    /// `max`: bytes of all bodies.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max: AtomicUsize::new(max),
            requests: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(0),
            heads: AtomicUsize::new(0),
            waiting: Mutex::default(),
            answers: AtomicUsize::new(0),
            arriving: Mutex::default(),
        })
    }

    /// Changes the bound. What is in memory stays there.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// Bytes of all request bodies in memory.
    pub fn bodies(&self) -> usize {
        self.requests.load(Ordering::Relaxed).saturating_sub(self.heads.load(Ordering::Relaxed))
    }

    /// Bytes in use, by kind.
    pub fn kinds(&self) -> [(&'static str, usize); 4] {
        let heads = self.heads.load(Ordering::Relaxed);
        let unfinished = self.unfinished.load(Ordering::Relaxed).saturating_sub(heads);
        let answers = self.answers.load(Ordering::Relaxed);
        [
            ("body", self.bodies().saturating_sub(unfinished)),
            ("unfinished_body", unfinished),
            ("head", heads),
            ("answer", answers),
        ]
    }

    /// An empty share for a body that is read to its end before it is sent.
    pub(super) fn share(self: &Arc<Self>) -> Share {
        Share { memory: self.clone(), bytes: ShareBytes::Finished(0) }
    }

    /// An empty share for what is kept of a body that streams.
    pub(super) fn unfinished_share(self: &Arc<Self>) -> Share {
        Share { memory: self.clone(), bytes: ShareBytes::Unfinished(0) }
    }

    /// Counts an answer of ours until its bytes have been sent. Bytes that others share cost nothing themselves.
    ///
    /// # Errors
    /// When there is no room for it, unless it is the only one of its connection: those are bounded by the connections.
    pub(super) fn answer(self: &Arc<Self>, bytes: Bytes, is_only: bool) -> Result<Bytes, AnswersFull> {
        let cost = ANSWER_COST_BYTES + if bytes.is_unique() { bytes.len() } else { 0 };
        let max = if is_only { usize::MAX } else { self.max_answers() };
        if !take(&self.answers, cost, max) {
            return Err(AnswersFull);
        }
        Ok(Bytes::from_owner(Counted { bytes, memory: self.clone(), cost }))
    }

    /// Returns whether answers that are not read take so much that they are to end sooner.
    pub(super) fn is_short_of_answers(&self) -> bool {
        self.answers.load(Ordering::Relaxed) > self.max_answers() / 2
    }

    fn max_answers(&self) -> usize {
        (self.max() / 8).max(16 * ANSWER_COST_BYTES)
    }

    fn take_or_evict(&self, bytes: usize, is_unfinished: bool) -> bool {
        let take = || self.take(bytes, is_unfinished);
        take()
            || (self.evict_stalled() && take())
            || (self.evict_waiting(self.missing(bytes, is_unfinished)) && take())
    }

    /// Bytes that there is no room for.
    fn missing(&self, bytes: usize, is_unfinished: bool) -> usize {
        let over = |used: &AtomicUsize, max| (used.load(Ordering::Relaxed) + bytes).saturating_sub(max);
        let of_all = over(&self.requests, self.max());
        if is_unfinished { of_all.max(over(&self.unfinished, self.max() / 4 * 3)) } else { of_all }
    }

    fn take(&self, bytes: usize, is_unfinished: bool) -> bool {
        let max = self.max();
        if is_unfinished && !take(&self.unfinished, bytes, max / 4 * 3) {
            return false;
        }
        let is_taken = take(&self.requests, bytes, max);
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

    /// Evicts the bodies that have stalled. Returns whether there were any.
    fn evict_stalled(&self) -> bool {
        let mut arriving = self.arriving.lock();
        let now = Instant::now();
        if arriving.all.is_empty() || arriving.scanned.is_some_and(|scanned| now - scanned < SCAN_INTERVAL) {
            return false;
        }
        arriving.scanned = Some(now);
        let mut evicted = 0_usize;
        for arrival in arriving.all.values() {
            let mut state = arrival.state.lock();
            if !state.is_evicted && now.duration_since(state.progressed.0) >= STALL_TIMEOUT {
                state.is_evicted = true;
                self.give_back(std::mem::take(&mut state.bytes), true);
                arrival.reader.wake();
                evicted += 1;
            }
        }
        if evicted > 0 {
            tracing::debug!(evicted, "bodies that had stalled were given up: others need their memory");
        }
        evicted > 0
    }
}

fn take(used: &AtomicUsize, bytes: usize, max: usize) -> bool {
    let fits = |used: usize| used.checked_add(bytes).filter(|used| *used <= max);
    used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
}

// === impl Share ===

impl Share {
    /// Takes more. Returns `false`, and takes nothing, if there is no more or it has been evicted.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        let memory = &self.memory;
        let is_unfinished = !matches!(self.bytes, ShareBytes::Finished(_));
        let is_taken = memory.take_or_evict(bytes, is_unfinished);
        match &mut self.bytes {
            _ if !is_taken => false,
            ShareBytes::Finished(all) | ShareBytes::Unfinished(all) => {
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

    /// Bytes that it has.
    pub(super) fn bytes(&self) -> usize {
        match &self.bytes {
            ShareBytes::Finished(bytes) | ShareBytes::Unfinished(bytes) => *bytes,
            ShareBytes::Arriving(arrival) => arrival.state.lock().bytes,
        }
    }

    /// Bytes that all bodies may take.
    pub(super) fn max(&self) -> usize {
        self.memory.max()
    }

    /// The reader has to wait for the body: from now on it can be evicted.
    pub(super) fn wait(&mut self) {
        let bytes = match self.bytes {
            ShareBytes::Finished(bytes) => {
                self.memory.unfinished.fetch_add(bytes, Ordering::Relaxed);
                bytes
            }
            ShareBytes::Unfinished(bytes) => bytes,
            ShareBytes::Arriving(_) => return,
        };
        let state = ArrivalState { bytes, progressed: (Instant::now(), bytes), is_evicted: false };
        let arrival = Arc::new(Arrival { state: Mutex::new(state), reader: AtomicWaker::new() });
        self.memory.arriving.lock().all.insert(key(&arrival), arrival.clone());
        self.bytes = ShareBytes::Arriving(arrival);
    }

    /// Is ready once it is evicted.
    pub(super) fn poll_evicted(&self, cx: &Context<'_>) -> Poll<()> {
        let ShareBytes::Arriving(arrival) = &self.bytes else { return Poll::Pending };
        arrival.reader.register(cx.waker());
        if arrival.state.lock().is_evicted { Poll::Ready(()) } else { Poll::Pending }
    }

    /// All of the body has arrived: it is not evicted any more. Returns `false` if it has been.
    pub(super) fn finish(&mut self) -> bool {
        let (bytes, is_whole) = match &self.bytes {
            ShareBytes::Finished(_) => return true,
            ShareBytes::Unfinished(bytes) => (*bytes, true),
            ShareBytes::Arriving(arrival) => {
                self.memory.arriving.lock().all.remove(&key(arrival));
                let state = arrival.state.lock();
                (state.bytes, !state.is_evicted)
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

impl Arrival {
    /// Adds bytes that have been taken. Returns `false` if it has been evicted.
    fn add(&self, bytes: usize) -> bool {
        let mut state = self.state.lock();
        if state.is_evicted {
            return false;
        }
        state.bytes += bytes;
        if state.bytes - state.progressed.1 >= PROGRESS_BYTES {
            state.progressed = (Instant::now(), state.bytes);
        }
        true
    }
}

fn key(arrival: &Arc<Arrival>) -> usize {
    Arc::as_ptr(arrival).addr()
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
mod tests {
    use tokio::time::advance;

    use super::*;

    const KIB: usize = 1024;

    fn kinds(memory: &Memory) -> [usize; 3] {
        let [body, unfinished_body, _, answer] = memory.kinds().map(|(_, bytes)| bytes);
        [body, unfinished_body, answer]
    }

    /// Of 400 KiB, 300 are for what has not all arrived.
    #[tokio::test(start_paused = true)]
    async fn finished_bodies_find_room_beside_unfinished_ones() {
        let memory = Memory::new(400 * KIB);
        let mut arriving = memory.share();
        arriving.wait();
        assert!(arriving.grow(300 * KIB) && !arriving.grow(1));
        let mut finished = memory.share();
        assert!(finished.grow(100 * KIB) && !finished.grow(1));
        assert_eq!(kinds(&memory), [100 * KIB, 300 * KIB, 0]);
        drop(finished);
        assert!(arriving.finish());
        assert_eq!(kinds(&memory), [300 * KIB, 0, 0]);
        drop(arriving);
        assert_eq!(kinds(&memory), [0; 3]);
    }

    /// After 5 s without 16 KiB, and only when another one needs it.
    #[tokio::test(start_paused = true)]
    async fn stalled_body_gives_way_and_a_progressing_one_stays() {
        let memory = Memory::new(400 * KIB);
        let (mut stalled, mut progressing, mut other) = (memory.share(), memory.share(), memory.share());
        for share in [&mut stalled, &mut progressing] {
            share.wait();
            assert!(share.grow(100 * KIB));
        }
        advance(Duration::from_secs(4)).await;
        assert!(progressing.grow(16 * KIB) && stalled.grow(16 * KIB - 1));
        other.wait();
        assert!(!other.grow(100 * KIB), "nothing has stalled for 5 s");
        advance(Duration::from_secs(1)).await;
        assert!(other.grow(100 * KIB));
        let cx = Context::from_waker(std::task::Waker::noop());
        assert!(stalled.poll_evicted(&cx).is_ready() && progressing.poll_evicted(&cx).is_pending());
        assert!(!stalled.grow(1) && !stalled.finish());
        assert!(progressing.finish() && other.finish());
        drop((stalled, progressing, other));
        assert_eq!(kinds(&memory), [0; 3]);
    }

    #[test]
    fn answers_count_until_their_bytes_are_gone() {
        let memory = Memory::new(8 * 100 * KIB);
        let answer = memory.answer(Bytes::from(vec![0; 10 * KIB]), false).unwrap();
        assert_eq!(kinds(&memory), [0, 0, 14 * KIB]);
        let sent = answer.slice(5..);
        drop(answer);
        assert_eq!(kinds(&memory), [0, 0, 14 * KIB], "a part of it is in a send buffer");
        drop(sent);
        let shared = Bytes::from(vec![0; 1000 * KIB]);
        let answers: Vec<_> = (0..25).map(|_| memory.answer(shared.clone(), false).unwrap()).collect();
        assert!(memory.answer(Bytes::from_static(b"x"), false).is_err(), "25 × 4 KiB of 100 KiB");
        assert!(memory.answer(Bytes::from_static(b"x"), true).is_ok());
        assert!(memory.is_short_of_answers());
        drop(answers);
        assert_eq!(kinds(&memory), [0; 3]);
    }
}
