//! Every setting replayed with every seed, and what that comes to.

use serde::Serialize;

use super::{
    draw::Draws,
    replay::{Arrival, Fate, Replayed, Settings, replay},
};

/// What is replayed.
#[derive(Clone, Debug)]
pub struct Load {
    /// When requests came, from the beginning of the window, in order; and how long they took, if that is known.
    pub arrivals: Vec<(u64, Option<u64>)>,
    /// The length of the window.
    pub window: u64,
    /// What is drawn for requests whose service time is not known. Not empty if there are any.
    pub service: Vec<u64>,
    /// What start-ups are drawn from; not empty.
    pub start_up: Vec<u64>,
    /// GPUs of one replica.
    pub gpus: u32,
}

/// What a setting comes to. Waits are in milliseconds, and `None` is a request that was never served; GPU time is in
/// hours, all within the window.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// With a request in flight.
    pub serving_gpu_hours: f64,
    /// Ready, with nothing to do.
    pub idle_gpu_hours: f64,
    /// Being started.
    pub cold_gpu_hours: f64,
    /// All three.
    pub gpu_hours: Spread<f64>,
    /// Starts from zero.
    pub cold_starts: Spread<f64>,
    /// Share of the requests that found nothing ready.
    pub met_cold: f64,
    /// Share of the requests that waited as long as they may.
    pub timed_out: f64,
    /// Share of the requests that were refused.
    pub refused: f64,
    /// The wait of the median request until it is sent to a replica. One that is lost waits for ever.
    pub median_ms: Spread<Option<u64>>,
    /// The wait that nine of ten do not exceed.
    pub p90_ms: Spread<Option<u64>>,
    /// The wait that 99 of 100 do not exceed.
    pub p99_ms: Spread<Option<u64>>,
    /// The longest wait of one that was served.
    pub longest_ms: u64,
    /// The most that were held at once.
    pub held_peak: usize,
    /// The most replicas that there were at once.
    pub replicas_peak: u32,
}

/// A figure over the seeds: the middle one, and what nine of ten lie between.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread<T> {
    /// One of twenty is below.
    pub low: T,
    /// Half of them are below.
    pub middle: T,
    /// One of twenty is above.
    pub high: T,
}

/// One replay in figures.
struct One {
    replayed: Replayed,
    served: Vec<u64>,
    timed_out: usize,
    refused: usize,
}

// === impl Load ===

impl Load {
    /// Whether chance has no part in it, so that one seed says all.
    pub fn is_certain(&self) -> bool {
        let one = |samples: &[u64]| samples.windows(2).all(|pair| pair[0] == pair[1]);
        one(&self.start_up)
            && (one(&self.service) || self.arrivals.iter().all(|(_, service)| service.is_some()))
    }

    /// Replays `settings` with each of the seeds, of which there is at least one.
    pub fn figures(&self, settings: &Settings, seeds: &[u64]) -> Figures {
        let all: Vec<_> = seeds.iter().map(|seed| One::of(self.replayed(settings, *seed))).collect();
        self.sum_up(&all)
    }

    fn replayed(&self, settings: &Settings, seed: u64) -> Replayed {
        let service = Draws::new(!seed, &self.service);
        let drawn = |index: usize| service.of(index as u64, 0);
        let arrivals = self.arrivals.iter().enumerate();
        let arrivals: Vec<_> = arrivals
            .map(|(index, (at, known))| Arrival { at: *at, service: known.unwrap_or_else(|| drawn(index)) })
            .collect();
        let start_up = Draws::new(seed, &self.start_up);
        replay(&arrivals, self.window, settings, |at, nth| start_up.of(at, nth))
    }

