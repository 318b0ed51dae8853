//! Tables of the report.

use super::text::{colour, escape, label, time_cell};
use crate::bench::{
    results::{Cycle, Distribution, Run},
    samples::{Metric, Sample},
};

/// Renders all numbers of the summary.
pub(super) fn numbers(run: &Run) -> String {
    let head = ["n", "median", "from", "to", "p90", "p99", "min", "max"];
    let head = head.map(|name| format!("<th scope=\"col\">{name}</th>")).concat();
    let mut text = format!(
        "<table class=\"numbers\"><caption class=\"hidden\">All numbers; from and to bound the 95 % interval of the median\
         </caption><thead><tr><th scope=\"col\">metric</th>{head}</tr></thead><tbody>"
    );
    let metrics: Vec<_> = Sample::all(run).into_iter().map(|sample| sample.metric).collect();
    let mut in_totals = false;
    for row in run.summary.rows() {
        let metric = metrics.iter().find(|metric| metric.name() == row.name).copied();
        let (is_part, is_total) = match metric {
            Some(Metric::Phase(_)) => (false, false),
            Some(Metric::Part(..)) => (true, false),
            _ => (false, true),
        };
        if is_total && !in_totals {
            in_totals = true;
            text += "</tbody><tbody class=\"totals\">";
        }
        text += &number_row(row, metric, is_part, is_total);
    }
    text + "</tbody></table>"
}

fn number_row(row: &Distribution, metric: Option<Metric>, is_part: bool, is_total: bool) -> String {
    let label = metric.map_or_else(|| row.name.clone(), label);
    let meaning = metric.map_or("", Metric::meaning);
    let swatch = match is_total {
        true => String::new(),
        false => format!("<span class=\"swatch\" style=\"background:{}\"></span>", colour(&row.name)),
    };
    let meaning = if is_part { String::new() } else { format!("<span class=\"meaning\">{meaning}</span>") };
    let [low, high] = match row.ci_ms {
        Some(interval) => interval.map(|ms| time_cell(ms, "")),
        None => ["<td>–</td>".to_owned(), "<td>–</td>".to_owned()],
    };
    format!(
        "<tr data-row=\"{}\"{}><th scope=\"row\">{swatch}{}{meaning}</th><td>{}</td>{}{low}{high}{}</tr>",
        escape(&row.name),
        if is_part { " class=\"part\"" } else { "" },
        escape(&label),
        row.n,
        time_cell(row.median_ms, "strong"),
        [row.p90_ms, row.p99_ms, row.min_ms, row.max_ms].map(|ms| time_cell(ms, "")).concat(),
    )
}

/// Renders the requests of a cycle.
pub(super) fn requests(cycle: &Cycle) -> String {
    let mut text = "<table><caption class=\"hidden\">Requests</caption><thead><tr><th scope=\"col\">request</th><th scope=\"col\">\
                    sent</th><th scope=\"col\">TTFT</th><th scope=\"col\">total</th><th scope=\"col\">status</th>\
                    <th scope=\"col\" class=\"text\">error</th></tr></thead><tbody>"
        .to_owned();
    for request in &cycle.requests {
        text += &format!(
            "<tr><th scope=\"row\"><code>{}</code></th>{}{}{}<td>{}</td><td class=\"text bad\">{}</td></tr>",
            escape(request.request_id.as_deref().unwrap_or("–")),
            time_cell(request.sent_ms, ""),
            request.ttft_ms.map_or_else(|| "<td>–</td>".to_owned(), |ms| time_cell(ms, "")),
            time_cell(request.total_ms, ""),
            request.status.map_or_else(|| "–".to_owned(), |status| status.to_string()),
            escape(request.error.as_deref().unwrap_or_default()),
        );
    }
    text + "</tbody></table>"
}

/// Renders the records compared with the client's clock.
pub(super) fn clocks(run: &Run) -> Option<String> {
    let rows = run.counted().filter_map(|cycle| {
        let clock = cycle.outside_clock?;
        Some(format!(
            "<tr><th scope=\"row\">{}</th>{}{}<td>{:+.2}&nbsp;%</td></tr>",
            cycle.number,
            time_cell(clock.client_ms, ""),
            time_cell(clock.record_ms, ""),
            clock.difference_percent,
        ))
    });
    let rows: String = rows.collect();
    let head = "<table class=\"clocks\"><caption class=\"hidden\">Both clocks</caption><thead><tr><th scope=\"col\">cycle</th>\
                <th scope=\"col\">client: first request sent → first token received</th><th scope=\"col\">record: sum of phases\
                </th><th scope=\"col\">client longer by</th></tr></thead>";
    (!rows.is_empty()).then(|| format!("{head}<tbody>{rows}</tbody></table>"))
}
