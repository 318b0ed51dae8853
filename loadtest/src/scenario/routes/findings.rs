//! Findings of the routes scenario: the effect of route changes on requests to other routes.

use serde::Serialize;

use super::api::ApiCounts;
use super::objects::CHANGES_PER_SEC;
use crate::census::ProcessStats;
use crate::findings::{Criterion, Findings, Table, disturbed, thousands};
use crate::spread::Spread;

/// All results of a run.
pub(super) struct RoutesResults {
    pub(super) how: String,
    pub(super) loaded: InitialListResults,
    pub(super) measured: Vec<IntervalResults>,
    pub(super) lateness: PropagationDelays,
    /// Census at the end.
    pub(super) census: ProcessStats,
    pub(super) counts: ApiCounts,
}

/// Results of the initial list.
#[derive(Debug, Serialize)]
pub(super) struct InitialListResults {
    pub(super) routes: usize,
    /// Time from the start of the process until it reports readiness, which means that it knows all routes.
    pub(super) ready_s: f64,
    /// Time until requests to routes with pods succeed.
    pub(super) served_s: f64,
    pub(super) census: ProcessStats,
    pub(super) counts: ApiCounts,
}

/// Results of one interval of requests, with or without changes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct IntervalResults {
    pub(super) changing: bool,
    pub(super) requests: u64,
    pub(super) changes_per_s: f64,
    /// Watch events sent per second, including those for statuses written back.
    pub(super) told_per_s: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    pub(super) max_us: f64,
    /// Share of its core used by Anteroom.
    pub(super) busy: f64,
    /// Share of the other core used by the rig.
    pub(super) rig_busy: f64,
    pub(super) others: f64,
}

/// Time from a change until it acts, in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct PropagationDelays {
    /// Changes of a route's matches.
    pub(super) matches: Vec<f64>,
    /// Changes of endpoints.
    pub(super) endpoints: Vec<f64>,
}

// === impl RoutesResults ===

impl RoutesResults {
    pub(super) fn findings(self) -> Findings {
        let Self { how, loaded, measured, lateness, census, counts } = &self;
        let aim = self.effect().map(|(limit, ratio)| {
            let what = "times the p99 without changes, at most what those without differ by";
            let routes = thousands(loaded.routes as f64);
            let limit = (limit * 1e3).round() / 1e3;
            Criterion::at_most(format!("anteroom, {routes} routes, 1,000 changes/s"), what, limit, ratio)
        });
        let mut results = serde_json::json!({
            "loaded": loaded, "measured": measured, "lateness_ms": lateness, "at_the_end": census, "api": counts,
        });
        results["chance"] = self.rank_sum_p_value().into();
        Findings {
            scenario: "routes",
            how: how.clone(),
            tables: vec![self.load(), self.table(), self.late()],
            results,
            aims: aim.into_iter().collect(),
            notes: self.notes(),
        }
    }

    fn of(&self, changing: bool) -> Vec<f64> {
        let some = self.measured.iter().filter(|measured| measured.changing == changing);
        some.map(|measured| measured.p99_us).collect()
    }

    /// Returns the worst p99 without changes and the median p99 with changes, both as multiples of the median p99
    /// without.
    fn effect(&self) -> Option<(f64, f64)> {
        let (without, with) = (Spread::of(self.of(false))?, Spread::of(self.of(true))?);
        Some((without.max / without.median, with.median / without.median))
    }

    /// Returns the probability of p99s this much larger with changes, if changes have no effect.
    fn rank_sum_p_value(&self) -> f64 {
        rank_sum(&self.of(true), &self.of(false))
    }

    fn load(&self) -> Table {
        let InitialListResults { routes, ready_s, served_s, census, counts } = &self.loaded;
        let mib = |census: &ProcessStats| format!("{:.0}", census.rss_kib as f64 / 1024.0);
        let row = [
            thousands(*routes as f64),
            format!("{ready_s:.2}"),
            format!("{served_s:.2}"),
            mib(census),
            format!("{:.1}", census.rss_kib as f64 / *routes as f64),
            mib(&self.census),
            thousands(counts.watches as f64),
            thousands(counts.lists as f64),
            thousands(self.counts.statuses as f64),
        ];
        let header = [
            "routes",
            "ready s",
            "serves s",
            "MiB",
            "KiB a route",
            "MiB at the end",
            "watches",
            "lists",
            "statuses",
        ];
        Table {
            title: "first list".into(),
            header: header.map(str::to_owned).into(),
            rows: vec![row.into()],
            legend: Some(
                "ready, serves: from the start of anteroom; MiB: resident memory, all of it; statuses: written in the whole run",
            ),
        }
    }

    fn table(&self) -> Table {
        let header = [
            "changes/s",
            "events/s",
            "requests",
            "p50 µs",
            "p99 µs",
            "p99.9 µs",
            "max µs",
            "busy",
            "rig busy",
        ];
        let row = |measured: &IntervalResults| {
            let us = |value: f64| format!("{value:.0}");
            let percent = |share: f64| format!("{:.0} %", share * 100.0);
            [
                thousands(measured.changes_per_s),
                thousands(measured.told_per_s),
                thousands(measured.requests as f64),
                us(measured.p50_us),
                us(measured.p99_us),
                us(measured.p999_us),
                us(measured.max_us),
                percent(measured.busy),
                percent(measured.rig_busy),
            ]
            .into()
        };
        let chance = self.rank_sum_p_value();
        Table {
            title: format!(
                "requests by schedule to others; p99s so much larger by chance alone: {chance:.3}"
            ),
            header: header.map(str::to_owned).into(),
            rows: self.measured.iter().map(row).collect(),
            legend: Some(
                "from when a request was due; busy: of its core, anteroom; events: told to watches, written statuses \
                 included",
            ),
        }
    }

