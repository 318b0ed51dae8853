use serde_json::json;
use tokio::time::sleep;

use super::*;
use crate::{
    coldstart::ColdStarts,
    domain::{ClusterTarget, EndpointSource, Policy, ServicePort, Target},
    kube::{Endpoints, stand_in::FakeApiServer},
    state::Endpoint,
};

const OBSTACLE_SCALED_OBJECT_PATH: &str = "/apis/keda.sh/v1alpha1/namespaces/team-a/scaledobjects/chat";
const OBSTACLE_MODEL_ROUTE_PATH: &str = "/apis/anteroom.dev/v1alpha1/namespaces/team-a/modelroutes/chat";

const OBSTACLE_DEPLOYMENT_PATH: &str = "/apis/apps/v1/namespaces/team-a/deployments/vllm";

fn deployment(replicas: u32) -> serde_json::Value {
    json!({ "metadata": { "name": "vllm", "namespace": "team-a" },
        "spec": { "replicas": replicas, "selector": { "matchLabels": { "app": "vllm" } } } })
}

const OBSTACLE_SERVICE_PATH: &str = "/api/v1/namespaces/team-a/services/vllm";
const OBSTACLE_POD_PATH: &str = "/api/v1/namespaces/team-a/pods/vllm-1";

/// Returns a Service that selects pods by the label `app`.
fn service(app: &str) -> serde_json::Value {
    json!({ "metadata": { "name": "vllm", "namespace": "team-a" },
        "spec": { "selector": { "app": app }, "ports": [{ "port": 8000, "targetPort": 8000 }] } })
}

fn pod(ready: bool) -> serde_json::Value {
    json!({
        "metadata": { "name": "vllm-1", "namespace": "team-a", "uid": "u-1", "labels": { "app": "vllm" } },
        "spec": { "nodeName": "gpu-1", "containers": [
            { "name": "vllm", "ports": [{ "containerPort": 8001 }], "readinessProbe": { "periodSeconds": 5 } },
        ] },
        "status": {
            "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }],
            "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
        },
    })
}

struct ObstaclesTest {
    server: FakeApiServer,
    gate: Arc<Gate>,
    cold_starts: Arc<ColdStarts>,
    _cluster: Cluster,
}

impl ObstaclesTest {
    fn new() -> Self {
        let server = FakeApiServer::default();
        server.put(
            OBSTACLE_MODEL_ROUTE_PATH,
            json!({ "metadata": { "name": "chat", "namespace": "team-a", "uid": "u-1" } }),
        );
        server.put(OBSTACLE_DEPLOYMENT_PATH, deployment(0));
        let cluster = server.cluster();
        let route = json!({ "name": "team-a/chat", "target": { "url": "http://vllm:8000" } });
        let mut route: Route = serde_json::from_value(route).unwrap();
        route.target = Target::Cluster(ClusterTarget {
            namespace: "team-a".into(),
            source: EndpointSource::Service { name: "vllm".into(), port: ServicePort::Number(8000) },
            gateway: None,
            roles: <_>::default(),
        });
        let routes = watch::Sender::new(Arc::new(vec![Arc::new(route)]));
        server.put(OBSTACLE_SERVICE_PATH, service("vllm"));
        let pods = PodWatches::new(cluster.clone());
        let discovery = Arc::new(Endpoints::new(cluster.clone(), pods.clone()));
        let mut options = scaler::Options { discovery, ..scaler::Options::default() };
        let obstacles = ObstacleSources::new(&cluster, pods, routes.subscribe(), &mut options);
        let cold_starts = ColdStarts::new(|_| {});
        let gate = Gate::new("team-a/chat".into(), Policy::default(), cold_starts.clone());
        let gates = vec![gate.clone()];
        cluster.spawn(async move {
            let _routes = routes;
            update_gates(move || gates.clone(), obstacles.notifier).await;
        });
        Self { server, gate, cold_starts, _cluster: cluster }
    }

    fn scaled_object(&self, paused: bool) {
        self.scaled_object_that_lists(paused, &["s0-chat-queue-depth"]);
    }

