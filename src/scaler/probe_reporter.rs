//! Reports probes that fail while the target starts, so that a wrong path or port shows within seconds instead of at the
//! activation timeout.

use std::{mem::discriminant, sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    admission::Gate,
    domain::ObstacleKind,
    probe::ProbeResult,
    state::{Obstacle, TargetState},
};

/// Time after which a rejected probe or an unresolved name is reported: a server may register its paths one by one, and a
/// Service may be new.
const REJECTED_GRACE: Duration = Duration::from_secs(2);

/// Time after which a server that does not answer, or is not ready, is reported. It mostly loads.
const UNANSWERED_GRACE: Duration = Duration::from_secs(10);

/// Follows the probes of one address. Dropping it withdraws the reported obstacle.
pub(super) struct ProbeReporter {
    gate: Arc<Gate>,
    /// The last answer, and the time of the first one like it.
    last: Option<(ProbeResult, Instant)>,
    reported: Option<Arc<Obstacle>>,
}

// === impl ProbeReporter ===

impl ProbeReporter {
    pub(super) const fn new(gate: Arc<Gate>) -> Self {
        Self { gate, last: None, reported: None }
    }

    /// Records an answer. Reports a failure that has lasted its grace while the target is down.
    pub(super) fn record(&mut self, address: &str, answer: &ProbeResult) {
        let since = match &self.last {
            Some((last, since)) if is_same_kind(last, answer) => *since,
            _ => {
                self.withdraw();
                self.last.insert((answer.clone(), Instant::now())).1
            }
        };
        let path = &self.gate.policy().readiness.path;
        let (kind, grace) = match answer {
            ProbeResult::Ready => return,
            ProbeResult::Unresolved(..) => (ObstacleKind::NameUnresolved, REJECTED_GRACE),
            answer if answer.is_rejection() => (ObstacleKind::ProbeRejected, REJECTED_GRACE),
            _ => (ObstacleKind::NotAnswering, UNANSWERED_GRACE),
        };
        if self.reported.is_some() || since.elapsed() < grace || self.gate.target().is_up() {
            return;
        }
        let message = describe(path, address, answer);
        let route = self.gate.key();
        match kind {
            ObstacleKind::NotAnswering => {
                tracing::info!(%route, address, kind = kind.name(), reason = message, "the target does not answer yet");
            }
            ObstacleKind::NameUnresolved => {
                tracing::warn!(%route, address, kind = kind.name(), reason = message, "the target's name does not resolve");
            }
            _ => {
                tracing::warn!(%route, address, kind = kind.name(), reason = message, "the probe is rejected")
            }
        }
        let obstacle = Arc::new(Obstacle { since, ..Obstacle::new(kind, message) });
        self.target().set_probe_obstacle(Some(obstacle.clone()));
        self.reported = Some(obstacle);
    }

    /// Withdraws the reported obstacle: probing stopped, or the answer changed.
    pub(super) fn withdraw(&mut self) {
        self.last = None;
        if let Some(obstacle) = self.reported.take() {
            self.target().withdraw_probe_obstacle(&obstacle);
        }
    }

    fn target(&self) -> &TargetState {
        self.gate.target()
    }
}

