//! Change notification for dashboards.

use tokio::sync::Notify;

use crate::sync::atomic::{AtomicBool, Ordering};

/// Notifies the renderer of changes. Costs one load while nothing is watched; notifications are coalesced.
///
/// [`Self::notify_change`] follows its change, and the renderer reads the state after [`Self::clear_pending`]. Both swap `pending`: either
/// `clear_pending` comes second and the renderer reads the change, or `notify_change` does and leaves it pending. A change at the same time
/// as [`Self::watch`] may be missed by both, and is rendered with the next tick.
#[derive(Debug, Default)]
pub struct Pulse {
    watched: AtomicBool,
    pending: AtomicBool,
    wakes: Notify,
}

// === impl Pulse ===

impl Pulse {
    /// Reports a change.
    pub fn notify_change(&self) {
        if self.watched.load(Ordering::Relaxed) && !self.pending.swap(true, Ordering::AcqRel) {
            self.wakes.notify_one();
        }
    }

    /// Enables or disables notifications.
    pub fn watch(&self, watched: bool) {
        self.watched.store(watched, Ordering::Relaxed);
    }

    /// Waits for a pending change. For a single listener. Cancel-safe.
    pub async fn await_change(&self) {
        while !self.pending.load(Ordering::Acquire) {
            self.wakes.notified().await;
        }
    }

    /// Clears pending changes; call before reading the state.
    pub fn clear_pending(&self) {
        self.pending.swap(false, Ordering::AcqRel);
    }
}
