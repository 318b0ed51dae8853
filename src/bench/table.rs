//! Text output of a run.

use owo_colors::Style;

use super::{
    results::{CycleVerdict, Run},
    samples::Metric,
};
use crate::{
    coldstart::Phase,
    terminal::{Paint, duration},
    text_table::{Align, TextTable},
};

/// Renders the results for a terminal.
pub(super) fn lines(run: &Run, paint: Paint) -> Vec<String> {
    let summary = &run.summary;
    let mut lines = vec![String::new(), paint.bold(&headline(run))];
    if summary.counted > 0 {
        lines.push(String::new());
        lines.extend(table(run, paint));
        lines.push(String::new());
        lines.push(paint.dim(&format!(
            "95 % confidence interval of the median: bootstrap over cycles, percentile method, {} resamples, seed {}",
            summary.bootstrap.resamples, summary.bootstrap.seed
        )));
        lines.extend(quantile_note(summary.counted).map(|text| paint.dim(text)));
    }
    if let Some(percent) = summary.outside_clock_max_percent {
        lines.push(format!("Records and client clock agree within {percent:.2} %."));
    }
    lines.extend(cost(run));
    lines.extend(problems(run).into_iter().map(|problem| paint.bad(&problem)));
    lines
}

/// Summarizes the run in one sentence.
pub(super) fn headline(run: &Run) -> String {
    let summary = &run.summary;
    let token = summary.total(Metric::EndToEnd).map(|row| {
        let interval = row
            .ci_ms
            .map_or_else(String::new, |[low, high]| format!(" ({} to {})", duration(low), duration(high)));
        format!(", first token after {}{interval}", duration(row.median_ms))
    });
    let not = summary.cycles - summary.counted;
    let rest = if not > 0 { format!(" of {} cycles", summary.cycles) } else { String::new() };
    let label = run.label.as_deref().map_or_else(String::new, |label| format!(" ({label})"));
    let plural = if summary.counted == 1 { "" } else { "s" };
    format!(
        "{} cold start{plural}{rest} of route {}{label}{}",
        summary.counted,
        run.route,
        token.unwrap_or_default()
    )
}

/// Returns a caveat for quantiles of a small number of cycles.
pub(super) const fn quantile_note(counted: usize) -> Option<&'static str> {
    match counted {
        0..10 => Some("With fewer than 10 cycles, p90 and p99 lie between the two largest values."),
        10..100 => Some("With fewer than 100 cycles, p99 lies between the two largest values."),
        _ => None,
    }
}

fn table(run: &Run, paint: Paint) -> Vec<String> {
    use Align::{Left, Right};
    let mut table = TextTable::new([Left, Right, Right, Left, Right, Right, Right, Right]);
    table.row(["", "n", "median", "95 % CI", "p90", "p99", "min", "max"]);
    for row in run.summary.rows() {
        let interval = row
            .ci_ms
            .map_or_else(|| "-".to_owned(), |[low, high]| format!("{} … {}", duration(low), duration(high)));
        let [median, p90, p99, min, max] =
            [row.median_ms, row.p90_ms, row.p99_ms, row.min_ms, row.max_ms].map(duration);
        table.row([row.name.clone(), row.n.to_string(), median, interval, p90, p99, min, max]);
    }
    let mut drawn = table.lines().into_iter().map(|line| format!("  {line}"));
    let mut lines: Vec<_> = drawn.next().map(|head| paint.dim(&head)).into_iter().collect();
    let mut totals = false;
    for (row, line) in run.summary.rows().zip(drawn) {
        let is_total = run.summary.totals.iter().any(|total| total.name == row.name);
        if is_total && !totals {
            totals = true;
            lines.push(String::new());
        }
        let is_phase = Phase::ALL.iter().any(|phase| phase.name() == row.name);
        lines.push(match (is_total, is_phase) {
            (true, _) => paint.bold(&line),
            (false, true) => line,
            (false, false) => paint.paint(&line, Style::new().dimmed()),
        });
    }
    lines
}

/// Renders GPU time and money.
pub(super) fn cost(run: &Run) -> Vec<String> {
    let Some(cost) = &run.summary.cost else { return Vec::new() };
    let currency =
        run.settings.currency.as_deref().map_or_else(String::new, |currency| format!(" {currency}"));
    let idle = cost.idle_s.map_or_else(|| "unknown".to_owned(), |idle| format!("{idle:.1} s"));
    let mut lines = vec![format!(
        "GPU time per cycle (medians): cold {:.1} s, serving {:.1} s, idle {idle}",
        cost.cold_s, cost.serving_s
    )];
    if let (Some(price), Some(cold)) = (run.settings.gpu_hour_price, cost.cold_start_money) {
        let cycle = cost
            .cycle_money
            .map_or_else(String::new, |cycle| format!(", {}{currency} per cycle", money(cycle)));
        lines.push(format!("At {price}{currency} per hour: {}{currency} per cold start{cycle}", money(cold)));
    }
    lines
}

/// Formats an amount of money with two decimals, or with two significant digits below 0.1.
pub(super) fn money(amount: f64) -> String {
    match amount {
        amount if amount >= 0.1 || amount == 0.0 => format!("{amount:.2}"),
        amount => {
            let digits = 1.0 - amount.log10().floor();
            format!("{amount:.0$}", digits.min(9.0) as usize)
        }
    }
}

/// Lists the cycles that do not count and the number of failed requests.
pub(super) fn problems(run: &Run) -> Vec<String> {
    let cycles = run.cycles.iter().filter(|cycle| cycle.verdict != CycleVerdict::Cold);
    let mut problems: Vec<_> = cycles
        .map(|cycle| {
            let why = cycle.error.as_deref().unwrap_or("unknown reason");
            format!("cycle {} {}, does not count: {why}", cycle.number, cycle.verdict.label())
        })
        .collect();
    if run.summary.requests_failed > 0 {
        problems.push(format!("{} of {} requests failed", run.summary.requests_failed, run.summary.requests));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_shows_two_significant_digits() {
        let texts = [0.0, 12.345, 0.5, 0.0123, 0.000_456].map(money);
        assert_eq!(texts, ["0.00", "12.35", "0.50", "0.012", "0.00046"]);
    }
}
