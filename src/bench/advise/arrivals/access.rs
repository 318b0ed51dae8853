//! Lines of access logs: nginx's `combined`, with or without `$request_time`, and Envoy's default.

use http::Method;
use jiff::Timestamp;

use super::{Line, Logged, span};
use crate::openai::Api;

/// Whether this looks like a line of an access log: a time in brackets, a request in quotes.
pub(super) fn is_access(line: &str) -> bool {
    bracketed(line).is_some() && quoted(line).is_some_and(|request| request.split(' ').count() >= 2)
}

/// Whether the request is work for a model.
pub(super) fn wakes(method: &str, path: &str) -> bool {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let method = method.parse().unwrap_or(Method::OPTIONS);
    matches!(Api::of(&method, path), Api::Work(_))
}

/// What a line says.
pub(super) fn read(line: &str) -> Result<Line, String> {
    let at = bracketed(line).ok_or("no time in brackets")?;
    let request = quoted(line).ok_or("no request in quotes")?;
    let mut words = request.split(' ');
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Err(format!("`{request}` is no request"));
    };
    let logged = match at.parse::<Timestamp>() {
        // Envoy: when it came, and after status, flags and two numbers of bytes, the milliseconds that it took.
        Ok(time) => {
            let rest = line.split_once(request).map_or("", |(_, rest)| rest.trim_start_matches('"'));
            let duration = rest.split_whitespace().nth(4).and_then(|text| text.parse::<f64>().ok());
            let service = duration.map(|ms| span(ms, 1.0)).transpose()?;
            Logged { at: time.as_millisecond(), service }
        }
        // nginx: when it ended. Without `$request_time`, when it came is not known better than that.
        Err(_) => {
            let time = Timestamp::strptime("%d/%b/%Y:%H:%M:%S %z", at)
                .map_err(|_| format!("`{at}` is no time of nginx or Envoy"))?;
            let service = line.split_whitespace().next_back().and_then(seconds);
            let took = service.and_then(|ms| i64::try_from(ms).ok()).unwrap_or_default();
            Logged { at: time.as_millisecond() - took, service }
        }
    };
    Ok(if wakes(method, path) { Line::Request(logged) } else { Line::WakesNothing })
}

/// `1.234`, or `rt=1.234`: as nginx writes `$request_time`.
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
