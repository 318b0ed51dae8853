//! Statistical comparison of two runs. Pure functions.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::bench::{
    results::{CycleVerdict, Run},
    samples::{Metric, Sample},
    stats::{Bootstrap, fisher_exact, holm, mann_whitney, median, quantile},
};

/// Thresholds of a reported change.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Thresholds {
    /// Family-wise significance level.
    pub(super) alpha: f64,
    /// Minimum change, as a ratio of the median before.
    pub(super) threshold: f64,
    /// Minimum change in milliseconds.
    pub(super) floor_ms: f64,
}

/// Comparison of two runs. Serialized by `--json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Comparison {
    pub(super) schema: &'static str,
    pub(super) limits: Thresholds,
    pub(super) before: RunHeader,
    pub(super) after: RunHeader,
    /// Metrics of both runs, in order of time.
    pub(super) rows: Vec<MetricComparison>,
    /// Failed cycles, tested like a metric.
    pub(super) failures: FailureComparison,
    /// Metrics of only one run.
    pub(super) only_before: Vec<String>,
    pub(super) only_after: Vec<String>,
    /// Reasons to doubt the comparison.
    pub(super) warnings: Vec<String>,
    /// Set if a metric became slower or cold starts fail more often.
    pub(super) regression: bool,
    /// Set if there is no regression, but a slowdown of the smallest reported size would not have been significant.
    pub(super) inconclusive: Option<Inconclusive>,
}

/// Reason why a comparison cannot rule out a regression.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Inconclusive {
    /// Smallest slowdown that is reported, in milliseconds of `t_e2e`.
    pub(super) slowdown_ms: f64,
    /// Cycles per run with which that slowdown would be significant, given the spread of the run before; `None` if more
    /// than 100.
    pub(super) cycles_needed: Option<usize>,
}

/// Identification of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct RunHeader {
    pub(super) label: Option<String>,
    pub(super) started_at: String,
    pub(super) anteroom: String,
    pub(super) route: String,
    pub(super) counted: usize,
}

/// A metric in both runs; arrays are `[before, after]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct MetricComparison {
    pub(super) name: String,
    /// Number of cycles that have the metric.
    pub(super) n: [usize; 2],
    /// Medians over the cycles; client times enter with the median of each cycle.
    pub(super) median_ms: [f64; 2],
    /// Median after minus median before.
    pub(super) difference_ms: f64,
    /// 95 % bootstrap interval of `difference_ms`.
    pub(super) ci_ms: Option<[f64; 2]>,
    /// `difference_ms` in percent of the median before.
    pub(super) difference_percent: Option<f64>,
    /// p-value of the Mann–Whitney test.
    pub(super) p: f64,
    /// `p` with Holm's correction over all metrics and the failures.
    pub(super) p_corrected: f64,
    pub(super) change: DifferenceClass,
}

/// Failed cycles of both runs; arrays are `[before, after]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct FailureComparison {
    pub(super) failed: [u64; 2],
    /// Cycles that count as cold or failed.
    pub(super) of: [u64; 2],
    /// p-value of Fisher's exact test.
    pub(super) p: f64,
    pub(super) p_corrected: f64,
    pub(super) change: DifferenceClass,
}

/// Classification of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DifferenceClass {
    /// Not significant.
    Noise,
    /// Significant, but below the thresholds.
    Small,
    /// Slower, or more failures.
    Worse,
    /// Faster, or fewer failures.
    Better,
}

// === impl Comparison ===

