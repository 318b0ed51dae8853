use super::*;
use crate::domain::Intercept;

fn gate() -> Arc<Gate> {
    Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}))
}

#[tokio::test]
async fn dropped_permit_releases_the_next_request() {
    let gate = gate();
    let endpoint = Endpoint::new("127.0.0.1:1", 1);
    gate.target().add(&endpoint);
    let (mut first, mut second) = (gate.hold(1, true).unwrap(), gate.hold(1, true).unwrap());
    assert!(gate.demand().is_leased());
    gate.target().ready(&endpoint, Some(1));
    let ReleaseOutcome::Dispatch(permit) = first.released().await else { panic!("not released") };
    assert_eq!((gate.held(), gate.in_flight()), (1, 1));
    assert!(gate.enter().is_none(), "held requests go first");
    drop(permit);
    let ReleaseOutcome::Dispatch(permit) = second.released().await else { panic!("not released") };
    drop(permit);
    assert_eq!((gate.held(), gate.in_flight()), (0, 0));
    assert!(gate.enter().is_some());
}

#[tokio::test]
async fn evicted_queue_fails_readmitted_requests() {
    let gate = gate();
    let mut held = gate.hold(1, true).unwrap();
    gate.drain();
    assert!(matches!(gate.hold(1, true), Err(ProxyError::Draining { admitted: false })));
    assert_eq!(gate.evict(), 1);
    assert!(matches!(held.released().await, ReleaseOutcome::Draining));
    assert!(matches!(gate.readmit(held.place(), 1).released().await, ReleaseOutcome::Draining));
    assert_eq!(gate.held(), 0);
}

#[tokio::test]
async fn request_that_may_not_wait_wakes_the_target() {
    let gate = gate();
    assert!(matches!(gate.hold(1, false), Err(ProxyError::NoWait { .. })));
    assert!(gate.demand().is_leased());
    assert_eq!((gate.held(), gate.counters().admitted()), (0, 0));
}

#[tokio::test]
async fn quiet_request_is_in_flight_but_not_demand() {
    let gate = gate();
    assert!(gate.enter_quietly().is_none(), "nothing is up");
    let endpoint = Endpoint::new("127.0.0.1:1", 1);
    gate.target().add(&endpoint);
    gate.target().ready(&endpoint, None);
    let permit = gate.enter_quietly().unwrap();
    permit.first_byte();
    assert_eq!((gate.in_flight(), gate.demand_in_flight(), gate.requests()), (1, 0, 0));
    assert!(gate.enter_quietly().is_none(), "the limit applies");
    drop(permit);
    assert_eq!((gate.in_flight(), gate.demand_in_flight()), (0, 0));
    assert!(gate.demand().since_last_activity().is_none() && gate.demand().activation_since().is_none());
    assert_eq!((gate.counters().admitted(), gate.counters().wanted()), (1, 0));
    assert!(!gate.counts().is_active());
}

#[tokio::test]
async fn request_on_the_fallback_is_demand() {
    let gate = gate();
    assert!(gate.fall_back().is_none());
    let policy = |fallback: &str| {
        let intercept = Intercept { fallback: Some(fallback.into()), ..Intercept::default() };
        Policy { intercept: Some(Arc::new(intercept)), ..Policy::default() }
    };
    gate.set_policy(policy("elsewhere:80"));
    let permit = gate.fall_back().unwrap();
    assert_eq!((gate.in_flight(), gate.requests()), (1, 1));
    permit.suspect();
    let id = permit.endpoint().id();
    gate.set_policy(policy("elsewhere:80"));
    assert_eq!(gate.fall_back().unwrap().endpoint().id(), id, "keeps its connections");
    gate.set_policy(policy("otherwhere:80"));
    assert_eq!(gate.fall_back().unwrap().endpoint().address(), "otherwhere:80");
    assert_eq!(gate.in_flight(), 1, "on the previous one");
    drop(permit);
    assert_eq!(gate.in_flight(), 0);
}

fn paused() -> Option<Obstacle> {
    Some(Obstacle::new(ObstacleKind::AutoscalingPaused, "ScaledObject `a/b` is paused"))
}

#[tokio::test]
async fn pause_at_zero_rejects_and_wakes_nothing() {
    let gate = gate();
    gate.target().set_obstacle(paused());
    for wait in [true, false] {
        let Err(ProxyError::AutoscalingPaused { reason, .. }) = gate.hold(1, wait) else {
            panic!("admitted")
        };
        assert_eq!(&*reason, "ScaledObject `a/b` is paused");
    }
    gate.wake();
    assert!(gate.enter().is_none());
    assert_eq!(
        (gate.demand().activation_since(), gate.demand().since_last_activity()),
        (None, None),
        "not even the linger"
    );
    let endpoint = Endpoint::new("127.0.0.1:1", 1);
    gate.target().add(&endpoint);
    gate.target().ready(&endpoint, None);
    let (permit, _) = gate.enter().expect("a ready endpoint serves");
    let held = gate.hold(1, true).expect("and requests may wait for it");
    drop((permit, held));
    endpoint.retire();
    gate.target().set_obstacle(None);
    assert!(gate.hold(1, true).is_ok(), "resumed");
}

#[tokio::test]
async fn pause_fails_held_requests_at_once() {
    let gate = gate();
    let mut held = gate.hold(1, true).unwrap();
    gate.cold_starts().begin(tokio::time::Instant::now(), 1);
    gate.target().set_obstacle(paused());
    let ReleaseOutcome::Failed(reason, retry_after) = held.released().await else { panic!("not failed") };
    assert_eq!((&*reason, retry_after), ("ScaledObject `a/b` is paused", Some(MAX_RETRY_AFTER)));
    assert!(!gate.demand().is_leased());
    assert!(gate.cold_starts().phase().is_none(), "the cold start is over");
    // A full endpoint is retired during the pause.
    let endpoint = Endpoint::new("127.0.0.1:1", 0);
    gate.target().add(&endpoint);
    gate.target().ready(&endpoint, None);
    let mut held = gate.hold(1, true).unwrap();
    gate.fail_held_if_paused();
    assert_eq!(gate.held(), 1, "it is up");
    endpoint.retire();
    gate.fail_held_if_paused();
    assert!(matches!(held.released().await, ReleaseOutcome::Failed(..)));
}

#[tokio::test]
async fn when_paused_hold_keeps_requests() {
    let gate = Gate::new(
        "tiny".into(),
        Policy { when_paused: WhenPaused::Hold, ..Policy::default() },
        ColdStarts::new(|_| {}),
    );
    gate.target().set_obstacle(paused());
    let mut held = gate.hold(1, true).unwrap();
    assert!(gate.demand().is_leased(), "KEDA learns of it at its next poll");
    gate.fail_held_if_paused();
    assert_eq!(gate.held(), 1);
    gate.set_policy(Policy::default());
    assert!(matches!(held.released().await, ReleaseOutcome::Failed(..)), "the policy rejects now");
}
