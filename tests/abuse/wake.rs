//! Conditions for waking a GPU: only a complete request that a route serves does so (law 8).

use crate::{
    frames::{RawH2, get as get_h2},
    support::{
        TestProxy, TestUpstream, Wire, route, routes, until,
        wire::{CHAT, chat, get, post, post_with},
    },
};

async fn assert_no_demand(proxy: &TestProxy, upstream: &TestUpstream, what: &str) {
    let gate = proxy.gate().await;
    let counts = gate.counts();
    assert_eq!((counts.activations, counts.is_active(), counts.held), (0, false, 0), "{what}");
    assert_eq!((gate.counters().admitted(), upstream.accepted()), (0, 0), "{what}");
}

#[tokio::test]
async fn scanners_and_health_checks_wake_nothing() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: { models: [tiny], hosts: [api.test] }").await;
    let body = r#"{"model":"tiny"}"#;
    let mut requests = vec![
        ("another model", post(CHAT, r#"{"model":"other"}"#)),
        ("no model", post(CHAT, "{}")),
        ("no JSON", post(CHAT, "tiny")),
        ("the model twice", post(CHAT, r#"{"model":"tiny","model":"tiny"}"#)),
        ("another host", post(CHAT, body).replace("api.test", "other.test")),
        ("a body that is too large", post(CHAT, "").replace("Length: 0", "Length: 99999999999")),
        ("a body that is hidden", post_with(CHAT, &[("Content-Encoding", "gzip")], body)),
        ("a wait that is none", post_with(CHAT, &[("X-Anteroom-Max-Wait", "soon")], body)),
        ("a GET of what is posted", get(CHAT)),
        ("OPTIONS", post(CHAT, body).replacen("POST", "OPTIONS", 1)),
        ("TRACE", post(CHAT, body).replacen("POST", "TRACE", 1)),
        ("CONNECT", post(CHAT, body).replacen("POST", "CONNECT", 1)),
        ("an administrator's path", post("/v1/load_lora_adapter", body)),
        ("half a body", chat("x").trim_end_matches('}').into()),
        ("an upgrade", post_with(CHAT, &[("Connection", "Upgrade"), ("Upgrade", "websocket")], "{}")),
    ];
    for path in [
        "/",
        "/health",
        "/healthz",
        "/readyz",
        "/metrics",
        "/v1/models",
        "/v1/models/tiny",
        "/robots.txt",
        "/favicon.ico",
        "/.env",
        "/wp-login.php",
        "/api/v1/routes",
        "/sleep",
        "/wake_up",
        "/v1/../v1/chat/completions",
    ] {
        requests.push((path, get(path)));
        requests.push((path, post(path, body)));
    }
    for (what, request) in requests {
        let mut client = proxy.sent(request).await;
        client.shutdown().await;
        let _ = client.end().await;
        assert_no_demand(&proxy, &upstream, what).await;
        let mut client = RawH2::connect(proxy.address).await;
        client.send(get_h2(1, "/health")).await;
        assert_eq!(client.answer(1).await, Ok(200));
    }
    // This request may wake the target.
    let client = proxy.sent(chat("x")).await;
    until("it to be held", async || proxy.gate().await.held() == 1).await;
    assert!(proxy.gate().await.counts().is_active());
    drop(client);
    proxy.await_tiny_held(0).await;
}

#[tokio::test]
async fn admin_port_is_read_only() {
    let upstream = TestUpstream::cold().await;
    let config = routes(&[route("tiny", &upstream.url(), "")]);
    let proxy = TestProxy::start(&config).await;
    let paths = [
        "/",
        "/metrics",
        "/livez",
        "/readyz",
        "/healthz",
        "/api/v1/routes",
        "/api/v1/routes/tiny",
        "/api/v1/cold-starts",
        "/api/v1/requests",
        "/api/v1/config",
        "/api/v1/reload",
        "/quitquitquit",
        "/debug/pprof",
        "/v1/chat/completions",
    ];
    for path in paths {
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\nContent-Length: 16\r\n\r\n{{\"model\":\"tiny\"}}"
            );
            let mut client = Wire::connect(proxy.admin).await;
            client.send(request).await;
            let status = client.head().await.map(|head| head.status());
            let looks = ["GET", "HEAD", "OPTIONS"].contains(&method);
            assert!(looks || status.is_none_or(|status| status >= 400), "{method} {path}: {status:?}");
        }
    }
    assert_no_demand(&proxy, &upstream, "the admin port").await;
    assert_eq!(proxy.ask(get("/health")).await.status(), 200, "it lives");
    proxy.stop(&[]).await;
}
