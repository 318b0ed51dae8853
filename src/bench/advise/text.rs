//! The advice in words.

mod config;
mod table;
mod words;

use std::fmt::Write as _;

use super::{
    Advice,
    args::ScaledBy,
    arrivals::stamp,
    choice::{Candidate, Choice, Goal},
    grid::Spread,
};
use table::{table, varies};
pub(super) use words::period;
use words::{days, item, money, number, paragraph, percent, samples, share, thousands, wait};

/// All of it.
pub(super) fn of(advice: &Advice<'_>) -> String {
    let mut text = heading(advice);
    text.push('\n');
    text.push_str(&table(advice));
    text.push('\n');
    text.push_str(&recommendation(advice));
    text.push('\n');
    text.push_str(&unknown(advice));
    text
}

/// What was replayed, and how.
fn heading(advice: &Advice<'_>) -> String {
    let (args, inputs, load) = (advice.args, advice.inputs, advice.load);
    let mut text = String::from(
        "What an idle time and a floor would have cost, and how long requests would have waited\n\n",
    );
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<11}{value}");
    };
    let trace = &inputs.trace;
    let requests = trace.requests.len();
    line("requests", format!("{} in {} ({})", thousands(requests), days(advice.days()), inputs.source));
    line("", format!("{} to {}", stamp(trace.from), stamp(trace.to)));
    if inputs.wakes_nothing > 0 {
        line("", format!("{} others, such as health checks, wake nothing", thousands(inputs.wakes_nothing)));
    }
    if let Some(first) = &inputs.first_skipped {
        line("", format!("{} lines were not understood; {first}", thousands(inputs.skipped)));
    }
    let unknown = trace.requests.iter().filter(|request| request.service.is_none()).count();
    let service = samples(&inputs.service);
    line(
        "take",
        match (unknown, args.service_time) {
            (0, _) => service,
            (_, Some(given)) if unknown == requests => format!("{given}, as given"),
            (_, Some(given)) => {
                format!("as the log says; {given} where it does not ({} requests)", thousands(unknown))
            }
            (_, None) => {
                format!("{service}; drawn from those for {} that have no duration", thousands(unknown))
            }
        },
    );
    line(
        "start",
        match &inputs.records {
            None => format!("{}, as given", samples(&inputs.start_up)),
            Some(records) => {
                let count = records.until_ready.len();
                format!(
                    "{}, by {count} record{}",
                    samples(&inputs.start_up),
                    if count == 1 { "" } else { "s" }
                )
            }
        },
    );
    let settings = &advice.candidates[0].settings;
    line(
        "replicas",
        match args.scale_by {
            ScaledBy::Keda => format!(
                "at most {}, by KEDA: target {}, polled every {}, of each idle time {} are the linger",
                settings.max_replicas, args.target, args.polling_interval, args.linger
            ),
            ScaledBy::Kubernetes => "one, by Anteroom (scaleBy: kubernetes)".into(),
            ScaledBy::Process => "one, a process of this machine".into(),
        },
    );
    if !varies(advice, |one| one.settings.concurrency) {
        line("each takes", format!("{} requests at a time", settings.concurrency));
    }
    if !varies(advice, |one| (one.settings.hold, one.settings.hold_requests)) {
        line("held", format!("for {} at most, {} at most", period(settings.hold), settings.hold_requests));
    }
    line(
        "replayed",
        match advice.seeds.len() {
            1 if load.is_certain() => "once: nothing is left to chance".into(),
            1 => "once".into(),
            many => format!("{many} times each, with other draws; the table has the middle"),
        },
    );
    text
}

