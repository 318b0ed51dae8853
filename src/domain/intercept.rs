//! Settings of an `InterceptorRoute` of the KEDA HTTP Add-on beyond those of every route: it fronts any HTTP
//! application, not only the OpenAI API.
//!
//! Fields, defaults and status codes follow the Add-on's reference of `http.keda.sh/v1beta1` (0.16 and 1.0).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use thiserror::Error;

use super::{Matcher, Period};

/// Settings of an `InterceptorRoute`. Its route serves every method and path, with any body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intercept {
    /// Matchers of the route; a request belongs to it if any of them matches. Models in them have no effect, since
    /// bodies are not parsed, and [`super::Route::matcher`] is ignored.
    pub rules: Vec<Matcher>,
    /// Timeouts.
    pub timeouts: InterceptTimeouts,
    /// `host:port` of the Service that receives requests after a failed wait.
    pub fallback: Option<Arc<str>>,
    /// Response sent immediately while no endpoint is ready; the request still starts the target.
    pub placeholder: Option<StaticAnswer>,
    /// Maximum number of held requests per replica of the proxy; `None` is [`Self::MAX_PENDING`].
    pub max_pending: Option<u32>,
    /// Handling of requests beyond `max_pending`.
    pub overflow: Overflow,
    /// Responses that create no demand; the first match wins.
    pub static_routes: Vec<StaticRoute>,
}

/// `timeouts` of the object. `None` is the Add-on's default; zero disables the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterceptTimeouts {
    /// Maximum time a request is held. Default: the request's own limit, or 30 s with a fallback.
    pub readiness: Option<Period>,
    /// Maximum time from the arrival of a request to the last byte of its response. Default: unlimited.
    pub request: Option<Period>,
    /// Maximum time from dispatch to the head of the response. Default: 300 s.
    pub response_header: Option<Period>,
}

/// Handling of a request that arrives while the maximum number is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// Reject with 503 `hold_queue_full`.
    #[default]
    Reject,
    /// Send the placeholder, if there is one. With [`Intercept::max_pending`] set, requests up to that number are held
    /// instead of getting the placeholder immediately.
    Placeholder,
}

/// Requests answered without creating demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticRoute {
    /// Matchers; any of them selects the request.
    pub rules: Vec<Matcher>,
    /// Response.
    pub answer: StaticAnswer,
    /// Condition for the response.
    pub mode: ResponseMode,
}

/// Condition for a static response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResponseMode {
    /// While no endpoint is ready. Otherwise the request is passed on, without creating demand.
    #[default]
    WhenUnavailable,
    /// Always.
    Always,
}

/// A response defined in the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticAnswer {
    status: StatusCode,
    headers: HeaderMap,
    body: StaticBody,
}

/// Body of a static response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StaticBody {
    /// Inline text; may be empty.
    Text(Bytes),
    /// One key of a ConfigMap; the extension of its name determines the media type.
    File {
        /// Key in the ConfigMap.
        name: String,
        /// Value of the key.
        content: Bytes,
    },
    /// All keys of a ConfigMap, selected by the request's path, `index.html` for `/`; empty if there is no such key.
    Files(BTreeMap<String, Bytes>),
    /// The ConfigMap or key does not exist: 500.
    Missing,
}

/// Error in the definition of a static response.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum StaticAnswerError {
    #[error("{0} is not a valid status; use 200 to 599")]
    Status(u16),
    #[error("`{0}` is not a valid header name")]
    HeaderName(String),
    #[error("the value of header `{0}` has invalid characters")]
    HeaderValue(String),
}

// === impl Intercept ===

impl Intercept {
    /// Default status of a placeholder.
    pub const PLACEHOLDER_STATUS: u16 = 503;

    /// Default number of requests per replica.
    pub const DEFAULT_TARGET: u32 = 100;

    /// Default number of held requests. The Add-on has no limit.
    pub const MAX_PENDING: u32 = 10_000;

    /// Requests in flight per endpoint; effectively unlimited, as in the Add-on.
    pub(super) const MAX_IN_FLIGHT: u32 = 1_000_000;

