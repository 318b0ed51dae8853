//! Routes, targets and their policies: plain data, without clocks or I/O.
//!
//! Types that appear in the configuration file or in a `ModelRoute` carry their serde and schema attributes here: one
//! definition drives parsing, the JSON Schema and the reference documentation, where the doc comments of their fields
//! are printed.

mod backoff;
mod claim;
mod intercept;
mod matcher;
mod phase;
mod policy;
mod process;
mod reason;
mod roles;
mod scaling;
mod secrets;
mod units;
mod web_origin;

use std::{borrow::Borrow, fmt, sync::Arc};

pub use backoff::Backoff;
pub use claim::Claim;
pub use intercept::{
    Intercept, InterceptTimeouts, Overflow, ResponseMode, StaticAnswer, StaticAnswerError, StaticBody,
    StaticRoute,
};
pub use matcher::Matcher;
pub use phase::{Part, Phase};
pub use policy::{
    Concurrency, Gateway, Hold, Keepalive, KeepaliveMode, NotYet, Policy, Readiness, UpstreamTimeouts,
};
pub use process::{ProcessTarget, WhenIdle};
pub use reason::{Failure, FailureDetail, Reason, withhold_addresses};
pub use roles::{Role, Roles};
pub use scaling::{
    Counting, FailureGrace, ObstacleKind, RequestRate, ScaleBy, Scaling, WhenPaused, Workload,
};
use schemars::JsonSchema;
pub use secrets::{mask_command, mask_secrets};
use serde::{Deserialize, Serialize};
pub use units::{ByteCount, Period, Ratio};
pub use web_origin::{WebOrigin, is_local_host};

/// A set of requests, the target that serves them, and the policies for both.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Route {
    /// Name of the route in logs, metrics, errors and the admin API; unique in the file.
    pub name: RouteKey,
    /// Requests that belong to the route. Default: all API requests.
    #[serde(default, rename = "match")]
    pub matcher: Matcher,
    /// Server that scales from zero and receives the requests.
    pub target: Target,
    /// Health check of the target.
    #[serde(default)]
    pub readiness: Readiness,
    /// Bounds on requests held while no endpoint is ready.
    #[serde(default)]
    pub hold: Hold,
    /// Bytes sent to waiting clients so that they and the proxies in between do not time out.
    #[serde(default)]
    pub keepalive: Keepalive,
    /// Limit of requests in flight per endpoint.
    #[serde(default)]
    pub concurrency: Concurrency,
    /// Timeouts and limits for an endpoint's response.
    #[serde(default)]
    pub upstream: UpstreamTimeouts,
    /// Responses of a gateway that mean "no endpoint yet".
    #[serde(default)]
    pub gateway: Gateway,
    /// Metrics reported to the scaler.
    #[serde(default)]
    pub scaling: Scaling,
    /// Controller that changes the number of replicas.
    #[serde(default)]
    pub scale_by: ScaleBy,
    /// Object to scale. Required with `scaleBy: kubernetes`; otherwise taken from the ScaledObject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// Handling of requests while the target is at zero and its ScaledObject is paused.
    #[serde(default)]
    pub when_paused: WhenPaused,
    /// Time that an obstacle to the start may last before held requests fail.
    #[serde(default)]
    pub failure_grace: FailureGrace,
    /// Detail of failure messages sent to clients.
    #[serde(default)]
    pub failure: Failure,
    /// Settings of an `InterceptorRoute`; `None` for every other route.
    #[serde(skip)]
    pub intercept: Option<Arc<Intercept>>,
}

/// Identifier of a route: a bare name for a route of the file, `namespace/name` for one of a cluster.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct RouteKey(#[schemars(with = "String")] Arc<str>);

/// Server that scales from zero.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Target {
    /// A model server on this machine, started on demand and stopped when idle; one per route.
    Process(ProcessTarget),
    /// A server or gateway scaled by something else: `http://host:port`.
    Url(String),
    /// Pods of a cluster, found through a Service or InferencePool; only for routes of the cluster.
    #[serde(skip)]
    Cluster(ClusterTarget),
}

/// Pods of a cluster and the way requests reach them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClusterTarget {
    /// Namespace of both the route and its target.
    pub namespace: String,
    /// Object that selects the pods.
    pub source: EndpointSource,
    /// `http://host:port` that receives the requests instead of the pods, which then only determine readiness.
    pub gateway: Option<String>,
    /// Pods that serve, and those that must be ready for it.
    pub roles: Roles,
}

/// Object that selects the pods of a target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EndpointSource {
    /// A Service, through its EndpointSlices.
    Service {
        /// Name of the Service.
        name: String,
        /// Port of the Service.
        port: ServicePort,
    },
    /// An InferencePool of the Gateway API's inference extension, through its selector.
    InferencePool {
        /// Name of the pool.
        name: String,
    },
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServicePort {
    /// By number.
    Number(u16),
    /// By name.
    Name(String),
}

// === impl RouteKey ===

impl RouteKey {
    /// Returns the key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Splits the key of a cluster route into namespace and name; `None` for a route of the file.
    pub fn namespaced(&self) -> Option<(&str, &str)> {
        self.0.split_once('/')
    }
}

impl From<&str> for RouteKey {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl Borrow<str> for RouteKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Route ===

impl Route {
    /// Returns all policies as one value that a reload can swap.
    pub fn policy(&self) -> Policy {
        let mut policy = Policy {
            readiness: self.readiness.clone(),
            hold: self.hold,
            keepalive: self.keepalive,
            concurrency: self.concurrency,
            upstream: self.upstream,
            gateway: self.gateway.clone(),
            scaling: self.scaling,
            scale_by: self.scale_by,
            workload: self.workload.clone(),
            when_paused: self.when_paused,
            failure_grace: self.failure_grace,
            failure: self.failure,
            intercept: self.intercept.clone(),
        };
        if let Some(intercept) = &self.intercept {
            policy.apply(intercept);
        }
        policy
    }

    /// Returns the matchers of the route; a request belongs to it if any of them matches.
    pub fn matchers(&self) -> &[Matcher] {
        match &self.intercept {
            None => std::slice::from_ref(&self.matcher),
            // Without rules the route matches nothing, as in the Add-on.
            Some(intercept) => &intercept.rules,
        }
    }
}

// === impl ClusterTarget ===

impl fmt::Display for ClusterTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            EndpointSource::Service { name, port } => write!(f, "service {name}:{port}")?,
            EndpointSource::InferencePool { name } => write!(f, "inferencePool {name}")?,
        }
        match &self.gateway {
            Some(gateway) => write!(f, " behind {gateway}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}
