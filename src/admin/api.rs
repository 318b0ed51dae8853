//! What `GET /api/v1/routes` says of a route.

use std::{sync::Arc, time::SystemTime};

use serde::Serialize;

use crate::{
    admission::Gate,
    coldstart::{ColdStart, Estimates, Phase},
    demand::PushReceiver,
    domain::{ObstacleKind, RouteKey},
    state::{Obstacle, Status},
};

/// A route as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct RouteStatus {
    /// Its name.
    pub name: RouteKey,
    /// `idle`, `starting`, `ready`, `sleeping`, `stopping` or `failed`.
    pub state: &'static str,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What stands in the way of a start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub obstacle: Option<ObstacleStatus>,
    /// The phase of the cold start that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// What is left of it, as far as history tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_left_ms: Option<f64>,
    /// The cold start that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<ColdStart>,
    /// How long the next one is likely to take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimates: Option<Arc<Estimates>>,
    /// Held requests.
    pub held: usize,
    /// Bytes of held bodies.
    pub held_bytes: usize,
    /// How long the oldest of them has waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_held_ms: Option<f64>,
    /// Requests in flight.
    pub in_flight: u64,
    /// Where requests go.
    pub endpoints: Vec<EndpointStatus>,
    /// The ScaledObjects that demand is pushed to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scaled_objects: Vec<PushReceiver>,
    /// What bounds it.
    pub limits: LimitsStatus,
}

/// What stands in the way of a target.
#[derive(Clone, Debug, Serialize)]
pub struct ObstacleStatus {
    /// What it is.
    pub kind: ObstacleKind,
    /// A sentence that names the object and the way out.
    pub message: Arc<str>,
    /// Wall-clock time since when it has been there, RFC 3339.
    pub since: String,
}

/// An endpoint as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct EndpointStatus {
    /// `host:port`.
    pub address: String,
    /// Whether it takes requests.
    pub ready: bool,
    /// Requests in flight on it.
    pub in_flight: u32,
    /// How many it may have now.
    pub limit: u32,
}

/// The limits of a route.
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
    /// The route of this gate.
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
