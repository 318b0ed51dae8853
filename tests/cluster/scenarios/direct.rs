//! Scaling without KEDA: from zero to one and back by the proxy, unless another autoscaler is in charge.

use serde_json::{Value, json};

use crate::{
    anteroom::AnteroomReplica,
    client::StreamingResponse,
    model::{ModelDeployment, ScaledObjectManifest},
    routes::model_route,
    scenario::Scenario,
    serving::ReplicaChanges,
    wait,
};

const ENABLED: &[&str] = &["directScaling.enabled=true"];

pub(super) async fn two_replicas_scale_to_one_and_back_once(it: Scenario) {
    let anteroom = it.anteroom_with(2, json!({}), ENABLED).await;
    let [one, other] = anteroom.replicas.as_slice() else { panic!("there are two") };
    let mut model =
        ModelDeployment::new("tiny").sim("--load-time 300ms --tokens 60 --inter-token-time 100ms");
    model.probe_period = 1;
    it.deploy(&model).await;
    it.apply(&route(json!({ "idleTimeout": "3s", "linger": "1s" }))).await;
    let said = it.await_route_condition("tiny", "Scalable", "Direct").await;
    assert_eq!(said["status"], "True");
    let replicas = it.replicas("tiny").await;

    // Both replicas get a request at the same time.
    let (a, b) = tokio::join!(one.ask("tiny", true), other.ask("tiny", true));
    for answer in [a, b] {
        assert_eq!(answer.unwrap().status, 200);
    }
    it.await_route_condition("tiny", "Ready", "EndpointsReady").await;
    // A response through one replica that takes longer than the idle timeout, while the other replica is idle.
    let long = one.read("tiny", 60);
    wait::within("a long answer", wait::WAIT_LIMIT, long).await.unwrap().unwrap();
    assert_eq!(replicas.value_history(), [0, 1]);
    await_replica_changes(&replicas, &[0, 1, 0]).await;
    it.await_route_condition("tiny", "Ready", "Idle").await;
    // The other replica has noticed the scale-down, and starts the model again.
    other.await_route_idle(&it, "tiny").await;
    assert_eq!(request_tiny(other).await.status, 200);
    await_replica_changes(&replicas, &[0, 1, 0, 1, 0]).await;
}

pub(super) async fn externally_scaled_workload_is_left_alone(it: Scenario) {
    let anteroom = it.anteroom_with(1, json!({}), ENABLED).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.deploy(&ModelDeployment::new("tiny")).await;
    let mut scaled = ScaledObjectManifest::of(&ModelDeployment::new("tiny"), &anteroom);
    scaled.annotations.insert("autoscaling.keda.sh/paused".into(), "true".into());
    it.apply(&scaled.object()).await;
    it.apply(&route(json!({}))).await;
    let replicas = it.replicas("tiny").await;
    let owner = format!("ScaledObject `{}/tiny`", it.namespace);
    let mut waits = it.refused(replica, &owner).await;

    // Once the ScaledObject is deleted, the proxy scales the model itself; waiting requests are served.
    let objects = it.dynamic("keda.sh/v1alpha1", "ScaledObject");
    objects.delete("tiny", &Default::default()).await.unwrap();
    assert!(
        wait::within("the rest", wait::WAIT_LIMIT, waits.read_body_rest())
            .await
            .ends_with("data: [DONE]\n\n")
    );
    await_replica_changes(&replicas, &[0, 1]).await;

    // An autoscaler created by hand also prevents the proxy from scaling.
    it.apply(&json!({
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": { "name": "by-hand" },
        "spec": {
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "tiny" },
            "maxReplicas": 2,
        },
    }))
    .await;
    it.patch("apps/v1", "Deployment", "tiny", &json!({ "spec": { "replicas": 0 } })).await;
    it.endpoints("tiny", 0).await;
    // Until the replica has noticed the change, the terminating pod may still respond.
    replica.await_route_idle(&it, "tiny").await;
    it.refused(replica, "HorizontalPodAutoscaler `by-hand`").await;
    await_replica_changes(&replicas, &[0, 1, 0]).await;
}

pub(super) async fn direct_scaling_requires_chart_switch(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.deploy(&ModelDeployment::new("tiny")).await;
    it.apply(&route(json!({}))).await;
    let mut waits = it.refused(replica, "`directScaling.enabled=true`").await;
    // The chart's switch is turned on; waiting requests are served.
    for object in crate::chart::rights(&it.world, &it.namespace, ENABLED).await {
        it.apply(&object).await;
    }
    assert!(
        wait::within("the rest", wait::WAIT_LIMIT, waits.read_body_rest())
            .await
            .ends_with("data: [DONE]\n\n")
    );
}

fn route(scaling: Value) -> Value {
    model_route(
        "tiny",
        json!({
            "scaleBy": "kubernetes",
            "workload": { "kind": "Deployment", "name": "tiny" },
            "scaling": scaling,
            "keepalive": { "mode": "comment", "after": "100ms", "interval": "100ms" },
        }),
    )
}

/// Waits until the numbers of replicas were exactly these.
async fn await_replica_changes(replicas: &ReplicaChanges, expected: &[i32]) {
    wait::until(&format!("the numbers {expected:?}"), wait::WAIT_LIMIT, async || {
        let course = replicas.value_history();
        assert!(expected.starts_with(&course), "{course:?} is no beginning of {expected:?}");
        if course == expected { Ok(()) } else { Err(format!("{course:?}")) }
    })
    .await;
}

async fn request_tiny(replica: &AnteroomReplica) -> StreamingResponse {
    wait::within("an answer", wait::WAIT_LIMIT, replica.ask("tiny", true)).await.unwrap()
}

// === impl Scenario ===

impl Scenario {
    /// Requests the model, and waits until heartbeats and status report that the proxy may not scale it, and the
    /// reason.
    async fn refused(&self, replica: &AnteroomReplica, why: &str) -> StreamingResponse {
        self.await_route_condition("tiny", "Accepted", "Accepted").await;
        let mut answer = request_tiny(replica).await;
        let reading = async {
            let mut text = String::new();
            while !text.contains(why) {
                text += &String::from_utf8_lossy(&answer.next().await.unwrap().unwrap());
            }
        };
        wait::within(why, wait::WAIT_LIMIT, reading).await;
        let obstacle = self.obstacle(replica, "tiny", Some("scale_refused")).await;
        assert!(obstacle["message"].as_str().unwrap().contains(why), "{obstacle}");
        let said = self.await_route_condition("tiny", "Scalable", "ScaleRefused").await;
        assert!(said["status"] == "False" && said["message"].as_str().unwrap().contains(why), "{said}");
        self.await_route_event("tiny", "Warning", "ScaleRefused").await;
        answer
    }
}

// === impl StreamingResponse ===

impl StreamingResponse {
    /// Reads the rest of the body.
    async fn read_body_rest(&mut self) -> String {
        let mut text = String::new();
        while let Ok(Some(part)) = self.next().await {
            text += &String::from_utf8_lossy(&part);
        }
        text
    }
}
