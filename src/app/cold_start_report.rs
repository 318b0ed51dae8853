//! Completed cold starts, formatted for the status of a route and for Events.

use crate::{
    coldstart::{ColdStart, ColdStartOutcome, PhaseSpan},
    kube::{LastColdStart, LastPhase},
};

/// Formats a cold start for the status of its route.
pub(super) fn status(cold_start: &ColdStart) -> LastColdStart {
    let phases = cold_start.phases.iter().map(|span| LastPhase {
        name: span.name.name().to_owned(),
        duration: duration(span.duration_ms),
        unfinished: span.unfinished,
    });
    LastColdStart {
        started_at: cold_start.started_at.clone(),
        duration: duration(cold_start.total_ms),
        outcome: cold_start.outcome.map_or("", ColdStartOutcome::name).to_owned(),
        actuation: cold_start.t_actuation_ms.map(duration),
        phases: phases.collect(),
        pod: cold_start.pod.as_deref().map(str::to_owned),
        node: cold_start.node.as_deref().map(str::to_owned),
        reason: cold_start.reason.as_deref().map(str::to_owned),
    }
}

/// Formats a cold start for an Event. The least important parts come last, since long notes are truncated.
pub(super) fn note(cold_start: &ColdStart) -> String {
    let took = duration(cold_start.total_ms);
    let held = cold_start.held_peak;
    let requests = if held == 1 { "1 request".to_owned() } else { format!("{held} requests") };
    let pod = match (&cold_start.pod, &cold_start.node) {
        (Some(pod), Some(node)) => format!("; pod {pod} on {node}"),
        (Some(pod), None) => format!("; pod {pod}"),
        (None, _) => String::new(),
    };
    let phases = cold_start.phases.iter().map(format_phase_span).collect::<Vec<_>>().join(", ");
    if cold_start.outcome == Some(ColdStartOutcome::Failed) {
        let reason = cold_start.reason.as_deref().unwrap_or("unknown reason");
        return format!("Failed after {took} with {requests} held: {reason} ({phases}{pod})");
    }
    format!("Answered {took} after the first request ({phases}); {requests} held{pod}")
}

/// Formats a phase: `load 3.0s (weights 1.8s)`.
fn format_phase_span(span: &PhaseSpan) -> String {
    let parts = span.parts.iter().map(|part| format!("{} {}", part.name.name(), duration(part.duration_ms)));
    let parts = parts.collect::<Vec<_>>().join(", ");
    let parts = if parts.is_empty() { parts } else { format!(" ({parts})") };
    let prefix = if span.unfinished { "unfinished: " } else { "" };
    format!("{prefix}{} {}{parts}", span.name.name(), duration(span.duration_ms))
}

/// Formats a duration as Go does, with one decimal at most.
fn duration(ms: f64) -> String {
    if ms < 999.5 { format!("{ms:.0}ms") } else { format!("{:.1}s", ms / 1e3) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(outcome: &str) -> ColdStart {
        let failed = outcome == "failed";
        serde_json::from_value(json!({
            "id": 7, "route": "team-a/chat", "outcome": outcome, "started_at": "2026-11-24T20:00:00.000Z",
            "total_ms": 3073.4, "t_actuation_ms": 3021.4, "held_peak": 8, "released": 8, "failed": 0, "left": 0,
            "phases": [
                { "name": "signal", "start_ms": 0.0, "duration_ms": 1.4 },
                { "name": "load", "start_ms": 1.4, "duration_ms": 3020.0, "unfinished": failed,
                  "parts": [{ "name": "weights", "start_ms": 100.0, "duration_ms": 999.6 }] },
            ],
            "reason": failed.then_some("No node takes it"), "pod": "team-a/chat-x2k9p", "node": "gpu-1",
        }))
        .unwrap()
    }

    #[test]
    fn event_has_phases_and_pod_details() {
        assert_eq!(
            note(&record("completed")),
            "Answered 3.1s after the first request (signal 1ms, load 3.0s (weights 1.0s)); 8 requests held; \
             pod team-a/chat-x2k9p on gpu-1"
        );
        assert_eq!(
            note(&record("failed")),
            "Failed after 3.1s with 8 requests held: No node takes it (signal 1ms, unfinished: load 3.0s (weights \
             1.0s); pod team-a/chat-x2k9p on gpu-1)"
        );
    }

    #[test]
    fn status_has_phases_in_order() {
        let written = serde_json::to_value(status(&record("failed"))).unwrap();
        assert_eq!(
            written,
            json!({
                "startedAt": "2026-11-24T20:00:00.000Z", "duration": "3.1s", "outcome": "failed", "actuation": "3.0s",
                "phases": [
                    { "name": "signal", "duration": "1ms" },
                    { "name": "load", "duration": "3.0s", "unfinished": true },
                ],
                "pod": "team-a/chat-x2k9p", "node": "gpu-1", "reason": "No node takes it",
            })
        );
    }
}
