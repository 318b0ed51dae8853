//! Two replicas: each answers KEDA for both.

use anteroom::drain::StopSignal;

use super::scaler::{next, scaler, tiny};
use crate::support::{
    TestProxy, TestUpstream, route, routes, until,
    upstream::{LAST, Port, STREAM},
    wire::{chat, streaming},
};

/// Starts two proxies that know each other's addresses and have the same routes.
async fn replicas(url: &str) -> (TestProxy, TestProxy) {
    // The first replica needs the port of the second before it is bound.
    let port = Port::reserve();
    let place = port.url().replace("http://", "");
    let config = |listen: &str, service: String| {
        format!(
            "drainTimeout: 1s\nscaler: 127.0.0.1:0\npeers: {{ listen: \"{listen}\", service: \"{service}\" }}\n{}",
            routes(&[route("tiny", url, "scaling: { linger: 0s }, concurrency: { max: 4 }")])
        )
    };
    let first = TestProxy::start(&config("127.0.0.1:0", place.clone())).await;
    let service = first.peers.unwrap().to_string();
    let second = TestProxy::start(&config(&place, service)).await;
    for proxy in [&first, &second] {
        until("each other", async || proxy.metric("anteroom_peers", &["connected"]).await == 1).await;
    }
    (first, second)
}

#[tokio::test]
async fn each_pushes_and_answers_for_both() {
    let mut upstream = TestUpstream::cold().await;
    let (first, second) = replicas(&upstream.url()).await;
    let mut scaler = scaler(&second).await;
    let mut stream = scaler.stream_is_active(tiny()).await.unwrap().into_inner();
    assert!(!next(&mut stream).await.unwrap().result);
    let mut waiting = first.sent(chat("x")).await;
    assert!(next(&mut stream).await.unwrap().result, "what the other one holds");
    assert!(scaler.is_active(tiny()).await.unwrap().into_inner().result);
    // Only the first replica has contacted the server, so only that one knows that it is up.
    upstream.wake();
    upstream.call().await.echo().await;
    assert_eq!(waiting.response().await.status(), 200);
    let mut client = first.sent(streaming("y")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    let depth = async || {
        second.metrics().await.lines().any(|line| line == "anteroom_scaler_queue_depth{route=\"tiny\"} 1.25")
    };
    until("1 × 5 ÷ 4", depth).await;
    call.finish(LAST).await;
    client.rest().await;
    until("no demand", async || second.metric("anteroom_scaler_active", &["tiny"]).await == 0).await;

    // Orderly end of a replica: its demand is removed at once, long before the timeout of 10 s.
    let mut waiting = first.sent(chat("z")).await;
    until("demand", async || second.metric("anteroom_scaler_active", &["tiny"]).await == 1).await;
    let account = first.stopped(StopSignal::Interrupt).await;
    assert_eq!(account.admitted, 3);
    until("a goodbye", async || {
        second.metric("anteroom_peers", &["connected"]).await == 0
            && second.metric("anteroom_peers", &["silent"]).await == 0
    })
    .await;
    assert_eq!(second.metric("anteroom_scaler_active", &["tiny"]).await, 0);
    waiting.end().await;
    drop(stream);
    second.stop(&[]).await;
}
