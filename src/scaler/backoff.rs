//! How long a target that fails is left alone.

use std::time::Duration;

use tokio::time::Instant;

/// 1 s, doubling to 60 s with each failure in a row.
///
/// A failure is a start that does not get ready, or a server that dies within [`Backoff::STABLE`] of being ready. Any
/// other end of a server that got ready ends the row: it was stopped, or it lived long enough.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

// === impl Backoff ===

impl Backoff {
    const FIRST: Duration = Duration::from_secs(1);
    const MAX: Duration = Duration::from_secs(60);
    /// How long a server must serve for its end to be no failed start.
    pub(super) const STABLE: Duration = Duration::from_secs(10);

    /// One more failure, now. Says how long to wait.
    pub(super) fn failed(&mut self) -> Duration {
        let wait = Self::MAX.min(Self::FIRST * 2_u32.saturating_pow(self.failures));
        self.failures = self.failures.saturating_add(1);
        self.until = Some(Instant::now() + wait);
        wait
    }

    /// It worked.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Until when to wait.
    pub(super) const fn until(&self) -> Option<Instant> {
        self.until
    }

    /// The waiting is over; the row of failures is not.
    pub(super) const fn elapsed(&mut self) {
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_wait_doubles_from_one_second_to_a_minute_and_starts_over_when_it_worked() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.until(), None);
        let waits: Vec<_> = (0..8).map(|_| backoff.failed().as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff.until(), Some(Instant::now() + Duration::from_secs(60)));
        backoff.elapsed();
        assert_eq!((backoff.until(), backoff.failed().as_secs()), (None, 60), "having waited is no success");
        backoff.reset();
        assert_eq!(backoff.failed().as_secs(), 1);
        backoff.failures = u32::MAX;
        assert_eq!(backoff.failed().as_secs(), 60, "no overflow");
    }
}
