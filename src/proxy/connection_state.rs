//! State shared by a connection and its requests.

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

use super::{memory::RequestShare, stream_progress::StreamProgress};

/// State shared by a connection and its requests. These run on one thread, so memory ordering does not matter; other
/// threads only read the idle time and request the end.
#[derive(Default)]
pub struct ConnectionState {
    /// Start of the idle period, in µs since the first use of the clock; 0 while busy.
    idle_since: AtomicU64,
    /// The connection must end as soon as no request is affected.
    closing: AtomicBool,
    /// [`STATE_OPEN`], [`STATE_SHED`] or [`STATE_ENDED`].
    lifecycle_state: AtomicU8,
    /// Task that serves the connection.
    task: AtomicWaker,
    /// Idle timeout that responses announce, in seconds; 0 if none.
    keep_alive_s: AtomicU32,
    /// Requests begun.
    begun: AtomicU32,
    /// Of these, requests whose response is not finished.
    active: AtomicU32,
    /// Requests that the HTTP/2 client reset soon after they began.
    rapid_resets: AtomicU32,
    /// The client stopped reading.
    stalled: AtomicBool,
    /// A model server's response has been sent over the connection.
    relays: AtomicBool,
    /// Task to run after HTTP, once a response has switched protocols.
    pending_takeover: Mutex<Option<TakeoverTask>>,
    /// True once a takeover task has been set.
    leaves_http: AtomicBool,
}

/// Task that takes over a connection after HTTP.
pub type TakeoverTask = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Guard of a request under way on a connection.
#[derive(Debug)]
pub struct RequestGuard {
    connection: Arc<ConnectionState>,
    /// State of the request's stream; `None` over HTTP/1.
    stream: Option<Arc<StreamProgress>>,
    /// Memory of the request besides its body.
    memory: Option<RequestShare>,
}

/// HTTP/2 request before its response begins.
#[derive(Debug)]
pub(super) struct UnansweredRequest {
    state: Option<Arc<ConnectionState>>,
    since: Instant,
}

/// Age below which a reset counts as rapid: the client hardly wanted a response.
const RAPID_RESET_AGE: Duration = Duration::from_secs(1);

/// Minimum idle time before a connection may be closed for another one. The first request of a connection just accepted
/// may still be unread, and the next request of a busy client may be on its way.
pub(super) const MIN_IDLE: Duration = Duration::from_secs(1);

/// The connection counts as open.
const STATE_OPEN: u8 = 0;
/// The connection must end, and another one has its place.
const STATE_SHED: u8 = 1;
/// The connection has ended.
const STATE_ENDED: u8 = 2;

