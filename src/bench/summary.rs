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

#[cfg(test)]
mod tests {
    use crate::bench::fixture::{failed, loads, run};

    #[test]
    fn rows_stand_in_the_order_of_time_with_what_is_known_inside() {
        let run = loads(&[3000.0, 3100.0, 3050.0]);
        let names: Vec<_> = run.summary.rows().map(|row| row.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "signal",
                "start",
                "load",
                "load.weights",
                "first_token",
                "t_actuation",
                "t_first_token",
                "t_e2e",
                "ttft",
                "total"
            ]
        );
        let load = run.summary.rows().find(|row| row.name == "load").unwrap();
        assert_eq!((load.n, load.median_ms, load.min_ms, load.max_ms), (3, 3050.0, 3000.0, 3100.0));
        // Between the two largest: 3050 + 0.8 × 50.
        assert!((load.p90_ms - 3090.0).abs() < 1e-6);
        assert_eq!(load.ci_ms, Some([3000.0, 3100.0]));
    }

    #[test]
    fn what_failed_is_counted_and_not_measured() {
        let mut cycles = loads(&[3000.0]).cycles;
        cycles.push(failed(2, "exit code 1"));
        let summary = run(cycles).summary;
        assert_eq!((summary.cycles, summary.counted, summary.failed), (2, 1, 1));
        assert_eq!((summary.requests, summary.requests_failed), (2, 1));
        assert!(summary.rows().all(|row| row.n == 1 && row.ci_ms.is_none()));
    }

    #[test]
    fn money_is_seconds_times_the_price() {
        // 3.60 an hour is 0.001 a second. Cold: start and load, 3.02 s; serving until the client's last byte, 50 + 2 +
        // 100 ms after ready; idle 1.5 s.
        let cost = loads(&[3000.0, 3000.0]).summary.cost.unwrap();
        let close = |found: Option<f64>, expected: f64| {
            assert!((found.unwrap() - expected).abs() < 1e-9, "{found:?}")
        };
        close(Some(cost.cold_s), 3.02);
        close(Some(cost.serving_s), 0.152);
        close(cost.idle_s, 1.5);
        close(cost.cold_start_money, 0.00302);
        close(cost.idle_money, 0.0015);
        close(cost.cycle_money, 0.004672);
    }
}
