//! Responses of the proxy itself, and the headers that report a wait.

use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE, RETRY_AFTER},
};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::{
    body::Body,
    exchange::Exchange,
    forward::{COLD_START_HEADER, KEDA_COLD_START, REQUEST_ID, SERVER_TIMING},
};
use crate::{coldstart::Phase, error::ProxyError, openai::Dialect};

/// Ends an admitted request with an error response.
pub(super) fn fail(mut exchange: Exchange, error: &ProxyError) -> Response<Body> {
    exchange.fail(error);
    let (dialect, id) = (exchange.dialect, exchange.request_id.clone());
    let error = &*error.for_client(exchange.gate().policy().failure.detail);
    error_response(error, dialect, id, |body| Body::for_admitted(body, exchange))
}

/// Sets `server-timing` on the response to a held request, and the cold-start headers if `cold`.
pub(super) fn set_wait_headers(
    headers: &mut HeaderMap,
    held: Duration,
    shares: &[(Phase, Duration)],
    upstream: Duration,
    cold: bool,
) {
    if let Ok(timing) = server_timing(held, shares, upstream).parse() {
        headers.append(SERVER_TIMING, timing);
    }
    if cold {
        set_cold_start_headers(headers);
    }
}

/// Formats `hold`, its phases, and `upstream` (W3C Server Timing, section 3). As printed, the phases sum to `hold`.
fn server_timing(held: Duration, shares: &[(Phase, Duration)], upstream: Duration) -> String {
    let tenths = |duration: Duration| (duration.as_secs_f64() * 1e4).round() as u64;
    let entry = |name: &str, tenths: u64| format!("{name};dur={}.{}", tenths / 10, tenths % 10);
    let mut entries = vec![entry("hold", tenths(held))];
    let mut sum = Duration::ZERO;
    for (phase, share) in shares {
        let before = tenths(sum.min(held));
        sum += *share;
        entries.push(entry(phase.name(), tenths(sum.min(held)) - before));
    }
    // The remainder: endpoints were ready but at their concurrency limit.
    let queue = tenths(held) - tenths(sum.min(held));
    if queue > 0 {
        entries.push(entry("queue", queue));
    }
    entries.push(entry("upstream", tenths(upstream)));
    entries.join(", ")
}

/// Marks the response to a request held by a cold start, with the headers of Anteroom and the KEDA HTTP Add-on.
pub(super) fn set_cold_start_headers(headers: &mut HeaderMap) {
    headers.insert(COLD_START_HEADER, HeaderValue::from_static("true"));
    headers.insert(KEDA_COLD_START, HeaderValue::from_static("true"));
}

/// Creates a JSON response.
pub(super) fn json_response(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Creates an error response in the format of `dialect`. `body` wraps the serialized error.
pub(super) fn error_response(
    error: &ProxyError,
    dialect: Dialect,
    request_id: HeaderValue,
    body: impl FnOnce(Bytes) -> Body,
) -> Response<Body> {
    let answer = error.answer();
    let bytes = dialect.error_body(error, request_id.to_str().unwrap_or_default());
    let mut response = json_response(answer.status, body(bytes));
    let headers = response.headers_mut();
    if dialect == Dialect::Anthropic {
        // Anthropic's SDKs report this header as the request id.
        headers.insert("request-id", request_id.clone());
    }
    headers.insert(REQUEST_ID, request_id);
    if let Some(wait) = error.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs_f64().ceil() as u64));
    }
    if let Some(retry) = answer.should_retry {
        headers.insert("x-should-retry", HeaderValue::from_static(if retry { "true" } else { "false" }));
    }
    if let ProxyError::MethodNotAllowed { allowed, .. } = error {
        headers.insert(ALLOW, HeaderValue::from_static(allowed));
    }
    if dialect == Dialect::Grpc {
        set_grpc_status(headers, error);
        *response.status_mut() = StatusCode::OK;
    }
    response
}

/// Turns the head of an error into a gRPC "Trailers-Only" response, with the pushback of gRFC A6 (negative: no retry).
fn set_grpc_status(headers: &mut HeaderMap, error: &ProxyError) {
    /// Keeps the percent-encoded message well below the 8 KiB of headers that some clients accept.
    const MAX_MESSAGE_CHARS: usize = 500;
    /// gRPC percent-encodes everything but printable ASCII without `%`.
    const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');
    let answer = error.answer();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(answer.grpc as i32));
    let message: String = error.to_string().chars().take(MAX_MESSAGE_CHARS).collect();
    if let Ok(message) = utf8_percent_encode(&message, ESCAPED).to_string().parse() {
        headers.insert("grpc-message", message);
    }
    let pushback = match error.retry_after() {
        Some(wait) => i32::try_from(wait.as_millis()).ok(),
        None => (answer.should_retry == Some(false)).then_some(-1),
    };
    if let Some(pushback) = pushback {
        headers.insert("grpc-retry-pushback-ms", HeaderValue::from(pushback));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn server_timing_lists_phases_of_the_hold() {
        let ms = |ms: f64| Duration::from_secs_f64(ms / 1e3);
        assert_eq!(
            server_timing(ms(3063.0), &[(Phase::Signal, ms(1.0)), (Phase::Load, ms(3020.04))], ms(52.26)),
            "hold;dur=3063.0, signal;dur=1.0, load;dur=3020.0, queue;dur=42.0, upstream;dur=52.3"
        );
        assert_eq!(server_timing(ms(7.0), &[], ms(1.0)), "hold;dur=7.0, queue;dur=7.0, upstream;dur=1.0");
        let exact = server_timing(ms(5.0), &[(Phase::Load, ms(5.0))], ms(1.0));
        assert_eq!(exact, "hold;dur=5.0, load;dur=5.0, upstream;dur=1.0", "no time in the queue");
    }

    proptest! {
        #[test]
        fn server_timing_phases_sum_to_hold(shares in prop::collection::vec(0..1_000_000_000_u64, 0..8), rest in 0..1_000_000_000_u64) {
            let held = Duration::from_nanos(shares.iter().sum::<u64>() + rest);
            let shares: Vec<_> =
                Phase::ALL.into_iter().zip(shares.into_iter().map(Duration::from_nanos)).collect();
            let timing = server_timing(held, &shares, Duration::ZERO);
            let mut tenths = timing.split(", ").map(|entry| {
                let (_, dur) = entry.split_once(";dur=").unwrap();
                dur.replace('.', "").parse::<u64>().unwrap()
            });
            let hold = tenths.next().unwrap();
            prop_assert_eq!(tenths.sum::<u64>(), hold, "{}", timing);
        }
    }
}
