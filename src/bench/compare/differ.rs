//! The comparison itself, pure.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::bench::{
    results::{Run, Verdict},
    samples::{Of, Sample},
    stats::{Bootstrap, fisher_exact, holm, mann_whitney, median, smallest_p},
};

/// What makes a difference one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Limits {
    /// The chance of a false alarm, among all rows.
    pub(super) alpha: f64,
    /// The least share of the median before.
    pub(super) threshold: f64,
    /// The least difference, in milliseconds.
    pub(super) floor_ms: f64,
}

/// Two runs beside each other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Comparison {
    pub(super) schema: &'static str,
    pub(super) limits: Limits,
    pub(super) before: Side,
    pub(super) after: Side,
    /// What was tested, in the order of time.
    pub(super) rows: Vec<Row>,
    /// Failed cycles, which are tested as well.
    pub(super) failures: Failures,
    /// What only one run has.
    pub(super) only_before: Vec<String>,
    pub(super) only_after: Vec<String>,
    /// What the reader must know.
    pub(super) warnings: Vec<String>,
    /// Something became slower, or fails more often.
    pub(super) regression: bool,
}

/// What is to be known of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Side {
    pub(super) label: Option<String>,
    pub(super) started_at: String,
    pub(super) anteroom: String,
    pub(super) route: String,
    pub(super) counted: usize,
}

/// A phase or a total in both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    /// Cycles with it, before and after.
    pub(super) n: [usize; 2],
    /// Their medians; of clients' times over the median of each cycle.
    pub(super) median_ms: [f64; 2],
    /// After less before.
    pub(super) difference_ms: f64,
    /// Its 95 % interval by bootstrap.
    pub(super) ci_ms: Option<[f64; 2]>,
    /// In percent of the median before.
    pub(super) difference_percent: Option<f64>,
    /// Of the test of Mann and Whitney.
    pub(super) p: f64,
    /// Corrected by Holm over all rows and the failures.
    pub(super) p_corrected: f64,
    pub(super) change: Change,
}

/// Failed cycles in both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Failures {
    pub(super) failed: [u64; 2],
    /// Cycles that could have failed: without those that were not cold.
    pub(super) of: [u64; 2],
    /// Of Fisher's exact test.
    pub(super) p: f64,
    pub(super) p_corrected: f64,
    pub(super) change: Change,
}

/// What a difference is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Change {
    /// Nothing that chance does not explain.
    Noise,
    /// There is a difference, too small to matter.
    Small,
    /// Slower, or more failures.
    Worse,
    /// Faster, or fewer failures.
    Better,
}

// === impl Comparison ===

impl Comparison {
    /// Compares.
    ///
    /// # Errors
    /// A sentence, when neither run has anything that could be compared.
    pub(super) fn of(before: &Run, after: &Run, limits: Limits) -> Result<Self, String> {
        let counted = [before, after].map(|run| run.counted().count());
        if counted[0] == 0 {
            return Err("the run before has no cold start that counts: nothing can be compared with it; measure it again"
                .to_owned());
        }
        let failures = Failures::of(before, after);
        if counted[1] == 0 && failures.failed[1] == 0 {
            return Err("the run after has no cold start that counts: measure it again".to_owned());
        }
        let samples = [before, after].map(Sample::all);
        let mut rows: Vec<_> = samples[0]
            .iter()
            .filter_map(|sample| {
                let other = samples[1].iter().find(|other| other.of == sample.of)?;
                Row::of(sample, other)
            })
            .collect();
        let mut comparison = Self {
            schema: "anteroom.dev/bench-compare/v1",
            limits,
            before: Side::of(before, counted[0]),
            after: Side::of(after, counted[1]),
            only_before: only(&samples[0], &samples[1]),
            only_after: only(&samples[1], &samples[0]),
            warnings: Vec::new(),
            regression: false,
            rows: Vec::new(),
            failures,
        };
        let all: Vec<_> = rows.iter().map(|row| row.p).chain([comparison.failures.p]).collect();
        let corrected = holm(&all);
        for (row, p) in rows.iter_mut().zip(&corrected) {
            row.p_corrected = *p;
            row.change = row.judge(limits);
        }
        let failures = &mut comparison.failures;
        failures.p_corrected = corrected.last().copied().unwrap_or(1.0);
        failures.change = failures.judge(limits, counted[1]);
        comparison.regression =
            failures.change == Change::Worse || rows.iter().any(|row| row.change == Change::Worse);
        comparison.rows = rows;
        comparison.warnings = warnings(before, after, counted, limits, corrected.len());
        Ok(comparison)
    }
}

