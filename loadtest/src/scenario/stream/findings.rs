//! Cost of streams, delay of their events, and the aims for both.

use serde::Serialize;

use crate::clock;
use crate::contender::Contender;
use crate::findings::{Criterion, Findings, Table, noise, thousands};
use crate::generator::streams::StreamStats;
use crate::rig::Window;
use crate::spread::Spread;

/// Share of its core that a contender must use for its throughput to be meaningful.
const MIN_CONTENDER_BUSY: f64 = 0.95;
/// Share of the load test's core above which the load test itself may be the limit.
const MAX_RIG_BUSY: f64 = 0.95;
/// Minimum share of the pace for it to count as sustained.
const MIN_PACE_SHARE: f64 = 0.98;
/// Delay in µs of the load test's own writes above which the figures are blurred.
const MAX_WRITE_DELAY_US: f64 = 500.0;

const FULL: &str = "events/CPU s: of the contender's; × haproxy, × envoy: of events/CPU s; busy: of its core, the \
                    contender's process; rig busy: of the other core, the clients and the backend";
const PACED: &str = "from an event's write at the backend to its read at the client; gap p99: how much longer than at \
                     the backend it took from one event of a stream to the next; added: gap p99 beyond direct's; \
                     together: events that came in one read with the one before them; late p99: how late the backend \
                     wrote events";

/// Pacing of events in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Pacing {
    /// Each event as soon as its predecessor has arrived.
    Full,
    /// `rate` events per second.
    Paced { rate: u32 },
}

/// One round of one contender.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct StreamRound {
    events: u64,
    seconds: f64,
    events_per_second: f64,
    /// Events per CPU second of the contender.
    events_per_cpu_second: Option<f64>,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    gap_p99_us: f64,
    together: u64,
    late_p99_us: f64,
    busy: Option<f64>,
    rig_busy: f64,
    others: f64,
}

/// All rounds of one contender with one pacing.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct StreamSeries {
    pub(crate) contender: Contender,
    pub(crate) way: Pacing,
    pub(crate) rounds: Vec<StreamRound>,
}

// === impl StreamRound ===

impl StreamRound {
    /// Creates a round; `late` is in nanoseconds.
    pub(crate) fn new(
        contender: Contender,
        events: u64,
        window: &Window,
        seen: &StreamStats,
        late: u64,
    ) -> Self {
        let seconds = window.elapsed.as_secs_f64();
        let cpu = (contender != Contender::Direct).then_some(window.spent.contender.as_secs_f64());
        let latency = |q| micros(seen.events.latency.value_at_quantile(q));
        Self {
            events,
            seconds,
            events_per_second: events as f64 / seconds,
            events_per_cpu_second: cpu.map(|cpu| events as f64 / cpu),
            p50_us: latency(0.5),
            p99_us: latency(0.99),
            p999_us: latency(0.999),
            gap_p99_us: micros(seen.stretch.value_at_quantile(0.99)),
            together: seen.together,
            late_p99_us: micros(late),
            busy: cpu.map(|cpu| cpu / seconds),
            rig_busy: 1.0 - window.idle.as_secs_f64() / seconds,
            others: window.spent.others.as_secs_f64() / seconds,
        }
    }
}

fn micros(nanos: u64) -> f64 {
    clock::between(0, nanos).as_secs_f64() * 1e6
}

// === impl StreamSeries ===

impl StreamSeries {
    fn spread(&self, figure: impl Fn(&StreamRound) -> f64) -> Spread {
        Spread::of(self.rounds.iter().map(figure)).unwrap_or_default()
    }

    fn spread_of(&self, figure: impl Fn(&StreamRound) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(figure))
    }

    /// Compares round by round: a temporary slowdown of the machine affects both.
    fn paired(
        &self,
        other: &Self,
        figure: impl Fn(&StreamRound, &StreamRound) -> Option<f64>,
    ) -> Option<Spread> {
        Spread::of(self.rounds.iter().zip(&other.rounds).filter_map(|(ours, theirs)| figure(ours, theirs)))
    }

    /// Returns the events per CPU second as a multiple of the other's.
    fn times(&self, other: &Self) -> Option<Spread> {
        self.paired(other, |ours, theirs| Some(ours.events_per_cpu_second? / theirs.events_per_cpu_second?))
    }

    /// Returns the difference of the gap p99 to the other's, in µs.
    fn added(&self, other: &Self) -> Option<Spread> {
        self.paired(other, |ours, theirs| Some(ours.gap_p99_us - theirs.gap_p99_us))
    }

    fn is_anteroom(&self) -> bool {
        matches!(self.contender, Contender::Anteroom | Contender::AnteroomNoscan)
    }
}

/// Builds the findings of a run.
pub(crate) fn findings(how: String, streams: usize, series: &[StreamSeries]) -> Findings {
    let tables = series
        .chunk_by(|one, next| one.way == next.way)
        .map(|group| match group[0].way {
            Pacing::Full => full(group),
            Pacing::Paced { rate } => paced(group, rate),
        })
        .collect();
    Findings {
        scenario: "stream",
        how,
        tables,
        results: serde_json::to_value(series).unwrap_or_default(),
        aims: aims(streams, series),
        notes: notes(streams, series),
    }
}

