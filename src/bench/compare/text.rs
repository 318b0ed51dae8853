//! Text output of a comparison.

use owo_colors::Style;

use super::comparison::{Change, Comparison, MetricComparison, RunHeader};
use crate::terminal::{Paint, duration};

/// Renders the comparison for a terminal.
pub(super) fn lines(comparison: &Comparison, paint: Paint) -> Vec<String> {
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
    let width = comparison.rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(13);
    let cells = |name: &str, [before, after, difference, interval, p]: [&str; 5]| {
        format!("  {name:<width$}{before:>9}{after:>9}{difference:>19}   {interval:<22}{p:>8}  ")
    };
    let head = cells("", ["before", "after", "difference", "95 % CI", "p"]);
    lines.push(paint.dim(&format!("{head}verdict")));
    for row in &comparison.rows {
        let percent =
            row.difference_percent.map_or_else(String::new, |percent| format!(" ({percent:+.1} %)"));
        let line = cells(
            &row.name,
            [
                &duration(row.median_ms[0]),
                &duration(row.median_ms[1]),
                &format!("{}{percent}", signed(row.difference_ms)),
                &row.ci_ms.map_or_else(
                    || "-".to_owned(),
                    |[low, high]| format!("{} … {}", signed(low), signed(high)),
                ),
                &p_value(row.p_corrected),
            ],
        );
        lines.push(format!("{line}{}", verdict(row, paint)));
    }
    let failures = &comparison.failures;
    let of = |side: usize| format!("{}/{}", failures.failed[side], failures.of[side]);
    let line = cells("failed cycles", [&of(0), &of(1), "", "", &p_value(failures.p_corrected)]);
    let words = match failures.change {
        Change::Worse => paint.bad("more failures"),
        Change::Better => paint.good("fewer failures"),
        Change::Noise | Change::Small => paint.dim("noise"),
    };
    lines.push(format!("{line}{words}"));
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
        Change::Worse => paint.bad("slower"),
        Change::Better => paint.good("faster"),
        Change::Small => paint.dim("below threshold"),
        Change::Noise => paint.dim("noise"),
    }
}

fn conclusion(comparison: &Comparison, paint: Paint) -> String {
    let named = |change: Change| {
        let rows = comparison.rows.iter().filter(|row| row.change == change).map(|row| row.name.as_str());
        rows.collect::<Vec<_>>().join(", ")
    };
    let (worse, better) = (named(Change::Worse), named(Change::Better));
    match (comparison.regression, better.is_empty()) {
        (true, _) if worse.is_empty() => paint.bad("Regression: cold starts fail more often."),
        (true, _) => paint.bad(&format!("Regression: slower in {worse}.")),
        (false, true) => "No regression: no significant change above the thresholds.".to_owned(),
        (false, false) => paint.good(&format!("No regression: faster in {better}.")),
    }
}

fn signed(ms: f64) -> String {
    let sign = if ms < 0.0 { "−" } else { "+" };
    format!("{sign}{}", duration(ms.abs()))
}

fn p_value(p: f64) -> String {
    if p < 0.001 { "<0.001".to_owned() } else { format!("{p:.3}") }
}
