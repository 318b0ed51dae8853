use serde_json::{Value, json};

use super::*;
use crate::kube::stand_in::FakeApiServer;

const SCALED_OBJECT_PATH: &str = "/apis/keda.sh/v1alpha1/namespaces/team-a/scaledobjects/chat";

fn server(annotations: Value) -> FakeApiServer {
    let server = FakeApiServer::default();
    server.set_clock(ApiServerClock::starting("2026-11-24T20:00:00Z".parse().unwrap()));
    let object = json!({ "metadata": { "name": "chat", "namespace": "team-a", "annotations": annotations } });
    server.put(SCALED_OBJECT_PATH, object);
    server
}

fn command(arguments: &[&str]) -> SessionCommand {
    use clap::Parser;
    #[derive(Parser)]
    struct SessionCli {
        #[command(flatten)]
        session: SessionArgs,
    }
    SessionCli::try_parse_from([&["session"], arguments].concat()).unwrap().session.command
}

async fn output(server: &FakeApiServer, arguments: &[&str]) -> String {
    run_command(command(arguments), server.client(), "team-a".into())
        .await
        .unwrap_or_else(|error| error.to_string())
}

#[tokio::test(start_paused = true)]
async fn start_reports_end_and_next_action() {
    let server = server(json!({ "autoscaling.keda.sh/paused": "true" }));
    let text = output(&server, &["start", "chat", "--for", "2h"]).await;
    for words in [
        "ScaledObject team-a/chat scales until 2026-11-24 ",
        "(in 2h)",
        "Removed the pause (autoscaling.keda.sh/paused: \"true\").",
        "Its replicas keep running",
        "--to-zero",
        "anteroom session stop chat -n team-a",
    ] {
        assert!(text.contains(words), "{words} in:\n{text}");
    }
    assert!(!text.contains("Warning"), "{text}");
    let text = output(&server, &["start", "chat", "--for", "90m", "--to-zero"]).await;
    for words in ["(in 1h 30m)", "Replaces the previous end", "scaled to zero and paused"] {
        assert!(text.contains(words), "{words} in:\n{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn start_is_refused_with_sessions_disabled() {
    let paused = json!({ "autoscaling.keda.sh/paused": "true", "anteroom.dev/sessions": "disabled" });
    let server = server(paused.clone());
    let text = output(&server, &["start", "chat", "--for", "2h"]).await;
    for words in ["ScaledObject `team-a/chat` would not be paused again", "sessions.enabled: true"] {
        assert!(text.contains(words), "{words} in:\n{text}");
    }
    assert_eq!(server.object(SCALED_OBJECT_PATH)["metadata"]["annotations"], paused);
    let text = output(&server, &["stop", "chat"]).await;
    assert!(!text.contains("switched off"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn start_warns_of_gitops() {
    for (mark, owner) in
        [("argocd.argoproj.io/tracking-id", "Argo CD"), ("kustomize.toolkit.fluxcd.io/name", "Flux")]
    {
        let server = server(json!({ mark: "x" }));
        let text = output(&server, &["start", "chat", "--for", "2h"]).await;
        assert!(text.contains(&format!("Warning: {owner} manages this object")), "{text}");
        assert!(text.contains("It was not paused before, but will be at the end."), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn status_reports_session_and_pause() {
    let server = server(json!({ "autoscaling.keda.sh/paused": "true" }));
    let text = output(&server, &["status", "chat"]).await;
    assert!(
        text.contains("has no session and is paused") && text.contains("anteroom session start chat"),
        "{text}"
    );
    let text = output(&server, &["status"]).await;
    assert_eq!(text, "No session in namespace team-a (1 ScaledObjects, 1 of them paused).\n");
    output(&server, &["start", "chat", "--for", "2h"]).await;
    tokio::time::advance(std::time::Duration::from_secs(1800)).await;
    let text = output(&server, &["status", "chat"]).await;
    assert!(text.contains("scales until") && text.contains("(in 1h 30m)"), "{text}");
    let text = output(&server, &["status", "-A"]).await;
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("NAMESPACE  SCALEDOBJECT  STATE    UNTIL"), "{text}");
    assert!(lines[1].starts_with("team-a     chat          running  2026-11-24"), "{text}");
    assert!(lines[1].ends_with("pause"), "{text}");
    tokio::time::advance(std::time::Duration::from_secs(2 * 3600)).await;
    let text = output(&server, &["status", "chat"]).await;
    assert!(text.contains("(30m ago)") && text.contains("overdue"), "{text}");
    assert!(output(&server, &["status"]).await.contains("overdue"));
}

#[tokio::test(start_paused = true)]
async fn second_stop_changes_nothing() {
    let server = server(json!({ "autoscaling.keda.sh/paused-replicas": "0" }));
    output(&server, &["start", "chat", "--for", "2h"]).await;
    let text = output(&server, &["stop", "chat"]).await;
    assert_eq!(text, "ScaledObject team-a/chat is paused again, with 0 replicas as before.\n");
    let text = output(&server, &["stop", "chat"]).await;
    assert!(text.contains("no session and is paused") && text.contains("Nothing was changed"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn pause_during_a_session_is_reported() {
    let until = "2026-11-24T21:00:00Z";
    let server = server(json!({ "anteroom.dev/session-until": until, "autoscaling.keda.sh/paused": "true" }));
    let text = output(&server, &["status", "chat"]).await;
    assert!(text.contains("has been paused since"), "{text}");
}

#[tokio::test]
async fn invalid_period_fails_before_connecting() {
    let command = command(&["start", "chat", "--for", "0", "--context", "nowhere"]);
    let error = execute(command).await.unwrap_err();
    assert!(error.starts_with("--for 0"), "{error}");
}
