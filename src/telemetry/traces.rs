//! Traces: what becomes of one request, as spans, exported with OTLP.
//!
//! A request that is traced collects its spans by itself and hands them over, all at once, when it ends. That is one
//! push onto a bounded queue, or none when it is full: whatever the collector does, a request never waits for it.

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
pub use span::{Clock, Kind, Span};
use tokio::sync::mpsc;

/// How many ended requests may wait for being exported. With the most that one may have of spans it bounds the memory.
const QUEUE: usize = 2048;

/// Where requests hand their spans over. None of it waits.
#[derive(Debug)]
pub struct Traces {
    queue: mpsc::Sender<Vec<SpanData>>,
    counts: Arc<SpanCounts>,
    scope: InstrumentationScope,
    /// A trace is exported if the lower half of its id, halved, is less.
    threshold: u64,
}

/// What became of spans.
#[derive(Debug, Default)]
pub struct SpanCounts {
    exported: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

// === impl Traces ===

impl Traces {
    /// The most spans that one request may have; further ones are dropped and counted.
    pub const MAX_SPANS: usize = 128;

    /// Exports this share of the traces that begin here; what is handed over comes out of the second.
    pub(crate) fn new(ratio: f64) -> (Self, mpsc::Receiver<Vec<SpanData>>) {
        let (queue, spans) = mpsc::channel(QUEUE);
        let scope = InstrumentationScope::builder("anteroom").with_version(env!("CARGO_PKG_VERSION")).build();
        // The whole range for 1, so that nothing is lost to rounding.
        let threshold = (ratio * (1_u64 << 63) as f64) as u64;
        (Self { queue, counts: Arc::default(), scope, threshold }, spans)
    }

    /// Whether a trace that begins here is exported: by its id, so that everybody with the same ratio decides alike.
    pub fn is_sampled(&self, trace_id: u128) -> bool {
        (trace_id as u64) >> 1 < self.threshold
    }

    /// Takes the spans of a request that has ended. `parent` is what the trace went on from.
    pub fn submit(&self, context: &Context, clock: &Clock, spans: Vec<Span>, dropped: u64) {
        let spans: Vec<_> = spans.into_iter().map(|span| span.data(context, clock, &self.scope)).collect();
        let count = spans.len() as u64;
        let refused = if self.queue.try_send(spans).is_err() { count } else { 0 };
        if dropped + refused > 0 {
            self.counts.dropped.fetch_add(dropped + refused, Ordering::Relaxed);
        }
    }

    /// What became of spans so far.
    pub const fn counts(&self) -> &Arc<SpanCounts> {
        &self.counts
    }
}

// === impl SpanCounts ===

impl SpanCounts {
    /// By outcome: `exported` is what the collector took, `failed` what it did not, `dropped` what found no room here.
    pub fn all(&self) -> [(&'static str, u64); 3] {
        [("exported", &self.exported), ("dropped", &self.dropped), ("failed", &self.failed)]
            .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_decides_by_the_id() {
        let sampled = |ratio: f64| {
            let (traces, _spans) = Traces::new(ratio);
            let ids = [0, 1 << 63, u128::from(u64::MAX), u128::MAX, 1 << 64];
            ids.map(|id| traces.is_sampled(id))
        };
        assert_eq!(sampled(1.0), [true; 5]);
        assert_eq!(sampled(0.0), [false; 5]);
        assert_eq!(sampled(0.5), [true, false, false, false, true], "by the lower half alone");
        let (traces, _spans) = Traces::new(0.25);
        let count = (0..4000).filter(|_| traces.is_sampled(fastrand::u128(..))).count();
        // 1000 ± 27 (one standard deviation); ten of them is out of the question.
        assert!((730..=1270).contains(&count), "{count}");
    }

    #[tokio::test]
    async fn what_finds_no_room_is_dropped_and_counted() {
        let (traces, spans) = Traces::new(1.0);
        let (context, clock) = (Context::new(), Clock::now());
        let span = || Span::new("POST".into(), Kind::Server, 0, tokio::time::Instant::now());
        for _ in 0..QUEUE + 3 {
            traces.submit(&context, &clock, vec![span(), span()], 1);
        }
        let dropped = QUEUE as u64 + 3 + 3 * 2;
        assert_eq!(traces.counts().all(), [("exported", 0), ("dropped", dropped), ("failed", 0)]);
        assert_eq!(spans.len(), QUEUE);
    }
}
