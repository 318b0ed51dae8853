//! Count of the requests in flight that are not demand.

use crate::sync::atomic::{AtomicU64, Ordering};

/// Numbers of quiet requests begun and ended since the start of the process.
///
/// A quiet request is added to `begun` after it is counted as in flight, and to `ended` before that count drops. A
/// reader takes `begun` first, then the requests in flight, then `ended`: `begun` minus `ended` covers only quiet
/// requests that were in flight all the while. A single counter, read before or after, would include some that were
/// not, and demand could be read as false during a request.
#[derive(Debug, Default)]
pub(crate) struct QuietRequests {
    begun: AtomicU64,
    ended: AtomicU64,
}

// === impl QuietRequests ===

impl QuietRequests {
    /// Counts a quiet request that is in flight.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Release);
    }

    /// Records that a quiet request is about to end.
    pub fn end(&self) {
        self.ended.fetch_add(1, Ordering::Release);
    }

    /// Returns the number of requests in flight that are demand. In a race the number may include quiet requests, but
    /// never misses one that is demand.
    pub fn subtract_from(&self, in_flight: impl FnOnce() -> u64) -> u64 {
        let begun = self.begun.load(Ordering::Acquire);
        let in_flight = in_flight();
        in_flight.saturating_sub(begun.saturating_sub(self.ended.load(Ordering::Acquire)))
    }
}