fn recommendation(advice: &Advice<'_>) -> String {
    let (Some(goal), Some(choice)) = (advice.goal, advice.choice) else {
        return "No goal was said, so nothing is recommended: say --goal p99=30s, or --budget 300h/month.\n"
            .into();
    };
    let Candidate { settings, figures, .. } = &advice.candidates[choice.index()];
    let hours = figures.gpu_hours.middle * advice.month();
    let price = |hours: f64| {
        advice.args.gpu_hour_price.map(|price| format!(" ({})", money(hours * price))).unwrap_or_default()
    };
    let asked = match goal {
        Goal::Wait(quantile, within) => format!("a {} of at most {}", quantile.name(), period(within)),
        Goal::GpuHours(hours) => format!("at most {} GPU hours a month{}", number(hours), price(hours)),
    };
    let setting = match settings.floor {
        0 => format!("scale to zero after {} without a request", period(settings.idle)),
        1 => "keep one replica up".to_owned(),
        floor => format!("keep {floor} replicas up"),
    };
    let sentence = match (choice, goal) {
        (Choice::Reached(_), Goal::Wait(..)) => format!(
            "Recommended: {setting}. It is the cheapest of {} settings that keep {asked}{}.",
            advice.candidates.len(),
            match advice.seeds.len() {
                1 => "",
                _ => " in 19 of 20 replays",
            }
        ),
        (Choice::Reached(_), Goal::GpuHours(_)) => format!(
            "Recommended: {setting}. Of {} settings, none that costs {asked} has a shorter p99.",
            advice.candidates.len()
        ),
        (Choice::Closest(_), _) => format!(
            "None of {} settings reaches {asked} and loses no more than {} of the requests. Closest: {setting}.",
            advice.candidates.len(),
            percent(advice.args.max_lost)
        ),
    };
    let mut text = String::new();
    paragraph(&mut text, "", "", &sentence);
    let saved = advice.saved(figures);
    let compared = if saved >= 0.0 { "less" } else { "more" };
    let spread = |spread: Spread<Option<u64>>| match spread {
        Spread { low, middle, high } if low == middle && middle == high => wait(middle),
        Spread { low, middle, high } => format!("{} ({} to {})", wait(middle), wait(low), wait(high)),
    };
    let mut line = |words: String| item(&mut text, &words);
    line(format!(
        "It takes {} GPU hours a month{}, {} {compared} than one replica that is always up; of these {} serve, {} idle, {} start.",
        number(hours),
        price(hours),
        percent(saved.abs()),
        share(figures.serving_gpu_hours, figures.gpu_hours.middle),
        share(figures.idle_gpu_hours, figures.gpu_hours.middle),
        share(figures.cold_gpu_hours, figures.gpu_hours.middle),
    ));
    if settings.floor == 0 {
        line(format!(
            "{} of the requests meet a cold start; there are {:.1} a day.",
            percent(figures.met_cold),
            figures.cold_starts.middle / advice.days()
        ));
    }
    line(format!(
        "Waits: median {}, p90 {}, p99 {}; the longest {}.",
        spread(figures.median_ms),
        spread(figures.p90_ms),
        spread(figures.p99_ms),
        wait(Some(figures.longest_ms))
    ));
    line(format!(
        "{} time out, {} are refused. At most {} were held at once, and {} replica{} up.",
        percent(figures.timed_out),
        percent(figures.refused),
        figures.held_peak,
        figures.replicas_peak,
        if figures.replicas_peak == 1 { " was" } else { "s were" }
    ));
    text.push_str("\nTo set it:\n\n");
    for written in config::lines(advice, settings).lines() {
        let _ = writeln!(text, "{}", format!("    {written}").trim_end());
    }
    text
}

/// What the replay does not know, which is as much a part of the advice as the figures.
fn unknown(advice: &Advice<'_>) -> String {
    let mut text = String::from("What this does not know:\n");
    let mut line = |words: &str| item(&mut text, words);
    line(
        "Next week. It is this log again; the ranges above are those of start-ups drawn anew, not of other traffic.",
    );
    if advice.days() < 7.0 {
        line("A whole week: the log is shorter, and a month is taken for a multiple of it.");
    }
    line(
        "What callers do while they wait. Each request comes when the log says, once: who gives up sooner than hold.timeout, \
         who tries again, and who asks the next question only after the answer is not known, so more requests meet a cold \
         start here than would.",
    );
    line(
        "Load: a request takes as long as the log says, however many others its replica has. If the log has waits in its durations, they are counted again.",
    );
    let failed = advice.inputs.records.as_ref().map_or(0, |records| records.failed);
    match failed {
        0 => line("Starts that fail, nodes that do not come."),
        _ => line(&format!(
            "Starts that fail: {failed} of {} recorded ones did.",
            failed + advice.load.start_up.len()
        )),
    }
    line(
        "The bill. A GPU counts from the request that wants it until its replica goes: a node that stays longer, or is billed by the hour, costs more.",
    );
    line("Other routes that share the GPUs. docs/advise.md has what is simplified of KEDA and its HPA.");
    text
}
