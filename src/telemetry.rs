//! What we say about ourselves: logs, metrics and traces.

mod counters;
mod histogram;
mod log_limit;
mod log_queue;
mod logs;
mod pulse;
pub mod traces;

pub use counters::{HoldEnd, RouteCounters, STATUS_CODES, StaticKind, status_slot};
pub use histogram::{BUCKETS, Histogram, Summed, TraceLabel, exemplar};
pub use log_queue::LogGuard;
pub use logs::{dropped_log_lines, init_logs, limited_log_lines, report_missing_lines};
pub use pulse::Pulse;

use std::cell::Cell;

/// How many sets of counters a route has: threads that serve requests share none with each other, up to this many.
pub(crate) const SHARDS: usize = 32;

thread_local! {
    static SHARD: Cell<usize> = const { Cell::new(0) };
}

/// Makes this thread count in a set of its own. Set 0 is everyone else's.
pub fn count_as_worker(index: usize) {
    SHARD.set(1 + index % (SHARDS - 1));
}

fn shard() -> usize {
    SHARD.get()
}
