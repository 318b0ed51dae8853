//! Requests that wake nothing: they get a response at once, and the target is not even probed.

use crate::support::{
    TestProxy, TestUpstream, h2, route, routes,
    wire::{CHAT, get, post},
};

#[tokio::test]
async fn models_and_health_are_answered_locally() {
    let (tiny, big) = (TestUpstream::cold().await, TestUpstream::cold().await);
    let more = "match: { models: [tiny, org/tiny-lora] }";
    let config = routes(&[route("tiny", &tiny.url(), more), route("big", &big.url(), "")]);
    let proxy = TestProxy::start(&config).await;
    let mut client = proxy.client().await;

    let list = client.ask(get("/v1/models")).await;
    assert_eq!((list.status(), list.get("content-type")), (200, Some("application/json")));
    let ids: Vec<_> =
        list.json()["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
    assert_eq!(ids, ["big", "org/tiny-lora", "tiny"], "every model, whether it runs or not");

    let model = client.ask(get("/v1/models/org/tiny-lora")).await;
    assert_eq!((model.status(), model.json()["id"].as_str()), (200, Some("org/tiny-lora")));
    client.ask(get("/v1/models/other")).await.is_error(404, "model_not_found");

    for path in ["/health", "/healthz", "/livez", "/readyz", "/ping", "/", "/health?verbose=1"] {
        assert_eq!(client.ask(get(path)).await.status(), 200, "{path}");
    }
    for path in ["/v1/models", "/v1/models/tiny", "/health"] {
        client.send(get(path).replace("GET", "HEAD")).await;
        let head = client.head().await.unwrap();
        assert_eq!(head.status(), 200, "HEAD {path}");
        // A response to HEAD has no body: the next response on the connection parses correctly.
        assert_eq!(client.ask(get("/ping")).await.status(), 200, "after HEAD {path}");
    }
    assert_eq!((tiny.accepted(), big.accepted()), (0, 0), "not even a probe");
    assert_eq!(proxy.metric("anteroom_admitted_requests_total", &[]).await, 0);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn unrouted_request_is_rejected_at_once() {
    let upstream = TestUpstream::cold().await;
    let more = "match: { models: [tiny], hosts: [api.test] }";
    let proxy = TestProxy::tiny(&upstream.url(), more).await;
    let mut client = proxy.client().await;
    let body = r#"{"model":"tiny"}"#;
    for path in [
        "/wp-login.php",
        "/v1",
        "/v1/load_lora_adapter",
        "/metrics",
        "/v1/chat/completions/",
        "//v1/chat/completions",
    ] {
        client.ask(post(path, body)).await.is_error(404, "unknown_path");
        client.ask(get(path)).await.is_error(404, "unknown_path");
    }
    let other = client.ask(post(CHAT, r#"{"model":"other"}"#)).await;
    other.is_error(404, "model_not_found");
    assert_eq!(other.get("x-should-retry"), Some("false"));
    assert_eq!(other.json()["error"]["param"], "model");
    client.ask(post(CHAT, body).replace("api.test", "evil.test")).await.is_error(404, "unknown_path");

    let wrong = client.ask(get(CHAT)).await;
    wrong.is_error(405, "method_not_allowed");
    assert_eq!(wrong.get("allow"), Some("POST"));
    client.ask(post("/v1/models", "{}")).await.is_error(405, "method_not_allowed");
    // Stored responses are lost when the model server stops, so asking for one starts nothing.
    client.ask(get("/v1/responses/resp_1")).await.is_error(404, "unknown_path");

    for (body, reason) in [
        ("", "empty"),
        ("{", "not ended"),
        ("[]", "no object"),
        (r#"{"messages":[]}"#, "no model"),
        (r#"{"model":1}"#, "no text"),
        (r#"{"model":"tiny","model":"tiny"}"#, "twice"),
        (r#"{"model":"tiny"}{}"#, "two bodies"),
    ] {
        let refused = client.ask(post(CHAT, body)).await;
        assert_eq!((refused.status(), &*refused.code()), (400, "invalid_request"), "{reason}");
    }
    assert_eq!(upstream.accepted(), 0);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn http_2_is_answered_likewise() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = h2::connect(proxy.address).await;
    for (path, body, status) in [(CHAT, r#"{"model":"other"}"#, 404), (CHAT, "{", 400), ("/nothing", "", 404)]
    {
        let response = client.send_request(h2::post(proxy.address, path, body)).await.unwrap();
        assert_eq!(response.status(), status, "{path} {body}");
    }
    assert_eq!(upstream.accepted(), 0);
    proxy.stop(&[]).await;
}
