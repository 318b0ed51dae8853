//! How numbers are spread: each cycle as a dot, the median and its interval.

use super::text::{colour, escape, label, percent, time};
use crate::bench::{
    results::Run,
    samples::{Of, Sample},
};

/// A plot for each phase and total, each on an axis of its own: from the smallest value to the largest.
pub(super) fn plots(run: &Run) -> String {
    let mut text = "<table class=\"spread\"><caption class=\"hidden\">How the times of each phase are spread</caption><thead>\
                    <tr><th scope=\"col\">of</th><th scope=\"col\" class=\"chart\">smallest to largest</th><th scope=\"col\">\
                    median</th><th scope=\"col\">95&nbsp;% interval</th></tr></thead><tbody>"
        .to_owned();
    let rows: Vec<_> = run.summary.rows().collect();
    for sample in Sample::all(run) {
        let name = sample.of.name();
        if let Some(row) = rows.iter().find(|row| row.name == name) {
            let fill = match sample.of {
                Of::Phase(_) | Of::Part(..) => colour(&name),
                _ => "var(--ink-2)".to_owned(),
            };
            let place = |ms: f64| match row.max_ms - row.min_ms {
                // Room for the dots at both ends.
                range if range > 0.0 => percent(2.0 + 96.0 * (ms - row.min_ms) / range, 100.0),
                _ => percent(50.0, 100.0),
            };
            let interval = row.ci_ms.map(|[low, high]| {
                let (x, width) = (place(low), (high - low) / (row.max_ms - row.min_ms).max(f64::MIN_POSITIVE));
                format!(
                    "<rect class=\"interval\" x=\"{x}\" y=\"5\" height=\"18\" rx=\"2\" style=\"width:max(1px,{});fill:{fill}\"/>",
                    percent(96.0 * width.min(1.0), 100.0)
                )
            });
            let values = sample.values();
            let dots = values.iter().enumerate().map(|(index, ms)| {
                // Not on top of each other; the same each time.
                let y = if values.len() == 1 { 14.0 } else { 9.0 + (index * 7 % 11) as f64 };
                format!(
                    "<circle class=\"dot\" cx=\"{}\" cy=\"{y}\" r=\"3.5\" style=\"fill:{fill}\"/>",
                    place(*ms)
                )
            });
            let middle = place(row.median_ms);
            let part = matches!(sample.of, Of::Part(..));
            text += &format!(
                "<tr{}><th scope=\"row\"><span class=\"swatch\" style=\"background:{fill}\"></span>{}</th>\
                 <td class=\"chart\"><svg height=\"28\" role=\"img\" aria-label=\"{} values from {} to {}\"><line class=\"range\" \
                 x1=\"{}\" x2=\"{}\" y1=\"14\" y2=\"14\"/>{}{}<line class=\"middle\" x1=\"{middle}\" x2=\"{middle}\" y1=\"3\" \
                 y2=\"25\"/></svg><div class=\"ends\" aria-hidden=\"true\"><span>{}</span><span>{}</span></div></td>\
                 <td class=\"strong\">{}</td><td>{}</td></tr>",
                if part { " class=\"part\"" } else { "" },
                escape(&label(sample.of)),
                row.n,
                time(row.min_ms),
                time(row.max_ms),
                place(row.min_ms),
                place(row.max_ms),
                interval.unwrap_or_default(),
                dots.collect::<String>(),
                time(row.min_ms),
                time(row.max_ms),
                time(row.median_ms),
                row.ci_ms
                    .map_or_else(|| "–".to_owned(), |[low, high]| format!("{} … {}", time(low), time(high))),
            );
        }
    }
    text + "</tbody></table>"
}
