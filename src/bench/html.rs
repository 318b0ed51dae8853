//! HTML report of a run: one self-contained page without scripts, fonts, images or links.

mod spread;
mod tables;
#[cfg(test)]
mod tests;
mod text;
mod waterfall;

use self::text::{escape, fill, time};
use super::{
    results::{Cycle, Run, Verdict},
    samples::Metric,
    table::{self, headline, money, quantile_note},
};
use crate::admin::THEME_CSS;

const PAGE: &str = include_str!("html/page.html");
const STYLE: &str = include_str!("html/style.css");

/// Number of cycles with details, which bounds the size of the page. The JSON has all.
const MAX_CYCLE_DETAILS: usize = 100;

/// Number of warnings shown above the numbers.
const MAX_NOTICES: usize = 8;

/// Renders the page.
pub(super) fn page(run: &Run) -> String {
    let summary = &run.summary;
    let label = run.label.as_deref().map_or_else(String::new, |label| format!(": {label}"));
    let notices = notices(run).into_iter().map(|text| format!("<p class=\"notice\">{}</p>", escape(&text)));
    fill(
        PAGE,
        &[
            ("version", &escape(&run.anteroom)),
            ("title", &escape(&format!("Cold starts of {}{label}", run.route))),
            ("theme_css", THEME_CSS),
            ("style_css", STYLE),
            ("started_at", &escape(&run.started_at.replace('T', " ").replace(".000Z", "Z"))),
            ("headline", &escape(&format!("{}.", headline(run)))),
            ("notices", &notices.collect::<String>()),
            ("figures", &figures(run)),
            ("sections", &sections(run)),
            ("command", &escape(&command(run))),
            ("settings", &settings(run)),
            ("quantile_note", quantile_note(summary.counted).unwrap_or_default()),
            ("resamples", &summary.bootstrap.resamples.to_string()),
            ("seed", &summary.bootstrap.seed.to_string()),
        ],
    )
}

/// Returns the warnings shown above the numbers.
fn notices(run: &Run) -> Vec<String> {
    let mut notices = Vec::new();
    if run.interrupted {
        notices.push(format!(
            "Interrupted: {} of {} cycles were measured.",
            run.cycles.len(),
            run.settings.cycles
        ));
    }
    notices.extend(run.aborted.iter().map(|why| format!("Ended early: {why}.")));
    notices.extend(table::problems(run));
    if notices.len() > MAX_NOTICES {
        let more = notices.len() - MAX_NOTICES;
        notices.truncate(MAX_NOTICES);
        notices.push(format!("{more} more are listed with the cycles below."));
    }
    notices
}

