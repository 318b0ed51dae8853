//! Logs, metrics and traces.

mod counters;
mod histogram;
mod log_limit;
mod log_queue;
mod logs;
mod pulse;
pub mod traces;

pub use counters::{HoldEnd, RouteCounters, STATUS_CODES, StaticKind, status_slot};
pub use histogram::{BUCKETS, Histogram, HistogramSnapshot, TraceLabel, exemplar};
pub use log_limit::ACCESS_TARGET;
pub use log_queue::LogGuard;
pub use logs::{dropped_log_lines, init_logs, limited_log_lines, report_missing_lines};
pub use pulse::Pulse;

use std::cell::Cell;

/// Number of counter sets per route, so that up to this many threads share none.
pub(crate) const COUNTER_SHARDS: usize = 32;

thread_local! {
    static SHARD: Cell<usize> = const { Cell::new(0) };
}

/// Assigns this thread a counter set. Set 0 is shared by all other threads.
pub fn count_as_worker(index: usize) {
    SHARD.set(1 + index % (COUNTER_SHARDS - 1));
}

fn shard() -> usize {
    SHARD.get()
}