    /// Stands for "no limit": every wait is bounded.
    pub(super) const NO_LIMIT: Period = Period::from_secs(24 * 60 * 60);

    /// Returns the maximum hold time; `None` leaves it to the policy and the request's own limit.
    pub fn readiness(&self) -> Option<Period> {
        let limit = self.timeouts.readiness.filter(|limit| *limit != Period::ZERO);
        // With a fallback, the default is short enough that the client still waits for the fallback's response.
        limit.or(self.fallback.as_ref().map(|_| Period::from_secs(30)))
    }

    /// Returns the maximum total time of a request.
    pub fn request(&self) -> Option<Period> {
        self.timeouts.request.filter(|limit| *limit != Period::ZERO)
    }

    /// Returns the placeholder if it is sent instead of holding.
    pub fn immediate_placeholder(&self) -> Option<&StaticAnswer> {
        let holds = self.max_pending.is_some() && self.overflow == Overflow::Placeholder;
        self.placeholder.as_ref().filter(|_| !holds)
    }

    /// Returns the placeholder if it is sent when the maximum number of requests is held.
    pub fn overflow_placeholder(&self) -> Option<&StaticAnswer> {
        self.placeholder.as_ref().filter(|_| self.overflow == Overflow::Placeholder)
    }
}

// === impl StaticRoute ===

impl StaticRoute {
    /// Default status.
    pub const DEFAULT_STATUS: u16 = 200;
}

// === impl StaticAnswer ===

impl StaticAnswer {
    /// Creates a response. Hop-by-hop and framing headers are dropped: the proxy sets them itself.
    ///
    /// # Errors
    ///
    /// If the status or a header cannot be sent.
    pub fn new<'a>(
        status: u16,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
        body: StaticBody,
    ) -> Result<Self, StaticAnswerError> {
        let known = StatusCode::from_u16(status).ok().filter(|known| (200..600).contains(&known.as_u16()));
        let known = known.ok_or(StaticAnswerError::Status(status))?;
        let mut given = HeaderMap::new();
        for (name, value) in headers {
            let value =
                HeaderValue::from_str(value).map_err(|_| StaticAnswerError::HeaderValue(name.into()))?;
            let name: HeaderName = name.parse().map_err(|_| StaticAnswerError::HeaderName(name.into()))?;
            if !is_set_by_proxy(&name) {
                given.insert(name, value);
            }
        }
        Ok(Self { status: known, headers: given, body })
    }

    /// Returns the status.
    pub const fn status(&self) -> StatusCode {
        self.status
    }

    /// Returns the headers; `content-type` may be missing.
    pub const fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Returns the body for a request's path with its media type; `None` if the body is missing.
    pub fn body(&self, path: &str) -> Option<(Bytes, Option<&'static str>)> {
        let (name, content) = match &self.body {
            StaticBody::Text(text) => return Some((text.clone(), sniff(text))),
            StaticBody::File { name, content } => (name.as_str(), content),
            StaticBody::Files(files) => {
                let name = path.strip_prefix('/').unwrap_or(path);
                let name = if name.is_empty() { "index.html" } else { name };
                match files.get(name) {
                    Some(content) => (name, content),
                    None => return Some((Bytes::new(), None)),
                }
            }
            StaticBody::Missing => return None,
        };
        Some((content.clone(), media_type(name).or_else(|| sniff(content))))
    }
}

fn is_set_by_proxy(name: &HeaderName) -> bool {
    [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION, header::UPGRADE, header::TRAILER]
        .contains(name)
        || ["keep-alive", "proxy-connection"].contains(&name.as_str())
}

/// Returns the media type for the extensions common in a web page's ConfigMap.
fn media_type(name: &str) -> Option<&'static str> {
    let (_, extension) = name.rsplit_once('.')?;
    Some(match extension.to_ascii_lowercase().as_str() {
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "txt" => "text/plain; charset=utf-8",
        "xml" => "text/xml; charset=utf-8",
        "json" => "application/json",
        "svg" => "image/svg+xml",
        _ => return None,
    })
}

