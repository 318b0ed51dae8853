//! Lock-free histogram: buckets are atomic counters, one set per worker thread.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

/// Label of an exemplar: the trace it is from.
pub type TraceLabel = Vec<(&'static str, String)>;

/// Upper bounds in seconds. The largest equals the default `readiness.activationTimeout`.
pub const BUCKETS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
    900.0, 1200.0, 1800.0,
];

/// Histogram of durations with [`BUCKETS`].
#[derive(Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS.len()],
    beyond: AtomicU64,
    nanoseconds: AtomicU64,
}

/// Sum of histograms at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HistogramSnapshot {
    /// Total in seconds.
    pub sum: f64,
    /// Number of observations.
    pub count: u64,
    /// Upper bound and number of observations of each bucket, not cumulative.
    pub buckets: Vec<(f64, u64)>,
}

/// Creates an exemplar from a trace, timestamped now.
pub fn exemplar(trace_id: Option<String>) -> (Option<TraceLabel>, Option<SystemTime>) {
    let label = trace_id.map(|trace_id| vec![("trace_id", trace_id)]);
    let at = label.as_ref().map(|_| SystemTime::now());
    (label, at)
}

impl Histogram {
    /// Records a duration.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound);
        bucket.map_or(&self.beyond, |index| &self.buckets[index]).fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Sums histograms.
    pub fn sum<'a>(all: impl IntoIterator<Item = &'a Self>) -> HistogramSnapshot {
        let bounds = BUCKETS.into_iter().chain([f64::MAX]);
        let mut summed = HistogramSnapshot {
            buckets: bounds.map(|bound| (bound, 0)).collect(),
            ..HistogramSnapshot::default()
        };
        for one in all {
            for ((_, count), bucket) in summed.buckets.iter_mut().zip(one.buckets.iter().chain([&one.beyond]))
            {
                *count += bucket.load(Ordering::Relaxed);
            }
            summed.sum += one.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9;
        }
        summed.count = summed.buckets.iter().map(|(_, count)| count).sum();
        summed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_falls_into_the_first_fitting_bucket() {
        let (a, b) = (Histogram::default(), Histogram::default());
        for ms in [1, 2, 1_800_000] {
            a.observe(Duration::from_millis(ms));
        }
        b.observe(Duration::from_secs(3600));
        let summed = Histogram::sum([&a, &b]);
        assert_eq!(summed.count, 4);
        assert_eq!(summed.sum, 0.001 + 0.002 + 1800.0 + 3600.0);
        let filled: Vec<_> = summed.buckets.into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(0.001, 1), (0.005, 1), (1800.0, 1), (f64::MAX, 1)]);
    }
}
