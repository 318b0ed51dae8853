//! The grid of settings and the choice of a recommendation.

use serde::Serialize;

use super::{
    grid::{Figures, ReplayInput, SeedSpread, cmp_wait},
    replay::ReplaySettings,
};

/// Settings with their replayed figures.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub settings: ReplaySettings,
    pub figures: Figures,
    /// Pareto-optimal in GPU hours and p99.
    pub on_front: bool,
}

/// Goal of the recommendation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Least GPU time for which this quantile of the wait is at most this many milliseconds.
    Wait(Quantile, u64),
    /// Shortest wait for at most this many GPU hours per month.
    GpuHours(f64),
}

/// Quantile of the wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantile {
    Median,
    P90,
    P99,
}

/// Index of the recommended candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Reaches the goal.
    Reached(usize),
    /// Misses the goal by the least; no candidate reaches it.
    Closest(usize),
}

/// Hours per month: a twelfth of 365.25 days.
pub const HOURS_PER_MONTH: f64 = 730.5;

/// Settings to replay: every combination of the lists.
#[derive(Clone, Debug)]
pub struct SettingsGrid {
    /// Values of the settings that are not varied.
    pub base: ReplaySettings,
    /// Values of `minReplicaCount`.
    pub floors: Vec<u32>,
    /// Idle times, in milliseconds; used only with a floor of zero.
    pub idle: Vec<u64>,
    /// Values of `concurrency.max`.
    pub concurrency: Vec<u32>,
    /// Values of `hold.timeout`, in milliseconds.
    pub hold: Vec<u64>,
    /// Values of `hold.maxRequests`.
    pub hold_requests: Vec<usize>,
}

// === impl SettingsGrid ===

impl SettingsGrid {
    /// Returns all combinations, in order. With a floor above zero the idle time is unused and not varied.
    pub fn settings(&self) -> Vec<ReplaySettings> {
        let mut all = Vec::new();
        for &concurrency in &self.concurrency {
            for &hold in &self.hold {
                for &hold_requests in &self.hold_requests {
                    let base = ReplaySettings { concurrency, hold, hold_requests, ..self.base };
                    for &floor in &self.floors {
                        let max_replicas = base.max_replicas.max(floor);
                        let idle = if floor == 0 { &self.idle[..] } else { &[u64::MAX] };
                        all.extend(idle.iter().map(|&idle| ReplaySettings {
                            floor,
                            max_replicas,
                            idle,
                            ..base
                        }));
                    }
                }
            }
        }
        all
    }
}

/// Replays all settings with all seeds.
pub fn candidates(load: &ReplayInput, settings: &[ReplaySettings], seeds: &[u64]) -> Vec<Candidate> {
    let figures: Vec<_> = settings.iter().map(|settings| load.figures(settings, seeds)).collect();
    let point = |figures: &Figures| (figures.gpu_hours.middle, figures.p99_ms.middle);
    let is_beaten = |(hours, wait): (f64, Option<u64>)| {
        figures.iter().map(point).any(|(other_hours, other_wait)| {
            let wait = cmp_wait(&other_wait, &wait);
            other_hours <= hours && wait.is_le() && (other_hours < hours || wait.is_lt())
        })
    };
    let on_front: Vec<_> = figures.iter().map(|figures| !is_beaten(point(figures))).collect();
    settings
        .iter()
        .zip(figures)
        .zip(on_front)
        .map(|((settings, figures), on_front)| Candidate { settings: *settings, figures, on_front })
        .collect()
}

/// Recommends the best candidate that reaches the goal and loses at most the share `max_lost` of the requests. A wait goal
/// must be met at the 95th percentile of the seeds.
pub fn choose(candidates: &[Candidate], goal: Goal, max_lost: f64, windows_per_month: f64) -> Option<Choice> {
    let least = |wanted: &dyn Fn(&Figures) -> bool, key: &dyn Fn(&Figures) -> (u64, f64, u64, f64)| {
        let fitting = candidates.iter().enumerate().filter(|(_, candidate)| wanted(&candidate.figures));
        let key = |(_, candidate): &(usize, &Candidate)| key(&candidate.figures);
        let order = |(a, b, c, d): (u64, f64, u64, f64), other: (u64, f64, u64, f64)| {
            a.cmp(&other.0).then(b.total_cmp(&other.1)).then(c.cmp(&other.2)).then(d.total_cmp(&other.3))
        };
        fitting.min_by(|one, other| order(key(one), key(other))).map(|(index, _)| index)
    };
    let or_infinite = |wait: Option<u64>| wait.unwrap_or(u64::MAX);
    let keeps_requests = |figures: &Figures| figures.lost() <= max_lost;
    match goal {
        Goal::Wait(quantile, within) => {
            let wait = |figures: &Figures| or_infinite(quantile.of(figures).high);
            let reached = least(&|figures| keeps_requests(figures) && wait(figures) <= within, &|figures| {
                (0, figures.gpu_hours.middle, wait(figures), 0.0)
            });
            let closest =
                || least(&|_| true, &|figures| (wait(figures), figures.lost(), 0, figures.gpu_hours.middle));
            reached.map(Choice::Reached).or_else(|| closest().map(Choice::Closest))
        }
        Goal::GpuHours(hours) => {
            let costs = |figures: &Figures| figures.gpu_hours.middle * windows_per_month;
            let reached = least(&|figures| keeps_requests(figures) && costs(figures) <= hours, &|figures| {
                let (p99, p90) = (or_infinite(figures.p99_ms.middle), or_infinite(figures.p90_ms.middle));
                (p99, 0.0, p90, costs(figures))
            });
            let closest =
                || least(&|_| true, &|figures| (0, costs(figures), or_infinite(figures.p99_ms.middle), 0.0));
            reached.map(Choice::Reached).or_else(|| closest().map(Choice::Closest))
        }
    }
}

