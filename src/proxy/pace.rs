//! How slow a client may be: how long it may pause, and how much of that many short pauses use up.

use std::time::Duration;

use tokio::time::Instant;

/// What a client may take its time for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// For one pause.
    pub pause: Duration,
    /// How many bytes give one second of it back; 0: any byte gives all of it back.
    pub rate: usize,
}

/// A client that is waited for, again and again. Time counts only while we wait for it; what it brings (or takes)
/// gives time back, up to one whole pause. So it may pause for that long at any time, and on average manages the rate.
#[derive(Debug)]
pub struct Pace {
    allowed: Allowed,
    left: Duration,
    since: Option<Instant>,
}

impl Pace {
    /// With a whole pause left.
    pub const fn new(allowed: Allowed) -> Self {
        Self { allowed, left: allowed.pause, since: None }
    }

    /// It is waited for: until when?
    pub fn waits(&mut self) -> Instant {
        *self.since.get_or_insert_with(Instant::now) + self.left
    }

    /// How long it has been waited for, since it last moved.
    pub fn waited(&self) -> Duration {
        self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// How far it is behind: the time that waiting has used up of one whole pause, and that what it brought has not given back.
    pub fn behind(&self) -> Duration {
        self.allowed.pause.saturating_sub(self.left.saturating_sub(self.waited()))
    }

    /// It is not waited for any more, or brought something.
    pub fn moved(&mut self, bytes: usize) {
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

    const ALLOWED: Allowed = Allowed { pause: Duration::from_secs(30), rate: 1000 };

    #[tokio::test(start_paused = true)]
    async fn pauses_add_up_and_bytes_take_them_back() {
        let left = |pace: &mut Pace| pace.waits().duration_since(Instant::now()).as_secs_f64();
        let mut pace = Pace::new(ALLOWED);
        assert_eq!(left(&mut pace), 30.0);
        advance(Duration::from_secs(20)).await;
        assert_eq!(left(&mut pace), 10.0);
        pace.moved(1);
        assert_eq!(left(&mut pace), 10.001);
        advance(Duration::from_secs(5)).await;
        pace.moved(2000);
        assert_eq!(left(&mut pace), 7.001);
        pace.moved(0);
        // Nobody waits for it.
        advance(Duration::from_secs(100)).await;
        assert_eq!(left(&mut pace), 7.001);
        pace.moved(1 << 30);
        assert_eq!(left(&mut pace), 30.0, "no more than one pause can be saved up");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_only_the_longest_pause_counts() {
        let mut pace = Pace::new(Allowed { rate: 0, ..ALLOWED });
        for _ in 0..100 {
            assert_eq!(pace.waits(), Instant::now() + ALLOWED.pause);
            advance(Duration::from_secs(29)).await;
            pace.moved(1);
        }
    }
}
