//! Number of replicas: scaled with the queue once a replica responds, and no fewer than the requests need.

use futures_util::future::join_all;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::{
    client,
    model::{ModelDeployment, ScaledObjectManifest},
    node::history::NodeEventKind,
    scenario::Scenario,
    wait,
};

pub(super) async fn replicas_grow_after_first_response(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    // No node has room for the pod. The autoscaler queries the metric before a new node appears.
    let pool = it.pool();
    let mut model =
        ModelDeployment::new("tiny").sim("--tokens 1000 --inter-token-time 50ms --shutdown-timeout 60s");
    (model.node_selector, model.probe_period, model.grace) = (pool.clone(), 1, 60);
    let policies = json!({ "concurrency": { "max": 2 }, "scaling": { "target": 2 } });
    it.serve(&anteroom, &model, policies).await;
    let replicas = it.replicas("tiny").await;

    let streams: Vec<_> = (0..6).map(|_| replica.read("tiny", 240)).collect();
    replica.await_held_count(&it, "tiny", 6).await;
    let hpa = ("autoscaling/v2", "HorizontalPodAutoscaler", "keda-hpa-tiny");
    it.wait_for_condition(hpa.0, hpa.1, hpa.2, "ScalingActive", "True").await;
    assert_eq!(replica.depth(&it, "tiny").await, 2.0, "the target, not 6");

    let node = it.world.add_node(pool).await;
    // 4 held requests, and 2 in flight weighted by target ÷ max: 4 + 2 × 2 ÷ 2 = 6, which is 3 replicas at a target of
    // 2.
    replicas.await_value(3).await;
    let answered = it.world.ground.history.first(&it.namespace, NodeEventKind::Answers).unwrap();
    assert_eq!(replicas.values_until(answered), [0, 1]);
    for stream in streams {
        wait::within("a stream", wait::WAIT_LIMIT, stream).await.unwrap().unwrap();
    }

    replicas.await_value(0).await;
    it.await_node_events(NodeEventKind::Gone, 3).await;
    let course = replicas.value_history();
    assert_eq!(course.iter().max(), Some(&3), "{course:?}");
    assert!(!course[1..course.len() - 1].contains(&0), "{course:?}");
    node.leave(&it.kube).await;
}

pub(super) async fn requests_held_by_the_ramp_add_no_replica(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    // Without streaming, the head of the response arrives only at its end, so the HPA syncs several times before.
    let pool = it.pool();
    let mut model = ModelDeployment::new("tiny").sim("--tokens 4 --time-to-first-token 20s");
    (model.node_selector, model.probe_period) = (pool.clone(), 1);
    it.serve(&anteroom, &model, json!({})).await;
    let replicas = it.replicas("tiny").await;

    // Less than the default of 64 per replica, and more than nine times the 5 for which another replica is added.
    let answers = join_all((0..48).map(|_| replica.ask("tiny", false)));
    let starting = async {
        replica.await_held_count(&it, "tiny", 48).await;
        it.world.add_node(pool).await
    };
    let both = async { tokio::join!(answers, starting) };
    let (answers, node) = wait::within("the answers", 2 * wait::WAIT_LIMIT, both).await;
    for answer in answers {
        assert_eq!(answer.unwrap().status, 200);
    }
    replicas.await_value(0).await;
    assert_eq!(replicas.value_history(), [0, 1, 0]);
    it.await_node_events(NodeEventKind::Gone, 1).await;
    node.leave(&it.kube).await;
}

pub(super) async fn requests_between_polls_keep_the_model(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    for (name, linger) in [("steady", "60s"), ("blinking", "0s")] {
        it.serve(&anteroom, &ModelDeployment::new(name), json!({ "scaling": { "linger": linger } })).await;
    }
    let replicas = it.replicas("steady").await;
    // The same requests go to both models. `blinking` goes to zero in between, which shows that the polls found no
    // demand.
    for _ in 0..2 {
        for model in ["steady", "blinking"] {
            let answer =
                wait::within("the answer", wait::WAIT_LIMIT, replica.ask(model, false)).await.unwrap();
            assert_eq!(answer.status, 200);
            answer.json().await;
        }
        it.await_spec_replicas("blinking", 0, wait::WAIT_LIMIT).await;
        replica.await_route_idle(&it, "blinking").await;
    }
    assert_eq!(replicas.value_history(), [0, 1]);
    assert_eq!(replica.cold_starts(&it, "blinking").await.len(), 2);
    assert_eq!(replica.cold_starts(&it, "steady").await.len(), 1);
}

