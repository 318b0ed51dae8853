//! Parts of the cluster are stopped and restarted: the harness supports this without losses.

use serde_json::json;

use crate::{
    client,
    model::{ModelDeployment, ScaledObjectManifest},
    node::history::NodeEventKind,
    push_scaler::PushScaler,
    scenario::Scenario,
    wait,
};

pub(super) async fn pods_outlive_the_apiserver(it: Scenario) {
    let mut model = ModelDeployment::new("tiny");
    model.replicas = 1;
    it.deploy(&model).await;
    let [address] = it.endpoints("tiny", 1).await.try_into().unwrap();
    it.world.plane.kill_apiserver().await;
    let asked = client::get((address + ":8000").parse().unwrap(), "/health").await.unwrap();
    assert_eq!(asked.status, 200);
    it.world.plane.restart_apiserver().await;
    it.patch("apps/v1", "Deployment", "tiny", &json!({ "spec": { "replicas": 2 } })).await;
    it.endpoints("tiny", 2).await;
    it.patch("apps/v1", "Deployment", "tiny", &json!({ "spec": { "replicas": 0 } })).await;
    it.await_node_events(NodeEventKind::Gone, 2).await;
}

pub(super) async fn keda_receives_next_push_after_restart(it: Scenario) {
    let scaler = PushScaler::start(it.socket(1, 9090)).await;
    it.deploy(&ModelDeployment::new("tiny")).await;
    it.scale(&ScaledObjectManifest::new("tiny", &it.socket(1, 9090).to_string(), json!({}))).await;
    let streams = async |number: usize| {
        wait::until(&format!("{number} streams of KEDA"), wait::WAIT_LIMIT, async || {
            match scaler.streams() {
                found if found == number => Ok(()),
                found => Err(found.to_string()),
            }
        })
        .await;
    };
    streams(1).await;
    it.world.keda.kill_operator().await;
    streams(0).await;
    it.world.keda.restart_operator().await;
    streams(1).await;
    scaler.push(1);
    it.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;
    it.endpoints("tiny", 1).await;
}
