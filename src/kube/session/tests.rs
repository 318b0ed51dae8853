use serde_json::json;

use super::*;
use crate::kube::stand_in::FakeApiServer;

const SESSION_SCALED_OBJECT_PATH: &str = "/apis/keda.sh/v1alpha1/namespaces/team-a/scaledobjects/chat";

fn object(annotations: Value) -> Value {
    json!({ "metadata": { "name": "chat", "namespace": "team-a", "annotations": annotations } })
}

fn server(annotations: Value) -> (FakeApiServer, Sessions) {
    let server = FakeApiServer::default();
    server.put(SESSION_SCALED_OBJECT_PATH, object(annotations));
    let sessions = Sessions::new(server.client(), "team-a".into());
    (server, sessions)
}

fn clock() -> ApiServerClock {
    ApiServerClock::starting("2026-11-24T20:00:00.7Z".parse().unwrap())
}

fn period(text: &str) -> Period {
    text.parse().unwrap()
}

fn annotations(server: &FakeApiServer) -> Value {
    server.object(SESSION_SCALED_OBJECT_PATH)["metadata"]["annotations"].clone()
}

#[tokio::test(start_paused = true)]
async fn session_resumes_and_its_end_restores_pause() {
    let (server, sessions) =
        server(json!({ PAUSED_ANNOTATION: "true", PAUSED_REPLICAS_ANNOTATION: "0", "team": "a" }));
    let (before, session) = sessions.start("chat", period("2h"), false, &clock()).await.unwrap();
    assert_eq!(before.pause(), Some(Pause::At(0)), "what it was");
    assert_eq!(session.until.to_string(), "2026-11-24T22:00:00Z", "20:00:00 + 2 h, whole seconds");
    assert_eq!(
        annotations(&server),
        json!({ UNTIL_ANNOTATION: "2026-11-24T22:00:00Z", THEN_ANNOTATION: "pause", PREVIOUS_REPLICAS_ANNOTATION: "0", "team": "a" })
    );
    let (_, ended) = sessions.stop("chat", false).await.unwrap();
    assert_eq!(ended, Some(session));
    assert_eq!(
        annotations(&server),
        json!({ PAUSED_ANNOTATION: "true", PAUSED_REPLICAS_ANNOTATION: "0", "team": "a" })
    );
}

#[tokio::test(start_paused = true)]
async fn restart_moves_end_and_keeps_previous_pause() {
    let (server, sessions) = server(json!({ PAUSED_REPLICAS_ANNOTATION: "0" }));
    sessions.start("chat", period("2h"), true, &clock()).await.unwrap();
    let (before, session) = sessions.start("chat", period("3h"), false, &clock()).await.unwrap();
    assert_eq!(Session::of(&before).unwrap().unwrap().until.to_string(), "2026-11-24T22:00:00Z");
    assert_eq!((session.then, session.before.as_deref()), (EndAction::Zero, Some("0")));
    assert_eq!(
        annotations(&server),
        json!({ UNTIL_ANNOTATION: "2026-11-24T23:00:00Z", THEN_ANNOTATION: "zero", PREVIOUS_REPLICAS_ANNOTATION: "0" })
    );
    sessions.stop("chat", false).await.unwrap();
    assert_eq!(annotations(&server), json!({ PAUSED_ANNOTATION: "true", PAUSED_REPLICAS_ANNOTATION: "0" }));
    let again = sessions.stop("chat", false).await.unwrap();
    assert_eq!(again.1, None, "and once more changes nothing");
}

#[tokio::test(start_paused = true)]
async fn end_freezes_or_scales_to_zero() {
    let (server, sessions) = server(json!({ PAUSED_ANNOTATION: "true" }));
    sessions.start("chat", period("1s"), false, &clock()).await.unwrap();
    sessions.stop("chat", false).await.unwrap();
    assert_eq!(annotations(&server), json!({ PAUSED_ANNOTATION: "true" }));
    sessions.start("chat", period("30d"), false, &clock()).await.unwrap();
    sessions.stop("chat", true).await.unwrap();
    assert_eq!(annotations(&server), json!({ PAUSED_ANNOTATION: "true", PAUSED_REPLICAS_ANNOTATION: "0" }));
}

#[tokio::test(start_paused = true)]
async fn invalid_requests_are_rejected_with_a_remedy() {
    let (server, sessions) = server(json!({}));
    for text in ["0", "10ms", "31d"] {
        let error = sessions.start("chat", period(text), false, &clock()).await.unwrap_err();
        assert!(matches!(error, SessionError::Duration(_)), "{text}: {error}");
    }
    assert!(server.changes().is_empty());
    server.put(
        &SESSION_SCALED_OBJECT_PATH.replace("chat", "big"),
        json!({ "metadata": { "name": "big", "namespace": "team-a" } }),
    );
    let error = sessions.start("caht", period("2h"), false, &clock()).await.unwrap_err().to_string();
    assert_eq!(error, "there is no ScaledObject `caht` in namespace `team-a`; there are big, chat");
    let elsewhere = Sessions::new(server.client(), "team-b".into());
    let error = elsewhere.get("chat").await.unwrap_err().to_string();
    assert_eq!(error, "there is no ScaledObject `chat` in namespace `team-b`; there are none");
    server.forbid("PATCH", "scaledobjects");
    let error = sessions.start("chat", period("2h"), false, &clock()).await.unwrap_err().to_string();
    for words in [
        "you may not patch ScaledObjects in namespace `team-a`",
        "kubectl auth can-i patch scaledobjects.keda.sh -n team-a",
    ] {
        assert!(error.contains(words), "{words} in: {error}");
    }
    server.uninstall_group("keda.sh");
    let error = sessions.start("chat", period("2h"), false, &clock()).await.unwrap_err();
    assert!(matches!(error, SessionError::NoKeda), "{error}");
}

#[test]
fn hand_written_annotations_parse_leniently() {
    let read = |annotations: Value| {
        let object: ScaledObject = serde_json::from_value(object(annotations)).unwrap();
        Session::of(&object)
    };
    assert_eq!(read(json!({ THEN_ANNOTATION: "zero" })), None);
    assert_eq!(read(json!({ UNTIL_ANNOTATION: "tomorrow" })), Some(Err("tomorrow".into())));
    let session = read(json!({ UNTIL_ANNOTATION: "2026-11-24T23:00:00+01:00", THEN_ANNOTATION: "what" }))
        .unwrap()
        .unwrap();
    assert_eq!((session.until.to_string(), session.then), ("2026-11-24T22:00:00Z".into(), EndAction::Pause));
}

#[tokio::test(start_paused = true)]
async fn clock_reads_time_of_api_server() {
    let server = FakeApiServer::default();
    assert!(ApiServerClock::of_server(&server.client()).await.is_none(), "it says none");
    server.set_clock(clock());
    tokio::time::advance(Duration::from_secs(60)).await;
    let told = ApiServerClock::of_server(&server.client()).await.unwrap();
    assert_eq!(told.now().to_string(), "2026-11-24T20:01:00Z", "a minute later, to the second");
}
