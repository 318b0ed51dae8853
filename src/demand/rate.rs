//! Requests per second over a sliding window, from samples of a counter.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// Samples of a monotonic counter, taken off the request path.
#[derive(Debug, Default)]
pub struct Rate {
    /// Oldest first; all but the first are younger than the window.
    samples: VecDeque<(Instant, u64)>,
}

// === impl Rate ===

impl Rate {
    /// Samples in a window: one more or less changes the rate by less than 2 %.
    const SAMPLES_PER_WINDOW: u32 = 60;

    /// Adds a sample, unless the last one is younger than a 60th of the window.
    pub fn sample(&mut self, now: Instant, count: u64, window: Duration) {
        let due =
            self.samples.back().is_none_or(|(last, _)| now - *last >= window / Self::SAMPLES_PER_WINDOW);
        if due {
            self.samples.push_back((now, count));
        }
        // Keeps the youngest sample that is at least as old as the window, as the start of the rate.
        while self.samples.get(1).is_some_and(|(time, _)| now - *time >= window) {
            self.samples.pop_front();
        }
        // The window was shortened by a reload.
        while self.samples.len() > Self::SAMPLES_PER_WINDOW as usize + 2 {
            self.samples.pop_front();
        }
    }

    /// Returns the rate up to `count`. Until the first window has passed, its whole length is the divisor, so that a
    /// burst at the start does not count as a high rate.
    pub fn per_second(&self, now: Instant, count: u64, window: Duration) -> f64 {
        let Some((since, before)) = self.samples.front() else { return 0.0 };
        let span = (now - *since).max(window).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 requests")]
        let risen = count.saturating_sub(*before) as f64;
        if span > 0.0 { risen / span } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE_WINDOW: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn rate_covers_the_last_window() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let at = |second: u64| start + Duration::from_secs(second);
        assert_eq!(rate.per_second(start, 0, RATE_WINDOW), 0.0);
        // 3 a second for two minutes.
        for second in 0..=120 {
            rate.sample(at(second), 3 * second, RATE_WINDOW);
            if second == 30 {
                assert_eq!(rate.per_second(at(30), 90, RATE_WINDOW), 1.5, "90 ÷ 60 s, after 30 s");
            }
        }
        assert_eq!(rate.per_second(at(120), 360, RATE_WINDOW), 3.0, "(360 - 180) ÷ 60");
        for second in 121..=150 {
            rate.sample(at(second), 360, RATE_WINDOW);
        }
        assert_eq!(rate.per_second(at(150), 360, RATE_WINDOW), 1.5, "(360 - 270) ÷ 60");
        for second in 151..=180 {
            rate.sample(at(second), 360, RATE_WINDOW);
        }
        assert_eq!(rate.per_second(at(180), 360, RATE_WINDOW), 0.0);
    }

    #[tokio::test(start_paused = true)]
    async fn samples_are_bounded_for_any_window() {
        let mut rate = Rate::default();
        let start = Instant::now();
        for second in 0..10_000 {
            rate.sample(start + Duration::from_secs(second), second, Duration::from_secs(86_400));
        }
        assert!(rate.samples.len() <= 62, "{}", rate.samples.len());
        let now = start + Duration::from_secs(10_000);
        for _ in 0..1000 {
            rate.sample(now, 0, Duration::from_millis(1));
        }
        assert!(rate.samples.len() <= 62, "{}", rate.samples.len());
    }
}
