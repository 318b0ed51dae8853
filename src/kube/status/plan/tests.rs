use std::sync::Arc;

use super::*;
use crate::{domain::ObstacleKind, kube::report::EndpointCounts};

/// One replica, and the object whose status it writes.
struct PlanReplica {
    status_history: StatusHistory,
    object: RouteObject,
    verdict: Verdict,
    report: RouteReport,
}

impl PlanReplica {
    fn new(state: RouteState) -> Self {
        Self {
            status_history: StatusHistory::default(),
            object: RouteObject {
                kind: RouteKind::ModelRoute,
                namespace: "models".into(),
                name: "tiny".into(),
            },
            verdict: Verdict::Accepted {
                target: "service vllm:1".into(),
                remarks: Vec::new(),
                partly: false,
            },
            report: RouteReport { state, ..RouteReport::default() },
        }
    }

    fn plan(&mut self, there: &ModelRouteStatus) -> Plan {
        let observed = Observed { generation: Some(1), status: Some(there.clone()) };
        self.status_history.plan(&self.object, &self.verdict, &self.report, &observed, Instant::now())
    }

    /// Writes the status if a write is due. Returns zero after a write, else the time until the next check.
    fn write_if_due(&mut self, there: &mut ModelRouteStatus) -> Option<Duration> {
        match self.plan(there) {
            Plan::Nothing => None,
            Plan::Later(when) => Some(when - Instant::now()),
            Plan::Write(status) => {
                self.status_history.written((*status).clone(), Instant::now());
                *there = *status;
                Some(Duration::ZERO)
            }
        }
    }
}