    fn late(&self) -> Table {
        let row = |what: &str, values: &[f64]| {
            let spread = Spread::of(values.iter().copied()).unwrap_or_default();
            let ms = |value: f64| format!("{value:.1}");
            vec![what.to_owned(), values.len().to_string(), ms(spread.median), ms(spread.max)]
        };
        Table {
            title: "delay until a change takes effect, while all others continue".into(),
            header: ["of", "samples", "median ms", "max ms"].map(str::to_owned).into(),
            rows: vec![
                row("change of a route's matches", &self.lateness.matches),
                row("change of its endpoints", &self.lateness.endpoints),
            ],
            legend: None,
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let most = |of: fn(&IntervalResults) -> f64| self.measured.iter().map(of).fold(0.0, f64::max);
        let others = most(|measured| measured.others);
        notes.extend(disturbed(others));
        let rig = most(|measured| measured.rig_busy);
        if rig > 0.7 {
            notes.push(format!(
                "the rig's core was up to {:.0} % busy, so part of what requests waited for may be the rig",
                rig * 100.0
            ));
        }
        for measured in self.measured.iter().filter(|measured| measured.changing) {
            if measured.changes_per_s < 0.95 * f64::from(CHANGES_PER_SEC) {
                notes.push(format!("only {:.0} changes/s were made", measured.changes_per_s));
            }
        }
        if let Some((path, _)) = self.counts.not_found.first_key_value() {
            let paths = self.counts.not_found.len();
            notes.push(format!(
                "{paths} paths were asked for that this cluster does not have, such as {path}"
            ));
        }
        notes
    }
}

/// Computes the exact one-sided rank-sum test: the share of all selections of `ours.len()` values of both samples
/// with a rank sum at least as large as that of `ours`.
fn rank_sum(ours: &[f64], theirs: &[f64]) -> f64 {
    let all: Vec<f64> = ours.iter().chain(theirs).copied().collect();
    // Equal values share their ranks.
    let rank = |value: f64| {
        let below = all.iter().filter(|other| **other < value).count();
        let equal = all.iter().filter(|other| **other == value).count();
        below as f64 + (equal as f64 + 1.0) / 2.0
    };
    let ranks: Vec<f64> = all.iter().map(|value| rank(*value)).collect();
    let sum: f64 = ranks[..ours.len()].iter().sum();
    // For each number of chosen values, the number of ways to each sum, in half ranks.
    let most = ranks.iter().map(|rank| (rank * 2.0) as usize).sum::<usize>();
    let mut ways = vec![vec![0.0; most + 1]; ours.len() + 1];
    ways[0][0] = 1.0;
    for rank in &ranks {
        let rank = (rank * 2.0) as usize;
        for chosen in (1..=ours.len()).rev() {
            let (before, now) = ways.split_at_mut(chosen);
            for at in rank..=most {
                now[0][at] += before[chosen - 1][at - rank];
            }
        }
    }
    let last = &ways[ours.len()];
    let total: f64 = last.iter().sum();
    last[(sum * 2.0) as usize..].iter().sum::<f64>() / total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(without: &[f64], with: &[f64]) -> RoutesResults {
        let measured = |changing, p99_us: &f64| IntervalResults {
            changing,
            requests: 1000,
            changes_per_s: if changing { 1000.0 } else { 0.0 },
            told_per_s: 0.0,
            p50_us: 50.0,
            p99_us: *p99_us,
            p999_us: 300.0,
            max_us: 400.0,
            busy: 0.2,
            rig_busy: 0.3,
            others: 0.0,
        };
        let all =
            without.iter().map(|p99| measured(false, p99)).chain(with.iter().map(|p99| measured(true, p99)));
        let census = ProcessStats { rss_kib: 200 * 1024, ..ProcessStats::default() };
        let counts = ApiCounts::default();
        let loaded = InitialListResults {
            routes: 10_000,
            ready_s: 1.0,
            served_s: 1.1,
            census,
            counts: counts.clone(),
        };
        let lateness = PropagationDelays { matches: vec![500.0], endpoints: vec![2.0] };
        RoutesResults { how: "2 rounds".into(), loaded, measured: all.collect(), lateness, census, counts }
    }

    #[test]
    fn effect_is_the_excess_over_noise() {
        let small = found(&[100.0, 120.0, 110.0], &[115.0, 105.0, 118.0]).findings();
        assert!(small.aims[0].met && small.notes.is_empty(), "{small}");
        let large = found(&[100.0, 120.0, 110.0], &[200.0, 150.0, 300.0]).findings();
        assert!(!large.aims[0].met, "{large}");
        // All three with changes are the largest: one of the 20 ways to choose 3 of 6.
        assert!((large.results["chance"].as_f64().unwrap() - 0.05).abs() < 1e-9, "{large}");
    }

    #[test]
    fn shared_ranks_count_half() {
        assert_eq!(rank_sum(&[1.0], &[1.0]), 1.0);
        assert_eq!(rank_sum(&[2.0], &[1.0]), 0.5);
        assert_eq!(rank_sum(&[1.0, 2.0], &[3.0, 4.0]), 1.0);
        assert_eq!(rank_sum(&[3.0, 4.0], &[1.0, 2.0]), 1.0 / 6.0);
    }
}