/// Guesses the media type of a text, roughly as browsers do.
fn sniff(text: &[u8]) -> Option<&'static str> {
    Some(match text.trim_ascii_start() {
        [] => return None,
        [b'<', b'?', ..] => "text/xml; charset=utf-8",
        [b'<', b'!' | b'a'..=b'z' | b'A'..=b'Z', ..] => "text/html; charset=utf-8",
        _ => "text/plain; charset=utf-8",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Policy;

    fn text(text: &'static str) -> StaticBody {
        StaticBody::Text(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn limits_have_the_defaults_of_the_add_on() {
        let mut intercept = Intercept::default();
        let policy = |intercept: &Intercept| {
            let mut policy = Policy::default();
            policy.apply(intercept);
            policy
        };
        assert_eq!(policy(&intercept).hold.timeout, Policy::default().hold.timeout);
        assert_eq!(policy(&intercept).upstream.response_timeout, Period::from_secs(300));
        intercept.fallback = Some("elsewhere:80".into());
        intercept.timeouts.readiness = Some(Period::ZERO);
        intercept.timeouts.response_header = Some(Period::ZERO);
        intercept.timeouts.request = Some(Period::ZERO);
        assert_eq!(policy(&intercept).hold.timeout, Period::from_secs(30), "else the fallback had no turn");
        assert_eq!(policy(&intercept).upstream.response_timeout, Intercept::NO_LIMIT);
        assert_eq!(intercept.request(), None);
        intercept.timeouts.readiness = Some(Period::from_secs(5));
        intercept.max_pending = Some(7);
        assert_eq!(policy(&intercept).hold.timeout, Period::from_secs(5));
        assert_eq!(policy(&intercept).hold.max_requests, 7);
    }

    #[test]
    fn placeholder_is_immediate_unless_hold_is_allowed() {
        let placeholder = StaticAnswer::new(503, [], text("soon")).ok();
        for (max_pending, overflow, at_once, beyond) in [
            (None, Overflow::Reject, true, false),
            (Some(1), Overflow::Reject, true, false),
            (None, Overflow::Placeholder, true, true),
            (Some(1), Overflow::Placeholder, false, true),
        ] {
            let intercept =
                Intercept { placeholder: placeholder.clone(), max_pending, overflow, ..Intercept::default() };
            let given =
                (intercept.immediate_placeholder().is_some(), intercept.overflow_placeholder().is_some());
            assert_eq!(given, (at_once, beyond), "{max_pending:?} {overflow:?}");
        }
    }

    #[test]
    fn placeholder_bodies_have_a_media_type() {
        let files = BTreeMap::from([("index.html".into(), "<p>".into()), ("data".into(), Bytes::from("{}"))]);
        let files = StaticAnswer::new(200, [], StaticBody::Files(files)).unwrap();
        let kind = |answer: &StaticAnswer, path: &str| answer.body(path).and_then(|(_, kind)| kind);
        assert_eq!(kind(&files, "/"), Some("text/html; charset=utf-8"));
        assert_eq!(kind(&files, "/data"), Some("text/plain; charset=utf-8"));
        assert_eq!(files.body("/favicon.ico"), Some((Bytes::new(), None)), "not there, and no error");
        assert_eq!(StaticAnswer::new(200, [], StaticBody::Missing).unwrap().body("/"), None);
        for (body, expected) in [("OK", "text/plain; charset=utf-8"), ("\n<h1>x", "text/html; charset=utf-8")]
        {
            assert_eq!(kind(&StaticAnswer::new(200, [], text(body)).unwrap(), "/"), Some(expected));
        }
    }

    #[test]
    fn unsendable_headers_are_refused() {
        let headers = [("Refresh", "5"), ("content-length", "7"), ("Connection", "close")];
        let answer = StaticAnswer::new(503, headers, text("soon")).unwrap();
        assert_eq!(answer.headers().keys().collect::<Vec<_>>(), ["refresh"]);
        assert_eq!(StaticAnswer::new(101, [], text("")), Err(StaticAnswerError::Status(101)));
        assert!(StaticAnswer::new(200, [("a b", "")], text("")).is_err());
        assert!(StaticAnswer::new(200, [("a", "\n")], text("")).is_err());
    }
}
