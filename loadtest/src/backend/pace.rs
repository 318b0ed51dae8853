//! Open streams of the backend and the schedule of their events.

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::clock::Instant;
use crate::generator::tally::{histogram, nanos};

/// All open streams of the backend.
#[derive(Debug)]
pub(crate) struct PacedStreams {
    /// Keys of the connections that carry a stream.
    pub(crate) open: Vec<usize>,
    /// Events written.
    pub(crate) sent: u64,
    /// Delay, in nanoseconds, between an event's due time and its write: the error added by the load test itself.
    pub(crate) late: Histogram<u64>,
    /// Next event of each stream, in order of time. All have the same period, so a stream whose event was written
    /// moves to the back.
    due: VecDeque<(Instant, usize)>,
    period: Duration,
}

// === impl PacedStreams ===

impl PacedStreams {
    pub(crate) fn new() -> Self {
        Self { open: Vec::new(), sent: 0, late: histogram(), due: VecDeque::new(), period: Duration::ZERO }
    }

    /// Schedules one event per `period` for every open stream from `start` on, evenly staggered.
    pub(crate) fn pace(&mut self, start: Instant, period: Duration) {
        self.period = period;
        self.late.reset();
        let count = u32::try_from(self.open.len()).unwrap_or(u32::MAX).max(1);
        self.due = (0_u32..)
            .zip(&self.open)
            .map(|(at, key)| (start + period.mul_f64(f64::from(at) / f64::from(count)), *key))
            .collect();
    }

    /// Stops the schedule; events are then written only on request.
    pub(crate) fn hold(&mut self) {
        self.due.clear();
    }

    pub(crate) fn is_paced(&self) -> bool {
        !self.due.is_empty()
    }

    /// Returns the key of a connection whose event is due.
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
        let mut streams = PacedStreams::new();
        streams.open = vec![5, 6, 7, 8];
        streams.pace(start, Duration::from_millis(100));
        assert_eq!((streams.due(at(0)), streams.due(at(24))), (Some(5), None));
        assert_eq!((streams.due(at(25)), streams.due(at(49))), (Some(6), None));
        // 40 ms late, yet the next event is due at 125 ms.
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
