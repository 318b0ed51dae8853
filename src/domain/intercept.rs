//! What an `InterceptorRoute` of the KEDA HTTP Add-on asks for beyond what every route has: it fronts any HTTP
//! application, not the OpenAI API.
//!
//! The meaning of each field, its default and the status codes are those of the Add-on's reference of
//! `http.keda.sh/v1beta1` (0.16 and 1.0).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use thiserror::Error;

use super::{KeepaliveMode, Matcher, Period, Policy};

/// What an `InterceptorRoute` asks for. A route that has this serves every method and path, with any body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intercept {
    /// Which requests belong to the route: those that any of these matches. None: no request. Models are of no
    /// meaning here, since no body is read for them; [`super::Route::matcher`] is not looked at.
    pub rules: Vec<Matcher>,
    /// How long things may take.
    pub timeouts: InterceptTimeouts,
    /// `host:port` of the Service that gets what waited for the target in vain.
    pub fallback: Option<Arc<str>>,
    /// What is answered at once while nothing is ready; the target is woken all the same.
    pub placeholder: Option<StaticAnswer>,
    /// How many requests are held while nothing is ready, on one replica of the proxy. `None`: [`Self::MAX_PENDING`].
    pub max_pending: Option<u32>,
    /// What becomes of more than that.
    pub overflow: Overflow,
    /// What is answered without demand, the first that matches.
    pub static_routes: Vec<StaticRoute>,
}

/// `timeouts` as the object has them. `None`: the Add-on's default; zero: no such limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterceptTimeouts {
    /// How long a request is held until an endpoint is ready. By default there is no limit but that of the request;
    /// with a fallback it is 30 s.
    pub readiness: Option<Period>,
    /// How long a request may take in all, from its arrival to the last byte of its answer. By default without limit.
    pub request: Option<Period>,
    /// How long the head of the answer may take, from the dispatch on. By default 300 s.
    pub response_header: Option<Period>,
}

/// What becomes of a request that finds as many held as may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// 503 `hold_queue_full`.
    #[default]
    Reject,
    /// The placeholder, if there is one. With [`Intercept::max_pending`] set, requests are held up to that number
    /// instead of getting the placeholder at once.
    Placeholder,
}

/// Requests that are answered without demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticRoute {
    /// Which: those that any of these matches. None: no request.
    pub rules: Vec<Matcher>,
    /// The answer.
    pub answer: StaticAnswer,
    /// When it is given.
    pub mode: ResponseMode,
}

/// When a static route gives its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResponseMode {
    /// While nothing is ready; else the request is passed on, and counts as no demand.
    #[default]
    WhenUnavailable,
    /// Always.
    Always,
}

/// An answer that is written down in the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticAnswer {
    status: StatusCode,
    headers: HeaderMap,
    body: StaticBody,
}

/// The body of a static answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StaticBody {
    /// What stands in the object; empty if nothing does.
    Text(Bytes),
    /// One key of a ConfigMap. Its extension tells the media type.
    File {
        /// The key.
        name: String,
        /// What it holds.
        content: Bytes,
    },
    /// All keys of a ConfigMap: that which the request's path names, `index.html` for `/`; empty if there is none.
    Files(BTreeMap<String, Bytes>),
    /// The ConfigMap or the key is not there: 500.
    Missing,
}

/// Why there cannot be such an answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum StaticAnswerError {
    #[error("{0} is no status of an answer: give one from 200 to 599")]
    Status(u16),
    #[error("`{0}` is no name of a header")]
    HeaderName(String),
    #[error("the value of the header `{0}` has characters that no header may have")]
    HeaderValue(String),
}

// === impl Intercept ===

impl Intercept {
    /// The status of a placeholder that says none.
    pub const PLACEHOLDER_STATUS: u16 = 503;

    /// Requests that one replica is for if the object does not say.
    pub const TARGET: u32 = 100;

    /// How many requests are held if the object does not say. The Add-on has no bound.
    pub const MAX_PENDING: u32 = 10_000;

    /// How many requests one endpoint gets at a time: the Add-on has no bound.
    const MAX_IN_FLIGHT: u32 = 1_000_000;

