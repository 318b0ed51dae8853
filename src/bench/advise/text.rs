//! Text output.

mod config;
mod format;
mod table;

use std::fmt::Write as _;

use super::{
    advice::Advice,
    args::ScaledBy,
    arrivals::stamp,
    choice::{Candidate, Choice, Goal},
    grid::SeedSpread,
};
pub(super) use format::period;
use format::{days, item, money, number, paragraph, percent, samples, share, thousands, wait};
use table::{table, varies};

/// Renders the result.
pub(super) fn render(advice: &Advice<'_>) -> String {
    let mut text = heading(advice);
    text.push('\n');
    text.push_str(&table(advice));
    text.push('\n');
    text.push_str(&recommendation(advice));
    text.push('\n');
    text.push_str(&limitations(advice));
    text
}

/// Renders the inputs of the replay.
fn heading(advice: &Advice<'_>) -> String {
    let (args, inputs, load) = (advice.args, advice.inputs, advice.load);
    let mut text = String::from("Estimated cost and waiting times per setting\n\n");
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<12}{value}");
    };
    let trace = &inputs.trace;
    let requests = trace.requests.len();
    line("requests", format!("{} in {} ({})", thousands(requests), days(advice.days()), inputs.source));
    line("", format!("{} to {}", stamp(trace.from), stamp(trace.to)));
    if inputs.without_work > 0 {
        line(
            "",
            format!("{} others, such as health checks, need no model server", thousands(inputs.without_work)),
        );
    }
    if let Some(first) = &inputs.first_skipped {
        line("", format!("{} invalid lines; {first}", thousands(inputs.skipped)));
    }
    let unknown = trace.requests.iter().filter(|request| request.service.is_none()).count();
    let service = samples(&inputs.service);
    line(
        "duration",
        match (unknown, args.service_time) {
            (0, _) => service,
            (_, Some(given)) if unknown == requests => format!("{given} (--service-time)"),
            (_, Some(given)) => {
                format!("as logged; {given} for {} requests without one", thousands(unknown))
            }
            (_, None) => {
                format!("{service}; drawn from these for {} requests without one", thousands(unknown))
            }
        },
    );
    line(
        "start-up",
        match &inputs.records {
            None => format!("{} (--cold-start)", samples(&inputs.start_up)),
            Some(records) => {
                let count = records.until_ready.len();
                format!("{} ({count} record{})", samples(&inputs.start_up), if count == 1 { "" } else { "s" })
            }
        },
    );
    let settings = &advice.candidates[0].settings;
    line(
        "replicas",
        match args.scale_by {
            ScaledBy::Keda => format!(
                "up to {}, by KEDA: target {}, pollingInterval {}, linger {} (part of the idle time)",
                settings.max_replicas, args.target, args.polling_interval, args.linger
            ),
            ScaledBy::Kubernetes => "1, by Anteroom (scaleBy: kubernetes)".into(),
            ScaledBy::Process => "1, a local process".into(),
        },
    );
    if !varies(advice, |one| one.settings.concurrency) {
        line("concurrency", format!("{} requests per replica", settings.concurrency));
    }
    if !varies(advice, |one| (one.settings.hold, one.settings.hold_requests)) {
        line("hold", format!("timeout {}, up to {} requests", period(settings.hold), settings.hold_requests));
    }
    line(
        "replays",
        match advice.seeds.len() {
            1 if load.is_deterministic() => "1: nothing is random".into(),
            1 => "1".into(),
            many => format!("{many} per setting with different random draws; the table shows medians"),
        },
    );
    text
}

