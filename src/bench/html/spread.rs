//! Distribution plots: a dot per value, the median and its interval.

use super::text::{colour, escape, label, percent, time};
use crate::bench::{
    results::Run,
    samples::{Metric, Sample},
};

/// Renders a plot per metric, each on its own axis from minimum to maximum.
pub(super) fn plots(run: &Run) -> String {
    let mut text = "<table class=\"spread\"><caption class=\"hidden\">Distribution of each metric</caption><thead>\
                    <tr><th scope=\"col\">metric</th><th scope=\"col\" class=\"chart\">minimum to maximum</th><th scope=\"col\">\
                    median</th><th scope=\"col\">95&nbsp;% interval</th></tr></thead><tbody>"
        .to_owned();
    let rows: Vec<_> = run.summary.rows().collect();
    for sample in Sample::all(run) {
        let name = sample.metric.name();
        if let Some(row) = rows.iter().find(|row| row.name == name) {
            let fill = match sample.metric {
                Metric::Phase(_) | Metric::Part(..) => colour(&name),
                _ => "var(--ink-2)".to_owned(),
            };
            let place = |ms: f64| match row.max_ms - row.min_ms {
                // A margin of 2 % for the dots at both ends.
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
                // Deterministic jitter, so that dots do not overlap.
                let y = if values.len() == 1 { 14.0 } else { 9.0 + (index * 7 % 11) as f64 };
                format!(
                    "<circle class=\"dot\" cx=\"{}\" cy=\"{y}\" r=\"3.5\" style=\"fill:{fill}\"/>",
                    place(*ms)
                )
            });
            let class = if matches!(sample.metric, Metric::Part(..)) { " class=\"part\"" } else { "" };
            let (label, interval, dots) =
                (escape(&label(sample.metric)), interval.unwrap_or_default(), dots.collect::<String>());
            let [x_min, x_median, x_max] = [row.min_ms, row.median_ms, row.max_ms].map(place);
            let [min, median, max] = [row.min_ms, row.median_ms, row.max_ms].map(time);
            let ci = row
                .ci_ms
                .map_or_else(|| "–".to_owned(), |[low, high]| format!("{} … {}", time(low), time(high)));
            text += &format!(
                "<tr{class}><th scope=\"row\"><span class=\"swatch\" style=\"background:{fill}\"></span>{label}</th>\
                 <td class=\"chart\"><svg height=\"28\" role=\"img\" aria-label=\"{n} values from {min} to {max}\"><line \
                 class=\"range\" x1=\"{x_min}\" x2=\"{x_max}\" y1=\"14\" y2=\"14\"/>{interval}{dots}<line class=\"middle\" \
                 x1=\"{x_median}\" x2=\"{x_median}\" y1=\"3\" y2=\"25\"/></svg><div class=\"ends\" aria-hidden=\"true\">\
                 <span>{min}</span><span>{max}</span></div></td><td class=\"strong\">{median}</td><td>{ci}</td></tr>",
                n = row.n,
            );
        }
    }
    text + "</tbody></table>"
}
