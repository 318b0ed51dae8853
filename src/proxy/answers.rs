//! Answers of our own, and what an answer says of the wait before it.

use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE, RETRY_AFTER},
};

use super::{
    body::Body,
    exchange::Exchange,
    forward::{COLD_START, KEDA_COLD_START, REQUEST_ID},
};
use crate::{error::ProxyError, openai};

/// Ends an admitted request with an error.
pub(super) fn fail(mut exchange: Exchange, error: &ProxyError) -> Response<Body> {
    exchange.fail(error);
    error_response(error, exchange.request_id.clone(), |body| Body::ending(body, exchange))
}

/// What a client that waited is told.
pub(super) fn tell_wait(headers: &mut HeaderMap, held: Duration, upstream: Duration, cold: bool) {
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let timing = format!("hold;dur={:.1}, upstream;dur={:.1}", ms(held), ms(upstream));
    if let Ok(timing) = timing.parse() {
        headers.append("server-timing", timing);
    }
    if cold {
        tell_cold_start(headers);
    }
}

/// Says that a cold start held the request: in our word, and in that of the HTTP Add-on.
pub(super) fn tell_cold_start(headers: &mut HeaderMap) {
    headers.insert(COLD_START, HeaderValue::from_static("true"));
    headers.insert(KEDA_COLD_START, HeaderValue::from_static("true"));
}

/// An answer of ours.
pub(super) fn json_response(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// An error as its table says. `body` makes the body of what it says.
pub(super) fn error_response(
    error: &ProxyError,
    request_id: HeaderValue,
    body: impl FnOnce(Bytes) -> Body,
) -> Response<Body> {
    let answer = error.answer();
    let mut response = json_response(answer.status, body(openai::error_body(error)));
    let headers = response.headers_mut();
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
    response
}