async fn advance_secs(seconds: f64) {
    tokio::time::advance(Duration::from_secs_f64(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn changes_are_written_at_once_then_rate_limited() {
    let (mut there, mut replica) = (ModelRouteStatus::default(), PlanReplica::new(RouteState::Idle));
    assert_eq!(replica.write_if_due(&mut there), Some(Duration::ZERO));
    assert_eq!(replica.write_if_due(&mut there), None, "it stands there");
    assert_eq!((there.state, there.conditions.len()), (Some(RouteState::Idle), 3));

    // 0.4 s after the last write: the second is over in 0.6 s.
    advance_secs(0.4).await;
    replica.report.state = RouteState::Starting;
    assert_eq!(replica.write_if_due(&mut there), Some(Duration::from_millis(600)));
    advance_secs(0.6).await;
    assert_eq!(replica.write_if_due(&mut there), Some(Duration::ZERO));

    // Numbers alone wait for the ten seconds.
    advance_secs(4.0).await;
    replica.report.held = 7;
    assert_eq!(replica.write_if_due(&mut there), Some(Duration::from_secs(6)));
    advance_secs(6.0).await;
    assert_eq!(replica.write_if_due(&mut there), Some(Duration::ZERO));
    assert_eq!(there.held, Some(7));
}

#[tokio::test(start_paused = true)]
async fn condition_keeps_its_transition_time() {
    let (mut there, mut replica) = (ModelRouteStatus::default(), PlanReplica::new(RouteState::Idle));
    replica.write_if_due(&mut there);
    for condition in &mut there.conditions {
        condition.last_transition_time = "2020-01-01T00:00:00Z".into();
    }
    advance_secs(1.0).await;
    replica.report.state = RouteState::Ready;
    (replica.report.ready, replica.report.endpoints) = (1, 2);
    replica.write_if_due(&mut there);
    let time = |kind: &str| {
        let condition = there.conditions.iter().find(|condition| condition.kind == kind).unwrap();
        (condition.status.clone(), condition.last_transition_time == "2020-01-01T00:00:00Z")
    };
    assert_eq!(time("Accepted"), ("True".into(), true));
    assert_eq!(time("Ready"), ("True".into(), false), "it was False before");
    assert_eq!(there.endpoints, Some(EndpointCounts { ready: 1, total: 2 }));
}

#[tokio::test(start_paused = true)]
async fn replicas_do_not_overwrite_each_other() {
    let mut there = ModelRouteStatus::default();
    let (mut holder, mut idle) = (PlanReplica::new(RouteState::Starting), PlanReplica::new(RouteState::Idle));
    holder.report.held = 3;
    holder.write_if_due(&mut there);
    assert_eq!(there.state, Some(RouteState::Starting));

    // A replica that knows less defers for two minutes after the last write of the other one.
    assert_eq!(idle.write_if_due(&mut there), None);
    advance_secs(119.0).await;
    assert_eq!(idle.write_if_due(&mut there), None);
    // Each write of the other replica restarts the two minutes.
    holder.report.held = 5;
    assert_eq!(holder.write_if_due(&mut there), Some(Duration::ZERO));
    assert_eq!(idle.write_if_due(&mut there), None);
    advance_secs(119.0).await;
    assert_eq!((idle.write_if_due(&mut there), holder.write_if_due(&mut there)), (None, None));

    // The start is over: the replica that reported it writes the new state, and the other replica agrees.
    (holder.report.state, holder.report.held) = (RouteState::Idle, 0);
    assert_eq!(holder.write_if_due(&mut there), Some(Duration::ZERO));
    assert_eq!((there.state, there.held), (Some(RouteState::Idle), Some(0)));
    assert_eq!(idle.write_if_due(&mut there), None);
}

#[tokio::test(start_paused = true)]
async fn status_of_dead_replica_is_corrected() {
    let mut there = ModelRouteStatus::default();
    PlanReplica::new(RouteState::Starting).write_if_due(&mut there);
    let mut idle = PlanReplica::new(RouteState::Idle);
    assert_eq!(idle.write_if_due(&mut there), None);
    advance_secs(120.0).await;
    assert_eq!(idle.write_if_due(&mut there), Some(Duration::ZERO), "its last own word was the other's");
    assert_eq!(there.state, Some(RouteState::Idle));
}

#[tokio::test(start_paused = true)]
async fn replica_that_knew_the_state_corrects_it() {
    let mut there = ModelRouteStatus::default();
    let (mut one, mut other) = (PlanReplica::new(RouteState::Ready), PlanReplica::new(RouteState::Ready));
    one.write_if_due(&mut there);
    assert_eq!(other.write_if_due(&mut there), None);
    // One replica has died; the other one observes that the target is scaled down.
    drop(one);
    advance_secs(5.0).await;
    other.report.state = RouteState::Idle;
    assert_eq!(other.write_if_due(&mut there), Some(Duration::ZERO));
    assert_eq!(there.state, Some(RouteState::Idle));
}

#[tokio::test(start_paused = true)]
async fn foreign_status_is_corrected_after_a_while() {
    let (mut there, mut replica) = (ModelRouteStatus::default(), PlanReplica::new(RouteState::Ready));
    replica.write_if_due(&mut there);
    there.conditions.clear();
    advance_secs(1.0).await;
    let wait = replica.write_if_due(&mut there).unwrap();
    assert!((30.0..45.0).contains(&wait.as_secs_f64()), "{wait:?}");
    advance_secs(wait.as_secs_f64()).await;
    assert_eq!(replica.write_if_due(&mut there), Some(Duration::ZERO));
    assert_eq!(there.conditions.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn later_cold_start_wins() {
    let cold_start =
        |started_at: &str| Some(LastColdStart { started_at: started_at.into(), ..LastColdStart::default() });
    let (mut there, mut replica) = (ModelRouteStatus::default(), PlanReplica::new(RouteState::Idle));
    replica.write_if_due(&mut there);
    there.last_cold_start = cold_start("2026-01-02T00:00:00.000Z");
    replica.report.last_cold_start = cold_start("2026-01-01T00:00:00.000Z");
    assert_eq!(replica.write_if_due(&mut there), None);
    advance_secs(1.0).await;
    replica.report.last_cold_start = cold_start("2026-01-03T00:00:00.000Z");
    assert_eq!(replica.write_if_due(&mut there), Some(Duration::ZERO));
    assert_eq!(there.last_cold_start, cold_start("2026-01-03T00:00:00.000Z"));
}

#[tokio::test(start_paused = true)]
async fn unwritable_object_backs_off() {
    let there = ModelRouteStatus::default();
    let mut replica = PlanReplica::new(RouteState::Idle);
    for seconds in [2, 4, 8, 16, 32, 64, 120, 120] {
        assert!(matches!(replica.plan(&there), Plan::Write(_)));
        replica.status_history.failed(Instant::now());
        let Plan::Later(when) = replica.plan(&there) else { panic!("no pause") };
        assert_eq!(when - Instant::now(), Duration::from_secs(seconds));
        advance_secs(seconds as f64).await;
    }
    // The current status of a malformed object is unknown, so a verdict is written once.
    let mut replica = PlanReplica::new(RouteState::Idle);
    replica.verdict = Verdict::Invalid("it cannot be read".into());
    let unread = Observed { generation: Some(1), status: None };
    let plan = |replica: &mut PlanReplica, unread: &Observed| {
        replica.status_history.plan(
            &replica.object,
            &replica.verdict,
            &replica.report,
            unread,
            Instant::now(),
        )
    };
    let Plan::Write(status) = plan(&mut replica, &unread) else { panic!("not said") };
    assert_eq!(status.state, Some(RouteState::Refused));
    replica.status_history.written(*status, Instant::now());
    advance_secs(3600.0).await;
    assert_eq!(plan(&mut replica, &unread), Plan::Nothing);
    let changed = Observed { generation: Some(2), status: None };
    assert!(matches!(plan(&mut replica, &changed), Plan::Write(_)));
}

#[tokio::test(start_paused = true)]
async fn conditions_report_the_obstacle() {
    let mut replica = PlanReplica::new(RouteState::Starting);
    replica.report.obstacle =
        Some((ObstacleKind::AutoscalingPaused, Arc::from("ScaledObject vllm is paused")));
    let mut there = ModelRouteStatus::default();
    replica.write_if_due(&mut there);
    let of = |there: &ModelRouteStatus, kind: &str| {
        let condition = there.conditions.iter().find(|condition| condition.kind == kind).unwrap().clone();
        assert_eq!(condition.observed_generation, Some(1));
        (condition.status, condition.reason, condition.message)
    };
    assert_eq!(of(&there, "Scalable").1, "AutoscalingPaused");
    assert!(of(&there, "Ready").2.contains("ScaledObject vllm is paused"));
    replica.report = RouteReport { scaled_object: Some("vllm".into()), ..RouteReport::default() };
    advance_secs(10.0).await;
    replica.write_if_due(&mut there);
    assert_eq!(of(&there, "Scalable").0, "True");
    // The status of an InterceptorRoute has a single condition.
    replica.object.kind = RouteKind::InterceptorRoute;
    replica.status_history = StatusHistory::default();
    let mut there = ModelRouteStatus::default();
    replica.write_if_due(&mut there);
    assert_eq!(there.conditions.len(), 1);
    assert_eq!(of(&there, "Ready").0, "True");
}
