//! Slots of an endpoint: its requests in flight, and the flag that admits them.

use tokio::sync::Notify;

use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Requests in flight on an endpoint, and whether it accepts more.
///
/// Closing clears `is_open`, then reads `in_flight`; taking or returning a slot changes `in_flight`, then reads `is_open`.
/// All four are sequentially consistent, so at least one side sees the other. Otherwise a request could be dispatched to
/// an endpoint that its owner has found vacant and removed, or the owner could wait forever for a last request that has
/// ended.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    is_open: AtomicBool,
    in_flight: AtomicU32,
    /// Wakes the owner of the endpoint.
    attention: Notify,
}

// === impl Slots ===

impl Slots {
    /// Starts accepting requests.
    pub fn open(&self) {
        self.is_open.store(true, Ordering::SeqCst);
    }

    /// Stops accepting requests. [`Self::attention`] wakes when the last one in flight has ended.
    pub fn close(&self) {
        self.is_open.store(false, Ordering::SeqCst);
    }

    /// Returns whether requests are accepted.
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::SeqCst)
    }

    /// Returns the number of requests in flight.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Takes a slot, which must be freed with [`Self::release`], if requests are accepted and fewer than `limit` are in
    /// flight.
    pub fn acquire(&self, limit: impl Fn() -> u32) -> bool {
        let mut in_flight = self.in_flight();
        while in_flight < limit() && self.is_open() {
            match self.in_flight.compare_exchange_weak(
                in_flight,
                in_flight + 1,
                Ordering::SeqCst,
                Ordering::SeqCst,
            ) {
                Ok(_) if self.is_open() => return true,
                Ok(_) => {
                    self.release();
                    return false;
                }
                Err(now) => in_flight = now,
            }
        }
        false
    }

    /// Frees a slot.
    pub fn release(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && !self.is_open() {
            self.attention.notify_one();
        }
    }

    /// Wakes the owner.
    pub fn notify(&self) {
        self.attention.notify_one();
    }

    /// Waits for [`Self::notify`], or for the end of the last request while none are accepted. Cancel-safe.
    pub async fn attention(&self) {
        self.attention.notified().await;
    }
}
