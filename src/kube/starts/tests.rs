//! Pods that start, before an API server.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{advance, timeout};

use super::{
    logs::{ContainerRef, PodLogs},
    *,
};
use crate::{
    config,
    domain::{ClusterTarget, EndpointSource, ServicePort},
    kube::{Cluster, Endpoints, PodWatches, stand_in::FakeApiServer},
    state::{Discovered, Discovery},
};

const SERVICE_PATH: &str = "/api/v1/namespaces/ml/services/tiny";
const TINY_POD_PATH: &str = "/api/v1/namespaces/ml/pods/tiny-1";
const NODE: &str = "/api/v1/nodes/gpu-9";

struct StartsTest {
    server: FakeApiServer,
    found: tokio::sync::watch::Receiver<Arc<Discovered>>,
    _cluster: Cluster,
}

impl StartsTest {
    fn new(before: impl FnOnce(&FakeApiServer)) -> Self {
        let server = FakeApiServer::default();
        server.put(
            SERVICE_PATH,
            json!({ "metadata": { "name": "tiny", "namespace": "ml" },
                "spec": { "selector": { "app": "tiny" }, "ports": [{ "port": 80, "targetPort": 8000 }] } }),
        );
        before(&server);
        let config = config::Kubernetes { pod_logs: true, ..config::Kubernetes::default() };
        let cluster = server.cluster_with(&config);
        let target = ClusterTarget {
            namespace: "ml".into(),
            source: EndpointSource::Service { name: "tiny".into(), port: ServicePort::Number(80) },
            gateway: None,
            roles: <_>::default(),
        };
        let found = Endpoints::new(cluster.clone(), PodWatches::new(cluster.clone())).watch(&target);
        Self { server, found, _cluster: cluster }
    }

    /// Waits until `is_so` is true of the first starting pod, and returns it.
    async fn start(&mut self, is_so: impl Fn(&PodStart) -> bool) -> Arc<PodStart> {
        let waiting = self.found.wait_for(|found| found.starts.first().is_some_and(|start| is_so(start)));
        let found = timeout(Duration::from_secs(60), waiting).await;
        let is = |found: &Discovered| found.starts.first().cloned();
        let found = found.map(|found| is(&found.unwrap()).unwrap()).ok();
        found.unwrap_or_else(|| panic!("not so, but: {:?}", is(&self.found.borrow())))
    }

    async fn synced(&mut self) {
        timeout(Duration::from_secs(60), self.found.wait_for(|found| found.is_synced))
            .await
            .unwrap()
            .unwrap();
    }
}

fn pod(node: Option<&str>, status: Value) -> Value {
    json!({
        "metadata": { "name": "tiny-1", "namespace": "ml", "uid": "u-1", "labels": { "app": "tiny" },
            "creationTimestamp": "2026-11-24T20:00:00Z" },
        "spec": { "nodeName": node, "containers": [{ "name": "vllm", "ports": [{ "containerPort": 8000 }] }] },
        "status": status,
    })
}

fn status(container: Value, ready: bool) -> Value {
    json!({
        "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }],
        "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
        "containerStatuses": [{ "name": "vllm", "image": "x", "imageID": "", "ready": ready, "restartCount": 0, "state": container }],
    })
}