pub(super) async fn terminating_pod_finishes_its_requests(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    // As in deploy/examples/vllm.yaml: the server keeps serving for a while, then lets its streams finish.
    let mut model =
        ModelDeployment::new("tiny").sim("--tokens 1000 --inter-token-time 50ms --shutdown-timeout 60s");
    (model.probe_period, model.grace) = (1, 60);
    model.container = json!({ "lifecycle": { "preStop": { "sleep": { "seconds": 3 } } } });
    let mut scaled = ScaledObjectManifest::of(&model, &anteroom);
    (scaled.max, scaled.stabilization) = (2, 0);
    let policies = json!({ "concurrency": { "max": 2 }, "scaling": { "target": 2 } });
    it.serve_scaled(&anteroom, &model, policies, &scaled).await;

    // The first two go to the first pod, the others to the second. They last longer than the rest of the test.
    let (mut long, mut short) = (Vec::new(), Vec::new());
    for number in 0..4 {
        let kind = if number % 2 == 0 { &mut long } else { &mut short };
        kind.push(replica.read("tiny", 800));
        replica.admitted(&it, "tiny", number + 1).await;
    }
    let full = [2, 2];
    wait::until("two streams on each of two pods", wait::WAIT_LIMIT, async || {
        let found = in_flight(&replica.route(&it, "tiny").await);
        if found.iter().map(|one| one.1).eq(full) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    // The two remaining requests need only one replica: 2 × 2 ÷ 2 = 2.
    short.clear();
    it.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;
    let leaving = it.await_node_events(NodeEventKind::Terminating, 1).await.remove(0).pod;
    let pods = it.pods().await;
    let address = |leaves: bool| {
        let pod = pods.iter().find(|pod| (pod.metadata.name.as_ref() == Some(&leaving)) == leaves).unwrap();
        format!("{}:8000", pod.status.as_ref().unwrap().pod_ip.as_ref().unwrap())
    };
    let (left, stays) = (address(true), address(false));
    wait::until("nothing new for it", wait::WAIT_LIMIT, async || {
        let route = replica.route(&it, "tiny").await;
        let found = route["endpoints"].as_array().unwrap().iter().find(|one| one["address"] == left.as_str());
        match found {
            Some(found) if found["ready"] == false && found["in_flight"] == 1 => Ok(()),
            _ => Err(route.to_string()),
        }
    })
    .await;
    let before = served(&stays).await;
    for _ in 0..6 {
        let stream = replica.read("tiny", 1);
        wait::within("a short one", wait::WAIT_LIMIT, stream).await.unwrap().unwrap();
    }
    assert_eq!(served(&stays).await - before, 6.0);
    for stream in long {
        wait::within("a long one", wait::WAIT_LIMIT, stream).await.unwrap().unwrap();
    }

    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
    it.await_node_events(NodeEventKind::Gone, 2).await;
    let course: Vec<_> = it.history().into_iter().filter(|moment| moment.pod == leaving).collect();
    assert!(course.iter().any(|moment| moment.what == NodeEventKind::Exited(0)), "{course:?}");
}

/// Returns the number of requests in flight on each endpoint.
fn in_flight(route: &serde_json::Value) -> Vec<(String, u64)> {
    let endpoints = route["endpoints"].as_array().unwrap().iter();
    endpoints.map(|one| (one["address"].to_string(), one["in_flight"].as_u64().unwrap())).collect()
}

/// Returns the number of requests that a model server has finished.
async fn served(address: &str) -> f64 {
    let text = client::get(address.parse().unwrap(), "/metrics").await.unwrap().text().await.unwrap();
    let samples = text.lines().filter(|line| line.starts_with("vllm:request_success_total{"));
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Each push of `true` writes the ScaledObject's status and delays scaling to zero, so none is sent while there are
/// replicas. Polls would hide this: the only one is when the ScaledObject is created, and the next is long after the
/// end.
pub(super) async fn no_push_while_replicas_exist(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let mut model = ModelDeployment::new("tiny").sim("--tokens 1000 --inter-token-time 50ms");
    model.probe_period = 1;
    let scaled = ScaledObjectManifest { polling: 600, ..ScaledObjectManifest::of(&model, &anteroom) };
    it.serve_scaled(&anteroom, &model, json!({}), &scaled).await;
    let stream = replica.flow("tiny").await;
    let first = it.last_active("tiny").await;
    // 300 tokens × 50 ms = 15 s, in which a push would be repeated three times.
    stream.await_parts(300).await;
    assert_eq!(it.last_active("tiny").await, first);
    assert_eq!(replica.gauge("anteroom_scaler_pushes_total", &it, "tiny").await, 1.0);
}

/// A ScaledObject whose status does not list Anteroom's metric, as after a reconciliation by KEDA while no scaler of
/// Anteroom responded and there was another trigger: KEDA drops its pushes (kedacore/keda#8168).
pub(super) async fn lost_metric_is_listed_again_and_wakes(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let model = ModelDeployment::new("tiny");
    let mut scaled = ScaledObjectManifest { polling: 600, ..ScaledObjectManifest::of(&model, &anteroom) };
    // Practically never active: only for a minute on January 1.
    scaled.triggers = vec![json!({ "type": "cron", "metadata": {
        "timezone": "UTC", "start": "0 0 1 1 *", "end": "1 0 1 1 *", "desiredReplicas": "1",
    } })];
    it.serve_scaled(&anteroom, &model, json!({}), &scaled).await;
    let objects = it.dynamic("keda.sh/v1alpha1", "ScaledObject");
    let listed = async || {
        wait::object(&objects, "tiny", "both metrics in its status", wait::WAIT_LIMIT, |object| {
            let names = object?.data.pointer("/status/externalMetricNames")?.as_array()?;
            (names.len() == 2).then(|| names.clone())
        })
        .await
    };
    let names = listed().await;
    let others: Vec<_> = names.iter().filter(|name| name.as_str().unwrap().starts_with("s1-")).collect();
    let lost = Patch::Merge(json!({ "status": { "externalMetricNames": others } }));
    objects.patch_status("tiny", &PatchParams::default(), &lost).await.unwrap();
    let answer = wait::within("the answer", wait::WAIT_LIMIT, replica.ask("tiny", false)).await.unwrap();
    assert_eq!(answer.status, 200, "no poll comes within ten minutes");
    assert_eq!(listed().await, names);
}

impl Scenario {
    /// Returns the time at which KEDA last found a ScaledObject active.
    async fn last_active(&self, name: &str) -> String {
        let objects = self.dynamic("keda.sh/v1alpha1", "ScaledObject");
        wait::object(&objects, name, "a time of activity", wait::WAIT_LIMIT, |object| {
            object?.data.pointer("/status/lastActiveTime")?.as_str().map(str::to_owned)
        })
        .await
    }
}
