//! Reloads while requests are held and streaming: no request is lost.

use std::sync::{Arc, atomic::Ordering};

use anteroom::app::Command;

use crate::support::{
    TestProxy, TestUpstream,
    proxy::parse,
    route, routes, until,
    upstream::{LAST, STREAM, chunk},
    wire::{CHAT, chat, get, post, streaming},
};

async fn await_listed_models(proxy: &TestProxy, names: &[&str]) {
    until("the new routes", async || {
        let listed = proxy.admin("/api/v1/routes").await.json();
        let routes = listed["routes"].as_array().unwrap();
        routes.iter().map(|route| route["name"].as_str().unwrap()).eq(names.iter().copied())
    })
    .await;
}

#[tokio::test]
async fn held_requests_go_to_the_new_target() {
    let (old, mut new) = (TestUpstream::cold().await, TestUpstream::warm().await);
    let proxy = TestProxy::tiny(&old.url(), "").await;
    let mut first = proxy.sent(chat("first")).await;
    proxy.await_tiny_held(1).await;
    let mut second = proxy.sent(streaming("second")).await;
    proxy.await_tiny_held(2).await;
    // A reload that leaves the route unchanged leaves its held requests in place.
    proxy.reload(&routes(&[route("tiny", &old.url(), ""), route("other", &old.url(), "")])).await;
    await_listed_models(&proxy, &["tiny", "other"]).await;
    assert_eq!(proxy.route("tiny").await["held"], 2);

    proxy.reload(&routes(&[route("tiny", &new.url(), "")])).await;
    for client in [&mut first, &mut second] {
        new.call().await.echo().await;
        assert_eq!(client.response().await.status(), 200);
    }
    assert_eq!(old.requests(), 0);
    assert_eq!(proxy.route("tiny").await["endpoints"].as_array().unwrap().len(), 1);
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn stream_survives_a_replaced_target() {
    let (mut old, mut new) = (TestUpstream::warm().await, TestUpstream::warm().await);
    let proxy = TestProxy::tiny(&old.url(), "").await;
    let mut client = proxy.sent(streaming("old")).await;
    let mut call = old.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    proxy.reload(&routes(&[route("tiny", &new.url(), "")])).await;
    until("the old one to get nothing more", async || {
        proxy.route("tiny").await["endpoints"][0]["ready"] == false
    })
    .await;
    let mut next = proxy.sent(chat("new")).await;
    new.call().await.echo().await;
    assert_eq!(next.response().await.json()["text"], "new");
    // The old target still has a stream, and the reload does not wait for it.
    call.send(chunk("still here")).await;
    client.parts_until("still here").await;
    call.finish(LAST).await;
    assert_eq!(client.rest().await.as_deref(), Some(""));
    until("the old one to be forgotten", async || {
        proxy.route("tiny").await["endpoints"].as_array().unwrap().len() == 1
    })
    .await;
    assert_eq!(old.requests(), 1);
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn removed_route_finishes_its_requests() {
    let (mut tiny, mut other) = (TestUpstream::cold().await, TestUpstream::warm().await);
    let (tiny_route, other_route) = (route("tiny", &tiny.url(), ""), route("other", &other.url(), ""));
    let proxy = TestProxy::start(&routes(&[tiny_route.clone(), other_route.clone()])).await;
    let mut held = proxy.sent(chat("held")).await;
    proxy.await_tiny_held(1).await;
    let ask_other = post(CHAT, r#"{"model":"other","stream":true,"text":"stream"}"#);
    let mut stream = proxy.sent(&ask_other).await;
    let mut call = other.call().await;
    call.body().await;
    call.send(STREAM).await;
    stream.head().await.unwrap();

    proxy.reload(&routes(&[route("third", &tiny.url(), "")])).await;
    await_listed_models(&proxy, &["third"]).await;
    proxy.ask(&ask_other).await.is_error(404, "model_not_found");
    let models = proxy.ask(get("/v1/models")).await.json();
    assert_eq!((&models["data"][0]["id"], &models["data"][1]), (&"third".into(), &serde_json::Value::Null));

    // Both routes are added again as new ones; the removed ones still finish their requests.
    proxy.reload(&routes(&[tiny_route, other_route])).await;
    await_listed_models(&proxy, &["tiny", "other"]).await;
    let mut again = proxy.sent(&ask_other).await;
    let mut second = other.call().await;
    second.body().await;
    second.reply("again").await;
    assert_eq!(again.response().await.status(), 200);

    tiny.wake();
    tiny.call().await.echo().await;
    assert_eq!(held.response().await.json()["text"], "held");
    call.finish(chunk("to the end") + LAST).await;
    assert_eq!(stream.rest().await.as_deref(), Some("to the end"));
    proxy.stop(&[("completed", 3)]).await;
}

#[tokio::test]
async fn disconnect_from_removed_route_is_detected() {
    let tiny = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&tiny.url(), "").await;
    let held = proxy.sent(chat("held")).await;
    proxy.await_tiny_held(1).await;
    proxy.reload(&routes(&[route("other", &tiny.url(), "")])).await;
    await_listed_models(&proxy, &["other"]).await;
    drop(held);
    // Without clients the removed route is dropped: probes of its target stop.
    until("the probes to end", async || {
        let before = tiny.accepted();
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        tiny.accepted() == before
    })
    .await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn reloaded_limits_apply_at_once() {
    let mut upstream = TestUpstream::warm().await;
    let config = |limits: &str, more: &str| {
        format!("limits: {{ {limits} }}\n{}", routes(&[route("tiny", &upstream.url(), more)]))
    };
    let tight = config("maxBodyBytes: 100", "hold: { maxRequests: 1 }, concurrency: { max: 1 }");
    let wide = config("maxBodyBytes: 10KiB", "hold: { maxRequests: 9 }, concurrency: { max: 3 }");
    let proxy = TestProxy::start(&tight).await;
    let mut clients = vec![proxy.sent(chat("0")).await];
    let first = upstream.call().await;
    clients.push(proxy.sent(chat("1")).await);
    proxy.await_tiny_held(1).await;
    proxy.ask(chat("2")).await.is_error(429, "saturated");
    proxy.ask(chat(&"x".repeat(100))).await.is_error(413, "request_too_large");

    proxy.reload(&wide).await;
    // The request that waited for the old limit is dispatched at once.
    let second = upstream.call().await;
    proxy.await_tiny_held(0).await;
    clients.push(proxy.sent(chat(&"x".repeat(100))).await);
    let third = upstream.call().await;
    clients.push(proxy.sent(chat("3")).await);
    proxy.await_tiny_held(1).await;
    assert_eq!(proxy.route("tiny").await["limits"]["concurrency_max"], 3);

    // A lower limit: requests in flight continue, and nothing is dispatched until there is room.
    proxy.reload(&tight).await;
    until("the limit", async || proxy.route("tiny").await["limits"]["concurrency_max"] == 1).await;
    proxy.ask(chat("4")).await.is_error(429, "saturated");
    second.echo().await;
    third.echo().await;
    proxy.await_tiny_in_flight(1).await;
    assert_eq!((proxy.route("tiny").await["held"].as_u64(), upstream.pending()), (Some(1), 0));
    first.echo().await;
    upstream.call().await.echo().await;
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.stop(&[("completed", 4)]).await;
}

#[tokio::test]
async fn reload_changes_the_total_body_budget() {
    let upstream = TestUpstream::cold().await;
    let config = |bytes: usize| {
        format!(
            "limits: {{ maxBodyBytes: 100, maxBufferedBytes: {bytes} }}\n{}",
            routes(&[route("tiny", &upstream.url(), "")])
        )
    };
    let proxy = TestProxy::start(&config(100)).await;
    let mut held = vec![proxy.sent(chat(&"x".repeat(50))).await];
    proxy.await_tiny_held(1).await;
    proxy.ask(chat(&"x".repeat(50))).await.is_error(503, "hold_queue_full");
    proxy.reload(&config(1000)).await;
    until("room for one more", async || {
        held.push(proxy.sent(chat(&"x".repeat(50))).await);
        proxy.metric("anteroom_held_requests", &[]).await >= 2
    })
    .await;
    drop(held);
    proxy.await_tiny_held(0).await;
    proxy.stopped(anteroom::drain::StopSignal::Interrupt).await;
}

#[tokio::test]
async fn held_request_keeps_the_policies_it_came_with() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "hold: { timeout: 15m }").await;
    let client = proxy.sent(chat("patient")).await;
    proxy.await_tiny_held(1).await;
    proxy.reload(&routes(&[route("tiny", &upstream.url(), "hold: { timeout: 20ms }")])).await;
    until("the new deadline", async || proxy.route("tiny").await["limits"]["hold_timeout_ms"] == 20.0).await;
    proxy.ask(chat("hasty")).await.is_error(504, "cold_start_timeout");
    proxy.await_tiny_held(1).await;
    drop(client);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1), ("cold_start_timeout", 1)]).await;
}

