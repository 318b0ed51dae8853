//! Cost of bodies, and the share of the scan.

use serde::Serialize;

use crate::contender::Contender;
use crate::findings::{Criterion, Findings, Table, noise, plural, thousands};
use crate::rig::Measurement;
use crate::spread::Spread;

/// Share of the load test's core above which the load test itself may be the limit.
const MAX_RIG_BUSY: f64 = 0.95;
/// Share of its core that a contender must use for its throughput to be meaningful.
const MIN_CONTENDER_BUSY: f64 = 0.95;

const LEGEND: &str = "CPU: of the contender's, for a request; × noscan: CPU beside Anteroom's without models, which \
                      passes bodies on as they come; busy: of its core, the contender's process; rig busy: of the \
                      other core, the clients and the backend";
const SCAN: &str = "refused, scanned: a body for a model that nobody serves, kept and scanned to its end; refused, \
                    kept: one whose first byte is wrong, kept and not scanned; scan: what they differ by; of a \
                    request: CPU with the scan beside CPU without it, the body kept in both";

/// Kind of body, by the way Anteroom handles it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum BodyKind {
    /// Forwarded to the backend.
    Forwarded,
    /// Buffered, scanned to its end, and rejected: no route has its model.
    Scanned,
    /// Buffered and rejected at the first byte: it is not an object.
    Kept,
}

/// One round of one contender with one body.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BodyRound {
    requests: u64,
    seconds: f64,
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// CPU time of the contender per request, in µs.
    cpu_us: Option<f64>,
    busy: Option<f64>,
    rig_busy: f64,
    others: f64,
}

/// All rounds of one contender with one body.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BodySeries {
    pub(super) contender: Contender,
    pub(super) kind: BodyKind,
    pub(super) bytes: usize,
    pub(super) connections: usize,
    pub(super) rounds: Vec<BodyRound>,
}

/// Cost of the scan.
#[derive(Debug, Serialize)]
struct ScanCost {
    bytes: usize,
    /// CPU time of a request: forwarded, rejected after the scan, rejected without a scan.
    forwarded_us: Spread,
    scanned_us: Spread,
    kept_us: Spread,
    scan_us: Spread,
    scan_us_per_kb: Spread,
    /// CPU time of a request with the scan, as a multiple of one without.
    times: Spread,
}

// === impl BodyRound ===

impl BodyRound {
    pub(crate) fn new(sample: &Measurement, contender: Contender) -> Self {
        let seconds = sample.elapsed.as_secs_f64();
        let cpu = (contender != Contender::Direct).then_some(sample.spent.contender.as_secs_f64());
        let count = sample.requests as f64;
        Self {
            requests: sample.requests,
            seconds,
            requests_per_second: count / seconds,
            p50_us: sample.p50.as_secs_f64() * 1e6,
            p99_us: sample.p99.as_secs_f64() * 1e6,
            cpu_us: cpu.map(|cpu| cpu * 1e6 / count),
            busy: cpu.map(|cpu| cpu / seconds),
            rig_busy: 1.0 - sample.idle.as_secs_f64() / seconds,
            others: sample.spent.others.as_secs_f64() / seconds,
        }
    }
}

// === impl BodySeries ===

impl BodySeries {
    pub(super) fn key(&self) -> (usize, BodyKind) {
        (self.bytes, self.kind)
    }

    fn spread(&self, figure: impl Fn(&BodyRound) -> f64) -> Spread {
        Spread::of(self.rounds.iter().map(figure)).unwrap_or_default()
    }

    fn spread_of(&self, figure: impl Fn(&BodyRound) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(figure))
    }

    /// Returns this series' CPU time per request as a multiple of the other's, round by round.
    fn times(&self, other: &Self) -> Option<Spread> {
        let rounds = self.rounds.iter().zip(&other.rounds);
        Spread::of(rounds.filter_map(|(ours, theirs)| Some(ours.cpu_us? / theirs.cpu_us?)))
    }
}

// === impl ScanCost ===

