//! What a connection and the requests on it tell each other.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// What the connection and the requests on it tell each other. All on one thread, so ordering is of no matter.
#[derive(Default)]
pub struct ConnectionState {
    /// Requests that have begun.
    begun: AtomicU32,
    /// Those of them whose answer is not finished.
    active: AtomicU32,
    /// Those that HTTP/2's client reset soon after they had begun.
    rapid_resets: AtomicU32,
    /// The client stopped reading.
    stalled: AtomicBool,
    /// What comes after HTTP, if its last answer says that something does.
    next: Mutex<Option<Next>>,
    /// That something does.
    leaves_http: AtomicBool,
}

/// What a connection does after HTTP.
pub type Next = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A request is under way on the connection, until this is dropped.
#[derive(Debug)]
pub struct UnderWay(Arc<ConnectionState>);

/// A request of HTTP/2 before its answer begins.
#[derive(Debug)]
pub(super) struct Early {
    state: Option<Arc<ConnectionState>>,
    since: Instant,
}

/// A request that is reset sooner than that was hardly meant to be answered.
const RAPID: Duration = Duration::from_secs(1);

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

    /// A request begins.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.active.fetch_add(1, Ordering::Relaxed);
        UnderWay(self.clone())
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
    /// Its answer, which had begun, was given up by the client; the request came at `since`.
    pub fn given_up(&self, since: Instant) {
        self.0.reset(since);
    }

    /// Whether the client stopped reading.
    pub fn is_stalled(&self) -> bool {
        self.0.stalled.load(Ordering::Relaxed)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn resets_in_a_hurry_count_while_they_are_most_of_a_connection() {
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
