//! Request logs: CSV, JSON lines, and access logs of nginx and Envoy.

mod access;
mod line;

use std::fmt::Write as _;

use jiff::Timestamp;
use serde_json::Value;
use thiserror::Error;

pub use line::LoggedRequest;
use line::{LogLine, span};

/// Requests in order of arrival within the window `from..to`, in milliseconds since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestLog {
    pub requests: Vec<LoggedRequest>,
    pub from: i64,
    pub to: i64,
}

/// Parsed content of a log file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParsedLog {
    /// Requests in the order of the file.
    pub requests: Vec<LoggedRequest>,
    /// Number of requests that need no model server, such as health checks and model lists.
    pub without_work: usize,
    /// Number of lines that could not be parsed.
    pub skipped: usize,
    /// Line number and error of the first skipped line.
    pub first_skipped: Option<(usize, String)>,
}

/// A log that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{name}: {reason}")]
pub struct LogError {
    name: String,
    reason: String,
}

/// Format of a log file.
enum LogFileFormat {
    Csv { at: usize, duration: Option<(usize, f64)> },
    JsonLines,
    Access,
}

/// Accepted keys of the arrival time.
const TIME_KEYS: [&str; 8] =
    ["time", "timestamp", "ts", "@timestamp", "start_time", "time_iso8601", "date", "at"];

/// Accepted keys of the duration, with their unit in milliseconds.
const DURATION_KEYS: [(&str, f64); 6] = [
    ("duration_ms", 1.0),
    ("latency_ms", 1.0),
    ("duration", 1.0),
    ("duration_s", 1000.0),
    ("request_time", 1000.0),
    ("seconds", 1000.0),
];

const DAY_MS: i64 = 24 * 3600 * 1000;

/// Parses a log. The first line determines the format.
///
/// # Errors
/// If the log has no usable request, or if more than half of its lines are invalid.
pub fn parse(name: &str, text: &str) -> Result<ParsedLog, LogError> {
    let fail = |reason: String| LogError { name: name.into(), reason };
    let mut lines = text.lines().enumerate().filter(|(_, line)| !is_comment(line)).peekable();
    let Some((_, first)) = lines.peek() else { return Err(fail("the file is empty".into())) };
    let (format, has_header) = LogFileFormat::detect(first).map_err(fail)?;
    let mut parsed = ParsedLog::default();
    for (index, line) in lines.skip(usize::from(has_header)) {
        match format.read(line) {
            Ok(LogLine::Request(request)) => parsed.requests.push(request),
            Ok(LogLine::WithoutWork) => parsed.without_work += 1,
            Err(reason) => {
                parsed.skipped += 1;
                parsed.first_skipped.get_or_insert((index + 1, reason));
            }
        }
    }
    let understood = parsed.requests.len() + parsed.without_work;
    match &parsed.first_skipped {
        Some((line, reason)) if parsed.skipped > understood => Err(fail(format!(
            "line {line}: {reason}; {} of {} lines are invalid",
            parsed.skipped,
            parsed.skipped + understood
        ))),
        _ if parsed.requests.is_empty() => Err(fail(match parsed.without_work {
            0 => "the file contains no requests".into(),
            many => format!("none of its {many} requests needs a model server"),
        })),
        _ => Ok(parsed),
    }
}

