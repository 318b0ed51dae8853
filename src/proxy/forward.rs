//! Header rewriting in both directions: hop-by-hop, forwarding, and reserved headers.

use std::{
    cell::RefCell,
    fmt::Write,
    net::{Ipv6Addr, SocketAddr},
    num::NonZeroU32,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
        TRANSFER_ENCODING, UPGRADE, VIA,
    },
    request,
    uri::PathAndQuery,
};

use super::request_trace::TRACEPARENT;
use crate::{coldstart::Phase, error::ProxyError, openai::is_event_stream, telemetry::traces::Parent};

/// Request id, in logs and at the endpoint.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
pub const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// `true` if a cold start held the request. Reserved: removed from responses of endpoints.
pub const COLD_START_HEADER: HeaderName = HeaderName::from_static("x-anteroom-cold-start");
pub(super) const SERVER_TIMING: &str = "server-timing";
pub const KEDA_COLD_START: HeaderName = HeaderName::from_static("x-keda-http-cold-start");

/// Returns the `Keep-Alive` value for an idle timeout. Cached per thread, as most connections share it.
pub(super) fn keep_alive(seconds: NonZeroU32) -> HeaderValue {
    thread_local! {
        static LAST: RefCell<Option<(NonZeroU32, HeaderValue)>> = const { RefCell::new(None) };
    }
    LAST.with_borrow_mut(|last| match last {
        Some((of, value)) if *of == seconds => value.clone(),
        _ => {
            let text = Bytes::from(format!("timeout={seconds}"));
            let value = HeaderValue::from_maybe_shared(text).unwrap_or(HeaderValue::from_static(""));
            last.insert((seconds, value)).1.clone()
        }
    })
}

/// Returns the host of a request.
///
/// # Errors
/// [`ProxyError::Ambiguous`] unless there is exactly one valid host: two readers could take different ones (RFC 9112,
/// section 3.2).
pub fn host(uri: &Uri, headers: &HeaderMap) -> Result<HeaderValue, ProxyError> {
    let mut hosts = headers.get_all(HOST).iter();
    let header = hosts.next();
    if hosts.next().is_some() {
        return Err(ProxyError::Ambiguous("The request has more than one Host header.".into()));
    }
    // An absolute target overrides the header (RFC 9112, section 3.2.2); HTTP/2 has `:authority` only.
    let target = uri.authority().map(|authority| HeaderValue::from_str(authority.as_str()).ok());
    // Validates the header even if the target overrides it: other readers may use it alone.
    for host in header.into_iter().chain(target.iter().flatten()) {
        if !host.to_str().is_ok_and(is_host) {
            return Err(ProxyError::Ambiguous("Invalid Host header.".into()));
        }
    }
    let host = target.unwrap_or_else(|| header.cloned());
    host.ok_or_else(|| ProxyError::Ambiguous("The request has no Host header.".into()))
}

/// Returns `true` if `text` is empty, or a name or address with an optional port (RFC 9112, section 3.2). Rejects user
/// information and characters that end a URL's authority (RFC 3986, section 3.2).
fn is_host(text: &str) -> bool {
    let is_port = |port: &str| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && (port.is_empty() || port.parse::<u16>().is_ok())
    };
    if let Some(address) = text.strip_prefix('[') {
        let Some((address, port)) = address.split_once(']') else { return false };
        return address.parse::<Ipv6Addr>().is_ok()
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let is_of_name =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'%');
    match text.split_once(':') {
        Some((name, port)) => !name.is_empty() && name.bytes().all(is_of_name) && is_port(port),
        None => text.bytes().all(is_of_name),
    }
}

/// Checks that `Transfer-Encoding` is absent or exactly `chunked`.
///
/// # Errors
/// [`ProxyError::Ambiguous`] otherwise: hyper reads only the last coding, other readers may not.
pub fn check_transfer_coding(headers: &HeaderMap) -> Result<(), ProxyError> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else { return Ok(()) };
    if coding.as_bytes().eq_ignore_ascii_case(b"chunked") && codings.next().is_none() {
        return Ok(());
    }
    Err(ProxyError::Ambiguous("The request's Transfer-Encoding is not just `chunked`.".into()))
}

