//! A run as one page of HTML that needs nothing else: no script, no font, no picture, no other address.

mod spread;
mod tables;
#[cfg(test)]
mod tests;
mod text;
mod waterfall;

use self::text::{escape, fill, time};
use super::{
    results::{Cycle, Run, Verdict},
    samples::Of,
    table::{self, few, headline, money},
};
use crate::admin::THEME_CSS;

const PAGE: &str = include_str!("html/page.html");
const STYLE: &str = include_str!("html/style.css");

/// So many cycles are told one by one; more would make the page heavy, and are in the JSON.
const DETAILS: usize = 100;

/// The page.
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
            ("few", few(summary.counted).unwrap_or_default()),
            ("resamples", &summary.bootstrap.resamples.to_string()),
            ("seed", &summary.bootstrap.seed.to_string()),
        ],
    )
}

/// What a reader must know before the numbers.
fn notices(run: &Run) -> Vec<String> {
    let mut notices = Vec::new();
    if run.interrupted {
        notices.push(format!(
            "Interrupted: {} of {} cycles were measured.",
            run.cycles.len(),
            run.settings.cycles
        ));
    }
    notices.extend(run.aborted.iter().map(|why| format!("It ended early: {why}.")));
    notices.extend(table::problems(run));
    // Many of the same kind say no more than a few.
    if notices.len() > 8 {
        let more = notices.len() - 8;
        notices.truncate(8);
        notices.push(format!("And {more} more; the cycles below have them."));
    }
    notices
}

fn figures(run: &Run) -> String {
    let summary = &run.summary;
    let figure = |number: &str, what: &str, more: &str, bad: bool| {
        let bad = if bad { " data-bad" } else { "" };
        format!(
            "<div{bad}><dt>{what}</dt><dd class=\"number\">{number}</dd><dd class=\"more\">{more}</dd></div>"
        )
    };
    let of = |of: Of, what: &str| {
        summary.total(of).map(|row| {
            let interval = row.ci_ms.map_or_else(
                || "one cycle".to_owned(),
                |[low, high]| format!("median; 95&nbsp;% interval {} to {}", time(low), time(high)),
            );
            figure(&time(row.median_ms), what, &interval, false)
        })
    };
    let slowest = summary.total(Of::ClientTtft).map(|row| {
        figure(
            &time(row.max_ms),
            "until a client’s first token, at the slowest",
            &format!("median {}", time(row.median_ms)),
            false,
        )
    });
    let not = summary.cycles - summary.counted;
    let (failed, requests) = (summary.requests_failed, summary.requests);
    let answered = figure(
        &format!("{}/{}", summary.counted, summary.cycles),
        "cold starts of cycles",
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
            .map_or_else(String::new, |all| format!("; with serving and idling {}{currency}", money(all)));
        let more = format!("at {price}{currency} an hour{cycle}");
        Some(figure(
            &money(cost.cold_start_money?),
            &format!("{} for a cold start", currency.trim_start_matches("&nbsp;")),
            &more,
            false,
        ))
    });
    let all = [
        of(Of::EndToEnd, "first request until first token"),
        of(Of::Actuation, "until the model server was ready"),
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
        let lead = "The median of every phase, one after the other.";
        section("where", "Where the time goes", lead, panel(waterfall));
    }
    if !run.cycles.is_empty() {
        let lead = "All cycles on one axis. Each opens with its phases and its requests.";
        section("cycles", "Every cycle", lead, panel(waterfall::of_cycles(run)) + &details(run));
    }
    if run.summary.counted > 0 {
        let lead = "Each dot is a cycle, of the clients’ times a request. The line is the median, the band its 95&nbsp;% interval. \
                    Each axis goes from the smallest value to the largest.";
        section("spread", "How much it varies", lead, panel(spread::plots(run)));
        section("numbers", "All numbers", "", panel(tables::numbers(run)));
    }
    if let Some(clocks) = tables::clocks(run) {
        let lead = "The clients measured on their own clock, which the proxy knows nothing of. They also see the way \
                    to the proxy and back.";
        section("clocks", "Against an outside clock", lead, panel(clocks));
    }
    let cost = table::cost(run).join(". ");
    if !cost.is_empty() {
        let lead = format!(
            "{}. Cold: from when the GPU was allocated (the pod had its node, the process was started) until ready. \
             Serving: from then until the last answer had ended. Idle: from then until at zero again.",
            escape(&cost)
        );
        section("cost", "What was paid for", &lead, String::new());
    }
    text
}

fn details(run: &Run) -> String {
    let shown = run.cycles.iter().take(DETAILS).map(|cycle| {
        format!(
            "<details><summary>{}</summary><div>{}</div></details>",
            escape(&cycle_words(cycle)),
            cycle_body(cycle)
        )
    });
    let more = run.cycles.len().saturating_sub(DETAILS);
    let more =
        if more > 0 { format!("<p class=\"dim\">{more} more are in the JSON.</p>") } else { String::new() };
    format!("<div class=\"details\">{}{more}</div>", shown.collect::<String>())
}

fn cycle_words(cycle: &Cycle) -> String {
    let token = cycle.cold_start.as_ref().and_then(|record| record.t_e2e_ms);
    let token =
        token.map_or_else(String::new, |ms| format!(", first token after {}", crate::terminal::duration(ms)));
    let idle = cycle.idle_ms.map_or_else(String::new, |ms| {
        format!(", {} after the last answer at zero", crate::terminal::duration(ms))
    });
    let why = cycle.error.as_deref().map_or_else(String::new, |why| format!(": {why}"));
    format!("Cycle {}: {}{token}{idle}{why}", cycle.number, cycle.verdict.words())
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

/// The command with quotes where a shell needs them.
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
        "stand-in" => "the embedded default: the real proxy, with anteroom sim for a model server",
        "own" => "a proxy started for it, with the user’s configuration",
        _ => "a proxy that ran already",
    };
    let machine = &run.machine;
    let rows = [
        ("measured", Some(target.to_owned())),
        ("route", Some(escape(&run.route))),
        ("model", settings.model.as_deref().map(escape)),
        ("cycles", Some(format!("{} of {}", run.cycles.len(), settings.cycles))),
        ("requests a cycle", Some(format!("{}, {}", run.burst, escape(&settings.arrivals)))),
        ("prompts in turn", Some(settings.prompts.to_string())),
        (
            "answers",
            Some(format!(
                "{}, {} tokens at most",
                if settings.stream { "streamed" } else { "whole" },
                settings.max_tokens
            )),
        ),
        ("API", Some(escape(&settings.endpoint))),
        ("stopped when idle for", run.idle_s.map(seconds)),
        ("stopped by", settings.stop_command.then(|| "a command".to_owned())),
        ("pause at zero", (settings.pause_s > 0.0).then(|| seconds(settings.pause_s))),
        (
            "client’s machine",
            Some(escape(&format!("{} {}, {} CPUs", machine.os, machine.arch, machine.cpus))),
        ),
        ("anteroom", Some(escape(&run.anteroom))),
    ];
    let rows = rows
        .into_iter()
        .filter_map(|(name, value)| Some(format!("<div><dt>{name}</dt><dd>{}</dd></div>", value?)));
    rows.collect::<Vec<_>>().join("\n")
}
