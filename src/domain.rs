//! Routes, targets and their policies: plain types, no clocks and no I/O.
//!
//! The types that an operator writes down (in the file, later in a cluster object) carry their serde and schema
//! attributes here, so that one definition is what the file accepts, what the schema says and what the code reads.

mod claim;
mod intercept;
mod phase;
mod policy;
mod process;
mod reason;
mod roles;
mod scaling;
mod secrets;
mod units;
mod web_origin;

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

pub use claim::Claim;
pub use intercept::{
    Intercept, InterceptTimeouts, Overflow, ResponseMode, StaticAnswer, StaticAnswerError, StaticBody,
    StaticRoute,
};
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
pub use secrets::mask_secrets;
use serde::{Deserialize, Serialize};
pub use units::{ByteCount, Period, Ratio};
pub use web_origin::{WebOrigin, is_local_host};

/// Which requests belong to which target, and under which policies.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Route {
    /// The name of the route: in logs, metrics, errors and the admin API. Unique in the file.
    pub name: RouteKey,
    /// Which requests belong to the route. Without it, every API request does.
    #[serde(default, rename = "match")]
    pub matcher: Matcher,
    /// What scales from zero, and where to send requests.
    pub target: Target,
    /// How it is known that the target answers.
    #[serde(default)]
    pub readiness: Readiness,
    /// How many requests wait while nothing is ready, and for how long.
    #[serde(default)]
    pub hold: Hold,
    /// What a waiting client is sent.
    #[serde(default)]
    pub keepalive: Keepalive,
    /// How many requests one endpoint gets at a time.
    #[serde(default)]
    pub concurrency: Concurrency,
    /// How long an endpoint may take.
    #[serde(default)]
    pub upstream: UpstreamTimeouts,
    /// What of a gateway's answers says that it has not noticed its servers yet.
    #[serde(default)]
    pub gateway: Gateway,
    /// What a scaler is told of the demand.
    #[serde(default)]
    pub scaling: Scaling,
    /// Who changes the number of replicas.
    #[serde(default)]
    pub scale_by: ScaleBy,
    /// What is scaled. Needed with `scaleBy: kubernetes`; otherwise it is found through the ScaledObject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// What becomes of requests at zero while the ScaledObject is paused.
    #[serde(default)]
    pub when_paused: WhenPaused,
    /// How long something may stand in the way of a start before the requests that wait are told.
    #[serde(default)]
    pub failure_grace: FailureGrace,
    /// What clients read of a failure.
    #[serde(default)]
    pub failure: Failure,
    /// An `InterceptorRoute`: what it asks for. Only routes of the cluster have it.
    #[serde(skip)]
    pub intercept: Option<Arc<Intercept>>,
}

/// Identifies a route: a bare name for a route of the file, `namespace/name` for one of a cluster.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct RouteKey(#[schemars(with = "String")] Arc<str>);

/// Which requests belong to a route: every kind that is given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Matcher {
    /// Model names, LoRA adapters and aliases included. Empty: any model, and the body is not scanned.
    pub models: Vec<String>,
    /// Host names without a port; `*.example.com` matches every name below it. Empty: any host.
    pub hosts: Vec<String>,
    /// Path prefixes, whole segments: `/a` matches `/a/v1/models`, not `/ab`. Empty: any path.
    pub paths: Vec<String>,
    /// Header names with the exact value that they must have.
    pub headers: BTreeMap<String, String>,
    /// Header names that must be there, with any value. Only rules of an `InterceptorRoute` have them.
    #[serde(skip)]
    pub present: BTreeSet<String>,
}

/// What scales from zero.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Target {
    /// A model server on this machine, started on demand and stopped when idle; one a route.
    Process(ProcessTarget),
    /// A server or gateway that someone else scales: `http://host:port`.
    Url(String),
    /// Pods of a cluster, found through an object of its API. Only routes of the cluster have it.
    #[serde(skip)]
    Cluster(ClusterTarget),
}

/// Pods that somebody scales, and how requests get to them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClusterTarget {
    /// The namespace of the route, in which its target is.
    pub namespace: String,
    /// What says which pods there are.
    pub source: EndpointSource,
    /// `http://host:port` that requests go to, if not to the pods; then the pods only tell readiness.
    pub gateway: Option<String>,
    /// Which of its pods serve, and which must be ready for that.
    pub roles: Roles,
}

/// What says which pods a target has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EndpointSource {
    /// A Service, by its EndpointSlices.
    Service {
        /// Its name.
        name: String,
        /// Which of its ports.
        port: ServicePort,
    },
    /// An InferencePool of the Gateway API's inference extension, by its selector.
    InferencePool {
        /// Its name.
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
    /// The key as it is shown everywhere.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Namespace and name of a route of the cluster.
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
    /// The policies, as one value that a reload can swap.
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
            intercept.apply(&mut policy);
        }
        policy
    }

    /// Which requests belong to it: those that any of these matches.
    pub fn matchers(&self) -> &[Matcher] {
        match &self.intercept {
            None => std::slice::from_ref(&self.matcher),
            // Without rules, none: the Add-on routes nothing to such an object either.
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
