//! Span names and attributes by OpenTelemetry's conventions for HTTP (stable) and generative AI (in development).

use std::borrow::Cow;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Version,
    header::{HOST, USER_AGENT},
    request,
    uri::Authority,
};
use opentelemetry::Value;
use tokio::time::Instant;

use crate::{
    openai::Api,
    proxy::client::Client,
    telemetry::traces::{Span, SpanDirection, names},
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Creates the server span of a request.
pub(super) fn server<B>(client: &Client, request: &Request<B>, start: Instant) -> Span {
    let (method, path, headers) = (request.method(), request.uri().path(), request.headers());
    let api = Api::of(method, path);
    let route = route(&api, path);
    let name = match &route {
        Some(route) => format!("{} {route}", in_name(method)).into(),
        None => in_name(method),
    };
    let mut span = Span::new(name, SpanDirection::Server, 0, start);
    set_method(&mut span, method);
    span.set(names::URL_PATH, path.to_owned());
    span.set(names::URL_SCHEME, scheme(headers));
    if let Some(route) = route {
        span.set(names::ROUTE, route);
    }
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    if let Some(host) = request.uri().authority().cloned().or(host) {
        set_server(&mut span, &host);
    }
    if let Some(peer) = client.address {
        let address = peer.ip().to_canonical().to_string();
        span.set(names::CLIENT_ADDRESS, forwarded_for(headers).unwrap_or_else(|| address.clone()));
        span.set(names::PEER_ADDRESS, address);
        span.set(names::PEER_PORT, i64::from(peer.port()));
    }
    span.set(
        names::PROTOCOL_VERSION,
        match request.version() {
            Version::HTTP_10 => "1.0",
            Version::HTTP_2 => "2",
            _ => "1.1",
        },
    );
    if let Some(agent) = headers.get(USER_AGENT) {
        span.set(names::USER_AGENT, text(agent));
    }
    if let (Api::Work(_), Some((operation, provider))) = (&api, operation(path)) {
        span.set(names::OPERATION, operation);
        span.set(names::PROVIDER, provider);
    }
    span
}

/// Creates the client span of an attempt.
pub(super) fn attempt(address: &str, head: &request::Parts, parent: u64, start: Instant) -> Span {
    let mut span = Span::new(in_name(&head.method), SpanDirection::Client, parent, start);
    set_method(&mut span, &head.method);
    if let Ok(address) = address.parse::<Authority>() {
        set_server(&mut span, &address);
    }
    // Without the query, which may contain secrets.
    span.set(names::URL_FULL, format!("http://{address}{}", head.uri.path()));
    span
}

fn set_server(span: &mut Span, authority: &Authority) {
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    span.set(names::SERVER_ADDRESS, host.to_owned());
    if let Some(port) = authority.port_u16() {
        span.set(names::SERVER_PORT, i64::from(port));
    }
}

fn set_method(span: &mut Span, method: &Method) {
    match known(method) {
        Some(known) => span.set(names::METHOD, known),
        None => {
            span.set(names::METHOD, "_OTHER");
            span.set(names::METHOD_ORIGINAL, method.to_string());
        }
    }
}

fn in_name(method: &Method) -> Cow<'static, str> {
    known(method).unwrap_or("HTTP").into()
}

/// Returns methods of RFC 9110 and RFC 5789. Others would let clients create any number of span names.
fn known(method: &Method) -> Option<&'static str> {
    const KNOWN: [&str; 9] = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str())
}

/// Returns the route template of a path, which has low cardinality.
fn route(api: &Api, path: &str) -> Option<String> {
    match api {
        Api::Work(_) | Api::Models | Api::Server | Api::Probe | Api::Root => Some(path.to_owned()),
        Api::Model(_) => Some("/v1/models/{model}".into()),
        Api::Stored(_) => {
            let rest = path.strip_prefix("/v1/responses/")?.split_once('/').map(|(_, rest)| rest);
            Some(match rest {
                Some(rest) => format!("/v1/responses/{{response_id}}/{rest}"),
                None => "/v1/responses/{response_id}".into(),
            })
        }
        Api::WrongMethod(_) | Api::Unknown => None,
    }
}

/// Returns the operation and API of a path. The server product is unknown.
fn operation(path: &str) -> Option<(&'static str, &'static str)> {
    Some(match path {
        "/v1/chat/completions" | "/v1/responses" => ("chat", "openai"),
        "/v1/completions" => ("text_completion", "openai"),
        "/v1/embeddings" => ("embeddings", "openai"),
        "/v1/messages" => ("chat", "anthropic"),
        _ => return None,
    })
}

fn scheme(headers: &HeaderMap) -> &'static str {
    match headers.get(FORWARDED_PROTO) {
        Some(scheme) if scheme.as_bytes().eq_ignore_ascii_case(b"https") => "https",
        _ => "http",
    }
}

/// Returns the first address of `X-Forwarded-For`.
fn forwarded_for(headers: &HeaderMap) -> Option<String> {
    let first = headers.get(FORWARDED_FOR)?.to_str().ok()?.split(',').next()?.trim();
    first.parse::<std::net::IpAddr>().ok().map(|address| address.to_string())
}

/// Marks a span as failed.
pub(super) fn fail(span: &mut Span, why: impl Into<Value>) {
    span.fail();
    span.set(names::ERROR_TYPE, why);
}

/// Returns the text of a header.
pub(super) fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn span_names_have_low_cardinality() {
        for (method, path, name) in [
            ("POST", "/v1/chat/completions", "POST /v1/chat/completions"),
            ("GET", "/v1/models/org%2Fname", "GET /v1/models/{model}"),
            ("GET", "/v1/responses/resp_1", "GET /v1/responses/{response_id}"),
            ("POST", "/v1/responses/resp_1/cancel", "POST /v1/responses/{response_id}/cancel"),
            ("DELETE", "/v1/models/a", "DELETE"),
            ("GET", "/wp-login.php", "GET"),
            ("BREW", "/pot", "HTTP"),
        ] {
            let request = Request::builder().method(method).uri(path).body(()).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let span = runtime.block_on(async { server(&Client::default(), &request, Instant::now()) });
            assert_eq!(span.name, name);
            assert_eq!(span.has_attribute(names::METHOD_ORIGINAL), method == "BREW");
            assert_eq!(span.has_attribute(names::OPERATION), path == "/v1/chat/completions");
        }
    }
}
