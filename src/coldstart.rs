//! The cold start as a record: one activation, where its time went, and whom it served.

mod estimate;
mod journal;
mod store;
mod timeline;
mod tracker;
mod vllm_log;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::domain::RouteKey;
pub use crate::domain::{Part, Phase};
pub use estimate::{Estimate, Estimates, PhaseEstimate};
pub use journal::{Journal, JournalError};
pub use store::ColdStarts;
pub use tracker::{FirstAnswer, Leave, Scope, Tracker};
pub use vllm_log::VllmLog;

/// What was done to bring the target up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ColdStartKind {
    /// It was started.
    #[default]
    ColdStart,
    /// It was asleep, in vLLM's sleep mode, and woken.
    Wake,
}

/// How an activation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
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
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct ColdStart {
    /// Rises with every cold start of this process, and of those before it whose records it has.
    pub id: u64,
    /// The route that was woken.
    pub route: RouteKey,
    /// What was done.
    #[serde(default)]
    pub kind: ColdStartKind,
    /// How it ended; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<ColdStartOutcome>,
    /// Wall-clock time of the first request, RFC 3339.
    pub started_at: String,
    /// From the first request to the last phase's end, or until now. The phases sum to it.
    pub total_ms: f64,
    /// What is over, in order, and at last what is not, if the cold start runs or has failed.
    pub phases: Vec<PhaseSpan>,
    /// From the first request until we might send to the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t_actuation_ms: Option<f64>,
    /// From then until the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t_first_token_ms: Option<f64>,
    /// Both together: from the first request until the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t_e2e_ms: Option<f64>,
    /// How many requests were held at once at the most.
    pub held_peak: usize,
    /// How many of the held requests were dispatched.
    pub released: u64,
    /// How many of them failed: with the activation, or at their deadline.
    pub failed: u64,
    /// How many of them the client gave up.
    pub left: u64,
    /// Why it failed, or what stood in its way last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Arc<str>>,
    /// The last lines that the target printed, where we keep its output and it failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub last_lines: Vec<String>,
    /// The pod that was ready first, `namespace/name`; of a cold start that failed: the one that came furthest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Arc<str>>,
    /// The node of that pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
    /// The request that was answered first, by its `x-request-id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<Arc<str>>,
    /// The trace of that request, 32 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<Arc<str>>,
    /// Whether that trace is exported, by us or by whoever began it. Not in what is written of a record.
    #[serde(skip)]
    pub is_traced: bool,
}

/// A phase on the time line of its cold start.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PhaseSpan {
    /// Which.
    pub name: Phase,
    /// When it began, from the first request.
    pub start_ms: f64,
    /// How long it took.
    pub duration_ms: f64,
    /// Its end was not seen on our own clock: it may have been up to so much earlier. Absent: it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_ms: Option<f64>,
    /// It was not over when the cold start failed, or is not yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unfinished: bool,
    /// What is known of its inside, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartSpan>,
}

/// A part of a phase on the time line of its cold start.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PartSpan {
    /// Which.
    pub name: Part,
    /// When it began, from the first request.
    pub start_ms: f64,
    /// How long it took.
    pub duration_ms: f64,
}

// === impl ColdStart ===

impl ColdStart {
    /// A phase, if it is over.
    pub fn phase(&self, name: Phase) -> Option<&PhaseSpan> {
        self.over().find(|span| span.name == name)
    }

    /// The phases that are over, in order.
    pub fn over(&self) -> impl Iterator<Item = &PhaseSpan> {
        self.phases.iter().filter(|span| !span.unfinished)
    }

    /// A record with these phases, one after the other, and their milliseconds.
    #[cfg(test)]
    pub(crate) fn of_phases(phases: &[(Phase, f64)]) -> Self {
        let mut start_ms = 0.0;
        let phases = phases.iter().map(|&(name, duration_ms)| {
            let span = PhaseSpan {
                name,
                start_ms,
                duration_ms,
                early_ms: None,
                unfinished: false,
                parts: Vec::new(),
            };
            start_ms += duration_ms;
            span
        });
        let phases = phases.collect();
        let mut record = Self { phases, total_ms: start_ms, ..Self::default() };
        record.set_totals();
        record
    }

    /// The totals that others use, from the phases.
    fn set_totals(&mut self) {
        let end = |phase| self.phase(phase).map(|span| span.start_ms + span.duration_ms);
        let ready = end(Phase::Propagate).or_else(|| end(Phase::Load));
        let token = end(Phase::FirstToken);
        self.t_actuation_ms = ready;
        self.t_e2e_ms = token;
        self.t_first_token_ms = token.zip(ready).map(|(token, ready)| token - ready);
    }
}

// === impl ColdStartKind ===

impl ColdStartKind {
    /// Its name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ColdStart => "cold_start",
            Self::Wake => "wake",
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
