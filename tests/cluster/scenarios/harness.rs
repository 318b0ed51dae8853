//! The cluster itself, without Anteroom: the basis of the other scenarios.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use serde_json::json;

use crate::{
    client,
    envoy::Envoy,
    model::{ModelDeployment, ScaledObjectManifest},
    node::history::NodeEventKind,
    push_scaler::PushScaler,
    scenario::Scenario,
    wait,
};

pub(super) async fn push_scales_from_zero_and_silence_to_zero(it: Scenario) {
    let scaler = PushScaler::start(it.socket(1, 9090)).await;
    it.deploy(&ModelDeployment::new("tiny").sim("--load-time 300ms")).await;
    it.scale(&ScaledObjectManifest::new("tiny", &it.socket(1, 9090).to_string(), json!({}))).await;
    wait::until("KEDA's stream", wait::WAIT_LIMIT, async || match scaler.streams() {
        0 => Err("none".into()),
        _ => Ok(()),
    })
    .await;

    let replicas = it.replicas("tiny").await;
    let pushed = SystemTime::now();
    scaler.push(12);
    // A demand of 12 at 5 per replica needs 3 replicas.
    replicas.await_value(3).await;
    assert_eq!(replicas.value_history(), [0, 1, 3]);
    let addresses = it.endpoints("tiny", 3).await;
    for address in addresses {
        let answer = client::get(format!("{address}:8000").parse().unwrap(), "/v1/models").await.unwrap();
        assert_eq!(answer.status, 200);
    }
    for what in [NodeEventKind::Bound, NodeEventKind::Started, NodeEventKind::Answers, NodeEventKind::Ready] {
        let at = it.world.ground.history.first(&it.namespace, what).unwrap();
        println!("  first {what:?} {} ms after the push", at.duration_since(pushed).unwrap().as_millis());
    }

    scaler.push(0);
    it.await_spec_replicas("tiny", 0, Duration::from_secs(90)).await;
    it.await_node_events(NodeEventKind::Gone, 3).await;
    it.wait_for_pods("no pods", |pods| pods.is_empty().then_some(())).await;
    assert!(
        it.history().iter().all(|moment| moment.what != NodeEventKind::Killed),
        "SIGTERM is enough for the stand-in"
    );
}

pub(super) async fn replicas_run_with_chart_rights(it: Scenario) {
    let mut model = ModelDeployment::new("tiny");
    model.replicas = 1;
    it.deploy(&model).await;
    let [address] = it.endpoints("tiny", 1).await.try_into().unwrap();
    let route = json!({ "name": "tiny", "target": { "url": format!("http://{address}:8000") } });
    let mut anteroom = it.anteroom(2, json!({ "routes": [route] })).await;
    for replica in &anteroom.replicas {
        let answer = replica.ask("tiny", false).await.unwrap();
        assert_eq!(answer.status, 200);
        assert_eq!(answer.json().await["object"], "chat.completion");
        assert_eq!(replica.metric("anteroom_requests_total{").await, Some(1.0));
    }

    // The service account may watch routes, but not modify pods.
    let kube = it.as_service_account("anteroom").await;
    let pods = kube.namespaced::<Pod>(&it.namespace);
    assert_eq!(pods.list(&ListParams::default()).await.unwrap().items.len(), 1);
    let name = it.pods().await[0].name_any();
    let error = pods.delete(&name, &DeleteParams::default()).await.unwrap_err();
    assert!(error.to_string().contains("forbidden"), "{error}");

    anteroom.kill(0).await;
    let [survivor] = anteroom.replicas.as_mut_slice() else { panic!("one is left") };
    assert_eq!(survivor.ask("tiny", false).await.unwrap().status, 200);
    survivor.stop().await;
}

pub(super) async fn envoy_answers_503_at_zero_then_passes_on(it: Scenario) {
    let mut model = ModelDeployment::new("tiny");
    model.probe_period = 1;
    it.deploy(&model).await;
    let envoy = Envoy::start(&it, 1, "tiny").await;
    let asked = client::get(envoy.address, "/v1/models").await.unwrap();
    assert_eq!(asked.status, 503);
    assert_eq!(asked.text().await.unwrap(), "no healthy upstream");

    it.patch("apps/v1", "Deployment", "tiny", &json!({ "spec": { "replicas": 1 } })).await;
    it.endpoints("tiny", 1).await;
    // Envoy resolves the pod by DNS, and must then find it healthy.
    wait::until("Envoy to pass on", wait::WAIT_LIMIT, async || {
        match client::get(envoy.address, "/v1/models").await?.status.as_u16() {
            200 => Ok(()),
            status => Err(status.to_string()),
        }
    })
    .await;
}