// === impl Quantile ===

impl Quantile {
    /// Returns the figure of this quantile.
    pub const fn of(self, figures: &Figures) -> SeedSpread<Option<u64>> {
        match self {
            Self::Median => figures.median_ms,
            Self::P90 => figures.p90_ms,
            Self::P99 => figures.p99_ms,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Median => "median",
            Self::P90 => "p90",
            Self::P99 => "p99",
        }
    }
}

// === impl Choice ===

impl Choice {
    pub const fn index(self) -> usize {
        match self {
            Self::Reached(index) | Self::Closest(index) => index,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: ReplaySettings = ReplaySettings {
        floor: 0,
        max_replicas: 1,
        idle: 0,
        poll: 1,
        concurrency: 8,
        hold_requests: 10,
        hold: 600_000,
        target: 5,
    };

    /// Builds a candidate with these GPU hours and waits in seconds.
    fn candidate(hours: f64, p90: u64, p99: Option<u64>, lost: f64) -> Candidate {
        let wait = |seconds: Option<u64>| SeedSpread {
            low: seconds.map(|seconds| seconds * 900),
            middle: seconds.map(|seconds| seconds * 1000),
            high: seconds.map(|seconds| seconds * 1100),
        };
        let hours = SeedSpread { low: hours, middle: hours, high: hours };
        let figures = Figures {
            serving_gpu_hours: 0.0,
            idle_gpu_hours: 0.0,
            cold_gpu_hours: 0.0,
            gpu_hours: hours,
            cold_starts: hours,
            met_cold: 0.0,
            timed_out: lost,
            refused: 0.0,
            median_ms: wait(Some(0)),
            p90_ms: wait(Some(p90)),
            p99_ms: wait(p99),
            longest_ms: 0,
            held_peak: 0,
            replicas_peak: 0,
        };
        Candidate { settings: BASE, figures, on_front: false }
    }

    #[test]
    fn wait_goal_picks_cheapest_or_closest() {
        let all = [
            candidate(10.0, 0, Some(200), 0.0),
            candidate(20.0, 0, Some(100), 0.0),
            candidate(30.0, 0, Some(50), 0.0),
            candidate(15.0, 0, Some(10), 0.02),
        ];
        let p99 = |seconds: u64| choose(&all, Goal::Wait(Quantile::P99, seconds * 1000), 0.01, 1.0).unwrap();
        assert_eq!(p99(300), Choice::Reached(0));
        assert_eq!(p99(110), Choice::Reached(1), "100 s, 110 s at the 95th percentile");
        assert_eq!(p99(109), Choice::Reached(2), "the 95th percentile exceeds it");
        assert_eq!(p99(54), Choice::Closest(3), "shortest wait, although it loses requests");
        assert_eq!(choose(&all, Goal::Wait(Quantile::P90, 0), 0.01, 1.0), Some(Choice::Reached(0)));
        assert_eq!(choose(&[], Goal::GpuHours(1.0), 0.0, 1.0), None);
    }

    #[test]
    fn monthly_budget_picks_shortest_wait() {
        let all = [
            candidate(10.0, 5, Some(200), 0.0),
            candidate(20.0, 5, Some(100), 0.0),
            candidate(25.0, 4, None, 0.0),
        ];
        let budget = |hours: f64| choose(&all, Goal::GpuHours(hours), 0.001, 4.0).unwrap();
        assert_eq!(budget(80.0), Choice::Reached(1), "4 × 20 h");
        assert_eq!(budget(79.9), Choice::Reached(0));
        assert_eq!(budget(200.0), Choice::Reached(1), "`None` is an infinite wait");
        assert_eq!(budget(39.9), Choice::Closest(0), "the cheapest");
    }

    #[test]
    fn front_has_the_pareto_optimal_candidates() {
        let load = ReplayInput {
            arrivals: (0..20).map(|index| (index * 300_000, Some(1_000))).collect(),
            window: 6_000_000,
            service: Vec::new(),
            start_up: vec![60_000],
            gpus: 1,
        };
        let grid = SettingsGrid {
            base: BASE,
            floors: vec![0, 1],
            idle: vec![10_000, 200_000, 400_000],
            concurrency: vec![8],
            hold: vec![600_000],
            hold_requests: vec![10],
        };
        let settings = grid.settings();
        assert_eq!(
            settings.iter().map(|one| (one.floor, one.idle)).collect::<Vec<_>>(),
            [(0, 10_000), (0, 200_000), (0, 400_000), (1, u64::MAX)]
        );
        // A request every 300 s. Idle times of 10 s and 200 s stop the replica each time, and 200 s costs more. With 400 s
        // it stays up: one cold start, which is the p99 of 20 requests.
        let candidates = candidates(&load, &settings, &[1]);
        assert_eq!(
            candidates.iter().map(|one| (one.figures.cold_starts.middle, one.on_front)).collect::<Vec<_>>(),
            [(20.0, true), (20.0, false), (1.0, false), (0.0, true)],
            "one cold start has the same p99 as twenty"
        );
    }

    #[test]
    fn grid_has_every_combination_once() {
        let grid = SettingsGrid {
            base: BASE,
            floors: vec![0, 2],
            idle: vec![1, 2, 3],
            concurrency: vec![1, 2],
            hold: vec![1, 2],
            hold_requests: vec![1],
        };
        let settings = grid.settings();
        assert_eq!(settings.len(), 2 * 2 * (3 + 1));
        assert!(settings.iter().all(|one| one.max_replicas >= one.floor && one.max_replicas >= 1));
        assert_eq!(settings.iter().collect::<std::collections::HashSet<_>>().len(), settings.len());
    }
}