fn unschedulable() -> Value {
    json!({ "phase": "Pending", "conditions": [
        { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes" },
    ] })
}

fn event(server: &FakeApiServer, name: &str, uid: &str, reason: &str, message: &str) {
    let path = format!("/api/v1/namespaces/ml/events/{name}");
    server.put(
        &path,
        json!({ "metadata": { "name": name, "namespace": "ml" }, "reason": reason, "message": message,
            "involvedObject": { "kind": "Pod", "name": "tiny-1", "uid": uid } }),
    );
}

fn node(name: &str, ready: bool, created: &str) -> Value {
    json!({ "metadata": { "name": name, "creationTimestamp": created },
        "status": { "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }] } })
}

/// Returns the end of each observed phase, in milliseconds since `began`.
fn seen(start: &PodStart, began: Instant) -> Vec<(&'static str, u128)> {
    let mut seen: Vec<_> =
        start.moments.iter().map(|(phase, seen)| (*phase, (seen.at - began).as_millis())).collect();
    seen.sort();
    seen.into_iter().map(|(phase, ms)| (phase.name(), ms)).collect()
}

/// Advances the clock after all pending updates have been processed.
async fn wait(ms: u64) {
    tokio::time::sleep(Duration::from_millis(1)).await;
    advance(Duration::from_millis(ms - 1)).await;
}

#[tokio::test(start_paused = true)]
async fn failed_image_pull_shows_without_events() {
    let mut stage = StartsTest::new(|_| {});
    stage.synced().await;
    let waiting = json!({ "waiting": { "reason": "ErrImagePull", "message": "not found" } });
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-1"), status(waiting, false)));
    stage.start(|start| start.is_pulling).await;
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-1"), status(json!({ "running": {} }), false)));
    stage.start(|start| !start.is_pulling).await;
}

#[tokio::test(start_paused = true)]
async fn pod_phases_carry_observation_times() {
    let mut stage = StartsTest::new(|_| {});
    stage.synced().await;
    let began = Instant::now();
    stage.server.put(TINY_POD_PATH, pod(None, json!({})));
    let start = stage.start(|start| !start.moments.is_empty()).await;
    assert_eq!((&*start.name, start.node.as_deref()), ("ml/tiny-1", None));
    wait(20).await;
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-1"), json!({})));
    event(&stage.server, "e1", "u-1", "Pulling", "Pulling image \"x\"");
    event(&stage.server, "e2", "u-0", "Pulled", "Successfully pulled image \"x\" in 1s");
    assert_eq!(stage.start(|start| start.is_pulling).await.node.as_deref(), Some("gpu-1"));
    wait(300).await;
    event(&stage.server, "e3", "u-1", "Pulled", "Successfully pulled image \"x\" in 300ms");
    stage.start(|start| !start.is_pulling).await;
    wait(80).await;
    event(&stage.server, "e4", "u-1", "Started", "Container started");
    stage.start(|start| start.seen(Phase::Start).is_some()).await;
    // The pod's status follows later than the Events.
    wait(700).await;
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-1"), status(json!({ "running": {} }), false)));
    let start = stage.start(|start| start.address.is_some()).await;
    assert_eq!(start.address.as_deref(), Some("10.0.0.1:8000"), "as that of its endpoint");
    wait(5000).await;
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-1"), status(json!({ "running": {} }), true)));
    let start = stage.start(|start| start.moments.len() == 5).await;
    assert_eq!(
        seen(&start, began),
        [("create", 0), ("schedule", 20), ("pull", 320), ("start", 400), ("load", 6100)],
        "20 + 300 + 80 + 700 + 5000"
    );
    assert!(start.parts.is_empty() && start.tail.as_ref().unwrap().lines().is_empty());
    stage.server.remove(TINY_POD_PATH);
    timeout(Duration::from_secs(60), stage.found.wait_for(|found| found.starts.is_empty()))
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn pods_ready_before_discovery_are_not_tracked() {
    let up = pod(Some("gpu-1"), status(json!({ "running": {} }), true));
    let mut loading = pod(Some("gpu-1"), status(json!({ "running": {} }), false));
    loading["metadata"]["uid"] = "u-2".into();
    loading["metadata"]["name"] = "tiny-2".into();
    let mut stage = StartsTest::new(|server| {
        server.put(TINY_POD_PATH, up.clone());
        server.put("/api/v1/namespaces/ml/pods/tiny-2", loading);
    });
    let start = stage.start(|start| start.moments.len() == 3).await;
    assert_eq!(&*start.name, "ml/tiny-2");
    assert_eq!(stage.found.borrow().starts.len(), 1);
    // A pod that is ready at its first observation, as after an interrupted watch.
    let mut other = up;
    other["metadata"]["uid"] = "u-3".into();
    other["metadata"]["name"] = "tiny-0".into();
    stage.server.put("/api/v1/namespaces/ml/pods/tiny-0", other);
    assert_eq!(stage.start(|start| &*start.name == "ml/tiny-0").await.moments.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn node_created_for_pod_is_recorded() {
    let mut stage = StartsTest::new(|server| {
        server.put("/api/v1/nodes/old", node("old", true, "2026-11-20T00:00:00Z"));
    });
    stage.synced().await;
    let began = Instant::now();
    stage.server.put(TINY_POD_PATH, pod(None, unschedulable()));
    stage.start(|start| !start.moments.is_empty()).await;
    wait(60_000).await;
    stage.server.put(NODE, node("gpu-9", false, "2026-11-24T20:01:00Z"));
    wait(20_000).await;
    stage.server.put(NODE, node("gpu-9", true, "2026-11-24T20:01:00Z"));
    wait(1000).await;
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-9"), json!({})));
    let start = stage.start(|start| start.parts.len() == 2).await;
    let parts: Vec<_> =
        start.parts.iter().map(|part| (part.part.name(), (part.end - began).as_secs())).collect();
    assert_eq!(parts, [("node_create", 60), ("node_ready", 80)], "60 + 20");
    assert_eq!(seen(&start, began).last(), Some(&("schedule", 81_000)));
}

#[tokio::test(start_paused = true)]
async fn existing_or_forbidden_node_is_not_recorded() {
    for forbidden in [false, true] {
        let mut stage = StartsTest::new(|server| {
            server.put(NODE, node("gpu-9", true, "2026-11-20T00:00:00Z"));
            if forbidden {
                server.remove(NODE);
                server.forbid("GET", "/nodes");
            }
        });
        stage.synced().await;
        stage.server.put(TINY_POD_PATH, pod(None, unschedulable()));
        stage.start(|start| !start.moments.is_empty()).await;
        wait(60_000).await;
        if forbidden {
            stage.server.put(NODE, node("gpu-9", true, "2026-11-24T20:01:00Z"));
        }
        stage.server.put(TINY_POD_PATH, pod(Some("gpu-9"), json!({})));
        let start = stage.start(|start| start.node.is_some()).await;
        wait(1000).await;
        assert_eq!((start.moments.len(), start.parts.len()), (2, 0));
        assert!(stage.found.borrow().starts[0].parts.is_empty(), "{forbidden}");
    }
}

#[tokio::test(start_paused = true)]
async fn denied_events_hide_only_image_pulls() {
    let mut stage = StartsTest::new(|server| server.forbid("GET", "/events"));
    stage.synced().await;
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-1"), json!({})));
    stage.start(|start| start.moments.len() == 2).await;
    event(&stage.server, "e1", "u-1", "Pulled", "Successfully pulled image \"x\" in 1s");
    wait(1000).await;
    stage.server.put(TINY_POD_PATH, pod(Some("gpu-1"), status(json!({ "running": {} }), true)));
    let start = stage.start(|start| start.moments.len() == 4).await;
    assert!(start.moments.iter().all(|(phase, _)| *phase != Phase::Pull));
}

#[tokio::test(start_paused = true)]
async fn tracked_pods_are_capped() {
    let server = FakeApiServer::default();
    let mut starts = StartingPods::new(StartSources::new(&server.cluster()));
    let pods = |range: std::ops::Range<usize>, ready: bool| {
        let pods = range.map(|index| {
            let mut pod = pod(Some("gpu-1"), status(json!({ "running": {} }), ready));
            pod["metadata"]["uid"] = format!("u-{index}").into();
            pod["metadata"]["name"] = format!("tiny-{index:03}").into();
            Arc::new(serde_json::from_value(pod).unwrap())
        });
        pods.collect::<Vec<Arc<Pod>>>()
    };
    let none = |_: &Pod| Vec::new();
    starts.update(&pods(0..MAX_TRACKED_PODS + 1, false), &[], true, none);
    assert_eq!(starts.all().len(), MAX_TRACKED_PODS);
    // The first pod becomes ready, which makes room for another one.
    let mut all = pods(0..1, true);
    all.extend(pods(1..MAX_TRACKED_PODS + 2, false));
    starts.update(&all, &[], true, none);
    let names: Vec<_> = starts.all().iter().map(|start| start.name.clone()).collect();
    assert_eq!((names.len(), &*names[0]), (MAX_TRACKED_PODS, "ml/tiny-001"));
    assert_eq!(
        names.last().map(|name| &**name),
        Some("ml/tiny-065"),
        "the one that came when there was none is not"
    );
}

/// Returns the pod with a running container that was restarted this many times.
fn run(restarts: u32, ready: bool) -> Value {
    let mut status = status(json!({ "running": {} }), ready);
    status["containerStatuses"][0]["restartCount"] = restarts.into();
    pod(Some("gpu-1"), status)
}

fn parts(start: &PodStart, began: Instant) -> Vec<(&'static str, u64)> {
    start.parts.iter().map(|part| (part.part.name(), (part.end - began).as_secs())).collect()
}

#[tokio::test(start_paused = true)]
async fn pod_log_yields_load_parts_until_ready() {
    let mut stage = StartsTest::new(|_| {});
    stage.synced().await;
    let began = Instant::now();
    stage.server.put(TINY_POD_PATH, run(0, false));
    let tail = stage.start(|start| start.tail.is_some()).await.tail.clone().unwrap();
    wait(30_000).await;
    stage.server.append_log(TINY_POD_PATH, "2026-11-24T20:00:30Z Starting to load model org/name...\n");
    let start = stage.start(|start| !start.parts.is_empty()).await;
    assert_eq!(parts(&start, began), [("engine_start", 30)]);
    wait(10_000).await;
    stage.server.append_log(
        TINY_POD_PATH,
        "2026-11-24T20:00:40Z Loading weights took 9.50 seconds\n2026-11-24T20:00:40Z CUDA error\n",
    );
    let start = stage.start(|start| start.parts.len() == 2).await;
    assert_eq!(parts(&start, began), [("engine_start", 30), ("weights", 40)], "30 + 10");
    wait(1000).await;
    assert_eq!(tail.lines().last().map(|line| &**line), Some("CUDA error"));
    // The container exits and is restarted.
    stage.server.restart_log(TINY_POD_PATH);
    stage.server.put(TINY_POD_PATH, run(1, false));
    stage.start(|start| start.parts.is_empty()).await;
    wait(20_000).await;
    stage.server.append_log(TINY_POD_PATH, "2026-11-24T20:01:01Z Starting to load model org/name...\n");
    let start = stage.start(|start| !start.parts.is_empty()).await;
    assert_eq!(parts(&start, began), [("engine_start", 61)], "30 + 10 + 1 + 20");
    stage.server.put(TINY_POD_PATH, run(1, true));
    stage.start(|start| start.seen(Phase::Load).is_some()).await;
    stage.server.append_log(TINY_POD_PATH, "2026-11-24T20:01:20Z Loading weights took 9.50 seconds\n");
    wait(1000).await;
    assert_eq!(stage.found.borrow().starts[0].parts.len(), 1, "what it prints while it serves is not read");
}

#[tokio::test(start_paused = true)]
async fn early_log_line_moves_container_start() {
    let mut stage = StartsTest::new(|_| {});
    stage.synced().await;
    let began = Instant::now();
    stage.server.append_log(TINY_POD_PATH, "2026-11-24T20:00:10Z Starting to load model org/name...\n");
    wait(30_000).await;
    stage.server.put(TINY_POD_PATH, run(0, false));
    let start = stage.start(|start| !start.parts.is_empty()).await;
    let ran = |start: &PodStart| start.seen(Phase::Start).map(|seen| (seen.at - began).as_secs());
    assert_eq!((parts(&start, began), ran(&start)), (vec![("engine_start", 30)], Some(30)));
    wait(10_000).await;
    stage.server.append_log(TINY_POD_PATH, "2026-11-24T20:00:40Z Loading weights took 9.50 seconds\n");
    let start = stage.start(|start| start.parts.len() == 2).await;
    assert_eq!(parts(&start, began), [("engine_start", 10), ("weights", 40)], "40 - 30 before the weights");
    assert_eq!(ran(&start), Some(10), "it has printed, so it ran");
}

#[tokio::test(start_paused = true)]
async fn logs_are_read_if_enabled_and_permitted() {
    let mut stage = StartsTest::new(|server| server.forbid("GET", "/log"));
    stage.synced().await;
    stage.server.append_log(TINY_POD_PATH, "2026-11-24T20:00:30Z Starting to load model org/name...\n");
    stage.server.put(TINY_POD_PATH, run(0, false));
    let tail = stage.start(|start| start.tail.is_some()).await.tail.clone().unwrap();
    wait(10_000).await;
    assert!(tail.lines().is_empty(), "no right to it");

    let server = FakeApiServer::default();
    let source = ContainerRef { namespace: "ml".into(), pod: "tiny-1".into(), container: "vllm".into() };
    assert!(PodLogs::new(server.cluster()).follow(source).is_none(), "not wanted");
}

#[tokio::test(start_paused = true)]
async fn dead_pods_do_not_start() {
    let mut evicted = pod(Some("gpu-1"), status(json!({ "terminated": { "exitCode": 137 } }), false));
    evicted["status"]["phase"] = "Failed".into();
    evicted["metadata"]["uid"] = "u-0".into();
    evicted["metadata"]["name"] = "tiny-0".into();
    let mut stage = StartsTest::new(|server| server.put("/api/v1/namespaces/ml/pods/tiny-0", evicted));
    stage.server.put(TINY_POD_PATH, pod(None, unschedulable()));
    let start = stage.start(|start| !start.moments.is_empty()).await;
    assert_eq!(&*start.name, "ml/tiny-1", "it waits for a node, whatever the other one had reached");
    // A pod that fails during its start is removed as well.
    let mut failed = pod(Some("gpu-1"), status(json!({ "running": {} }), false));
    failed["status"]["phase"] = "Failed".into();
    stage.server.put(TINY_POD_PATH, failed);
    timeout(Duration::from_secs(60), stage.found.wait_for(|found| found.starts.is_empty()))
        .await
        .unwrap()
        .unwrap();
}
