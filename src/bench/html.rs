//! HTML report of a run: one self-contained page without scripts, fonts, images or links.

mod spread;
mod tables;
#[cfg(test)]
mod tests;
mod text;
mod waterfall;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use self::text::time;
use super::{
    results::{Cycle, CycleVerdict, Run},
    samples::Metric,
    table::{self, headline, money, quantile_note},
};
use crate::{admin::THEME_CSS, terminal::duration};

const STYLE: &str = include_str!("html/style.css");

/// Number of cycles with details, which bounds the size of the page. The JSON has all.
const MAX_CYCLE_DETAILS: usize = 100;

/// Number of warnings shown above the numbers.
const MAX_NOTICES: usize = 8;

/// Renders the page.
pub(super) fn page(run: &Run) -> String {
    let label = run.label.as_deref().map_or_else(String::new, |label| format!(": {label}"));
    let title = format!("Cold starts of {}{label}", run.route);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="generator" content={ "anteroom " (run.anteroom) };
                title { (title) }
                style { (PreEscaped(THEME_CSS)) (PreEscaped(STYLE)) }
            }
            body {
                header.top {
                    p.brand { "anteroom " span.dim { "bench cold-start" } }
                    p.dim { (run.started_at.replace('T', " ").replace(".000Z", "Z")) }
                }
                main {
                    h1 { (title) }
                    p.lead { (headline(run)) "." }
                    @for notice in notices(run) { p.notice { (notice) } }
                    (figures(run))
                    (sections(run))
                    section aria-labelledby="how" {
                        h2 id="how" { "How it was measured" }
                        pre.command { code { (command(run)) } }
                        (settings(run))
                    }
                    (explanation(run))
                }
                footer.dim {
                    "Made by anteroom " (run.anteroom) ". This page is self-contained and loads nothing."
                }
            }
        }
    };
    // HTML cannot represent control characters.
    page.into_string().replace(|char: char| char.is_control() && !char.is_whitespace(), "\u{fffd}")
}

