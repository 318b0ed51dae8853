//! A cold start that has ended, as the cluster is told of it: in the status of its route, and in an Event.

use crate::{
    coldstart::{ColdStart, ColdStartOutcome, PhaseSpan},
    kube::{LastColdStart, LastPhase},
};

/// For the status of its route.
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

/// For an Event. What is cut off where it is too long is said last.
pub(super) fn note(cold_start: &ColdStart) -> String {
    let took = duration(cold_start.total_ms);
    let held = cold_start.held_peak;
    let requests = if held == 1 { "1 request".to_owned() } else { format!("{held} requests") };
    let whose = match (&cold_start.pod, &cold_start.node) {
        (Some(pod), Some(node)) => format!("; pod {pod} on {node}"),
        (Some(pod), None) => format!("; pod {pod}"),
        (None, _) => String::new(),
    };
    let phases = cold_start.phases.iter().map(in_words).collect::<Vec<_>>().join(", ");
    if cold_start.outcome == Some(ColdStartOutcome::Failed) {
        let why = cold_start.reason.as_deref().unwrap_or("the reason is not known");
        return format!("Failed after {took}, with {requests} waiting: {why} ({phases}{whose})");
    }
    format!("Answered {took} after the first request ({phases}); {requests} waited{whose}")
}

/// `load 3.0s (weights 1.8s)`
fn in_words(span: &PhaseSpan) -> String {
    let parts = span.parts.iter().map(|part| format!("{} {}", part.name.name(), duration(part.duration_ms)));
    let parts = parts.collect::<Vec<_>>().join(", ");
    let parts = if parts.is_empty() { parts } else { format!(" ({parts})") };
    let not = if span.unfinished { "not over: " } else { "" };
    format!("{not}{} {}{parts}", span.name.name(), duration(span.duration_ms))
}

/// As Go writes durations, and not more precise than it is of use.
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
            "Answered 3.1s after the first request (signal 1ms, load 3.0s (weights 1.0s)); 8 requests waited; \
             pod team-a/chat-x2k9p on gpu-1"
        );
        assert_eq!(
            note(&record("failed")),
            "Failed after 3.1s, with 8 requests waiting: No node takes it (signal 1ms, not over: load 3.0s (weights \
             1.0s); pod team-a/chat-x2k9p on gpu-1)"
        );
    }

    #[test]
    fn a_status_has_the_phases_in_order() {
        let told = serde_json::to_value(status(&record("failed"))).unwrap();
        assert_eq!(
            told,
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