fn only(these: &[Sample], those: &[Sample]) -> Vec<String> {
    let others: BTreeSet<Of> = those.iter().map(|sample| sample.of).collect();
    these.iter().filter(|sample| !others.contains(&sample.of)).map(|sample| sample.of.name()).collect()
}

fn warnings(before: &Run, after: &Run, counted: [usize; 2], limits: Limits, tests: usize) -> Vec<String> {
    let mut warnings = differences(before, after);
    // Holm's first step is the hardest: whatever passes passes that.
    let reachable = |n: [usize; 2]| smallest_p(n[0], n[1]) * tests as f64 <= limits.alpha;
    if counted[1] > 0 && !reachable(counted) {
        let enough = (2..200).find(|n| reachable([*n; 2])).unwrap_or(200);
        warnings.push(format!(
            "with {} and {} cycles no difference can be told from noise at alpha {} over {tests} tests: at least {enough} \
             cycles each are needed",
            counted[0], counted[1], limits.alpha
        ));
    }
    for (run, name) in [(before, "before"), (after, "after")] {
        let not_cold = run.cycles.iter().filter(|cycle| cycle.verdict == Verdict::NotCold).count();
        if not_cold > 0 {
            warnings.push(format!("{not_cold} cycles of the run {name} were not cold, and are left out"));
        }
        if run.interrupted || run.aborted.is_some() {
            warnings.push(format!("the run {name} has not all of its {} cycles", run.settings.cycles));
        }
    }
    warnings
}

/// What was measured differently.
fn differences(before: &Run, after: &Run) -> Vec<String> {
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
        .map(|((name, one), (_, other))| {
            format!("measured differently: {name} was {one}, and is {other} in the run after")
        })
        .collect()
}

fn kind(run: &Run) -> &'static str {
    run.counted().find_map(|cycle| Some(cycle.cold_start.as_ref()?.kind.name())).unwrap_or("unknown")
}

// === impl Side ===

impl Side {
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

// === impl Row ===

impl Row {
    fn of(before: &Sample, after: &Sample) -> Option<Self> {
        let values = [before, after].map(Sample::by_cycle);
        let median_ms = [median(&values[0])?, median(&values[1])?];
        let difference_ms = median_ms[1] - median_ms[0];
        Some(Self {
            name: before.of.name(),
            n: [values[0].len(), values[1].len()],
            median_ms,
            difference_ms,
            ci_ms: Bootstrap::default().difference_interval(&values[0], &values[1]),
            difference_percent: (median_ms[0] > 0.0).then(|| 100.0 * difference_ms / median_ms[0]),
            p: mann_whitney(&values[0], &values[1]),
            p_corrected: 1.0,
            change: Change::Noise,
        })
    }

    fn judge(&self, limits: Limits) -> Change {
        let least = limits.floor_ms.max(limits.threshold * self.median_ms[0]);
        match self.difference_ms {
            _ if self.p_corrected > limits.alpha => Change::Noise,
            difference if difference.abs() < least => Change::Small,
            difference if difference > 0.0 => Change::Worse,
            _ => Change::Better,
        }
    }
}

// === impl Failures ===

impl Failures {
    fn of(before: &Run, after: &Run) -> Self {
        let count = |run: &Run, which: &[Verdict]| {
            run.cycles.iter().filter(|cycle| which.contains(&cycle.verdict)).count() as u64
        };
        let failed = [before, after].map(|run| count(run, &[Verdict::Failed]));
        let of = [before, after].map(|run| count(run, &[Verdict::Failed, Verdict::Cold]));
        Self { failed, of, p: fisher_exact(failed, of), p_corrected: 1.0, change: Change::Noise }
    }

    /// If nothing comes up any more, no test has to say that this is worse.
    fn judge(&self, limits: Limits, counted_after: usize) -> Change {
        let rate = |side: usize| self.failed[side] as f64 / self.of[side].max(1) as f64;
        match self.p_corrected {
            _ if counted_after == 0 => Change::Worse,
            p if p > limits.alpha => Change::Noise,
            _ if rate(1) > rate(0) => Change::Worse,
            _ => Change::Better,
        }
    }
}
