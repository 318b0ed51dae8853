//! What a route's status says, in the words of the cluster.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ObstacleKind;

/// How a route is, as the proxy that looks after its status knows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteReport {
    /// Where its target stands.
    pub state: State,
    /// Why the target could not be started, if it could not.
    pub failure: Option<Arc<str>>,
    /// What stands in the way of a start.
    pub obstacle: Option<(ObstacleKind, Arc<str>)>,
    /// Endpoints that take requests.
    pub ready: u32,
    /// All endpoints.
    pub endpoints: u32,
    /// Requests that wait, over all replicas of the proxy as far as this one knows.
    pub held: u64,
    /// The ScaledObject that names the route, once it is known.
    pub scaled_object: Option<Arc<str>>,
    /// Whether this proxy scales the target itself.
    pub scales_itself: bool,
    /// The cold start that ended last, of those that this replica has seen.
    pub last_cold_start: Option<LastColdStart>,
}

/// Where a target stands. The later, the more its route is alive: of two replicas the one that knows of more life is right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// The route is not served; its conditions say why.
    Refused,
    /// Nothing runs, nothing is asked for.
    #[default]
    Idle,
    /// It could not be started, or nothing can start it.
    Failed,
    /// On its way down.
    Stopping,
    /// On its way up.
    Starting,
    /// At least one endpoint takes requests.
    Ready,
}

/// The status of a `ModelRoute`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelRouteStatus {
    /// The generation of the object that the rest is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Accepted`: whether the route is served. `Ready`: whether an endpoint takes requests. `Scalable`: whether
    /// something scales its target.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Where the target stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// What is scaled, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The endpoints of the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<EndpointCounts>,
    /// Requests that wait for an endpoint. Written every ten seconds at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<u32>,
    /// The ScaledObject that names the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaled_object: Option<String>,
    /// The cold start that ended last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_cold_start: Option<LastColdStart>,
}

/// The status of an `InterceptorRoute`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InterceptorRouteStatus {
    /// `Ready`: whether the route is served. That is what its column shows.
    pub conditions: Vec<Condition>,
}

/// One statement about an object, in the form that every Kubernetes tool knows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    #[schemars(extend("enum" = ["True", "False", "Unknown"]))]
    pub status: String,
    /// Why, in one word.
    #[serde(default)]
    pub reason: String,
    /// Why, in a sentence, with the way out.
    #[serde(default)]
    pub message: String,
    /// Since when the status has been so, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// The generation of the object that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// How many endpoints there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointCounts {
    /// Those that take requests.
    pub ready: u32,
    /// All.
    pub total: u32,
}

/// A cold start that has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LastColdStart {
    /// When its first request came, RFC 3339.
    pub started_at: String,
    /// How long it took, from the first request to the end of its last phase, or until it had failed.
    pub duration: String,
    /// `completed`, `abandoned` or `failed`.
    pub outcome: String,
    /// How long it took until the target might be sent to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actuation: Option<String>,
    /// Where the time went, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<LastPhase>,
    /// The pod that was ready first, or came furthest, with its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Its node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Why it failed, or what stood in its way last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A phase of a cold start that has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LastPhase {
    /// Such as `pull` or `load`.
    pub name: String,
    /// How long it took.
    pub duration: String,
    /// Whether it was not over when the cold start failed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unfinished: bool,
}

/// Whether an object is served, and why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Accepted {
        /// What is scaled, in words.
        target: String,
        /// What is odd about it, or which of its matches are another's. Empty if nothing.
        remarks: Vec<String>,
        /// Whether some of its matches are another's.
        partly: bool,
    },
    /// It is not what a route can be.
    Invalid(String),
    /// What it matches is an older route's already.
    Conflict(String),
    /// There are too many.
    Limit(String),
}

// === impl Verdict ===

impl Verdict {
    /// Whether the object is served.
    pub const fn is_accepted(&self) -> bool {
        matches!(self, Self::Accepted { .. })
    }

    /// Its reason in one word.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Accepted { partly: false, .. } => "Accepted",
            Self::Accepted { partly: true, .. } => "PartlyConflicting",
            Self::Invalid(_) => "Invalid",
            Self::Conflict(_) => "Conflict",
            Self::Limit(_) => "Limit",
        }
    }

    /// Its reason in a sentence.
    pub fn message(&self) -> String {
        match self {
            Self::Accepted { remarks, .. } if remarks.is_empty() => "The route is served.".into(),
            Self::Accepted { remarks, .. } => format!("The route is served; {}", remarks.join("; ")),
            Self::Invalid(message) | Self::Conflict(message) | Self::Limit(message) => message.clone(),
        }
    }
}

// === impl State ===

impl State {
    /// Its name, as it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Idle => "idle",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
            Self::Starting => "starting",
            Self::Ready => "ready",
        }
    }
}

// === impl ModelRouteStatus ===

