//! Cold starts: the record of an activation, with its phases and the requests that it served.

mod estimate;
mod journal;
mod store;
mod timeline;
mod tracker;
mod vllm_log;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

use crate::domain::RouteKey;
pub use crate::domain::{Part, Phase};
pub use estimate::{Estimate, Estimates, PhaseEstimate};
pub use journal::{Journal, JournalError};
pub use store::ColdStarts;
pub use tracker::{FirstAnswer, LeaveReason, TargetKind, Tracker};
pub use vllm_log::VllmLog;

/// The way in which the target was brought up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ColdStartKind {
    /// The target was started.
    #[default]
    ColdStart,
    /// The target was woken from vLLM's sleep mode.
    Wake,
}

/// Result of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ColdStartOutcome {
    /// A request was answered.
    Completed,
    /// The target became ready after every client had disconnected.
    Abandoned,
    /// The target could not be started.
    Failed,
}

/// One activation.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct ColdStart {
    /// Increases with every cold start, continuing after the restored records.
    pub id: u64,
    /// Route of the target.
    pub route: RouteKey,
    /// Started or woken.
    #[serde(default)]
    pub kind: ColdStartKind,
    /// Result; absent while the cold start runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<ColdStartOutcome>,
    /// Wall-clock time of the first request, RFC 3339.
    pub started_at: String,
    /// From the first request to the end of the last phase, or until now; the sum of the phases.
    pub total_ms: f64,
    /// The phases in order. The last one is unfinished if the cold start runs or has failed.
    pub phases: Vec<PhaseSpan>,
    /// From the first request until the target took requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t_actuation_ms: Option<f64>,
    /// From the time at which the target took requests to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t_first_token_ms: Option<f64>,
    /// From the first request to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t_e2e_ms: Option<f64>,
    /// Maximum number of requests held at the same time.
    pub held_peak: usize,
    /// Held requests that were dispatched.
    pub released: u64,
    /// Held requests that failed, with the activation or at their deadline.
    pub failed: u64,
    /// Held requests whose client disconnected.
    pub left: u64,
    /// Cause of the failure, or the last obstacle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Arc<str>>,
    /// Last lines of the target's output, if it failed and its output is read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub last_lines: Vec<String>,
    /// First ready pod, `namespace/name`; of a failed cold start, the pod that was furthest ahead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Arc<str>>,
    /// Node of that pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
    /// `x-request-id` of the request answered first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<Arc<str>>,
    /// Trace id of that request, 32 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<Arc<str>>,
    /// The trace is exported, by this proxy or by the caller that started it. Not serialised.
    #[serde(skip)]
    pub is_traced: bool,
}

/// A phase of a cold start.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PhaseSpan {
    /// The phase.
    pub name: Phase,
    /// Start, from the first request.
    pub start_ms: f64,
    /// Duration.
    pub duration_ms: f64,
    /// Maximum time by which the phase may have ended earlier: its end was not observed on this proxy's own clock.
    /// Absent if the end is exact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_ms: Option<f64>,
    /// The phase has not ended: the cold start failed in it, or still runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unfinished: bool,
    /// Known parts of the phase, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartSpan>,
}

/// A part of a phase.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PartSpan {
    /// The part.
    pub name: Part,
    /// Start, from the first request.
    pub start_ms: f64,
    /// Duration.
    pub duration_ms: f64,
}

// === impl ColdStart ===

impl ColdStart {
    /// Returns a phase that has ended.
    pub fn phase(&self, name: Phase) -> Option<&PhaseSpan> {
        self.finished_phases().find(|span| span.name == name)
    }

    /// Iterates over the phases that have ended, in order.
    pub fn finished_phases(&self) -> impl Iterator<Item = &PhaseSpan> {
        self.phases.iter().filter(|span| !span.unfinished)
    }

    /// Makes a record of these phases and their milliseconds.
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

    /// Computes the totals from the phases.
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
    /// Returns the name in metrics and logs.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

// === impl ColdStartOutcome ===

impl ColdStartOutcome {
    /// Returns the name in metrics and logs.
    pub fn name(self) -> &'static str {
        self.into()
    }
}
