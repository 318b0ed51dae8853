//! Clients that half-close, vanish or stop reading: their resources are freed at once, and no work continues for them.

use tokio::io::AsyncWriteExt as _;

use crate::{
    law,
    served::ProxyProcess,
    support::{
        TestProxy, TestUpstream, Wire, route, routes, until,
        upstream::{STREAM, UpstreamCall, chunk, reset},
        wire::{chat, streaming},
    },
};

/// A client that ends its sending side counts as disconnected, as most that do so are: at every stage its request ends
/// as `client_gone`, and the server's connection is closed.
#[tokio::test]
async fn half_close_is_a_disconnect_at_every_stage() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 1 }").await;
    // Ends its sending side before the head of the response.
    let mut client = proxy.sent(chat("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    client.shutdown().await;
    call.gone().await;
    proxy.await_outcome("client_gone", 499, 1).await;
    // Ends its sending side in the middle of a stream, while another request is held.
    let mut client = proxy.sent(streaming("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM.to_owned() + &chunk("data: 1\n\n")).await;
    client.head().await.unwrap();
    let mut held = proxy.sent(chat("held")).await;
    proxy.await_tiny_held(1).await;
    client.shutdown().await;
    call.gone().await;
    // The slot is free.
    upstream.call().await.echo().await;
    assert_eq!(held.response().await.json()["text"], "held");
    // Ends its sending side in the middle of the body: no request is counted.
    let mut client = proxy.client().await;
    let request = chat("never whole");
    client.send(&request[..request.len() - 3]).await;
    client.shutdown().await;
    client.end().await;
    assert_eq!(upstream.requests(), 3);
    proxy.stop(&[("client_gone", 2), ("completed", 1)]).await;
}

/// A hundred held and fifty streaming clients reset their connections at the same time: the queue becomes empty, the
/// server sees every stream end, and the process has no more descriptors and threads than before.
#[tokio::test]
async fn vanished_client_leaves_no_state() {
    let mut upstream = TestUpstream::warm().await;
    let config = routes(&[route("tiny", &upstream.url(), "concurrency: { max: 50 }")]);
    let proxy = ProxyProcess::start(&config).await;
    // Warm-up, so that `before` includes what is opened only once.
    let mut client = proxy.sent(chat("warm")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    drop(client);
    proxy.in_flight(0).await;
    let before = proxy.resources();
    let mut clients: Vec<Wire> = Vec::new();
    let mut calls = Vec::new();
    for number in 0..150 {
        clients.push(proxy.sent(streaming(&format!("{number}"))).await);
        if number < 50 {
            let mut call = upstream.call().await;
            call.body().await;
            call.send(STREAM.to_owned() + &chunk("data: 1\n\n")).await;
            clients[number].head().await.unwrap();
            calls.push(call);
        }
    }
    proxy.held(100).await;
    // Drop the held clients first; otherwise they would be dispatched to the freed slots.
    for client in clients.into_iter().rev() {
        reset(client.stream);
    }
    for call in calls {
        call.gone().await;
    }
    let counts = law::holds(proxy.admin).await;
    counts.assert_outcomes(&[("client_gone", 150), ("completed", 1)]);
    proxy.await_released_resources(before).await;
    // The proxy still works.
    let mut client = proxy.sent(chat("after")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop().await;
}

/// Streams data until the connection breaks.
async fn flood(mut call: UpstreamCall) {
    let chunk = chunk(&"x".repeat(64 << 10));
    while call.wire.stream.write_all(chunk.as_bytes()).await.is_ok() {}
}

/// Clients that have stopped reading occupy all slots of an endpoint. They are disconnected, and held requests get the
/// slots.
#[tokio::test]
async fn stalled_reader_yields_to_waiting_requests() {
    let mut upstream = TestUpstream::warm().await;
    let routes = routes(&[route("tiny", &upstream.url(), "concurrency: { max: 2 }")]);
    let proxy = TestProxy::start(&format!("limits: {{ stallTimeout: 200ms }}\n{routes}")).await;
    let (mut stalled, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        stalled.push(proxy.sent(streaming("stalls")).await);
        let mut call = upstream.call().await;
        call.body().await;
        call.send(STREAM).await;
        calls.push(call);
    }
    // Wait for both: otherwise one client could stall before the other request has been dispatched.
    proxy.await_tiny_in_flight(2).await;
    for call in calls {
        tokio::spawn(flood(call));
    }
    let mut waiting = Vec::new();
    for number in 0..4 {
        waiting.push(proxy.sent(chat(&format!("{number}"))).await);
        until("it to wait, or to be served", async || {
            proxy.route("tiny").await["held"] == number + 1 || upstream.requests() > 2
        })
        .await;
    }
    for _ in 0..4 {
        upstream.call().await.echo().await;
    }
    for mut client in waiting {
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.await_outcome("client_stalled", 200, 2).await;
    drop(stalled);
    proxy.stop(&[("client_stalled", 2), ("completed", 4)]).await;
}
