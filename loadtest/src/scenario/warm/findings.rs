//! Results of the warm scenario, its aims, and notes that qualify the figures.

use serde::Serialize;

use super::series::{LoadMode, WarmSeries};
use crate::contender::Contender;
use crate::findings::{Criterion, Findings, Table, noise, plural, thousands};
use crate::spread::Spread;

/// Minimum throughput of the direct connection, as a multiple of the fastest proxy's.
const HEADROOM: f64 = 1.5;
/// Share of its core that a proxy must use for its throughput to be meaningful.
const MIN_PROXY_BUSY: f64 = 0.95;

/// Share of the load test's core above which the load test itself may be the limit.
const MAX_RIG_CORE_SHARE: f64 = 0.95;
/// Minimum share of the schedule for it to count as kept.
const MIN_SCHEDULE_SHARE: f64 = 0.98;

const HEADER: [&str; 11] = [
    "contender",
    "requests/s (min–max)",
    "× haproxy",
    "× envoy",
    "p50 µs",
    "added µs",
    "p99 µs",
    "p99.9 µs",
    "CPU s/100k (min–max)",
    "busy",
    "rig busy",
];

const LEGEND: &str = "added: median latency beyond direct's; busy: of its core, the contender's process; rig busy: of \
                      the other core, the clients and the backend";

/// Builds the findings of a run.
pub(crate) fn findings(how: String, series: &[WarmSeries]) -> Findings {
    let lines: Vec<WarmResult> = series.iter().map(|each| WarmResult::new(each, series)).collect();
    let tables = lines
        .chunk_by(|one, next| alike(&one.series, &next.series))
        .map(|group| Table {
            title: title(&group[0].series),
            header: HEADER.map(str::to_owned).into(),
            rows: group.iter().map(|line| row(line).into()).collect(),
            legend: Some(LEGEND),
        })
        .collect();
    Findings {
        scenario: "warm",
        how,
        tables,
        results: serde_json::to_value(&lines).unwrap_or_default(),
        aims: aims(series),
        notes: notes(series),
    }
}

/// One contender with one number of connections.
#[derive(Debug, Serialize)]
struct WarmResult {
    pub(crate) requests_per_second: Spread,
    pub(crate) p50_us: Spread,
    pub(crate) p99_us: Spread,
    pub(crate) p999_us: Spread,
    pub(crate) cpu_per_100k: Option<Spread>,
    pub(crate) busy: Option<Spread>,
    pub(crate) rig_busy: Spread,
    pub(crate) others: Spread,
    pub(crate) times_haproxy: Option<Spread>,
    pub(crate) times_envoy: Option<Spread>,
    /// Median latency minus that of the direct connection.
    pub(crate) added_p50_us: Option<Spread>,
    #[serde(flatten)]
    pub(crate) series: WarmSeries,
}

// === impl WarmResult ===

impl WarmResult {
    fn new(series: &WarmSeries, all: &[WarmSeries]) -> Self {
        let other = |contender| find(all, contender, series);
        Self {
            requests_per_second: series.spread(|round| round.requests_per_second),
            p50_us: series.spread(|round| round.p50_us),
            p99_us: series.spread(|round| round.p99_us),
            p999_us: series.spread(|round| round.p999_us),
            cpu_per_100k: series.spread_of(|round| round.cpu_per_100k),
            busy: series.spread_of(|round| round.busy),
            rig_busy: series.spread(|round| round.rig_busy),
            others: series.spread(|round| round.others),
            times_haproxy: other(Contender::Haproxy).and_then(|haproxy| series.times(haproxy)),
            times_envoy: other(Contender::Envoy).and_then(|envoy| series.times(envoy)),
            added_p50_us: other(Contender::Direct).and_then(|direct| series.added(direct)),
            series: series.clone(),
        }
    }
}

/// Returns the contender's series in the same table as `like`.
fn find<'a>(all: &'a [WarmSeries], contender: Contender, like: &WarmSeries) -> Option<&'a WarmSeries> {
    all.iter().find(|series| series.contender == contender && alike(series, like))
}

/// Returns `true` if the series differ only in the contender.
fn alike(one: &WarmSeries, other: &WarmSeries) -> bool {
    (one.way, one.connections) == (other.way, other.connections)
}

