//! The advice in words.

mod config;

use std::fmt::Write as _;

use super::{
    Advice,
    args::ScaledBy,
    arrivals::stamp,
    choice::{Candidate, Choice, Goal},
    grid::Spread,
};
use crate::domain::Period;

/// A column of the table: what stands above it, and what is in it.
type Column<'a> = (&'a str, &'a str, Box<dyn Fn(&Candidate) -> String + 'a>);

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

fn table(advice: &Advice<'_>) -> String {
    let month = advice.month();
    let hours = move |hours: f64| number(hours * month);
    let mut columns: Vec<Column<'_>> = vec![
        ("", "floor", Box::new(|one| one.settings.floor.to_string())),
        (
            "",
            "idle",
            Box::new(|one| if one.settings.floor == 0 { period(one.settings.idle) } else { "–".into() }),
        ),
    ];
    if varies(advice, |one| one.settings.concurrency) {
        columns.push(("", "takes", Box::new(|one| one.settings.concurrency.to_string())));
    }
    if varies(advice, |one| one.settings.hold) {
        columns.push(("", "held for", Box::new(|one| period(one.settings.hold))));
    }
    if varies(advice, |one| one.settings.hold_requests) {
        columns.push(("", "held", Box::new(|one| one.settings.hold_requests.to_string())));
    }
    columns.push(("GPU hours a month", "all", Box::new(move |one| hours(one.figures.gpu_hours.middle))));
    columns.push(("GPU hours a month", "serving", Box::new(move |one| hours(one.figures.serving_gpu_hours))));
    columns.push(("GPU hours a month", "idle", Box::new(move |one| hours(one.figures.idle_gpu_hours))));
    columns.push(("GPU hours a month", "cold", Box::new(move |one| hours(one.figures.cold_gpu_hours))));
    if let Some(price) = advice.args.gpu_hour_price {
        columns.push(("", "price", Box::new(move |one| money(one.figures.gpu_hours.middle * month * price))));
    }
    columns.push(("", "saved", Box::new(|one| signed(advice.saved(&one.figures)))));
    columns.push((
        "cold starts",
        "a day",
        Box::new(|one| format!("{:.1}", one.figures.cold_starts.middle / advice.days())),
    ));
    columns.push(("cold starts", "met by", Box::new(|one| percent(one.figures.met_cold))));
    columns.push(("waited", "median", Box::new(|one| wait(one.figures.median_ms.middle))));
    columns.push(("waited", "p90", Box::new(|one| wait(one.figures.p90_ms.middle))));
    columns.push(("waited", "p99", Box::new(|one| wait(one.figures.p99_ms.middle))));
    columns.push(("", "lost", Box::new(|one| percent(one.figures.lost()))));

    let cells: Vec<Vec<String>> =
        advice.candidates.iter().map(|one| columns.iter().map(|(_, _, cell)| cell(one)).collect()).collect();
    let width = |column: usize| {
        let longest = cells.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        longest.max(columns[column].1.chars().count())
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::from("    ");
    let mut column = 0;
    while column < columns.len() {
        let group = columns[column].0;
        let mut end = column + 1;
        while !group.is_empty() && end < columns.len() && columns[end].0 == group {
            end += 1;
        }
        let wide = widths[column..end].iter().sum::<usize>() + 2 * (end - column - 1);
        let _ = write!(text, "  {group:^wide$}");
        column = end;
    }
    let mut text = format!("{}\n", text.trim_end());
    let mut line = |mark: &str, row: &mut dyn Iterator<Item = &str>| {
        let row: String = row.zip(&widths).map(|(cell, width)| format!("  {cell:>width$}")).collect();
        let _ = writeln!(text, "  {mark:<2}{row}");
    };
    line("", &mut columns.iter().map(|(_, name, _)| *name));
    for (index, (row, one)) in cells.iter().zip(&advice.candidates).enumerate() {
        let chosen = advice.choice.is_some_and(|choice| choice.index() == index);
        let mark = format!("{}{}", if chosen { "→" } else { "" }, if one.on_front { "*" } else { "" });
        line(&mark, &mut row.iter().map(String::as_str));
    }
    let always = &advice.always_on;
    let price = advice
        .args
        .gpu_hour_price
        .map(|price| format!(", {}", money(always.gpu_hours.middle * month * price)));
    let _ = writeln!(
        text,
        "\n  * nothing else is cheaper without a longer p99. Saved: of {} GPU hours a month{}, which one replica costs that\n    \
         is always up. Waited: until sent to a replica; a request that is lost has waited for ever. Lost: held in vain,\n    \
         or refused.",
        number(always.gpu_hours.middle * month),
        price.unwrap_or_default()
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
    let mut text = match (choice, goal) {
        (Choice::Reached(_), Goal::Wait(..)) => format!(
            "Recommended: {setting}. It is the cheapest of {} settings that keep {asked}{}.\n",
            advice.candidates.len(),
            match advice.seeds.len() {
                1 => "",
                _ => " in 19 of 20 replays",
            }
        ),
        (Choice::Reached(_), Goal::GpuHours(_)) => format!(
            "Recommended: {setting}. Of {} settings, none that costs {asked} has a shorter p99.\n",
            advice.candidates.len()
        ),
        (Choice::Closest(_), _) => format!(
            "None of {} settings reaches {asked} and loses no more than {} of the requests. Closest: {setting}.\n",
            advice.candidates.len(),
            percent(advice.args.max_lost)
        ),
    };
    let saved = advice.saved(figures);
    let compared = if saved >= 0.0 { "less" } else { "more" };
    let spread = |spread: Spread<Option<u64>>| match spread {
        Spread { low, middle, high } if low == middle && middle == high => wait(middle),
        Spread { low, middle, high } => format!("{} ({} to {})", wait(middle), wait(low), wait(high)),
    };
    let mut line = |words: String| {
        let _ = writeln!(text, "  - {words}");
    };
    line(format!(
        "It takes {} GPU hours a month{}, {} {compared} than one replica that is always up; of these {} serve, {} idle,\n    {} start.",
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
    let mut line = |words: &str| {
        let _ = writeln!(text, "  - {words}");
    };
    line(
        "Next week. It is this log again; the ranges above are those of start-ups drawn anew, not of other traffic.",
    );
    if advice.days() < 7.0 {
        line("A whole week: the log is shorter, and a month is taken for a multiple of it.");
    }
    line(
        "What callers do while they wait. Each request comes when the log says, once: who gives up sooner than hold.timeout,\n    \
         who tries again, and who asks the next question only after the answer is not known, so more requests meet a\n    \
         cold start here than would.",
    );
    line(
        "Load: a request takes as long as the log says, however many others its replica has. If the log has waits in its\n    durations, they are counted again.",
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
        "The bill. A GPU counts from the request that wants it until its replica goes: a node that stays longer, or is\n    billed by the hour, costs more.",
    );
    line("Other routes that share the GPUs. docs/advise.md has what is simplified of KEDA and its HPA.");
    text
}

fn varies<T: PartialEq>(advice: &Advice<'_>, what: impl Fn(&Candidate) -> T) -> bool {
    advice.candidates.windows(2).any(|pair| what(&pair[0]) != what(&pair[1]))
}

/// A time as it is configured.
pub(super) fn period(ms: u64) -> String {
    Period::from_millis(ms).to_string().replace(' ', "")
}

/// A wait, in two units at the most.
fn wait(ms: Option<u64>) -> String {
    match ms {
        None => "never".into(),
        Some(0) => "0".into(),
        Some(ms @ 1..1_000) => format!("{ms} ms"),
        Some(ms @ 1_000..60_000) => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        Some(ms @ 60_000..3_600_000) => format!("{}m {:02}s", ms / 60_000, ms / 1_000 % 60),
        Some(ms) => format!("{}h {:02}m", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// What samples, in order, are like.
fn samples(sorted: &[u64]) -> String {
    let at = |share: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to their number")]
        let rank = (share * sorted.len() as f64).ceil() as usize;
        wait(sorted.get(rank.max(1) - 1).copied())
    };
    match (sorted.first(), sorted.last()) {
        (Some(first), Some(last)) if first == last => wait(Some(*first)),
        _ => format!("median {}, p90 {}, longest {}", at(0.5), at(0.9), at(1.0)),
    }
}

fn days(days: f64) -> String {
    if days < 1.5 { format!("{:.1} hours", days * 24.0) } else { format!("{:.0} days", days) }
}

fn percent(share: f64) -> String {
    match share * 100.0 {
        0.0 => "0".into(),
        percent if percent < 0.01 => "<0.01 %".into(),
        percent if percent < 0.1 => format!("{percent:.2} %"),
        percent if percent < 10.0 => format!("{percent:.1} %"),
        percent => format!("{percent:.0} %"),
    }
}

fn share(part: f64, all: f64) -> String {
    percent(part / all.max(f64::MIN_POSITIVE))
}

fn signed(share: f64) -> String {
    let rounded = (share * 100.0).round();
    if rounded == 0.0 { "0".into() } else { format!("{rounded:.0} %") }
}

/// Three digits or so.
fn number(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.1}"),
        value => thousands(value.round() as usize),
    }
}

fn money(value: f64) -> String {
    if value < 100.0 { format!("{value:.2}") } else { thousands(value.round() as usize) }
}

fn thousands(count: usize) -> String {
    let digits = count.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}