    fn scaled_object_that_lists(&self, paused: bool, names: &[&str]) {
        let object = json!({
            "metadata": { "name": "chat", "namespace": "team-a",
                "annotations": { "autoscaling.keda.sh/paused": paused.to_string() } },
            "spec": { "scaleTargetRef": { "name": "vllm" }, "triggers": [{ "type": "external-push", "metadata": { "route": "chat", "scalerAddress": "a:1" } }] },
            "status": { "externalMetricNames": names },
        });
        self.server.put(OBSTACLE_SCALED_OBJECT_PATH, object);
    }

    /// Waits 1.5 s, and returns the obstacle of the target.
    async fn obstacle(&self) -> Option<ObstacleKind> {
        sleep(Duration::from_millis(1500)).await;
        self.gate.target().obstacle().map(|obstacle| obstacle.kind)
    }

    /// Creates a stage with one desired replica and an open stream from KEDA.
    async fn scaled_up() -> Self {
        let stage = Self::new();
        stage.scaled_object(false);
        stage.server.put(OBSTACLE_DEPLOYMENT_PATH, deployment(1));
        assert_eq!(stage.obstacle().await, None);
        stage
    }

    /// Asserts that no obstacle is reported after 4 s, and returns the obstacle reported after 8 s.
    async fn settled_obstacle(&self) -> (Option<ObstacleKind>, String) {
        sleep(Duration::from_secs(4)).await;
        assert!(self.gate.target().obstacle().is_none(), "it may be transient");
        sleep(Duration::from_secs(4)).await;
        let obstacle = self.gate.target().obstacle();
        let message = obstacle.as_ref().map(|obstacle| obstacle.message.to_string());
        (obstacle.map(|obstacle| obstacle.kind), message.unwrap_or_default())
    }

    fn reasons(&self) -> Vec<String> {
        let events = self.server.objects("/events/");
        events.iter().map(|event| event["reason"].as_str().unwrap().to_owned()).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn gate_and_cluster_exchange_obstacles() {
    let stage = ObstaclesTest::new();
    assert_eq!(
        stage.obstacle().await,
        Some(ObstacleKind::NoScaledObject),
        "held requests see it immediately"
    );
    sleep(Duration::from_secs(3)).await;
    assert!(stage.reasons().is_empty(), "1.5 + 3 s: within the grace of 5 s");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(stage.reasons(), ["NoScaledObject"], "6.5 s");
    let event = &stage.server.objects("/events/")[0];
    assert_eq!((&event["regarding"]["kind"], &event["type"]), (&json!("ModelRoute"), &json!("Warning")));
    stage.scaled_object(true);
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::AutoscalingPaused));
    sleep(Duration::from_secs(300)).await;
    assert_eq!(stage.reasons().len(), 2, "one event each, however long it lasts: {:?}", stage.reasons());
    assert!(stage.gate.hold(1, true).is_err());
    stage.scaled_object(false);
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::NoKedaStream), "there never was one");
    let _open = crate::admission::OpenStream::new(stage.gate.clone());
    assert_eq!(stage.obstacle().await, None);
}

#[tokio::test(start_paused = true)]
async fn scaled_object_right_after_its_route_is_seen() {
    let stage = ObstaclesTest::new();
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::NoScaledObject));
    stage.scaled_object(true);
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::AutoscalingPaused));
    stage.server.remove(OBSTACLE_SCALED_OBJECT_PATH);
    sleep(Duration::from_secs(10)).await;
    stage.scaled_object(true);
    sleep(Duration::from_secs(10)).await;
    let mut reasons = stage.reasons();
    reasons.sort();
    assert_eq!(reasons, ["AutoscalingPaused", "NoScaledObject"], "the pause twice, which is one event");
}

