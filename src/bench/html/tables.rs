//! Tables of the report.

use maud::{Markup, html};

use super::text::{colour, label, time_cell};
use crate::bench::{
    results::{Cycle, Distribution, Run},
    samples::{Metric, Sample},
};

/// Renders all numbers of the summary.
pub(super) fn numbers(run: &Run) -> Markup {
    let metrics: Vec<_> = Sample::all(run).into_iter().map(|sample| sample.metric).collect();
    let (totals, phases): (Vec<_>, Vec<_>) = run
        .summary
        .rows()
        .map(|row| (row, metrics.iter().find(|metric| metric.name() == row.name).copied()))
        .partition(|(_, metric)| !matches!(metric, Some(Metric::Phase(_) | Metric::Part(..))));
    html! {
        table.numbers {
            caption.hidden { "All numbers; from and to bound the 95 % interval of the median" }
            thead {
                tr {
                    @for name in ["metric", "n", "median", "from", "to", "p90", "p99", "min", "max"] {
                        th scope="col" { (name) }
                    }
                }
            }
            tbody { @for (row, metric) in phases { (number_row(row, metric, true)) } }
            tbody.totals { @for (row, metric) in totals { (number_row(row, metric, false)) } }
        }
    }
}

fn number_row(row: &Distribution, metric: Option<Metric>, has_colour: bool) -> Markup {
    let is_part = matches!(metric, Some(Metric::Part(..)));
    let [low, high] = row.ci_ms.map_or([None; 2], |interval| interval.map(Some));
    html! {
        tr data-row=(row.name) class=[is_part.then_some("part")] {
            th scope="row" {
                @if has_colour { span.swatch style={ "background:" (colour(&row.name)) } {} }
                (metric.map_or_else(|| row.name.clone(), label))
                @if !is_part { span.meaning { (metric.map_or("", Metric::meaning)) } }
            }
            td { (row.n) }
            (time_cell(row.median_ms, Some("strong")))
            @for ms in [low, high, Some(row.p90_ms), Some(row.p99_ms), Some(row.min_ms), Some(row.max_ms)] {
                (time_cell(ms, None))
            }
        }
    }
}

/// Renders the requests of a cycle.
pub(super) fn requests(cycle: &Cycle) -> Markup {
    html! {
        table {
            caption.hidden { "Requests" }
            thead {
                tr {
                    @for name in ["request", "sent", "TTFT", "total", "status"] { th scope="col" { (name) } }
                    th.text scope="col" { "error" }
                }
            }
            tbody {
                @for request in &cycle.requests {
                    tr {
                        th scope="row" { code { (request.request_id.as_deref().unwrap_or("–")) } }
                        (time_cell(request.sent_ms, None))
                        (time_cell(request.ttft_ms, None))
                        (time_cell(request.total_ms, None))
                        td { @if let Some(status) = request.status { (status) } @else { "–" } }
                        td.text.bad { (request.error.as_deref().unwrap_or_default()) }
                    }
                }
            }
        }
    }
}

/// Renders the records compared with the client's clock.
pub(super) fn clocks(run: &Run) -> Option<Markup> {
    let rows: Vec<_> = run.counted().filter_map(|cycle| Some((cycle.number, cycle.outside_clock?))).collect();
    let head = [
        "cycle",
        "client: first request sent → first token received",
        "record: sum of phases",
        "client longer by",
    ];
    (!rows.is_empty()).then(|| {
        html! {
            table.clocks {
                caption.hidden { "Both clocks" }
                thead { tr { @for name in head { th scope="col" { (name) } } } }
                tbody {
                    @for (number, clock) in rows {
                        tr {
                            th scope="row" { (number) }
                            (time_cell(clock.client_ms, None))
                            (time_cell(clock.record_ms, None))
                            td { (format!("{:+.2}\u{a0}%", clock.difference_percent)) }
                        }
                    }
                }
            }
        }
    })
}
