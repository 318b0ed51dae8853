//! Routes in `GET /api/v1/routes`.

use std::{sync::Arc, time::SystemTime};

use serde::Serialize;

use crate::{
    admission::Gate,
    coldstart::{ColdStart, Estimates, Phase},
    demand::PushReceiver,
    domain::{ObstacleKind, RouteKey},
    state::{Obstacle, Status},
};

/// Current state of a route.
#[derive(Clone, Debug, Serialize)]
pub struct RouteStatus {
    /// Name of the route.
    pub name: RouteKey,
    /// `idle`, `starting`, `ready`, `sleeping`, `stopping` or `failed`.
    pub state: &'static str,
    /// Reason of the failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Obstacle to the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub obstacle: Option<ObstacleStatus>,
    /// Phase of the current cold start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Estimated remaining time, if there is enough history.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_left_ms: Option<f64>,
    /// Current cold start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<ColdStart>,
    /// Estimated duration of the next cold start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimates: Option<Arc<Estimates>>,
    /// Held requests.
    pub held: usize,
    /// Bytes of held bodies.
    pub held_bytes: usize,
    /// Wait of the oldest held request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_held_ms: Option<f64>,
    /// Requests in flight.
    pub in_flight: u64,
    /// Endpoints of the route.
    pub endpoints: Vec<EndpointStatus>,
    /// ScaledObjects that receive pushes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scaled_objects: Vec<PushReceiver>,
    /// Limits of the route.
    pub limits: LimitsStatus,
}

/// Obstacle to the start of a target.
#[derive(Clone, Debug, Serialize)]
pub struct ObstacleStatus {
    /// Kind of the obstacle.
    pub kind: ObstacleKind,
    /// A sentence that names the object and the remedy.
    pub message: Arc<str>,
    /// Wall-clock time of its first observation, RFC 3339.
    pub since: String,
}

/// Current state of an endpoint.
#[derive(Clone, Debug, Serialize)]
pub struct EndpointStatus {
    /// `host:port`.
    pub address: String,
    /// True if it accepts requests.
    pub ready: bool,
    /// Requests in flight.
    pub in_flight: u32,
    /// Current limit of requests in flight.
    pub limit: u32,
}

/// Limits of a route.
#[derive(Clone, Debug, Serialize)]
pub struct LimitsStatus {
    /// `hold.maxRequests`.
    pub hold_max_requests: usize,
    /// `hold.maxBytes`.
    pub hold_max_bytes: usize,
    /// `hold.timeout`.
    pub hold_timeout_ms: f64,
    /// `concurrency.max`.
    pub concurrency_max: u32,
}

impl RouteStatus {
    /// Returns the state of this gate's route.
    pub fn of(gate: &Gate) -> Self {
        let policy = gate.policy();
        let status = gate.target().status();
        let cold_start = gate.cold_starts().current();
        let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
        Self {
            name: gate.key().clone(),
            state: status.name(),
            reason: match status {
                Status::Failed(reason) => Some(reason.to_string()),
                _ => None,
            },
            obstacle: gate.target().obstacle().map(|obstacle| ObstacleStatus::of(&obstacle)),
            phase: gate.cold_starts().phase().map(|(phase, _)| phase),
            time_left_ms: cold_start.as_ref().and_then(|_| gate.cold_starts().time_left()).map(ms),
            cold_start,
            estimates: gate.cold_starts().estimates(),
            held: gate.held(),
            held_bytes: gate.held_bytes(),
            oldest_held_ms: gate.oldest_held().map(ms),
            in_flight: gate.in_flight(),
            endpoints: gate
                .target()
                .endpoints()
                .iter()
                .map(|endpoint| EndpointStatus {
                    address: endpoint.address().to_owned(),
                    ready: endpoint.is_ready(),
                    in_flight: endpoint.in_flight(),
                    limit: endpoint.limit(),
                })
                .collect(),
            scaled_objects: gate.demand().receivers(),
            limits: LimitsStatus {
                hold_max_requests: policy.hold.max_requests,
                hold_max_bytes: policy.hold.max_bytes.get(),
                hold_timeout_ms: ms(policy.hold.timeout.get()),
                concurrency_max: policy.concurrency.max,
            },
        }
    }
}

impl ObstacleStatus {
    fn of(obstacle: &Obstacle) -> Self {
        let since = SystemTime::now() - obstacle.since.elapsed();
        Self {
            kind: obstacle.kind,
            message: obstacle.message.full().clone(),
            since: humantime::format_rfc3339_seconds(since).to_string(),
        }
    }
}