#[tokio::test(start_paused = true)]
async fn record_has_the_time_of_the_scale_up() {
    let stage = ObstaclesTest::new();
    stage.scaled_object(false);
    let _open = crate::admission::OpenStream::new(stage.gate.clone());
    assert_eq!(stage.obstacle().await, None);
    let tracker = stage.gate.cold_starts();
    tracker.begin(Instant::now(), 1);
    sleep(Duration::from_millis(70)).await;
    stage.server.put(OBSTACLE_DEPLOYMENT_PATH, deployment(1));
    sleep(Duration::from_millis(100)).await;
    stage.server.put(OBSTACLE_DEPLOYMENT_PATH, deployment(3));
    sleep(Duration::from_secs(2)).await;
    tracker.failed("no GPU".into(), Vec::new());
    let [record] = stage.cold_starts.recent(None, 2).try_into().unwrap();
    let scale = record.phase(Phase::Scale).unwrap();
    assert_eq!((scale.start_ms, scale.duration_ms), (0.0, 70.0), "and not when the number rose further");
}

#[tokio::test(start_paused = true)]
async fn keda_has_ten_seconds_to_open_its_stream() {
    let stage = ObstaclesTest::new();
    stage.scaled_object(false);
    let open = crate::admission::OpenStream::new(stage.gate.clone());
    sleep(Duration::from_secs(100)).await;
    drop(open);
    sleep(Duration::from_secs(8)).await;
    assert_eq!(stage.obstacle().await, None, "9.5 s");
    sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::NoKedaStream), "12 s");
}

#[tokio::test(start_paused = true)]
async fn dropped_pushes_are_an_obstacle() {
    let stage = ObstaclesTest::new();
    stage.scaled_object_that_lists(false, &["s1-prometheus"]);
    let _open = crate::admission::OpenStream::new(stage.gate.clone());
    assert_eq!(stage.obstacle().await, None, "1.5 s");
    let receiver = || stage.gate.demand().receiver("team-a", "chat").unwrap();
    assert_eq!((receiver().is_listed, receiver().is_scaled), (false, Some(false)));
    sleep(Duration::from_secs(9)).await;
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::PushDropped), "12 s");
    assert_eq!(stage.reasons(), ["PushDropped"]);
    let mut changes = stage.gate.demand().changes();
    changes.mark_unchanged();
    stage.scaled_object(false);
    changes.changed().await.unwrap();
    assert!(receiver().is_listed, "the pusher is woken");
    assert_eq!(stage.obstacle().await, None);
    stage.server.put(OBSTACLE_DEPLOYMENT_PATH, deployment(1));
    sleep(Duration::from_millis(100)).await;
    assert_eq!(receiver().is_scaled, Some(true));
}

#[tokio::test(start_paused = true)]
async fn misspelt_scaled_object_is_reported_at_the_route() {
    let stage = ObstaclesTest::new();
    let object = json!({
        "metadata": { "name": "vllm", "namespace": "team-a" },
        "spec": { "scaleTargetRef": { "name": "vllm" }, "triggers": [{ "type": "external-push", "metadata": { "route": "caht" } }] },
    });
    stage.server.put("/apis/keda.sh/v1alpha1/namespaces/team-a/scaledobjects/vllm", object);
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::NoScaledObject));
    let message = stage.gate.target().obstacle().unwrap().message.clone();
    assert!(
        message.ends_with("; ScaledObject `team-a/vllm` names `caht`, which is not a route"),
        "{message}"
    );
}

#[tokio::test(start_paused = true)]
async fn ready_target_has_no_obstacle() {
    let stage = ObstaclesTest::new();
    stage.scaled_object(true);
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::AutoscalingPaused));
    let endpoint = Endpoint::new("10.0.0.1:8000", 0);
    stage.gate.target().add(&endpoint);
    stage.gate.target().ready(&endpoint, None);
    assert_eq!(stage.obstacle().await, None);
    let mut held = stage.gate.hold(1, true).unwrap();
    stage.gate.target().remove(&endpoint);
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::AutoscalingPaused));
    assert!(matches!(held.released().await, crate::hold::ReleaseOutcome::Failed(..)));
}

