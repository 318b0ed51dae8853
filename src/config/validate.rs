//! Validation beyond what types express. Collects all problems, not only the first.

mod allowed;
mod cluster;
mod matching;
mod route;
mod target;
mod traces;

use std::{net::SocketAddr, time::Duration};

use super::{
    Config, Limits, env,
    error::{Problem, one_line},
    source::{KeyPath, SourceFile},
};
use crate::domain::{ByteCount, Period, Route, WebOrigin};

/// Upper bound of `limits.maxHeaders`.
const MAX_HEADERS: usize = 4096;

/// Upper bound of `limits.minRate`: a slower client may still use its network fully.
const MAX_MIN_RATE: ByteCount = ByteCount::mebibytes(1);

/// Checks a route of the cluster, with the keys of a ModelRoute. Uses the limits, addresses and allowed hosts of
/// `config`, and ignores its routes. Returns warnings, each with its key.
///
/// # Errors
///
/// All problems, each with its key.
pub fn check_cluster_route(route: &Route, config: &Config) -> Result<Vec<String>, Vec<String>> {
    let mut checker = ConfigChecker::new(config, None);
    checker.route(route, &KeyPath::default().key("spec"));
    let format_all = |problems: Vec<Problem>| {
        problems.into_iter().map(|problem| format!("{}: {}", problem.key, problem.message)).collect()
    };
    if checker.errors.is_empty() { Ok(format_all(checker.warnings)) } else { Err(format_all(checker.errors)) }
}

/// Returns warnings, or all errors together with those of decoding.
pub(super) fn validate(
    config: &Config,
    source: &SourceFile<'_>,
    decoding: Vec<Problem>,
) -> Result<Vec<Problem>, Vec<Problem>> {
    let mut checker = ConfigChecker { errors: decoding, ..ConfigChecker::new(config, Some(source)) };
    checker.top_level();
    checker.limits();
    checker.cluster();
    checker.traces();
    for (index, route) in source.route_indices().into_iter().zip(&config.routes) {
        checker.route(route, &KeyPath::default().key("routes").index(index));
    }
    checker.overlaps();

    let ConfigChecker { mut errors, mut warnings, .. } = checker;
    // The sort is stable, so that problems without a position keep the order in which they were found.
    errors.sort_by_key(|problem| problem.position);
    warnings.sort_by_key(|problem| problem.position);
    if errors.is_empty() { Ok(warnings) } else { Err(errors) }
}

struct ConfigChecker<'a> {
    config: &'a Config,
    /// `None` for a route of the cluster.
    source: Option<&'a SourceFile<'a>>,
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

// === impl ConfigChecker ===

impl<'a> ConfigChecker<'a> {
    const fn new(config: &'a Config, source: Option<&'a SourceFile<'a>>) -> Self {
        Self { config, source, errors: Vec::new(), warnings: Vec::new() }
    }

    fn error(&mut self, path: &KeyPath, message: impl Into<String>) {
        if !self.is_faulty(path) {
            self.errors.push(self.problem(path, message));
        }
    }

    /// Adds an error about a value that does not fit another one, unless that has an error of its own.
    fn misfit(&mut self, path: &KeyPath, other: &KeyPath, message: impl Into<String>) {
        let other_key = one_line(&other.to_string());
        if !self.is_faulty(other) && self.errors.iter().all(|error| error.key != other_key) {
            self.error(path, message);
        }
    }

    /// Returns whether decoding has found a problem at the path or a part of it.
    fn is_faulty(&self, path: &KeyPath) -> bool {
        self.source.is_some_and(|source| source.faults.has_problem_at(path))
    }

    fn warn(&mut self, path: &KeyPath, message: impl Into<String>) {
        self.warnings.push(self.problem(path, message));
    }

    fn problem(&self, path: &KeyPath, message: impl Into<String>) -> Problem {
        match self.source {
            Some(source) => source.problem(path, message),
            None => Problem {
                file: String::new(),
                position: None,
                key: one_line(&path.to_string()),
                message: one_line(&message.into()),
                line: None,
            },
        }
    }

    /// Returns whether the file sets the key; unknown for a route of the cluster.
    fn is_given(&self, path: &KeyPath) -> bool {
        self.source.is_some_and(|source| source.node(path).is_some())
    }

    /// Returns whether a route of the cluster is checked.
    const fn is_in_cluster(&self) -> bool {
        self.source.is_none()
    }

    fn top_level(&mut self) {
        let root = KeyPath::default();
        let Config { listen, admin, workers, drain_delay, drain_timeout, .. } = self.config;
        let mut taken = vec![("listen", *listen)];
        taken.retain(|(key, _)| !self.is_faulty(&root.key(*key)));
        let peers = self.config.peers.as_ref().map(|peers| peers.listen);
        for (key, path, address) in [
            ("admin", root.key("admin"), Some(*admin)),
            ("scaler", root.key("scaler"), self.config.scaler),
            ("peers.listen", root.key("peers").key("listen"), peers),
        ] {
            let Some(address) = address.filter(|_| !self.is_faulty(&path)) else { continue };
            if let Some((name, other)) = taken.iter().find(|(_, other)| clash(*other, address)) {
                let message = format!("{address} is already used by {name}, {other}; use different ports");
                self.error(&path, message);
            }
            taken.push((key, address));
        }
        if workers.is_some_and(|workers| workers.get() > 1024) {
            self.error(&root.key("workers"), "must be at most 1024; one per core serves best");
        }
        if let Some(report) = &self.config.report {
            let path = root.key("report");
            self.shell_reference(&path.key("dir"));
            if report.dir.is_empty() {
                self.error(&path.key("dir"), "is empty; name a directory that this process may write to");
            }
            if report.max_bytes < ByteCount::bytes(64 << 10) {
                self.error(
                    &path.key("maxBytes"),
                    "must be at least 64KiB: a record with its last lines takes some",
                );
            }
            if !(1..=1000).contains(&report.files) {
                self.error(&path.key("files"), "must be between 1 and 1000");
            }
        }
        self.web_pages();
        self.at_most_a_month(&root.key("drainDelay"), *drain_delay);
        self.at_most_a_month(&root.key("drainTimeout"), *drain_timeout);
        if self.config.routes.is_empty() && self.config.kubernetes.is_none() {
            let message = "there are no routes, so nothing can be served; add one with a name and a target";
            self.error(&root.key("routes"), message);
        }
    }

