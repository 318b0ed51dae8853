//! The end of a target's supervision.

use tokio_util::sync::CancellationToken;

/// Ends the supervision of a target in two stages.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// Send nothing more; let requests in flight finish.
    pub(super) drain: CancellationToken,
    /// Stop now. Implies `drain`.
    pub(super) kill: CancellationToken,
}

// === impl Shutdown ===

impl Default for Shutdown {
    fn default() -> Self {
        let kill = CancellationToken::new();
        Self { drain: kill.child_token(), kill }
    }
}

impl Shutdown {
    /// Sends nothing more to the target, and stops it when its requests have finished.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Stops the target now, whatever is in flight.
    pub fn kill(&self) {
        self.kill.cancel();
    }

    /// Returns a handle whose `drain` leaves the other targets alone.
    pub(super) fn for_one_target(&self) -> Self {
        Self { drain: self.drain.child_token(), kill: self.kill.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kill_drains_and_replacing_one_target_does_not() {
        let shutdown = Shutdown::default();
        let ours = shutdown.for_one_target();
        ours.drain();
        assert!(!shutdown.drain.is_cancelled());
        let ours = shutdown.for_one_target();
        shutdown.kill();
        assert!(shutdown.drain.is_cancelled() && ours.drain.is_cancelled() && ours.kill.is_cancelled());
    }
}