#[tokio::test]
async fn file_routes_precede_cluster_routes() {
    let (file, mut cluster) = (TestUpstream::cold().await, TestUpstream::cold().await);
    let proxy = TestProxy::tiny(&file.url(), "match: {models: [filed]}").await;
    let found = parse(&routes(&[route("models/tiny", &cluster.url(), "match: {models: [tiny]}")])).routes;
    let found = found.into_iter().map(Arc::new).collect();
    proxy.commands.send(Command::ClusterRoutes(Arc::new(found))).await.unwrap();
    await_listed_models(&proxy, &["tiny", "models/tiny"]).await;
    let mut held = proxy.sent(chat("first")).await;
    until("to be held", async || proxy.route("models/tiny").await["held"] == 1).await;

    proxy.reload(&routes(&[route("other", &file.url(), "match: {models: [filed]}")])).await;
    await_listed_models(&proxy, &["other", "models/tiny"]).await;
    assert_eq!(proxy.route("models/tiny").await["held"], 1);
    // A route in the file with the name of a cluster route: it is left out until the cluster route is gone.
    proxy.reload(&routes(&[route("models/tiny", &cluster.url(), "match: {models: [tiny]}")])).await;
    await_listed_models(&proxy, &["models/tiny"]).await;
    assert_eq!(proxy.route("models/tiny").await["held"], 1, "the same gate");
    proxy.commands.send(Command::ClusterRoutes(Arc::default())).await.unwrap();
    cluster.wake();
    cluster.call().await.echo().await;
    assert_eq!(held.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn proxy_without_cluster_routes_is_not_ready() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    assert_eq!(proxy.admin("/readyz").await.status(), 200);
    proxy.shared.awaits_routes.store(true, Ordering::Relaxed);
    let answer = proxy.admin("/readyz").await;
    assert_eq!((answer.status(), answer.text().contains("routes of the cluster")), (503, true));
    proxy.commands.send(Command::ClusterRoutes(Arc::default())).await.unwrap();
    until("to be ready", async || proxy.admin("/readyz").await.status() == 200).await;
    proxy.stop(&[]).await;
}