impl ScanCost {
    /// Returns `None` if Anteroom was not measured.
    fn new(all: &[BodySeries], bytes: usize) -> Option<Self> {
        let of = |kind| find(all, Contender::Anteroom, (bytes, kind));
        let [forwarded, scanned, kept] =
            [of(BodyKind::Forwarded)?, of(BodyKind::Scanned)?, of(BodyKind::Kept)?]
                .map(|series| &series.rounds);
        let rounds: Vec<[f64; 3]> = forwarded
            .iter()
            .zip(scanned)
            .zip(kept)
            .filter_map(|((forwarded, scanned), kept)| {
                Some([forwarded.cpu_us?, scanned.cpu_us?, kept.cpu_us?])
            })
            .collect();
        let of = |figure: fn([f64; 3]) -> f64| Spread::of(rounds.iter().map(|round| figure(*round)));
        let scan_us = of(|[_, scanned, kept]| scanned - kept)?;
        let kb = bytes as f64 / 1024.0;
        Some(Self {
            bytes,
            forwarded_us: of(|[forwarded, ..]| forwarded)?,
            scanned_us: of(|[_, scanned, _]| scanned)?,
            kept_us: of(|[.., kept]| kept)?,
            scan_us,
            scan_us_per_kb: Spread {
                median: scan_us.median / kb,
                min: scan_us.min / kb,
                max: scan_us.max / kb,
            },
            times: of(|[forwarded, scanned, kept]| forwarded / (forwarded - (scanned - kept)))?,
        })
    }
}

/// Builds the findings of a run.
pub(crate) fn findings(how: String, series: &[BodySeries]) -> Findings {
    let mut sizes: Vec<usize> = series.iter().map(|series| series.bytes).collect();
    sizes.dedup();
    let scans: Vec<ScanCost> = sizes.iter().filter_map(|bytes| ScanCost::new(series, *bytes)).collect();
    let mut tables: Vec<Table> = series
        .chunk_by(|one, next| one.key() == next.key())
        .filter(|group| group[0].kind == BodyKind::Forwarded)
        .map(table)
        .collect();
    if !scans.is_empty() {
        tables.push(scan_table(&scans));
    }
    Findings {
        scenario: "body",
        how,
        tables,
        results: serde_json::json!({ "bodies": series, "scan": scans }),
        aims: aims(&scans),
        notes: notes(series),
    }
}

fn find(all: &[BodySeries], contender: Contender, key: (usize, BodyKind)) -> Option<&BodySeries> {
    all.iter().find(|series| series.contender == contender && series.key() == key)
}

fn table(group: &[BodySeries]) -> Table {
    let noscan = group.iter().find(|series| series.contender == Contender::AnteroomNoscan);
    let row = |series: &BodySeries| {
        let cpu = series.spread_of(|round| round.cpu_us);
        let times = noscan.and_then(|noscan| series.times(noscan));
        let rate = series.spread(|round| round.requests_per_second);
        vec![
            series.contender.name().to_owned(),
            format!("{} ({}–{})", thousands(rate.median), thousands(rate.min), thousands(rate.max)),
            format!("{:.0}", rate.median * series.bytes as f64 / f64::from(1 << 20)),
            format!("{:.0}", series.spread(|round| round.p50_us).median),
            format!("{:.0}", series.spread(|round| round.p99_us).median),
            or_dash(cpu.map(range)),
            or_dash(times.map(|times| format!("{:.2}", times.median))),
            percent(series.spread_of(|round| round.busy)),
            percent(Some(series.spread(|round| round.rig_busy))),
        ]
    };
    let header = [
        "contender",
        "requests/s (min–max)",
        "MiB/s",
        "p50 µs",
        "p99 µs",
        "CPU µs (min–max)",
        "× noscan",
        "busy",
        "rig busy",
    ];
    Table {
        title: format!("bodies of {}, {}", size(group[0].bytes), plural(group[0].connections, "connection")),
        header: header.map(str::to_owned).into(),
        rows: group.iter().map(row).collect(),
        legend: Some(LEGEND),
    }
}

fn scan_table(scans: &[ScanCost]) -> Table {
    let row = |scan: &ScanCost| {
        vec![
            size(scan.bytes),
            range(scan.scanned_us),
            range(scan.kept_us),
            range(scan.scan_us),
            format!("{:.3}", scan.scan_us_per_kb.median),
            format!("{:.3}", scan.times.median),
        ]
    };
    let header = [
        "body",
        "refused, scanned: CPU µs",
        "refused, kept: CPU µs",
        "scan µs (min–max)",
        "µs/KB",
        "of a request ×",
    ];
    Table {
        title: "Anteroom's scan".into(),
        header: header.map(str::to_owned).into(),
        rows: scans.iter().map(row).collect(),
        legend: Some(SCAN),
    }
}

