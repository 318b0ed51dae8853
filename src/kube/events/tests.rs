use serde_json::Value;

use super::*;
use crate::kube::stand_in::StandIn;

const ROUTE: &str = "/apis/anteroom.dev/v1alpha1/namespaces/team-a/modelroutes/chat";

fn notice(note: &str) -> Notice {
    Notice {
        about: About::Route("team-a/chat".into()),
        is_warning: true,
        reason: "ImagePull",
        note: note.into(),
    }
}

fn server() -> StandIn {
    let server = StandIn::default();
    server.put(ROUTE, json!({ "metadata": { "name": "chat", "namespace": "team-a", "uid": "u-7" } }));
    server
}

/// As many as there are once all that was told has been written.
async fn written(server: &StandIn) -> Vec<Value> {
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.objects("/events/")
}

#[tokio::test(start_paused = true)]
async fn an_event_is_at_the_object_of_the_route() {
    let server = server();
    server.cluster().events().tell(notice("no such image"));
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
async fn what_is_told_again_is_counted_once_a_minute() {
    let server = server();
    let cluster = server.cluster();
    let events = cluster.events();
    for _ in 0..5 {
        events.tell(notice("no such image"));
    }
    let [event] = written(&server).await.try_into().unwrap();
    assert_eq!(event["series"], Value::Null, "5 in the same minute");
    tokio::time::advance(Duration::from_secs(60)).await;
    events.tell(notice("no such image"));
    let [event] = written(&server).await.try_into().unwrap();
    assert_eq!(event["series"]["count"], 6);
}

#[tokio::test(start_paused = true)]
async fn of_several_replicas_one_is_heard() {
    let server = server();
    let clusters = [server.cluster(), server.cluster()];
    for cluster in &clusters {
        cluster.events().tell(notice("no such image"));
    }
    // In the very moment in which ten minutes end they are two.
    assert!(written(&server).await.len() <= 2);
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let name = |instance| event(&notice("x"), ObjectReference::default(), instance, now).metadata.name;
    assert_eq!(name("a"), name("b"));
}

#[tokio::test(start_paused = true)]
async fn an_object_has_so_many_and_no_more() {
    let server = server();
    let cluster = server.cluster();
    let events = cluster.events();
    let told =
        |from: u32| (from..from + 30).for_each(|number| events.tell(notice(&format!("reason {number}"))));
    told(0);
    assert_eq!(written(&server).await.len(), 10, "at once");
    tokio::time::advance(Duration::from_secs(90)).await;
    told(30);
    assert_eq!(written(&server).await.len(), 13, "one more each 30 s: 90 / 30");
}

#[tokio::test(start_paused = true)]
async fn what_has_no_object_or_no_right_is_forgotten() {
    let server = server();
    let cluster = server.cluster();
    let events = cluster.events();
    events.tell(Notice { about: About::Route("team-a/gone".into()), ..notice("x") });
    server.forbid("POST", "events");
    events.tell(notice("x"));
    assert!(written(&server).await.is_empty());
    server.allow_all();
    events.tell(notice("x"));
    assert_eq!(written(&server).await.len(), 1, "and the next one is written");
}

#[test]
fn a_long_note_is_cut_where_the_api_would_refuse_it() {
    let now = Timestamp::from_second(0).unwrap();
    let note = event(&notice(&"é".repeat(1000)), ObjectReference::default(), "a", now).note.unwrap();
    assert!(note.len() <= 1024 && note.ends_with('…'), "{}", note.len());
}
