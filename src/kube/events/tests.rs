use serde_json::Value;

use super::*;
use crate::kube::stand_in::FakeApiServer;

const MODEL_ROUTE_PATH: &str = "/apis/anteroom.dev/v1alpha1/namespaces/team-a/modelroutes/chat";

fn notice(note: &str) -> EventNotice {
    EventNotice {
        about: EventSubject::Route("team-a/chat".into()),
        is_warning: true,
        reason: "ImagePull",
        note: note.into(),
    }
}

fn server() -> FakeApiServer {
    let server = FakeApiServer::default();
    server.put(
        MODEL_ROUTE_PATH,
        json!({ "metadata": { "name": "chat", "namespace": "team-a", "uid": "u-7" } }),
    );
    server
}

/// Waits for the events to be written.
async fn written(server: &FakeApiServer) -> Vec<Value> {
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.objects("/events/")
}

#[tokio::test(start_paused = true)]
async fn event_refers_to_route_object() {
    let server = server();
    server.cluster().events().publish(notice("no such image"));
    let [event] = written(&server).await.try_into().unwrap();
    assert_eq!(
        (&event["reason"], &event["type"], &event["note"]),
        (&json!("ImagePull"), &json!("Warning"), &json!("no such image"))
    );
    let regarding = &event["regarding"];
    assert_eq!(
        (&regarding["kind"], &regarding["name"], &regarding["uid"]),
        (&json!("ModelRoute"), &json!("chat"), &json!("u-7"))
    );
    assert_eq!(event["metadata"]["namespace"], "team-a");
}

#[tokio::test(start_paused = true)]
async fn repeated_event_is_counted_once_a_minute() {
    let server = server();
    let cluster = server.cluster();
    let events = cluster.events();
    for _ in 0..5 {
        events.publish(notice("no such image"));
    }
    let [event] = written(&server).await.try_into().unwrap();
    assert_eq!(event["series"], Value::Null, "5 in the same minute");
    tokio::time::advance(Duration::from_secs(60)).await;
    events.publish(notice("no such image"));
    let [event] = written(&server).await.try_into().unwrap();
    assert_eq!(event["series"]["count"], 6);
}

#[tokio::test(start_paused = true)]
async fn replicas_publish_one_event() {
    let server = server();
    let clusters = [server.cluster(), server.cluster()];
    for cluster in &clusters {
        cluster.events().publish(notice("no such image"));
    }
    // There are two Events if a ten-minute interval ends between the two writes.
    assert!(written(&server).await.len() <= 2);
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let name = |instance| event(&notice("x"), ObjectReference::default(), instance, now).metadata.name;
    assert_eq!(name("a"), name("b"));
}

#[tokio::test(start_paused = true)]
async fn events_per_object_are_rate_limited() {
    let server = server();
    let cluster = server.cluster();
    let events = cluster.events();
    let published =
        |from: u32| (from..from + 30).for_each(|number| events.publish(notice(&format!("reason {number}"))));
    published(0);
    assert_eq!(written(&server).await.len(), 10, "at once");
    tokio::time::advance(Duration::from_secs(90)).await;
    published(30);
    assert_eq!(written(&server).await.len(), 13, "one more each 30 s: 90 / 30");
}

#[tokio::test(start_paused = true)]
async fn event_without_object_or_right_is_dropped() {
    let server = server();
    let cluster = server.cluster();
    let events = cluster.events();
    events.publish(EventNotice { about: EventSubject::Route("team-a/gone".into()), ..notice("x") });
    server.forbid("POST", "events");
    events.publish(notice("x"));
    assert!(written(&server).await.is_empty());
    server.allow_all();
    events.publish(notice("x"));
    assert_eq!(written(&server).await.len(), 1, "and the next one is written");
}

#[test]
fn long_note_is_truncated() {
    let now = Timestamp::from_second(0).unwrap();
    let note = event(&notice(&"é".repeat(1000)), ObjectReference::default(), "a", now).note.unwrap();
    assert!(note.len() <= 1024 && note.ends_with('…'), "{}", note.len());
}
