//! Statistics over the cycles of a run.

use super::{
    results::{BootstrapParameters, CostSummary, CycleVerdict, Distribution, Run, Summary},
    samples::{Metric, Sample},
    stats::{Bootstrap, median, quantile},
};

// === impl Summary ===

impl Summary {
    /// Computes the summary of `run.cycles`.
    pub(super) fn of(run: &Run, bootstrap: &Bootstrap) -> Self {
        let mut summary = Self {
            cycles: run.cycles.len(),
            bootstrap: BootstrapParameters {
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
                CycleVerdict::Cold => summary.counted += 1,
                CycleVerdict::NotCold => summary.not_cold += 1,
                CycleVerdict::Failed => summary.failed += 1,
            }
            summary.requests += cycle.requests.len();
            summary.requests_failed +=
                cycle.requests.iter().filter(|request| request.error.is_some()).count();
        }
        let differences = run.counted().filter_map(|cycle| cycle.outside_clock);
        summary.outside_clock_max_percent =
            differences.map(|clock| clock.difference_percent.abs()).reduce(f64::max);
        for sample in Sample::all(run) {
            let rows = match sample.metric {
                Metric::Phase(_) => &mut summary.phases,
                Metric::Part(..) => &mut summary.parts,
                _ => &mut summary.totals,
            };
            rows.extend(Distribution::of(&sample, bootstrap));
        }
        summary
    }

    /// Returns all rows in the order of the table: each phase followed by its parts, then the totals.
    pub fn rows(&self) -> impl Iterator<Item = &Distribution> {
        let inside = |phase: &Distribution| {
            let prefix = format!("{}.", phase.name);
            self.parts.iter().filter(move |part| part.name.starts_with(&prefix))
        };
        self.phases
            .iter()
            .flat_map(move |phase| std::iter::once(phase).chain(inside(phase)))
            .chain(&self.totals)
    }

    /// Returns the row of a total.
    pub(super) fn total(&self, metric: Metric) -> Option<&Distribution> {
        let name = metric.name();
        self.totals.iter().find(|row| row.name == name)
    }
}

// === impl Distribution ===

impl Distribution {
    fn of(sample: &Sample, bootstrap: &Bootstrap) -> Option<Self> {
        let values = sample.values();
        Some(Self {
            name: sample.metric.name(),
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
    fn rows_list_parts_after_their_phase() {
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
        // Interpolated between the two largest values: 3050 + 0.8 × 50.
        assert!((load.p90_ms - 3090.0).abs() < 1e-6);
        assert_eq!(load.ci_ms, Some([3000.0, 3100.0]));
    }

    #[test]
    fn failed_cycles_are_counted_but_not_measured() {
        let mut cycles = loads(&[3000.0]).cycles;
        cycles.push(failed(2, "exit code 1"));
        let summary = run(cycles).summary;
        assert_eq!((summary.cycles, summary.counted, summary.failed), (2, 1, 1));
        assert_eq!((summary.requests, summary.requests_failed), (2, 1));
        assert!(summary.rows().all(|row| row.n == 1 && row.ci_ms.is_none()));
    }

    #[test]
    fn cost_is_seconds_times_price() {
        // 3.60 per hour is 0.001 per second. Cold: start 20 ms + load 3 s; serving: first token 50 ms + 2 ms to the client
        // + 100 ms until its last byte; idle: 1.5 s.
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
