//! Streams that are under way, and when each of them is to have its next event.

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::clock::Instant;
use crate::generator::tally::{histogram, nanos};

/// All open streams of the backend.
#[derive(Debug)]
pub(crate) struct Streams {
    /// Connections that have one.
    pub(crate) open: Vec<usize>,
    /// Events written.
    pub(crate) sent: u64,
    /// How long after they were due events were written: what the load test itself adds.
    pub(crate) late: Histogram<u64>,
    /// In the order in which they are due: all have the same period, so whoever had its event goes to the end.
    due: VecDeque<(Instant, usize)>,
    period: Duration,
}

// === impl Streams ===

impl Streams {
    pub(crate) fn new() -> Self {
        Self { open: Vec::new(), sent: 0, late: histogram(), due: VecDeque::new(), period: Duration::ZERO }
    }

    /// From `start` on, every open stream has an event in every `period`, each at a moment of its own.
    pub(crate) fn pace(&mut self, start: Instant, period: Duration) {
        self.period = period;
        self.late.reset();
        let count = u32::try_from(self.open.len()).unwrap_or(u32::MAX).max(1);
        self.due = (0_u32..)
            .zip(&self.open)
            .map(|(at, key)| (start + period.mul_f64(f64::from(at) / f64::from(count)), *key))
            .collect();
    }

    /// No further events but those that are asked for.
    pub(crate) fn hold(&mut self) {
        self.due.clear();
    }

    pub(crate) fn is_paced(&self) -> bool {
        !self.due.is_empty()
    }

    /// Whose event is due, if there is one.
    pub(crate) fn due(&mut self, now: Instant) -> Option<usize> {
        let (due, key) = *self.due.front()?;
        if due > now {
            return None;
        }
        self.due.pop_front();
        self.due.push_back((due + self.period, key));
        self.late.saturating_record(nanos(now - due));
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_take_turns_evenly_and_keep_their_phase() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut streams = Streams::new();
        streams.open = vec![5, 6, 7, 8];
        streams.pace(start, Duration::from_millis(100));
        assert_eq!((streams.due(at(0)), streams.due(at(24))), (Some(5), None));
        assert_eq!((streams.due(at(25)), streams.due(at(49))), (Some(6), None));
        // Late by 40 ms, and still due at 125 ms next.
        assert_eq!((streams.due(at(90)), streams.due(at(90)), streams.due(at(90))), (Some(7), Some(8), None));
        assert_eq!(
            (streams.due(at(100)), streams.due(at(124)), streams.due(at(125))),
            (Some(5), None, Some(6))
        );
        assert!(streams.late.max() >= 39_000_000, "{}", streams.late.max());
        streams.hold();
        assert_eq!(streams.due(at(10_000)), None);
    }
}
