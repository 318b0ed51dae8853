//! Errors in the format of the API that a request uses.

use std::time::Duration;

use anteroom::domain::{Intercept, InterceptTimeouts};
use serde_json::{Value, json};

use crate::support::{
    TestProxy, TestUpstream, Wire,
    proxy::{route, routes},
    upstream::answer,
    wire::{WireResponse, get_with, post, post_with},
};

const EARLY_HEARTBEATS: &str = "keepalive: { mode: comment, after: 10ms, interval: 10ms }";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

/// Returns status, error type and code of an Anthropic error, and checks that the request id is in body and headers.
fn anthropic(response: &WireResponse) -> (u16, String, String) {
    let json = response.json();
    assert_eq!((&json["type"], json["error"]["message"].is_string()), (&json!("error"), true), "{json}");
    assert_eq!(json["request_id"].as_str(), response.get("x-request-id"));
    assert_eq!(response.get("request-id"), response.get("x-request-id"));
    let text = |name: &str| json["error"][name].as_str().unwrap().to_owned();
    (response.status(), text("type"), text("code"))
}

/// Returns the events of a stream with an orderly end as name and data, without comments.
async fn events(client: &mut Wire) -> Vec<(String, Value)> {
    assert_eq!(client.head().await.unwrap().status(), 200);
    events_after_head(client).await
}

async fn events_after_head(client: &mut Wire) -> Vec<(String, Value)> {
    let stream = client.rest().await.expect("an orderly end");
    let lines = stream.split_inclusive('\n').filter(|line| !line.starts_with(':'));
    let stream: String = lines.collect();
    // An event without content separates comments from the first event.
    let is_empty = |event: &&str| event.starts_with("event: ping\n") || event.contains("\"content\":\"\"");
    let read = stream.split_terminator("\n\n").skip_while(is_empty).map(|event| {
        let (name, data) = event.split_once('\n').unwrap_or(("event: ", event));
        let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("{stream:?}"));
        (name.strip_prefix("event: ").unwrap().to_owned(), serde_json::from_str(data).unwrap())
    });
    read.collect()
}

#[tokio::test]
async fn refusals_of_messages_have_anthropics_shape() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "hold: { maxRequests: 1 }").await;
    let body = |model: &str| json!({"model": model, "messages": []}).to_string();
    for (request, status, kind, code) in [
        (post(MESSAGES, &body("other")), 404, "not_found_error", "model_not_found"),
        (post("/v1/messages/count_tokens", &body("other")), 404, "not_found_error", "model_not_found"),
        (post("/v1/messages/batches", "{}"), 404, "not_found_error", "unknown_path"),
        (get_with(MESSAGES, &[]), 405, "invalid_request_error", "method_not_allowed"),
        (post(MESSAGES, "{"), 400, "invalid_request_error", "invalid_request"),
        // For paths that both APIs have, the header sent by Anthropic's SDK decides.
        (
            get_with("/v1/models/other", &[("anthropic-version", "2023-06-01")]),
            404,
            "not_found_error",
            "model_not_found",
        ),
        (
            post_with(MESSAGES, &[("x-anteroom-max-wait", "0")], &body("tiny")),
            503,
            "overloaded_error",
            "no_wait",
        ),
    ] {
        let response = proxy.ask(&request).await;
        assert_eq!(anthropic(&response), (status, kind.into(), code.into()), "{request}");
    }
    // Errors on paths of the other API keep its format.
    proxy.ask(get_with("/v1/models/other", &[])).await.is_error(404, "model_not_found");
    let held = proxy.sent(post(MESSAGES, &body("tiny"))).await;
    proxy.await_tiny_held(1).await;
    let full = proxy.ask(post(MESSAGES, &body("tiny"))).await;
    assert_eq!(anthropic(&full), (503, "overloaded_error".into(), "hold_queue_full".into()));
    assert_eq!(full.get("x-should-retry"), Some("true"));
    drop(held);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn failures_below_a_prefix_have_their_apis_shape() {
    let upstream = TestUpstream::cold().await;
    let more = "match: { paths: [/team] }, hold: { timeout: 50ms }";
    let proxy = TestProxy::start(&routes(&[route("tiny", &upstream.url(), more)])).await;
    let response = proxy.ask(post("/team/v1/messages", "{}")).await;
    assert_eq!(anthropic(&response), (504, "timeout_error".into(), "cold_start_timeout".into()));
    proxy.ask(post("/team/v1/responses", "{}")).await.is_error(504, "cold_start_timeout");
    proxy.await_outcome("cold_start_timeout", 504, 2).await;
    proxy.stop(&[("cold_start_timeout", 2)]).await;
}

