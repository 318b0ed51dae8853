//! What a connection and the requests on it tell each other.

use std::{
    fmt,
    future::Future,
    num::NonZeroU32,
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::memory::RequestShare;

/// What the connection and the requests on it tell each other. All on one thread, so ordering is of no matter; other
/// threads only read since when it is idle, and ask it to end.
#[derive(Default)]
pub struct ConnectionState {
    /// When it became idle, in µs of [`clock`]; 0 while it is not.
    idle_since: AtomicU64,
    /// It is to end as soon as no request suffers from it.
    closing: AtomicBool,
    /// [`HAS_PLACE`], [`IS_SHED`] or [`HAS_GONE`].
    place: AtomicU8,
    /// The task that serves it.
    task: AtomicWaker,
    /// Seconds between requests for which it stays open; 0 unless its answers say so.
    keep_alive_s: AtomicU32,
    /// Requests that have begun.
    begun: AtomicU32,
    /// Those of them whose answer is not finished.
    active: AtomicU32,
    /// Those that HTTP/2's client reset soon after they had begun.
    rapid_resets: AtomicU32,
    /// The client stopped reading.
    stalled: AtomicBool,
    /// Answers of model servers have gone out over it.
    relays: AtomicBool,
    /// What comes after HTTP, if its last answer says that something does.
    next: Mutex<Option<Next>>,
    /// That something does.
    leaves_http: AtomicBool,
}

/// What a connection does after HTTP.
pub type Next = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A request is under way on the connection, until this is dropped.
#[derive(Debug)]
pub struct UnderWay {
    connection: Arc<ConnectionState>,
    /// What it keeps besides its body.
    memory: Option<RequestShare>,
}

/// A request of HTTP/2 before its answer begins.
#[derive(Debug)]
pub(super) struct Early {
    state: Option<Arc<ConnectionState>>,
    since: Instant,
}

/// A request that is reset sooner than that was hardly meant to be answered.
const RAPID: Duration = Duration::from_secs(1);

/// The shortest idle time after which a connection may end for another one. The first request of one that was just
/// accepted may still wait to be read, and the next request of a busy client may be on its way.
pub(super) const MIN_IDLE: Duration = Duration::from_secs(1);

/// It counts among those that are open.
const HAS_PLACE: u8 = 0;
/// Another connection has its place, and it is to end.
const IS_SHED: u8 = 1;
/// It has ended.
const HAS_GONE: u8 = 2;

/// An instant as a number that is never 0.
fn clock(instant: Instant) -> u64 {
    static BASE: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = instant.saturating_duration_since(*BASE).as_micros();
    u64::try_from(since).unwrap_or(u64::MAX - 1) + 1
}

// === impl ConnectionState ===

impl fmt::Debug for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionState").field("active", &self.active).finish_non_exhaustive()
    }
}

impl ConnectionState {
    /// A request of HTTP/2 begins: until the guard is [answered](Early::answered), its client has not waited for it.
    pub(super) fn early(self: &Arc<Self>) -> Early {
        Early { state: Some(self.clone()), since: Instant::now() }
    }