fn figures(run: &Run) -> String {
    let summary = &run.summary;
    let figure = |number: &str, label: &str, more: &str, bad: bool| {
        let bad = if bad { " data-bad" } else { "" };
        format!(
            "<div{bad}><dt>{label}</dt><dd class=\"number\">{number}</dd><dd class=\"more\">{more}</dd></div>"
        )
    };
    let median = |metric: Metric, label: &str| {
        summary.total(metric).map(|row| {
            let interval = row.ci_ms.map_or_else(
                || "one cycle".to_owned(),
                |[low, high]| format!("median; 95&nbsp;% interval {} to {}", time(low), time(high)),
            );
            figure(&time(row.median_ms), label, &interval, false)
        })
    };
    let slowest = summary.total(Metric::ClientTtft).map(|row| {
        figure(
            &time(row.max_ms),
            "slowest time to first token of a client",
            &format!("median {}", time(row.median_ms)),
            false,
        )
    });
    let not = summary.cycles - summary.counted;
    let (failed, requests) = (summary.requests_failed, summary.requests);
    let answered = figure(
        &format!("{}/{}", summary.counted, summary.cycles),
        "cold starts / cycles",
        &format!("{} of {requests} requests answered", requests - failed),
        not > 0 || failed > 0,
    );
    let cost = summary.cost.as_ref().and_then(|cost| {
        let currency = run
            .settings
            .currency
            .as_deref()
            .map_or_else(String::new, |text| format!("&nbsp;{}", escape(text)));
        let price = run.settings.gpu_hour_price?;
        let cycle = cost
            .cycle_money
            .map_or_else(String::new, |all| format!("; {}{currency} with serving and idling", money(all)));
        let more = format!("at {price}{currency} per hour{cycle}");
        Some(figure(
            &money(cost.cold_start_money?),
            &format!("{} per cold start", currency.trim_start_matches("&nbsp;")),
            &more,
            false,
        ))
    });
    let all = [
        median(Metric::EndToEnd, "first request until first token"),
        median(Metric::Actuation, "first request until ready"),
        slowest,
        Some(answered),
        cost,
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join("\n")
}

fn sections(run: &Run) -> String {
    let mut text = String::new();
    let mut section = |id: &str, title: &str, lead: &str, body: String| {
        text += &format!(
            "<section aria-labelledby=\"{id}\"><h2 id=\"{id}\">{title}</h2><p>{lead}</p>{body}</section>\n"
        );
    };
    let panel = |body: String| format!("<div class=\"panel\">{body}</div>");
    if let Some(waterfall) = waterfall::of_medians(run) {
        let lead = "Median of each phase, in order.";
        section("where", "Where the time goes", lead, panel(waterfall));
    }
    if !run.cycles.is_empty() {
        let lead = "All cycles on a common axis. Expand a cycle for its phases and requests.";
        section("cycles", "Every cycle", lead, panel(waterfall::of_cycles(run)) + &details(run));
    }
    if run.summary.counted > 0 {
        let lead = "One dot per cycle; for client times, per request. Line: median. Band: its 95&nbsp;% interval. Each axis spans \
                    minimum to maximum.";
        section("spread", "Distribution", lead, panel(spread::plots(run)));
        section("numbers", "All numbers", "", panel(tables::numbers(run)));
    }
    if let Some(clocks) = tables::clocks(run) {
        let lead = "The client’s own measurement, independent of the proxy. It includes the network between client and proxy.";
        section("clocks", "Comparison with the client’s clock", lead, panel(clocks));
    }
    let cost = table::cost(run).join(". ");
    if !cost.is_empty() {
        let lead = format!(
            "{}. Cold: from the allocation of the GPU (pod assigned to a node, process started) until ready. Serving: until the \
             end of the last answer. Idle: until at zero again.",
            escape(&cost)
        );
        section("cost", "GPU time and cost", &lead, String::new());
    }
    text
}

fn details(run: &Run) -> String {
    let shown = run.cycles.iter().take(MAX_CYCLE_DETAILS).map(|cycle| {
        format!(
            "<details><summary>{}</summary><div>{}</div></details>",
            escape(&cycle_title(cycle)),
            cycle_body(cycle)
        )
    });
    let more = run.cycles.len().saturating_sub(MAX_CYCLE_DETAILS);
    let more = if more > 0 {
        format!("<p class=\"dim\">{more} more cycles are in the JSON.</p>")
    } else {
        String::new()
    };
    format!("<div class=\"details\">{}{more}</div>", shown.collect::<String>())
}

fn cycle_title(cycle: &Cycle) -> String {
    let token = cycle.cold_start.as_ref().and_then(|record| record.t_e2e_ms);
    let token =
        token.map_or_else(String::new, |ms| format!(", first token after {}", crate::terminal::duration(ms)));
    let idle = cycle.idle_ms.map_or_else(String::new, |ms| {
        format!(", at zero {} after the last answer", crate::terminal::duration(ms))
    });
    let why = cycle.error.as_deref().map_or_else(String::new, |why| format!(": {why}"));
    format!("Cycle {}: {}{token}{idle}{why}", cycle.number, cycle.verdict.label())
}

fn cycle_body(cycle: &Cycle) -> String {
    let mut text = String::new();
    if let Some(record) = &cycle.cold_start {
        text += &waterfall::of_record(record);
        if let Some(pod) = &record.pod {
            let node = record.node.as_deref().map_or_else(String::new, |node| format!(" on node {node}"));
            text += &format!("<p class=\"dim\">pod {}</p>", escape(&format!("{pod}{node}")));
        }
        if !record.last_lines.is_empty() && cycle.verdict != Verdict::Cold {
            text += &format!(
                "<pre class=\"command\"><code>{}</code></pre>",
                escape(&record.last_lines.join("\n"))
            );
        }
    }
    text + &tables::requests(cycle)
}

/// Joins the command line, quoted for a shell.
fn command(run: &Run) -> String {
    let plain =
        |word: &str| word.chars().all(|char| char.is_ascii_alphanumeric() || "-_./=:,".contains(char));
    let quoted = |word: &String| match plain(word) && !word.is_empty() {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    };
    run.command.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

fn settings(run: &Run) -> String {
    let settings = &run.settings;
    let seconds = |seconds: f64| time(seconds * 1e3);
    let target = match settings.target.as_str() {
        "stand-in" => "embedded default: the real proxy with anteroom sim as model server",
        "own" => "proxy started by the benchmark, with the user’s configuration",
        _ => "running proxy",
    };
    let machine = &run.machine;
    let rows = [
        ("measured", Some(target.to_owned())),
        ("route", Some(escape(&run.route))),
        ("model", settings.model.as_deref().map(escape)),
        ("cycles", Some(format!("{} of {}", run.cycles.len(), settings.cycles))),
        ("requests per cycle", Some(format!("{}, {}", run.burst, escape(&settings.arrivals)))),
        ("prompts", Some(settings.prompts.to_string())),
        (
            "answers",
            Some(format!(
                "{}, up to {} tokens",
                if settings.stream { "streamed" } else { "not streamed" },
                settings.max_tokens
            )),
        ),
        ("API", Some(escape(&settings.endpoint))),
        ("idle timeout", run.idle_s.map(seconds)),
        ("stopped by", settings.stop_command.then(|| "--stop-command".to_owned())),
        ("pause at zero", (settings.pause_s > 0.0).then(|| seconds(settings.pause_s))),
        ("client machine", Some(escape(&format!("{} {}, {} CPUs", machine.os, machine.arch, machine.cpus)))),
        ("anteroom", Some(escape(&run.anteroom))),
    ];
    let rows = rows
        .into_iter()
        .filter_map(|(name, value)| Some(format!("<div><dt>{name}</dt><dd>{}</dd></div>", value?)));
    rows.collect::<Vec<_>>().join("\n")
}
