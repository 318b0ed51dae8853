//! Exponential backoff.

use std::time::Duration;

/// Exponential backoff: `min`, doubling to `max` with each consecutive failure.
///
/// With jitter, each wait is up to 20 % shorter or longer, so that replicas that failed together do not retry
/// together. Reconnects to peers and watches of the API server use jitter. Other backoffs do not need it: starts of
/// processes and dispatches to endpoints are local to a replica, and clients get the time of the next start; writes
/// of scales and statuses are conditional, so that only one replica's write succeeds.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
    jitter: Option<fastrand::Rng>,
}

// === impl Backoff ===

impl Backoff {
    /// Creates a backoff without jitter.
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, failures: 0, jitter: None }
    }

    /// Adds jitter; equal seeds give equal waits.
    #[must_use]
    pub fn with_jitter(self, seed: u64) -> Self {
        Self { jitter: Some(fastrand::Rng::with_seed(seed)), ..self }
    }

    /// Counts a failure and returns the wait before the next attempt.
    pub fn failed(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let wait = self.after(self.failures);
        self.jitter.as_mut().map_or(wait, |random| wait.mul_f64(0.8 + 0.4 * random.f64()))
    }

    /// Resets the count after a success.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }

    /// Returns the wait after this number of consecutive failures, without jitter; zero without any.
    pub fn after(&self, failures: u32) -> Duration {
        match failures {
            0 => Duration::ZERO,
            _ => self.max.min(self.min.saturating_mul(2_u32.saturating_pow(failures - 1))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF_TO_ONE_MINUTE: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

    #[test]
    fn wait_doubles_to_the_maximum_until_reset() {
        let mut backoff = BACKOFF_TO_ONE_MINUTE;
        let waits: Vec<_> = (0..8).map(|_| backoff.failed().as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        backoff.reset();
        assert_eq!(backoff.failed().as_secs(), 1);
        assert_eq!(backoff.after(0), Duration::ZERO);
        assert_eq!(backoff.after(u32::MAX).as_secs(), 60, "no overflow");
    }

    #[test]
    fn jitter_is_a_fifth_and_follows_from_the_seed() {
        let (mut one, mut same) =
            (BACKOFF_TO_ONE_MINUTE.with_jitter(7), BACKOFF_TO_ONE_MINUTE.with_jitter(7));
        for failures in 1..100 {
            let (wait, exact) = (one.failed(), BACKOFF_TO_ONE_MINUTE.after(failures));
            assert!((exact.mul_f64(0.8)..=exact.mul_f64(1.2)).contains(&wait), "{wait:?} of {exact:?}");
            assert_eq!(wait, same.failed());
        }
    }
}
