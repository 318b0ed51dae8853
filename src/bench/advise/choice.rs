//! Which settings are tried, and which of them is recommended.

use serde::Serialize;

use super::{
    grid::{Figures, Load, Spread, cmp_wait},
    replay::Settings,
};

/// A setting and what it comes to.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// What is set.
    pub settings: Settings,
    /// What comes of it.
    pub figures: Figures,
    /// Whether no other one is cheaper without a longer p99, or has a shorter p99 without being dearer.
    pub on_front: bool,
}

/// What is to be reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// A wait that may not be exceeded, for the least GPU time.
    Wait(Quantile, u64),
    /// GPU hours a month that may not be exceeded, for the least wait.
    GpuHours(f64),
}

/// Whose wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantile {
    /// That of the median request.
    Median,
    /// What nine of ten do not exceed.
    P90,
    /// What 99 of 100 do not exceed.
    P99,
}

/// What is recommended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This one reaches the goal.
    Reached(usize),
    /// None does; this one comes closest.
    Closest(usize),
}

/// Hours of a month: a twelfth of 365.25 days.
pub const MONTH: f64 = 730.5;

/// What is tried: every combination of these.
#[derive(Clone, Debug)]
pub struct Grid {
    /// What all have in common.
    pub base: Settings,
    /// Replicas that stay.
    pub floors: Vec<u32>,
    /// Times without a request, where the floor is zero.
    pub idle: Vec<u64>,
    /// `concurrency.max`.
    pub concurrency: Vec<u32>,
    /// `hold.timeout`.
    pub hold: Vec<u64>,
    /// `hold.maxRequests`.
    pub hold_requests: Vec<usize>,
}

// === impl Grid ===

impl Grid {
    /// All settings, in order. The idle time means nothing where the floor is not zero.
    pub fn settings(&self) -> Vec<Settings> {
        let mut all = Vec::new();
        for &concurrency in &self.concurrency {
            for &hold in &self.hold {
                for &hold_requests in &self.hold_requests {
                    let base = Settings { concurrency, hold, hold_requests, ..self.base };
                    for &floor in &self.floors {
                        let max_replicas = base.max_replicas.max(floor);
                        let idle = if floor == 0 { &self.idle[..] } else { &[u64::MAX] };
                        all.extend(idle.iter().map(|&idle| Settings { floor, max_replicas, idle, ..base }));
                    }
                }
            }
        }
        all
    }
}