fn find(all: &[StreamSeries], contender: Contender, way: Pacing) -> Option<&StreamSeries> {
    all.iter().find(|series| series.contender == contender && series.way == way)
}

fn full(group: &[StreamSeries]) -> Table {
    let times = |series: &StreamSeries, other| {
        let other = find(group, other, Pacing::Full);
        or_dash(other.and_then(|other| series.times(other)).map(|times| format!("{:.2}", times.median)))
    };
    let row = |series: &StreamSeries| {
        vec![
            series.contender.name().to_owned(),
            range(series.spread(|round| round.events_per_second)),
            or_dash(series.spread_of(|round| round.events_per_cpu_second).map(range)),
            times(series, Contender::Haproxy),
            times(series, Contender::Envoy),
            percent(series.spread_of(|round| round.busy)),
            percent(Some(series.spread(|round| round.rig_busy))),
        ]
    };
    let header = [
        "contender",
        "events/s (min–max)",
        "events/CPU s (min–max)",
        "× haproxy",
        "× envoy",
        "busy",
        "rig busy",
    ];
    Table {
        title: "at full speed: one event in flight in every stream".into(),
        header: header.map(str::to_owned).into(),
        rows: group.iter().map(row).collect(),
        legend: Some(FULL),
    }
}

fn paced(group: &[StreamSeries], rate: u32) -> Table {
    let direct = find(group, Contender::Direct, Pacing::Paced { rate });
    let row = |series: &StreamSeries| {
        let median = |figure: fn(&StreamRound) -> f64| format!("{:.0}", series.spread(figure).median);
        let added =
            direct.filter(|_| series.contender != Contender::Direct).and_then(|direct| series.added(direct));
        vec![
            series.contender.name().to_owned(),
            thousands(series.spread(|round| round.events_per_second).median),
            median(|round| round.p50_us),
            median(|round| round.p99_us),
            median(|round| round.p999_us),
            median(|round| round.gap_p99_us),
            or_dash(added.map(|added| format!("{:.0} ({:.0}–{:.0})", added.median, added.min, added.max))),
            together(series).to_string(),
            or_dash(series.spread_of(|round| round.events_per_cpu_second).map(|rate| thousands(rate.median))),
            percent(series.spread_of(|round| round.busy)),
            percent(Some(series.spread(|round| round.rig_busy))),
            median(|round| round.late_p99_us),
        ]
    };
    let header = [
        "contender",
        "events/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "gap p99 µs",
        "added µs (min–max)",
        "together",
        "events/CPU s",
        "busy",
        "rig busy",
        "late p99 µs",
    ];
    Table {
        title: format!("{rate} events/s in every stream"),
        header: header.map(str::to_owned).into(),
        rows: group.iter().map(row).collect(),
        legend: Some(PACED),
    }
}

fn aims(streams: usize, all: &[StreamSeries]) -> Vec<Criterion> {
    let mut aims = Vec::new();
    for series in all.iter().filter(|series| series.is_anteroom()) {
        let name = series.contender.name();
        let other = |contender| find(all, contender, series.way);
        match series.way {
            Pacing::Full => {
                let times = |contender| other(contender).and_then(|other| series.times(other));
                let limits = [
                    (Contender::Envoy, "times Envoy's events per CPU second, at least", 2.0),
                    (Contender::Haproxy, "times HAProxy's events per CPU second, at least", 0.7),
                ];
                for (contender, what, limit) in limits {
                    aims.extend(
                        times(contender).map(|times| Criterion::at_least(name, what, limit, times.median)),
                    );
                }
            }
            Pacing::Paced { rate } => {
                // If the contender does not sustain the pace, events queue behind each other; a note replaces the aims.
                if !keeps(streams, series, rate) {
                    continue;
                }
                let who = format!("{name}, {rate} events/s in every stream");
                if let Some(added) = other(Contender::Direct).and_then(|direct| series.added(direct)) {
                    let what = "ms added to the time between two events (p99), at most";
                    aims.push(Criterion::at_most(&who, what, 1.0, added.median / 1e3));
                }
                let what = "events that waited for another one of their stream, at most";
                aims.push(Criterion::at_most(&who, what, 0.0, together(series) as f64));
            }
        }
    }
    aims
}

/// Returns `true` if events arrive at the rate they are written.
fn keeps(streams: usize, series: &StreamSeries, rate: u32) -> bool {
    series.spread(|round| round.events_per_second).median >= f64::from(rate) * streams as f64 * MIN_PACE_SHARE
}

fn together(series: &StreamSeries) -> u64 {
    series.rounds.iter().map(|round| round.together).sum()
}

