//! Replays of settings over all seeds, and their statistics.

use serde::Serialize;

use super::{
    draw::SeededDraws,
    replay::{self, Arrival, ReplayOutcome, ReplaySettings, RequestFate},
};

/// Input of a replay. Times are in milliseconds.
#[derive(Clone, Debug)]
pub struct ReplayInput {
    /// Arrival times relative to the window, in order, with the durations if known.
    pub arrivals: Vec<(u64, Option<u64>)>,
    /// Length of the window.
    pub window: u64,
    /// Sample for unknown durations. Must not be empty if there are any.
    pub service: Vec<u64>,
    /// Sample of start-up times. Must not be empty.
    pub start_up: Vec<u64>,
    /// GPUs per replica.
    pub gpus: u32,
}

/// Statistics of a setting over all seeds. GPU time is counted within the window. A wait of `None` is infinite: the request
/// was lost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Ready, with requests in flight.
    pub serving_gpu_hours: f64,
    /// Ready, without requests.
    pub idle_gpu_hours: f64,
    /// Starting.
    pub cold_gpu_hours: f64,
    /// Sum of all three.
    pub gpu_hours: SeedSpread<f64>,
    /// Starts from zero.
    pub cold_starts: SeedSpread<f64>,
    /// Share of requests that arrived without a ready replica.
    pub met_cold: f64,
    /// Share of requests that exceeded the hold timeout.
    pub timed_out: f64,
    /// Share of requests rejected by a full hold queue.
    pub refused: f64,
    /// Median wait until dispatch to a replica.
    pub median_ms: SeedSpread<Option<u64>>,
    /// 90th percentile of the wait.
    pub p90_ms: SeedSpread<Option<u64>>,
    /// 99th percentile of the wait.
    pub p99_ms: SeedSpread<Option<u64>>,
    /// Longest wait of a served request.
    pub longest_ms: u64,
    /// Peak number of held requests.
    pub held_peak: usize,
    /// Peak number of replicas.
    pub replicas_peak: u32,
}

/// Distribution of a figure over the seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SeedSpread<T> {
    /// 5th percentile.
    pub low: T,
    /// Median.
    pub middle: T,
    /// 95th percentile.
    pub high: T,
}

/// One replay, evaluated.
struct EvaluatedReplay {
    replayed: ReplayOutcome,
    served: Vec<u64>,
    timed_out: usize,
    refused: usize,
}

// === impl ReplayInput ===

impl ReplayInput {
    /// Returns whether no draw is random, so that one seed suffices.
    pub fn is_deterministic(&self) -> bool {
        let one = |samples: &[u64]| samples.windows(2).all(|pair| pair[0] == pair[1]);
        one(&self.start_up)
            && (one(&self.service) || self.arrivals.iter().all(|(_, service)| service.is_some()))
    }

    /// Replays `settings` with each of the seeds, which must not be empty.
    pub fn figures(&self, settings: &ReplaySettings, seeds: &[u64]) -> Figures {
        let all: Vec<_> =
            seeds.iter().map(|seed| EvaluatedReplay::of(self.replay(settings, *seed))).collect();
        self.summarize(&all)
    }

    fn replay(&self, settings: &ReplaySettings, seed: u64) -> ReplayOutcome {
        let service = SeededDraws::new(!seed, &self.service);
        let drawn = |index: usize| service.draw(index as u64, 0);
        let arrivals = self.arrivals.iter().enumerate();
        let arrivals: Vec<_> = arrivals
            .map(|(index, (at, known))| Arrival { at: *at, service: known.unwrap_or_else(|| drawn(index)) })
            .collect();
        let start_up = SeededDraws::new(seed, &self.start_up);
        replay::replay(&arrivals, self.window, settings, |at, nth| start_up.draw(at, nth))
    }

    fn summarize(&self, all: &[EvaluatedReplay]) -> Figures {
        let hours = |ms: u64| ms as f64 / 3.6e6 * f64::from(self.gpus);
        let mean =
            |figure: &dyn Fn(&EvaluatedReplay) -> f64| all.iter().map(figure).sum::<f64>() / all.len() as f64;
        let requests = self.arrivals.len().max(1) as f64;
        let wait = |share: f64| SeedSpread::of(all.iter().map(|one| one.wait(share)), cmp_wait);
        Figures {
            serving_gpu_hours: mean(&|one| hours(one.replayed.gpu.serving)),
            idle_gpu_hours: mean(&|one| hours(one.replayed.gpu.idle)),
            cold_gpu_hours: mean(&|one| hours(one.replayed.gpu.cold)),
            gpu_hours: SeedSpread::of(all.iter().map(|one| hours(one.replayed.gpu.total())), f64::total_cmp),
            cold_starts: SeedSpread::of(
                all.iter().map(|one| one.replayed.cold_starts as f64),
                f64::total_cmp,
            ),
            met_cold: mean(&|one| one.replayed.met_cold as f64) / requests,
            timed_out: mean(&|one| one.timed_out as f64) / requests,
            refused: mean(&|one| one.refused as f64) / requests,
            median_ms: wait(0.5),
            p90_ms: wait(0.9),
            p99_ms: wait(0.99),
            longest_ms: all.iter().filter_map(|one| one.served.last().copied()).max().unwrap_or_default(),
            held_peak: all.iter().map(|one| one.replayed.held_peak).max().unwrap_or_default(),
            replicas_peak: all.iter().map(|one| one.replayed.replicas_peak).max().unwrap_or_default(),
        }
    }
}

