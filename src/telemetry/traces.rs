//! Traces: spans of requests, exported over OTLP.
//!
//! A traced request collects its own spans and submits them together when it ends, as one push onto a bounded queue,
//! which fails when the queue is full. A request never waits for the collector.

mod context;
mod export;
pub mod names;
mod span;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

pub use context::{Context, Parent};
pub use export::{Export, TracesError};
use opentelemetry::InstrumentationScope;
use opentelemetry_sdk::trace::SpanData;
pub use span::{ClockAnchor, Span, SpanDirection};
use tokio::sync::mpsc;

/// Maximum number of ended requests queued for export. Together with [`SpanQueue::MAX_SPANS`] it bounds memory.
const MAX_QUEUED_REQUESTS: usize = 2048;

/// Queue for the spans of requests. Never blocks.
#[derive(Debug)]
pub struct SpanQueue {
    queue: mpsc::Sender<Vec<SpanData>>,
    counts: Arc<SpanCounts>,
    scope: InstrumentationScope,
    /// A trace is sampled if the upper 63 bits of the low half of its id are below this.
    threshold: u64,
}

/// Spans by outcome.
#[derive(Debug, Default)]
pub struct SpanCounts {
    exported: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

// === impl SpanQueue ===

impl SpanQueue {
    /// Maximum number of spans of one request; further ones are dropped and counted.
    pub const MAX_SPANS: usize = 128;

    /// Creates a queue for this share of the traces started here, and its receiver.
    pub(crate) fn new(ratio: f64) -> (Self, mpsc::Receiver<Vec<SpanData>>) {
        let (queue, spans) = mpsc::channel(MAX_QUEUED_REQUESTS);
        let scope = InstrumentationScope::builder("anteroom").with_version(env!("CARGO_PKG_VERSION")).build();
        // A ratio of 1 must cover the whole range.
        let threshold = (ratio * (1_u64 << 63) as f64) as u64;
        (Self { queue, counts: Arc::default(), scope, threshold }, spans)
    }

    /// Returns whether a trace started here is sampled: decided by its id, so that all services with the same ratio
    /// agree.
    pub fn is_sampled(&self, trace_id: u128) -> bool {
        (trace_id as u64) >> 1 < self.threshold
    }

    /// Submits the spans of a request that has ended.
    pub fn submit(&self, context: &Context, clock: &ClockAnchor, spans: Vec<Span>, dropped: u64) {
        let spans: Vec<_> = spans.into_iter().map(|span| span.data(context, clock, &self.scope)).collect();
        let count = spans.len() as u64;
        let refused = if self.queue.try_send(spans).is_err() { count } else { 0 };
        if dropped + refused > 0 {
            self.counts.dropped.fetch_add(dropped + refused, Ordering::Relaxed);
        }
    }

    /// Returns the number of spans by outcome.
    pub const fn counts(&self) -> &Arc<SpanCounts> {
        &self.counts
    }
}

// === impl SpanCounts ===

impl SpanCounts {
    /// Returns the counts: `exported` were accepted by the collector, `failed` were not, `dropped` found no room in the
    /// queue.
    pub fn all(&self) -> [(&'static str, u64); 3] {
        [("exported", &self.exported), ("dropped", &self.dropped), ("failed", &self.failed)]
            .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_is_decided_by_the_id() {
        let sampled = |ratio: f64| {
            let (traces, _spans) = SpanQueue::new(ratio);
            let ids = [0, 1 << 63, u128::from(u64::MAX), u128::MAX, 1 << 64];
            ids.map(|id| traces.is_sampled(id))
        };
        assert_eq!(sampled(1.0), [true; 5]);
        assert_eq!(sampled(0.0), [false; 5]);
        assert_eq!(sampled(0.5), [true, false, false, false, true], "by the lower half alone");
        let (traces, _spans) = SpanQueue::new(0.25);
        let count = (0..4000).filter(|_| traces.is_sampled(fastrand::u128(..))).count();
        // The expected count is 1000 with a standard deviation of 27; the bounds are ten deviations away.
        assert!((730..=1270).contains(&count), "{count}");
    }

    #[tokio::test]
    async fn spans_beyond_the_queue_are_dropped_and_counted() {
        let (traces, spans) = SpanQueue::new(1.0);
        let (context, clock) = (Context::new(), ClockAnchor::now());
        let span = || Span::new("POST".into(), SpanDirection::Server, 0, tokio::time::Instant::now());
        for _ in 0..MAX_QUEUED_REQUESTS + 3 {
            traces.submit(&context, &clock, vec![span(), span()], 1);
        }
        let dropped = MAX_QUEUED_REQUESTS as u64 + 3 + 3 * 2;
        assert_eq!(traces.counts().all(), [("exported", 0), ("dropped", dropped), ("failed", 0)]);
        assert_eq!(spans.len(), MAX_QUEUED_REQUESTS);
    }
}