fn notes(streams: usize, all: &[StreamSeries]) -> Vec<String> {
    let mut notes = Vec::new();
    for series in all {
        let at = at(series);
        let direct = series.contender == Contender::Direct;
        let (busy, rig) =
            (series.spread_of(|round| round.busy), series.spread(|round| round.rig_busy).median);
        match series.way {
            Pacing::Full => {
                if let Some(busy) = busy.filter(|busy| busy.median < MIN_CONTENDER_BUSY) {
                    notes.push(format!(
                        "{at}: its core was only {:.0} % busy with it, so this is not its limit",
                        busy.median * 100.0
                    ));
                }
            }
            Pacing::Paced { rate } => {
                if !keeps(streams, series, rate) {
                    let offered = thousands(f64::from(rate) * streams as f64);
                    let kept = thousands(series.spread(|round| round.events_per_second).median);
                    notes.push(format!(
                        "{at}: only {kept} of {offered} events/s came through in time, so its delays are those of an \
                         overload"
                    ));
                }
                let late = series.spread(|round| round.late_p99_us).median;
                if late > MAX_WRITE_DELAY_US {
                    notes
                        .push(format!("{at}: the load test itself wrote events late, by {late:.0} µs (p99)"));
                }
            }
        }
        if rig > MAX_RIG_BUSY && !(direct && series.way == Pacing::Full) {
            notes.push(format!(
                "{at}: the load test's own core was {:.0} % busy, so it may be the limit",
                rig * 100.0
            ));
        }
    }
    notes.extend(noise(all.iter().map(|series| (at(series), series.spread(|round| round.others).max))));
    notes
}

fn at(series: &StreamSeries) -> String {
    let name = series.contender.name();
    match series.way {
        Pacing::Full => format!("{name}, at full speed"),
        Pacing::Paced { rate } => format!("{name}, {rate} events/s in every stream"),
    }
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

fn range(spread: Spread) -> String {
    format!("{} ({}–{})", thousands(spread.median), thousands(spread.min), thousands(spread.max))
}

fn percent(spread: Option<Spread>) -> String {
    or_dash(spread.map(|spread| format!("{:.0} %", spread.median * 100.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(contender: Contender, way: Pacing, per_cpu_second: f64, gap_p99_us: f64) -> StreamSeries {
        let cpu = (contender != Contender::Direct).then_some(1.0);
        let phase = StreamRound {
            events: 1000,
            seconds: 1.0,
            events_per_second: per_cpu_second,
            events_per_cpu_second: cpu.map(|_| per_cpu_second),
            p50_us: 50.0,
            p99_us: 90.0,
            p999_us: 99.0,
            gap_p99_us,
            together: 0,
            late_p99_us: 3.0,
            busy: cpu,
            rig_busy: 0.5,
            others: 0.0,
        };
        StreamSeries { contender, way, rounds: vec![phase] }
    }

    #[test]
    fn throughput_and_delay_have_their_own_baselines() {
        let pace = Pacing::Paced { rate: 10 };
        let all = [
            series(Contender::Anteroom, Pacing::Full, 90_000.0, 0.0),
            series(Contender::Haproxy, Pacing::Full, 100_000.0, 0.0),
            series(Contender::Envoy, Pacing::Full, 50_000.0, 0.0),
            series(Contender::Direct, pace, 20_000.0, 20.0),
            series(Contender::Anteroom, pace, 20_000.0, 1030.0),
        ];
        let measured: Vec<_> =
            aims(2000, &all).iter().map(|aim| (aim.limit, aim.measured, aim.met)).collect();
        assert_eq!(measured, [(2.0, 1.8, false), (0.7, 0.9, true), (1.0, 1.01, false), (0.0, 0.0, true)]);
        let text = findings("1 round".into(), 2000, &all).to_string();
        assert!(text.contains("1010 (1010–1010)") && !text.contains("NOTE"), "{text}");
    }

    #[test]
    fn blurred_figures_are_reported() {
        let pace = Pacing::Paced { rate: 50 };
        let mut slow = series(Contender::Envoy, pace, 80_000.0, 0.0);
        slow.rounds[0].late_p99_us = 600.0;
        slow.rounds[0].rig_busy = 0.99;
        slow.rounds[0].others = 0.2;
        let mut idle = series(Contender::Nginx, Pacing::Full, 80_000.0, 0.0);
        idle.rounds[0].busy = Some(0.5);
        let notes = notes(2000, &[slow, idle]);
        assert_eq!(notes.len(), 5, "{notes:?}");
        assert!(notes[0].contains("only 80,000 of 100,000 events/s"), "{notes:?}");
    }

    #[test]
    fn overload_has_a_note_instead_of_aims() {
        let all = [series(Contender::Anteroom, Pacing::Paced { rate: 50 }, 90_000.0, 0.0)];
        assert_eq!(aims(2000, &all), []);
        assert!(notes(2000, &all)[0].contains("only 90,000 of 100,000 events/s"));
    }

    #[test]
    fn events_that_waited_for_another_are_a_miss() {
        let mut late = series(Contender::Anteroom, Pacing::Paced { rate: 10 }, 20_000.0, 0.0);
        late.rounds[0].together = 1;
        assert!(!aims(2000, &[late])[0].met);
    }
}
