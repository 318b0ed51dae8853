//! Flag of a route without demand, which makes its next request an edge.

use crate::sync::atomic::{AtomicBool, Ordering};

/// Set after demand was read as false; cleared by the request that publishes an edge.
///
/// A request is counted, then reads the flag; a subscriber sets the flag, then reads the counts again. All four are
/// sequentially consistent, so at least one side sees the other. Otherwise demand could rise without an edge, and a
/// target at zero would not start.
#[derive(Debug)]
pub(crate) struct IdleFlag(AtomicBool);

// === impl IdleFlag ===

impl IdleFlag {
    /// Creates a flag.
    pub fn new(is_idle: bool) -> Self {
        Self(AtomicBool::new(is_idle))
    }

    /// Clears the flag, for a request that has been counted. Returns true for the first one since the flag was set, which
    /// must publish an edge. Costs one load while demand is true.
    pub fn clear(&self) -> bool {
        self.0.load(Ordering::SeqCst) && self.0.swap(false, Ordering::SeqCst)
    }

    /// Returns the result of `read`. If it is not active, sets the flag and reads again. Calls `publish` if a request
    /// was counted in between, as that request may have read the flag before it was set.
    pub fn observe<T>(
        &self,
        read: impl Fn() -> T,
        is_active: impl Fn(&T) -> bool,
        publish: impl FnOnce(),
    ) -> T {
        let first = read();
        if is_active(&first) {
            return first;
        }
        self.0.store(true, Ordering::SeqCst);
        let second = read();
        if is_active(&second) && self.clear() {
            publish();
        }
        second
    }
}
