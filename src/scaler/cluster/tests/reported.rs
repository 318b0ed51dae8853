//! The cluster's report of a pod against our own probes.

use super::*;
use crate::domain::Period;

#[tokio::test(start_paused = true)]
async fn report_of_ready_overrules_a_rejected_probe() {
    for answer in [
        ProbeResult::Status(StatusCode::NOT_FOUND),
        ProbeResult::Status(StatusCode::UNAUTHORIZED),
        ProbeResult::Status(StatusCode::FOUND),
        ProbeResult::TimedOut(Period::from_secs(1)),
    ] {
        let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
        stage.servers.answer(A, answer.clone());
        let permit = stage.enter().unwrap();
        permit.suspect();
        drop(permit);
        let permit = released(&mut stage.hold()).await;
        assert_eq!((stage.ms(), permit.endpoint().limit()), (50, 1), "after the backoff: {answer}");
        assert!(stage.ended().is_empty() && stage.gate.cold_starts().current().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn pod_recovers_although_its_path_is_wrong() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
    let permit = stage.enter().unwrap();
    permit.suspect();
    drop(permit);
    let mut held = stage.hold();
    stage.at(520).await;
    assert!(!stage.is_open(A), "requests would be refused as well");
    stage.servers.answer(A, ProbeResult::Status(StatusCode::NOT_FOUND));
    drop(released(&mut held).await);
    assert_eq!(stage.ms(), 550, "at the next probe");
}

#[tokio::test(start_paused = true)]
async fn report_outweighs_a_failure_after_30_s() {
    for answer in [
        ProbeResult::Status(StatusCode::SERVICE_UNAVAILABLE),
        ProbeResult::Refused,
        ProbeResult::Unheard(Period::from_millis(200)),
        ProbeResult::Broken("reset".into()),
    ] {
        let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
        stage.servers.answer(A, answer.clone());
        let permit = stage.enter().unwrap();
        permit.suspect();
        drop(permit);
        let mut held = stage.hold();
        stage.at(30_000).await;
        assert!(!stage.is_open(A), "the kubelet may not have noticed yet: {answer}");
        drop(released(&mut held).await);
        assert_eq!(stage.ms(), 30_050, "the backoff and 30 s: {answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn pod_reported_unready_needs_our_probe() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, NotReady)]).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let permit = released(&mut stage.hold()).await;
    stage.servers.answer(A, ProbeResult::Status(StatusCode::NOT_FOUND));
    permit.suspect();
    drop(permit);
    let _held = stage.hold();
    stage.at(120_000).await;
    assert!(!stage.is_open(A), "neither the report nor our probe opens it");
}