fn aims(all: &[WarmSeries]) -> Vec<Criterion> {
    let mut aims = Vec::new();
    for series in all {
        let &WarmSeries { contender, way, connections, .. } = series;
        if !matches!(contender, Contender::Anteroom | Contender::AnteroomNoscan) || way != LoadMode::Closed {
            continue;
        }
        let who = format!("{}, {}", contender.name(), title(series));
        let mut aim =
            |make: fn(String, &'static str, f64, f64) -> Criterion, what, limit, measured: Option<Spread>| {
                aims.extend(measured.map(|measured| make(who.clone(), what, limit, measured.median)));
            };
        let other = |contender| find(all, contender, series);
        let (haproxy, envoy) = (other(Contender::Haproxy), other(Contender::Envoy));
        if connections > 1 {
            let times = |other: Option<&WarmSeries>| other.and_then(|other| series.times(other));
            aim(Criterion::at_least, "times Envoy's throughput, at least", 2.0, times(envoy));
            aim(Criterion::at_least, "times HAProxy's throughput, at least", 0.7, times(haproxy));
        } else if let (Some(haproxy), Some(direct)) = (haproxy, other(Contender::Direct)) {
            let added = Spread::of(series.rounds.iter().zip(&haproxy.rounds).zip(&direct.rounds).map(
                |((ours, haproxy), direct)| (ours.p50_us - direct.p50_us) / (haproxy.p50_us - direct.p50_us),
            ));
            aim(Criterion::at_most, "times HAProxy's added median latency, at most", 1.2, added);
        }
    }
    aims
}

fn notes(all: &[WarmSeries]) -> Vec<String> {
    let mut notes = Vec::new();
    notes.extend(all.chunk_by(alike).filter(|group| group[0].way == LoadMode::Closed).filter_map(headroom));
    for series in all {
        let name = series.contender.name();
        let at = format!("{name}, {}", title(series));
        let full = !matches!(series.way, LoadMode::Open { .. })
            && (series.way, series.connections) != (LoadMode::Closed, 1);
        if let Some(busy) = series.spread_of(|round| round.busy)
            && full
            && busy.median < MIN_PROXY_BUSY
        {
            notes.push(format!(
                "{at}: its core was only {:.0} % busy with it, so this is not its limit",
                busy.median * 100.0
            ));
        }
        let rig = series.spread(|round| round.rig_busy).median;
        if matches!(series.way, LoadMode::H2 { .. }) && rig > MAX_RIG_CORE_SHARE {
            notes.push(format!(
                "{at}: the load test's own core was {:.0} % busy, so it may be the limit",
                rig * 100.0
            ));
        }
        let kept = series.spread(|round| round.requests_per_second).median;
        if let LoadMode::Open { rate } = series.way
            && kept < f64::from(rate) * MIN_SCHEDULE_SHARE
        {
            notes.push(format!("{at}: only {} answers/s", thousands(kept)));
        }
        let reconnects: u64 = series.rounds.iter().map(|round| round.reconnects).sum();
        if reconnects > 0 {
            notes.push(format!(
                "{at}: {reconnects} new connections to the backend, so it does not keep them all"
            ));
        }
    }
    notes.extend(noise(all.iter().map(|series| {
        let at = format!("{}, {}", series.contender.name(), title(series));
        (at, series.spread(|round| round.others).max)
    })));
    notes
}

/// Returns a note unless the load test was fast enough not to be the limit.
fn headroom(all: &[WarmSeries]) -> Option<String> {
    let rate = |series: &WarmSeries| series.spread(|round| round.requests_per_second).median;
    let best = all
        .iter()
        .filter(|series| series.contender != Contender::Direct)
        .max_by(|one, other| rate(one).total_cmp(&rate(other)))?;
    let connections = title(best);
    let Some(direct) = find(all, Contender::Direct, best) else {
        return Some(format!("{connections}: without direct the load test's own limit is unknown"));
    };
    let times = direct.times(best)?.median;
    let busy = best.spread_of(|round| round.busy)?.median * 100.0;
    let rig = best.spread(|round| round.rig_busy).median * 100.0;
    let name = best.contender.name();
    (times < HEADROOM).then(|| {
        format!(
            "{connections}: direct is only {times:.2} × {name}, less than {HEADROOM}, so the load test \
             itself may be the limit; with {name} its core was {rig:.0} % busy, {name}'s {busy:.0} %"
        )
    })
}

fn title(series: &WarmSeries) -> String {
    let connections = plural(series.connections, "connection");
    match series.way {
        LoadMode::Closed => connections,
        LoadMode::Open { rate } => {
            format!("open loop, {} requests/s by schedule on {connections}", thousands(rate.into()))
        }
        LoadMode::H2 { streams } => format!("HTTP/2, {streams} streams on each of {connections}"),
    }
}

