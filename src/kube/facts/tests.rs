use serde_json::{Value, json};

use super::*;
use crate::{
    domain::{ClusterTarget, EndpointSource, ObstacleKind, ServicePort, Workload},
    kube::{Endpoints, reasons::ProxyView, scaled_objects::PAUSED_ANNOTATION, stand_in::FakeApiServer},
    state::NoDiscovery,
};

const FACTS_SCALED_OBJECT_PATH: &str = "/apis/keda.sh/v1alpha1/namespaces/team-a/scaledobjects/chat";
const FACTS_DEPLOYMENT_PATH: &str = "/apis/apps/v1/namespaces/team-a/deployments/vllm";
const POD_PATH: &str = "/api/v1/namespaces/team-a/pods/vllm-1";

/// Creates a cluster route to a Service for a name with a namespace, else a route of the file.
fn route(name: &str) -> Route {
    let target = json!({ "url": "http://vllm:8000" });
    let mut route: Route = serde_json::from_value(json!({ "name": name, "target": target })).unwrap();
    if let Some((namespace, _)) = name.split_once('/') {
        route.target = Target::Cluster(ClusterTarget {
            namespace: namespace.into(),
            source: EndpointSource::Service { name: "vllm".into(), port: ServicePort::Number(8000) },
            gateway: None,
            roles: <_>::default(),
        });
    }
    route
}

fn scaled_object(paused: &str, route: &str) -> Value {
    json!({
        "metadata": { "name": "chat", "namespace": "team-a", "annotations": { PAUSED_ANNOTATION: paused } },
        "spec": {
            "scaleTargetRef": { "name": "vllm" },
            "triggers": [{ "type": "external-push", "metadata": { "scalerAddress": "a:9090", "route": route } }],
        },
    })
}

fn deployment(replicas: u32) -> Value {
    json!({
        "metadata": { "name": "vllm", "namespace": "team-a" },
        "spec": { "replicas": replicas, "selector": { "matchLabels": { "app": "vllm" } } },
    })
}

fn service() -> Value {
    json!({ "metadata": { "name": "vllm", "namespace": "team-a" },
        "spec": { "selector": { "app": "vllm" }, "ports": [{ "port": 8000 }] } })
}

struct FactsTest {
    server: FakeApiServer,
    facts: watch::Receiver<Arc<AllFacts>>,
    _routes: watch::Sender<Arc<Vec<Arc<Route>>>>,
    _refusals: watch::Sender<Arc<HashMap<WorkloadRef, Arc<str>>>>,
    _cluster: Cluster,
}

impl FactsTest {
    fn new(routes: &[&str]) -> Self {
        let server = FakeApiServer::default();
        let cluster = server.cluster();
        let routes =
            watch::Sender::new(Arc::new(routes.iter().map(|name| Arc::new(route(name))).collect::<Vec<_>>()));
        let refusals = watch::Sender::default();
        let pods = PodWatches::new(cluster.clone());
        server.put("/api/v1/namespaces/team-a/services/vllm", service());
        let discovery = Arc::new(Endpoints::new(cluster.clone(), pods.clone()));
        let scaled = cluster.scaled_objects();
        let facts = cluster.facts(routes.subscribe(), scaled, refusals.subscribe(), pods, discovery);
        Self { server, facts, _routes: routes, _refusals: refusals, _cluster: cluster }
    }

    /// Waits until `kind` is the obstacle of the route, and returns its message.
    async fn await_obstacle(&mut self, route: &str, kind: Option<ObstacleKind>) -> String {
        let key = RouteKey::from(route);
        let waiting = self.facts.wait_for(|facts| {
            let obstacle = facts.get(&key).and_then(|facts| facts.obstacle(&key, &ProxyView::default()));
            facts.contains_key(&key) && obstacle.map(|trouble| trouble.kind) == kind
        });
        let facts = tokio::time::timeout(Duration::from_secs(60), waiting).await;
        let facts = facts.unwrap_or_else(|_| panic!("not {kind:?} of {route}")).unwrap();
        facts[&key]
            .obstacle(&key, &ProxyView::default())
            .map(|trouble| trouble.message.to_string())
            .unwrap_or_default()
    }
}

#[tokio::test(start_paused = true)]
async fn facts_follow_scaled_object_to_pods() {
    use ObstacleKind::{AutoscalingPaused, ImagePull, NoScaledObject};
    let mut stage = FactsTest::new(&["team-a/chat"]);
    stage.await_obstacle("team-a/chat", Some(NoScaledObject)).await;
    stage.server.put(FACTS_DEPLOYMENT_PATH, deployment(0));
    stage.server.put(FACTS_SCALED_OBJECT_PATH, scaled_object("true", "chat"));
    stage.await_obstacle("team-a/chat", Some(AutoscalingPaused)).await;
    stage.server.put(FACTS_SCALED_OBJECT_PATH, scaled_object("false", "chat"));
    stage.await_obstacle("team-a/chat", None).await;
    stage.server.put(FACTS_DEPLOYMENT_PATH, deployment(1));
    stage.server.put(
        POD_PATH,
        json!({
            "metadata": { "name": "vllm-1", "namespace": "team-a", "labels": { "app": "vllm" } },
            "status": { "phase": "Pending", "containerStatuses": [{
                "name": "vllm", "image": "vllm:none", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": { "reason": "ErrImagePull", "message": "not found" } },
            }] },
        }),
    );
    let message = stage.await_obstacle("team-a/chat", Some(ImagePull)).await;
    assert!(message.contains("vllm:none"), "{message}");
    stage.server.remove(POD_PATH);
    stage.await_obstacle("team-a/chat", None).await;
    stage.server.remove(FACTS_SCALED_OBJECT_PATH);
    stage.server.put(FACTS_DEPLOYMENT_PATH, deployment(0));
    stage.await_obstacle("team-a/chat", Some(NoScaledObject)).await;
}

