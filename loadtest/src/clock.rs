//! Clock of the measurements.

use std::sync::LazyLock;
use std::time::Duration;

#[expect(clippy::disallowed_types, reason = "no tokio here, and real time is what is measured")]
pub(crate) type Instant = std::time::Instant;

static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Returns the nanoseconds since the first call, a timestamp that fits into a message.
pub(crate) fn stamp() -> u64 {
    u64::try_from(FIRST.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Returns the time from one stamp to a later one.
pub(crate) fn between(earlier: u64, later: u64) -> Duration {
    Duration::from_nanos(later.saturating_sub(earlier))
}