#[tokio::test(start_paused = true)]
async fn missing_service_or_port_is_reported_in_10_s() {
    let stage = ObstaclesTest::scaled_up().await;
    stage.server.remove(OBSTACLE_SERVICE_PATH);
    let (kind, message) = stage.settled_obstacle().await;
    assert_eq!(kind, Some(ObstacleKind::NoService));
    assert!(message.starts_with("The Service team-a/vllm does not exist"), "{message}");
    let mut elsewhere = service("vllm");
    elsewhere["spec"]["ports"][0]["port"] = json!(80);
    stage.server.put(OBSTACLE_SERVICE_PATH, elsewhere);
    assert_eq!(stage.obstacle().await, Some(ObstacleKind::NoService));
    let message = stage.gate.target().obstacle().unwrap().message.clone();
    assert!(message.contains("has no TCP port 8000; it has: 80"), "{message}");
    stage.server.put(OBSTACLE_SERVICE_PATH, service("vllm"));
    assert_eq!(stage.obstacle().await, None);
    assert_eq!(stage.reasons(), ["NoService", "NoService"], "each is reported once");
}

#[tokio::test(start_paused = true)]
async fn service_without_pods_is_reported_after_10_s() {
    let stage = ObstaclesTest::scaled_up().await;
    stage.server.put(OBSTACLE_SERVICE_PATH, service("chat"));
    sleep(Duration::from_secs(60)).await;
    assert_eq!(stage.obstacle().await, None, "there is no pod yet that it could select");
    stage.server.put(OBSTACLE_POD_PATH, pod(false));
    let (kind, message) = stage.settled_obstacle().await;
    assert_eq!(kind, Some(ObstacleKind::NoPodsSelected));
    assert!(message.contains("it wants the labels app=chat, and pod `vllm-1` has app=vllm"), "{message}");
    stage.server.put(OBSTACLE_SERVICE_PATH, service("vllm"));
    assert_eq!(stage.obstacle().await, None);
}

#[tokio::test(start_paused = true)]
async fn refusing_port_is_reported_in_10_s() {
    let stage = ObstaclesTest::scaled_up().await;
    stage.server.put(OBSTACLE_POD_PATH, pod(true));
    assert_eq!(stage.obstacle().await, None);
    // Marks the address as refusing connections, as the prober does.
    stage.gate.target().set_refusing("10.0.0.1:8000", true);
    sleep(Duration::from_secs(7)).await;
    let obstacle = stage.gate.target().obstacle().unwrap();
    assert_eq!(obstacle.kind, ObstacleKind::PortRefused);
    let message = &obstacle.message;
    assert!(message.contains("leads port 8000 to 8000, and its containers expose 8001"), "{message}");
    stage.gate.target().set_refusing("10.0.0.1:8000", false);
    assert_eq!(stage.obstacle().await, None);
}

#[tokio::test(start_paused = true)]
async fn volume_and_probe_are_reported_as_by_the_node() {
    let stage = ObstaclesTest::scaled_up().await;
    let mut mounting = pod(false);
    mounting["status"]["phase"] = json!("Pending");
    stage.server.put(OBSTACLE_POD_PATH, mounting);
    assert_eq!(stage.obstacle().await, None);
    let event = |name: &str, reason: &str, message: &str| {
        stage.server.put(
            &format!("/api/v1/namespaces/team-a/events/{name}"),
            json!({ "metadata": { "name": name, "namespace": "team-a" }, "reason": reason, "message": message,
                "involvedObject": { "kind": "Pod", "name": "vllm-1", "uid": "u-1" } }),
        );
    };
    event("e1", "FailedMount", "MountVolume.SetUp failed for volume \"models\" : secret \"s3\" not found");
    let (kind, message) = stage.settled_obstacle().await;
    assert_eq!(kind, Some(ObstacleKind::Volume));
    assert!(message.contains("`vllm-1`") && message.contains("secret \"s3\" not found"), "{message}");
    event("e2", "Started", "Container started");
    assert_eq!(stage.obstacle().await, None);
    event("e3", "Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 404");
    let (kind, message) = stage.settled_obstacle().await;
    assert_eq!(kind, Some(ObstacleKind::NotReady));
    assert!(message.ends_with("Readiness probe failed: HTTP probe failed with statuscode: 404"), "{message}");
}
