//! The node's agent: starting, failing and terminating pods, as the other scenarios rely on.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use serde_json::json;

use crate::{
    client,
    model::ModelDeployment,
    node::{fate, history::NodeEventKind},
    scenario::Scenario,
};

pub(super) async fn missing_image_is_pulled_with_backoff(it: Scenario) {
    let mut model = ModelDeployment::new("tiny")
        .play(fate::FAILURE_ANNOTATION, "image-pull-back-off")
        .play(fate::BACKOFF_ANNOTATION, "300ms");
    (model.replicas, model.probe_period) = (1, 1);
    it.deploy(&model).await;
    let pod = it
        .wait_for_pods("ImagePullBackOff", |pods| {
            pods.iter().find(|pod| waiting(pod) == Some("ImagePullBackOff")).cloned()
        })
        .await;
    assert_eq!(phase(&pod), "Pending");
    assert_eq!(condition(&pod, "PodScheduled"), Some("True"));
    assert_eq!(condition(&pod, "Ready"), Some("False"));

    let healed = json!({ "metadata": { "annotations": { fate::FAILURE_ANNOTATION: null } } });
    it.patch("v1", "Pod", &pod.name_any(), &healed).await;
    it.endpoints("tiny", 1).await;
}

pub(super) async fn exited_container_restarts_with_backoff(it: Scenario) {
    let mut model = ModelDeployment::new("tiny")
        .sim("--load-time 20ms --fail-load=3")
        .play(fate::BACKOFF_ANNOTATION, "100ms");
    model.replicas = 1;
    it.deploy(&model).await;
    let container = it
        .wait_for_pods("CrashLoopBackOff for the third time", |pods| {
            let pod = pods.iter().find(|pod| waiting(pod) == Some("CrashLoopBackOff"))?;
            container(pod).filter(|container| container.restart_count >= 3)
        })
        .await;
    let ended = container.last_state.unwrap().terminated.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_deref()), (3, Some("Error")));
    assert!(
        container.state.unwrap().waiting.unwrap().message.unwrap().contains("restarting failed container")
    );
}

pub(super) async fn oom_killed_container_reports_its_reason(it: Scenario) {
    let mut model = ModelDeployment::new("tiny")
        .play(fate::FAILURE_ANNOTATION, "oom")
        .play(fate::BACKOFF_ANNOTATION, "60s");
    model.replicas = 1;
    it.deploy(&model).await;
    let container = it
        .wait_for_pods("CrashLoopBackOff", |pods| {
            container(pods.iter().find(|pod| waiting(pod) == Some("CrashLoopBackOff"))?)
        })
        .await;
    let ended = container.last_state.unwrap().terminated.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_deref()), (137, Some("OOMKilled")));
}

pub(super) async fn unschedulable_pod_waits_for_a_node(it: Scenario) {
    let pool = BTreeMap::from([("pool".to_owned(), it.namespace.clone())]);
    let mut model = ModelDeployment::new("tiny").play(fate::PULL_DELAY_ANNOTATION, "200ms");
    (model.replicas, model.probe_period, model.node_selector) = (1, 1, pool.clone());
    it.deploy(&model).await;
    it.wait_for_pods("the scheduler to say that it does not fit", |pods| {
        let conditions = pods.first()?.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().find(|one| one.reason.as_deref() == Some("Unschedulable")).map(drop)
    })
    .await;
    assert!(it.history().is_empty());

    let node = it.world.add_node(pool).await;
    let addresses = it.endpoints("tiny", 1).await;
    let pods = it.pods().await;
    assert_eq!(pods[0].spec.as_ref().unwrap().node_name.as_deref(), Some(node.name.as_str()));
    assert_eq!(pods[0].status.as_ref().unwrap().pod_ip.as_ref(), addresses.first());
    let [pulled, bound] = [NodeEventKind::Pulled, NodeEventKind::Bound]
        .map(|what| it.history().iter().find(|moment| moment.what == what).unwrap().at);
    assert!(pulled.duration_since(bound).unwrap() >= Duration::from_millis(200));

    it.kube
        .namespaced::<Pod>(&it.namespace)
        .delete_collection(&DeleteParams::default(), &ListParams::default())
        .await
        .unwrap();
    it.await_node_events(NodeEventKind::Gone, 1).await;
    node.leave(&it.kube).await;
}

pub(super) async fn pod_ends_after_hook_and_grace_period(it: Scenario) {
    // One model that exits on SIGTERM after its hook, and one that must be killed.
    let mut polite = ModelDeployment::new("polite");
    (polite.replicas, polite.probe_period) = (1, 1);
    polite.container = json!({ "lifecycle": { "preStop": { "sleep": { "seconds": 5 } } } });
    let mut stubborn = ModelDeployment::new("stubborn");
    (stubborn.replicas, stubborn.grace) = (1, 1);
    stubborn.container = json!({
        "command": ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"],
        "args": null,
        "readinessProbe": null,
    });
    it.deploy(&polite).await;
    it.deploy(&stubborn).await;
    let [address] = it.endpoints("polite", 1).await.try_into().unwrap();
    it.endpoints("stubborn", 1).await;
    for model in ["polite", "stubborn"] {
        it.patch("apps/v1", "Deployment", model, &json!({ "spec": { "replicas": 0 } })).await;
    }
    it.await_node_events(NodeEventKind::Terminating, 2).await;
    // The server runs while the hook does; new connections should go elsewhere.
    it.endpoints("polite", 0).await;
    assert_eq!(client::get((address + ":8000").parse().unwrap(), "/health").await.unwrap().status, 200);
    it.await_node_events(NodeEventKind::Gone, 2).await;
    let course = |model: &str| -> Vec<NodeEventKind> {
        let moments = it.history().into_iter().filter(|moment| moment.pod.starts_with(model));
        let moments = moments.skip_while(|moment| moment.what != NodeEventKind::Terminating);
        moments.map(|moment| moment.what).collect()
    };
    // The simulator shuts down gracefully.
    let polite = course("polite");
    assert_eq!(
        polite,
        [
            NodeEventKind::Terminating,
            NodeEventKind::Signalled,
            NodeEventKind::Exited(0),
            NodeEventKind::Unready,
            NodeEventKind::Gone
        ]
    );
    let stubborn = course("stubborn");
    assert_eq!(
        stubborn,
        [
            NodeEventKind::Terminating,
            NodeEventKind::Signalled,
            NodeEventKind::Killed,
            NodeEventKind::Exited(137),
            NodeEventKind::Unready,
            NodeEventKind::Gone
        ]
    );
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn container(pod: &Pod) -> Option<ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first().cloned()
}

/// Returns the reason why the pod's container waits.
fn waiting(pod: &Pod) -> Option<&str> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    containers.first()?.state.as_ref()?.waiting.as_ref()?.reason.as_deref()
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind).map(|condition| condition.status.as_str())
}
