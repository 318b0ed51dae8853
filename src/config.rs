//! The configuration: a YAML file, overridden by variables, overridden by flags, made into one validated [`Config`].

pub mod budget;
mod cluster;
mod cors;
mod decode;
mod describe;
mod error;
mod load;
mod memory_limit;
mod overrides;
mod report;
mod schema;
mod source;
mod traces;
mod validate;
mod watch;

use std::{
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::Path,
};

pub use cluster::{Kubernetes, Peers, ScalerTls};
pub use cors::Cors;
pub use error::{ConfigError, Position, Problem};
pub use load::{Loaded, check};
pub use memory_limit::MemoryLimit;
pub use overrides::Overrides;
pub use report::Report;
pub use schema::{Key, Kind, Section, schema, sections};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use traces::{Traces, TracesProtocol};
pub use validate::check_cluster_route;
pub use watch::ConfigWatcher;

use crate::domain::{ByteCount, Period, Route};

/// Everything an operator can set.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(title = "Anteroom's configuration")]
pub struct Config {
    /// The address that requests come in at. The default is this machine only: to be reachable is a decision.
    #[schemars(extend("format" = "ip:port"))]
    pub listen: SocketAddr,
    /// The address of the dashboard, metrics, probes and the JSON API. Not for the clients: it tells what runs where.
    #[schemars(extend("format" = "ip:port"))]
    pub admin: SocketAddr,
    /// The address of the scaler that KEDA asks, over gRPC. Without it, there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "ip:port"))]
    pub scaler: Option<SocketAddr>,
    /// TLS for the scaler. Without it, it is plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaler_tls: Option<ScalerTls>,
    /// Other replicas of this proxy. Without it, there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<Peers>,
    /// The Kubernetes cluster whose routes, pods and ScaledObjects are watched. Without it, none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
    /// Where the records of cold starts are kept. Without it they are in memory alone, the newest of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
    /// Traces of requests. Without it, none are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traces: Option<Traces>,
    /// Web pages of other origins that may send requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cors: Option<Cors>,
    /// Hosts that requests may name, beside those of routes: `llm.example.com`, `*.example.com`; `*` for all. Another
    /// site's name can lead a browser here (DNS rebinding), so where `cors` is enforced and on the admin port, a request's
    /// `Host` must be a loopback or private address, a name without a dot or below `.localhost`, `.local`, `.internal` or
    /// `.svc`, this machine's name, a host of a route, or one of these; else it is 403. List the names that a
    /// reverse proxy on this machine passes on.
    pub allowed_hosts: Vec<String>,
    /// How many threads serve requests. Default: one per core, as a thread shares nothing with its neighbours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<NonZeroUsize>,
    /// How long new connections are still accepted after SIGTERM while `/readyz` says no. Load balancers go on
    /// sending until they have noticed, which takes a few seconds. Ctrl-C skips it.
    pub drain_delay: Period,
    /// How long requests may take to finish once nothing is accepted any more; then they are cut off. Together with
    /// `drainDelay` this belongs below Kubernetes' `terminationGracePeriodSeconds`.
    pub drain_timeout: Period,
    /// How the log is written.
    pub log: LogFormat,
    /// What is remembered of requests.
    pub history: History,
    /// What clients may use up.
    pub limits: Limits,
    /// The routes, in any order: the more specific goes first.
    pub routes: Vec<Route>,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is remembered of requests that waited, failed or were refused, for `GET /api/v1/requests`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct History {
    /// How many are remembered of those that waited, and as many again of those that failed or were refused at once;
    /// 0: none. Each of the two takes at most 2 KiB times this. The default is an afternoon of cold starts in 4 MiB.
    pub requests: usize,
}

/// What clients may use up: every queue, buffer and wait has a bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// How large the body of one request may be. The default fits a long chat with a few images; above it, 413.
    pub max_body_bytes: ByteCount,
    /// How many bytes all request bodies together may take in memory, held or on their way; those that have not all
    /// arrived, three quarters of it. If it is not set, a quarter of the memory limit (of the cgroup, else of the machine),
    /// at least one body and at most the default, which is 32 bodies of the largest size.
    pub max_buffered_bytes: ByteCount,
    /// How many client connections may be open. If it is not set, as many as a quarter of the memory limit has room for, at
    /// 40 KiB each, and at most the default. A further one takes the place of the one that has been idle for longest;
    /// while all are busy, it waits in the kernel's accept queue. Where the process may
    /// not have so many open files, it is lowered to those, less a quarter or 4,096 of them, and the log says so.
    #[schemars(range(min = 1))]
    pub max_connections: usize,
    /// How many of them may come from one source: an IPv4 address, or 64 bits of an IPv6 one. A further one takes the
    /// place of its source's that has been idle for longest; while all of those are busy, it is closed at once. By
    /// default any number, as behind a load balancer all come from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections_per_source: Option<NonZeroUsize>,
    /// How many requests an HTTP/2 connection may have under way at once; the client is told, and further ones are
    /// reset. The default is what one load balancer may hold through a cold start.
    #[schemars(range(min = 1))]
    pub max_concurrent_streams: u32,
    /// How many requests of an HTTP/2 connection may be reset: by the client within a second of their beginning, while
    /// they are more than half of its requests; or by us because it broke the protocol. One more, and the connection is
    /// closed. The default is more than the clients behind one load balancer do by chance.
    #[schemars(range(min = 1))]
    pub max_rapid_resets: u32,
    /// How many frames a second an HTTP/2 connection may send that neither begin a request nor bring a part of one
    /// (PING, SETTINGS, PRIORITY, WINDOW_UPDATE and others), on average; as many at once, and one more for each KiB
    /// that it is sent. More, and it is closed. The default is many times what a client with a thousand streams sends.
    #[schemars(range(min = 1))]
    pub max_control_frames: u32,
    /// How many header fields a request may have; more, and it is 431. The default is several times what browsers,
    /// SDKs and proxies send together.
    #[schemars(range(min = 1))]
    pub max_headers: usize,
    /// How large the head of a request may be, at least 8KiB. The default fits long tokens and cookies.
    pub max_header_bytes: ByteCount,
    /// How long the head of a request may take to come in. The default is ample for a slow phone, and too short for
    /// an attack.
    pub header_timeout: Period,
    /// How long a request body may pause between two parts. The default is ample for an upload over a bad line. See
    /// `minRate` for many short pauses.
    pub body_timeout: Period,
    /// How many bytes a second a client must manage while it is waited for: of a request body that comes in, over
    /// `bodyTimeout`, and of an answer that it takes, over `stallTimeout`. 0: any. The default is half of what the
    /// slowest mobile networks carry; a byte now and then must not hold a place for ever.
    pub min_rate: ByteCount,
    /// How long a kept-alive connection stays open with nothing under way. Whatever stands in front must close first, or
    /// it sends into a closing connection: the default is above what most load balancers have (Google's 600s, AWS' 60s,
    /// nginx' 60s); Envoy's `idle_timeout` of 1h has to be set below it. HTTP/1.1 answers say it (`Keep-Alive`); over
    /// HTTP/2 the end is announced (GOAWAY) and comes 5s later.
    pub idle_timeout: Period,
    /// How long a client may read nothing while there is something to send. The default survives a phone in a tunnel,
    /// and frees the model server from a client that went away without a word.
    pub stall_timeout: Period,
}

