//! Table of all settings.

use std::{fmt::Write as _, iter};

use super::{
    super::{advice::Advice, choice::Candidate},
    format::{money, number, paragraph, percent, period, signed, wait},
};
use crate::text_table::{Align, TextTable};

/// A column: group heading, heading, and cell of a candidate.
type Column<'a> = (&'a str, &'a str, Box<dyn Fn(&Candidate) -> String + 'a>);

pub(super) fn table(advice: &Advice<'_>) -> String {
    let month = advice.windows_per_month();
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
        columns.push(("", "concurrency", Box::new(|one| one.settings.concurrency.to_string())));
    }
    if varies(advice, |one| one.settings.hold) {
        columns.push(("", "hold timeout", Box::new(|one| period(one.settings.hold))));
    }
    if varies(advice, |one| one.settings.hold_requests) {
        columns.push(("", "hold max", Box::new(|one| one.settings.hold_requests.to_string())));
    }
    columns.push(("GPU hours per month", "all", Box::new(move |one| hours(one.figures.gpu_hours.middle))));
    columns.push((
        "GPU hours per month",
        "serving",
        Box::new(move |one| hours(one.figures.serving_gpu_hours)),
    ));
    columns.push(("GPU hours per month", "idle", Box::new(move |one| hours(one.figures.idle_gpu_hours))));
    columns.push(("GPU hours per month", "cold", Box::new(move |one| hours(one.figures.cold_gpu_hours))));
    if let Some(price) = advice.args.gpu_hour_price {
        columns.push(("", "price", Box::new(move |one| money(one.figures.gpu_hours.middle * month * price))));
    }
    columns.push(("", "saved", Box::new(|one| signed(advice.saved(&one.figures)))));
    columns.push((
        "cold starts",
        "per day",
        Box::new(|one| format!("{:.1}", one.figures.cold_starts.middle / advice.days())),
    ));
    columns.push(("cold starts", "met by", Box::new(|one| percent(one.figures.met_cold))));
    columns.push(("wait", "median", Box::new(|one| wait(one.figures.median_ms.middle))));
    columns.push(("wait", "p90", Box::new(|one| wait(one.figures.p90_ms.middle))));
    columns.push(("wait", "p99", Box::new(|one| wait(one.figures.p99_ms.middle))));
    columns.push(("", "lost", Box::new(|one| percent(one.figures.lost()))));

    let mut table = TextTable::new([vec![Align::Left], vec![Align::Right; columns.len()]].concat());
    table.row(iter::once("").chain(columns.iter().map(|(_, name, _)| *name)));
    for (index, one) in advice.candidates.iter().enumerate() {
        let chosen = advice.choice.is_some_and(|choice| choice.index() == index);
        let mark = format!("{}{}", if chosen { "→" } else { "" }, if one.on_front { "*" } else { "" });
        table.row(iter::once(format!("{mark:<2}")).chain(columns.iter().map(|(_, _, cell)| cell(one))));
    }
    let widths = &table.widths()[1..];
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
    for line in table.lines() {
        let _ = writeln!(text, "  {line}");
    }
    let always = &advice.always_on;
    let price = advice
        .args
        .gpu_hour_price
        .map(|price| format!(", {}", money(always.gpu_hours.middle * month * price)));
    let legend = format!(
        "Pareto-optimal in GPU hours and p99. Saved: relative to {} GPU hours per month{}, one replica always on. Wait: until \
         dispatch to a replica; infinite for lost requests. Lost: timed out or rejected.",
        number(always.gpu_hours.middle * month),
        price.unwrap_or_default()
    );
    text.push('\n');
    paragraph(&mut text, "  * ", "    ", &legend);
    text
}

/// Returns whether the candidates differ in `what`.
pub(super) fn varies<T: PartialEq>(advice: &Advice<'_>, what: impl Fn(&Candidate) -> T) -> bool {
    advice.candidates.windows(2).any(|pair| what(&pair[0]) != what(&pair[1]))
}