/// Converts an instant to µs, never 0.
fn clock_micros(instant: Instant) -> u64 {
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
    /// Begins an HTTP/2 request. Dropping the guard before [`UnansweredRequest::answered`] counts as a reset by the client.
    pub(super) fn begin_unanswered(self: &Arc<Self>) -> UnansweredRequest {
        UnansweredRequest { state: Some(self.clone()), since: Instant::now() }
    }

    /// Records that the client reset a request that began at `since`.
    pub fn reset(&self, since: Instant) {
        if since.elapsed() < RAPID_RESET_AGE {
            self.rapid_resets.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns `true` if the client has reset more than `most` requests rapidly, and more than half of all its
    /// requests.
    pub(super) fn is_reset_rapidly(&self, most: u32) -> bool {
        let resets = self.rapid_resets.load(Ordering::Relaxed);
        resets > most && resets > self.begun() / 2
    }

    /// Marks the connection as idle since `since`. It may be shed until a request begins.
    pub(super) fn mark_idle_since(&self, since: Instant) {
        self.idle_since.store(clock_micros(since), Ordering::Relaxed);
    }

    /// Marks the connection as busy, as a request is arriving.
    pub(super) fn mark_busy(&self) {
        self.idle_since.store(0, Ordering::Relaxed);
    }

    /// Returns the start of the idle period, in µs; `None` while a request is under way, and once the connection has
    /// been shed or has ended.
    pub(super) fn idle_since(&self) -> Option<u64> {
        let has_place = self.lifecycle_state.load(Ordering::SeqCst) == STATE_OPEN;
        Some(self.idle_since.load(Ordering::Relaxed)).filter(|since| *since > 0 && has_place)
    }

    /// Returns the start of the idle period if it is at least [`MIN_IDLE`] before `now`.
    pub(super) fn long_idle_since(&self, now: Instant) -> Option<u64> {
        let min_idle = u64::try_from(MIN_IDLE.as_micros()).unwrap_or(u64::MAX);
        self.idle_since().filter(|since| clock_micros(now).saturating_sub(*since) >= min_idle)
    }

    /// Sheds the connection for another one, if still idle since `since`. A request that begins meanwhile is answered.
    pub(super) fn shed(&self, since: u64) -> bool {
        let is_shed = self.idle_since() == Some(since)
            && self
                .lifecycle_state
                .compare_exchange(STATE_OPEN, STATE_SHED, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok();
        if is_shed {
            self.close();
        }
        is_shed
    }

    /// Marks the connection as ended. Returns `true` if it had been shed.
    pub(super) fn mark_ended(&self) -> bool {
        self.lifecycle_state.swap(STATE_ENDED, Ordering::SeqCst) == STATE_SHED
    }

    /// Closes the connection gracefully: at once if idle, else after the requests under way.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.task.wake();
    }

    /// Returns `true` if the connection must end.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Waits until the connection must end. Only for the task that serves it.
    pub(super) async fn closing(&self) {
        std::future::poll_fn(|cx: &mut Context<'_>| {
            self.register(cx);
            if self.is_closing() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Registers the task that serves the connection.
    pub(super) fn register(&self, cx: &Context<'_>) {
        self.task.register(cx.waker());
    }

    /// Sets the idle timeout, which responses announce over HTTP/1.1.
    pub(super) fn set_idle_timeout(&self, idle: Duration) {
        self.keep_alive_s.store(u32::try_from(idle.as_secs()).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// Returns the idle timeout to announce, in seconds; `None` if the connection must end.
    pub(super) fn keep_alive_s(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.keep_alive_s.load(Ordering::Relaxed)).filter(|_| !self.is_closing())
    }

    /// Begins a request.
    pub fn begin(self: &Arc<Self>) -> RequestGuard {
        self.mark_busy();
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.active.fetch_add(1, Ordering::Relaxed);
        RequestGuard { connection: self.clone(), stream: None, memory: None }
    }

    /// Sets the task to run after the next response, the last one over HTTP. The connection's own task runs it.
    pub fn set_takeover(&self, next: impl Future<Output = ()> + Send + 'static) {
        self.leaves_http.store(true, Ordering::Relaxed);
        *self.pending_takeover.lock() = Some(Box::pin(next));
    }

    /// Takes the task to run after HTTP. Always take it, even to drop it: it holds an `Arc` cycle.
    pub fn take_takeover(&self) -> Option<TakeoverTask> {
        self.pending_takeover.lock().take()
    }

    /// Returns `true` if a request is under way.
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed) > 0
    }

    /// Records that the client stopped reading.
    pub(super) fn record_stall(&self) {
        self.stalled.store(true, Ordering::Relaxed);
    }

    /// Ends the connection at once, as the client stopped reading.
    pub(super) fn break_off(&self) {
        self.record_stall();
        self.task.wake();
    }

    /// Returns `true` if the client stopped reading.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Returns `true` if responses of model servers are sent over the connection. Never resets: over HTTP/1, the next
    /// request may begin while the end of such a response is still unread.
    pub(super) fn relays(&self) -> bool {
        self.relays.load(Ordering::Relaxed)
    }

    /// Returns `true` if another protocol follows HTTP.
    pub(super) fn leaves_http(&self) -> bool {
        self.leaves_http.load(Ordering::Relaxed)
    }

    /// Returns the number of requests begun.
    pub(super) fn begun(&self) -> u32 {
        self.begun.load(Ordering::Relaxed)
    }
}

impl UnansweredRequest {
    /// Marks the request as answered, so that the drop does not count as a reset.
    pub(super) fn answered(mut self) {
        self.state = None;
    }
}

impl Drop for UnansweredRequest {
    fn drop(&mut self) {
        if let Some(state) = &self.state {
            state.reset(self.since);
        }
    }
}

impl RequestGuard {
    /// Sets the HTTP/2 stream of the request.
    pub(super) fn on_stream(mut self, stream: Option<Arc<StreamProgress>>) -> Self {
        self.stream = stream;
        self
    }

    /// Counts the memory of the request until it ends.
    pub(super) fn hold_memory(&mut self, memory: Option<RequestShare>) {
        self.memory = memory;
    }

    /// Records that the client aborted a response that had begun. `since`: arrival of the request.
    pub fn record_client_abort(&self, since: Instant) {
        self.connection.reset(since);
    }

    /// Records that the response comes from a model server.
    pub(super) fn relays(&self) {
        self.connection.relays.store(true, Ordering::Relaxed);
    }

    /// Returns `true` if the client stopped reading.
    pub fn is_stalled(&self) -> bool {
        self.connection.is_stalled() || self.stream.as_ref().is_some_and(|stream| stream.is_stalled())
    }
}

impl Drop for RequestGuard {
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
        let begins = || (state.begin(), state.begin_unanswered());
        // Answered, however fast.
        for _ in 0..10 {
            let (_under_way, early) = begins();
            early.answered();
        }
        // Aborted after a second: the client has waited.
        for _ in 0..100 {
            let (_under_way, _early) = begins();
            advance(Duration::from_secs(1)).await;
        }
        assert!(!state.is_reset_rapidly(0));
        // 110 have begun before, so that the 111th reset makes 111 of 221.
        for count in 1..=111 {
            assert!(!state.is_reset_rapidly(10), "{count}");
            drop(begins());
        }
        assert!(state.is_reset_rapidly(110));
        assert!(!state.is_reset_rapidly(111));
        // A request whose response had begun counts as well.
        let begun = Instant::now();
        state.begin().record_client_abort(begun);
        assert!(state.is_reset_rapidly(111));
    }
}
