//! The cold start as a record: one activation, where its time went, and whom it served.

mod store;
mod tracker;

use std::{sync::Arc, time::Duration};

use serde::Serialize;

use crate::domain::RouteKey;
pub use store::ColdStarts;
pub use tracker::{Leave, Tracker};

/// A part of a cold start. The parts follow each other without gap or overlap, so they sum to the total.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// From the first request until whoever starts the target knows.
    Signal,
    /// Until the process runs; of a pod: until it is on a node and has an address.
    Launch,
    /// Until it answers its readiness probe.
    Load,
    /// Until the first held request is sent.
    Dispatch,
    /// Until its answer begins.
    FirstByte,
}

/// How an activation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ColdStartOutcome {
    /// A request was answered.
    Completed,
    /// The target became ready, but by then everybody had gone.
    Abandoned,
    /// The target could not be started.
    Failed,
}

/// One activation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ColdStart {
    /// Rises with every cold start of this process.
    pub id: u64,
    /// The route that was woken.
    pub route: RouteKey,
    /// How it ended; absent while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<ColdStartOutcome>,
    /// Wall-clock time of the first request, RFC 3339.
    pub started_at: String,
    /// From the first request to the last phase's end, or until now.
    pub total_ms: f64,
    /// What is over, in order.
    pub phases: Vec<PhaseSpan>,
    /// How many requests were held at once at the most.
    pub held_peak: usize,
    /// How many of the held requests were dispatched.
    pub released: u64,
    /// How many of them failed: with the activation, or at their deadline.
    pub failed: u64,
    /// How many of them the client gave up.
    pub left: u64,
    /// Why it failed, or what stood in its way last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Arc<str>>,
    /// The last lines that the target printed, where we keep its output and it failed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub last_lines: Vec<String>,
}

/// A phase on the time line of its cold start.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PhaseSpan {
    /// Which.
    pub name: Phase,
    /// When it began, from the first request.
    pub start_ms: f64,
    /// How long it took.
    pub duration_ms: f64,
}

/// How long cold starts of a route take, by the recent ones that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Half of them took no longer until ready.
    pub median: Duration,
    /// Nine of ten took no longer until ready.
    pub p90: Duration,
}

// === impl Phase ===

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 5] = [Self::Signal, Self::Launch, Self::Load, Self::Dispatch, Self::FirstByte];

    /// Its name in metrics, records and heartbeats.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Signal => "signal",
            Self::Launch => "launch",
            Self::Load => "load",
            Self::Dispatch => "dispatch",
            Self::FirstByte => "first_byte",
        }
    }
}

// === impl ColdStartOutcome ===

impl ColdStartOutcome {
    /// Its name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Abandoned => "abandoned",
            Self::Failed => "failed",
        }
    }
}

// === impl Estimate ===

impl Estimate {
    /// What is left after `elapsed`; `None` when this one takes longer than nine of ten did.
    pub fn left(&self, elapsed: Duration) -> Option<Duration> {
        [self.median, self.p90].into_iter().find(|usual| *usual > elapsed).map(|usual| usual - elapsed)
    }
}