fn is_comment(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

/// Parses a time: RFC 3339 or a number since the epoch.
fn time(text: &str) -> Result<i64, String> {
    let text = text.trim().trim_matches('"');
    if let Ok(number) = text.parse::<f64>() {
        return epoch(number);
    }
    text.parse::<Timestamp>().map(Timestamp::as_millisecond).map_err(|_| {
        format!(
            "`{text}` is not a time; use RFC 3339 with an offset (2026-11-02T08:15:00Z) or seconds since 1970"
        )
    })
}

/// Converts seconds, milliseconds, microseconds or nanoseconds since the epoch to milliseconds. The magnitude identifies
/// the unit for times from 1973 to 5138.
fn epoch(number: f64) -> Result<i64, String> {
    let ms = match number.abs() {
        seconds if seconds < 1e11 => number * 1e3,
        ms if ms < 1e14 => number,
        us if us < 1e17 => number / 1e3,
        _ => number / 1e6,
    };
    if !ms.is_finite() {
        return Err(format!("`{number}` is not a time"));
    }
    #[expect(clippy::cast_possible_truncation, reason = "saturates")]
    let ms = ms.round() as i64;
    Ok(ms)
}

// === impl LogFileFormat ===

impl LogFileFormat {
    /// Detects the format from the first line. The flag is set if that line is a header.
    fn detect(line: &str) -> Result<(Self, bool), String> {
        if line.trim_start().starts_with('{') {
            return Ok((Self::JsonLines, false));
        }
        if access::is_access(line) {
            return Ok((Self::Access, false));
        }
        let cells: Vec<_> = line.split(',').map(|cell| cell.trim().trim_matches('"')).collect();
        if time(cells[0]).is_ok() {
            return Ok((Self::Csv { at: 0, duration: (cells.len() > 1).then_some((1, 1.0)) }, false));
        }
        let place = |name: &str| cells.iter().position(|cell| cell.eq_ignore_ascii_case(name));
        let at = TIME_KEYS.into_iter().find_map(place).ok_or_else(|| {
            format!(
                "the first line, `{line}`, is neither a request nor a header with a column `{}`",
                TIME_KEYS[..3].join("`, `")
            )
        })?;
        let duration = DURATION_KEYS.into_iter().find_map(|(name, unit)| Some((place(name)?, unit)));
        Ok((Self::Csv { at, duration }, true))
    }

    fn read(&self, line: &str) -> Result<LogLine, String> {
        match self {
            Self::Csv { at, duration } => {
                let cells: Vec<_> = line.split(',').collect();
                let cell = |place: usize| cells.get(place).map_or("", |cell| cell.trim().trim_matches('"'));
                let service = match duration {
                    Some((place, unit)) if !cell(*place).is_empty() => {
                        let text = cell(*place);
                        let number = text.parse().map_err(|_| format!("`{text}` is not a duration"))?;
                        Some(span(number, *unit)?)
                    }
                    _ => None,
                };
                Ok(LogLine::Request(LoggedRequest { at: time(cell(*at))?, service }))
            }
            Self::JsonLines => json(line),
            Self::Access => access::read(line),
        }
    }
}

fn json(line: &str) -> Result<LogLine, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| format!("invalid JSON: {error}"))?;
    let at = match TIME_KEYS.into_iter().find_map(|name| value.get(name)) {
        Some(Value::String(text)) => time(text)?,
        Some(Value::Number(number)) => epoch(number.as_f64().unwrap_or(f64::NAN))?,
        Some(other) => return Err(format!("`{other}` is not a time")),
        None => return Err(format!("no time (`{}`)", TIME_KEYS[..3].join("`, `"))),
    };
    let duration = DURATION_KEYS.into_iter().find_map(|(name, unit)| Some((value.get(name)?, unit)));
    let service = match duration {
        None | Some((Value::Null, _)) => None,
        Some((given, unit)) => {
            // nginx writes numbers as strings.
            let number = given.as_f64().or_else(|| given.as_str()?.parse().ok());
            Some(span(number.ok_or_else(|| format!("`{given}` is not a duration"))?, unit)?)
        }
    };
    let method = ["method", "request_method"].into_iter().find_map(|name| value.get(name)?.as_str());
    let path = ["path", "uri", "request_uri"].into_iter().find_map(|name| value.get(name)?.as_str());
    Ok(match (method, path) {
        (method, Some(path)) if !access::needs_server(method.unwrap_or("POST"), path) => LogLine::WithoutWork,
        _ => LogLine::Request(LoggedRequest { at, service }),
    })
}

// === impl RequestLog ===

impl RequestLog {
    /// Selects the requests in `from..to`. By default the window spans all requests, extended to whole days (UTC) if it is
    /// longer than a day.
    ///
    /// # Errors
    /// If the window is empty.
    pub fn new(mut requests: Vec<LoggedRequest>, from: Option<i64>, to: Option<i64>) -> Result<Self, String> {
        requests.sort_by_key(|request| request.at);
        let (Some(first), Some(last)) = (requests.first().copied(), requests.last().copied()) else {
            return Err("no requests".into());
        };
        let end = last.at.saturating_add(i64::try_from(last.service.unwrap_or_default()).unwrap_or(i64::MAX));
        let days = end - first.at > DAY_MS;
        let from = from.unwrap_or(if days { first.at.div_euclid(DAY_MS) * DAY_MS } else { first.at });
        let to = to.unwrap_or(if days {
            (end - 1).div_euclid(DAY_MS) * DAY_MS + DAY_MS
        } else {
            end.max(first.at + 1)
        });
        if from >= to {
            return Err(format!("the window ends ({}) before it starts ({})", stamp(to), stamp(from)));
        }
        requests.retain(|request| (from..to).contains(&request.at));
        if requests.is_empty() {
            return Err(format!("no requests between {} and {}", stamp(from), stamp(to)));
        }
        Ok(Self { requests, from, to })
    }

    /// Returns the length of the window in milliseconds.
    pub const fn window_ms(&self) -> u64 {
        self.to.abs_diff(self.from)
    }

    /// Formats the log as CSV, readable by [`parse`].
    pub fn to_csv(&self) -> String {
        let mut text = String::from("time,duration_ms\n");
        for request in &self.requests {
            let duration = request.service.map(|ms| ms.to_string()).unwrap_or_default();
            let _ = writeln!(text, "{},{duration}", stamp(request.at));
        }
        text
    }
}

/// Formats a time as RFC 3339, with milliseconds unless they are zero.
pub fn stamp(ms: i64) -> String {
    match Timestamp::from_millisecond(ms) {
        Ok(time) if ms % 1000 == 0 => format!("{time:.0}"),
        Ok(time) => format!("{time:.3}"),
        Err(_) => format!("{ms} ms after 1970"),
    }
}

#[cfg(test)]
mod tests;
