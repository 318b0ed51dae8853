//! Text output of a comparison.

use owo_colors::Style;

use super::comparison::{Comparison, DifferenceClass, Inconclusive, MetricComparison, RunHeader};
use crate::{
    terminal::{Paint, duration},
    text_table::{
        Align::{Left, Right},
        TextTable,
    },
};

/// Column of the intervals.
const INTERVALS: usize = 4;

/// Width of the longest verdict.
const MAX_VERDICT_CHARS: usize = 15;

/// Renders the comparison, for a terminal of this width. In a narrow one the table has no intervals.
pub(super) fn lines(comparison: &Comparison, paint: Paint, max_width: Option<usize>) -> Vec<String> {
    let mut lines: Vec<_> = comparison
        .warnings
        .iter()
        .map(|warning| paint.paint(&format!("warning: {warning}"), Style::new().yellow()))
        .collect();
    if !lines.is_empty() {
        lines.push(String::new());
    }
    lines.push(format!("before  {}", side(&comparison.before)));
    lines.push(format!("after   {}", side(&comparison.after)));
    lines.push(String::new());
    let mut table = TextTable::new([Left, Right, Right, Right, Left, Right, Left]);
    table.row(["", "before", "after", "difference", "95 % CI", "p", "verdict"]);
    for row in &comparison.rows {
        let percent =
            row.difference_percent.map_or_else(String::new, |percent| format!(" ({percent:+.1} %)"));
        let interval = row
            .ci_ms
            .map_or_else(|| "-".to_owned(), |[low, high]| format!("{} … {}", signed(low), signed(high)));
        table.row([
            row.name.clone(),
            duration(row.median_ms[0]),
            duration(row.median_ms[1]),
            format!("{}{percent}", signed(row.difference_ms)),
            interval,
            p_value(row.p_corrected),
            verdict(row, paint),
        ]);
    }
    let failures = &comparison.failures;
    let of = |side: usize| format!("{}/{}", failures.failed[side], failures.of[side]);
    let words = match failures.change {
        DifferenceClass::Worse => paint.bad("more failures"),
        DifferenceClass::Better => paint.good("fewer failures"),
        DifferenceClass::Noise | DifferenceClass::Small => paint.dim("noise"),
    };
    let (none, p) = (String::new(), p_value(failures.p_corrected));
    table.row(["failed cycles".into(), of(0), of(1), none.clone(), none, p, words]);
    let width: usize = table.widths()[..6].iter().map(|width| width + 2).sum();
    if max_width.is_some_and(|max_width| 2 + width + MAX_VERDICT_CHARS > max_width) {
        table.remove_column(INTERVALS);
    }
    let mut drawn = table.lines().into_iter().map(|line| format!("  {line}"));
    lines.extend(drawn.next().map(|head| paint.dim(&head)));
    lines.extend(drawn);
    for (names, which) in [(&comparison.only_before, "before"), (&comparison.only_after, "after")] {
        if !names.is_empty() {
            lines.push(format!("  only {which}: {}", names.join(", ")));
        }
    }
    lines.push(String::new());
    let thresholds = comparison.limits;
    lines.push(paint.dim(&format!(
        "p: two-sided Mann–Whitney U (failed cycles: Fisher), Holm-corrected over {} tests; thresholds: p ≤ {}, change of \
         the median ≥ {} % and ≥ {}",
        comparison.rows.len() + 1,
        thresholds.alpha,
        thresholds.threshold * 100.0,
        duration(thresholds.floor_ms)
    )));
    lines.push(conclusion(comparison, paint));
    lines
}

fn side(side: &RunHeader) -> String {
    let label = side.label.as_deref().map_or_else(String::new, |label| format!("{label}, "));
    format!(
        "{label}{} cold starts of {}, {} (anteroom {})",
        side.counted, side.route, side.started_at, side.anteroom
    )
}

fn verdict(row: &MetricComparison, paint: Paint) -> String {
    match row.change {
        DifferenceClass::Worse => paint.bad("slower"),
        DifferenceClass::Better => paint.good("faster"),
        DifferenceClass::Small => paint.dim("below threshold"),
        DifferenceClass::Noise => paint.dim("noise"),
    }
}

fn conclusion(comparison: &Comparison, paint: Paint) -> String {
    let named = |change: DifferenceClass| {
        let rows = comparison.rows.iter().filter(|row| row.change == change).map(|row| row.name.as_str());
        rows.collect::<Vec<_>>().join(", ")
    };
    let (worse, better) = (named(DifferenceClass::Worse), named(DifferenceClass::Better));
    match (comparison.regression, better.is_empty()) {
        (true, _) if worse.is_empty() => paint.bad("Regression: cold starts fail more often."),
        (true, _) => paint.bad(&format!("Regression: slower in {worse}.")),
        (false, _) if comparison.inconclusive.is_some() => inconclusive_advice(comparison, paint),
        (false, true) => "No regression: no significant change above the thresholds.".to_owned(),
        (false, false) => paint.good(&format!("No regression: faster in {better}.")),
    }
}

fn inconclusive_advice(comparison: &Comparison, paint: Paint) -> String {
    let Some(Inconclusive { slowdown_ms, cycles_needed }) = comparison.inconclusive else {
        return String::new();
    };
    let way_out = match cycles_needed {
        Some(cycles) => format!("measure at least {cycles} cycles per run"),
        None => "raise --threshold".to_owned(),
    };
    let (before, after) = (comparison.before.counted, comparison.after.counted);
    paint.bad(&format!(
        "Cannot tell: with {before} and {after} cycles, a slowdown of t_e2e by {} ({} %) would not be significant; {way_out}.",
        duration(slowdown_ms),
        comparison.limits.threshold * 100.0
    ))
}

fn signed(ms: f64) -> String {
    let sign = if ms < 0.0 { "−" } else { "+" };
    format!("{sign}{}", duration(ms.abs()))
}

fn p_value(p: f64) -> String {
    if p < 0.001 { "<0.001".to_owned() } else { format!("{p:.3}") }
}