/// Replays all settings.
pub fn candidates(load: &Load, settings: &[Settings], seeds: &[u64]) -> Vec<Candidate> {
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

/// What reaches the goal best, losing no larger share of the requests than `max_lost`. `month` is how many windows a
/// month has. A wait is only taken for kept if 19 of 20 seeds keep it.
pub fn choose(candidates: &[Candidate], goal: Goal, max_lost: f64, month: f64) -> Option<Choice> {
    let least = |wanted: &dyn Fn(&Figures) -> bool, key: &dyn Fn(&Figures) -> (u64, f64, u64, f64)| {
        let fitting = candidates.iter().enumerate().filter(|(_, candidate)| wanted(&candidate.figures));
        let key = |(_, candidate): &(usize, &Candidate)| key(&candidate.figures);
        let order = |(a, b, c, d): (u64, f64, u64, f64), other: (u64, f64, u64, f64)| {
            a.cmp(&other.0).then(b.total_cmp(&other.1)).then(c.cmp(&other.2)).then(d.total_cmp(&other.3))
        };
        fitting.min_by(|one, other| order(key(one), key(other))).map(|(index, _)| index)
    };
    let never = |wait: Option<u64>| wait.unwrap_or(u64::MAX);
    let keeps_requests = |figures: &Figures| figures.lost() <= max_lost;
    match goal {
        Goal::Wait(quantile, within) => {
            let wait = |figures: &Figures| never(quantile.of(figures).high);
            let reached = least(&|figures| keeps_requests(figures) && wait(figures) <= within, &|figures| {
                (0, figures.gpu_hours.middle, wait(figures), 0.0)
            });
            let closest =
                || least(&|_| true, &|figures| (wait(figures), figures.lost(), 0, figures.gpu_hours.middle));
            reached.map(Choice::Reached).or_else(|| closest().map(Choice::Closest))
        }
        Goal::GpuHours(hours) => {
            let costs = |figures: &Figures| figures.gpu_hours.middle * month;
            let reached = least(&|figures| keeps_requests(figures) && costs(figures) <= hours, &|figures| {
                let (p99, p90) = (never(figures.p99_ms.middle), never(figures.p90_ms.middle));
                (p99, 0.0, p90, costs(figures))
            });
            let closest =
                || least(&|_| true, &|figures| (0, costs(figures), never(figures.p99_ms.middle), 0.0));
            reached.map(Choice::Reached).or_else(|| closest().map(Choice::Closest))
        }
    }
}

// === impl Quantile ===

impl Quantile {
    /// Its figure.
    pub const fn of(self, figures: &Figures) -> Spread<Option<u64>> {
        match self {
            Self::Median => figures.median_ms,
            Self::P90 => figures.p90_ms,
            Self::P99 => figures.p99_ms,
        }
    }

    /// Its name.
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
    /// Which one it is.
    pub const fn index(self) -> usize {
        match self {
            Self::Reached(index) | Self::Closest(index) => index,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Settings = Settings {
        floor: 0,
        max_replicas: 1,
        idle: 0,
        poll: 1,
        concurrency: 8,
        hold_requests: 10,
        hold: 600_000,
        target: 5,
    };

    /// A candidate of so many GPU hours, with these waits in seconds.
    fn candidate(hours: f64, p90: u64, p99: Option<u64>, lost: f64) -> Candidate {
        let wait = |seconds: Option<u64>| Spread {
            low: seconds.map(|seconds| seconds * 900),
            middle: seconds.map(|seconds| seconds * 1000),
            high: seconds.map(|seconds| seconds * 1100),
        };
        let hours = Spread { low: hours, middle: hours, high: hours };
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
    fn the_cheapest_that_keeps_the_wait_is_chosen_or_the_one_that_waits_least() {
        let all = [
            candidate(10.0, 0, Some(200), 0.0),
            candidate(20.0, 0, Some(100), 0.0),
            candidate(30.0, 0, Some(50), 0.0),
            candidate(15.0, 0, Some(10), 0.02),
        ];
        let p99 = |seconds: u64| choose(&all, Goal::Wait(Quantile::P99, seconds * 1000), 0.01, 1.0).unwrap();
        assert_eq!(p99(300), Choice::Reached(0));
        assert_eq!(p99(110), Choice::Reached(1), "100 s, and 110 s in the worst of twenty");
        assert_eq!(p99(109), Choice::Reached(2), "one of twenty seeds would not keep it");
        assert_eq!(p99(54), Choice::Closest(3), "the one that waits least loses requests, and says so");
        assert_eq!(choose(&all, Goal::Wait(Quantile::P90, 0), 0.01, 1.0), Some(Choice::Reached(0)));
        assert_eq!(choose(&[], Goal::GpuHours(1.0), 0.0, 1.0), None);
    }

    #[test]
    fn the_budget_is_of_a_month_and_spent_on_the_shortest_wait() {
        let all = [
            candidate(10.0, 5, Some(200), 0.0),
            candidate(20.0, 5, Some(100), 0.0),
            candidate(25.0, 4, None, 0.0),
        ];
        let budget = |hours: f64| choose(&all, Goal::GpuHours(hours), 0.001, 4.0).unwrap();
        assert_eq!(budget(80.0), Choice::Reached(1), "4 × 20 h");
        assert_eq!(budget(79.9), Choice::Reached(0));
        assert_eq!(budget(200.0), Choice::Reached(1), "never is longer than any wait");
        assert_eq!(budget(39.9), Choice::Closest(0), "the cheapest");
    }

    #[test]
    fn the_front_has_what_nothing_beats_in_both() {
        let load = Load {
            arrivals: (0..20).map(|index| (index * 300_000, Some(1_000))).collect(),
            window: 6_000_000,
            service: Vec::new(),
            start_up: vec![60_000],
            gpus: 1,
        };
        let grid = Grid {
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
        // One every 5 minutes: after 10 s and after 200 s it has gone each time, and the longer one only costs more.
        // After 400 s it is still there: one cold start, which is in 20 requests the p99.
        let candidates = candidates(&load, &settings, &[1]);
        assert_eq!(
            candidates.iter().map(|one| (one.figures.cold_starts.middle, one.on_front)).collect::<Vec<_>>(),
            [(20.0, true), (20.0, false), (1.0, false), (0.0, true)],
            "the one cold start is as long as each of twenty"
        );
    }

    #[test]
    fn every_combination_is_tried_once() {
        let grid = Grid {
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