impl Drop for ProbeReporter {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// Returns true if both answers have the same kind, and the same status.
fn is_same_kind(one: &ProbeResult, other: &ProbeResult) -> bool {
    match (one, other) {
        (ProbeResult::Status(one), ProbeResult::Status(other)) => one == other,
        _ => discriminant(one) == discriminant(other),
    }
}

/// Describes a failed probe for waiting clients.
fn describe(path: &str, address: &str, answer: &ProbeResult) -> String {
    match answer {
        ProbeResult::Ready => format!("{path} at {address} answers"),
        ProbeResult::Status(status) if answer.is_rejection() => {
            format!("{path} answers {}: {}", status.as_u16(), advice(answer))
        }
        ProbeResult::Status(status) => format!("{path} at {address} answers {}", status.as_u16()),
        ProbeResult::Unresolved(host, reason) => {
            format!(
                "The host name `{host}` does not resolve ({reason}); is it right, and is its Service there?"
            )
        }
        ProbeResult::Refused => format!("Nothing listens at {address} (connection refused)"),
        ProbeResult::Unheard(limit) => format!("No connection to {address} within {limit}"),
        ProbeResult::TimedOut(limit) => format!("{path} at {address} gives no answer within {limit}"),
        ProbeResult::Broken(reason) => format!("The probe of {path} at {address} failed: {reason}"),
    }
}

/// Returns the advice for a rejected probe.
pub(super) fn advice(answer: &ProbeResult) -> &'static str {
    match answer {
        ProbeResult::Status(status) if matches!(status.as_u16(), 401 | 403) => {
            "probes have no credentials; is `readiness.path` right?"
        }
        _ => "is `readiness.path` right?",
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use tokio::time::advance;

    use super::*;
    use crate::{coldstart::ColdStarts, domain::Policy};

    const ADDRESS: &str = "127.0.0.1:8000";

    fn reporter_with_gate() -> (Arc<Gate>, ProbeReporter) {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        (gate.clone(), ProbeReporter::new(gate))
    }

    fn reported(gate: &Gate) -> Option<(ObstacleKind, String)> {
        gate.target().obstacle().map(|obstacle| (obstacle.kind, obstacle.message.to_string()))
    }

    #[tokio::test(start_paused = true)]
    async fn rejected_probe_is_reported_after_2_s() {
        for (status, expected) in [
            (404, "/health answers 404: is `readiness.path` right?"),
            (401, "/health answers 401: probes have no credentials; is `readiness.path` right?"),
            (302, "/health answers 302: is `readiness.path` right?"),
        ] {
            let (gate, mut reporter) = reporter_with_gate();
            let answer = ProbeResult::Status(StatusCode::from_u16(status).unwrap());
            reporter.record(ADDRESS, &answer);
            advance(Duration::from_millis(1_999)).await;
            reporter.record(ADDRESS, &answer);
            assert_eq!(reported(&gate), None);
            advance(Duration::from_millis(1)).await;
            reporter.record(ADDRESS, &answer);
            assert_eq!(reported(&gate), Some((ObstacleKind::ProbeRejected, expected.into())));
            drop(reporter);
            assert_eq!(reported(&gate), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn unresolved_name_is_reported_after_2_s() {
        let (gate, mut reporter) = reporter_with_gate();
        let answer = |reason: &str| ProbeResult::Unresolved("vllm.llm".into(), reason.into());
        reporter.record("vllm.llm:8000", &answer("Name or service not known"));
        assert_eq!(reported(&gate), None);
        advance(Duration::from_secs(2)).await;
        reporter.record("vllm.llm:8000", &answer("no answer within 1s"));
        let (kind, message) = reported(&gate).unwrap();
        assert_eq!(kind, ObstacleKind::NameUnresolved);
        assert!(
            message.starts_with("The host name `vllm.llm` does not resolve (no answer within 1s)"),
            "{message}"
        );
        reporter.record("vllm.llm:8000", &ProbeResult::Refused);
        assert_eq!(reported(&gate), None, "the server loads");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_reported_after_10_s() {
        let (gate, mut reporter) = reporter_with_gate();
        let answers = [
            (ProbeResult::Refused, "Nothing listens at 127.0.0.1:8000 (connection refused)"),
            (ProbeResult::Status(StatusCode::SERVICE_UNAVAILABLE), "/health at 127.0.0.1:8000 answers 503"),
            (ProbeResult::Broken("reset".into()), "The probe of /health at 127.0.0.1:8000 failed: reset"),
        ];
        for (answer, expected) in answers {
            reporter.record(ADDRESS, &answer);
            assert_eq!(reported(&gate), None, "another answer restarts the grace");
            advance(Duration::from_secs(10)).await;
            reporter.record(ADDRESS, &answer);
            assert_eq!(reported(&gate), Some((ObstacleKind::NotAnswering, expected.into())));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn cluster_explains_more_than_a_probe() {
        let (gate, mut reporter) = reporter_with_gate();
        reporter.record(ADDRESS, &ProbeResult::Refused);
        advance(Duration::from_secs(10)).await;
        reporter.record(ADDRESS, &ProbeResult::Refused);
        let kind = || reported(&gate).map(|(kind, _)| kind);
        assert_eq!(kind(), Some(ObstacleKind::NotAnswering));
        gate.target().set_obstacle(Some(Obstacle::new(ObstacleKind::CrashLoop, "exit code 1")));
        assert_eq!(kind(), Some(ObstacleKind::CrashLoop));
        gate.target().set_obstacle(None);
        assert_eq!(kind(), Some(ObstacleKind::NotAnswering));
        let endpoint = crate::state::Endpoint::new("127.0.0.1:1", 1);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        assert_eq!(kind(), None, "an endpoint is ready");
    }
}
