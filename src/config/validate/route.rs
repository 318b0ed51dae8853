//! Validation of a single route.

use std::time::Duration;

use http::{
    header::{HOST, HeaderName, HeaderValue},
    uri::PathAndQuery,
};

use super::ConfigChecker;
use crate::{
    config::source::KeyPath,
    domain::{ClusterTarget, KeepaliveMode, Matcher, Route, Target, UpstreamTimeouts},
};

const NO_HOST_HEADER: &str = "match the host with `hosts`: HTTP/2 has no such header";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

impl ConfigChecker<'_> {
    pub(super) fn route(&mut self, route: &Route, path: &KeyPath) {
        match &route.intercept {
            None => self.matcher(&route.matcher, &path.key("match")),
            Some(intercept) => {
                for (index, matcher) in intercept.rules.iter().enumerate() {
                    self.matcher(matcher, &path.key("rules").index(index));
                }
            }
        }
        if self.is_in_cluster() {
            self.claims(route, &path.key("match"));
        } else {
            // The API server validates names of objects.
            self.name(route.name.as_str(), &path.key("name"));
        }
        let target = path.key("target");
        match &route.target {
            Target::Process(process) => self.process(process, &target.key("process")),
            Target::Url(url) => self.url(url, &target.key("url")),
            Target::Cluster(ClusterTarget { gateway: Some(gateway), .. }) => {
                self.url(gateway, &target.key("gateway"));
            }
            Target::Cluster(_) => {}
        }
        self.readiness(route, &path.key("readiness"));
        self.hold(route, &path.key("hold"));
        self.keepalive(route, &path.key("keepalive"));
        self.concurrency(route, &path.key("concurrency"));
        self.scaling(route, path);
        self.gateway(route, &path.key("gateway").key("notYet"));

        let path = path.key("upstream");
        self.period(&path.key("connectTimeout"), route.upstream.connect_timeout);
        self.period(&path.key("responseTimeout"), route.upstream.response_timeout);
        self.period(&path.key("idleTimeout"), route.upstream.idle_timeout);
        let max = UpstreamTimeouts::MAX_RESPONSE_HEADERS;
        if !(1..=max).contains(&route.upstream.max_response_headers) {
            self.error(&path.key("maxResponseHeaders"), format!("must be between 1 and {max}"));
        }
    }

    /// Checks a name, which is a metric label, a log field and part of the admin API's paths.
    fn name(&mut self, name: &str, path: &KeyPath) {
        let fits = |character: char| character.is_ascii_alphanumeric() || "-_./".contains(character);
        if name.is_empty() || name.len() > 253 || !name.chars().all(fits) {
            let message = format!(
                "\"{name}\" is not a valid name; use letters, digits and -_./, at most 253 characters"
            );
            self.error(path, message);
        }
    }

    /// Bounds the claims of a route of the cluster: all of them are compared with those of other routes.
    fn claims(&mut self, route: &Route, path: &KeyPath) {
        const MAX_CLAIMS: usize = 4096;
        if route.claim_count() > MAX_CLAIMS {
            let message = format!(
                "makes {} combinations of host, path and model, more than the maximum of {MAX_CLAIMS}; use several routes",
                route.claim_count()
            );
            self.error(path, message);
        }
    }

    fn matcher(&mut self, matcher: &Matcher, path: &KeyPath) {
        for (index, model) in matcher.models.iter().enumerate() {
            if model.is_empty() {
                let message = "is empty; leave `models` out to match requests of any model";
                self.error(&path.key("models").index(index), message);
            }
        }
        for (index, host) in matcher.hosts.iter().enumerate() {
            if self.is_in_cluster() && host == "*" {
                continue;
            }
            if let Err(message) = host_name(host) {
                self.error(&path.key("hosts").index(index), format!("\"{host}\" {message}"));
            }
        }
        for (index, prefix) in matcher.paths.iter().enumerate() {
            if let Err(message) = path_prefix(prefix) {
                self.error(&path.key("paths").index(index), format!("\"{prefix}\" {message}"));
            }
        }
        let path = path.key("headers");
        for name in &matcher.present {
            match HeaderName::try_from(name.as_str()) {
                Err(_) => self.error(&path.key(name), format!("\"{name}\" is not the name of a header")),
                Ok(header) if header == HOST => self.error(&path.key(name), NO_HOST_HEADER),
                Ok(_) => {}
            }
        }
        for (name, value) in &matcher.headers {
            match HeaderName::try_from(name.as_str()) {
                Err(_) => self.error(&path.key(name), format!("\"{name}\" is not the name of a header")),
                Ok(header) if header == HOST => self.error(&path.key(name), NO_HOST_HEADER),
                Ok(header) => {
                    let twice = |other: &&String| *other < name && header == other.as_str();
                    if let Some(other) = matcher.headers.keys().find(twice) {
                        let message = format!(
                            "is the same header as \"{other}\", so that both values could never match"
                        );
                        self.error(&path.key(name), message);
                    }
                }
            }
            if HeaderValue::from_str(value).is_err() || value.trim() != value {
                let message =
                    "cannot be the value of a header: no control characters, no white space at its ends";
                self.error(&path.key(name), message);
            }
        }
    }

    fn readiness(&mut self, route: &Route, path: &KeyPath) {
        let readiness = &route.readiness;
        if !readiness.path.starts_with('/') || PathAndQuery::try_from(readiness.path.as_str()).is_err() {
            let message =
                format!("\"{}\" is not a path; it starts with a slash, such as /health", readiness.path);
            self.error(&path.key("path"), message);
        }
        self.period(&path.key("interval"), readiness.interval);
        self.period(&path.key("timeout"), readiness.timeout);
        self.period(&path.key("activationTimeout"), readiness.activation_timeout);
        if readiness.interval > readiness.activation_timeout {
            let message = format!(
                "{} is longer than activationTimeout, {}: the target would never be probed",
                readiness.interval, readiness.activation_timeout
            );
            self.misfit(&path.key("interval"), &path.key("activationTimeout"), message);
        }
    }

    fn hold(&mut self, route: &Route, path: &KeyPath) {
        let (hold, limits) = (&route.hold, &self.config.limits);
        self.positive(&path.key("maxRequests"), hold.max_requests);
        self.positive(&path.key("maxBytes"), hold.max_bytes.get());
        self.period(&path.key("timeout"), hold.timeout);
        if hold.timeout.get() > DAY {
            self.warn(&path.key("timeout"), format!("{} is longer than any client waits", hold.timeout));
        }
        if hold.max_requests > limits.max_connections {
            let message = format!(
                "{} is more than limits.maxConnections, {}: over HTTP/1.1, connections run out first",
                hold.max_requests, limits.max_connections
            );
            self.warn(&path.key("maxRequests"), message);
        }
        if hold.max_bytes < limits.max_body_bytes {
            let message = format!(
                "{} is less than limits.maxBodyBytes, {}: the largest bodies pass while the target is up, and \
                 cannot be held",
                hold.max_bytes, limits.max_body_bytes
            );
            self.warn(&path.key("maxBytes"), message);
        }
        if hold.max_bytes > limits.max_buffered_bytes {
            let message = format!(
                "{} is more than limits.maxBufferedBytes, {}, which is reached first",
                hold.max_bytes, limits.max_buffered_bytes
            );
            self.warn(&path.key("maxBytes"), message);
        }
    }

    fn keepalive(&mut self, route: &Route, path: &KeyPath) {
        let keepalive = &route.keepalive;
        self.period(&path.key("after"), keepalive.after);
        self.period(&path.key("interval"), keepalive.interval);
        if keepalive.mode == KeepaliveMode::Off {
            if keepalive.while_streaming {
                let message = "true has no effect with mode off, unless a request asks for heartbeats";
                self.warn(&path.key("whileStreaming"), message);
            }
            return;
        }
        if keepalive.interval.get() > Duration::from_secs(15) {
            let message = format!(
                "{} may be longer than load balancers allow a connection to be silent; 15s or less is safe",
                keepalive.interval
            );
            self.warn(&path.key("interval"), message);
        }
        if self.is_given(&path.key("after")) && keepalive.after >= route.hold.timeout {
            let message = format!(
                "{} is not before hold.timeout, {}: nothing is ever sent; mode off says so plainly",
                keepalive.after, route.hold.timeout
            );
            self.warn(&path.key("after"), message);
        } else if keepalive.after.get() > Duration::from_secs(55) {
            let message = format!(
                "{} is beyond the minute after which common load balancers cut a silent connection",
                keepalive.after
            );
            self.warn(&path.key("after"), message);
        }
    }

    fn gateway(&mut self, route: &Route, path: &KeyPath) {
        let not_yet = &route.gateway.not_yet;
        for (index, status) in not_yet.status.iter().enumerate() {
            if !(400..=599).contains(status) {
                let message = format!("{status} is not an error status; choose from 400 to 599");
                self.error(&path.key("status").index(index), message);
            }
        }
        self.at_most_a_month(&path.key("for"), not_yet.within);
    }

    fn concurrency(&mut self, route: &Route, path: &KeyPath) {
        let concurrency = &route.concurrency;
        self.positive(&path.key("max"), concurrency.max as usize);
        self.positive(&path.key("rampStart"), concurrency.ramp_start as usize);
        if concurrency.ramp_start > concurrency.max {
            let message = format!(
                "{} is more than max, {}; the ramp starts below it, or at it",
                concurrency.ramp_start, concurrency.max
            );
            self.misfit(&path.key("rampStart"), &path.key("max"), message);
        }
    }
}