    /// The client reset a request that had begun at `since`.
    pub fn reset(&self, since: Instant) {
        if since.elapsed() < RAPID {
            self.rapid_resets.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether the client begins requests mainly to reset them, and has done so with more than `most`.
    pub(super) fn is_reset_rapidly(&self, most: u32) -> bool {
        let resets = self.rapid_resets.load(Ordering::Relaxed);
        resets > most && resets > self.begun() / 2
    }

    /// Nothing has been under way since `since`: from now on it may be asked to end, until a request begins.
    pub(super) fn idles(&self, since: Instant) {
        self.idle_since.store(clock(since), Ordering::Relaxed);
    }

    /// A request is coming in.
    pub(super) fn is_busy(&self) {
        self.idle_since.store(0, Ordering::Relaxed);
    }

    /// Since when it is idle, in µs; `None` while a request is under way, and once another connection has its place.
    pub(super) fn idle_since(&self) -> Option<u64> {
        let has_place = self.place.load(Ordering::SeqCst) == HAS_PLACE;
        Some(self.idle_since.load(Ordering::Relaxed)).filter(|since| *since > 0 && has_place)
    }

    /// Since when it has been idle, if for [`MIN_IDLE`] by `now`.
    pub(super) fn long_idle_since(&self, now: Instant) -> Option<u64> {
        let min_idle = u64::try_from(MIN_IDLE.as_micros()).unwrap_or(u64::MAX);
        self.idle_since().filter(|since| clock(now).saturating_sub(*since) >= min_idle)
    }

    /// Has it end for another connection, if it is still idle since `since`. A request that begins meanwhile is answered.
    pub(super) fn shed(&self, since: u64) -> bool {
        let is_shed = self.idle_since() == Some(since)
            && self.place.compare_exchange(HAS_PLACE, IS_SHED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if is_shed {
            self.close();
        }
        is_shed
    }

    /// It has ended. Whether another connection had its place by then.
    pub(super) fn has_gone(&self) -> bool {
        self.place.swap(HAS_GONE, Ordering::SeqCst) == IS_SHED
    }

    /// Has it end in order: at once if it is idle, else with what is under way.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.task.wake();
    }

    /// Whether it is to end.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Waits until it is to end. Only for the task that serves it.
    pub(super) async fn closing(&self) {
        std::future::poll_fn(|cx: &mut Context<'_>| {
            self.task.register(cx.waker());
            if self.is_closing() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// How long it stays open between requests, which its answers say over HTTP/1.1.
    pub(super) fn stays_open_for(&self, idle: Duration) {
        self.keep_alive_s.store(u32::try_from(idle.as_secs()).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// Seconds between requests for which it stays open, if it does.
    pub(super) fn keep_alive_s(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.keep_alive_s.load(Ordering::Relaxed)).filter(|_| !self.is_closing())
    }

    /// A request begins.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        self.is_busy();
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.active.fetch_add(1, Ordering::Relaxed);
        UnderWay { connection: self.clone(), memory: None }
    }

    /// The answer that goes out next is the last one: then this is run, by the connection's own task.
    pub fn then(&self, next: impl Future<Output = ()> + Send + 'static) {
        self.leaves_http.store(true, Ordering::Relaxed);
        *self.next.lock() = Some(Box::pin(next));
    }

    /// What is to be run after HTTP, if anything. It has an account of a request, by which it holds on to this: so it
    /// must be taken out in the end, be it to drop it.
    pub fn take_next(&self) -> Option<Next> {
        self.next.lock().take()
    }

    /// Whether a request is under way.
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed) > 0
    }

    /// The client stopped reading.
    pub(super) fn stalls(&self) {
        self.stalled.store(true, Ordering::Relaxed);
    }

    /// Whether answers of model servers go out over it. Stays true: over HTTP/1, the next request may begin while the end of such
    /// an answer waits to be read.
    pub(super) fn relays(&self) -> bool {
        self.relays.load(Ordering::Relaxed)
    }

    /// Whether something comes after HTTP.
    pub(super) fn leaves_http(&self) -> bool {
        self.leaves_http.load(Ordering::Relaxed)
    }

    /// How many requests have begun.
    pub(super) fn begun(&self) -> u32 {
        self.begun.load(Ordering::Relaxed)
    }
}

impl Early {
    /// It has been answered, or as much of it as there is a limit for.
    pub(super) fn answered(mut self) {
        self.state = None;
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        if let Some(state) = &self.state {
            state.reset(self.since);
        }
    }
}

impl UnderWay {
    /// Counts the memory of the request until it has ended.
    pub(super) fn keep(&mut self, memory: Option<RequestShare>) {
        self.memory = memory;
    }

    /// Its answer, which had begun, was given up by the client; the request came at `since`.
    pub fn given_up(&self, since: Instant) {
        self.connection.reset(since);
    }

    /// Its answer comes from a model server.
    pub(super) fn relays(&self) {
        self.connection.relays.store(true, Ordering::Relaxed);
    }

    /// Whether the client stopped reading.
    pub fn is_stalled(&self) -> bool {
        self.connection.stalled.load(Ordering::Relaxed)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.connection.active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn resets_count_while_they_dominate_a_connection() {
        let state = Arc::new(ConnectionState::default());
        let begins = || (state.begin(), state.early());
        // Answered, whether or not in a hurry.
        for _ in 0..10 {
            let (_under_way, early) = begins();
            early.answered();
        }
        // Given up after a second: a client that has waited.
        for _ in 0..100 {
            let (_under_way, _early) = begins();
            advance(Duration::from_secs(1)).await;
        }
        assert!(!state.is_reset_rapidly(0));
        // Before that: 110 had begun, so that the 111th makes 111 of 221.
        for count in 1..=111 {
            assert!(!state.is_reset_rapidly(10), "{count}");
            drop(begins());
        }
        assert!(state.is_reset_rapidly(110));
        assert!(!state.is_reset_rapidly(111));
        // One whose answer had begun counts as well.
        let begun = Instant::now();
        state.begin().given_up(begun);
        assert!(state.is_reset_rapidly(111));
    }
}