fn recommendation(advice: &Advice<'_>) -> String {
    let (Some(goal), Some(choice)) = (advice.goal, advice.choice) else {
        return "No recommendation without a goal: set --goal p99=30s or --budget 300h/month.\n".into();
    };
    let Candidate { settings, figures, .. } = &advice.candidates[choice.index()];
    let hours = figures.gpu_hours.middle * advice.windows_per_month();
    let price = |hours: f64| {
        advice.args.gpu_hour_price.map(|price| format!(" ({})", money(hours * price))).unwrap_or_default()
    };
    let asked = match goal {
        Goal::Wait(quantile, within) => format!("a {} of at most {}", quantile.name(), period(within)),
        Goal::GpuHours(hours) => format!("at most {} GPU hours per month{}", number(hours), price(hours)),
    };
    let setting = match settings.floor {
        0 => format!("scale to zero after {} without a request", period(settings.idle)),
        1 => "keep one replica up".to_owned(),
        floor => format!("keep {floor} replicas up"),
    };
    let sentence = match (choice, goal) {
        (Choice::Reached(_), Goal::Wait(..)) => format!(
            "Recommended: {setting}. Of {} settings it is the cheapest with {asked}{}.",
            advice.candidates.len(),
            match advice.seeds.len() {
                1 => "",
                _ => " (95th percentile of the replays)",
            }
        ),
        (Choice::Reached(_), Goal::GpuHours(_)) => format!(
            "Recommended: {setting}. Of {} settings it has the shortest p99 with {asked}.",
            advice.candidates.len()
        ),
        (Choice::Closest(_), _) => format!(
            "None of {} settings reaches {asked} with at most {} of the requests lost. Closest: {setting}.",
            advice.candidates.len(),
            percent(advice.args.max_lost)
        ),
    };
    let mut text = String::new();
    paragraph(&mut text, "", "", &sentence);
    let saved = advice.saved(figures);
    let compared = if saved >= 0.0 { "less" } else { "more" };
    let spread = |spread: SeedSpread<Option<u64>>| match spread {
        SeedSpread { low, middle, high } if low == middle && middle == high => wait(middle),
        SeedSpread { low, middle, high } => format!("{} ({} to {})", wait(middle), wait(low), wait(high)),
    };
    let mut line = |words: String| item(&mut text, &words);
    line(format!(
        "{} GPU hours per month{}, {} {compared} than one replica always on: {} serving, {} idle, {} starting.",
        number(hours),
        price(hours),
        percent(saved.abs()),
        share(figures.serving_gpu_hours, figures.gpu_hours.middle),
        share(figures.idle_gpu_hours, figures.gpu_hours.middle),
        share(figures.cold_gpu_hours, figures.gpu_hours.middle),
    ));
    if settings.floor == 0 {
        line(format!(
            "{} of the requests meet a cold start; {:.1} cold starts per day.",
            percent(figures.met_cold),
            figures.cold_starts.middle / advice.days()
        ));
    }
    line(format!(
        "Wait: median {}, p90 {}, p99 {}, maximum {}.",
        spread(figures.median_ms),
        spread(figures.p90_ms),
        spread(figures.p99_ms),
        wait(Some(figures.longest_ms))
    ));
    line(format!(
        "{} time out, {} are rejected. Peak: {} held requests, {} replica{}.",
        percent(figures.timed_out),
        percent(figures.refused),
        figures.held_peak,
        figures.replicas_peak,
        if figures.replicas_peak == 1 { "" } else { "s" }
    ));
    text.push_str("\nConfiguration:\n\n");
    for written in config::lines(advice, settings).lines() {
        let _ = writeln!(text, "{}", format!("    {written}").trim_end());
    }
    text
}

/// Renders the limitations of the replay.
fn limitations(advice: &Advice<'_>) -> String {
    let mut text = String::from("Limitations:\n");
    let mut line = |words: &str| item(&mut text, words);
    line(
        "Future traffic: the log is replayed as it is. Ranges reflect random start-up times, not different traffic.",
    );
    if advice.days() < 7.0 {
        line("Weekly patterns: the log is shorter than a week and is extrapolated to a month.");
    }
    line(
        "Client behaviour: each request arrives once, at its logged time. Clients that give up before hold.timeout, retry, or \
         wait for an answer before the next request are not modelled, so the share that meets a cold start is an upper \
         estimate.",
    );
    line(
        "Load: the duration of a request does not depend on the load of its replica. Waits included in logged durations count twice.",
    );
    let failed = advice.inputs.records.as_ref().map_or(0, |records| records.failed);
    match failed {
        0 => line("Failures: failed starts and unavailable nodes."),
        _ => line(&format!(
            "Failures: {failed} of {} recorded starts failed.",
            failed + advice.load.start_up.len()
        )),
    }
    line(
        "Billing: a GPU counts from the request that needs it until its replica stops. A node that stays longer, or is billed by the hour, costs more.",
    );
    line("Other routes that share the GPUs. docs/advise.md lists the simplifications of KEDA and its HPA.");
    text
}
