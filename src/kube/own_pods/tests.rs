use serde_json::json;

use super::*;
use crate::{
    domain::{ObstacleKind, Workload},
    kube::starts::{CONTROL_PLANE, stamp},
};

const SCALED_UP_AT: &str = "2026-11-29T10:00:00Z";
const CREATED_BEFORE: &str = "2026-11-29T07:00:00Z";
const CREATED_AFTER: &str = "2026-11-29T10:00:01Z";

fn own_pods(kind: &str, current: Option<&str>) -> OwnPods {
    let workload = Workload { api_version: "apps/v1".into(), kind: kind.into(), name: "vllm".into() };
    let meta = ObjectMeta { uid: Some("u-vllm".into()), ..ObjectMeta::default() };
    let message = current.map(|current| format!("ReplicaSet \"{current}\" is progressing."));
    let object = json!({ "status": { "conditions": [{ "type": "Progressing", "message": message }] } });
    let raised = Observation {
        stamp: Some(stamp(SCALED_UP_AT.parse().unwrap(), CONTROL_PLANE)),
        ..Observation::now()
    };
    OwnPods::of(&workload, &meta, &object, Some(&raised))
}

fn pod(name: &str, owner: (&str, &str), created: &str, status: Value) -> Arc<Pod> {
    let (kind, of) = owner;
    let uid = format!("u-{of}");
    let value = json!({
        "metadata": { "name": name, "creationTimestamp": created, "ownerReferences": [
            { "apiVersion": "apps/v1", "kind": kind, "name": of, "uid": uid, "controller": true },
        ] },
        "spec": { "containers": [{ "name": "vllm" }] },
        "status": status,
    });
    Arc::new(serde_json::from_value(value).unwrap())
}

fn evicted() -> Value {
    json!({ "phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory." })
}

fn unschedulable() -> Value {
    json!({ "phase": "Pending", "conditions": [
        { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes" },
    ] })
}

fn crash_loop() -> Value {
    json!({ "phase": "Running", "containerStatuses": [{
        "name": "vllm", "image": "x", "imageID": "", "ready": false, "restartCount": 7,
        "state": { "waiting": { "reason": "CrashLoopBackOff" } },
    }] })
}

fn starting() -> Value {
    json!({ "phase": "Pending" })
}

fn relevant_troubles(own: &OwnPods, pods: &[Arc<Pod>]) -> Vec<(String, Option<ObstacleKind>)> {
    let relevant = own.relevant(pods).into_iter();
    relevant.map(|pod| (pod.name, pod.trouble.map(|trouble| trouble.kind))).collect()
}

const VLLM_OWNER: (&str, &str) = ("ReplicaSet", "vllm-5d4f9c");

#[tokio::test]
async fn evicted_pod_of_earlier_start_is_ignored() {
    let own = own_pods("Deployment", Some("vllm-5d4f9c"));
    let old = pod("old", VLLM_OWNER, CREATED_BEFORE, evicted());
    let new = pod("new", VLLM_OWNER, CREATED_AFTER, unschedulable());
    assert_eq!(relevant_troubles(&own, std::slice::from_ref(&old)), [], "also before the new one is created");
    assert_eq!(relevant_troubles(&own, &[old, new]), [("new".into(), Some(ObstacleKind::Unschedulable))]);
}

#[tokio::test]
async fn failed_pod_of_this_start_counts_while_alone() {
    let own = own_pods("Deployment", None);
    let status = json!({ "phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no GPU" });
    let failed = pod("failed", VLLM_OWNER, CREATED_AFTER, status);
    let expected = [("failed".into(), Some(ObstacleKind::Unschedulable))];
    assert_eq!(relevant_troubles(&own, std::slice::from_ref(&failed)), expected);
    let next = pod("next", VLLM_OWNER, CREATED_AFTER, starting());
    assert_eq!(relevant_troubles(&own, &[failed.clone(), next]), [("next".into(), None)]);
    let unknown = OwnPods { raised: None, ..own };
    assert_eq!(relevant_troubles(&unknown, &[failed]), [], "it may be of any start");
}

#[tokio::test]
async fn terminating_and_completed_pods_are_ignored() {
    let own = own_pods("Deployment", None);
    let mut leaving = (*pod("leaving", VLLM_OWNER, CREATED_AFTER, crash_loop())).clone();
    leaving.metadata.deletion_timestamp = leaving.metadata.creation_timestamp.clone();
    let done = pod("done", VLLM_OWNER, CREATED_AFTER, json!({ "phase": "Succeeded" }));
    assert_eq!(relevant_troubles(&own, &[leaving.into(), done]), []);
}

#[tokio::test]
async fn pods_of_other_owners_are_ignored() {
    for (kind, of, others) in [
        (
            "Deployment",
            VLLM_OWNER,
            vec![("Job", "vllm-warm"), ("ReplicaSet", "vllm-canary-5d4f9c"), ("StatefulSet", "vllm")],
        ),
        (
            "StatefulSet",
            ("StatefulSet", "vllm"),
            vec![("StatefulSet", "vllm-b"), ("ReplicaSet", "vllm-5d4f9c")],
        ),
        ("LeaderWorkerSet", ("StatefulSet", "vllm-0"), vec![("Job", "vllm-0")]),
    ] {
        let own = own_pods(kind, None);
        let mut pods: Vec<_> =
            others.iter().map(|owner| pod("other", *owner, CREATED_AFTER, crash_loop())).collect();
        assert_eq!(relevant_troubles(&own, &pods), [], "{kind}");
        pods.push(pod("own", of, CREATED_AFTER, unschedulable()));
        assert_eq!(
            relevant_troubles(&own, &pods),
            [("own".into(), Some(ObstacleKind::Unschedulable))],
            "{kind}"
        );
    }
}

#[tokio::test]
async fn older_revision_counts_while_it_may_start() {
    let own = own_pods("Deployment", Some("vllm-5d4f9c"));
    let older = |status| pod("older", ("ReplicaSet", "vllm-77b8d6"), CREATED_BEFORE, status);
    let new = pod("new", VLLM_OWNER, CREATED_AFTER, unschedulable());
    let expected = ("new".to_owned(), Some(ObstacleKind::Unschedulable));
    assert_eq!(relevant_troubles(&own, &[older(crash_loop()), new.clone()]), vec![expected.clone()]);
    assert_eq!(relevant_troubles(&own, &[older(starting()), new]), [("older".into(), None), expected]);
    assert_eq!(
        relevant_troubles(&own, &[older(crash_loop())]),
        [],
        "the pods of the new one cannot be created"
    );
}

#[tokio::test]
async fn crash_loop_of_an_old_pod_counts() {
    let expected = [("x".to_owned(), Some(ObstacleKind::CrashLoop))];
    for (kind, owner) in [("Deployment", VLLM_OWNER), ("StatefulSet", ("StatefulSet", "vllm"))] {
        // In a StatefulSet, the newer revision may be waiting for a pod of an older one.
        let own = own_pods(kind, (kind == "Deployment").then_some("vllm-5d4f9c"));
        assert_eq!(
            relevant_troubles(&own, &[pod("x", owner, CREATED_BEFORE, crash_loop())]),
            expected,
            "{kind}"
        );
    }
    let mut alone = (*pod("x", VLLM_OWNER, CREATED_BEFORE, crash_loop())).clone();
    alone.metadata.owner_references = None;
    assert_eq!(relevant_troubles(&own_pods("Deployment", None), &[alone.into()]), expected);
}
