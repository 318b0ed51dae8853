//! Waterfall charts: phases as bars on a time axis.

use maud::{Markup, html};

use super::text::{colour, label, percent, share, tick_label, ticks, time, time_cell};
use crate::{
    bench::{
        results::{Cycle, CycleVerdict, Run},
        samples::Metric,
        stats::median,
    },
    coldstart::{ColdStart, Part, Phase},
    terminal::duration,
};

/// A phase or part on the time axis.
struct Bar {
    metric: Metric,
    start_ms: f64,
    duration_ms: f64,
    /// Set if the phase may have ended earlier.
    upper_bound: bool,
    /// Set if the cold start failed during the phase.
    unfinished: bool,
}

/// Renders the median of each phase. Returns `None` without a record.
pub(super) fn of_medians(run: &Run) -> Option<Markup> {
    let records: Vec<_> = run.counted().filter_map(|cycle| cycle.cold_start.as_ref()).collect();
    let mut bars = Vec::new();
    let mut at = 0.0;
    for phase in Phase::ALL {
        let spans: Vec<_> = records.iter().filter_map(|record| record.phase(phase)).collect();
        let Some(took) = median(&spans.iter().map(|span| span.duration_ms).collect::<Vec<_>>()) else {
            continue;
        };
        let upper_bound = spans.iter().any(|span| span.early_ms.is_some());
        bars.push(Bar {
            metric: Metric::Phase(phase),
            start_ms: at,
            duration_ms: took,
            upper_bound,
            unfinished: false,
        });
        for part in Part::ALL {
            // Start relative to the phase, and duration.
            let parts = spans.iter().filter_map(|span| {
                let part = span.parts.iter().find(|found| found.name == part)?;
                Some((part.start_ms - span.start_ms, part.duration_ms))
            });
            let (starts, took): (Vec<_>, Vec<_>) = parts.unzip();
            if let (Some(start), Some(duration_ms)) = (median(&starts), median(&took)) {
                let (metric, start_ms) = (Metric::Part(phase, part), at + start);
                bars.push(Bar { metric, start_ms, duration_ms, upper_bound: false, unfinished: false });
            }
        }
        at += took;
    }
    (!bars.is_empty()).then(|| table("Median of each phase", &bars, at, "median"))
}

/// Renders one cold start.
pub(super) fn of_record(record: &ColdStart) -> Markup {
    let mut bars = Vec::new();
    for span in &record.phases {
        bars.push(Bar {
            metric: Metric::Phase(span.name),
            start_ms: span.start_ms,
            duration_ms: span.duration_ms,
            upper_bound: span.early_ms.is_some(),
            unfinished: span.unfinished,
        });
        bars.extend(span.parts.iter().map(|part| Bar {
            metric: Metric::Part(span.name, part.name),
            start_ms: part.start_ms,
            duration_ms: part.duration_ms,
            upper_bound: false,
            unfinished: false,
        }));
    }
    table("Phases of this cold start", &bars, record.total_ms, "took")
}

fn table(caption: &str, bars: &[Bar], total_ms: f64, took: &str) -> Markup {
    let marks = ticks(total_ms);
    let grid = html! {
        @for x in marks.iter().map(|at| percent(*at, total_ms)) {
            line.grid x1=(x) x2=(x) y1="0" y2="100%" {}
        }
    };
    html! {
        table.waterfall {
            caption.hidden { (caption) }
            thead {
                tr {
                    th scope="col" { "phase" }
                    th.chart scope="col" { span.hidden { "when" } (axis(&marks, total_ms)) }
                    th scope="col" { (took) }
                    th scope="col" { "share" }
                }
            }
            tbody { @for bar in bars { (bar.row(&grid, total_ms)) } }
            tbody.totals {
                tr.strong { th scope="row" { "sum" } td {} (time_cell(total_ms, None)) td { "100\u{a0}%" } }
            }
        }
    }
}

