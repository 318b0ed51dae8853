//! KEDA and the apiserver become unavailable during requests, and return.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use crate::{model::ModelDeployment, node::history::NodeEventKind, scenario::Scenario, wait};

/// Duration of the apiserver's outage, as in a rolling restart of a control plane. Its clients reconnect with
/// increasing delays.
const APISERVER_OUTAGE: Duration = Duration::from_secs(60);

pub(super) async fn requests_survive_a_keda_restart(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let pool = it.pool();
    let mut model = ModelDeployment::new("starting");
    model.node_selector = pool.clone();
    it.serve(&anteroom, &model, json!({})).await;
    it.serve(&anteroom, &ModelDeployment::new("resting"), json!({})).await;

    let starting = replica.read("starting", 4);
    it.await_spec_replicas("starting", 1, wait::WAIT_LIMIT).await;
    it.world.keda.kill_operator().await;
    // Scaling that KEDA has begun continues without it.
    let node = it.world.add_node(pool).await;
    wait::within("who asked before", wait::WAIT_LIMIT, starting).await.unwrap().unwrap();
    let resting = replica.read("resting", 4);
    replica.await_held_count(&it, "resting", 1).await;
    it.world.keda.restart_operator().await;
    // After its restart KEDA queries the demand, which includes the held request.
    wait::within("who asked meanwhile", wait::WAIT_LIMIT, resting).await.unwrap().unwrap();
    for model in ["starting", "resting"] {
        it.await_spec_replicas(model, 0, wait::WAIT_LIMIT).await;
    }
    it.await_node_events(NodeEventKind::Gone, 2).await;
    node.leave(&it.kube).await;
}

pub(super) async fn apiserver_outage_does_not_affect_traffic(it: Scenario) {
    let anteroom = it.anteroom(2, json!({})).await;
    let [replica, other] = anteroom.replicas.as_slice() else { panic!("there are two") };
    let model = |name| ModelDeployment::new(name).sim("--tokens 100000 --inter-token-time 20ms");
    it.serve(&anteroom, &model("warm"), json!({ "scaling": { "linger": "60s" } })).await;
    it.serve(&anteroom, &model("cold"), json!({})).await;
    let stream = replica.flow("warm").await;
    let replicas = it.replicas("warm").await;

    it.world.plane.kill_apiserver().await;
    let held = replica.read("cold", 4);
    replica.await_held_count(&it, "cold", 1).await;
    let end = Instant::now() + APISERVER_OUTAGE;
    let mut asked = 0;
    while Instant::now() < end {
        for replica in [replica, other] {
            wait::within("a stream", wait::WAIT_LIMIT, replica.read("warm", 4)).await.unwrap().unwrap();
            asked += 1;
        }
        stream.await_next_part().await;
    }
    println!("  {asked} requests while the apiserver was away");
    replica.await_held_count(&it, "cold", 1).await;
    it.world.plane.restart_apiserver().await;
    // The controllers of Kubernetes take longer to recover the longer the outage was.
    wait::within("who waited for it", 3 * wait::WAIT_LIMIT, held).await.unwrap().unwrap();
    wait::within("a stream", wait::WAIT_LIMIT, other.read("warm", 4)).await.unwrap().unwrap();
    stream.await_next_part().await;
    assert_eq!(replicas.value_history(), [1]);
    it.await_spec_replicas("cold", 0, wait::WAIT_LIMIT).await;
    drop(stream);
}
