//! The end of a target's supervision.

use tokio_util::sync::CancellationToken;

/// Ends the supervision of a target in two stages.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// Send nothing more; let requests in flight finish.
    pub(super) drain: CancellationToken,
    /// Stop now. Implies `drain`.
    pub(super) kill: CancellationToken,
    /// The route is removed, rather than its target replaced. Implies `drain`.
    removed: CancellationToken,
}

// === impl Shutdown ===

impl Default for Shutdown {
    fn default() -> Self {
        let kill = CancellationToken::new();
        let drain = kill.child_token();
        Self { removed: drain.clone(), drain, kill }
    }
}

impl Shutdown {
    /// Sends nothing more to the target, and stops it when its requests have finished.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Stops the target now, without waiting for requests in flight.
    pub fn kill(&self) {
        self.kill.cancel();
    }

    /// Returns a handle for one target of the route: its `drain` does not drain the route's other targets.
    pub(super) fn for_one_target(&self) -> Self {
        Self { drain: self.drain.child_token(), kill: self.kill.clone(), removed: self.removed.clone() }
    }

    /// Returns why a draining target ends.
    pub(super) fn reason(&self) -> &'static str {
        match () {
            () if self.kill.is_cancelled() => "the proxy was stopped",
            () if self.removed.is_cancelled() => "the route was removed",
            () => "the target was replaced",
        }
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
        assert_eq!(ours.reason(), "the target was replaced");
        let removed = Shutdown::default();
        removed.drain();
        assert_eq!(removed.for_one_target().reason(), "the route was removed");
        let ours = shutdown.for_one_target();
        shutdown.kill();
        assert!(shutdown.drain.is_cancelled() && ours.drain.is_cancelled() && ours.kill.is_cancelled());
        assert_eq!((shutdown.reason(), ours.reason()), ("the proxy was stopped", "the proxy was stopped"));
    }
}
