//! Access logs: nginx's `combined` format, with or without `$request_time`, and Envoy's default format.

use http::Method;
use jiff::Timestamp;

use super::line::{LogLine, LoggedRequest, span};
use crate::openai::Api;

/// Returns whether the line has a time in brackets and a request in quotes.
pub(super) fn is_access(line: &str) -> bool {
    bracketed(line).is_some() && quoted(line).is_some_and(|request| request.split(' ').count() >= 2)
}

/// Returns whether the request needs a model server.
pub(super) fn needs_server(method: &str, path: &str) -> bool {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let method = method.parse().unwrap_or(Method::OPTIONS);
    matches!(Api::of(&method, path), Api::Work(_))
}

pub(super) fn read(line: &str) -> Result<LogLine, String> {
    let at = bracketed(line).ok_or("no time in brackets")?;
    let request = quoted(line).ok_or("no request in quotes")?;
    let mut words = request.split(' ');
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Err(format!("`{request}` is not a request"));
    };
    let logged = match at.parse::<Timestamp>() {
        // Envoy: start time; the duration in milliseconds follows status, flags and two byte counts.
        Ok(time) => {
            let rest = line.split_once(request).map_or("", |(_, rest)| rest.trim_start_matches('"'));
            let duration = rest.split_whitespace().nth(4).and_then(|text| text.parse::<f64>().ok());
            let service = duration.map(|ms| span(ms, 1.0)).transpose()?;
            LoggedRequest { at: time.as_millisecond(), service }
        }
        // nginx: end time, which stands in for the start if `$request_time` is missing.
        Err(_) => {
            let time = Timestamp::strptime("%d/%b/%Y:%H:%M:%S %z", at)
                .map_err(|_| format!("`{at}` is not a time of nginx or Envoy"))?;
            let service = line.split_whitespace().next_back().and_then(seconds);
            let took = service.and_then(|ms| i64::try_from(ms).ok()).unwrap_or_default();
            LoggedRequest { at: time.as_millisecond() - took, service }
        }
    };
    Ok(if needs_server(method, path) { LogLine::Request(logged) } else { LogLine::WithoutWork })
}

/// Parses `$request_time` of nginx: `1.234` or `rt=1.234`.
fn seconds(word: &str) -> Option<u64> {
    let text = word.rsplit('=').next()?.trim_matches('"');
    let number = text.parse::<f64>().ok().filter(|_| text.contains('.'))?;
    span(number, 1000.0).ok()
}

fn bracketed(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once('[')?;
    rest.split_once(']').map(|(inside, _)| inside)
}

fn quoted(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(']')?;
    let (_, rest) = rest.split_once('"')?;
    rest.split_once('"').map(|(inside, _)| inside)
}
