//! Targets that need pods of several roles, and pods that declare readiness gates.

use super::*;

const PREFILL: Role = Role { is_helper: true, groups: 0b10 };
const DECODE: Role = Role { is_helper: false, groups: 0b01 };
const GATEWAY_ADDRESS: &str = "10.9.9.9:80";

/// Pods of the decode role serve, and need one of the prefill role.
fn roles() -> Roles {
    let labels = |role: &str| [("role".to_owned(), role.to_owned())].into();
    let groups = ["decode", "prefill"].map(|role| (role.to_owned(), labels(role))).into();
    Roles { serve: labels("decode"), groups }
}

#[tokio::test(start_paused = true)]
async fn pod_of_one_role_waits_for_the_other() {
    let stage = KeeperTest::with_roles(Policy::default(), None, roles());
    stage.report_with_roles(&[(A, Ready, PREFILL), (B, NotReady, DECODE)]).await;
    let mut held = stage.hold();
    stage.at(100).await;
    assert!(stage.endpoint(A).is_none() && !stage.is_open(B), "prefill alone does not serve");
    stage.report_with_roles(&[(A, NotReady, PREFILL), (B, Ready, DECODE)]).await;
    stage.at(200).await;
    assert!(!stage.is_open(B), "nor does decode alone");
    // The pod is probed like others: at 100 and 150 ms, and at 200 ms after its port refused a connection.
    stage.servers.answer(A, ProbeResult::Ready);
    let permit = released(&mut held).await;
    assert_eq!((permit.endpoint().address(), stage.ms()), (B, 250), "at the next probe");
    assert_eq!(permit.endpoint().limit(), 4, "a cold pod has a ramp");
    permit.first_byte();
    drop(permit);
    // The last pod of a role terminates, and another one appears.
    stage.report_with_roles(&[(A, Terminating, PREFILL), (B, Ready, DECODE)]).await;
    assert!(!stage.is_open(B) && stage.enter().is_none());
    stage.report_with_roles(&[(A, Ready, PREFILL), (B, Ready, DECODE)]).await;
    assert!(stage.is_open(B));
    stage.report_with_roles(&[(A, Ready, PREFILL), (B, Terminating, DECODE)]).await;
    assert!(stage.enter().is_none());
}

#[tokio::test(start_paused = true)]
async fn roles_that_all_serve_open_together() {
    let both = Roles { serve: <_>::default(), ..roles() };
    let stage = KeeperTest::with_roles(Policy::default(), None, both);
    let serves = |groups| Role { is_helper: false, groups };
    stage.report_with_roles(&[(A, Ready, serves(0b01))]).await;
    assert!(!stage.is_open(A));
    stage.report_with_roles(&[(A, Ready, serves(0b01)), (B, Ready, serves(0b10))]).await;
    assert!(stage.is_open(A) && stage.is_open(B));
    // A pod in both groups suffices.
    stage.report_with_roles(&[(A, Ready, serves(0b11))]).await;
    assert!(stage.is_open(A) && stage.endpoint(B).is_none());
}

#[tokio::test(start_paused = true)]
async fn gateway_opens_when_every_role_has_a_pod() {
    let stage = KeeperTest::with_roles(with(4, 4), Some("http://10.9.9.9"), roles());
    stage.report_with_roles(&[(A, Ready, PREFILL)]).await;
    let mut held = stage.hold();
    stage.at(1000).await;
    assert!(!stage.is_open(GATEWAY_ADDRESS));
    stage.report_with_roles(&[(A, Ready, PREFILL), (B, Ready, DECODE)]).await;
    let permit = released(&mut held).await;
    assert_eq!(
        (permit.endpoint().address(), permit.endpoint().servers()),
        (GATEWAY_ADDRESS, 1),
        "one of them serves"
    );
    stage.report_with_roles(&[(B, Ready, DECODE)]).await;
    assert!(!stage.is_open(GATEWAY_ADDRESS));
}

#[tokio::test(start_paused = true)]
async fn failed_start_names_the_missing_role() {
    let mut policy = Policy::default();
    policy.readiness.activation_timeout = crate::domain::Period::from_secs(60);
    let stage = KeeperTest::with_roles(policy, None, roles());
    stage.report_with_roles(&[(B, Ready, DECODE)]).await;
    let mut held = stage.hold();
    let reason = failed(&mut held).await;
    assert_eq!(reason, "the target was not ready within 1m: no pod is ready of: prefill");
}

#[tokio::test(start_paused = true)]
async fn unmet_readiness_gate_keeps_a_pod_closed() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Gated)]).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let mut held = stage.hold();
    stage.at(5_000).await;
    assert!(!stage.is_open(A) && stage.servers.times(A).is_empty());
    // The gate is met; the kubelet has not reported ready yet.
    stage.report(&[(A, NotReady)]).await;
    assert_eq!(released(&mut held).await.endpoint().address(), A);
    // The gate is unmet again, for a pod opened by our probe and for one opened by its report.
    stage.report(&[(A, Gated)]).await;
    assert!(!stage.is_open(A));
    stage.report(&[(A, Ready)]).await;
    assert!(stage.is_open(A));
    stage.report(&[(A, Gated)]).await;
    assert!(!stage.is_open(A));
    stage.report(&[(A, Ready)]).await;
    assert!(stage.is_open(A));
}

#[tokio::test(start_paused = true)]
async fn failed_start_names_the_unmet_gate() {
    let mut policy = Policy::default();
    policy.readiness.activation_timeout = crate::domain::Period::from_secs(60);
    let stage = KeeperTest::new(policy, None, &[(A, Gated), (B, NotReady)]).await;
    let mut held = stage.hold();
    let reason = failed(&mut held).await;
    let why = "1 of 2 pods wait for a readiness gate that they declare";
    assert_eq!(reason, format!("the target was not ready within 1m: {why}"));
}
