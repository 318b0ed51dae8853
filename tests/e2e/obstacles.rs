//! Obstacles to a start: rejected requests, and messages to waiting clients.

use anteroom::{domain::ObstacleKind, state::Obstacle};

use crate::support::{
    TestProxy, TestUpstream, soon, until,
    wire::{BodyPart, chat, streaming},
};

const PAUSED_MESSAGE: &str =
    "ScaledObject `a/chat` is paused at zero. Resume it with `anteroom session start chat -n a --for 2h`";

/// Sets or clears the obstacle of the only route.
async fn obstruct(proxy: &TestProxy, obstacle: Option<(ObstacleKind, &str)>) {
    proxy.gate().await.target().set_obstacle(obstacle.map(|(kind, message)| Obstacle::new(kind, message)));
}

async fn pause(proxy: &TestProxy) {
    obstruct(proxy, Some((ObstacleKind::AutoscalingPaused, PAUSED_MESSAGE))).await;
}

/// Returns a request that waits for at most 50 ms.
fn chat_waiting_50_ms() -> String {
    chat("hasty").replace("\r\n\r\n", "\r\nx-anteroom-max-wait: 50ms\r\n\r\n")
}

/// Returns the text that a client receives after its early head, until it contains `words`.
async fn read_heartbeats_until(client: &mut crate::support::Wire, words: &str) -> String {
    let mut heard = String::new();
    while !heard.contains(words) {
        match client.part().await {
            BodyPart::Data(data) => heard += std::str::from_utf8(&data).unwrap(),
            other => panic!("{other:?} after {heard:?}"),
        }
    }
    heard
}

#[tokio::test]
async fn pause_at_zero_rejects_without_waking() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    pause(&proxy).await;
    let refused = proxy.ask(chat("0")).await;
    refused.is_error(503, "autoscaling_paused");
    assert_eq!((refused.get("x-should-retry"), refused.get("retry-after")), (Some("false"), None));
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, format!("`tiny` is at zero and cannot be started. {PAUSED_MESSAGE}"));
    assert_eq!(upstream.accepted(), 0, "not even a probe");
    let route = proxy.route("tiny").await;
    assert_eq!(route["obstacle"]["kind"], "autoscaling_paused");
    assert_eq!(route["obstacle"]["message"], PAUSED_MESSAGE);
    assert!(route["obstacle"]["since"].as_str().unwrap().ends_with('Z'), "{route}");
    assert_eq!((route["state"].as_str(), route["held"].as_u64()), (Some("idle"), Some(0)));
    assert_eq!(proxy.metric("anteroom_obstacle", &["kind=\"autoscaling_paused\""]).await, 1);
    assert_eq!(proxy.metric("anteroom_obstacle", &[]).await, 1, "and no other");
    assert_eq!(proxy.refused("autoscaling_paused").await, 1);

    obstruct(&proxy, None).await;
    let mut client = proxy.sent(chat("1")).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    upstream.call().await.reply("1").await;
    assert_eq!(client.response().await.status(), 200, "resumed");
    assert_eq!(proxy.route("tiny").await["obstacle"], serde_json::Value::Null);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn pause_fails_held_requests_at_once() {
    let mut upstream = TestUpstream::cold().await;
    let soon_told = "keepalive: { mode: comment, after: 10ms, interval: 10ms }";
    let proxy = TestProxy::tiny(&upstream.url(), soon_told).await;
    let mut plain = proxy.sent(chat("0")).await;
    let mut stream = proxy.sent(streaming("1")).await;
    proxy.await_tiny_held(2).await;
    proxy.await_tiny_starting().await;
    assert_eq!(stream.head().await.unwrap().status(), 200);
    pause(&proxy).await;
    let told = plain.response().await;
    told.is_error(503, "cold_start_failed");
    assert_eq!(told.get("retry-after"), Some("60"));
    assert!(told.text().contains("anteroom session start chat -n a --for 2h"), "{}", told.text());
    let heard = read_heartbeats_until(&mut stream, "data: ").await;
    assert!(heard.contains("cold_start_failed") && heard.contains("is paused at zero"), "{heard}");
    proxy.await_outcome("cold_start_failed", 503, 2).await;
    let cold_starts = proxy.admin("/api/v1/cold-starts").await.json();
    assert_eq!(cold_starts["cold_starts"][0]["outcome"], "failed");
    assert_eq!(cold_starts["cold_starts"][0]["reason"], PAUSED_MESSAGE);

    obstruct(&proxy, None).await;
    let mut client = proxy.sent(chat("2")).await;
    proxy.await_tiny_held(1).await;
    upstream.probed().await;
    upstream.wake();
    upstream.call().await.reply("2").await;
    assert_eq!(client.response().await.status(), 200);
    proxy.await_outcome("completed", 200, 1).await;
    proxy.stop(&[("completed", 1), ("cold_start_failed", 2)]).await;
}

