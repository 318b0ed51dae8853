//! Conditions on a request's host, path and headers.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::domain::Matcher;

/// Conditions that must all hold; one host and one path suffice.
pub(super) struct Rule {
    hosts: Vec<Host>,
    paths: Vec<Box<str>>,
    headers: Headers,
}

/// Required headers; `None` accepts any value.
pub(super) type Headers = Vec<(HeaderName, Option<HeaderValue>)>;

/// Pattern for a host.
pub(super) enum Host {
    Any,
    /// Suffix including its leading dot.
    Below(Box<str>),
    Exact(Box<str>),
}

// === impl Rule ===

impl Rule {
    pub(super) fn new(matcher: &Matcher) -> Self {
        Self {
            hosts: matcher.hosts.iter().map(|host| Host::new(host)).collect(),
            paths: matcher.paths.iter().map(|path| normalize_prefix(path).into()).collect(),
            headers: required_headers(matcher),
        }
    }

    /// Returns `true` if a request meets the conditions. `host` may have a port.
    pub(super) fn matches_request(&self, host: &str, path: &str, headers: &HeaderMap) -> bool {
        let host = host_name(host);
        (self.hosts.is_empty() || self.hosts.iter().any(|known| known.matches_host(host)))
            && (self.paths.is_empty() || self.paths.iter().any(|prefix| is_below(path, prefix)))
            && has_required_headers(headers, &self.headers)
    }
}

// === impl Host ===

impl Host {
    pub(super) fn new(text: &str) -> Self {
        match text.strip_prefix('*') {
            Some("") => Self::Any,
            Some(suffix) => Self::Below(suffix.into()),
            None => Self::Exact(text.into()),
        }
    }

    /// Returns `true` if the pattern matches `host`, which has no port.
    pub(super) fn matches_host(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Below(suffix) => ends_with(host, suffix),
            Self::Exact(name) => host.eq_ignore_ascii_case(name),
        }
    }
}

/// Returns the headers that a matcher requires, sorted by name.
pub(super) fn required_headers(matcher: &Matcher) -> Headers {
    // Names and values have been validated with the configuration or object.
    let given = matcher.headers.iter().filter_map(|(name, value)| {
        Some((name.parse::<HeaderName>().ok()?, Some(value.parse::<HeaderValue>().ok()?)))
    });
    let present = matcher.present.iter().filter_map(|name| Some((name.parse().ok()?, None)));
    let mut headers: Headers = given.chain(present).collect();
    headers.sort_by(|a, b| a.0.as_str().cmp(b.0.as_str()));
    headers
}

/// Returns `true` if a request has all required headers.
pub(super) fn has_required_headers(given: &HeaderMap, wanted: &Headers) -> bool {
    wanted.iter().all(|(name, value)| match value {
        Some(value) => given.get_all(name).iter().any(|given| given == value),
        None => given.contains_key(name),
    })
}

/// Normalizes a path prefix: `/a/` equals `/a`, and `/` matches everything.
pub(super) fn normalize_prefix(path: &str) -> &str {
    path.trim_end_matches('/')
}

/// Returns `true` if a path equals a prefix or continues it with a new segment.
pub(super) fn is_below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Strips the port of a host.
pub(super) fn host_name(host: &str) -> &str {
    match host.rfind([':', ']']) {
        Some(at) if host.as_bytes()[at] == b':' => &host[..at],
        _ => host,
    }
}

/// Returns `true` for an IP address or `localhost`, given without a port.
pub fn is_address(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    address.parse::<IpAddr>().is_ok() || host.eq_ignore_ascii_case("localhost")
}

/// Returns `true` if a host is below a suffix with a leading dot.
pub(super) fn ends_with(host: &str, suffix: &str) -> bool {
    host.len() > suffix.len()
        && host.get(host.len() - suffix.len()..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_needs_any_host_any_path_and_all_headers() {
        let rule = |hosts: &[&str], paths: &[&str]| {
            let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
            Rule::new(&Matcher {
                hosts: texts(hosts),
                paths: texts(paths),
                headers: [("x-team".into(), "red".into())].into(),
                present: ["x-any".into()].into(),
                ..Matcher::default()
            })
        };
        let headers = |headers: &[(&'static str, &'static str)]| -> HeaderMap {
            let parsed = |(name, value): &(&'static str, &'static str)| {
                (HeaderName::from_static(name), HeaderValue::from_static(value))
            };
            headers.iter().map(parsed).collect()
        };
        let good = headers(&[("x-team", "blue"), ("x-team", "red"), ("x-any", "")]);
        for (hosts, paths, expected) in [
            (&[][..], &[][..], true),
            (&["other", "A.example.com"], &["/other", "/healthz/"], true),
            (&["*.example.com"], &[], true),
            (&["*"], &["/"], true),
            (&["example.com"], &[], false),
            (&[], &["/health"], false),
        ] {
            let holds = rule(hosts, paths).matches_request("a.EXAMPLE.com:80", "/healthz/live", &good);
            assert_eq!(holds, expected, "{hosts:?} {paths:?}");
        }
        for bad in [&[("x-team", "red")][..], &[("x-any", "1")], &[("x-team", "blue"), ("x-any", "1")]] {
            assert!(!rule(&[], &[]).matches_request("a", "/", &headers(bad)), "{bad:?}");
        }
    }
}
