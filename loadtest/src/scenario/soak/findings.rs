//! Findings of the soak scenario: resources left behind.

use serde::Serialize;

use super::account::RouteTotals;
use crate::census::ProcessStats;
use crate::findings::{Criterion, Findings, NOISY_CORE_SHARE, Table, thousands};
use crate::spread::Spread;

/// All results of a run.
pub(super) struct SoakResults {
    pub(super) elapsed: f64,
    pub(super) cycles: Vec<SoakCycle>,
    pub(super) tally: SoakTally,
    pub(super) account: RouteTotals,
    /// Cores used by other processes, on our two cores.
    pub(super) others: f64,
}

/// Results of one cycle, from one gap to the next.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SoakCycle {
    /// Time of its end, since the start of the run.
    pub(super) at_s: f64,
    /// Requests sent in the cycle.
    pub(super) requests: u64,
    /// Time of the first request, including the cold start.
    pub(super) first_ms: f64,
    pub(super) first_served: bool,
    /// Requests unaccounted for since the start of the run.
    pub(super) missing: u64,
    pub(super) census: ProcessStats,
}

/// Outcomes of requests as observed by the clients.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct SoakTally {
    pub(super) sent: u64,
    pub(super) answered: u64,
    pub(super) full: u64,
    pub(super) left: u64,
    /// Configurations loaded while requests were in flight.
    pub(super) reloads: u64,
}

/// Cycles after which pools and caches have reached their size.
const WARM_UP: usize = 2;
/// Maximum growth factor of memory; allocators round up and return pages at their own pace.
const MAX_MEMORY_GROWTH: f64 = 1.1;

/// Trend of resident memory.
#[derive(Clone, Copy, Debug, Serialize)]
struct Trend {
    /// Median of the first third after the warm-up, and of the last.
    first_mib: f64,
    last_mib: f64,
    /// Slope by least squares over all cycles after the warm-up.
    kib_per_hour: f64,
    bytes_per_request: f64,
}

// === impl SoakResults ===

impl SoakResults {
    pub(super) fn findings(self) -> Findings {
        let Self { elapsed, cycles, tally, account, others } = &self;
        let trend = self.trend();
        let (first, last) = (self.settled().first().copied(), cycles.last());
        let more = first.zip(last).map(|(first, last)| resource_increase(&first.census, &last.census));
        let missing = cycles.iter().map(|cycle| cycle.missing).max().unwrap_or_default();
        let served = cycles.iter().filter(|cycle| cycle.first_served).count();
        let who = "anteroom";
        let mut aims = vec![
            Criterion::at_most(who, "requests that are not accounted for, at most", 0.0, missing as f64),
            Criterion::at_least(
                who,
                "of all first requests after a gap were served, at least",
                1.0,
                served as f64 / cycles.len() as f64,
            ),
        ];
        if let (Some(trend), Some(more)) = (trend, more) {
            let what = "times the resident memory of the first third at the end, at most";
            aims.push(Criterion::at_most(who, what, MAX_MEMORY_GROWTH, trend.last_mib / trend.first_mib));
            let what = "files, threads and processes more at the end, at most";
            aims.push(Criterion::at_most(who, what, 0.0, more as f64));
        }
        let mut notes = Vec::new();
        if *others > NOISY_CORE_SHARE {
            notes.push(format!(
                "other processes, or model servers that have ended, used {:.0} % of a core",
                others * 100.0
            ));
        }
        if trend.is_none() {
            notes.push(format!("{} cycles are too few to measure the trend of memory", cycles.len()));
        }
        Findings {
            scenario: "soak",
            how: format!("{} cycles in {elapsed:.0} s, each with a gap and a cold start", cycles.len()),
            tables: vec![self.table(trend), self.requests()],
            results: serde_json::json!({
                "cycles": cycles, "trend": trend, "clients": tally, "account": account, "others": others,
            }),
            aims,
            notes,
        }
    }

    fn settled(&self) -> Vec<&SoakCycle> {
        self.cycles.iter().skip(WARM_UP).collect()
    }

    /// Returns `None` with too few cycles.
    fn trend(&self) -> Option<Trend> {
        let settled = self.settled();
        let third = settled.len() / 3;
        if third == 0 {
            return None;
        }
        let mib = |cycle: &&SoakCycle| cycle.census.rss_kib as f64 / 1024.0;
        let median = |cycles: &[&SoakCycle]| Spread::of(cycles.iter().map(mib)).map(|spread| spread.median);
        let points = settled.iter().map(|cycle| (cycle.at_s, cycle.census.rss_kib as f64));
        let per_second = slope(&points.collect::<Vec<_>>())?;
        let seconds = settled.last()?.at_s - settled.first()?.at_s;
        let requests: u64 = settled.iter().skip(1).map(|cycle| cycle.requests).sum();
        Some(Trend {
            first_mib: median(&settled[..third])?,
            last_mib: median(&settled[settled.len() - third..])?,
            kib_per_hour: per_second * 3600.0,
            bytes_per_request: per_second * 1024.0 * seconds / requests as f64,
        })
    }

