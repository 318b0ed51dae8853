//! Count of the requests in flight that are not demand.

use crate::sync::atomic::{AtomicU64, Ordering};

/// Quiet requests, begun and ended since the start.
///
/// One begins after it was counted as in flight, and ends before it no longer is. A reader takes `begun` first, then the
/// requests in flight, then `ended`: the difference has only quiet requests that were in flight all the while. A single
/// counter, read before or after, would include some that were not, and demand could be read as false during a request.
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

    /// Returns the requests in flight that are demand. A race counts quiet ones as well, and never leaves out others.
    pub fn subtract_from(&self, in_flight: impl FnOnce() -> u64) -> u64 {
        let begun = self.begun.load(Ordering::Acquire);
        let in_flight = in_flight();
        in_flight.saturating_sub(begun.saturating_sub(self.ended.load(Ordering::Acquire)))
    }
}