impl Comparison {
    /// Compares two runs.
    ///
    /// # Errors
    /// If a run has no counted cycle. A run in which every cycle failed can be compared as `after`.
    pub(super) fn of(before: &Run, after: &Run, thresholds: Thresholds) -> Result<Self, String> {
        let counted = [before, after].map(|run| run.counted().count());
        if counted[0] == 0 {
            return Err("the run before has no valid cold start; repeat the measurement".to_owned());
        }
        let failures = FailureComparison::of(before, after);
        if counted[1] == 0 && failures.failed[1] == 0 {
            return Err("the run after has no valid cold start; repeat the measurement".to_owned());
        }
        let samples = [before, after].map(Sample::all);
        let mut rows: Vec<_> = samples[0]
            .iter()
            .filter_map(|sample| {
                let other = samples[1].iter().find(|other| other.metric == sample.metric)?;
                MetricComparison::of(sample, other)
            })
            .collect();
        let mut comparison = Self {
            schema: "anteroom.dev/bench-compare/v1",
            limits: thresholds,
            before: RunHeader::of(before, counted[0]),
            after: RunHeader::of(after, counted[1]),
            only_before: only(&samples[0], &samples[1]),
            only_after: only(&samples[1], &samples[0]),
            warnings: Vec::new(),
            regression: false,
            inconclusive: None,
            rows: Vec::new(),
            failures,
        };
        let all: Vec<_> = rows.iter().map(|row| row.p).chain([comparison.failures.p]).collect();
        let corrected = holm(&all);
        for (row, p) in rows.iter_mut().zip(&corrected) {
            row.p_corrected = *p;
            row.change = row.classify(thresholds);
        }
        let failures = &mut comparison.failures;
        failures.p_corrected = corrected.last().copied().unwrap_or(1.0);
        failures.change = failures.classify(thresholds, counted[1]);
        comparison.regression = failures.change == DifferenceClass::Worse
            || rows.iter().any(|row| row.change == DifferenceClass::Worse);
        comparison.rows = rows;
        let whole = samples[0].iter().find(|sample| sample.metric == Metric::EndToEnd).map(Sample::by_cycle);
        if let Some(whole) = whole.filter(|_| !comparison.regression) {
            comparison.inconclusive = Inconclusive::of(&whole, counted, thresholds, corrected.len());
        }
        comparison.warnings = warnings(before, after);
        Ok(comparison)
    }
}

fn only(these: &[Sample], those: &[Sample]) -> Vec<String> {
    let others: BTreeSet<Metric> = those.iter().map(|sample| sample.metric).collect();
    these
        .iter()
        .filter(|sample| !others.contains(&sample.metric))
        .map(|sample| sample.metric.name())
        .collect()
}

fn warnings(before: &Run, after: &Run) -> Vec<String> {
    let mut warnings = setting_differences(before, after);
    for (run, name) in [(before, "before"), (after, "after")] {
        let not_cold = run.cycles.iter().filter(|cycle| cycle.verdict == CycleVerdict::NotCold).count();
        if not_cold > 0 {
            warnings.push(format!("{not_cold} cycles of the run {name} were not cold and are ignored"));
        }
        if run.interrupted || run.aborted.is_some() {
            warnings.push(format!("the run {name} ended before all {} cycles", run.settings.cycles));
        }
    }
    warnings
}

/// Returns a warning for each setting in which the runs differ.
fn setting_differences(before: &Run, after: &Run) -> Vec<String> {
    let of = |run: &Run| {
        let settings = &run.settings;
        [
            ("route", run.route.clone()),
            ("burst", run.burst.to_string()),
            ("idle timeout", run.idle_s.map_or_else(|| "unknown".to_owned(), |idle| format!("{idle} s"))),
            ("target", settings.target.clone()),
            ("arrivals", settings.arrivals.clone()),
            ("endpoint", settings.endpoint.clone()),
            ("model", settings.model.clone().unwrap_or_else(|| "none".to_owned())),
            ("max-tokens", settings.max_tokens.to_string()),
            ("stream", settings.stream.to_string()),
            ("pause", format!("{} s", settings.pause_s)),
            ("number of prompts", settings.prompts.to_string()),
            ("kind", kind(run).to_owned()),
            ("machine", format!("{} {}, {} CPUs", run.machine.os, run.machine.arch, run.machine.cpus)),
        ]
    };
    let pairs = of(before).into_iter().zip(of(after)).filter(|(one, other)| one.1 != other.1);
    pairs
        .map(|((name, one), (_, other))| format!("the runs differ in {name}: {one} before, {other} after"))
        .collect()
}

fn kind(run: &Run) -> &'static str {
    run.counted().find_map(|cycle| Some(cycle.cold_start.as_ref()?.kind.name())).unwrap_or("unknown")
}

// === impl RunHeader ===

