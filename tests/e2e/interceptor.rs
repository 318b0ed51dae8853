//! Routes derived from an `InterceptorRoute` of the KEDA HTTP Add-on.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anteroom::{
    app::Command,
    domain::{
        Intercept, InterceptTimeouts, Matcher, Overflow, Period, ResponseMode, StaticAnswer, StaticBody,
        StaticRoute,
    },
};

use crate::support::{
    TestProxy, TestUpstream,
    proxy::{parse, route, routes},
    until,
    upstream::{Port, STREAM, answer, chunk},
    wire::{BodyPart, chat, get, post},
};

const ADD_ON_COLD_START_HEADER: &str = "x-keda-http-cold-start";

fn text(status: u16, body: &str) -> StaticAnswer {
    StaticAnswer::new(status, [], StaticBody::Text(body.to_owned().into())).unwrap()
}

fn paths(paths: &[&str]) -> Matcher {
    Matcher { paths: paths.iter().map(|path| (*path).to_owned()).collect(), ..Matcher::default() }
}

fn readiness(limit: Duration) -> InterceptTimeouts {
    InterceptTimeouts { readiness: Some(limit.into()), ..InterceptTimeouts::default() }
}

fn placeholder() -> Intercept {
    Intercept { placeholder: Some(text(503, "<h1>Loading</h1>")), ..Intercept::default() }
}

/// Returns a request without a body.
fn bare(method: &str, path: &str) -> String {
    get(path).replacen("GET", method, 1)
}

/// Makes the target known to be up.
async fn warm_up(proxy: &TestProxy, upstream: &mut TestUpstream) {
    let mut client = proxy.sent(get("/warm")).await;
    upstream.call().await.finish(answer("204 No Content", &[], "")).await;
    assert_eq!(client.response().await.status(), 204);
    proxy.await_tiny_in_flight(0).await;
}

#[tokio::test]
async fn every_method_and_path_is_passed_on() {
    let mut upstream = TestUpstream::warm().await;
    let rule = |hosts: &str| Matcher { hosts: vec![hosts.into()], ..Matcher::default() };
    let rules = vec![rule("other.test"), rule("*.test")];
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept { rules, ..Intercept::default() }).await;
    let mut client = proxy.client().await;
    for request in [
        get("/"),
        get("/v1/models"),
        get("/health?verbose"),
        bare("DELETE", "/carts/7"),
        bare("OPTIONS", "/v1/chat/completions"),
        bare("PROPFIND", "/"),
        post("/orders", "this is no JSON"),
        post("/v1/chat/completions", "{\"model\": \"a\", \"model\": \"b\"}"),
    ] {
        client.send(&request).await;
        let mut call = upstream.call().await;
        assert_eq!(call.head.start, request.split("\r\n").next().unwrap());
        assert_eq!(call.body().await, request.split_once("\r\n\r\n").unwrap().1);
        let spoofed = [(ADD_ON_COLD_START_HEADER, "true"), ("x-anteroom-cold-start", "true")];
        call.finish(answer("200 OK", &spoofed, "from the application")).await;
        let answer = client.response().await;
        assert_eq!((answer.status(), answer.text().as_str()), (200, "from the application"));
        assert_eq!(
            (answer.get(ADD_ON_COLD_START_HEADER), answer.get("x-anteroom-cold-start")),
            (Some("false"), None)
        );
    }
    proxy
        .ask("CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n")
        .await
        .is_error(400, "invalid_request");
    // Other hosts get only the API.
    let elsewhere = |path| get(path).replace("api.test", "api.example");
    proxy.ask(elsewhere("/")).await.json();
    proxy.ask(elsewhere("/anything")).await.is_error(404, "unknown_path");
    assert_eq!(proxy.ask(elsewhere("/v1/models")).await.json()["data"][0]["id"], "models");
    proxy.stop(&[("completed", 8)]).await;
}

