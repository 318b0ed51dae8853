//! On a paused clock, against an API server within the process.

use serde_json::{Value, json};

use super::*;
use crate::{
    config::{Config, Kubernetes},
    kube::{report::RouteState, stand_in::FakeApiServer},
};

const TINY_ROUTE_PATH: &str = "/apis/anteroom.dev/v1alpha1/namespaces/models/modelroutes/tiny";
const INTERCEPTOR_ROUTE_PATH: &str = "/apis/http.keda.sh/v1beta1/namespaces/models/interceptorroutes/app";

fn objects(api: &FakeApiServer) {
    let meta = |name: &str, generation: u32| json!({"name": name, "namespace": "models", "generation": generation, "creationTimestamp": "2026-01-01T00:00:00Z"});
    let spec = json!({"target": {"service": {"name": "vllm", "port": 8000}}});
    api.put(TINY_ROUTE_PATH, json!({"metadata": meta("tiny", 3), "spec": spec}));
    let spec = json!({"target": {"service": "front", "port": 80}, "rules": [{"hosts": ["a.example.com"]}]});
    api.put(INTERCEPTOR_ROUTE_PATH, json!({"metadata": meta("app", 1), "spec": spec}));
}

/// A replica of the proxy that only writes status.
struct StatusReplica {
    cluster: Cluster,
    reports: watch::Sender<Arc<RouteReports>>,
    counts: Arc<StatusCounts>,
    _file: watch::Sender<Arc<Vec<crate::domain::Route>>>,
}

impl StatusReplica {
    fn new(api: &FakeApiServer) -> Self {
        let (file, of_file) = watch::channel(Arc::default());
        let kubernetes = Kubernetes::default();
        let cluster = api.cluster_with(&kubernetes);
        let config = Config { kubernetes: Some(kubernetes), ..Config::default() };
        let (objects, routes) = cluster.routes(config, of_file);
        let (reports, of_gates) = watch::channel(Arc::default());
        let counts = cluster.write_status(objects, routes, of_gates);
        Self { cluster, reports, counts, _file: file }
    }

    fn report(&self, report: RouteReport) {
        self.reports.send_replace(Arc::new([("models/tiny".into(), report)].into()));
    }

    fn written(&self) -> u64 {
        self.counts.written.load(Ordering::Relaxed)
    }
}

fn condition(status: &Value, kind: &str) -> (String, String, i64) {
    let all = status["conditions"].as_array().unwrap();
    let one = all.iter().find(|condition| condition["type"] == kind).unwrap();
    assert!(one["lastTransitionTime"].as_str().unwrap().ends_with('Z'));
    let text = |key: &str| one[key].as_str().unwrap().to_owned();
    (text("status"), text("reason"), one["observedGeneration"].as_i64().unwrap())
}

#[tokio::test(start_paused = true)]
async fn both_kinds_get_their_status_once() {
    let api = FakeApiServer::default();
    objects(&api);
    let replica = StatusReplica::new(&api);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(api.object(TINY_ROUTE_PATH)["status"], Value::Null, "nothing is known of it yet");
    replica.report(RouteReport::default());
    sleep(Duration::from_secs(5)).await;
    let status = &api.object(TINY_ROUTE_PATH)["status"];
    assert_eq!(condition(status, "Accepted"), ("True".into(), "Accepted".into(), 3));
    assert_eq!(condition(status, "Ready"), ("False".into(), "Idle".into(), 3));
    assert_eq!(condition(status, "Scalable").0, "Unknown");
    assert_eq!((&status["state"], &status["target"]), (&json!("idle"), &json!("service vllm:8000")));
    assert_eq!((&status["observedGeneration"], &status["held"]), (&json!(3), &json!(0)));
    assert_eq!(
        condition(&api.object(INTERCEPTOR_ROUTE_PATH)["status"], "Ready"),
        ("True".into(), "Accepted".into(), 1)
    );

    // The watch delivers our own writes as changes, which cause no further write.
    sleep(Duration::from_secs(600)).await;
    assert_eq!((replica.written(), api.changes().len()), (2, 2));

    replica.report(RouteReport {
        state: RouteState::Ready,
        ready: 1,
        endpoints: 1,
        ..RouteReport::default()
    });
    sleep(Duration::from_secs(5)).await;
    assert_eq!(condition(&api.object(TINY_ROUTE_PATH)["status"], "Ready").0, "True");
    assert_eq!(replica.written(), 3);
    replica.cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_of_two_replicas_writes() {
    let api = FakeApiServer::default();
    objects(&api);
    let (one, other) = (StatusReplica::new(&api), StatusReplica::new(&api));
    one.report(RouteReport { state: RouteState::Starting, held: 2, ..RouteReport::default() });
    sleep(Duration::from_secs(5)).await;
    other.report(RouteReport::default());
    sleep(Duration::from_secs(100)).await;
    assert_eq!(api.object(TINY_ROUTE_PATH)["status"]["state"], "starting");
    // Both replicas may write a status that they compute at the same moment, here that of the InterceptorRoute.
    assert!(one.written() + other.written() <= 3, "{} and {}", one.written(), other.written());
    one.report(RouteReport::default());
    sleep(Duration::from_secs(5)).await;
    assert_eq!(api.object(TINY_ROUTE_PATH)["status"]["state"], "idle");
    let before = api.changes().len();
    sleep(Duration::from_secs(600)).await;
    assert_eq!(api.changes().len(), before);
}

#[tokio::test(start_paused = true)]
async fn malformed_object_gets_a_status() {
    let api = FakeApiServer::default();
    let meta = json!({"name": "tiny", "namespace": "models", "generation": 1});
    api.put(TINY_ROUTE_PATH, json!({"metadata": meta, "spec": {"target": 7}}));
    let replica = StatusReplica::new(&api);
    sleep(Duration::from_secs(600)).await;
    let status = &api.object(TINY_ROUTE_PATH)["status"];
    assert_eq!(condition(status, "Accepted"), ("False".into(), "Invalid".into(), 1));
    assert_eq!((&status["state"], replica.written()), (&json!("refused"), 1));
}

#[tokio::test(start_paused = true)]
async fn denied_write_pauses_all_writes() {
    let api = FakeApiServer::default();
    objects(&api);
    api.forbid("PATCH", "/status");
    let replica = StatusReplica::new(&api);
    replica.report(RouteReport::default());
    sleep(Duration::from_secs(600)).await;
    let denied = replica.counts.denied.load(Ordering::Relaxed);
    // Two objects are tried about once a minute, for ten minutes.
    assert!((2..=22).contains(&denied), "{denied}");
    assert_eq!(replica.written(), 0);
    api.allow_all();
    sleep(Duration::from_secs(200)).await;
    assert_eq!(replica.written(), 2);
}

#[tokio::test(start_paused = true)]
async fn conditions_of_the_add_on_are_left_alone() {
    let api = FakeApiServer::default();
    objects(&api);
    api.take_field_ownership("interceptorroutes");
    let replica = StatusReplica::new(&api);
    replica.report(RouteReport::default());
    sleep(Duration::from_secs(500)).await;
    assert_eq!(replica.counts.conflicts.load(Ordering::Relaxed), 1);
    assert_eq!(replica.written(), 1, "ours is written with force");
    assert_eq!(api.object(INTERCEPTOR_ROUTE_PATH)["status"], Value::Null);
}
