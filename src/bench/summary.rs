//! What the cycles of a run come to.

use serde::{Deserialize, Serialize};

use super::{
    cost::CostSummary,
    results::{Run, Verdict},
    samples::{Of, Sample},
    stats::{Bootstrap, median, quantile},
};

/// The numbers of a run.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Summary {
    /// Cycles that were measured.
    pub cycles: usize,
    /// Those that count.
    pub counted: usize,
    /// Those that were no cold starts of ours.
    pub not_cold: usize,
    /// Those that failed.
    pub failed: usize,
    /// Requests that were sent.
    pub requests: usize,
    /// Those that were not answered.
    pub requests_failed: usize,
    /// How the confidence intervals were made.
    pub bootstrap: BootstrapNote,
    /// Each phase, in order.
    pub phases: Vec<Spread>,
    /// What is known of their inside, named `phase.part`.
    pub parts: Vec<Spread>,
    /// `t_actuation`, `t_first_token` and `t_e2e` of the records, `ttft` and `total` of the clients.
    pub totals: Vec<Spread>,
    /// The largest difference of a record from the clients' clock, in percent, without a sign.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside_clock_max_percent: Option<f64>,
    /// What was paid for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<CostSummary>,
}

/// How the confidence intervals were made.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct BootstrapNote {
    /// `percentile`.
    pub method: String,
    /// How many samples were drawn.
    pub resamples: u32,
    /// With which seed.
    pub seed: u64,
    /// 0.95.
    pub confidence: f64,
}

/// How the numbers of one kind are spread.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Spread {
    /// Of what.
    pub name: String,
    /// How many numbers.
    pub n: usize,
    /// Half of them are no larger.
    pub median_ms: f64,
    /// The confidence interval of the median; absent with fewer than two cycles.
    pub ci_ms: Option<[f64; 2]>,
    /// Nine of ten are no larger.
    pub p90_ms: f64,
    /// 99 of 100 are no larger.
    pub p99_ms: f64,
    /// The smallest.
    pub min_ms: f64,
    /// The largest.
    pub max_ms: f64,
}

// === impl Summary ===

impl Summary {
    /// Of the cycles of a run.
    pub fn of(run: &Run, bootstrap: &Bootstrap) -> Self {
        let mut summary = Self {
            cycles: run.cycles.len(),
            bootstrap: BootstrapNote {
                method: "percentile".to_owned(),
                resamples: bootstrap.resamples,
                seed: bootstrap.seed,
                confidence: bootstrap.confidence,
            },
            cost: CostSummary::of(run),
            ..Self::default()
        };
        for cycle in &run.cycles {
            match cycle.verdict {
                Verdict::Cold => summary.counted += 1,
                Verdict::NotCold => summary.not_cold += 1,
                Verdict::Failed => summary.failed += 1,
            }
            summary.requests += cycle.requests.len();
            summary.requests_failed +=
                cycle.requests.iter().filter(|request| request.error.is_some()).count();
        }
        let differences = run.counted().filter_map(|cycle| cycle.outside_clock);
        summary.outside_clock_max_percent =
            differences.map(|clock| clock.difference_percent.abs()).reduce(f64::max);
        for sample in Sample::all(run) {
            let rows = match sample.of {
                Of::Phase(_) => &mut summary.phases,
                Of::Part(..) => &mut summary.parts,
                _ => &mut summary.totals,
            };
            rows.extend(Spread::of(&sample, bootstrap));
        }
        summary
    }

    /// Every row in the order of a table: each phase with its parts below it, then the totals.
    pub fn rows(&self) -> impl Iterator<Item = &Spread> {
        let inside = |phase: &Spread| {
            let prefix = format!("{}.", phase.name);
            self.parts.iter().filter(move |part| part.name.starts_with(&prefix))
        };
        self.phases
            .iter()
            .flat_map(move |phase| std::iter::once(phase).chain(inside(phase)))
            .chain(&self.totals)
    }

    /// A row of the totals.
    pub fn total(&self, of: Of) -> Option<&Spread> {
        let name = of.name();
        self.totals.iter().find(|row| row.name == name)
    }
}

// === impl Spread ===

impl Spread {
    fn of(sample: &Sample, bootstrap: &Bootstrap) -> Option<Self> {
        let values = sample.values();
        Some(Self {
            name: sample.of.name(),
            n: values.len(),
            median_ms: median(&values)?,
            ci_ms: bootstrap.median_interval(&sample.groups),
            p90_ms: quantile(&values, 0.9)?,
            p99_ms: quantile(&values, 0.99)?,
            min_ms: quantile(&values, 0.0)?,
            max_ms: quantile(&values, 1.0)?,
        })
    }
}
