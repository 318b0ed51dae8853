//! Cold starts as waterfalls: each phase as a bar on one axis of time.

use super::text::{colour, escape, label, percent, share, tick_words, ticks, time, time_cell};
use crate::{
    bench::{
        results::{Cycle, Run, Verdict},
        samples::Of,
        stats::median,
    },
    coldstart::{ColdStart, Part, Phase},
};

/// A bar.
struct Bar {
    of: Of,
    start_ms: f64,
    duration_ms: f64,
    /// How much earlier it may have ended.
    early: bool,
    /// It was not over when the cold start failed.
    unfinished: bool,
}

/// The median of every phase, one after the other; `None` without a record.
pub(super) fn of_medians(run: &Run) -> Option<String> {
    let records: Vec<_> = run.counted().filter_map(|cycle| cycle.cold_start.as_ref()).collect();
    let mut bars = Vec::new();
    let mut at = 0.0;
    for phase in Phase::ALL {
        let spans: Vec<_> = records.iter().filter_map(|record| record.phase(phase)).collect();
        let Some(took) = median(&spans.iter().map(|span| span.duration_ms).collect::<Vec<_>>()) else {
            continue;
        };
        let early = spans.iter().any(|span| span.early_ms.is_some());
        bars.push(Bar { of: Of::Phase(phase), start_ms: at, duration_ms: took, early, unfinished: false });
        for part in Part::ALL {
            // From the beginning of the phase.
            let parts = spans.iter().filter_map(|span| {
                let part = span.parts.iter().find(|found| found.name == part)?;
                Some((part.start_ms - span.start_ms, part.duration_ms))
            });
            let (starts, took): (Vec<_>, Vec<_>) = parts.unzip();
            if let (Some(start), Some(duration_ms)) = (median(&starts), median(&took)) {
                let (of, start_ms) = (Of::Part(phase, part), at + start);
                bars.push(Bar { of, start_ms, duration_ms, early: false, unfinished: false });
            }
        }
        at += took;
    }
    (!bars.is_empty()).then(|| table("The median of every phase", &bars, at, "median"))
}

/// One cold start.
pub(super) fn of_record(record: &ColdStart) -> String {
    let mut bars = Vec::new();
    for span in &record.phases {
        bars.push(Bar {
            of: Of::Phase(span.name),
            start_ms: span.start_ms,
            duration_ms: span.duration_ms,
            early: span.early_ms.is_some(),
            unfinished: span.unfinished,
        });
        bars.extend(span.parts.iter().map(|part| Bar {
            of: Of::Part(span.name, part.name),
            start_ms: part.start_ms,
            duration_ms: part.duration_ms,
            early: false,
            unfinished: false,
        }));
    }
    table("The phases of this cold start", &bars, record.total_ms, "took")
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
        let (is_part, height) = match bar.of {
            Of::Part(..) => (true, 20),
            _ => (false, 28),
        };
        let inset = if is_part { 6 } else { 7 };
        let name = bar.of.name();
        text += &format!(
            "<tr{}><th scope=\"row\"><span class=\"swatch\" style=\"background:{colour}\"></span>{}{}</th>\
             <td class=\"chart\"><svg height=\"{height}\" aria-hidden=\"true\">{grid}<rect x=\"{}\" y=\"{inset}\" \
             height=\"{}\" rx=\"2\"{} style=\"width:{}{}\"/></svg></td>{}<td>{}</td></tr>",
            if is_part { " class=\"part\"" } else { "" },
            escape(&label(bar.of)),
            if is_part {
                String::new()
            } else {
                format!("<span class=\"meaning\">{}</span>", bar.of.meaning())
            },
            percent(bar.start_ms, total_ms),
            height - 2 * inset,
            if bar.unfinished { " class=\"cut\"" } else { "" },
            // A thinner bar would not be seen.
            format_args!("max(2px,{})", percent(bar.duration_ms, total_ms)),
            match (bar.unfinished, is_part) {
                (true, _) => String::new(),
                (false, true) => format!(";fill:{};opacity:.7", colour(&name)),
                (false, false) => format!(";fill:{}", colour(&name)),
            },
            time_cell(bar.duration_ms, "strong").replacen('>', if bar.early { ">≤&nbsp;" } else { ">" }, 1),
            share(bar.duration_ms, total_ms),
            colour = colour(&name),
        );
    }
    text + &format!(
        "</tbody><tbody class=\"totals\"><tr class=\"strong\"><th scope=\"row\">sum</th><td></td>{}<td>100&nbsp;%</td></tr></tbody></table>",
        time_cell(total_ms, "")
    )
}

/// The marks of an axis, as words; the first begins and the last ends where the axis does.
fn axis(marks: &[f64], whole_ms: f64) -> String {
    let words = marks.iter().map(|at| {
        let side = match at / whole_ms.max(f64::MIN_POSITIVE) {
            _ if *at == 0.0 => " class=\"first\"",
            share if share > 0.94 => " class=\"last\"",
            _ => "",
        };
        format!("<span{side} style=\"left:{}\">{}</span>", percent(*at, whole_ms), tick_words(*at))
    });
    format!("<div class=\"axis\" aria-hidden=\"true\">{}</div>", words.collect::<String>())
}

/// Every cycle as one strip, all on the same axis.
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
            cycle.verdict.words()
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