/// Returns the trace id of a valid `traceparent`.
pub fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let parent = headers.get(TRACEPARENT).filter(|parent| Parent::parse(parent.as_bytes()).is_some())?;
    parent.to_str().ok()?.get(3..35)
}

/// Rewrites a client's request head for an endpoint, and returns the request id.
pub fn prepare_request(
    parts: &mut request::Parts,
    host: &HeaderValue,
    client: Option<SocketAddr>,
) -> HeaderValue {
    let trailers = parts.headers.get_all(TE).iter().any(|te| {
        te.to_str().is_ok_and(|te| te.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
    });
    remove_hop_by_hop(&mut parts.headers);
    let headers = &mut parts.headers;
    // Not forwarded: hyper answers `Expect: 100-continue` itself.
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

/// Adds the headers of a WebSocket upgrade to a prepared head.
pub fn set_websocket_upgrade(headers: &mut HeaderMap) {
    headers.remove(TE);
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// Copies a head out of its read buffer, which is several times its size.
pub fn detach(parts: &mut request::Parts) {
    let size = parts.headers.values().map(HeaderValue::len).sum();
    let mut copy = BytesMut::with_capacity(size);
    for value in parts.headers.values_mut() {
        copy.extend_from_slice(value.as_bytes());
        // Cannot fail: the bytes were a valid value.
        if let Ok(detached) = HeaderValue::from_maybe_shared(copy.split().freeze()) {
            *value = detached;
        }
    }
    if let Ok(uri) = Uri::from_maybe_shared(Bytes::from(parts.uri.to_string())) {
        parts.uri = uri;
    }
}

/// Rewrites an endpoint's response head for the client.
pub fn prepare_response(headers: &mut HeaderMap, request_id: HeaderValue) {
    remove_hop_by_hop(headers);
    remove_reserved(headers);
    via(headers, "1.1 anteroom");
    if is_event_stream(headers) {
        // nginx buffers event streams unless told not to.
        headers.entry(ACCEL_BUFFERING).or_insert(HeaderValue::from_static("no"));
    }
    headers.entry(REQUEST_ID).or_insert(request_id);
}

/// Removes reserved fields and `server-timing` entries from an endpoint's head or trailers.
pub(super) fn remove_reserved(headers: &mut HeaderMap) {
    headers.remove(KEDA_COLD_START);
    if headers.keys().any(is_reserved) {
        let names: Vec<_> = headers.keys().filter(|name| is_reserved(name)).cloned().collect();
        for name in names {
            headers.remove(name);
        }
    }
    if headers.contains_key(SERVER_TIMING) {
        let timings = headers.get_all(SERVER_TIMING).iter().filter_map(|timing| timing.to_str().ok());
        let entries = timings.flat_map(list_items).filter(|entry| !is_reserved_timing(entry));
        let kept = entries.collect::<Vec<_>>().join(", ");
        headers.remove(SERVER_TIMING);
        if let Ok(kept) = HeaderValue::try_from(kept)
            && !kept.is_empty()
        {
            headers.insert(SERVER_TIMING, kept);
        }
    }
}

fn is_reserved(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-anteroom-")
}

fn is_reserved_timing(entry: &str) -> bool {
    let name = entry.split(';').next().unwrap_or_default().trim();
    let reserved = ["hold", "queue", "upstream"].into_iter().chain(Phase::ALL.map(Phase::name));
    name.is_empty() || reserved.into_iter().any(|reserved| name.eq_ignore_ascii_case(reserved))
}

/// Splits a list header into trimmed items. Commas inside quotes do not separate (RFC 9110, section 5.6).
fn list_items(list: &str) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let items = list.split(move |char| {
        let was_escaped = std::mem::take(&mut is_escaped);
        match char {
            '\\' => is_escaped = is_quoted && !was_escaped,
            '"' if !was_escaped => is_quoted = !is_quoted,
            _ => {}
        }
        char == ',' && !is_quoted
    });
    items.map(str::trim)
}

/// Creates a request id of 32 hexadecimal digits.
pub fn new_id() -> HeaderValue {
    let mut text = String::with_capacity(32);
    let _ = write!(text, "{:032x}", fastrand::u128(..));
    HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or(HeaderValue::from_static("-"))
}

/// Removes hop-by-hop fields (RFC 9110, section 7.6.1). Keeps `Trailer`, as trailers are forwarded.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .filter(|name| !is_end_to_end(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    // Usually there are none, and one pass over the names is cheaper than six look-ups.
    let names = [KEEP_ALIVE, PROXY_CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, UPGRADE];
    if headers.keys().any(|name| names.contains(name)) {
        for name in names {
            headers.remove(name);
        }
    }
    if headers.remove(TRANSFER_ENCODING).is_some() {
        // The coding overrides `Content-Length` (RFC 9112, section 6.3), which may be wrong.
        headers.remove(CONTENT_LENGTH);
    }
}

/// Returns `true` for a field that is kept even if `Connection` names it. Otherwise a client could remove fields that
/// proxies in front of Anteroom add, such as its identity (RFC 9110, section 7.6.1, forbids naming end-to-end fields).
fn is_end_to_end(name: &HeaderName) -> bool {
    /// Words in the names of fields about the caller and its rights, the origin of the request, and the content.
    const WORDS: &[&str] = &[
        "account",
        "accept",
        "address",
        "apikey",
        "assertion",
        "auth",
        "authorization",
        "baggage",
        "caller",
        "cert",
        "client",
        "consumer",
        "content",
        "cookie",
        "email",
        "forwarded",
        "group",
        "groups",
        "host",
        "id",
        "identity",
        "ip",
        "jwt",
        "key",
        "org",
        "organization",
        "origin",
        "original",
        "policy",
        "principal",
        "priority",
        "project",
        "role",
        "roles",
        "scope",
        "scopes",
        "session",
        "signature",
        "subject",
        "subscription",
        "team",
        "tenant",
        "token",
        "traceparent",
        "tracestate",
        "user",
        "username",
        "via",
    ];
    /// Prefixes of vendors that add or read fields.
    const PREFIXES: &[&str] = &[
        "anthropic-",
        "cf-",
        "openai-",
        "x-amz",
        "x-anteroom-",
        "x-b3-",
        "x-envoy-",
        "x-gateway-",
        "x-goog-",
        "x-llm-d-",
        "x-ms-",
    ];
    let name = name.as_str();
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || name.split(['-', '_']).any(|word| WORDS.contains(&word))
}

fn forwarded(headers: &mut HeaderMap, host: &HeaderValue, client: SocketAddr) {
    let address = client.ip().to_canonical();
    append(headers, FORWARDED_FOR, &address.to_string());
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    headers.entry(FORWARDED_HOST).or_insert_with(|| host.clone());
    // Extends an existing `Forwarded` but starts none: servers read the X- headers, and a list with a gap would
    // mislead.
    if headers.contains_key(FORWARDED) {
        let node = if address.is_ipv6() { format!("\"[{address}]\"") } else { address.to_string() };
        append(headers, FORWARDED, &format!("for={node};proto=http"));
    }
}

/// Adds an entry to `Via`. Usually the first one, which needs no allocation.
fn via(headers: &mut HeaderMap, item: &'static str) {
    if headers.contains_key(VIA) {
        append(headers, VIA, item);
    } else {
        headers.insert(VIA, HeaderValue::from_static(item));
    }
}

/// Appends to a list header. Joins its lines into one, for readers that use only the first or last line.
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
mod tests;