pub(super) fn host_name(host: &str) -> Result<(), &'static str> {
    let name = host.strip_prefix("*.").unwrap_or(host);
    let label = |label: &str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        !label.is_empty() && label.bytes().all(fits)
    };
    let bracketed =
        |name: &str| name.strip_prefix('[').and_then(|name| Some(name.split_once(']')?.0)).is_some();
    match name {
        _ if name.contains("://") => Err("has a scheme; write the name alone"),
        _ if name.contains('/') => Err("has a path; match it with `paths`"),
        _ if name.contains('*') => Err("has a wildcard that is not a whole first label; write *.example.com"),
        _ if bracketed(name) && name.ends_with(']') => {
            let address = name[1..name.len() - 1].parse::<std::net::Ipv6Addr>();
            address.map(|_| ()).map_err(|_| "is not an address")
        }
        _ if name.contains(':') => Err("has a port; write the name alone, it matches at every port"),
        _ if !name.split('.').all(label) => Err("is not the name of a host"),
        _ => Ok(()),
    }
}

fn path_prefix(prefix: &str) -> Result<(), &'static str> {
    match prefix {
        _ if !prefix.starts_with('/') => Err("is not a path; it starts with a slash"),
        _ if prefix.contains('*') => Err("has a wildcard; a path matches everything below it as it is"),
        _ if prefix.contains(['?', '#']) => Err("has a query; only the path is matched"),
        _ if PathAndQuery::try_from(prefix).is_err() => Err("is not a path of a URL; encode it with %"),
        _ => Ok(()),
    }
}
