//! Policies of a route. The constants in `Default` are documented defaults; the comments beside them give their
//! sources.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ByteCount, Failure, FailureGrace, Intercept, Period, ScaleBy, Scaling, WhenPaused, Workload};

/// All policies of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Health check of the target.
    pub readiness: Readiness,
    /// Bounds on requests held while no endpoint is ready.
    pub hold: Hold,
    /// Bytes sent to waiting clients so that they and the proxies in between do not time out.
    pub keepalive: Keepalive,
    /// Limit of requests in flight per endpoint.
    pub concurrency: Concurrency,
    /// Timeouts and limits for an endpoint's response.
    pub upstream: UpstreamTimeouts,
    /// Responses of a gateway that mean "no endpoint yet".
    pub gateway: Gateway,
    /// Metrics reported to the scaler.
    pub scaling: Scaling,
    /// Controller that changes the number of replicas.
    pub scale_by: ScaleBy,
    /// Object to scale.
    pub workload: Option<Workload>,
    /// Handling of requests while the target is at zero and its ScaledObject is paused.
    pub when_paused: WhenPaused,
    /// Time that an obstacle to the start may last before held requests fail.
    pub failure_grace: FailureGrace,
    /// Detail of failure messages sent to clients.
    pub failure: Failure,
    /// Settings of an `InterceptorRoute`, already applied to the fields above.
    pub intercept: Option<Arc<Intercept>>,
}

/// Health check of the target: a GET that must return 2xx.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Readiness {
    /// Path to GET. vLLM's `/health` needs no API key, even with `--api-key`.
    pub path: String,
    /// Probe pods that Kubernetes does not report as ready yet. The kubelet probes every few seconds; this finds a pod
    /// ready within `interval`.
    pub probe: bool,
    /// Interval between probes while requests are held.
    pub interval: Period,
    /// Timeout of one probe.
    pub timeout: Period,
    /// Time the target may take to become ready, counted from the start of the process or, for a `url`, from the first
    /// request; after that the activation fails.
    pub activation_timeout: Period,
}

/// Bounds on requests held while no endpoint is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Hold {
    /// Maximum number of held requests.
    #[schemars(range(min = 1))]
    pub max_requests: usize,
    /// Maximum total size of held request bodies.
    pub max_bytes: ByteCount,
    /// Maximum time a request is held. A client can lower it with `x-anteroom-max-wait`.
    pub timeout: Period,
}

/// Bytes sent to waiting clients so that they and the proxies in between do not time out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Keepalive {
    /// Kind of keepalive.
    pub mode: KeepaliveMode,
    /// Time after which a held request gets an early 200. Later failures are reported inside the response body.
    pub after: Period,
    /// Interval of the following keepalives, until the first byte of the response body; also applies when the response
    /// head came earlier than `after`.
    pub interval: Period,
    /// Also send keepalives in pauses of a running stream that exceed `interval`.
    pub while_streaming: bool,
}

/// Kind of keepalive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum KeepaliveMode {
    /// Nothing is sent before the response.
    Off,
    /// SSE comments with the progress of the cold start, for streaming requests. Before the first event with content,
    /// an empty event is sent as well.
    #[default]
    Comment,
    /// Events without content, for streaming requests of clients that time out between events or cannot parse comments.
    /// Same as `comment` where the API has no such event (`/v1/responses`, audio).
    Chunk,
    /// Same as `comment`; other requests get white space before the JSON body.
    Whitespace,
}

/// Limit of requests in flight per endpoint, for each replica of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Concurrency {
    /// Maximum number of requests in flight on one endpoint.
    #[schemars(range(min = 1))]
    pub max: u32,
    /// Initial limit of a new endpoint, since the first requests after a start are slow. The limit doubles with each
    /// round of first bytes. While requests are held it also doubles every 150 ms without a failed request in which the
    /// endpoint answers a probe; without such an answer, every 5 s or the usual time to first byte. A limit at which
    /// requests failed is not tried again for 5 s.
    #[schemars(range(min = 1))]
    pub ramp_start: u32,
}

