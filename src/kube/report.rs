//! Status of route objects: the CRD types and the conditions.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

use crate::domain::ObstacleKind;

/// State of a route as known to this replica.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteReport {
    /// State of the target.
    pub state: RouteState,
    /// Reason of a failed start.
    pub failure: Option<Arc<str>>,
    /// Current obstacle to a start.
    pub obstacle: Option<(ObstacleKind, Arc<str>)>,
    /// Endpoints accepting requests.
    pub ready: u32,
    /// Endpoints in total.
    pub endpoints: u32,
    /// Held requests over all replicas, as far as known here.
    pub held: u64,
    /// ScaledObject that names the route, once known.
    pub scaled_object: Option<Arc<str>>,
    /// True if this proxy scales the target directly.
    pub scales_itself: bool,
    /// Latest finished cold start observed by this replica.
    pub last_cold_start: Option<LastColdStart>,
}

/// State of a target, in ascending order of liveliness. If two replicas disagree, the livelier state is correct.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[derive(IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RouteState {
    /// The route is not served; see its conditions.
    Refused,
    /// Scaled to zero.
    #[default]
    Idle,
    /// The start failed, or nothing can start the target.
    Failed,
    /// Scaling down.
    Stopping,
    /// Scaling up.
    Starting,
    /// At least one endpoint accepts requests.
    Ready,
}

/// The status of a `ModelRoute`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelRouteStatus {
    /// Generation of the object that this status refers to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Accepted`: whether the route is served. `Ready`: whether an endpoint accepts requests. `Scalable`: whether the
    /// target has a scaler.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// State of the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<RouteState>,
    /// Description of the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Endpoints of the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<EndpointCounts>,
    /// Held requests. Updated at most every ten seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<u32>,
    /// ScaledObject that names the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaled_object: Option<String>,
    /// Latest finished cold start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_cold_start: Option<LastColdStart>,
}

/// The status of an `InterceptorRoute`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InterceptorRouteStatus {
    /// `Ready`: whether the route is served, as shown in the column of that name.
    pub conditions: Vec<Condition>,
}

/// A standard Kubernetes condition.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Condition type.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    #[schemars(extend("enum" = ["True", "False", "Unknown"]))]
    pub status: String,
    /// Machine-readable reason in CamelCase.
    #[serde(default)]
    pub reason: String,
    /// Human-readable message, with a remedy where there is one.
    #[serde(default)]
    pub message: String,
    /// Time of the last change of `status`, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// Generation of the object that the condition refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Endpoint counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointCounts {
    /// Endpoints accepting requests.
    pub ready: u32,
    /// Endpoints in total.
    pub total: u32,
}

/// A finished cold start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LastColdStart {
    /// Arrival of its first request, RFC 3339.
    pub started_at: String,
    /// Time from the first request to the end of the last phase, or to the failure.
    pub duration: String,
    /// `completed`, `abandoned` or `failed`.
    pub outcome: String,
    /// Time until the target could accept requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actuation: Option<String>,
    /// Phases in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<LastPhase>,
    /// `namespace/name` of the pod that became ready first, or advanced furthest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Node of that pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Reason of the failure, or the last obstacle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A phase of a finished cold start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LastPhase {
    /// Name, such as `pull` or `load`.
    pub name: String,
    /// Duration of the phase.
    pub duration: String,
    /// True if the phase was unfinished when the cold start failed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unfinished: bool,
}

/// Decision whether an object is served, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The object is served.
    Accepted {
        /// Description of the target.
        target: String,
        /// Warnings, including matches lost to other routes.
        remarks: Vec<String>,
        /// True if some matches belong to other routes.
        partly: bool,
    },
    /// The object is not a valid route.
    Invalid(String),
    /// All matches belong to older routes.
    Conflict(String),
    /// A limit on routes is exceeded.
    Limit(String),
}

// === impl Verdict ===

impl Verdict {
    /// Returns whether the object is served.
    pub const fn is_accepted(&self) -> bool {
        matches!(self, Self::Accepted { .. })
    }

    /// Returns the reason for the condition.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Accepted { partly: false, .. } => "Accepted",
            Self::Accepted { partly: true, .. } => "PartlyConflicting",
            Self::Invalid(_) => "Invalid",
            Self::Conflict(_) => "Conflict",
            Self::Limit(_) => "Limit",
        }
    }

    /// Returns the message for the condition.
    pub fn message(&self) -> String {
        match self {
            Self::Accepted { remarks, .. } if remarks.is_empty() => "The route is served.".into(),
            Self::Accepted { remarks, .. } => format!("The route is served; {}", remarks.join("; ")),
            Self::Invalid(message) | Self::Conflict(message) | Self::Limit(message) => message.clone(),
        }
    }
}

// === impl RouteState ===

impl RouteState {
    /// Returns the serialized name.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

// === impl ModelRouteStatus ===

impl ModelRouteStatus {
    /// Builds the status of an object of this generation, without transition times.
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
            status.state = Some(RouteState::Refused);
        }
        for condition in &mut status.conditions {
            condition.observed_generation = generation;
        }
        status
    }
}

// === impl InterceptorRouteStatus ===

impl InterceptorRouteStatus {
    /// Builds the status of an object of this generation, without transition times.
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
            format!("{ready} of {endpoints} endpoints accept requests."),
        );
    }
    let reason_text = report.obstacle.as_ref().map(|(_, message)| message).or(report.failure.as_ref());
    let (reason, message) = match (reason_text, state) {
        (Some(reason_text), RouteState::Starting) => ("Starting", format!("Starting: {reason_text}")),
        (Some(reason_text), _) => ("Failed", reason_text.to_string()),
        (None, RouteState::Starting) => ("Starting", "Starting; requests are held.".into()),
        (None, RouteState::Stopping) => ("Stopping", "Scaling down.".into()),
        (None, RouteState::Failed) => ("Failed", "The start failed.".into()),
        (None, _) => ("Idle", "Scaled to zero. The next request starts the target.".into()),
    };
    Condition::new("Ready", false, reason, message)
}

fn scalable(report: &RouteReport) -> Condition {
    let blocked = report.obstacle.as_ref().and_then(|(kind, message)| {
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
    match (blocked, &report.scaled_object) {
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

    /// Returns whether two conditions are equal apart from the transition time.
    pub fn equals_ignoring_time(&self, other: &Self) -> bool {
        let Self { kind, status, reason, message, observed_generation, last_transition_time: _ } = self;
        *kind == other.kind
            && *status == other.status
            && *reason == other.reason
            && *message == other.message
            && *observed_generation == other.observed_generation
    }

    /// Sets the transition time of each condition: that of the equal condition in `before`, else `now`.
    pub fn set_transition_times(conditions: &mut [Self], before: &[Self], now: &str) {
        for condition in conditions {
            let same = before.iter().find(|old| old.kind == condition.kind && old.status == condition.status);
            condition.last_transition_time = match same {
                Some(old) if !old.last_transition_time.is_empty() => old.last_transition_time.clone(),
                _ => now.to_owned(),
            };
        }
    }
}
