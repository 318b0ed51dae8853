//! Summary of a configuration for the `check` command.

use std::{cmp::Reverse, fmt::Display};

use super::{Config, LogFormat, MemoryLimit, budget::WorstCase};
use crate::{
    domain::{KeepaliveMode, Matcher, ProcessTarget, Route, Target, WhenIdle, mask_command},
    text_table::{Align, TextTable},
};

/// Width of the summary if it is not written to a narrower terminal.
pub(super) const MAX_REPORT_CHARS: usize = 110;

/// Columns with their maximum widths; together with the gaps, about [`MAX_REPORT_CHARS`].
const COLUMNS: [(&str, usize); 6] =
    [("NAME", 18), ("MATCH", 26), ("TARGET", 26), ("HOLD", 12), ("KEEPALIVE", 10), ("AT A TIME", 9)];

/// Width below which the table would be unreadable, and is wrapped by the terminal instead.
const MIN_REPORT_CHARS: usize = 72;

/// Width of the names before the values.
const NAME_CHARS: usize = 11;

/// Headers whose values are usually credentials.
const SECRET_HEADERS: [&str; 4] = ["authorization", "proxy-authorization", "cookie", "x-api-key"];

impl Config {
    /// Summarizes addresses, limits, and routes in the order of matching.
    pub fn describe(&self) -> String {
        body(self, None, MAX_REPORT_CHARS) + &verdict(self, 0)
    }
}

/// Formats `ok: 2 routes, 1 warning`.
pub(super) fn verdict(config: &Config, warnings: usize) -> String {
    let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let routes = count(config.routes.len(), "route");
    match warnings {
        0 => format!("ok: {routes}\n"),
        _ => format!("ok: {routes}, {}\n", count(warnings, "warning")),
    }
}

/// Formats the summary for a terminal of this width; `memory` is the available memory, if known.
pub(super) fn body(config: &Config, memory: Option<&MemoryLimit>, width: usize) -> String {
    let width = width.clamp(MIN_REPORT_CHARS, MAX_REPORT_CHARS);
    let limits = &config.limits;
    let workers = config.workers.map_or("one per core".to_owned(), |workers| workers.to_string());
    let format = match config.log.format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    let log =
        if config.log.access { format!("{format}, with a line for each request") } else { format.to_owned() };
    let worst = WorstCase::of(limits);
    let of_memory = memory.map_or(String::new(), |memory| format!(", of {memory}"));
    let lines = [
        ("listen", config.listen.to_string()),
        ("admin", config.admin.to_string()),
        ("workers", workers),
        ("log", log),
        (
            "draining",
            format!("accepts for {}, then ends within {}", config.drain_delay, config.drain_timeout),
        ),
        (
            "limits",
            format!(
                "body {}, all bodies {}, head {}, {} connections",
                limits.max_body_bytes,
                limits.max_buffered_bytes,
                limits.max_header_bytes,
                limits.max_connections
            ),
        ),
        ("memory", format!("clients take at most {}{of_memory}", worst.total_mebibytes())),
        ("", worst.to_string()),
        (
            "time-outs",
            format!(
                "head {}, body {}, idle {}, stall {}",
                limits.header_timeout, limits.body_timeout, limits.idle_timeout, limits.stall_timeout
            ),
        ),
    ];
    let routes = in_matching_order(&config.routes);
    let mut text = lines.map(|(name, value)| entry(name, &value, width)).concat();
    text.push('\n');
    text.push_str(&table(&routes, width));
    text.push('\n');
    for route in routes {
        if let Target::Process(process) = &route.target {
            text.push_str(&process_lines(route, process, width));
        }
    }
    text
}

/// Formats a name with its value, wrapped behind it.
fn entry(name: &str, value: &str, width: usize) -> String {
    let lines = wrapped(value, width - NAME_CHARS);
    let names = std::iter::once(name).chain(std::iter::repeat(""));
    lines.iter().zip(names).map(|(line, name)| format!("{name:<NAME_CHARS$}{line}\n")).collect()
}

/// Formats the settings of a process that the table has no room for. Values of variables may be secrets.
fn process_lines(route: &Route, process: &ProcessTarget, width: usize) -> String {
    let ProcessTarget {
        env, directory, idle_timeout, when_idle, sleep_level, stop_after, stop_timeout, ..
    } = process;
    let readiness = &route.readiness;
    let idle = match (when_idle, stop_after) {
        (WhenIdle::Stop, _) => "stop".to_owned(),
        (WhenIdle::Sleep, None) => format!("sleep at level {sleep_level}"),
        (WhenIdle::Sleep, Some(after)) => format!("sleep at level {sleep_level}, stop after {after}"),
    };
    let names = env.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let lines = [
        ("idle", Some(format!("after {idle_timeout}: {idle}; killed {stop_timeout} after SIGTERM"))),
        (
            "readiness",
            Some(format!(
                "GET {} every {}, each within {}; ready within {}",
                readiness.path, readiness.interval, readiness.timeout, readiness.activation_timeout
            )),
        ),
        ("directory", directory.clone()),
        ("env", (!names.is_empty()).then_some(names)),
    ];
    let lines = lines.into_iter().filter_map(|(name, value)| Some(entry(name, &value?, width)));
    format!("process of {}\n{}\n", route.name, lines.collect::<String>())
}

