//! Targets other than the pods of a Service.

use serde_json::json;

use crate::{
    client, envoy::Envoy, model::ModelDeployment, node::history::NodeEventKind, scenario::Scenario, wait,
};

pub(super) async fn held_requests_wait_for_an_unaware_envoy(it: Scenario) {
    let number = 40;
    let config = json!({ "kubernetes": { "allowedHosts": [it.address(number).to_string()] } });
    let anteroom = it.anteroom(1, config).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let envoy = Envoy::start(&it, number, "tiny").await;
    let target = json!({
        "service": { "name": "tiny", "port": 80 },
        "gateway": format!("http://{}", envoy.address),
    });
    let mut model = ModelDeployment::new("tiny").sim("--load-time 300ms");
    model.probe_period = 1;
    it.serve(&anteroom, &model, json!({ "target": target })).await;
    for round in 1..=2 {
        let before = envoy.without_host().await;
        let streams: Vec<_> = (0..8).map(|_| replica.read("tiny", 4)).collect();
        for stream in streams {
            wait::within("a stream", wait::WAIT_LIMIT, stream).await.unwrap().unwrap();
        }
        // Anteroom's probe is far faster than Envoy's health check and DNS: Envoy returned 503, but no client received
        // it.
        assert!(envoy.without_host().await > before, "round {round}");
        it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
        it.await_node_events(NodeEventKind::Gone, round).await;
    }
    let completed = format!("anteroom_requests_total{{route=\"{}/tiny\",outcome=\"completed\"", it.namespace);
    assert_eq!(replica.metric(&completed).await, Some(16.0));
}

pub(super) async fn inference_pool_is_a_valid_target(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let pool = json!({
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": { "name": "pool" },
        "spec": {
            "selector": { "matchLabels": { "app": "tiny" } },
            "targetPorts": [{ "number": 8000 }],
            "endpointPickerRef": { "name": "picker", "port": { "number": 9002 } },
        },
    });
    it.apply(&pool).await;
    let target = json!({ "inferencePool": { "name": "pool" } });
    it.serve(&anteroom, &ModelDeployment::new("tiny").sim("--load-time 300ms"), json!({ "target": target }))
        .await;
    let streams: Vec<_> = (0..4).map(|_| replica.read("tiny", 4)).collect();
    for stream in streams {
        wait::within("a stream", wait::WAIT_LIMIT, stream).await.unwrap().unwrap();
    }
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
}

// === impl Envoy ===

impl Envoy {
    /// Returns the number of times that Envoy had no host for a request.
    async fn without_host(&self) -> u64 {
        let admin = (self.address.ip(), 9901).into();
        let text = client::get(admin, "/stats?filter=upstream_cx_none_healthy").await.unwrap();
        let text = text.text().await.unwrap();
        let count =
            text.lines().find_map(|line| line.strip_prefix("cluster.pods.upstream_cx_none_healthy: "));
        count.unwrap_or_else(|| panic!("no such figure: {text}")).parse().unwrap()
    }
}
