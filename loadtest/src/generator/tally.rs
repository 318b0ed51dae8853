//! Results of the clients of a measurement.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Errors after which a measurement is abandoned: a contender that is down returns errors at full speed.
const MAX_TALLY_ERRORS: u64 = 100;

/// Responses since the last reset, errors since the start.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) latency: Histogram<u64>,
    pub(crate) completed: u64,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
}

// === impl Tally ===

impl Tally {
    pub(crate) fn new() -> Self {
        Self { latency: histogram(), completed: 0, errors: 0, first_error: None }
    }

    pub(crate) fn answer(&mut self, latency: Duration) {
        self.completed += 1;
        self.latency.saturating_record(nanos(latency));
    }

    pub(crate) fn fail(&mut self, why: String) {
        self.errors += 1;
        self.first_error.get_or_insert(why);
    }

    pub(crate) fn is_unrecoverable(&self) -> bool {
        self.errors >= MAX_TALLY_ERRORS
    }

    /// Discards the responses of the warm-up, but none of its errors.
    pub(crate) fn reset(&mut self) {
        self.latency.reset();
        self.completed = 0;
    }
}

/// Creates a histogram of nanoseconds up to a minute, with three significant digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("valid bounds")
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}