/// Timeouts and limits for an endpoint's response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct UpstreamTimeouts {
    /// Timeout for connecting.
    pub connect_timeout: Period,
    /// Time from dispatch to the head of the response.
    pub response_timeout: Period,
    /// Maximum pause between two parts of the response body.
    pub idle_timeout: Period,
    /// Maximum number of header fields of an HTTP/1.1 response; more are answered with 502. The default is several
    /// times what model servers and gateways send together.
    #[schemars(range(min = 1, max = 1000))]
    pub max_response_headers: usize,
}

impl UpstreamTimeouts {
    /// Upper bound of `maxResponseHeaders`.
    pub const MAX_RESPONSE_HEADERS: usize = 1000;
}

/// Responses of a gateway that mean "no endpoint yet". Applies to a `gateway` and to a `url`, which may be one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Gateway {
    /// Responses after which a request returns to the head of its queue and is retried.
    pub not_yet: NotYet,
}

/// Responses treated as "no endpoint yet", from the moment the target is ready until the gateway has passed on the
/// first response of a model. Errors in the format of a model server are always passed on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NotYet {
    /// Status codes, 400 to 599.
    #[schemars(inner(range(min = 400, max = 599)))]
    pub status: Vec<u16>,
    /// Time after the target became ready in which `status` applies. 0: pass on every error except those that report
    /// missing endpoints.
    #[serde(rename = "for")]
    pub within: Period,
}

// === impl Policy ===

impl Policy {
    /// Overrides the policies with those of an `InterceptorRoute`. `hold.timeout` is an upper bound for every request, so
    /// a smaller value is kept.
    pub(super) fn apply(&mut self, intercept: &Intercept) {
        self.hold.max_requests = intercept.max_pending.unwrap_or(Intercept::MAX_PENDING) as usize;
        if let Some(readiness) = intercept.readiness() {
            self.hold.timeout = readiness;
        }
        // Only responses of the OpenAI API can begin early.
        self.keepalive.mode = KeepaliveMode::Off;
        self.concurrency.max = Intercept::MAX_IN_FLIGHT;
        self.concurrency.ramp_start = Intercept::MAX_IN_FLIGHT;
        self.upstream.response_timeout = match intercept.timeouts.response_header {
            None => Period::from_secs(300),
            Some(Period::ZERO) => Intercept::NO_LIMIT,
            Some(limit) => limit,
        };
        self.upstream.idle_timeout = Intercept::NO_LIMIT;
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self {
            path: "/health".into(),
            probe: true,
            interval: Period::from_millis(50),
            timeout: Period::from_secs(1),
            // A 27B model took 966 s on a new node (kaito issue 2325).
            activation_timeout: Period::from_secs(30 * 60),
        }
    }
}

impl Default for Hold {
    fn default() -> Self {
        Self {
            max_requests: 256,
            max_bytes: ByteCount::mebibytes(64),
            // Large models need about ten minutes on a new node.
            timeout: Period::from_secs(15 * 60),
        }
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            mode: KeepaliveMode::Comment,
            // An early 200 fixes the status, so it is sent as late as the strictest common idle timeout (30 s)
            // allows.
            after: Period::from_secs(20),
            interval: Period::from_secs(10),
            while_streaming: false,
        }
    }
}

impl Default for Concurrency {
    fn default() -> Self {
        Self { max: 64, ramp_start: 4 }
    }
}

impl Default for NotYet {
    fn default() -> Self {
        Self {
            // Responses of sixteen gateways without endpoints (tests/gateways).
            status: vec![404, 429, 500, 502, 503, 504],
            // Discovery by polling or DNS takes 10 s or more; cloud load balancers check health every 10 to 30 s.
            within: Period::from_secs(30),
        }
    }
}

impl Default for UpstreamTimeouts {
    fn default() -> Self {
        Self {
            connect_timeout: Period::from_secs(2),
            // A response that is not streamed has no head before its last token.
            response_timeout: Period::from_secs(30 * 60),
            idle_timeout: Period::from_secs(10 * 60),
            max_response_headers: 100,
        }
    }
}