impl Bar {
    fn row(&self, grid: &Markup, total_ms: f64) -> Markup {
        let colour = colour(&self.metric.name());
        let is_part = matches!(self.metric, Metric::Part(..));
        let (height, inset, opacity) = if is_part { (20, 6, ";opacity:.7") } else { (28, 7, "") };
        let fill = if self.unfinished { String::new() } else { format!(";fill:{colour}{opacity}") };
        let (x, width) = (percent(self.start_ms, total_ms), percent(self.duration_ms, total_ms));
        html! {
            tr class=[is_part.then_some("part")] {
                th scope="row" {
                    span.swatch style={ "background:" (colour) } {}
                    (label(self.metric))
                    @if !is_part { span.meaning { (self.metric.meaning()) } }
                }
                td.chart {
                    svg height=(height) aria-hidden="true" {
                        (grid)
                        // At least 2 px wide, so that short phases stay visible.
                        rect x=(x) y=(inset) height=(height - 2 * inset) rx="2"
                            class=[self.unfinished.then_some("cut")]
                            style={ "width:max(2px," (width) ")" (fill) } {}
                    }
                }
                td.strong data-ms=(self.duration_ms) {
                    @if self.upper_bound { "≤\u{a0}" }
                    (time(self.duration_ms))
                }
                td { (share(self.duration_ms, total_ms)) }
            }
        }
    }
}

/// Renders the labels of an axis. The first and the last are aligned with its ends.
fn axis(marks: &[f64], whole_ms: f64) -> Markup {
    let side = |at: f64| match at / whole_ms.max(f64::MIN_POSITIVE) {
        _ if at == 0.0 => Some("first"),
        share if share > 0.94 => Some("last"),
        _ => None,
    };
    html! {
        div.axis aria-hidden="true" {
            @for at in marks {
                span class=[side(*at)] style={ "left:" (percent(*at, whole_ms)) } { (tick_label(*at)) }
            }
        }
    }
}

/// Renders each cycle as a strip on a common axis.
pub(super) fn of_cycles(run: &Run) -> Markup {
    let records = || run.cycles.iter().filter_map(|cycle| cycle.cold_start.as_ref());
    let longest = records().map(|record| record.total_ms).fold(0.0, f64::max);
    let is_seen = |phase: &Phase| records().any(|record| record.phase(*phase).is_some());
    html! {
        ul.legend aria-label="Colours" {
            @for name in Phase::ALL.into_iter().filter(is_seen).map(Phase::name) {
                li { span.swatch style={ "background:" (colour(name)) } {} (name.replace('_', " ")) }
            }
        }
        table.strips {
            caption.hidden { "Every cycle" }
            thead {
                tr {
                    th scope="col" { "cycle" }
                    th.chart.wide scope="col" { span.hidden { "when" } (axis(&ticks(longest), longest)) }
                    @for name in ["ready", "first token", "answered"] { th scope="col" { (name) } }
                }
            }
            tbody { @for cycle in &run.cycles { (strip(cycle, longest)) } }
        }
    }
}

fn strip(cycle: &Cycle, longest_ms: f64) -> Markup {
    let answered = cycle.requests.iter().filter(|request| request.error.is_none()).count();
    let all = cycle.requests.len();
    html! {
        tr {
            @if let Some(record) = &cycle.cold_start {
                th scope="row" {
                    (cycle.number)
                    @if cycle.verdict != CycleVerdict::Cold { ", does not count" }
                }
                td.chart.wide {
                    @let outcome = record.outcome.map_or("unfinished", |outcome| outcome.name());
                    svg height="20" role="img" aria-label={ (outcome) " in " (duration(record.total_ms)) } {
                        @for span in &record.phases {
                            @let (name, is_cut) = (span.name.name(), span.unfinished);
                            @let width = percent(span.duration_ms, longest_ms);
                            rect x=(percent(span.start_ms, longest_ms)) y="3" height="14"
                                class=[is_cut.then_some("cut")]
                                style={ "width:max(1px," (width) ")" @if !is_cut { ";fill:" (colour(name)) } } {
                                title { (name) " " (time(span.duration_ms)) }
                            }
                        }
                    }
                }
                (time_cell(record.t_actuation_ms, None))
                (time_cell(record.t_e2e_ms, Some("strong")))
            } @else {
                th scope="row" { (cycle.number) }
                td.text.bad colspan="3" {
                    (cycle.verdict.label()) ": " (cycle.error.as_deref().unwrap_or_default())
                }
            }
            td class=[(answered < all).then_some("bad")] { (answered) "/" (all) }
        }
    }
}
