//! How we stop: what is told to stop when, in one place.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The stages of stopping, each with its token. A later stage implies the earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Not ready any more: load balancers look elsewhere, and nothing new is held at zero.
    pub unready: Arc<AtomicBool>,
    /// Nothing is accepted any more, and connections end with the requests that are under way.
    pub closing: CancellationToken,
    /// What is still under way is cut off.
    pub cut: CancellationToken,
}

/// How long draining may take.
#[derive(Clone, Copy, Debug)]
pub struct DrainTimes {
    /// How long we accept new connections after the signal.
    pub delay: Duration,
    /// How long requests may take to finish from then on.
    pub timeout: Duration,
}

/// What asked us to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// SIGTERM: an orchestrator, with load balancers that need time to notice.
    Terminate,
    /// SIGINT: a person, who waits.
    Interrupt,
}

/// The signals that ask us to stop.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

// === impl DrainTimes ===

impl DrainTimes {
    /// When held requests have waited long enough: they need time to be told so.
    pub fn hold(&self) -> Duration {
        self.timeout - (self.timeout / 4).min(Duration::from_secs(2))
    }
}

// === impl Drain ===

impl Drain {
    /// Whether we are about to stop.
    pub fn is_unready(&self) -> bool {
        self.unready.load(Ordering::Relaxed)
    }
}

// === impl Signals ===

impl Signals {
    /// Takes the signals over from here on.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Request {
        tokio::select! {
            // Either will do.
            biased;
            _ = self.terminate.recv() => Request::Terminate,
            _ = self.interrupt.recv() => Request::Interrupt,
        }
    }
}