fn row(line: &WarmResult) -> [String; 11] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let direct = line.series.contender == Contender::Direct;
    let times = |spread: Option<Spread>| or_dash(spread.map(|spread| format!("{:.2}", spread.median)));
    let rate = line.requests_per_second;
    [
        line.series.contender.name().to_owned(),
        format!("{} ({}–{})", thousands(rate.median), thousands(rate.min), thousands(rate.max)),
        times(line.times_haproxy),
        times(line.times_envoy),
        format!("{:.1}", line.p50_us.median),
        or_dash(line.added_p50_us.filter(|_| !direct).map(|added| format!("{:.1}", added.median))),
        format!("{:.1}", line.p99_us.median),
        format!("{:.1}", line.p999_us.median),
        or_dash(line.cpu_per_100k.map(|cpu| format!("{:.3} ({:.3}–{:.3})", cpu.median, cpu.min, cpu.max))),
        or_dash(line.busy.map(|busy| format!("{:.0} %", busy.median * 100.0))),
        format!("{:.0} %", line.rig_busy.median * 100.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::series::series;
    use super::*;

    #[test]
    fn aims_compare_anteroom_with_the_others() {
        let all = [
            series(Contender::Direct, 64, &[300.0]),
            series(Contender::Anteroom, 64, &[90.0]),
            series(Contender::Haproxy, 64, &[100.0]),
            series(Contender::Envoy, 64, &[50.0]),
        ];
        let met: Vec<_> = aims(&all).iter().map(|aim| (aim.limit, aim.met)).collect();
        assert_eq!(met, [(2.0, false), (0.7, true)]);
    }

    #[test]
    fn added_latency_excludes_the_direct_connection() {
        // 10 µs direct, 30 µs and 50 µs through proxies: 40 added against 20.
        let all = [
            series(Contender::Direct, 1, &[100_000.0]),
            series(Contender::AnteroomNoscan, 1, &[20_000.0]),
            series(Contender::Haproxy, 1, &[1e6 / 30.0]),
        ];
        let aims = aims(&all);
        assert!((aims[0].measured - 2.0).abs() < 1e-9 && !aims[0].met, "{aims:?}");
    }

    #[test]
    fn only_the_http_1_closed_loop_has_aims() {
        let mut all =
            vec![series(Contender::Anteroom, 64, &[100.0]), series(Contender::Haproxy, 64, &[100.0])];
        for way in [LoadMode::Open { rate: 10_000 }, LoadMode::H2 { streams: 16 }] {
            let ways: Vec<_> = all[..2].iter().map(|each| WarmSeries { way, ..each.clone() }).collect();
            all.extend(ways);
        }
        let found = findings("1 round".into(), &all);
        assert_eq!(found.aims.len(), 1, "{:?}", found.aims);
        let titles: Vec<_> = found.tables.iter().map(|table| table.title.as_str()).collect();
        assert_eq!(
            titles,
            [
                "64 connections",
                "open loop, 10,000 requests/s by schedule on 64 connections",
                "HTTP/2, 16 streams on each of 64 connections"
            ]
        );
        let kept = "anteroom, open loop, 10,000 requests/s by schedule on 64 connections: only 100 answers/s";
        assert!(found.notes.iter().any(|note| note == kept), "{:?}", found.notes);
    }

    #[test]
    fn a_table_has_every_contender() {
        let all = vec![
            series(Contender::Direct, 64, &[300_000.0, 310_000.0]),
            series(Contender::Anteroom, 64, &[90_000.0, 91_000.0]),
            series(Contender::Envoy, 64, &[30_000.0, 30_000.0]),
        ];
        let text = findings("2 rounds".into(), &all).to_string();
        assert!(text.contains("64 connections\n"), "{text}");
        assert!(text.contains("90,500 (90,000–91,000)"), "{text}");
        assert!(text.contains("3.02 times Envoy's throughput, at least 2: met"), "{text}");
        assert!(!text.contains("NOTE"), "{text}");
    }

    #[test]
    fn rig_limit_is_reported() {
        let slow = [series(Contender::Direct, 64, &[120.0]), series(Contender::Nginx, 64, &[100.0])];
        assert!(notes(&slow)[0].contains("direct is only 1.20 × nginx"));
        let fast = [series(Contender::Direct, 64, &[150.0]), series(Contender::Nginx, 64, &[100.0])];
        assert_eq!(notes(&fast), Vec::<String>::new());
        assert!(notes(&fast[1..])[0].contains("unknown"));
    }

    #[test]
    fn idle_noise_and_reconnects_are_reported() {
        let mut one = series(Contender::Nginx, 64, &[100.0]);
        one.rounds[0].busy = Some(0.8);
        one.rounds[0].others = 0.3;
        one.rounds[0].reconnects = 7;
        let notes = notes(&[series(Contender::Direct, 64, &[200.0]), one]);
        assert_eq!(notes.len(), 3, "{notes:?}");
    }
}