// === impl Config ===

impl Config {
    /// Reads the file, applies the overrides and validates the result.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        Loaded::load(path, overrides).map(|loaded| loaded.config)
    }

    /// Reads and validates a text; `name` stands for the file in errors.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        Loaded::parse(text, name, &Overrides::default()).map(|loaded| loaded.config)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 8080).into(),
            admin: (Ipv4Addr::LOCALHOST, 8081).into(),
            scaler: None,
            scaler_tls: None,
            peers: None,
            kubernetes: None,
            report: None,
            traces: None,
            cors: None,
            allowed_hosts: Vec::new(),
            workers: None,
            drain_delay: Period::from_secs(5),
            drain_timeout: Period::from_secs(30),
            log: LogFormat::default(),
            history: History::default(),
            limits: Limits::default(),
            routes: Vec::new(),
        }
    }
}

impl Default for History {
    fn default() -> Self {
        Self { requests: 1000 }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: ByteCount::mebibytes(32),
            max_buffered_bytes: ByteCount::mebibytes(1024),
            max_connections: 65536,
            max_connections_per_source: None,
            max_concurrent_streams: 1024,
            max_rapid_resets: 500,
            max_control_frames: 10_000,
            max_headers: 100,
            max_header_bytes: ByteCount::bytes(64 << 10),
            header_timeout: Period::from_secs(30),
            body_timeout: Period::from_secs(30),
            min_rate: ByteCount::bytes(1 << 10),
            idle_timeout: Period::from_secs(11 * 60),
            stall_timeout: Period::from_secs(60),
        }
    }
}