/// Sorts routes by specificity as the router does: host, then path, then headers, then model.
fn in_matching_order(routes: &[Route]) -> Vec<&Route> {
    let mut routes = routes.iter().collect::<Vec<_>>();
    routes.sort_by_key(|route| {
        let Matcher { models, hosts, paths, headers, .. } = &route.matcher;
        let host = |host: &String| (!host.starts_with("*."), host.len());
        Reverse((
            hosts.iter().map(host).max(),
            paths.iter().map(|path| path.trim_end_matches('/').len()).max().unwrap_or(0),
            headers.len(),
            !models.is_empty(),
        ))
    });
    routes
}

fn table(routes: &[&Route], width: usize) -> String {
    let widths = column_widths(width);
    let mut table = TextTable::new([Align::Left; 6]);
    let titles = COLUMNS.map(|(title, _)| vec![title.to_owned()]);
    for row in std::iter::once(titles).chain(routes.iter().map(|route| cells(route))) {
        let wrap = |(lines, width): (Vec<String>, usize)| {
            lines.iter().flat_map(|line| wrapped(line, width)).collect::<Vec<_>>().join("\n")
        };
        table.row(row.into_iter().zip(widths).map(wrap));
    }
    table.to_string()
}

/// Returns the maximum widths of the columns. In a narrow terminal the first three share the width that the others do
/// not use.
fn column_widths(width: usize) -> [usize; 6] {
    let mut widths = COLUMNS.map(|(_, width)| width);
    if width < MAX_REPORT_CHARS {
        let gaps = 2 * (widths.len() - 1);
        let room = width - gaps - widths[3..].iter().sum::<usize>();
        let all = widths[..3].iter().sum::<usize>();
        widths[..3].iter_mut().for_each(|column| *column = *column * room / all);
    }
    widths
}

fn cells(route: &Route) -> [Vec<String>; 6] {
    let Route { name, matcher, target, hold, keepalive, concurrency, .. } = route;
    let target = match target {
        Target::Process(process) => mask_command(&process.command),
        Target::Url(url) => url.clone(),
        Target::Cluster(target) => target.to_string(),
    };
    let sent = |what: &str| {
        let mut sent = vec![
            what.to_owned(),
            format!("after {}", keepalive.after),
            format!("every {}", keepalive.interval),
        ];
        if keepalive.while_streaming {
            sent.push("also between events".to_owned());
        }
        sent
    };
    let keepalive = match keepalive.mode {
        KeepaliveMode::Off => vec!["off".to_owned()],
        KeepaliveMode::Comment => sent("comment"),
        KeepaliveMode::Chunk => sent("chunk"),
        KeepaliveMode::Whitespace => sent("whitespace"),
    };
    let ramp = (concurrency.ramp_start < concurrency.max).then(|| format!("from {}", concurrency.ramp_start));
    [
        vec![name.to_string()],
        matches(matcher),
        vec![target],
        vec![
            format!("{} request{}", hold.max_requests, if hold.max_requests == 1 { "" } else { "s" }),
            hold.max_bytes.to_string(),
            hold.timeout.to_string(),
        ],
        keepalive,
        [concurrency.max.to_string()].into_iter().chain(ramp).collect(),
    ]
}

fn matches(matcher: &Matcher) -> Vec<String> {
    let Matcher { models, hosts, paths, headers, .. } = matcher;
    let kind = |name: &str, values: &[String]| {
        let plural = if values.len() == 1 { "" } else { "s" };
        (!values.is_empty()).then(|| format!("{name}{plural} {}", values.join(", ")))
    };
    let header = |(name, value): (&String, &String)| {
        let secret = SECRET_HEADERS.contains(&name.to_ascii_lowercase().as_str());
        let value: &dyn Display = if secret { &"…" } else { value };
        format!("{name}: {value}")
    };
    let kinds = [kind("host", hosts), kind("path", paths), kind("model", models)].into_iter().flatten();
    let lines = kinds.chain(headers.iter().map(header)).collect::<Vec<_>>();
    if lines.is_empty() { vec!["every request".to_owned()] } else { lines }
}

/// Wraps a line at spaces, and longer words anywhere. Control characters become spaces.
fn wrapped(line: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut room = width;
    for word in line.split(|character: char| character.is_whitespace() || character.is_control()) {
        let mut word = word.chars().collect::<Vec<_>>();
        if room < width && word.len() >= room {
            lines.push(String::new());
            room = width;
        }
        while word.len() > width {
            lines.extend([word.drain(..width).collect::<String>(), String::new()]);
        }
        if word.is_empty() {
            continue;
        }
        let last = lines.len() - 1;
        let gap = if lines[last].is_empty() { "" } else { " " };
        lines[last].extend(gap.chars().chain(word.iter().copied()));
        room = width.saturating_sub(lines[last].chars().count());
    }
    lines.retain(|line| !line.is_empty());
    lines
}