impl ModelRouteStatus {
    /// What is to be said of an object of this generation, its times left open.
    pub fn of(verdict: &Verdict, report: &RouteReport, generation: Option<i64>) -> Self {
        let accepted = Condition::new("Accepted", verdict.is_accepted(), verdict.reason(), verdict.message());
        let mut status = Self { observed_generation: generation, ..Self::default() };
        if let Verdict::Accepted { target, .. } = verdict {
            status.conditions = vec![accepted, ready(report), scalable(report)];
            status.state = Some(report.state);
            status.target = Some(target.clone());
            status.endpoints = Some(EndpointCounts { ready: report.ready, total: report.endpoints });
            status.held = Some(u32::try_from(report.held).unwrap_or(u32::MAX));
            status.scaled_object = report.scaled_object.as_deref().map(str::to_owned);
            status.last_cold_start.clone_from(&report.last_cold_start);
        } else {
            status.conditions = vec![
                accepted,
                Condition::new("Ready", false, "NotAccepted", "The route is not served.".into()),
                Condition::unknown("Scalable", "NotAccepted", "The route is not served."),
            ];
            status.state = Some(State::Refused);
        }
        for condition in &mut status.conditions {
            condition.observed_generation = generation;
        }
        status
    }
}

// === impl InterceptorRouteStatus ===

impl InterceptorRouteStatus {
    /// What is to be said of an object of this generation, its times left open.
    pub fn of(verdict: &Verdict, generation: Option<i64>) -> Self {
        let mut ready = Condition::new("Ready", verdict.is_accepted(), verdict.reason(), verdict.message());
        ready.observed_generation = generation;
        Self { conditions: vec![ready] }
    }
}

fn ready(report: &RouteReport) -> Condition {
    let RouteReport { state, ready, endpoints, .. } = report;
    if *ready > 0 {
        return Condition::new(
            "Ready",
            true,
            "EndpointsReady",
            format!("{ready} of {endpoints} endpoints take requests."),
        );
    }
    let why = report.obstacle.as_ref().map(|(_, message)| message).or(report.failure.as_ref());
    let (reason, message) = match (why, state) {
        (Some(why), State::Starting) => ("Starting", format!("On its way up: {why}")),
        (Some(why), _) => ("Failed", why.to_string()),
        (None, State::Starting) => ("Starting", "On its way up; requests wait for it.".into()),
        (None, State::Stopping) => ("Stopping", "On its way down.".into()),
        (None, State::Failed) => ("Failed", "It could not be started.".into()),
        (None, _) => ("Idle", "Nothing runs. The next request wakes it.".into()),
    };
    Condition::new("Ready", false, reason, message)
}

fn scalable(report: &RouteReport) -> Condition {
    let stands = report.obstacle.as_ref().and_then(|(kind, message)| {
        let reason = match kind {
            ObstacleKind::AutoscalingPaused => "AutoscalingPaused",
            ObstacleKind::NoScaledObject => "NoScaledObject",
            ObstacleKind::NoKedaStream => "NoKedaStream",
            ObstacleKind::PushDropped => "PushDropped",
            ObstacleKind::ScaleRefused => "ScaleRefused",
            _ => return None,
        };
        Some((reason, message))
    });
    match (stands, &report.scaled_object) {
        (Some((reason, message)), _) => Condition::new("Scalable", false, reason, message.to_string()),
        (None, Some(name)) => {
            Condition::new("Scalable", true, "ScaledObject", format!("Scaled by the ScaledObject {name}."))
        }
        (None, None) if report.scales_itself => {
            Condition::new("Scalable", true, "Direct", "Scaled by this proxy, without KEDA.".into())
        }
        (None, None) => {
            Condition::unknown("Scalable", "NotKnown", "No ScaledObject is known to name the route yet.")
        }
    }
}

// === impl Condition ===

impl Condition {
    fn new(kind: &str, holds: bool, reason: &str, message: String) -> Self {
        Self {
            kind: kind.into(),
            status: if holds { "True" } else { "False" }.into(),
            reason: reason.into(),
            message,
            last_transition_time: String::new(),
            observed_generation: None,
        }
    }

    fn unknown(kind: &str, reason: &str, message: &str) -> Self {
        Self { status: "Unknown".into(), ..Self::new(kind, false, reason, message.into()) }
    }

    /// Whether the other one says the same, whenever.
    pub fn says_the_same(&self, other: &Self) -> bool {
        let Self { kind, status, reason, message, observed_generation, last_transition_time: _ } = self;
        *kind == other.kind
            && *status == other.status
            && *reason == other.reason
            && *message == other.message
            && *observed_generation == other.observed_generation
    }

    /// Gives each condition the time since when it has been so: from `before` if that says so too, else `now`.
    pub fn date(conditions: &mut [Self], before: &[Self], now: &str) {
        for condition in conditions {
            let same = before.iter().find(|old| old.kind == condition.kind && old.status == condition.status);
            condition.last_transition_time = match same {
                Some(old) if !old.last_transition_time.is_empty() => old.last_transition_time.clone(),
                _ => now.to_owned(),
            };
        }
    }
}
