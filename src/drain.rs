//! Stages of stopping, and the signals that start it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Stages of stopping. A later stage implies the earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// `/readyz` fails, and no new request is held at zero.
    pub unready: Arc<AtomicBool>,
    /// Listeners are closed, and connections close after their current requests.
    pub closing: CancellationToken,
    /// Remaining requests are cut off.
    pub cut: CancellationToken,
}

/// Durations of the stages.
#[derive(Clone, Copy, Debug)]
pub struct DrainTimes {
    /// From the signal until the listeners close.
    pub delay: Duration,
    /// From there until remaining requests are cut off.
    pub timeout: Duration,
}

/// The signal that was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM, as from an orchestrator whose load balancers need time to notice.
    Terminate,
    /// SIGINT, as from a terminal; skips `delay`.
    Interrupt,
}

/// Handlers of SIGTERM and SIGINT.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

// === impl DrainTimes ===

impl DrainTimes {
    /// Returns the time after which held requests fail: early enough that the error still reaches the client.
    pub fn held_request_timeout(&self) -> Duration {
        self.timeout - (self.timeout / 4).min(Duration::from_secs(2))
    }
}

// === impl Drain ===

impl Drain {
    /// Returns true once stopping has begun.
    pub fn is_unready(&self) -> bool {
        self.unready.load(Ordering::Relaxed)
    }
}

// === impl Signals ===

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// Returns an error if the operating system cannot install a handler.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) -> StopSignal {
        tokio::select! {
            // The order does not matter; `biased` saves the random choice.
            biased;
            _ = self.terminate.recv() => StopSignal::Terminate,
            _ = self.interrupt.recv() => StopSignal::Interrupt,
        }
    }
}
