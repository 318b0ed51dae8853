//! State of a route at work, and of its requests in flight.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio_util::sync::CancellationToken;

use super::quiet::QuietRequests;
use crate::{
    coldstart::Tracker,
    demand::Demand,
    domain::{Policy, RouteKey},
    hold::HoldQueue,
    state::{Endpoint, Level, TargetState},
    telemetry::RouteCounters,
};

/// The live state of a route: queue, endpoints, demand and counters. It outlives reloads of the configuration; every
/// request of the route holds an `Arc`.
pub struct Gate {
    pub(super) key: RouteKey,
    pub(super) policy: ArcSwap<Policy>,
    pub(super) target: TargetState,
    pub(super) queue: Arc<HoldQueue<Permit>>,
    pub(super) demand: Demand,
    pub(super) cold_starts: Tracker,
    pub(super) counters: RouteCounters,
    pub(super) draining: AtomicBool,
    /// Cancelled when draining fails the held requests; none is held from then on.
    pub(super) evicted: CancellationToken,
    /// Endpoint for requests whose wait has failed.
    pub(super) fallback: ArcSwapOption<Endpoint>,
    pub(super) in_flight_on_fallback: AtomicU64,
    /// Requests in flight that are not demand.
    pub(super) quiet: QuietRequests,
    /// Jobs of `POST /v1/responses` that continue after their response.
    pub(super) background_jobs: AtomicU64,
}

/// Permission to have one request in flight on an endpoint. Held until the end of the response body; dropping it
/// releases the next held request.
pub struct Permit {
    pub(super) gate: Arc<Gate>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) kind: PermitKind,
    pub(super) level: Level,
}

/// Counters that a permit belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PermitKind {
    /// On the target; the request is demand.
    Demand,
    /// On the target; the request is not demand.
    Quiet,
    /// On the fallback; the request is demand.
    Fallback,
}
