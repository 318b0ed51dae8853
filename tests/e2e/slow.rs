//! Clients that are slow, idle or many. These tests wait for real, short timeouts, and assert no durations.

use std::time::Duration;

use http_body_util::BodyExt as _;

use crate::support::{
    TestProxy, TestUpstream, h2, route, routes, soon, until,
    upstream::{STREAM, UpstreamCall, chunk},
    wire::{CHAT, chat, get, post, streaming},
};

async fn start(limits: &str, url: &str, more: &str) -> TestProxy {
    TestProxy::start(&format!("limits: {{ {limits} }}\n{}", routes(&[route("tiny", url, more)]))).await
}

#[tokio::test]
async fn missing_head_ends_the_connection() {
    let upstream = TestUpstream::warm().await;
    let proxy = start("headerTimeout: 2s, idleTimeout: 30s", &upstream.url(), "").await;
    // No bytes, part of a head, part of an HTTP/2 preface.
    let mut clients = Vec::new();
    for begin in ["", "POST /v1/chat", "POST / HTTP/1.1\r\nHost: a\r\nX:", "PRI * HTTP/2.0\r\n\r\nSM"] {
        clients.push((begin, proxy.sent(begin).await));
    }
    for (begin, mut client) in clients {
        let end = client.end().await;
        let end = String::from_utf8_lossy(&end);
        assert!(end.is_empty() || end.starts_with("HTTP/1.1 408"), "{begin:?}: {end}");
    }
    // A client that sends one byte at a time.
    let client = proxy.client().await;
    let (mut read, mut write) = client.stream.into_split();
    let trickling = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        let _ = write.write_all(b"GET /health HTTP/1.1\r\nX: ").await;
        while write.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let mut rest = Vec::new();
    let _ = soon("the end", tokio::io::AsyncReadExt::read_to_end(&mut read, &mut rest)).await;
    soon("the writer to notice", trickling).await.unwrap();
    // The timeout also applies to the second head on a kept-alive connection.
    let mut client = proxy.client().await;
    assert_eq!(client.ask(get("/health")).await.status(), 200);
    client.send("GET /heal").await;
    client.end().await;
    assert_eq!(upstream.accepted(), 0);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn idle_connection_is_closed() {
    let upstream = TestUpstream::warm().await;
    let proxy = start("headerTimeout: 30s, idleTimeout: 100ms", &upstream.url(), "").await;
    let mut client = proxy.client().await;
    assert_eq!(client.ask(get("/health")).await.status(), 200);
    assert_eq!(client.end().await, b"");
    let mut client = h2::connect(proxy.address).await;
    let response = client.send_request(h2::post(proxy.address, CHAT, "{}")).await.unwrap();
    assert_eq!(response.status(), 400);
    until("HTTP/2 to be closed", async || client.is_closed()).await;
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn held_or_streaming_connection_is_not_idle() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = start("idleTimeout: 20ms, stallTimeout: 20ms", &upstream.url(), "").await;
    let mut client = proxy.sent(streaming("x")).await;
    let mut other = h2::connect(proxy.address).await;
    let asked = tokio::spawn(other.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#)));
    proxy.await_tiny_held(2).await;
    // Waits many times as long as each timeout.
    tokio::time::sleep(Duration::from_millis(600)).await;
    proxy.await_tiny_held(2).await;
    upstream.wake();
    let mut calls = [upstream.call().await, upstream.call().await];
    for call in &mut calls {
        call.body().await;
        call.send(STREAM).await;
    }
    client.head().await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    for mut call in calls {
        call.send(chunk("data: x\n\n")).await;
        call.finish("0\r\n\r\n").await;
    }
    assert_eq!(client.rest().await.as_deref(), Some("data: x\n\n"));
    let response = soon("HTTP/2", asked).await.unwrap().unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "data: x\n\n");
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn h2_between_requests_is_idle() {
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let proxy = start("headerTimeout: 2s, idleTimeout: 30s", &upstream.url(), "").await;
    let mut client = h2::connect(proxy.address).await;
    for _ in 0..2 {
        // Frames that open no stream follow each response: acknowledgements, window updates, pings.
        let response =
            client.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#)).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.unwrap();
        tokio::time::sleep(Duration::from_millis(2500)).await;
    }
    assert!(!client.is_closed());
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn stalled_body_gets_408() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("bodyTimeout: 100ms", &upstream.url(), "").await;
    let request = chat("slow");
    let response = proxy.ask(&request[..request.len() - 3]).await;
    response.is_error(408, "request_timeout");
    assert_eq!(upstream.accepted(), 0);
    assert_eq!(proxy.refused("request_timeout").await, 1);
    proxy.stop(&[]).await;

    // Where the body is streamed, the server sees it break off.
    let proxy = start("bodyTimeout: 100ms", &upstream.url(), "match: {}").await;
    let mut client = proxy.sent(chat("warm")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    client.send(&request[..request.len() - 3]).await;
    let mut call = upstream.call().await;
    client.response().await.is_error(408, "request_timeout");
    let head = call.head.clone();
    assert_eq!(call.wire.body(&head).await, None);
    proxy.stop(&[("client_gone", 1), ("completed", 1)]).await;
}

/// Streams data until the connection breaks, and returns the number of bytes sent.
async fn flood(mut call: UpstreamCall) -> usize {
    use tokio::io::AsyncWriteExt as _;
    call.body().await;
    call.send(STREAM).await;
    let chunk = chunk(&"x".repeat(64 << 10));
    let mut sent = 0;
    soon("the proxy to give up", async {
        while call.wire.stream.write_all(chunk.as_bytes()).await.is_ok() {
            sent += chunk.len();
        }
    })
    .await;
    sent
}

#[tokio::test]
async fn client_that_stops_reading_is_cut_off() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("stallTimeout: 200ms", &upstream.url(), "").await;
    let client = proxy.sent(streaming("x")).await;
    let sent = flood(upstream.call().await).await;
    // Includes the kernel buffers on both sides, which are not the proxy's.
    assert!(sent < 64 << 20, "{sent}");
    proxy.await_outcome("client_stalled", 200, 1).await;
    proxy.await_tiny_in_flight(0).await;
    drop(client);
    proxy.stop(&[("client_stalled", 1)]).await;
}

#[tokio::test]
async fn http_2_client_that_stops_reading_is_cut_off() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("stallTimeout: 200ms", &upstream.url(), "").await;
    let mut client = h2::connect(proxy.address).await;
    let request = client.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#));
    let flooding = tokio::spawn(flood(upstream.call().await));
    // The flow-control window of the response fills up, since nothing reads it.
    let response = request.await.unwrap();
    let sent = flooding.await.unwrap();
    assert!(sent < 64 << 20, "{sent}");
    proxy.await_outcome("client_stalled", 200, 1).await;
    drop(response);
    proxy.stop(&[("client_stalled", 1)]).await;
}

#[tokio::test]
async fn oversized_head_is_rejected() {
    let upstream = TestUpstream::warm().await;
    let proxy = start("maxHeaderBytes: 8KiB", &upstream.url(), "").await;
    let large = "x".repeat(20_000);
    let many: String = (0..2000).map(|number| format!("X-{number}: 1\r\n")).collect();
    for head in [
        format!("GET /health HTTP/1.1\r\nHost: a\r\nX: {large}\r\n\r\n"),
        format!("GET /health?{large} HTTP/1.1\r\nHost: a\r\n\r\n"),
        format!("GET /health HTTP/1.1\r\nHost: a\r\n{many}\r\n"),
        // A head above the limit is rejected before it has ended.
        format!("GET /health HTTP/1.1\r\nHost: a\r\nX: {large}"),
    ] {
        let mut client = proxy.sent(head).await;
        let status = client.head().await.unwrap().status();
        assert!([431, 414].contains(&status), "{status}");
    }
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn connections_above_the_limit_wait_for_one_to_end() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("maxConnections: 2", &upstream.url(), "").await;
    let (mut open, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        open.push(proxy.sent(chat("busy")).await);
        calls.push(upstream.call().await);
    }
    let mut third = proxy.sent(get("/health")).await;
    let early = tokio::time::timeout(Duration::from_millis(200), third.head()).await;
    assert!(early.is_err(), "it is not accepted yet");
    open.pop();
    assert_eq!(third.response().await.status(), 200);
    // An idle connection is closed to make room.
    let mut fourth = proxy.sent(get("/health")).await;
    assert_eq!(fourth.response().await.status(), 200);
    assert_eq!(third.end().await, b"");
    drop((fourth, open, calls));
    // The connections of rejected requests free their slots as well.
    for _ in 0..4 {
        proxy.ask(post(CHAT, "{")).await.is_error(400, "invalid_request");
    }
    proxy.stop(&[("client_gone", 2)]).await;
}