#[tokio::test]
async fn late_failures_are_events_of_their_api() {
    let upstream = TestUpstream::cold().await;
    let proxy =
        TestProxy::tiny(&upstream.url(), &format!("{EARLY_HEARTBEATS}, hold: {{ timeout: 3s }}")).await;
    let body = r#"{"model":"tiny","stream":true}"#;
    let mut client = proxy.sent(post(MESSAGES, body)).await;
    let [(name, data)] = events(&mut client).await.try_into().unwrap();
    assert_eq!((name.as_str(), &data["type"]), ("error", &json!("error")));
    assert_eq!(data["error"]["type"], "timeout_error");
    assert_eq!(data["error"]["code"], "cold_start_timeout");

    let mut client = proxy.sent(post(RESPONSES, body)).await;
    let [(name, data), (last, end)] = events(&mut client).await.try_into().unwrap();
    assert_eq!((name.as_str(), last.as_str()), ("error", "response.failed"));
    assert_eq!((&data["type"], &data["code"]), (&json!("error"), &json!("cold_start_timeout")));
    assert_eq!(data["error"]["code"], "cold_start_timeout", "by which OpenAI's SDKs raise");
    assert_eq!(end["response"]["status"], "failed");
    proxy.stop(&[("cold_start_timeout", 2)]).await;
}

#[tokio::test]
async fn late_server_errors_are_events_of_their_api() {
    let vllm = r#"{"type":"error","error":{"type":"BadRequestError","message":"too long"}}"#;
    let gateway = r#"{"error":{"message":"too long","type":"gateway","code":400}}"#;
    for (path, body, kind) in [
        (MESSAGES, vllm, "BadRequestError"),
        (MESSAGES, gateway, "invalid_request_error"),
        (RESPONSES, gateway, "gateway"),
    ] {
        let mut upstream = TestUpstream::cold().await;
        let proxy = TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await;
        let mut client = proxy.sent(post(path, r#"{"model":"tiny","stream":true}"#)).await;
        assert_eq!(client.head().await.unwrap().status(), 200);
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer("400 Bad Request", &[("Content-Type", "application/json")], body)).await;
        let events = events_after_head(&mut client).await;
        let (name, data) = &events[0];
        assert_eq!((name.as_str(), &data["error"]["type"]), ("error", &json!(kind)), "{path} {body}");
        assert_eq!(data["error"]["message"], "too long");
        proxy.stop(&[("completed", 1)]).await;
    }
}

#[tokio::test]
async fn errors_of_grpc_are_a_status_in_the_head() {
    let upstream = TestUpstream::cold().await;
    let timeouts = InterceptTimeouts {
        readiness: Some(Duration::from_millis(50).into()),
        ..InterceptTimeouts::default()
    };
    let proxy =
        TestProxy::intercepting(&upstream.url(), Intercept { timeouts, ..Intercept::default() }).await;
    let call = "POST /inference.GRPCInferenceService/ModelInfer HTTP/1.1\r\nHost: api.test\r\nTE: trailers\r\n\
         Content-Type: application/grpc\r\nContent-Length: 5\r\n\r\n\0\0\0\0\0";
    let failed = proxy.ask(call).await;
    assert_eq!((failed.status(), failed.get("content-type")), (200, Some("application/grpc")));
    // UNAVAILABLE, which gRPC clients retry after the pushback.
    assert_eq!((failed.get("grpc-status"), failed.get("grpc-retry-pushback-ms")), (Some("14"), Some("5000")));
    assert!(failed.get("grpc-message").unwrap().contains("timeouts.readiness of the route"));
    assert!(failed.text().is_empty());
    // Metrics count the original outcome and status.
    proxy.await_outcome("cold_start_timeout", 504, 1).await;
    let refused = call.replace("TE:", "x-anteroom-max-wait: soon\r\nTE:");
    let refused = proxy.ask(refused).await;
    assert_eq!((refused.get("grpc-status"), refused.get("grpc-retry-pushback-ms")), (Some("3"), Some("-1")));
    proxy.stop(&[("cold_start_timeout", 1)]).await;
}
