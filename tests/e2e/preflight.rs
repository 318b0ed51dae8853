//! CORS preflights: forwarded to the model server while it is up, and never a reason to start it. For configured
//! origins and loopback addresses see `cross_site.rs`.

use crate::support::{
    TestProxy, TestUpstream, route, routes,
    upstream::answer,
    wire::{CHAT, chat},
};

fn preflight(host: &str, path: &str, method: &str) -> String {
    format!(
        "OPTIONS {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: https://chat.test\r\n\
         Access-Control-Request-Method: {method}\r\nAccess-Control-Request-Headers: authorization\r\n\r\n"
    )
}

async fn warm(proxy: &TestProxy, upstream: &mut TestUpstream) {
    let mut client = proxy.sent(chat("x")).await;
    upstream.call().await.echo().await;
    client.response().await;
}

#[tokio::test]
async fn preflight_is_answered_by_the_warm_server() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 1 }").await.reachable();
    warm(&proxy, &mut upstream).await;
    for (path, method) in [(CHAT, "POST"), ("/v1/responses/resp_1", "DELETE"), ("/v1/embeddings", "POST")] {
        let mut client = proxy.sent(preflight("api.test", path, method)).await;
        let call = upstream.call().await;
        assert_eq!(call.head.line(), format!("OPTIONS {path}"));
        assert_eq!(call.head.get("origin"), Some("https://chat.test"));
        assert_eq!(call.head.get("access-control-request-headers"), Some("authorization"));
        assert_eq!(proxy.route("tiny").await["in_flight"], 1);
        let allowed = [("Access-Control-Allow-Origin", "https://chat.test"), ("Vary", "Origin")];
        call.finish(answer("204 No Content", &allowed, "").replace("Content-Length: 0\r\n", "")).await;
        let response = client.response().await;
        assert_eq!(response.status(), 204);
        assert_eq!(response.get("access-control-allow-origin"), Some("https://chat.test"));
    }
    // Without a free slot the preflight fails instead of waiting.
    let mut busy = proxy.sent(chat("busy")).await;
    let call = upstream.call().await;
    proxy.ask(preflight("api.test", CHAT, "POST")).await.is_error(429, "saturated");
    call.echo().await;
    busy.response().await;
    // A preflight whose connection breaks is not retried, except that the first connection was pooled and may have been
    // stale.
    let mut client = proxy.sent(preflight("api.test", CHAT, "POST")).await;
    upstream.call().await.reset();
    upstream.call().await.reset();
    client.response().await.is_error(502, "upstream_error");
    proxy.stop(&[("completed", 5), ("upstream_error", 1)]).await;
}

#[tokio::test]
async fn preflight_wakes_nothing() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await.reachable();
    proxy.ask(preflight("api.test", CHAT, "POST")).await.is_error(405, "method_not_allowed");
    let route = proxy.route("tiny").await;
    assert_eq!((&route["state"], &route["held"]), (&"idle".into(), &0.into()));
    assert_eq!((upstream.probes(), upstream.requests()), (0, 0));
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn preflight_needs_a_route_without_its_model() {
    let (mut ours, others) = (TestUpstream::warm().await, TestUpstream::warm().await);
    let by_host = "match: { hosts: [tiny.test], models: [tiny] }";
    let proxy = TestProxy::start(&routes(&[
        route("tiny", &ours.url(), by_host),
        route("one", &others.url(), ""),
        route("two", &others.url(), ""),
    ]))
    .await
    .reachable();
    let mut client = proxy.sent(chat("x").replace("api.test", "tiny.test")).await;
    ours.call().await.echo().await;
    client.response().await;
    // The host has only one route.
    let mut client = proxy.sent(preflight("tiny.test", CHAT, "POST")).await;
    ours.call().await.finish(answer("200 OK", &[], "")).await;
    assert_eq!(client.response().await.status(), 200);
    // With two routes, each could allow different origins.
    proxy.ask(preflight("api.test", CHAT, "POST")).await.is_error(405, "method_not_allowed");
    // A path that the proxy serves itself, and requests that are not preflights.
    proxy.ask(preflight("tiny.test", "/v1/models", "GET")).await.is_error(405, "method_not_allowed");
    let no_preflight =
        format!("OPTIONS {CHAT} HTTP/1.1\r\nHost: tiny.test\r\nOrigin: https://chat.test\r\n\r\n");
    proxy.ask(no_preflight).await.is_error(405, "method_not_allowed");
    proxy.ask(preflight("tiny.test", CHAT, "GET")).await.is_error(405, "method_not_allowed");
    assert_eq!(ours.pending() + others.pending(), 0);
    proxy.stop(&[("completed", 2)]).await;
}
