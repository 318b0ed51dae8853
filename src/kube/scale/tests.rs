use serde_json::Value;
use tokio::time::{Duration, sleep};

use super::*;
use crate::kube::stand_in::FakeApiServer;

const DEPLOYMENT_PATH: &str = "/apis/apps/v1/namespaces/team-a/deployments/vllm";
const CHAT_SCALED_OBJECT: &str = "/apis/keda.sh/v1alpha1/namespaces/team-a/scaledobjects/chat";

fn workload() -> Workload {
    Workload { api_version: "apps/v1".into(), kind: "Deployment".into(), name: "vllm".into() }
}

fn server(replicas: u32) -> FakeApiServer {
    let server = FakeApiServer::default();
    server.put(
        DEPLOYMENT_PATH,
        json!({ "metadata": { "name": "vllm", "namespace": "team-a" }, "spec": { "replicas": replicas } }),
    );
    server
}

async fn direct(server: &FakeApiServer) -> DirectScale {
    let cluster = server.cluster();
    let mut objects = cluster.scaled_objects();
    while !objects.borrow_and_update().is_complete() && !matches!(*objects.borrow(), ScaledObjects::Absent) {
        sleep(Duration::from_millis(10)).await;
    }
    DirectScale::new(cluster, objects)
}

fn refusal(direct: &DirectScale) -> Option<String> {
    direct.refusals().borrow().values().next().map(ToString::to_string)
}

fn replicas(server: &FakeApiServer) -> Value {
    server.object(DEPLOYMENT_PATH)["spec"]["replicas"].clone()
}

#[tokio::test(start_paused = true)]
async fn replicas_change_unless_version_conflicts() {
    let server = server(0);
    server.uninstall_group("keda.sh");
    let direct = direct(&server).await;
    let seen = direct.replicas("team-a", &workload()).await.unwrap();
    assert_eq!(seen.wanted, 0);
    direct.set("team-a", &workload(), &seen, 1).await.unwrap();
    assert_eq!(replicas(&server), 1);
    assert_eq!(direct.set("team-a", &workload(), &seen, 0).await, Err(ScaleError::Conflict));
    assert_eq!((replicas(&server), refusal(&direct)), (json!(1), None));
}

#[tokio::test(start_paused = true)]
async fn workload_of_another_scaler_is_refused() {
    let server = server(0);
    let owned = json!({
        "metadata": { "name": "chat", "namespace": "team-a" },
        "spec": { "scaleTargetRef": { "name": "vllm" }, "triggers": [] },
    });
    server.put(CHAT_SCALED_OBJECT, owned);
    let direct = direct(&server).await;
    let Err(ScaleError::Refused(reason)) = direct.replicas("team-a", &workload()).await else {
        panic!("scaled")
    };
    assert!(
        reason.contains("Deployment `team-a/vllm`") && reason.contains("ScaledObject `team-a/chat`"),
        "{reason}"
    );
    assert_eq!(refusal(&direct).as_deref(), Some(&*reason), "remembered until it goes well");
    server.remove(CHAT_SCALED_OBJECT);
    sleep(Duration::from_secs(1)).await;
    direct.replicas("team-a", &workload()).await.unwrap();
    assert_eq!(refusal(&direct), None);
    server.put(
        "/apis/autoscaling/v2/namespaces/team-a/horizontalpodautoscalers/cpu",
        json!({ "metadata": { "name": "cpu" }, "spec": { "maxReplicas": 3,
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "vllm" } } }),
    );
    let error = direct.replicas("team-a", &workload()).await.unwrap_err().to_string();
    assert!(error.contains("HorizontalPodAutoscaler `cpu`"), "{error}");
    server.forbid("GET", "horizontalpodautoscalers");
    direct.replicas("team-a", &workload()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn denied_scale_names_chart_value() {
    let server = server(0);
    server.uninstall_group("keda.sh");
    let direct = direct(&server).await;
    let seen = direct.replicas("team-a", &workload()).await.unwrap();
    server.forbid("PATCH", "/scale");
    let Err(ScaleError::Refused(reason)) = direct.set("team-a", &workload(), &seen, 1).await else {
        panic!("scaled")
    };
    for words in [
        "may not patch the scale of Deployment `team-a/vllm`",
        "deployments/scale",
        "`directScaling.enabled=true`",
    ] {
        assert!(reason.contains(words), "{words} in: {reason}");
    }
    let missing = Workload { name: "none".into(), ..workload() };
    let error = direct.replicas("team-a", &missing).await.unwrap_err().to_string();
    assert_eq!(error, "There is no Deployment `team-a/none` with a scale");
}

#[tokio::test(start_paused = true)]
async fn unresponsive_api_server_times_out() {
    let silent = axum::Router::new().fallback(std::future::pending::<axum::http::StatusCode>);
    let cluster = Cluster::served_by(silent, &crate::config::Kubernetes::default());
    let direct = DirectScale::new(cluster, watch::Sender::new(ScaledObjects::Absent).subscribe());
    let start = tokio::time::Instant::now();
    let late = Err(ScaleError::Unavailable("no answer within 10 s".into()));
    assert_eq!(direct.replicas("team-a", &workload()).await, late);
    let seen = Replicas { wanted: 0, version: None };
    assert_eq!(direct.set("team-a", &workload(), &seen, 1).await.err(), late.err());
    assert_eq!(start.elapsed(), Duration::from_secs(20), "2 × 10 s");
}