impl RunHeader {
    fn of(run: &Run, counted: usize) -> Self {
        Self {
            label: run.label.clone(),
            started_at: run.started_at.clone(),
            anteroom: run.anteroom.clone(),
            route: run.route.clone(),
            counted,
        }
    }
}

// === impl Inconclusive ===

impl Inconclusive {
    /// Adds the smallest reported slowdown to the times of the run before and tests if it would be significant with
    /// these numbers of cycles. Returns `None` if it would be.
    fn of(whole: &[f64], counted: [usize; 2], thresholds: Thresholds, tests: usize) -> Option<Self> {
        const MAX_CYCLES: usize = 100;
        let slowdown_ms = thresholds.least_ms(median(whole)?);
        // Values spread over the quantiles of the run before.
        let spread = |count: usize, shift: f64| {
            let at = |place: usize| quantile(whole, (place as f64 + 0.5) / count as f64);
            (0..count).filter_map(at).map(|value| value + shift).collect::<Vec<_>>()
        };
        // Holm multiplies the smallest p-value by the number of tests.
        let shows = |n: [usize; 2]| {
            mann_whitney(&spread(n[0], 0.0), &spread(n[1], slowdown_ms)) * tests as f64 <= thresholds.alpha
        };
        let cycles_needed = || (2..=MAX_CYCLES).find(|n| shows([*n; 2]));
        (!shows(counted)).then(|| Self { slowdown_ms, cycles_needed: cycles_needed() })
    }
}

// === impl Thresholds ===

impl Thresholds {
    /// Returns the smallest change of a median that is reported.
    fn least_ms(&self, median_ms: f64) -> f64 {
        self.floor_ms.max(self.threshold * median_ms)
    }
}

// === impl MetricComparison ===

impl MetricComparison {
    fn of(before: &Sample, after: &Sample) -> Option<Self> {
        let values = [before, after].map(Sample::by_cycle);
        let median_ms = [median(&values[0])?, median(&values[1])?];
        let difference_ms = median_ms[1] - median_ms[0];
        Some(Self {
            name: before.metric.name(),
            n: [values[0].len(), values[1].len()],
            median_ms,
            difference_ms,
            ci_ms: Bootstrap::default().difference_interval(&values[0], &values[1]),
            difference_percent: (median_ms[0] > 0.0).then(|| 100.0 * difference_ms / median_ms[0]),
            p: mann_whitney(&values[0], &values[1]),
            p_corrected: 1.0,
            change: DifferenceClass::Noise,
        })
    }

    fn classify(&self, thresholds: Thresholds) -> DifferenceClass {
        let least = thresholds.least_ms(self.median_ms[0]);
        match self.difference_ms {
            _ if self.p_corrected > thresholds.alpha => DifferenceClass::Noise,
            difference if difference.abs() < least => DifferenceClass::Small,
            difference if difference > 0.0 => DifferenceClass::Worse,
            _ => DifferenceClass::Better,
        }
    }
}

// === impl FailureComparison ===

impl FailureComparison {
    fn of(before: &Run, after: &Run) -> Self {
        let count = |run: &Run, which: &[CycleVerdict]| {
            run.cycles.iter().filter(|cycle| which.contains(&cycle.verdict)).count() as u64
        };
        let failed = [before, after].map(|run| count(run, &[CycleVerdict::Failed]));
        let of = [before, after].map(|run| count(run, &[CycleVerdict::Failed, CycleVerdict::Cold]));
        Self { failed, of, p: fisher_exact(failed, of), p_corrected: 1.0, change: DifferenceClass::Noise }
    }

    /// Classifies the failures. A run without any cold start is worse without a test.
    fn classify(&self, thresholds: Thresholds, counted_after: usize) -> DifferenceClass {
        let rate = |side: usize| self.failed[side] as f64 / self.of[side].max(1) as f64;
        match self.p_corrected {
            _ if counted_after == 0 => DifferenceClass::Worse,
            p if p > thresholds.alpha => DifferenceClass::Noise,
            _ if rate(1) > rate(0) => DifferenceClass::Worse,
            _ => DifferenceClass::Better,
        }
    }
}
