//! A log of arrivals: CSV, JSON lines, and the access logs of nginx and Envoy.

mod access;

use std::fmt::Write as _;

use jiff::Timestamp;
use serde_json::Value;
use thiserror::Error;

/// A request of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// When it came, in milliseconds since the epoch.
    pub at: i64,
    /// How long it took, in milliseconds, if the log says so.
    pub service: Option<u64>,
}

/// The requests of a log, in their order, and the time that it is about: `from..to`, in milliseconds since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Those within the time.
    pub requests: Vec<Logged>,
    /// When it begins.
    pub from: i64,
    /// When it ends.
    pub to: i64,
}

/// What was read of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The requests, as they stand there.
    pub requests: Vec<Logged>,
    /// Lines of requests that wake nothing: health checks, lists of models.
    pub wakes_nothing: usize,
    /// Lines that were not understood, and why the first of them was not.
    pub skipped: usize,
    /// The number of the first of those, and what was wrong.
    pub first_skipped: Option<(usize, String)>,
}

/// Why a log could not be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{name}: {reason}")]
pub struct LogError {
    name: String,
    reason: String,
}

/// What a line says.
enum Line {
    Request(Logged),
    WakesNothing,
}

/// How a file is written.
enum Format {
    Csv { at: usize, duration: Option<(usize, f64)> },
    JsonLines,
    Access,
}

/// Names that the time of a request goes by.
const TIMES: [&str; 8] =
    ["time", "timestamp", "ts", "@timestamp", "start_time", "time_iso8601", "date", "at"];

/// Names that its duration goes by, and how many milliseconds one of it is.
const DURATIONS: [(&str, f64); 6] = [
    ("duration_ms", 1.0),
    ("latency_ms", 1.0),
    ("duration", 1.0),
    ("duration_s", 1000.0),
    ("request_time", 1000.0),
    ("seconds", 1000.0),
];

const DAY: i64 = 24 * 3600 * 1000;

/// Reads a log.
///
/// # Errors
/// When nothing in it, or less than half of it, is understood.
pub fn parse(name: &str, text: &str) -> Result<Parsed, LogError> {
    let fail = |reason: String| LogError { name: name.into(), reason };
    let mut lines = text.lines().enumerate().filter(|(_, line)| !is_remark(line)).peekable();
    let Some((_, first)) = lines.peek() else { return Err(fail("there is no line in it".into())) };
    let (format, has_header) = Format::of(first).map_err(fail)?;
    let mut parsed = Parsed::default();
    for (index, line) in lines.skip(usize::from(has_header)) {
        match format.read(line) {
            Ok(Line::Request(request)) => parsed.requests.push(request),
            Ok(Line::WakesNothing) => parsed.wakes_nothing += 1,
            Err(reason) => {
                parsed.skipped += 1;
                parsed.first_skipped.get_or_insert((index + 1, reason));
            }
        }
    }
    let understood = parsed.requests.len() + parsed.wakes_nothing;
    match &parsed.first_skipped {
        Some((line, reason)) if parsed.skipped > understood => Err(fail(format!(
            "line {line}: {reason}; {} of {} lines were not understood",
            parsed.skipped,
            parsed.skipped + understood
        ))),
        _ if parsed.requests.is_empty() => Err(fail(match parsed.wakes_nothing {
            0 => "there is no request in it".into(),
            many => format!("none of its {many} requests is work for a model"),
        })),
        _ => Ok(parsed),
    }
}

