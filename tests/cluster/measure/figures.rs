//! Statistics of the samples, as a table.

use std::fmt::{self, Display};

use serde_json::{Value, json};

use super::{CycleTimes, cycle::rounded};

/// Name of a figure, and its value in each sample.
type Figure = (&'static str, fn(&CycleTimes) -> Option<f64>);

/// Figures of a cold start, in chronological order.
const FIGURES: &[Figure] = &[
    ("request → push on its way, by our record", |it| it.pushed.map(|_| it.record.phase("signal"))),
    ("request → push received", |it| it.pushed),
    ("push received → `spec.replicas` 1 seen", |it| it.pushed.map(|pushed| it.patched - pushed)),
    ("request → `spec.replicas` 1 seen", |it| Some(it.patched)),
    ("→ pod seen", |it| Some(it.created - it.patched)),
    ("→ its node seen", |it| Some(it.scheduled - it.created)),
    ("→ its process started", |it| Some(it.started - it.scheduled)),
    ("→ the server answers (its own time)", |it| Some(it.load())),
    ("server answers → request sent on", |it| Some(it.dispatched - it.answers)),
    ("probe answered → request sent on, by our record", |it| Some(it.record.phase("dispatch"))),
    ("`scale` of our record", |it| it.record.phases.get("scale").copied()),
    ("`create` of our record", |it| it.record.phases.get("create").copied()),
    ("`schedule` of our record", |it| it.record.phases.get("schedule").copied()),
    ("`start` of our record", |it| it.record.phases.get("start").copied()),
    ("`load` of our record", |it| it.record.phases.get("load").copied()),
    ("`propagate` of our record", |it| it.record.phases.get("propagate").copied()),
    ("server answers → kubelet finds it ready, if before", |it| Some(it.ready? - it.answers)),
    ("server answers → first byte at the client", |it| Some(it.first_byte - it.answers)),
    ("whole cold start", |it| Some(it.first_byte)),
    ("whole cold start less the server's own time", |it| Some(it.first_byte - it.load())),
];

/// Figures of several samples.
pub(super) struct FigureTable(Vec<FigureRow>);

struct FigureRow {
    name: &'static str,
    n: usize,
    median: f64,
    p90: f64,
    min: f64,
    max: f64,
}

// === impl FigureTable ===

impl FigureTable {
    pub(super) fn of(samples: &[CycleTimes]) -> Self {
        let rows = FIGURES
            .iter()
            .filter_map(|&(name, figure)| FigureRow::of(name, samples.iter().filter_map(figure).collect()));
        Self(rows.collect())
    }

    pub(super) fn json(&self) -> Value {
        let row = |row: &FigureRow| {
            let FigureRow { name, n, median, p90, min, max } = row;
            json!({ "figure": name, "n": n, "median": median, "p90": p90, "min": min, "max": max })
        };
        self.0.iter().map(row).collect()
    }
}

/// Markdown, as in the documentation.
impl Display for FigureTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| ms | n | median | p90 | min | max |\n| --- | ---: | ---: | ---: | ---: | ---: |")?;
        for FigureRow { name, n, median, p90, min, max } in &self.0 {
            writeln!(f, "| {name} | {n} | {median:.2} | {p90:.2} | {min:.2} | {max:.2} |")?;
        }
        Ok(())
    }
}

// === impl FigureRow ===

impl FigureRow {
    fn of(name: &'static str, mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let n = values.len();
        // Lowest value that nine of ten do not exceed.
        let p90 = values[(9 * n).div_ceil(10) - 1];
        let median = (values[(n - 1) / 2] + values[n / 2]) / 2.0;
        let [median, p90, min, max] = [median, p90, min, max].map(rounded);
        Some(Self { name, n, median, p90, min, max })
    }
}
