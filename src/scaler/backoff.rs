//! Backoff between starts of a failing target.

use std::time::Duration;

use tokio::time::Instant;

/// Exponential backoff: 1 s, doubling to 60 s with each consecutive failure.
///
/// A failure is a start that does not become ready, or a server that exits within [`Backoff::STABLE_AFTER`] of being ready.
/// Any other end of a ready server resets the backoff.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

// === impl Backoff ===

impl Backoff {
    const FIRST: Duration = Duration::from_secs(1);
    const MAX: Duration = Duration::from_secs(60);
    /// Time for which a server must have served so that its exit does not count as a failure.
    pub(super) const STABLE_AFTER: Duration = Duration::from_secs(10);

    /// Counts a failure and returns the wait.
    pub(super) fn failed(&mut self) -> Duration {
        let wait = Self::MAX.min(Self::FIRST * 2_u32.saturating_pow(self.failures));
        self.failures = self.failures.saturating_add(1);
        self.until = Some(Instant::now() + wait);
        wait
    }

    /// Resets the backoff after a success.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Returns the end of the wait.
    pub(super) const fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Ends the wait, but keeps the count of failures.
    pub(super) const fn elapsed(&mut self) {
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn wait_doubles_to_a_minute_until_reset() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.until(), None);
        let waits: Vec<_> = (0..8).map(|_| backoff.failed().as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff.until(), Some(Instant::now() + Duration::from_secs(60)));
        backoff.elapsed();
        assert_eq!(
            (backoff.until(), backoff.failed().as_secs()),
            (None, 60),
            "the wait does not reset the count"
        );
        backoff.reset();
        assert_eq!(backoff.failed().as_secs(), 1);
        backoff.failures = u32::MAX;
        assert_eq!(backoff.failed().as_secs(), 60, "no overflow");
    }
}
