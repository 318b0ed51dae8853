//! Limits on slow clients: the length of one pause, and of many short ones at a minimum rate.

use std::time::Duration;

use tokio::time::Instant;

/// Limits on the pace of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaceLimit {
    /// Longest single pause.
    pub pause: Duration,
    /// Bytes that earn back one second of `pause`; 0: any byte earns back the whole pause.
    pub rate: usize,
}

/// Time budget of a client that is waited for repeatedly. Time counts only while waiting; bytes sent or read by the
/// client earn it back, up to one whole pause. So a client may pause that long at any time, and must keep the rate on
/// average.
#[derive(Debug)]
pub struct Pace {
    allowed: PaceLimit,
    left: Duration,
    since: Option<Instant>,
}

impl Pace {
    /// Creates a budget of one whole pause.
    pub const fn new(allowed: PaceLimit) -> Self {
        Self { allowed, left: allowed.pause, since: None }
    }

    /// Starts waiting, unless already waiting, and returns the deadline.
    pub fn start_waiting(&mut self) -> Instant {
        *self.since.get_or_insert_with(Instant::now) + self.left
    }

    /// Returns the time waited since the last progress.
    pub fn waited(&self) -> Duration {
        self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Returns the time that waiting has used up of one whole pause and bytes have not earned back.
    pub fn behind(&self) -> Duration {
        self.allowed.pause.saturating_sub(self.left.saturating_sub(self.waited()))
    }

    /// Stops waiting, and credits `bytes`.
    pub fn credit_bytes(&mut self, bytes: usize) {
        if let Some(since) = self.since.take() {
            self.left = self.left.saturating_sub(since.elapsed());
        }
        let earned = match (bytes, self.allowed.rate) {
            (0, _) => return,
            (_, 0) => self.allowed.pause,
            (bytes, rate) => Duration::from_nanos((bytes as u64).saturating_mul(1_000_000_000) / rate as u64),
        };
        self.left = self.left.saturating_add(earned).min(self.allowed.pause);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const ALLOWED: PaceLimit = PaceLimit { pause: Duration::from_secs(30), rate: 1000 };

    #[tokio::test(start_paused = true)]
    async fn pauses_add_up_and_bytes_earn_them_back() {
        let left = |pace: &mut Pace| pace.start_waiting().duration_since(Instant::now()).as_secs_f64();
        let mut pace = Pace::new(ALLOWED);
        assert_eq!(left(&mut pace), 30.0);
        advance(Duration::from_secs(20)).await;
        assert_eq!(left(&mut pace), 10.0);
        pace.credit_bytes(1);
        assert_eq!(left(&mut pace), 10.001);
        advance(Duration::from_secs(5)).await;
        pace.credit_bytes(2000);
        assert_eq!(left(&mut pace), 7.001);
        pace.credit_bytes(0);
        // Time without waiting does not count.
        advance(Duration::from_secs(100)).await;
        assert_eq!(left(&mut pace), 7.001);
        pace.credit_bytes(1 << 30);
        assert_eq!(left(&mut pace), 30.0, "no more than one pause can be saved up");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_only_the_longest_pause_counts() {
        let mut pace = Pace::new(PaceLimit { rate: 0, ..ALLOWED });
        for _ in 0..100 {
            assert_eq!(pace.start_waiting(), Instant::now() + ALLOWED.pause);
            advance(Duration::from_secs(29)).await;
            pace.credit_bytes(1);
        }
    }
}