fn aims(scans: &[ScanCost]) -> Vec<Criterion> {
    let mut aims: Vec<Criterion> = scans
        .iter()
        .map(|scan| {
            let who = format!("anteroom, bodies of {}", size(scan.bytes));
            Criterion::at_most(
                who,
                "µs of CPU for a KB of the scan, at most",
                1.0,
                scan.scan_us_per_kb.median,
            )
        })
        .collect();
    aims.extend(scans.iter().max_by_key(|scan| scan.bytes).map(|scan| {
        let who = format!("anteroom, bodies of {}", size(scan.bytes));
        let what = "times the CPU of the same request without its scan, the body kept in both, at most";
        Criterion::at_most(who, what, 1.1, scan.times.median)
    }));
    aims
}

fn notes(all: &[BodySeries]) -> Vec<String> {
    let mut notes = Vec::new();
    for series in all.iter().filter(|series| series.contender != Contender::Direct) {
        let busy = series.spread_of(|round| round.busy).unwrap_or_default().median;
        let rig = series.spread(|round| round.rig_busy).median;
        if rig > MAX_RIG_BUSY && busy < MIN_CONTENDER_BUSY {
            notes.push(format!(
                "{}: the load test itself is the limit, its core is {:.0} % busy and the contender's {:.0} %: compare \
                 CPU, not requests/s",
                at(series),
                rig * 100.0,
                busy * 100.0
            ));
        }
    }
    notes.extend(noise(all.iter().map(|series| (at(series), series.spread(|round| round.others).max))));
    notes
}

fn at(series: &BodySeries) -> String {
    let refused = match series.kind {
        BodyKind::Forwarded => "",
        BodyKind::Scanned => " (refused, scanned)",
        BodyKind::Kept => " (refused, kept)",
    };
    format!("{}, bodies of {}{refused}", series.contender.name(), size(series.bytes))
}

fn size(bytes: usize) -> String {
    match bytes >> 20 {
        0 => format!("{} KB", bytes >> 10),
        megabytes => format!("{megabytes} MB"),
    }
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

fn range(spread: Spread) -> String {
    format!("{:.1} ({:.1}–{:.1})", spread.median, spread.min, spread.max)
}

fn percent(spread: Option<Spread>) -> String {
    or_dash(spread.map(|spread| format!("{:.0} %", spread.median * 100.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(contender: Contender, kind: BodyKind, cpu_us: f64) -> BodySeries {
        let round = BodyRound {
            requests: 100,
            seconds: 1.0,
            requests_per_second: 100.0,
            p50_us: 1.0,
            p99_us: 2.0,
            cpu_us: Some(cpu_us),
            busy: Some(1.0),
            rig_busy: 0.5,
            others: 0.0,
        };
        BodySeries { contender, kind, bytes: 8 << 20, connections: 4, rounds: vec![round] }
    }

    #[test]
    fn scan_cost_is_difference_of_refusals() {
        // 8,192 KB at 0.125 µs take 1,024 µs, which leaves 9,216 of the 10,240 µs.
        let all = [
            series(Contender::Anteroom, BodyKind::Forwarded, 10_240.0),
            series(Contender::AnteroomNoscan, BodyKind::Forwarded, 5_120.0),
            series(Contender::Anteroom, BodyKind::Scanned, 5_024.0),
            series(Contender::Anteroom, BodyKind::Kept, 4_000.0),
        ];
        let found = findings("1 round".into(), &all);
        let measured: Vec<_> = found.aims.iter().map(|aim| (aim.measured, aim.met)).collect();
        assert_eq!(measured, [(0.125, true), (10_240.0 / 9_216.0, false)]);
        let text = found.to_string();
        assert!(text.contains("bodies of 8 MB, 4 connections") && text.contains("1024.0"), "{text}");
        assert!(text.contains("2.00"), "{text}");
    }

    #[test]
    fn without_anteroom_there_is_no_scan() {
        let found = findings("1 round".into(), &[series(Contender::Haproxy, BodyKind::Forwarded, 1.0)]);
        assert_eq!((found.tables.len(), found.aims.len()), (1, 0));
    }

    #[test]
    fn rig_limit_is_reported() {
        let mut one = series(Contender::Haproxy, BodyKind::Forwarded, 1.0);
        one.rounds[0].rig_busy = 1.0;
        assert_eq!(notes(std::slice::from_ref(&one)), Vec::<String>::new(), "both are busy");
        one.rounds[0].busy = Some(0.4);
        assert_eq!(notes(&[one]).len(), 1);
    }
}
