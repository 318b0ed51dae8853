//! Wakes whoever shows the state of things when something of it has changed.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Beats when something that is shown has changed. While nobody looks, a beat costs one load; beats that nobody has
/// heard yet are one.
#[derive(Debug, Default)]
pub struct Pulse {
    watched: AtomicBool,
    beats: Notify,
}

// === impl Pulse ===

impl Pulse {
    /// Something has changed.
    pub fn beat(&self) {
        if self.watched.load(Ordering::Relaxed) {
            self.beats.notify_one();
        }
    }

    /// Whether beats are to be heard from now on.
    pub fn watch(&self, watched: bool) {
        self.watched.store(watched, Ordering::Relaxed);
    }

    /// Waits for a beat; one that came since the last time counts. For one listener. Cancel-safe.
    pub async fn heard(&self) {
        self.beats.notified().await;
    }
}