    fn table(&self, trend: Option<Trend>) -> Table {
        let first = Spread::of(self.cycles.iter().map(|cycle| cycle.first_ms)).unwrap_or_default();
        let of = |what: fn(&ProcessStats) -> u64| match (self.settled().first(), self.cycles.last()) {
            (Some(first), Some(last)) => format!("{} → {}", what(&first.census), what(&last.census)),
            _ => "-".into(),
        };
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        Table {
            title: String::new(),
            header: [
                "cycles",
                "MiB",
                "KiB/hour",
                "bytes a request",
                "files",
                "threads",
                "processes",
                "first ms (min–max)",
            ]
            .map(str::to_owned)
            .into(),
            rows: vec![
                [
                    self.cycles.len().to_string(),
                    or_dash(trend.map(|trend| format!("{:.1} → {:.1}", trend.first_mib, trend.last_mib))),
                    or_dash(trend.map(|trend| format!("{:.0}", trend.kib_per_hour))),
                    or_dash(trend.map(|trend| format!("{:.1}", trend.bytes_per_request))),
                    of(|census| census.files),
                    of(|census| census.threads),
                    of(|census| census.descendants),
                    format!("{:.0} ({:.0}–{:.0})", first.median, first.min, first.max),
                ]
                .into(),
            ],
            legend: Some(
                "at rest, after each cycle: MiB resident in the first and the last third, what that grows by, and what \
                 there is of files, threads and child processes; first: the first request after a gap, with a load of 300 ms",
            ),
        }
    }

    fn requests(&self) -> Table {
        let SoakTally { sent, answered, full, left, reloads } = self.tally;
        let RouteTotals { admitted, refused, .. } = self.account;
        let ended: Vec<_> =
            self.account.ended.iter().map(|(outcome, count)| format!("{outcome} {count}")).collect();
        let figures = [sent, answered, full, left, admitted, refused].map(|count| thousands(count as f64));
        let row = figures.into_iter().chain([ended.join(", "), reloads.to_string()]).collect();
        let header = ["sent", "answered", "full", "left", "admitted", "refused", "ended", "reloads"];
        Table {
            title: "outcomes of requests: as observed by the clients, and as counted by anteroom".into(),
            header: header.map(str::to_owned).into(),
            rows: vec![row],
            legend: None,
        }
    }
}

/// Returns the increase of files, threads and processes.
fn resource_increase(before: &ProcessStats, after: &ProcessStats) -> u64 {
    after.files.saturating_sub(before.files)
        + after.threads.saturating_sub(before.threads)
        + after.descendants.saturating_sub(before.descendants)
}

/// Returns the slope of the line through these points, by least squares.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let along: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    let across: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    (across > 0.0).then(|| along / across)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(mib: &[u64]) -> SoakResults {
        let cycle = |(number, mib): (usize, &u64)| SoakCycle {
            at_s: number as f64 * 10.0,
            requests: 100,
            first_ms: 400.0,
            first_served: true,
            missing: 0,
            census: ProcessStats { rss_kib: mib * 1024, files: 20, threads: 5, descendants: 0 },
        };
        let cycles = mib.iter().enumerate().map(cycle).collect();
        SoakResults {
            elapsed: 100.0,
            cycles,
            tally: SoakTally::default(),
            account: RouteTotals::default(),
            others: 0.0,
        }
    }

    fn met(found: SoakResults) -> Vec<bool> {
        found.findings().aims.iter().map(|aim| aim.met).collect()
    }

    #[test]
    fn growth_after_warm_up_fails_the_criterion() {
        let flat = found(&[10, 20, 30, 31, 30, 31, 30, 31]);
        assert!(flat.trend().unwrap().kib_per_hour.abs() < 60.0 * 1024.0);
        assert_eq!(met(flat), [true; 4]);
        let growing = found(&[30, 30, 30, 32, 34, 36, 38, 40]);
        let trend = growing.trend().unwrap();
        // 2 MiB each 10 s and each 100 requests.
        assert!((trend.kib_per_hour - 2.0 * 1024.0 * 360.0).abs() < 1e-6, "{trend:?}");
        assert!((trend.bytes_per_request - 2.0 * 1024.0 * 1024.0 / 100.0).abs() < 1e-6, "{trend:?}");
        assert_eq!(met(growing), [true, true, false, true]);
    }

    #[test]
    fn missing_or_left_over_fails_the_criterion() {
        let mut lossy = found(&[30; 8]);
        lossy.cycles[3].missing = 1;
        lossy.cycles[4].first_served = false;
        lossy.cycles[7].census.files += 1;
        assert_eq!(met(lossy), [false, false, true, false]);
        assert!(found(&[30; 3]).findings().notes[0].contains("3 cycles"));
    }
}
