//! Figures and ratios from the rounds of a run.

use serde::Serialize;

use crate::contender::Contender;
use crate::rig::Measurement;
use crate::spread::Spread;

/// One round of one contender.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WarmRound {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    pub(crate) requests_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// CPU seconds of the contender per 100,000 requests.
    pub(crate) cpu_per_100k: Option<f64>,
    /// Share of its core used by the contender.
    pub(crate) busy: Option<f64>,
    /// Share of the load test's core used by the clients and the backend.
    pub(crate) rig_busy: f64,
    /// Cores used by other processes, on our two cores.
    pub(crate) others: f64,
    pub(crate) reconnects: u64,
}

/// The way requests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LoadMode {
    /// Over HTTP/1.1, each connection in a closed loop.
    Closed,
    /// Over HTTP/1.1 on a schedule of `rate` requests per second.
    Open { rate: u32 },
    /// Over HTTP/2, in a closed loop with `streams` streams per connection.
    H2 { streams: usize },
}

/// All rounds of one contender with one number of connections.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WarmSeries {
    pub(crate) contender: Contender,
    pub(crate) way: LoadMode,
    pub(crate) connections: usize,
    pub(crate) rounds: Vec<WarmRound>,
}

// === impl WarmRound ===

impl WarmRound {
    pub(crate) fn new(sample: &Measurement, contender: Contender) -> Self {
        let seconds = sample.elapsed.as_secs_f64();
        let requests = sample.requests;
        let cpu = (contender != Contender::Direct).then_some(sample.spent.contender.as_secs_f64());
        let count = requests as f64;
        Self {
            requests,
            seconds,
            requests_per_second: count / seconds,
            p50_us: sample.p50.as_secs_f64() * 1e6,
            p99_us: sample.p99.as_secs_f64() * 1e6,
            p999_us: sample.p999.as_secs_f64() * 1e6,
            cpu_per_100k: cpu.map(|cpu| cpu * 1e5 / count),
            busy: cpu.map(|cpu| cpu / seconds),
            rig_busy: 1.0 - sample.idle.as_secs_f64() / seconds,
            others: sample.spent.others.as_secs_f64() / seconds,
            reconnects: sample.reconnects,
        }
    }
}

// === impl WarmSeries ===

impl WarmSeries {
    pub(crate) fn spread(&self, figure: impl Fn(&WarmRound) -> f64) -> Spread {
        Spread::of(self.rounds.iter().map(figure)).unwrap_or_default()
    }

    pub(crate) fn spread_of(&self, figure: impl Fn(&WarmRound) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(figure))
    }

    /// Applies `figure` to each round and the other's same round: a temporary slowdown of the machine affects both.
    pub(crate) fn paired(
        &self,
        other: &Self,
        figure: impl Fn(&WarmRound, &WarmRound) -> f64,
    ) -> Option<Spread> {
        Spread::of(self.rounds.iter().zip(&other.rounds).map(|(ours, theirs)| figure(ours, theirs)))
    }

    /// Returns the throughput as a multiple of the other's.
    pub(crate) fn times(&self, other: &Self) -> Option<Spread> {
        self.paired(other, |ours, theirs| ours.requests_per_second / theirs.requests_per_second)
    }

    /// Returns the difference in median latency to the other's, in µs.
    pub(crate) fn added(&self, other: &Self) -> Option<Spread> {
        self.paired(other, |ours, theirs| ours.p50_us - theirs.p50_us)
    }
}

/// Creates a series of made-up rounds, for tests of the evaluation.
#[cfg(test)]
pub(crate) fn series(contender: Contender, connections: usize, rates: &[f64]) -> WarmSeries {
    let cpu = (contender != Contender::Direct).then_some(1.0);
    let round = |rate: &f64| WarmRound {
        requests: 1000,
        seconds: 1.0,
        requests_per_second: *rate,
        p50_us: 1e6 / rate,
        p99_us: 2e6 / rate,
        p999_us: 3e6 / rate,
        cpu_per_100k: cpu,
        busy: cpu,
        rig_busy: 0.5,
        others: 0.0,
        reconnects: 0,
    };
    WarmSeries { contender, way: LoadMode::Closed, connections, rounds: rates.iter().map(round).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round() {
        let ours = series(Contender::Anteroom, 64, &[100.0, 50.0, 200.0]);
        let theirs = series(Contender::Envoy, 64, &[50.0, 25.0, 100.0]);
        let times = ours.times(&theirs).unwrap();
        assert_eq!(times, Spread { median: 2.0, min: 2.0, max: 2.0 });
    }
}
