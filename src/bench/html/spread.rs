//! Distribution plots: a dot per value, the median and its interval.

use maud::{Markup, html};

use super::text::{colour, label, percent, time};
use crate::bench::{
    results::{Distribution, Run},
    samples::{Metric, Sample},
};

/// Renders a plot per metric, each on its own axis from minimum to maximum.
pub(super) fn plots(run: &Run) -> Markup {
    let rows: Vec<_> = run.summary.rows().collect();
    let row_of = |sample: &Sample| rows.iter().find(|row| row.name == sample.metric.name());
    html! {
        table.spread {
            caption.hidden { "Distribution of each metric" }
            thead {
                tr {
                    th scope="col" { "metric" }
                    th.chart scope="col" { "minimum to maximum" }
                    th scope="col" { "median" }
                    th scope="col" { "95\u{a0}% interval" }
                }
            }
            tbody {
                @for sample in Sample::all(run) {
                    @if let Some(row) = row_of(&sample) { (plot(&sample, row)) }
                }
            }
        }
    }
}

fn plot(sample: &Sample, row: &Distribution) -> Markup {
    let fill = match sample.metric {
        Metric::Phase(_) | Metric::Part(..) => colour(&row.name),
        _ => "var(--ink-2)".to_owned(),
    };
    let range = row.max_ms - row.min_ms;
    // A margin of 2 % for the dots at both ends.
    let place = |ms: f64| match range > 0.0 {
        true => percent(2.0 + 96.0 * (ms - row.min_ms) / range, 100.0),
        false => percent(50.0, 100.0),
    };
    let width = |width: f64| percent(96.0 * (width / range.max(f64::MIN_POSITIVE)).min(1.0), 100.0);
    let values = sample.values();
    // Deterministic jitter, so that dots do not overlap.
    let height = |index: usize| if values.len() == 1 { 14.0 } else { 9.0 + (index * 7 % 11) as f64 };
    let (x_median, [min, max]) = (place(row.median_ms), [row.min_ms, row.max_ms].map(time));
    let class = matches!(sample.metric, Metric::Part(..)).then_some("part");
    html! {
        tr class=[class] {
            th scope="row" { span.swatch style={ "background:" (fill) } {} (label(sample.metric)) }
            td.chart {
                svg height="28" role="img" aria-label={ (row.n) " values from " (min) " to " (max) } {
                    line.range x1=(place(row.min_ms)) x2=(place(row.max_ms)) y1="14" y2="14" {}
                    @if let Some([low, high]) = row.ci_ms {
                        rect.interval x=(place(low)) y="5" height="18" rx="2"
                            style={ "width:max(1px," (width(high - low)) ");fill:" (fill) } {}
                    }
                    @for (index, ms) in values.iter().enumerate() {
                        circle.dot cx=(place(*ms)) cy=(height(index)) r="3.5" style={ "fill:" (fill) } {}
                    }
                    line.middle x1=(x_median) x2=(x_median) y1="3" y2="25" {}
                }
                div.ends aria-hidden="true" { span { (min) } span { (max) } }
            }
            td.strong { (time(row.median_ms)) }
            td { @if let Some([low, high]) = row.ci_ms { (time(low)) " … " (time(high)) } @else { "–" } }
        }
    }
}
