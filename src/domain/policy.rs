//! How a route treats its requests. The defaults are what the documents state; their reasons stand beside them.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ByteCount, Failure, FailureGrace, Intercept, Period, ScaleBy, Scaling, WhenPaused, Workload};

/// All policies of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// How it is known that the target answers.
    pub readiness: Readiness,
    /// How many requests wait while nothing is ready, and for how long.
    pub hold: Hold,
    /// What a waiting client is sent.
    pub keepalive: Keepalive,
    /// How many requests one endpoint gets at a time.
    pub concurrency: Concurrency,
    /// How long an endpoint may take.
    pub upstream: UpstreamTimeouts,
    /// What of a gateway's answers says that it has not noticed its servers yet.
    pub gateway: Gateway,
    /// What a scaler is told of the demand.
    pub scaling: Scaling,
    /// Who changes the number of replicas.
    pub scale_by: ScaleBy,
    /// What is scaled.
    pub workload: Option<Workload>,
    /// What becomes of requests at zero while the ScaledObject is paused.
    pub when_paused: WhenPaused,
    /// How long something may stand in the way of a start before the requests that wait are told.
    pub failure_grace: FailureGrace,
    /// What clients read of a failure.
    pub failure: Failure,
    /// What an `InterceptorRoute` asks for; the policies above follow it already.
    pub intercept: Option<Arc<Intercept>>,
}

/// How it is known that the target answers: a GET that must say 2xx.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Readiness {
    /// The path to GET. vLLM's `/health` needs no API key, even with `--api-key`.
    pub path: String,
    /// Whether we ask pods that their kubelet has not found ready yet. Its probes come every few seconds; ours find a
    /// pod up within `interval`.
    pub probe: bool,
    /// How often it is asked while requests wait.
    pub interval: Period,
    /// How long one answer may take.
    pub timeout: Period,
    /// How long the target may take to get ready, from the start of the process or, for a url, from the first request
    /// on; then the activation has failed.
    pub activation_timeout: Period,
}

/// How many requests wait while nothing is ready, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Hold {
    /// How many requests may wait.
    #[schemars(range(min = 1))]
    pub max_requests: usize,
    /// How many bytes of request bodies may wait.
    pub max_bytes: ByteCount,
    /// How long a request waits at most. A client may ask for less, see `x-anteroom-max-wait`.
    pub timeout: Period,
}

/// What a waiting client is sent, so that neither it nor a box in between gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Keepalive {
    /// What is sent.
    pub mode: KeepaliveMode,
    /// How long a request has waited when it is answered 200 early; what fails later is an error inside the answer.
    pub after: Period,
    /// How often something is sent from then on, until the first byte of the answer's body; also where its head came at
    /// once.
    pub interval: Period,
    /// Whether something is also sent in pauses between the events of a stream that are longer than `interval`.
    pub while_streaming: bool,
}

/// What is sent to a client that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum KeepaliveMode {
    /// Nothing until the answer.
    Off,
    /// To streaming requests: lines that SSE parsers skip, saying how the cold start goes. An event with no content
    /// follows them, together with the first one that has some.
    #[default]
    Comment,
    /// To streaming requests: events with no content, for clients that count the time between events, or do not know
    /// comments. Where the API has none (`/v1/responses`, audio), as `comment`.
    Chunk,
    /// As `comment`; and to others white space before the JSON body.
    Whitespace,
}

/// How many requests one endpoint gets at a time, from this replica of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Concurrency {
    /// How many requests are in flight on one endpoint at most.
    #[schemars(range(min = 1))]
    pub max: u32,
    /// How many a new endpoint gets at first. The number doubles with every round of first bytes that come back and, while
    /// requests are held, with every 150 ms in which no request fails and the endpoint answers a probe (5 s, or the usual
    /// time to the first byte, if it does not): the first requests after a start are slow. A number at which requests
    /// fail is not tried again for 5 s.
    #[schemars(range(min = 1))]
    pub ramp_start: u32,
}

/// What an endpoint may take: time, and room for its answer's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct UpstreamTimeouts {
    /// How long connecting may take.
    pub connect_timeout: Period,
    /// How long the head of the answer may take, from the dispatch on.
    pub response_timeout: Period,
    /// How long the answer may pause between two parts of its body.
    pub idle_timeout: Period,
    /// How many header fields an answer may have, over HTTP/1.1; more, and it is 502. The default is several times what
    /// model servers and the gateways before them send together.
    #[schemars(range(min = 1, max = 1000))]
    pub max_response_headers: usize,
}

impl UpstreamTimeouts {
    /// The largest `maxResponseHeaders`.
    pub const MOST_RESPONSE_HEADERS: usize = 1000;
}

/// What of a gateway's answers says that it has not noticed its servers yet. For a `gateway`, and for a `url`, which may
/// be one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Gateway {
    /// Which answers are taken for "not yet": the request goes back to the head of its queue and is tried again.
    pub not_yet: NotYet,
}

/// Which answers are taken for "not yet": after the target is found ready, and before an answer of a model has come
/// through the gateway. An error in the shape of a model server is always passed on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NotYet {
    /// Status codes, 400 to 599.
    #[schemars(inner(range(min = 400, max = 599)))]
    pub status: Vec<u16>,
    /// How long after the target is found ready. Zero: never; all but what names the lack of an endpoint is passed on.
    #[serde(rename = "for")]
    pub within: Period,
}

impl Default for Readiness {
    fn default() -> Self {
        Self {
            path: "/health".into(),
            probe: true,
            interval: Period::from_millis(50),
            timeout: Period::from_secs(1),
            // Above the 966 s that a 27B model took on a new node (kaito issue 2325).
            activation_timeout: Period::from_secs(30 * 60),
        }
    }
}

impl Default for Hold {
    fn default() -> Self {
        Self {
            max_requests: 256,
            max_bytes: ByteCount::mebibytes(64),
            // Above the ten minutes that large models need on a new node.
            timeout: Period::from_secs(15 * 60),
        }
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            mode: KeepaliveMode::Comment,
            // An early 200 commits, so as late as the strictest usual idle limits (30 s) allow.
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
            // What sixteen gateways answer while they know of no server (tests/gateways).
            status: vec![404, 429, 500, 502, 503, 504],
            // Discovery by polling or DNS takes 10 s and more; cloud load balancers check health every 10 to 30 s.
            within: Period::from_secs(30),
        }
    }
}

impl Default for UpstreamTimeouts {
    fn default() -> Self {
        Self {
            connect_timeout: Period::from_secs(2),
            // A long answer that is not streamed has no head before its last token.
            response_timeout: Period::from_secs(30 * 60),
            idle_timeout: Period::from_secs(10 * 60),
            max_response_headers: 100,
        }
    }
}