/// Compares waits; `None` is infinite.
pub fn cmp_wait(one: &Option<u64>, other: &Option<u64>) -> std::cmp::Ordering {
    one.unwrap_or(u64::MAX).cmp(&other.unwrap_or(u64::MAX))
}

// === impl Figures ===

impl Figures {
    /// Returns the share of requests that were not served.
    pub fn lost(&self) -> f64 {
        self.timed_out + self.refused
    }
}

// === impl SeedSpread ===

impl<T: Copy> SeedSpread<T> {
    fn of(values: impl Iterator<Item = T>, order: impl Fn(&T, &T) -> std::cmp::Ordering) -> Self {
        let mut values: Vec<T> = values.collect();
        values.sort_by(order);
        let at = |share: f64| values[rank(share, values.len())];
        Self { low: at(0.05), middle: at(0.5), high: at(0.95) }
    }
}

/// Returns the index of a quantile by nearest rank. `count` must not be zero.
fn rank(share: f64, count: usize) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to count")]
    let rank = (share * count as f64).ceil() as usize;
    rank.clamp(1, count) - 1
}

// === impl EvaluatedReplay ===

impl EvaluatedReplay {
    fn of(replayed: ReplayOutcome) -> Self {
        let served = replayed.fates.iter().filter_map(|fate| match fate {
            RequestFate::Served(waited) => Some(*waited),
            RequestFate::TimedOut | RequestFate::Rejected => None,
        });
        let mut served: Vec<_> = served.collect();
        served.sort_unstable();
        let count = |wanted: RequestFate| replayed.fates.iter().filter(|fate| **fate == wanted).count();
        Self {
            served,
            timed_out: count(RequestFate::TimedOut),
            refused: count(RequestFate::Rejected),
            replayed,
        }
    }

    /// Returns a quantile of the wait.
    fn wait(&self, share: f64) -> Option<u64> {
        match self.replayed.fates.len() {
            0 => Some(0),
            count => self.served.get(rank(share, count)).copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: ReplaySettings = ReplaySettings {
        floor: 0,
        max_replicas: 1,
        idle: 60_000,
        poll: 1,
        concurrency: 1,
        hold_requests: 10,
        hold: 100_000,
        target: 5,
    };

    fn load() -> ReplayInput {
        // Ten requests of a minute each, one per hour.
        let arrivals = (0..10).map(|hour| (hour * 3_600_000, Some(60_000))).collect();
        ReplayInput { arrivals, window: 36_000_000, service: Vec::new(), start_up: vec![60_000], gpus: 2 }
    }

    #[test]
    fn figures_of_ten_requests() {
        let load = load();
        assert!(load.is_deterministic());
        let figures = load.figures(&SETTINGS, &[1]);
        // Each request: a minute starting, serving and idle each, on two GPUs: 10 × 2 ÷ 60 h.
        let third = 10.0 * 2.0 / 60.0;
        for hours in [figures.serving_gpu_hours, figures.idle_gpu_hours, figures.cold_gpu_hours] {
            assert!((hours - third).abs() < 1e-9, "{hours}");
        }
        assert!((figures.gpu_hours.middle - 1.0).abs() < 1e-9);
        assert_eq!((figures.cold_starts.middle, figures.met_cold, figures.lost()), (10.0, 1.0, 0.0));
        assert_eq!((figures.median_ms.middle, figures.p99_ms.high), (Some(60_000), Some(60_000)));
        assert_eq!((figures.held_peak, figures.longest_ms), (1, 60_000));
    }

    #[test]
    fn lost_request_has_an_infinite_wait() {
        let short_hold = ReplaySettings { hold: 59_999, ..SETTINGS };
        let figures = load().figures(&short_hold, &[1]);
        assert_eq!((figures.timed_out, figures.median_ms.middle), (1.0, None));
        // The second request finds the queue full. By nearest rank, p99 of ten is the worst and p90 the ninth.
        let mut load = load();
        load.arrivals[1].0 = 1;
        let one = ReplaySettings { hold_requests: 1, ..SETTINGS };
        let figures = load.figures(&one, &[1]);
        assert_eq!(
            (figures.refused, figures.p90_ms.middle, figures.p99_ms.middle),
            (0.1, Some(60_000), None)
        );
    }

    #[test]
    fn seeds_vary_only_random_figures() {
        let mut load = load();
        load.start_up = vec![10_000, 90_000];
        assert!(!load.is_deterministic());
        let seeds: Vec<u64> = (0..20).collect();
        let figures = load.figures(&SETTINGS, &seeds);
        // GPU hours vary with the mean of ten draws of 10 s or 90 s; p99 is the largest draw.
        assert!(figures.gpu_hours.low < figures.gpu_hours.high);
        assert_eq!(figures.p99_ms.middle, Some(90_000));
        assert_eq!(load.figures(&SETTINGS, &seeds), figures, "deterministic");
        load.arrivals[0].1 = None;
        load.service = vec![1, 1];
        load.start_up = vec![5];
        assert!(load.is_deterministic());
        load.service = vec![1, 2];
        assert!(!load.is_deterministic());
    }

    #[test]
    fn rank_is_the_nearest() {
        assert_eq!(
            [rank(0.5, 10), rank(0.9, 10), rank(0.99, 10), rank(0.05, 20), rank(0.95, 20)],
            [4, 8, 9, 0, 18]
        );
        assert_eq!([rank(0.05, 1), rank(0.99, 1)], [0, 0]);
    }
}
