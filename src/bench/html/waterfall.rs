//! Waterfall charts: phases as bars on a time axis.

use super::text::{colour, escape, label, percent, share, tick_label, ticks, time, time_cell};
use crate::{
    bench::{
        results::{Cycle, Run, Verdict},
        samples::Metric,
        stats::median,
    },
    coldstart::{ColdStart, Part, Phase},
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
pub(super) fn of_medians(run: &Run) -> Option<String> {
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
pub(super) fn of_record(record: &ColdStart) -> String {
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

fn table(caption: &str, bars: &[Bar], total_ms: f64, took: &str) -> String {
    let marks = ticks(total_ms);
    let grid: String = marks
        .iter()
        .map(|at| {
            format!(
                "<line class=\"grid\" x1=\"{0}\" x2=\"{0}\" y1=\"0\" y2=\"100%\"/>",
                percent(*at, total_ms)
            )
        })
        .collect();
    let mut text = format!(
        "<table class=\"waterfall\"><caption class=\"hidden\">{}</caption><thead><tr><th scope=\"col\">phase</th>\
         <th scope=\"col\" class=\"chart\"><span class=\"hidden\">when</span>{}</th><th scope=\"col\">{took}</th>\
         <th scope=\"col\">share</th></tr></thead><tbody>",
        escape(caption),
        axis(&marks, total_ms)
    );
    for bar in bars {
        text += &bar.row(&grid, total_ms);
    }
    text + &format!(
        "</tbody><tbody class=\"totals\"><tr class=\"strong\"><th scope=\"row\">sum</th><td></td>{}<td>100&nbsp;%</td></tr></tbody></table>",
        time_cell(total_ms, "")
    )
}

impl Bar {
    fn row(&self, grid: &str, total_ms: f64) -> String {
        let colour = colour(&self.metric.name());
        let label = escape(&label(self.metric));
        let (class, meaning, height, inset, opacity) = match self.metric {
            Metric::Part(..) => (" class=\"part\"", String::new(), 20, 6, ";opacity:.7"),
            metric => ("", format!("<span class=\"meaning\">{}</span>", metric.meaning()), 28, 7, ""),
        };
        let (cut, fill) = match self.unfinished {
            true => (" class=\"cut\"", String::new()),
            false => ("", format!(";fill:{colour}{opacity}")),
        };
        let (x, width) = (percent(self.start_ms, total_ms), percent(self.duration_ms, total_ms));
        let (bar_height, prefix) = (height - 2 * inset, if self.upper_bound { "≤&nbsp;" } else { "" });
        let (ms, duration) = (self.duration_ms, time(self.duration_ms));
        let share = share(self.duration_ms, total_ms);
        // At least 2 px wide, so that short phases stay visible.
        format!(
            "<tr{class}><th scope=\"row\"><span class=\"swatch\" style=\"background:{colour}\"></span>{label}{meaning}</th>\
             <td class=\"chart\"><svg height=\"{height}\" aria-hidden=\"true\">{grid}<rect x=\"{x}\" y=\"{inset}\" \
             height=\"{bar_height}\" rx=\"2\"{cut} style=\"width:max(2px,{width}){fill}\"/></svg></td>\
             <td class=\"strong\" data-ms=\"{ms}\">{prefix}{duration}</td><td>{share}</td></tr>"
        )
    }
}

/// Renders the labels of an axis. The first and the last are aligned with its ends.
fn axis(marks: &[f64], whole_ms: f64) -> String {
    let words = marks.iter().map(|at| {
        let side = match at / whole_ms.max(f64::MIN_POSITIVE) {
            _ if *at == 0.0 => " class=\"first\"",
            share if share > 0.94 => " class=\"last\"",
            _ => "",
        };
        format!("<span{side} style=\"left:{}\">{}</span>", percent(*at, whole_ms), tick_label(*at))
    });
    format!("<div class=\"axis\" aria-hidden=\"true\">{}</div>", words.collect::<String>())
}

/// Renders each cycle as a strip on a common axis.
pub(super) fn of_cycles(run: &Run) -> String {
    let end = |cycle: &Cycle| cycle.cold_start.as_ref().map(|record| record.total_ms);
    let longest = run.cycles.iter().filter_map(end).fold(0.0, f64::max);
    let marks = ticks(longest);
    let seen = |phase: &Phase| {
        run.cycles
            .iter()
            .filter_map(|cycle| cycle.cold_start.as_ref())
            .any(|record| record.phase(*phase).is_some())
    };
    let legend = Phase::ALL.into_iter().filter(seen).map(|phase| {
        let name = phase.name();
        format!(
            "<li><span class=\"swatch\" style=\"background:{}\"></span>{}</li>",
            colour(name),
            name.replace('_', " ")
        )
    });
    let mut text = format!(
        "<ul class=\"legend\" aria-label=\"Colours\">{}</ul><table class=\"strips\"><caption class=\"hidden\">Every cycle\
         </caption><thead><tr><th scope=\"col\">cycle</th><th scope=\"col\" class=\"chart wide\"><span class=\"hidden\">when\
         </span>{}</th><th scope=\"col\">ready</th><th scope=\"col\">first token</th><th scope=\"col\">answered</th></tr>\
         </thead><tbody>",
        legend.collect::<String>(),
        axis(&marks, longest)
    );
    for cycle in &run.cycles {
        text += &strip(cycle, longest);
    }
    text + "</tbody></table>"
}

fn strip(cycle: &Cycle, longest_ms: f64) -> String {
    let number = cycle.number;
    let answered = cycle.requests.iter().filter(|request| request.error.is_none()).count();
    let all = cycle.requests.len();
    let answers = format!("<td{}>{answered}/{all}</td>", if answered < all { " class=\"bad\"" } else { "" });
    let Some(record) = &cycle.cold_start else {
        let why = escape(cycle.error.as_deref().unwrap_or_default());
        return format!(
            "<tr><th scope=\"row\">{number}</th><td class=\"text bad\" colspan=\"3\">{}: {why}</td>{answers}</tr>",
            cycle.verdict.label()
        );
    };
    let bars = record.phases.iter().map(|span| {
        let (class, fill) = match span.unfinished {
            true => (" class=\"cut\"", String::new()),
            false => ("", format!(";fill:{}", colour(span.name.name()))),
        };
        format!(
            "<rect x=\"{}\" y=\"3\" height=\"14\"{class} style=\"width:max(1px,{}){fill}\"><title>{} {}</title></rect>",
            percent(span.start_ms, longest_ms),
            percent(span.duration_ms, longest_ms),
            span.name.name(),
            time(span.duration_ms),
        )
    });
    let known =
        |ms: Option<f64>, class| ms.map_or_else(|| "<td>–</td>".to_owned(), |ms| time_cell(ms, class));
    let mark = if cycle.verdict == Verdict::Cold { "" } else { ", does not count" };
    format!(
        "<tr><th scope=\"row\">{number}{mark}</th><td class=\"chart wide\"><svg height=\"20\" role=\"img\" \
         aria-label=\"{}\">{}</svg></td>{}{}{answers}</tr>",
        escape(&format!(
            "{} in {}",
            record.outcome.map_or("unfinished", |outcome| outcome.name()),
            crate::terminal::duration(record.total_ms)
        )),
        bars.collect::<String>(),
        known(record.t_actuation_ms, ""),
        known(record.t_e2e_ms, "strong"),
    )
}