#[tokio::test]
async fn ordinary_route_sets_cold_start_header() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(chat("warm")).await;
    upstream.call().await.finish(answer("200 OK", &[(ADD_ON_COLD_START_HEADER, "true")], "{}")).await;
    assert_eq!(client.response().await.get(ADD_ON_COLD_START_HEADER), None);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn header_rule_without_value_matches_any_value() {
    let mut upstream = TestUpstream::warm().await;
    let rules = vec![Matcher { present: ["x-preview".into()].into(), ..Matcher::default() }];
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept { rules, ..Intercept::default() }).await;
    proxy.ask(get("/page")).await.is_error(404, "unknown_path");
    let with = get("/page").replace("\r\n\r\n", "\r\nX-Preview: whatever\r\n\r\n");
    let mut client = proxy.sent(with).await;
    upstream.call().await.finish(answer("200 OK", &[], "")).await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn held_response_has_cold_start_header() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    let mut client = proxy.sent(post("/upload", "not JSON")).await;
    proxy.await_tiny_held(1).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    let mut call = upstream.call().await;
    assert_eq!(call.body().await, "not JSON");
    call.finish(answer("201 Created", &[], "")).await;
    let answer = client.response().await;
    assert_eq!((answer.status(), answer.get(ADD_ON_COLD_START_HEADER)), (201, Some("true")));
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn late_target_fails_or_uses_the_fallback() {
    let upstream = TestUpstream::cold().await;
    let timeouts = readiness(Duration::from_millis(50));
    let proxy =
        TestProxy::intercepting(&upstream.url(), Intercept { timeouts, ..Intercept::default() }).await;
    let failed = proxy.ask(get("/page")).await;
    failed.is_error(504, "cold_start_timeout");
    assert!(failed.text().contains("timeouts.readiness of the route"), "{}", failed.text());
    assert_eq!(failed.get(ADD_ON_COLD_START_HEADER), None);

    let mut fallback = TestUpstream::warm().await;
    let at = |address: String| Intercept { timeouts, fallback: Some(address.into()), ..Intercept::default() };
    proxy.intercept(&upstream.url(), at(fallback.address.to_string())).await;
    let mut client = proxy.sent(post("/page", "what was held")).await;
    let mut call = fallback.call().await;
    assert_eq!(call.body().await, "what was held");
    proxy.await_tiny_in_flight(1).await;
    assert_eq!(proxy.route("tiny").await["held"], 0);
    call.finish(answer("200 OK", &[(ADD_ON_COLD_START_HEADER, "true")], "from the fallback")).await;
    let answer = client.response().await;
    assert_eq!((answer.status(), answer.text().as_str()), (200, "from the fallback"));
    assert_eq!(
        (answer.get(ADD_ON_COLD_START_HEADER), answer.get("x-anteroom-cold-start")),
        (None, Some("true"))
    );
    assert_eq!(proxy.metric("anteroom_fallback_requests_total", &["route=\"tiny\""]).await, 1);

    let nowhere = Port::reserve();
    proxy.intercept(&upstream.url(), at(nowhere.url()[7..].to_owned())).await;
    let failed = proxy.ask(get("/page")).await;
    failed.is_error(502, "upstream_error");
    assert!(failed.text().contains("its fallback"), "{}", failed.text());
    proxy.stop(&[("completed", 1), ("cold_start_timeout", 1), ("upstream_error", 1)]).await;
}