    fn sum_up(&self, all: &[One]) -> Figures {
        let hours = |ms: u64| ms as f64 / 3.6e6 * f64::from(self.gpus);
        let mean = |figure: &dyn Fn(&One) -> f64| all.iter().map(figure).sum::<f64>() / all.len() as f64;
        let requests = self.arrivals.len().max(1) as f64;
        let wait = |share: f64| Spread::of(all.iter().map(|one| one.wait(share)), cmp_wait);
        Figures {
            serving_gpu_hours: mean(&|one| hours(one.replayed.gpu.serving)),
            idle_gpu_hours: mean(&|one| hours(one.replayed.gpu.idle)),
            cold_gpu_hours: mean(&|one| hours(one.replayed.gpu.cold)),
            gpu_hours: Spread::of(all.iter().map(|one| hours(one.replayed.gpu.total())), f64::total_cmp),
            cold_starts: Spread::of(all.iter().map(|one| one.replayed.cold_starts as f64), f64::total_cmp),
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

/// Never is the longest wait.
pub fn cmp_wait(one: &Option<u64>, other: &Option<u64>) -> std::cmp::Ordering {
    one.unwrap_or(u64::MAX).cmp(&other.unwrap_or(u64::MAX))
}

// === impl Figures ===

impl Figures {
    /// Share of the requests that were not served.
    pub fn lost(&self) -> f64 {
        self.timed_out + self.refused
    }
}

// === impl Spread ===

impl<T: Copy> Spread<T> {
    fn of(values: impl Iterator<Item = T>, order: impl Fn(&T, &T) -> std::cmp::Ordering) -> Self {
        let mut values: Vec<T> = values.collect();
        values.sort_by(order);
        let at = |share: f64| values[rank(share, values.len())];
        Self { low: at(0.05), middle: at(0.5), high: at(0.95) }
    }
}

/// The index of the value that this share of `count` values does not exceed. `count` is not zero.
fn rank(share: f64, count: usize) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to count")]
    let rank = (share * count as f64).ceil() as usize;
    rank.clamp(1, count) - 1
}

// === impl One ===

impl One {
    fn of(replayed: Replayed) -> Self {
        let served = replayed.fates.iter().filter_map(|fate| match fate {
            Fate::Served(waited) => Some(*waited),
            Fate::TimedOut | Fate::Refused => None,
        });
        let mut served: Vec<_> = served.collect();
        served.sort_unstable();
        let count = |wanted: Fate| replayed.fates.iter().filter(|fate| **fate == wanted).count();
        Self { served, timed_out: count(Fate::TimedOut), refused: count(Fate::Refused), replayed }
    }

    /// The wait that this share of the requests does not exceed; `None`: too many were never served.
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

    const SETTINGS: Settings = Settings {
        floor: 0,
        max_replicas: 1,
        idle: 60_000,
        poll: 1,
        concurrency: 1,
        hold_requests: 10,
        hold: 100_000,
        target: 5,
    };

    fn load() -> Load {
        // One an hour, ten times, of a minute each.
        let arrivals = (0..10).map(|hour| (hour * 3_600_000, Some(60_000))).collect();
        Load { arrivals, window: 36_000_000, service: Vec::new(), start_up: vec![60_000], gpus: 2 }
    }

    #[test]
    fn the_figures_of_ten_requests_by_hand() {
        let load = load();
        assert!(load.is_certain());
        let figures = load.figures(&SETTINGS, &[1]);
        // Each time a minute of starting, one of serving and one of being idle, with two GPUs: 10 × 2 ÷ 60 h.
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
    fn who_is_lost_waits_for_ever() {
        let impatient = Settings { hold: 59_999, ..SETTINGS };
        let figures = load().figures(&impatient, &[1]);
        assert_eq!((figures.timed_out, figures.median_ms.middle), (1.0, None));
        // Of ten, one comes in a burst and finds no room: the worst of ten is what p99 is about, and p90 is the ninth.
        let mut load = load();
        load.arrivals[1].0 = 1;
        let one = Settings { hold_requests: 1, ..SETTINGS };
        let figures = load.figures(&one, &[1]);
        assert_eq!(
            (figures.refused, figures.p90_ms.middle, figures.p99_ms.middle),
            (0.1, Some(60_000), None)
        );
    }

    #[test]
    fn seeds_spread_what_chance_has_a_part_in() {
        let mut load = load();
        load.start_up = vec![10_000, 90_000];
        assert!(!load.is_certain());
        let seeds: Vec<u64> = (0..20).collect();
        let figures = load.figures(&SETTINGS, &seeds);
        // A mean of ten draws of 10 s and 90 s is between both; its extremes are what single waits are.
        assert!(figures.gpu_hours.low < figures.gpu_hours.high);
        assert_eq!(figures.p99_ms.middle, Some(90_000));
        assert_eq!(load.figures(&SETTINGS, &seeds), figures, "the same every time");
        load.arrivals[0].1 = None;
        load.service = vec![1, 1];
        load.start_up = vec![5];
        assert!(load.is_certain());
        load.service = vec![1, 2];
        assert!(!load.is_certain());
    }

    #[test]
    fn ranks_are_those_of_the_nearest() {
        assert_eq!(
            [rank(0.5, 10), rank(0.9, 10), rank(0.99, 10), rank(0.05, 20), rank(0.95, 20)],
            [4, 8, 9, 0, 18]
        );
        assert_eq!([rank(0.05, 1), rank(0.99, 1)], [0, 0]);
    }
}
