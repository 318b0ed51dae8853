//! What a good proxy does to heads: hop-by-hop headers end here, forwarding headers begin here.

use std::{fmt::Write, net::SocketAddr};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Uri, Version,
    header::{
        AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, EXPECT, FORWARDED,
        HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, VIA,
    },
    request,
    uri::PathAndQuery,
};

use super::traced::TRACEPARENT;
use crate::{error::ProxyError, openai::is_event_stream, telemetry::traces::Parent};

/// The request's identity in logs, here and behind us.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
pub const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// Whether a cold start held the request: in our word, and in that of the KEDA HTTP Add-on. Ours to say.
pub const COLD_START: HeaderName = HeaderName::from_static("x-anteroom-cold-start");
pub const KEDA_COLD_START: HeaderName = HeaderName::from_static("x-keda-http-cold-start");

/// The host that a request is for.
///
/// # Errors
/// When it names none, or two, or what is none: two readers could take two different ones (RFC 9112, section 3.2).
pub fn host(uri: &Uri, headers: &HeaderMap) -> Result<HeaderValue, ProxyError> {
    let mut hosts = headers.get_all(HOST).iter();
    let header = hosts.next();
    if hosts.next().is_some() {
        return Err(ProxyError::Ambiguous("The request has more than one Host header.".into()));
    }
    // A target in absolute form wins over the header (RFC 9112, section 3.2.2); HTTP/2 has only that.
    let host = match uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => header.cloned(),
    };
    let host = host.ok_or_else(|| ProxyError::Ambiguous("The request has no Host header.".into()))?;
    if !host.as_bytes().iter().all(|byte| is_of_host(*byte)) {
        return Err(ProxyError::Ambiguous("The request's Host is no host.".into()));
    }
    Ok(host)
}

/// Names, addresses and ports; not the user of a URL, nor what would end the authority of one (RFC 3986, section 3.2).
const fn is_of_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b':' | b'[' | b']' | b'_' | b'~' | b'%')
}

/// Checks that the body came in a transfer coding that we have undone, and so none that somebody else sees in it.
///
/// # Errors
/// When it is any but `chunked`, once: hyper goes by the last one only.
pub fn transfer_coding(headers: &HeaderMap) -> Result<(), ProxyError> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else { return Ok(()) };
    if coding.as_bytes().eq_ignore_ascii_case(b"chunked") && codings.next().is_none() {
        return Ok(());
    }
    Err(ProxyError::Ambiguous("The request's Transfer-Encoding is not just `chunked`.".into()))
}

/// The trace that a request is a part of, if its `traceparent` can be read.
pub fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let parent = headers.get(TRACEPARENT).filter(|parent| Parent::parse(parent.as_bytes()).is_some())?;
    parent.to_str().ok()?.get(3..35)
}

/// Makes a client's request head into one for an endpoint, and gives its id.
pub fn request(parts: &mut request::Parts, host: &HeaderValue, client: Option<SocketAddr>) -> HeaderValue {
    let trailers = parts.headers.get_all(TE).iter().any(|te| {
        te.to_str().is_ok_and(|te| te.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
    });
    end_hop(&mut parts.headers);
    let headers = &mut parts.headers;
    // The body has been asked for already: by us.
    headers.remove(EXPECT);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("TE"));
    }
    if let Some(client) = client {
        forwarded(headers, host, client);
    }
    via(headers, if parts.version == Version::HTTP_2 { "2 anteroom" } else { "1.1 anteroom" });
    if headers.get(TRACEPARENT).is_some_and(|parent| Parent::parse(parent.as_bytes()).is_none()) {
        headers.remove(TRACEPARENT);
    }
    headers.insert(HOST, host.clone());
    let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    parts.version = Version::HTTP_11;
    match headers.get(REQUEST_ID) {
        Some(id) if !id.is_empty() && id.len() <= 128 => id.clone(),
        _ => {
            let id = new_id();
            headers.insert(REQUEST_ID, id.clone());
            id
        }
    }
}

