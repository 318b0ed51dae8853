//! Configuration: a YAML file with overrides from environment variables and flags, merged into a validated [`Config`].

pub mod budget;
mod cluster;
mod cors;
mod decode;
mod describe;
mod env;
mod error;
mod load;
mod log;
mod memory_limit;
mod overlay;
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
};

pub use cluster::{Kubernetes, Peers, ScalerTls};
pub use cors::Cors;
pub use error::{ConfigError, Position, Problem};
pub use load::{LoadedConfig, check};
pub use log::{LogFormat, LogSettings};
pub use memory_limit::MemoryLimit;
pub use overrides::Overrides;
pub use report::Report;
pub use schema::{ConfigKey, Section, ValueKind, schema, sections};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use traces::{Traces, TracesProtocol};
pub use validate::check_cluster_route;
pub use watch::ConfigWatcher;

use crate::domain::{ByteCount, Period, Route};

/// All settings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(title = "Anteroom's configuration")]
pub struct Config {
    /// Address of the API.
    #[schemars(extend("format" = "ip:port"))]
    pub listen: SocketAddr,
    /// Address of the dashboard, metrics, probes and the JSON API. Keep it from clients.
    #[schemars(extend("format" = "ip:port"))]
    pub admin: SocketAddr,
    /// Address of the gRPC scaler for KEDA. Default: no scaler.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "ip:port"))]
    pub scaler: Option<SocketAddr>,
    /// TLS of the scaler. Default: plaintext.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaler_tls: Option<ScalerTls>,
    /// Other replicas of this proxy. Default: a single replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<Peers>,
    /// Kubernetes cluster to watch. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
    /// Files for records of cold starts. Default: only the newest records, in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
    /// Export of request traces. Default: off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traces: Option<Traces>,
    /// Web pages of other origins that may send requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cors: Option<Cors>,
    /// Further hosts that requests may name, such as those that a reverse proxy on this machine passes on:
    /// `llm.example.com`, `*.example.com`, `*` for all. On `admin`, and on `listen` where `cors` is enforced, others
    /// get 403, except hosts of routes, loopback and private addresses, this machine's name, and names without a dot or
    /// below `.localhost`, `.local`, `.internal` or `.svc`.
    pub allowed_hosts: Vec<String>,
    /// Worker threads. Default: one per core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<NonZeroUsize>,
    /// Time after SIGTERM in which new connections are still accepted while `/readyz` fails, for load balancers to
    /// notice. Ctrl-C skips it.
    pub drain_delay: Period,
    /// Time that requests then have to finish. Keep the sum with `drainDelay` below Kubernetes'
    /// `terminationGracePeriodSeconds`.
    pub drain_timeout: Period,
    /// The log: its format alone, `text` or `json`, or a mapping.
    #[schemars(schema_with = "LogSettings::either_form")]
    pub log: LogSettings,
    /// Requests remembered for the admin API.
    pub history: History,
    /// Resource limits for clients.
    pub limits: Limits,
    /// Routes, in any order: the most specific match wins.
    pub routes: Vec<Route>,
}

/// Requests that were held, failed or were rejected, remembered for `GET /api/v1/requests`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct History {
    /// Number of held requests remembered and, separately, of those that failed or were rejected immediately; up to 2
    /// KiB each. 0 disables both.
    pub requests: usize,
}

/// Resource limits for clients; every queue, buffer and wait is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Maximum size of one request body; larger ones get 413.
    pub max_body_bytes: ByteCount,
    /// Maximum size of all request bodies in memory, held or in flight; incomplete ones may take three quarters of it.
    /// If unset: a quarter of the memory limit (of the cgroup, otherwise of the machine), at least one body and at most
    /// the default.
    pub max_buffered_bytes: ByteCount,
    /// Maximum number of client connections. A further one replaces the longest idle connection or, while all are busy,
    /// waits in the kernel's accept queue. If unset: as many as fit into a quarter of the memory limit at 40 KiB each,
    /// at most the default. A lower limit of open files reduces it, which is logged.
    #[schemars(range(min = 1))]
    pub max_connections: usize,
    /// Maximum number of connections from one source, an IPv4 address or an IPv6 /64. A further one replaces the
    /// source's longest idle connection or, while all are busy, is closed immediately. Leave it unset behind a load
    /// balancer, which is one source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections_per_source: Option<NonZeroUsize>,
    /// Maximum number of concurrent requests on an HTTP/2 connection; further ones are reset.
    #[schemars(range(min = 1))]
    pub max_concurrent_streams: u32,
    /// Maximum number of reset requests on an HTTP/2 connection before it is closed. Counted are resets for protocol
    /// errors, and resets by the client within a second of the request while they are more than half of its requests.
    #[schemars(range(min = 1))]
    pub max_rapid_resets: u32,
    /// Maximum rate per second of HTTP/2 frames that neither begin nor continue a request (PING, SETTINGS, PRIORITY,
    /// WINDOW_UPDATE and others), on average; beyond it the connection is closed. Bursts of the same number are
    /// allowed, plus one frame for each KiB sent to the client.
    #[schemars(range(min = 1))]
    pub max_control_frames: u32,
    /// Maximum number of header fields of a request; more get 431.
    #[schemars(range(min = 1))]
    pub max_headers: usize,
    /// Maximum size of a request head, at least 8KiB; larger ones get 431.
    pub max_header_bytes: ByteCount,
    /// Time to receive a request head.
    pub header_timeout: Period,
    /// Maximum pause between two parts of a request body. `minRate` covers many short pauses.
    pub body_timeout: Period,
    /// Minimum rate per second at which a client must send a request body, averaged over `bodyTimeout`, and read a
    /// response, averaged over `stallTimeout`. 0 disables it.
    pub min_rate: ByteCount,
    /// Time that a keep-alive connection may be idle. Keep it above the idle timeout of a proxy in front, or the proxy
    /// sends requests into closing connections. HTTP/1.1 responses announce it (`Keep-Alive`); HTTP/2 connections get
    /// GOAWAY 5s before they close.
    pub idle_timeout: Period,
    /// Time that a client may read nothing while data is pending.
    pub stall_timeout: Period,
}

// === impl Config ===

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
            log: LogSettings::default(),
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