fn explanation(run: &Run) -> Markup {
    let (summary, bootstrap) = (&run.summary, &run.summary.bootstrap);
    html! {
        section.prose aria-labelledby="read" {
            h2 id="read" { "How to read it" }
            p {
                "Each cycle starts at zero: nothing runs. Then the burst is sent. The proxy holds the requests, has the \
                 model server started, and forwards them once it is ready. Its record divides that time into adjacent \
                 phases. A phase that cannot be observed is absent and its time is part of the next one. A time marked ≤ \
                 ends on the clock of another machine and may be shorter."
            }
            dl.words {
                dt { "T_actuation" }
                dd { "first request until the model server was ready" }
                dt { "T_first_token" }
                dd { "ready until first token" }
                dt { "T_e2e" }
                dd { "first request until first token: the sum of both" }
                dt { "TTFT, total" }
                dd {
                    "by the client’s clock: request sent until its first token, and until the end of its answer. \
                     Heartbeats do not count as tokens. Connections were established before."
                }
                dt { "median, p90, p99" }
                dd { "quantiles with linear interpolation. " (quantile_note(summary.counted).unwrap_or_default()) }
                dt { "95\u{a0}% interval" }
                dd {
                    "confidence interval of the median: percentile bootstrap with " (bootstrap.resamples)
                    " resamples and seed " (bootstrap.seed)
                    ", over whole cycles, because requests of one burst are correlated"
                }
            }
            p {
                "The median waterfall shows the median of each phase. Its sum is close to the median of the whole, but need \
                 not be equal."
            }
        }
    }
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

fn figures(run: &Run) -> Markup {
    let summary = &run.summary;
    let figure = |number: &str, label: &str, more: &str, is_bad: bool| {
        html! { div data-bad[is_bad] { dt { (label) } dd.number { (number) } dd.more { (more) } } }
    };
    let median = |metric: Metric, label: &str| {
        summary.total(metric).map(|row| {
            let interval = row.ci_ms.map_or_else(
                || "one cycle".to_owned(),
                |[low, high]| format!("median; 95\u{a0}% interval {} to {}", time(low), time(high)),
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
        let name = run.settings.currency.as_deref().unwrap_or_default();
        let currency = if name.is_empty() { String::new() } else { format!("\u{a0}{name}") };
        let price = run.settings.gpu_hour_price?;
        let cycle = cost
            .cycle_money
            .map_or_else(String::new, |all| format!("; {}{currency} with serving and idling", money(all)));
        let more = format!("at {price}{currency} per hour{cycle}");
        Some(figure(&money(cost.cold_start_money?), &format!("{name} per cold start"), &more, false))
    });
    let all = [
        median(Metric::EndToEnd, "first request until first token"),
        median(Metric::Actuation, "first request until ready"),
        slowest,
        Some(answered),
        cost,
    ];
    html! { dl.figures { @for figure in all.into_iter().flatten() { (figure) } } }
}

fn sections(run: &Run) -> Markup {
    let section = |id: &str, title: &str, lead: &str, body: Markup| {
        html! { section aria-labelledby=(id) { h2 id=(id) { (title) } p { (lead) } (body) } }
    };
    let panel = |body: Markup| html! { div.panel { (body) } };
    let cost = table::cost(run).join(". ");
    html! {
        @if let Some(waterfall) = waterfall::of_medians(run) {
            (section("where", "Where the time goes", "Median of each phase, in order.", panel(waterfall)))
        }
        @if !run.cycles.is_empty() {
            (section(
                "cycles",
                "Every cycle",
                "All cycles on a common axis. Expand a cycle for its phases and requests.",
                html! { (panel(waterfall::of_cycles(run))) (details(run)) },
            ))
        }
        @if run.summary.counted > 0 {
            (section(
                "spread",
                "Distribution",
                "One dot per cycle; for client times, per request. Line: median. Band: its 95\u{a0}% interval. Each axis \
                 spans minimum to maximum.",
                panel(spread::plots(run)),
            ))
            (section("numbers", "All numbers", "", panel(tables::numbers(run))))
        }
        @if let Some(clocks) = tables::clocks(run) {
            (section(
                "clocks",
                "Comparison with the client’s clock",
                "The client’s own measurement, independent of the proxy. It includes the network between client and proxy.",
                panel(clocks),
            ))
        }
        @if !cost.is_empty() {
            (section(
                "cost",
                "GPU time and cost",
                &format!(
                    "{cost}. Cold: from the allocation of the GPU (pod assigned to a node, process started) until ready. \
                     Serving: until the end of the last answer. Idle: until at zero again."
                ),
                PreEscaped(String::new()),
            ))
        }
    }
}

fn details(run: &Run) -> Markup {
    let more = run.cycles.len().saturating_sub(MAX_CYCLE_DETAILS);
    html! {
        div.details {
            @for cycle in run.cycles.iter().take(MAX_CYCLE_DETAILS) {
                details { summary { (cycle_title(cycle)) } div { (cycle_body(cycle)) } }
            }
            @if more > 0 { p.dim { (more) " more cycles are in the JSON." } }
        }
    }
}

fn cycle_title(cycle: &Cycle) -> String {
    let token = cycle.cold_start.as_ref().and_then(|record| record.t_e2e_ms);
    let token = token.map_or_else(String::new, |ms| format!(", first token after {}", duration(ms)));
    let idle = cycle
        .idle_ms
        .map_or_else(String::new, |ms| format!(", at zero {} after the last answer", duration(ms)));
    let why = cycle.error.as_deref().map_or_else(String::new, |why| format!(": {why}"));
    format!("Cycle {}: {}{token}{idle}{why}", cycle.number, cycle.verdict.label())
}

fn cycle_body(cycle: &Cycle) -> Markup {
    html! {
        @if let Some(record) = &cycle.cold_start {
            (waterfall::of_record(record))
            @if let Some(pod) = &record.pod {
                p.dim { "pod " (pod) @if let Some(node) = &record.node { " on node " (node) } }
            }
            @if !record.last_lines.is_empty() && cycle.verdict != CycleVerdict::Cold {
                pre.command { code { (record.last_lines.join("\n")) } }
            }
        }
        (tables::requests(cycle))
    }
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

fn settings(run: &Run) -> Markup {
    let settings = &run.settings;
    let seconds = |seconds: f64| time(seconds * 1e3);
    let target = match settings.target.as_str() {
        "stand-in" => "embedded default: the real proxy with anteroom sim as model server",
        "own" => "proxy started by the benchmark, with the user’s configuration",
        _ => "running proxy",
    };
    let streamed = if settings.stream { "streamed" } else { "not streamed" };
    let machine = &run.machine;
    let rows = [
        ("measured", Some(target.to_owned())),
        ("route", Some(run.route.clone())),
        ("model", settings.model.clone()),
        ("cycles", Some(format!("{} of {}", run.cycles.len(), settings.cycles))),
        ("requests per cycle", Some(format!("{}, {}", run.burst, settings.arrivals))),
        ("prompts", Some(settings.prompts.to_string())),
        ("answers", Some(format!("{streamed}, up to {} tokens", settings.max_tokens))),
        ("API", Some(settings.endpoint.clone())),
        ("idle timeout", run.idle_s.map(seconds)),
        ("stopped by", settings.stop_command.then(|| "--stop-command".to_owned())),
        ("pause at zero", (settings.pause_s > 0.0).then(|| seconds(settings.pause_s))),
        ("client machine", Some(format!("{} {}, {} CPUs", machine.os, machine.arch, machine.cpus))),
        ("anteroom", Some(run.anteroom.clone())),
    ];
    html! {
        dl.settings {
            @for (name, value) in rows {
                @if let Some(value) = value { div { dt { (name) } dd { (value) } } }
            }
        }
    }
}