    /// Stands for a time without limit: every wait has one.
    const NO_LIMIT: Period = Period::from_secs(24 * 60 * 60);

    /// Makes a route's policies those that the object asks for. `hold.timeout` is the longest that any request is
    /// held, so what stands there is kept if it is less.
    pub(super) fn apply(&self, policy: &mut Policy) {
        policy.hold.max_requests = self.max_pending.unwrap_or(Self::MAX_PENDING) as usize;
        if let Some(readiness) = self.readiness() {
            policy.hold.timeout = readiness;
        }
        // Only answers of the OpenAI API have a way to be begun early.
        policy.keepalive.mode = KeepaliveMode::Off;
        policy.concurrency.max = Self::MAX_IN_FLIGHT;
        policy.concurrency.ramp_start = Self::MAX_IN_FLIGHT;
        policy.upstream.response_timeout = match self.timeouts.response_header {
            None => Period::from_secs(300),
            Some(Period::ZERO) => Self::NO_LIMIT,
            Some(limit) => limit,
        };
        policy.upstream.idle_timeout = Self::NO_LIMIT;
    }

    /// How long a request is held; `None`: as long as the policy and the request's own limit allow.
    pub fn readiness(&self) -> Option<Period> {
        let limit = self.timeouts.readiness.filter(|limit| *limit != Period::ZERO);
        // Else nothing would be left for the fallback.
        limit.or(self.fallback.as_ref().map(|_| Period::from_secs(30)))
    }

    /// How long a request may take in all.
    pub fn request(&self) -> Option<Period> {
        self.timeouts.request.filter(|limit| *limit != Period::ZERO)
    }

    /// The placeholder, if it is given at once instead of holding.
    pub fn placeholder_at_once(&self) -> Option<&StaticAnswer> {
        let holds = self.max_pending.is_some() && self.overflow == Overflow::Placeholder;
        self.placeholder.as_ref().filter(|_| !holds)
    }

    /// The placeholder, if it is what a request gets that finds as many held as may be.
    pub fn placeholder_beyond(&self) -> Option<&StaticAnswer> {
        self.placeholder.as_ref().filter(|_| self.overflow == Overflow::Placeholder)
    }
}

// === impl StaticRoute ===

impl StaticRoute {
    /// The status of an answer that says none.
    pub const STATUS: u16 = 200;
}

// === impl StaticAnswer ===

impl StaticAnswer {
    /// An answer as the object gives it. Headers that frame a message or concern one connection are left out: those
    /// are ours to say.
    ///
    /// # Errors
    /// When the status or a header cannot be sent.
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
            if !is_ours(&name) {
                given.insert(name, value);
            }
        }
        Ok(Self { status: known, headers: given, body })
    }

    /// The status.
    pub const fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers, but for the media type where they do not give it.
    pub const fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The body for a request's path, and its media type; `None` if it is missing.
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

fn is_ours(name: &HeaderName) -> bool {
    [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION, header::UPGRADE, header::TRAILER]
        .contains(name)
        || ["keep-alive", "proxy-connection"].contains(&name.as_str())
}

/// The media types of what is found in the ConfigMap of a page.
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

/// The media type of a text that comes without one, roughly as browsers guess it.
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

    fn text(text: &'static str) -> StaticBody {
        StaticBody::Text(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn limits_have_the_defaults_of_the_add_on() {
        let mut intercept = Intercept::default();
        let policy = |intercept: &Intercept| {
            let mut policy = Policy::default();
            intercept.apply(&mut policy);
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
    fn placeholder_is_immediate_unless_holding_is_allowed() {
        let placeholder = StaticAnswer::new(503, [], text("soon")).ok();
        for (max_pending, overflow, at_once, beyond) in [
            (None, Overflow::Reject, true, false),
            (Some(1), Overflow::Reject, true, false),
            (None, Overflow::Placeholder, true, true),
            (Some(1), Overflow::Placeholder, false, true),
        ] {
            let intercept =
                Intercept { placeholder: placeholder.clone(), max_pending, overflow, ..Intercept::default() };
            let given = (intercept.placeholder_at_once().is_some(), intercept.placeholder_beyond().is_some());
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
