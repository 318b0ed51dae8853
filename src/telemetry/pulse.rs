//! Wakes whoever shows the state of things when something of it has changed.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Beats when something that is shown has changed. While nobody looks, a beat costs one load; beats that nobody has
/// taken yet are one.
///
/// A beat comes after its change, and who takes it looks at the state afterwards, both in sequentially consistent order:
/// so a change is either seen or heard of.
#[derive(Debug, Default)]
pub struct Pulse {
    watched: AtomicBool,
    beaten: AtomicBool,
    wakes: Notify,
}

// === impl Pulse ===

impl Pulse {
    /// Something has changed.
    pub fn beat(&self) {
        if self.watched.load(Ordering::Relaxed) && !self.beaten.swap(true, Ordering::SeqCst) {
            self.wakes.notify_one();
        }
    }

    /// Whether beats are to be heard from now on.
    pub fn watch(&self, watched: bool) {
        self.watched.store(watched, Ordering::Relaxed);
    }

    /// Waits for a beat that has not been taken. For one listener. Cancel-safe.
    pub async fn heard(&self) {
        while !self.beaten.load(Ordering::SeqCst) {
            self.wakes.notified().await;
        }
    }

    /// Takes the beats until now, for who is about to look.
    pub fn take(&self) {
        self.beaten.swap(false, Ordering::SeqCst);
    }
}
