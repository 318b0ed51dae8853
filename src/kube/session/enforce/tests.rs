use serde_json::{Value, json};
use tokio::time::{Instant, advance};

use super::{super::*, *};
use crate::{
    config,
    kube::{scaled_objects::*, stand_in::FakeApiServer},
};

const CHAT_SCALED_OBJECT_PATH: &str = "/apis/keda.sh/v1alpha1/namespaces/team-a/scaledobjects/chat";

fn object(annotations: Value) -> Value {
    json!({ "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject",
        "metadata": { "name": "chat", "namespace": "team-a", "uid": "u-1", "annotations": annotations } })
}

fn session(until: &str, then: &str) -> Value {
    object(json!({ UNTIL_ANNOTATION: until, THEN_ANNOTATION: then }))
}

/// Starts an API server whose clock shows 20:00:00, and this number of replicas of the proxy that watch it.
fn stage(replicas: usize) -> (FakeApiServer, Vec<Cluster>) {
    let server = FakeApiServer::default();
    server.set_clock(ApiServerClock::starting("2026-11-24T20:00:00Z".parse().unwrap()));
    let clusters = (0..replicas).map(|_| replica(&server));
    let clusters = clusters.collect();
    (server, clusters)
}

fn replica(server: &FakeApiServer) -> Cluster {
    let cluster = server.cluster();
    let running = enforce(cluster.clone(), cluster.scaled_objects(), cluster.events());
    cluster.spawn(running);
    cluster
}

fn annotations(server: &FakeApiServer) -> Value {
    server.object(CHAT_SCALED_OBJECT_PATH)["metadata"]["annotations"].clone()
}

/// Waits until the session is over, and returns the seconds that took.
async fn seconds_until_over(server: &FakeApiServer) -> f64 {
    let began = Instant::now();
    while annotations(server)[UNTIL_ANNOTATION].is_string() {
        assert!(began.elapsed() < Duration::from_secs(24 * 3600), "{}", annotations(server));
        sleep(Duration::from_millis(100)).await;
    }
    began.elapsed().as_secs_f64()
}

fn patches(server: &FakeApiServer) -> usize {
    server
        .changes()
        .iter()
        .filter(|(method, path)| method == "PATCH" && path == CHAT_SCALED_OBJECT_PATH)
        .count()
}

#[tokio::test(start_paused = true)]
async fn session_ends_without_its_client() {
    let (server, _clusters) = stage(1);
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T22:00:00Z", "pause"));
    let took = seconds_until_over(&server).await;
    assert!((7200.0..7201.0).contains(&took), "{took}: 2 h from 20:00:00 by the server's clock");
    assert_eq!(annotations(&server), json!({ PAUSED_ANNOTATION: "true" }));
    sleep(Duration::from_secs(5)).await;
    let [event] = server.objects("/events/").try_into().unwrap();
    assert_eq!((&event["reason"], &event["type"]), (&json!("SessionEnded"), &json!("Normal")));
    assert_eq!(
        (&event["regarding"]["kind"], &event["regarding"]["uid"]),
        (&json!("ScaledObject"), &json!("u-1"))
    );
}

#[tokio::test(start_paused = true)]
async fn replicas_end_session_once() {
    let (server, _clusters) = stage(3);
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T20:10:00Z", "zero"));
    seconds_until_over(&server).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!(annotations(&server), json!({ PAUSED_ANNOTATION: "true", PAUSED_REPLICAS_ANNOTATION: "0" }));
    assert_eq!(patches(&server), 1);
    assert_eq!(server.objects("/events/").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn late_replica_ends_overdue_session() {
    let (server, _) = stage(0);
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T19:00:00Z", "pause"));
    let _cluster = replica(&server);
    let took = seconds_until_over(&server).await;
    assert!(took < 1.0, "{took}");
}

#[tokio::test(start_paused = true)]
async fn moved_end_is_respected() {
    let (server, _clusters) = stage(1);
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T22:00:00Z", "pause"));
    sleep(Duration::from_secs(3600)).await;
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T23:00:00Z", "pause"));
    sleep(Duration::from_secs(7100)).await;
    assert!(annotations(&server)[UNTIL_ANNOTATION].is_string(), "20:00 + 3600 s + 7100 s is 22:58:20");
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T22:59:00Z", "pause"));
    let took = seconds_until_over(&server).await;
    assert!((40.0..41.0).contains(&took), "{took}: 40 s from 22:58:20");
}

#[tokio::test(start_paused = true)]
async fn denied_end_is_logged_and_retried() {
    let (server, _clusters) = stage(1);
    server.forbid("PATCH", "scaledobjects");
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T20:00:30Z", "pause"));
    sleep(Duration::from_secs(300)).await;
    assert!(annotations(&server)[UNTIL_ANNOTATION].is_string());
    server.allow_all();
    let took = seconds_until_over(&server).await;
    assert!(took <= 61.0, "{took}: tried every 60 s");
}

#[tokio::test(start_paused = true)]
async fn disabled_sessions_are_reported_once() {
    let (server, _) = stage(0);
    let config = config::Kubernetes { sessions: false, ..config::Kubernetes::default() };
    let cluster = server.cluster_with(&config);
    cluster.spawn(enforce(cluster.clone(), cluster.scaled_objects(), cluster.events()));
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T22:00:00Z", "pause"));
    sleep(Duration::from_secs(4 * 3600)).await;
    assert!(annotations(&server)[UNTIL_ANNOTATION].is_string());
    assert_eq!(patches(&server), 0);
    let [event] = server.objects("/events/").try_into().unwrap();
    assert_eq!((&event["reason"], &event["type"]), (&json!("SessionsDisabled"), &json!("Warning")));
    let note = event["note"].as_str().unwrap();
    assert!(note.contains("until 2026-11-24T22:00:00Z") && note.contains("sessions.enabled: true"), "{note}");
}

#[tokio::test(start_paused = true)]
async fn malformed_session_is_left_alone() {
    let (server, _clusters) = stage(1);
    server.put(CHAT_SCALED_OBJECT_PATH, session("soon", "pause"));
    server
        .put(&CHAT_SCALED_OBJECT_PATH.replace("chat", "other"), object(json!({ PAUSED_ANNOTATION: "true" })));
    sleep(Duration::from_secs(3600)).await;
    assert!(server.changes().is_empty(), "{:?}", server.changes());
}

#[tokio::test(start_paused = true)]
async fn sessions_work_after_late_keda_install() {
    let server = FakeApiServer::default();
    server.set_clock(ApiServerClock::starting("2026-11-24T20:00:00Z".parse().unwrap()));
    server.uninstall_group("keda.sh");
    let _cluster = replica(&server);
    advance(Duration::from_secs(100)).await;
    server.install_all_groups();
    server.put(CHAT_SCALED_OBJECT_PATH, session("2026-11-24T20:00:00Z", "pause"));
    let took = seconds_until_over(&server).await;
    assert!(took <= 31.0, "{took}: looked for every 30 s");
}