#[tokio::test]
async fn when_paused_hold_waits_for_the_end_of_a_pause() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "whenPaused: hold").await;
    pause(&proxy).await;
    let mut client = proxy.sent(chat("0")).await;
    proxy.await_tiny_held(1).await;
    upstream.probed().await;
    pause(&proxy).await;
    upstream.probed().await;
    proxy.await_tiny_held(1).await;
    obstruct(&proxy, None).await;
    upstream.wake();
    upstream.call().await.reply("0").await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn paused_target_serves_while_ready() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(chat("0")).await;
    upstream.call().await.reply("0").await;
    assert_eq!(client.response().await.status(), 200);
    pause(&proxy).await;
    let mut client = proxy.sent(chat("1")).await;
    upstream.call().await.reply("1").await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn reason_is_in_heartbeats_and_deadline_errors() {
    let upstream = TestUpstream::cold().await;
    let proxy =
        TestProxy::tiny(&upstream.url(), "keepalive: { mode: comment, after: 10ms, interval: 10ms }").await;
    obstruct(&proxy, Some((ObstacleKind::ImagePull, "Pod `x` cannot have\r\n\"vllm:none\""))).await;
    let mut client = proxy.sent(streaming("0")).await;
    assert_eq!(client.head().await.unwrap().status(), 200);
    let heard = read_heartbeats_until(&mut client, "reason=").await;
    let line = heard.lines().find(|line| line.contains("reason=")).unwrap();
    assert!(
        line.starts_with(": ") && line.ends_with(" reason=\"Pod `x` cannot have  'vllm:none'\""),
        "{line:?}"
    );
    drop(client);
    let late = proxy.ask(chat_waiting_50_ms()).await;
    late.is_error(504, "cold_start_timeout");
    assert!(
        late.text().contains("(x-anteroom-max-wait of the request). Pod `x` cannot have"),
        "{}",
        late.text()
    );
    until("the client to be gone", async || proxy.route("tiny").await["held"] == 0).await;
    proxy.stop(&[("client_gone", 1), ("cold_start_timeout", 1)]).await;
}

#[tokio::test]
async fn lasting_obstacle_fails_held_requests() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "failureGrace: { crashLoop: 200ms }").await;
    let mut client = proxy.sent(chat("0")).await;
    proxy.await_tiny_starting().await;
    obstruct(&proxy, Some((ObstacleKind::CrashLoop, "Pod `x` ended with exit code 1"))).await;
    let told = soon("the grace to pass", client.response()).await;
    told.is_error(503, "cold_start_failed");
    assert!(told.text().contains("Pod `x` ended with exit code 1"), "{}", told.text());
    obstruct(&proxy, None).await;
    let mut client = proxy.sent(chat("1")).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    upstream.call().await.reply("1").await;
    assert_eq!(client.response().await.status(), 200, "it came after all");
    proxy.stop(&[("completed", 1), ("cold_start_failed", 1)]).await;
}

/// RFC 6761, section 6.4: no name below `invalid` resolves.
#[tokio::test]
async fn unresolved_name_reaches_heartbeats_api_and_the_504() {
    let soon_told = "keepalive: { mode: comment, after: 10ms, interval: 10ms }";
    let proxy = TestProxy::tiny("http://vllm.invalid:8000", soon_told).await;
    let mut stream = proxy.sent(streaming("0")).await;
    assert_eq!(stream.head().await.unwrap().status(), 200);
    const REASON: &str = "The host name `vllm.invalid` does not resolve (";
    let heard = read_heartbeats_until(&mut stream, "reason=").await;
    assert!(heard.contains(REASON), "{heard}");
    let route = proxy.route("tiny").await;
    assert_eq!(route["obstacle"]["kind"], "name_unresolved");
    assert!(route["obstacle"]["message"].as_str().unwrap().starts_with(REASON), "{route}");
    assert_eq!(proxy.metric("anteroom_obstacle", &["kind=\"name_unresolved\""]).await, 1);
    let timed_out = proxy.ask(chat_waiting_50_ms()).await;
    timed_out.is_error(504, "cold_start_timeout");
    assert!(timed_out.text().contains(REASON), "{}", timed_out.text());
    drop(stream);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1), ("cold_start_timeout", 1)]).await;
}

#[tokio::test]
async fn rejected_probe_reaches_heartbeats_api_and_the_504() {
    const REASON: &str = "/health answers 404: is `readiness.path` right?";
    let upstream = TestUpstream::cold().await;
    upstream.answers_probes(404);
    let soon_told = "keepalive: { mode: comment, after: 10ms, interval: 10ms }";
    let proxy = TestProxy::tiny(&upstream.url(), soon_told).await;
    let mut stream = proxy.sent(streaming("1")).await;
    assert_eq!(stream.head().await.unwrap().status(), 200);
    let heard = read_heartbeats_until(&mut stream, "reason=").await;
    assert!(heard.contains(REASON), "{heard}");
    let route = proxy.route("tiny").await;
    assert_eq!(
        (&route["obstacle"]["kind"], &route["obstacle"]["message"]),
        (&"probe_rejected".into(), &REASON.into())
    );
    assert_eq!(proxy.metric("anteroom_obstacle", &["kind=\"probe_rejected\""]).await, 1);
    let timed_out = proxy.ask(chat_waiting_50_ms()).await;
    timed_out.is_error(504, "cold_start_timeout");
    assert!(timed_out.text().contains(REASON), "{}", timed_out.text());
    // The probe path starts to succeed, so the obstacle is withdrawn.
    upstream.wake();
    until("it to be withdrawn", async || proxy.route("tiny").await["obstacle"].is_null()).await;
}