#[tokio::test]
async fn placeholder_is_immediate_and_wakes_the_target() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::intercepting(&upstream.url(), placeholder()).await;
    let held = proxy.ask(get("/page")).await;
    assert_eq!((held.status(), held.text().as_str()), (503, "<h1>Loading</h1>"));
    assert_eq!(
        (held.get("content-type"), held.get(ADD_ON_COLD_START_HEADER)),
        (Some("text/html; charset=utf-8"), None)
    );
    upstream.probed().await;
    let mut client = proxy.sent(bare("HEAD", "/page")).await;
    let head = client.head().await.unwrap();
    assert_eq!((head.status(), head.get("content-length")), (503, Some("16")));
    assert!(client.buf.is_empty(), "no body to HEAD");
    assert_eq!(proxy.metric("anteroom_static_answers_total", &["kind=\"placeholder\""]).await, 2);

    upstream.wake();
    crate::support::until("the target to be up", async || proxy.route("tiny").await["state"] == "ready")
        .await;
    let mut client = proxy.sent(get("/page")).await;
    upstream.call().await.finish(answer("200 OK", &[], "the page")).await;
    assert_eq!(client.response().await.text(), "the page");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn hold_limit_rejects_or_serves_placeholder() {
    let mut upstream = TestUpstream::cold().await;
    let bounded = |overflow| Intercept { max_pending: Some(1), overflow, ..placeholder() };
    let refusing = Intercept { placeholder: None, ..bounded(Overflow::Placeholder) };
    let proxy = TestProxy::intercepting(&upstream.url(), refusing).await;
    let mut first = proxy.sent(get("/first")).await;
    proxy.await_tiny_held(1).await;
    proxy.ask(get("/second")).await.is_error(503, "hold_queue_full");
    proxy.intercept(&upstream.url(), bounded(Overflow::Placeholder)).await;
    assert_eq!(proxy.ask(get("/second")).await.text(), "<h1>Loading</h1>");
    assert_eq!(proxy.route("tiny").await["held"], 1);

    upstream.wake();
    let call = upstream.call().await;
    assert_eq!(call.head.line(), "GET /first");
    call.finish(answer("200 OK", &[], "")).await;
    assert_eq!(first.response().await.get(ADD_ON_COLD_START_HEADER), Some("true"));
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn static_routes_raise_no_demand() {
    let mut upstream = TestUpstream::cold().await;
    let pages = BTreeMap::from([
        ("index.html".to_owned(), "<p>closed</p>".into()),
        ("state.json".to_owned(), "{}".into()),
    ]);
    let route = |path, answer, mode| StaticRoute { rules: vec![paths(&[path])], answer, mode };
    let static_routes = vec![
        route("/healthz", text(200, "OK"), ResponseMode::WhenUnavailable),
        route("/old", text(410, ""), ResponseMode::Always),
        StaticRoute {
            rules: vec![paths(&["/index.html", "/state.json"]), paths(&["/favicon.ico"])],
            answer: StaticAnswer::new(200, [("Cache-Control", "no-store")], StaticBody::Files(pages))
                .unwrap(),
            mode: ResponseMode::Always,
        },
        route("/missing", StaticAnswer::new(200, [], StaticBody::Missing).unwrap(), ResponseMode::Always),
    ];
    let intercept = Intercept { static_routes, ..Intercept::default() };
    let proxy = TestProxy::intercepting(&upstream.url(), intercept).await;
    for (path, status, kind, body) in [
        ("/healthz/live", 200, Some("text/plain; charset=utf-8"), "OK"),
        ("/old/page", 410, None, ""),
        ("/index.html", 200, Some("text/html; charset=utf-8"), "<p>closed</p>"),
        ("/state.json", 200, Some("application/json"), "{}"),
        ("/favicon.ico", 200, None, ""),
        ("/missing", 500, None, "Internal Server Error\n"),
    ] {
        let answer = proxy.ask(get(path)).await;
        assert_eq!((answer.status(), answer.text().as_str()), (status, body), "{path}");
        assert_eq!(
            (answer.get("content-type"), answer.get(ADD_ON_COLD_START_HEADER)),
            (kind, None),
            "{path}"
        );
    }
    assert_eq!(proxy.ask(get("/index.html")).await.get("cache-control"), Some("no-store"));
    assert_eq!((upstream.accepted(), proxy.route("tiny").await["state"].as_str()), (0, Some("idle")));
    assert_eq!(proxy.metric("anteroom_static_answers_total", &["kind=\"static\""]).await, 7);

    // Static routes that apply only while the target is not up: once it is, their requests are forwarded.
    let mut client = proxy.sent(get("/page")).await;
    proxy.await_tiny_held(1).await;
    upstream.wake();
    upstream.call().await.finish(answer("200 OK", &[], "")).await;
    assert_eq!(client.response().await.status(), 200);
    client.send(get("/healthz")).await;
    let call = upstream.call().await;
    assert_eq!(call.head.line(), "GET /healthz");
    proxy.await_tiny_in_flight(1).await;
    call.finish(answer("200 OK", &[], "really")).await;
    let passed = client.response().await;
    assert_eq!((passed.text().as_str(), passed.get(ADD_ON_COLD_START_HEADER)), ("really", None));
    assert_eq!(proxy.ask(get("/old")).await.status(), 410);
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn slow_application_is_a_504() {
    let mut upstream = TestUpstream::warm().await;
    let limit = Some(Period::from_millis(50));
    for timeouts in [
        InterceptTimeouts { response_header: limit, ..InterceptTimeouts::default() },
        InterceptTimeouts { request: limit, ..InterceptTimeouts::default() },
    ] {
        let intercept = Intercept { timeouts, ..Intercept::default() };
        let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
        warm_up(&proxy, &mut upstream).await;
        proxy.intercept(&upstream.url(), intercept).await;
        let mut client = proxy.sent(get("/page")).await;
        let call = upstream.call().await;
        client.response().await.is_error(504, "upstream_timeout");
        call.gone().await;
        proxy.await_outcome("upstream_error", 504, 1).await;
        proxy.stop(&[("completed", 1), ("upstream_error", 1)]).await;
    }
}

#[tokio::test]
async fn request_time_out_bounds_wait_and_answer() {
    let mut upstream = TestUpstream::cold().await;
    let limit = InterceptTimeouts { request: Some(Period::from_secs(3)), ..InterceptTimeouts::default() };
    // The fallback is not used: by the time the wait ends, `timeouts.request` has expired.
    let fallback = Some("127.0.0.1:1".into());
    let intercept = Intercept { timeouts: limit, fallback, ..Intercept::default() };
    let proxy = TestProxy::intercepting(&upstream.url(), intercept).await;
    let late = proxy.ask(get("/page")).await;
    late.is_error(504, "cold_start_timeout");
    assert!(late.text().contains("timeouts.request of the route"), "{}", late.text());

    upstream.wake();
    crate::support::until("the target to be up", async || proxy.route("tiny").await["state"] == "ready")
        .await;
    let mut client = proxy.sent(get("/events")).await;
    let mut call = upstream.call().await;
    call.send(STREAM).await;
    call.send(chunk("one")).await;
    assert_eq!(client.head().await.unwrap().status(), 200);
    assert_eq!(client.part().await, BodyPart::Data(b"one".into()));
    assert_eq!(client.part().await, BodyPart::Broken);
    call.gone().await;
    proxy.stop(&[("cold_start_timeout", 1), ("upstream_error", 1)]).await;
}

#[tokio::test]
async fn non_idempotent_request_is_not_retried() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    warm_up(&proxy, &mut upstream).await;
    let mut client = proxy.sent(post("/orders", "one")).await;
    drop(upstream.call().await);
    client.response().await.is_error(502, "upstream_error");
    assert_eq!(upstream.pending(), 0);
    let mut client = proxy.sent(get("/orders")).await;
    drop(upstream.call().await);
    upstream.call().await.finish(answer("200 OK", &[], "")).await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 2), ("upstream_error", 1)]).await;
}