    /// Checks `cors.origins` and `allowedHosts`.
    fn web_pages(&mut self) {
        let root = KeyPath::default();
        let origins = self.config.cors.iter().flat_map(|cors| &cors.origins);
        for (index, origin) in origins.enumerate() {
            let message = match &**origin {
                "*" => continue,
                "null" => "`null` is an origin that any page can have; to allow all pages, write `*`",
                _ if WebOrigin::parse(origin).is_some() => continue,
                _ => "is not an origin; write only scheme, host and port, such as https://chat.example.com",
            };
            self.error(&root.key("cors").key("origins").index(index), message);
        }
        for (index, host) in self.config.allowed_hosts.iter().enumerate() {
            let name = host.strip_prefix("*.").unwrap_or(host);
            let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.[]:".contains(&byte);
            let has_port = !name.ends_with(']') && name.matches(':').count() == 1;
            if host != "*" && (name.is_empty() || has_port || !name.bytes().all(is_of_name)) {
                let message =
                    "is not a host; write a name or an address without a port, `*.example.com` or `*`";
                self.error(&root.key("allowedHosts").index(index), message);
            }
        }
    }

    fn limits(&mut self) {
        let path = KeyPath::default().key("limits");
        let Limits {
            max_body_bytes,
            max_buffered_bytes,
            max_connections,
            max_connections_per_source: _,
            max_concurrent_streams,
            max_rapid_resets,
            max_control_frames,
            max_headers,
            max_header_bytes,
            header_timeout,
            body_timeout,
            min_rate,
            idle_timeout,
            stall_timeout,
        } = self.config.limits;

        self.positive(&path.key("maxBodyBytes"), max_body_bytes.get());
        self.positive(&path.key("maxConnections"), max_connections);
        for (key, value) in [
            ("maxConcurrentStreams", max_concurrent_streams),
            ("maxRapidResets", max_rapid_resets),
            ("maxControlFrames", max_control_frames),
        ] {
            self.positive(&path.key(key), value as usize);
        }
        if !(1..=MAX_HEADERS).contains(&max_headers) {
            let message = format!("must be between 1 and {MAX_HEADERS}");
            self.error(&path.key("maxHeaders"), message);
        }
        if min_rate > MAX_MIN_RATE {
            let message =
                format!("{min_rate} per second excludes slow clients; choose at most {MAX_MIN_RATE}");
            self.error(&path.key("minRate"), message);
        }
        if max_buffered_bytes < max_body_bytes {
            let message = format!(
                "{max_buffered_bytes} is less than maxBodyBytes, {max_body_bytes}: a body of that size could never \
                 be taken in; raise this or lower that"
            );
            self.misfit(&path.key("maxBufferedBytes"), &path.key("maxBodyBytes"), message);
        }
        let (least, most) = (ByteCount::bytes(8 << 10), ByteCount::mebibytes(16));
        if !(least..=most).contains(&max_header_bytes) {
            let message = format!("{max_header_bytes} is out of bounds; choose {least} to {most}");
            self.error(&path.key("maxHeaderBytes"), message);
        }
        self.period(&path.key("headerTimeout"), header_timeout);
        self.period(&path.key("bodyTimeout"), body_timeout);
        self.period(&path.key("idleTimeout"), idle_timeout);
        self.period(&path.key("stallTimeout"), stall_timeout);
    }

    /// Warns about a reference in shell syntax, since the proxy does not expand it.
    fn shell_reference(&mut self, path: &KeyPath) {
        let text = self.source.and_then(|source| source.raw_text(path));
        if let Some((written, instead)) = text.and_then(env::shell_reference) {
            self.warn(
                path,
                format!("\"{written}\" is passed on as it is, no shell expands it; write {instead}"),
            );
        }
    }

    fn positive(&mut self, path: &KeyPath, value: usize) {
        if value == 0 {
            self.error(path, "must be at least 1");
        }
    }

    /// Checks a period for which zero would spin or reject everything.
    fn period(&mut self, path: &KeyPath, period: Period) {
        if period.get().is_zero() {
            self.error(path, "must be more than zero");
        }
        self.at_most_a_month(path, period);
    }

    /// Checks that a period is plausible; far longer ones overflow clocks.
    fn at_most_a_month(&mut self, path: &KeyPath, period: Period) {
        if period.get() > Duration::from_secs(30 * 24 * 60 * 60) {
            self.error(path, "is too long; choose at most 30d");
        }
    }
}

/// Returns whether two sockets cannot both be bound.
fn clash(one: SocketAddr, other: SocketAddr) -> bool {
    let everywhere = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && (one.ip() == other.ip() || everywhere)
}