#[tokio::test(start_paused = true)]
async fn file_route_can_be_named_from_any_namespace() {
    let mut stage = FactsTest::new(&["chat", "team-a/other"]);
    stage.server.put(FACTS_SCALED_OBJECT_PATH, scaled_object("true", "chat"));
    stage.await_obstacle("chat", Some(ObstacleKind::AutoscalingPaused)).await;
    stage.await_obstacle("team-a/other", Some(ObstacleKind::NoScaledObject)).await;
    stage.server.remove(FACTS_SCALED_OBJECT_PATH);
    stage.await_obstacle("chat", None).await;
}

#[tokio::test(start_paused = true)]
async fn missing_keda_is_reported() {
    let server = FakeApiServer::default();
    server.uninstall_group("keda.sh");
    let cluster = server.cluster();
    let routes = watch::Sender::new(Arc::new(vec![Arc::new(route("team-a/chat"))]));
    let refusals = watch::Sender::default();
    let pods = PodWatches::new(cluster.clone());
    let scaled = cluster.scaled_objects();
    let facts = cluster.facts(routes.subscribe(), scaled, refusals.subscribe(), pods, Arc::new(NoDiscovery));
    let mut stage = FactsTest { server, facts, _routes: routes, _refusals: refusals, _cluster: cluster };
    let message = stage.await_obstacle("team-a/chat", Some(ObstacleKind::NoScaledObject)).await;
    assert!(message.contains("KEDA is not installed"), "{message}");
    stage.server.install_all_groups();
    stage.server.put(FACTS_SCALED_OBJECT_PATH, scaled_object("false", "chat"));
    stage.await_obstacle("team-a/chat", None).await;
}

#[test]
fn url_route_is_not_a_cluster_route() {
    let to_pods = route("team-a/chat");
    let to_url = Route { target: Target::Url("http://vllm:8000".into()), ..to_pods.clone() };
    let obstacle = |route: &Route| {
        scaling_facts(route, &[], KedaState::Known)
            .obstacle(&route.name, &ProxyView::default())
            .map(|trouble| trouble.kind)
    };
    assert_eq!((obstacle(&to_pods), obstacle(&to_url)), (Some(ObstacleKind::NoScaledObject), None));
}

#[test]
fn route_workload_precedes_scaled_objects() {
    let object: ScaledObject = serde_json::from_value(scaled_object("false", "chat")).unwrap();
    let trigger = object.triggers().next().unwrap();
    let scaled = [(&object, trigger)];
    let mut cluster_route = route("team-a/chat");
    let names = |route: &Route, scaled: &[_]| {
        workloads(route, scaled).into_iter().map(|workload| workload.full_name()).collect::<Vec<_>>()
    };
    assert_eq!(names(&cluster_route, &scaled), ["Deployment `team-a/vllm`"]);
    assert_eq!(names(&cluster_route, &[]), [""; 0]);
    let workload = Workload { api_version: "apps/v1".into(), kind: "StatefulSet".into(), name: "own".into() };
    cluster_route.workload = Some(workload);
    assert_eq!(names(&cluster_route, &scaled), ["StatefulSet `team-a/own`"]);
}

#[tokio::test(start_paused = true)]
async fn evicted_pod_defers_to_scheduler_reason() {
    let mut stage = FactsTest::new(&["team-a/chat"]);
    let pod = |name: &str, created: &str, status: Value| {
        json!({
            "metadata": { "name": name, "namespace": "team-a", "labels": { "app": "vllm" }, "creationTimestamp": created,
                "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "vllm-5d4f9c", "uid": "r",
                    "controller": true }] },
            "status": status,
        })
    };
    let at = |replicas: u32, time: &str| {
        let mut deployment = deployment(replicas);
        deployment["metadata"]["managedFields"] = json!([{ "manager": "keda", "operation": "Update", "time": time,
            "fieldsType": "FieldsV1", "fieldsV1": { "f:spec": { "f:replicas": {} } } }]);
        deployment
    };
    let evicted = json!({ "phase": "Failed", "reason": "Evicted" });
    stage.server.put("/api/v1/namespaces/team-a/pods/vllm-0", pod("vllm-0", "2026-11-29T07:00:00Z", evicted));
    stage.server.put(FACTS_SCALED_OBJECT_PATH, scaled_object("false", "chat"));
    stage.server.put(FACTS_DEPLOYMENT_PATH, at(0, "2026-11-29T08:00:00Z"));
    stage.await_obstacle("team-a/chat", None).await;
    stage.server.put(FACTS_DEPLOYMENT_PATH, at(1, "2026-11-29T10:00:00Z"));
    tokio::time::sleep(Duration::from_secs(61)).await;
    stage.await_obstacle("team-a/chat", None).await;
    let no_node = json!({ "phase": "Pending", "conditions": [
        { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes" },
    ] });
    stage.server.put(POD_PATH, pod("vllm-1", "2026-11-29T10:00:00Z", no_node));
    let message = stage.await_obstacle("team-a/chat", Some(ObstacleKind::Unschedulable)).await;
    assert!(message.contains("vllm-1"), "{message}");
    stage.server.put(POD_PATH, pod("vllm-1", "2026-11-29T10:00:00Z", json!({ "phase": "Pending" })));
    stage.await_obstacle("team-a/chat", None).await;
}