/// Health checks and common first paths, for hosts whose routes were removed or never existed.
#[tokio::test]
async fn hosts_that_no_route_claims_are_not_found() {
    let upstream = TestUpstream::cold().await;
    let proxy =
        TestProxy::start(&routes(&[route("llm", &upstream.url(), "match: { hosts: [llm.test] }")])).await;
    let app = |hosts: &[&str]| {
        let hosts = hosts.iter().map(|host| (*host).into()).collect();
        let rules = vec![Matcher { hosts, ..Matcher::default() }];
        let mut route = parse(&routes(&[route("tiny", &upstream.url(), "match: {}")])).routes.remove(0);
        route.intercept = Some(Arc::new(Intercept { rules, ..Intercept::default() }));
        Command::ClusterRoutes(Arc::new(vec![Arc::new(route)]))
    };
    let paths = ["/", "/health", "/healthz", "/ping", "/v1/models", "/v1/models/llm", "/favicon.ico"];
    let ask = async |host: &str, path: &str| proxy.ask(get(path).replace("api.test", host)).await;
    proxy.commands.send(app(&["app.test"])).await.unwrap();
    until("the route", async || proxy.route("tiny").await.is_object()).await;
    for path in paths {
        ask("other.test", path).await.is_error(404, "unknown_path");
    }
    // The proxy's own paths, for load balancers and kubelets.
    for path in &paths[..4] {
        assert_eq!(ask("127.0.0.1", path).await.status(), 200, "{path}");
    }
    // An application at zero gets all its requests, even on health paths that the proxy serves for other hosts.
    let held = proxy.sent(get("/health").replace("api.test", "app.test")).await;
    proxy.await_tiny_held(1).await;
    drop(held);
    proxy.await_tiny_held(0).await;
    proxy.commands.send(Command::ClusterRoutes(Arc::default())).await.unwrap();
    until("no route", async || proxy.route("tiny").await.is_null()).await;
    for path in paths {
        ask("app.test", path).await.is_error(404, "unknown_path");
    }
    assert_eq!(ask("llm.test", "/").await.status(), 200);
    assert_eq!(ask("llm.test", "/v1/models").await.status(), 200);
    proxy.stop(&[("client_gone", 1)]).await;
}