/// Makes a request head that has been made for an endpoint one that wants to leave HTTP for a WebSocket.
pub fn upgrade(headers: &mut HeaderMap) {
    headers.remove(TE);
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// Copies a head out of the read buffer that it came in, which is several times its size.
pub fn settle(parts: &mut request::Parts) {
    let size = parts.headers.values().map(HeaderValue::len).sum();
    let mut copy = BytesMut::with_capacity(size);
    for value in parts.headers.values_mut() {
        copy.extend_from_slice(value.as_bytes());
        // A part of what was a value is one.
        if let Ok(settled) = HeaderValue::from_maybe_shared(copy.split().freeze()) {
            *value = settled;
        }
    }
    if let Ok(uri) = Uri::from_maybe_shared(Bytes::from(parts.uri.to_string())) {
        parts.uri = uri;
    }
}

/// Makes an endpoint's response head into one for the client.
pub fn response(headers: &mut HeaderMap, request_id: HeaderValue) {
    end_hop(headers);
    headers.remove(COLD_START);
    headers.remove(KEDA_COLD_START);
    via(headers, "1.1 anteroom");
    if is_event_stream(headers) {
        // nginx in front of us would keep the events to itself.
        headers.entry(BUFFERING).or_insert(HeaderValue::from_static("no"));
    }
    headers.entry(REQUEST_ID).or_insert(request_id);
}

/// A new request id: 32 hexadecimal digits.
pub fn new_id() -> HeaderValue {
    let mut text = String::with_capacity(32);
    let _ = write!(text, "{:032x}", fastrand::u128(..));
    HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or(HeaderValue::from_static("-"))
}

/// Removes what concerns one connection only (RFC 9110, section 7.6.1). `Trailer` stays: it announces fields that
/// pass.
fn end_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .filter(|name| !is_for_the_endpoint(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [&KEEP_ALIVE, &PROXY_CONNECTION, &PROXY_AUTHENTICATE, &PROXY_AUTHORIZATION, &TE, &UPGRADE] {
        headers.remove(name);
    }
    if headers.remove(TRANSFER_ENCODING).is_some() {
        // The coding won over a length beside it (RFC 9112, section 6.3), which then was not the body's.
        headers.remove(CONTENT_LENGTH);
    }
}

/// Fields that a client must not take out of a request by naming them in `Connection`: keys, and what proxies before us
/// have added. They are meant for whoever answers (RFC 9110, section 7.6.1, says not to name such).
fn is_for_the_endpoint(name: &HeaderName) -> bool {
    let text = name.as_str();
    text.starts_with("x-forwarded-")
        || [
            AUTHORIZATION,
            COOKIE,
            CONTENT_ENCODING,
            CONTENT_LENGTH,
            CONTENT_TYPE,
            FORWARDED,
            VIA,
            REQUEST_ID,
            TRACEPARENT,
        ]
        .contains(name)
        || ["x-real-ip", "x-api-key", "tracestate"].contains(&text)
}

fn forwarded(headers: &mut HeaderMap, host: &HeaderValue, client: SocketAddr) {
    let address = client.ip().to_canonical();
    append(headers, FORWARDED_FOR, &address.to_string());
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    headers.entry(FORWARDED_HOST).or_insert_with(|| host.clone());
    // Continued where someone began it, since a list with a gap misleads; the X- headers are what servers read.
    if headers.contains_key(FORWARDED) {
        let node = if address.is_ipv6() { format!("\"[{address}]\"") } else { address.to_string() };
        append(headers, FORWARDED, &format!("for={node};proto=http"));
    }
}

/// Says that a message has come through here. Mostly it is the first that does, which takes no allocation.
fn via(headers: &mut HeaderMap, item: &'static str) {
    if headers.contains_key(VIA) {
        append(headers, VIA, item);
    } else {
        headers.insert(VIA, HeaderValue::from_static(item));
    }
}

/// Adds to a list header: one line, so that whoever reads only the first or the last line sees all of it.
fn append(headers: &mut HeaderMap, name: HeaderName, item: &str) {
    let mut list = String::new();
    for value in headers.get_all(&name) {
        list.push_str(&String::from_utf8_lossy(value.as_bytes()));
        list.push_str(", ");
    }
    list.push_str(item);
    if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(list)) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn forward(headers: &[(&str, &str)], uri: &str) -> (request::Parts, HeaderValue) {
        let mut request = Request::post(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        let host = host(&parts.uri, &parts.headers).unwrap();
        let id = super::request(&mut parts, &host, Some("192.0.2.7:1234".parse().unwrap()));
        (parts, id)
    }

    #[test]
    fn what_concerns_one_connection_ends_here() {
        let (parts, _) = forward(
            &[
                ("host", "api.example"),
                ("connection", "close, X-Secret"),
                ("x-secret", "1"),
                ("keep-alive", "5"),
                ("te", "trailers, deflate"),
                ("upgrade", "h2c"),
                ("transfer-encoding", "chunked"),
                ("proxy-authorization", "Basic x"),
                ("expect", "100-continue"),
                ("authorization", "Bearer x"),
            ],
            "/v1/models?a=b",
        );
        for gone in
            ["x-secret", "keep-alive", "upgrade", "transfer-encoding", "proxy-authorization", "expect"]
        {
            assert!(!parts.headers.contains_key(gone), "{gone}");
        }
        assert_eq!(parts.headers["te"], "trailers");
        assert_eq!(parts.headers["connection"], "TE");
        assert_eq!(parts.headers["authorization"], "Bearer x");
        assert_eq!(parts.uri, "/v1/models?a=b");
    }

    #[test]
    fn forwarding_headers_continue_what_came() {
        let (parts, id) = forward(&[("host", "api.example")], "/");
        assert_eq!(parts.headers["x-forwarded-for"], "192.0.2.7");
        assert_eq!(parts.headers["x-forwarded-host"], "api.example");
        assert_eq!(parts.headers["x-forwarded-proto"], "http");
        assert_eq!(parts.headers["via"], "1.1 anteroom");
        assert_eq!(parts.headers["x-request-id"], id);
        assert_eq!(id.len(), 32);
        assert!(!parts.headers.contains_key("forwarded"));
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let (parts, id) = forward(
            &[
                ("host", "api.example"),
                ("x-forwarded-for", "198.51.100.1"),
                ("x-forwarded-for", "198.51.100.2"),
                ("x-forwarded-proto", "https"),
                ("forwarded", "for=198.51.100.1"),
                ("via", "1.1 lb"),
                ("x-request-id", "mine"),
                ("traceparent", trace),
            ],
            "http://other.example/v1/x",
        );
        assert_eq!(parts.headers["x-forwarded-for"], "198.51.100.1, 198.51.100.2, 192.0.2.7");
        assert_eq!(parts.headers["x-forwarded-proto"], "https");
        assert_eq!(parts.headers["forwarded"], "for=198.51.100.1, for=192.0.2.7;proto=http");
        assert_eq!(parts.headers["via"], "1.1 lb, 1.1 anteroom");
        assert_eq!(
            (id.to_str().unwrap(), &parts.headers["traceparent"]),
            ("mine", &HeaderValue::from_static(trace))
        );
        assert_eq!(parts.headers["host"], "other.example", "the absolute form wins");
    }

    #[test]
    fn a_traceparent_that_is_none_is_not_passed_on() {
        for (text, good) in [
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", true),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", false),
        ] {
            let (parts, _) = forward(&[("host", "a"), ("traceparent", text)], "/");
            assert_eq!(parts.headers.contains_key("traceparent"), good, "{text}");
        }
    }

    #[test]
    fn two_hosts_or_none_are_refused() {
        let mut headers = HeaderMap::new();
        assert!(host(&Uri::from_static("/"), &headers).is_err());
        headers.append(HOST, HeaderValue::from_static("a"));
        headers.append(HOST, HeaderValue::from_static("b"));
        assert!(host(&Uri::from_static("/"), &headers).is_err());
    }
}
