//! A request's way to a model at zero, and the model's way back to zero.

use std::net::SocketAddrV4;

use serde_json::json;

use crate::{
    measure,
    model::{ModelDeployment, ScaledObjectManifest},
    node::history::NodeEventKind,
    scenario::Scenario,
    serving, wait,
};

pub(super) async fn request_starts_and_idleness_stops_a_model(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.serve(&anteroom, &ModelDeployment::new("tiny").sim("--load-time 300ms"), json!({})).await;
    let replicas = it.replicas("tiny").await;

    let answer = wait::within("the answer", wait::WAIT_LIMIT, replica.ask("tiny", true)).await.unwrap();
    serving::finish(answer).await.unwrap();

    replicas.await_value(0).await;
    it.await_node_events(NodeEventKind::Gone, 1).await;
    assert_eq!(replicas.value_history(), [0, 1, 0]);
    let [cold_start] = replica.cold_starts(&it, "tiny").await.try_into().unwrap();
    println!("  {cold_start}");
    assert_eq!(cold_start["outcome"], "completed");
    replica.await_route_idle(&it, "tiny").await;
}

pub(super) async fn our_probe_is_far_ahead_of_kubelets(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    // The first probe is at once, before the server listens, and the next one half a minute later.
    let mut model = ModelDeployment::new("tiny").sim("--load-time 1s");
    model.probe_period = 30;
    it.serve(&anteroom, &model, json!({})).await;

    let answer = wait::within("the answer", wait::WAIT_LIMIT, replica.ask("tiny", false)).await.unwrap();
    assert_eq!(answer.status, 200);
    answer.json().await;
    it.endpoints("tiny", 0).await;
    let history = it.history();
    assert!(history.iter().all(|moment| moment.what != NodeEventKind::Ready), "{history:?}");
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
}

pub(super) async fn load_outlasts_the_cooldown(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    for name in ["stays", "leaves"] {
        let mut model = ModelDeployment::new(name).sim("--load-time 8s");
        model.probe_period = 1;
        let mut scaled = ScaledObjectManifest::of(&model, &anteroom);
        scaled.cooldown = 1;
        it.serve_scaled(&anteroom, &model, json!({ "scaling": { "linger": "0s" } }), &scaled).await;
    }
    let replicas = [it.replicas("stays").await, it.replicas("leaves").await];

    let stays = replica.read("stays", 4);
    let leaves = replica.read("leaves", 4);
    replica.await_held_count(&it, "leaves", 1).await;
    drop(leaves);
    replica.await_held_count(&it, "leaves", 0).await;
    wait::within("the answer", wait::WAIT_LIMIT, stays).await.unwrap().unwrap();
    // No client waits for the model any more, but it still became ready.
    it.await_node_events(NodeEventKind::Answers, 2).await;
    for (name, outcome, replicas) in
        [("stays", "completed", &replicas[0]), ("leaves", "abandoned", &replicas[1])]
    {
        replicas.await_value(0).await;
        let [cold_start] = replica.cold_starts(&it, name).await.try_into().unwrap();
        assert_eq!(cold_start["outcome"], outcome, "{cold_start}");
    }
    assert_eq!(replicas.map(|replicas| replicas.value_history()), [[0, 1, 0], [0, 1, 0]]);
}

pub(super) async fn servers_that_speak_http_2_get_one_connection(it: Scenario) {
    let anteroom = it.anteroom(1, json!({ "workers": 1 })).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let mut model = ModelDeployment::new("tiny").sim("--tokens 100000 --inter-token-time 50ms");
    // Avoids further connections by probes.
    model.probe_period = 60;
    model.port = json!({ "appProtocol": "kubernetes.io/h2c" });
    it.serve(&anteroom, &model, json!({})).await;
    let first = replica.flow("tiny").await;
    let mut flows = vec![first];
    for _ in 0..7 {
        flows.push(replica.flow("tiny").await);
    }
    for flow in &flows {
        flow.await_next_part().await;
    }
    let route = replica.route(&it, "tiny").await;
    assert_eq!(route["in_flight"], 8);
    let address = route["endpoints"][0]["address"].as_str().unwrap();
    assert_eq!(connections(address), 1, "in HTTP/1.1 it takes 8");
    drop(flows);
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
}

/// Checks that `tests/cluster/run --measure` works and measures actual events.
pub(super) async fn measurements_match_the_history(it: Scenario) {
    for sample in measure::measure_cold_starts(&it, measure::WAKE_PATHS[0], 3).await {
        let record = &sample.record;
        let rounded = 0.001 * record.phases.len() as f64;
        assert!((record.phases.values().sum::<f64>() - record.total).abs() < rounded, "{sample:?}");
        // The record begins after the client, its push is sent before it is received, and it ends before the client is
        // done.
        assert!(record.phase("signal") <= sample.pushed.unwrap(), "{sample:?}");
        assert!(record.total - record.phase("first_token") <= sample.first_byte, "{sample:?}");
        assert!(sample.first_byte >= 1000.0, "the load alone: {sample:?}");
    }
}

/// Returns the number of connections to an address of this network.
fn connections(address: &str) -> usize {
    let address: SocketAddrV4 = address.parse().unwrap();
    let remote = format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    // The third column is the remote address; 01 in the fourth column is an established connection.
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.get(2) == Some(&remote.as_str()) && row.get(3) == Some(&"01")).count()
}