fn is_remark(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

/// A time as people and programs write it.
fn time(text: &str) -> Result<i64, String> {
    let text = text.trim().trim_matches('"');
    if let Ok(number) = text.parse::<f64>() {
        return epoch(number);
    }
    text.parse::<Timestamp>().map(Timestamp::as_millisecond).map_err(|_| {
        format!(
            "`{text}` is no time; write RFC 3339 with an offset (2026-11-02T08:15:00Z) or seconds since 1970"
        )
    })
}

/// Seconds, milliseconds, microseconds or nanoseconds since the epoch: the sizes tell them apart from 1973 to 5138.
fn epoch(number: f64) -> Result<i64, String> {
    let ms = match number.abs() {
        seconds if seconds < 1e11 => number * 1e3,
        ms if ms < 1e14 => number,
        us if us < 1e17 => number / 1e3,
        _ => number / 1e6,
    };
    if !ms.is_finite() {
        return Err(format!("`{number}` is no time"));
    }
    #[expect(clippy::cast_possible_truncation, reason = "saturates")]
    let ms = ms.round() as i64;
    Ok(ms)
}

/// A number of milliseconds.
fn span(number: f64, unit: f64) -> Result<u64, String> {
    if !number.is_finite() || number < 0.0 {
        return Err(format!("`{number}` is no duration"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative, and saturates"
    )]
    let ms = (number * unit).round() as u64;
    Ok(ms)
}

// === impl Format ===

impl Format {
    /// By the first line; whether that is a header.
    fn of(line: &str) -> Result<(Self, bool), String> {
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
        let at = TIMES.into_iter().find_map(place).ok_or_else(|| {
            format!(
                "its first line, `{line}`, is neither a request nor a header with a column `{}`",
                TIMES[..3].join("`, `")
            )
        })?;
        let duration = DURATIONS.into_iter().find_map(|(name, unit)| Some((place(name)?, unit)));
        Ok((Self::Csv { at, duration }, true))
    }

    fn read(&self, line: &str) -> Result<Line, String> {
        match self {
            Self::Csv { at, duration } => {
                let cells: Vec<_> = line.split(',').collect();
                let cell = |place: usize| cells.get(place).map_or("", |cell| cell.trim().trim_matches('"'));
                let service = match duration {
                    Some((place, unit)) if !cell(*place).is_empty() => {
                        let text = cell(*place);
                        let number = text.parse().map_err(|_| format!("`{text}` is no duration"))?;
                        Some(span(number, *unit)?)
                    }
                    _ => None,
                };
                Ok(Line::Request(Logged { at: time(cell(*at))?, service }))
            }
            Self::JsonLines => json(line),
            Self::Access => access::read(line),
        }
    }
}

fn json(line: &str) -> Result<Line, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| format!("no JSON: {error}"))?;
    let at = match TIMES.into_iter().find_map(|name| value.get(name)) {
        Some(Value::String(text)) => time(text)?,
        Some(Value::Number(number)) => epoch(number.as_f64().unwrap_or(f64::NAN))?,
        Some(other) => return Err(format!("`{other}` is no time")),
        None => return Err(format!("no time in it (`{}`)", TIMES[..3].join("`, `"))),
    };
    let duration = DURATIONS.into_iter().find_map(|(name, unit)| Some((value.get(name)?, unit)));
    let service = match duration {
        None | Some((Value::Null, _)) => None,
        Some((given, unit)) => {
            // nginx quotes its numbers.
            let number = given.as_f64().or_else(|| given.as_str()?.parse().ok());
            Some(span(number.ok_or_else(|| format!("`{given}` is no duration"))?, unit)?)
        }
    };
    let method = ["method", "request_method"].into_iter().find_map(|name| value.get(name)?.as_str());
    let path = ["path", "uri", "request_uri"].into_iter().find_map(|name| value.get(name)?.as_str());
    Ok(match (method, path) {
        (method, Some(path)) if !access::wakes(method.unwrap_or("POST"), path) => Line::WakesNothing,
        _ => Line::Request(Logged { at, service }),
    })
}

// === impl Trace ===

impl Trace {
    /// Of these requests, those from `from` until `to`. If it is not said, the time is that from the first to the last
    /// of them, and of whole days (UTC) if that is more than one.
    ///
    /// # Errors
    /// When none is left.
    pub fn new(mut requests: Vec<Logged>, from: Option<i64>, to: Option<i64>) -> Result<Self, String> {
        requests.sort_by_key(|request| request.at);
        let (Some(first), Some(last)) = (requests.first().copied(), requests.last().copied()) else {
            return Err("there are no requests".into());
        };
        let end = last.at.saturating_add(i64::try_from(last.service.unwrap_or_default()).unwrap_or(i64::MAX));
        let days = end - first.at > DAY;
        let from = from.unwrap_or(if days { first.at.div_euclid(DAY) * DAY } else { first.at });
        let to =
            to.unwrap_or(if days { (end - 1).div_euclid(DAY) * DAY + DAY } else { end.max(first.at + 1) });
        if from >= to {
            return Err(format!("the time ends ({}) before it begins ({})", stamp(to), stamp(from)));
        }
        requests.retain(|request| (from..to).contains(&request.at));
        if requests.is_empty() {
            return Err(format!("no request is between {} and {}", stamp(from), stamp(to)));
        }
        Ok(Self { requests, from, to })
    }

    /// How long the time is, in milliseconds.
    pub const fn window(&self) -> u64 {
        self.to.abs_diff(self.from)
    }

    /// As a CSV file, which [`parse`] reads.
    pub fn to_csv(&self) -> String {
        let mut text = String::from("time,duration_ms\n");
        for request in &self.requests {
            let duration = request.service.map(|ms| ms.to_string()).unwrap_or_default();
            let _ = writeln!(text, "{},{duration}", stamp(request.at));
        }
        text
    }
}

/// A time as RFC 3339, with milliseconds where there are any.
pub fn stamp(ms: i64) -> String {
    match Timestamp::from_millisecond(ms) {
        Ok(time) if ms % 1000 == 0 => format!("{time:.0}"),
        Ok(time) => format!("{time:.3}"),
        Err(_) => format!("{ms} ms after 1970"),
    }
}

#[cfg(test)]
mod tests;
