//! Deadlines and limits: a request over a limit fails at once with a clear error, and held requests stay held.

use tokio::io::AsyncWriteExt as _;

use crate::support::{
    TestProxy, TestUpstream, route, routes, until,
    upstream::{LAST, STREAM},
    wire::{CHAT, WireResponse, chat, post, post_with},
};

const REQUEST_BODY: &str = r#"{"model":"tiny"}"#;

/// Asserts that `Retry-After` is within the range that every SDK honours.
fn assert_retry_after_in_range(response: &WireResponse) {
    let wait: u64 = response.get("retry-after").expect("Retry-After").parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
}

#[tokio::test]
async fn expired_deadline_error_names_its_source() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "hold: { timeout: 15m }").await;
    let bystander = proxy.sent(chat("stays")).await;
    proxy.await_tiny_held(1).await;
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("x-anteroom-max-wait", "0.05")], "x-anteroom-max-wait"),
        (&[("X-Anteroom-Max-Wait", " 50ms ")], "x-anteroom-max-wait"),
        (&[("x-stainless-read-timeout", "0.1")], "the client's own time-out"),
        (&[("x-stainless-lang", "js"), ("x-stainless-timeout", "0.1")], "the client's own time-out"),
        (&[("x-anteroom-max-wait", "5m"), ("x-stainless-read-timeout", "0.1")], "the client's own time-out"),
        (&[("x-anteroom-max-wait", "0.05"), ("x-stainless-read-timeout", "600")], "x-anteroom-max-wait"),
    ];
    for (fields, limit) in cases {
        let response = proxy.ask(post_with(CHAT, fields, REQUEST_BODY)).await;
        response.is_error(504, "cold_start_timeout");
        assert!(response.text().contains(limit), "{fields:?}: {}", response.text());
        assert_eq!(response.get("x-should-retry"), Some("true"));
        assert_retry_after_in_range(&response);
    }
    proxy.await_outcome("cold_start_timeout", 504, cases.len() as u64).await;
    proxy.await_tiny_held(1).await;
    drop(bystander);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1), ("cold_start_timeout", cases.len() as u64)]).await;
}

#[tokio::test]
async fn route_deadline_applies() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "hold: { timeout: 50ms }").await;
    let response = proxy.ask(post_with(CHAT, &[("x-anteroom-max-wait", "5m")], REQUEST_BODY)).await;
    response.is_error(504, "cold_start_timeout");
    assert!(response.text().contains("hold.timeout"), "{}", response.text());
    proxy.stop(&[("cold_start_timeout", 1)]).await;
}

#[tokio::test]
async fn zero_max_wait_is_rejected_but_wakes_target() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for zero in ["0", "0s", "0.0"] {
        let response = proxy.ask(post_with(CHAT, &[("x-anteroom-max-wait", zero)], REQUEST_BODY)).await;
        response.is_error(503, "no_wait");
        assert_eq!(response.get("x-should-retry"), Some("true"));
        assert_retry_after_in_range(&response);
    }
    assert_eq!(proxy.refused("no_wait").await, 3);
    // The request was entitled to the target, so it created demand; once the target is up, the same request is served.
    upstream.wake();
    until("ready", async || proxy.route("tiny").await["state"] == "ready").await;
    let mut client = proxy.sent(post_with(CHAT, &[("x-anteroom-max-wait", "0")], REQUEST_BODY)).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn unparseable_max_wait_is_rejected() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for garbage in ["soon", "-1", "NaN", "inf", "1e99", "5 parsecs", ""] {
        let response = proxy.ask(post_with(CHAT, &[("x-anteroom-max-wait", garbage)], REQUEST_BODY)).await;
        assert_eq!((response.status(), &*response.code()), (400, "invalid_request"), "{garbage}");
        assert!(response.text().contains("x-anteroom-max-wait"), "{}", response.text());
    }
    // An unparseable SDK header is ignored.
    let client =
        proxy.sent(post_with(CHAT, &[("x-stainless-read-timeout", "NOT_GIVEN")], REQUEST_BODY)).await;
    proxy.await_tiny_held(1).await;
    drop(client);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn full_queue_differs_at_zero_and_when_up() {
    let mut upstream = TestUpstream::cold().await;
    let more = "hold: { maxRequests: 2 }, concurrency: { max: 1, rampStart: 1 }";
    let proxy = TestProxy::tiny(&upstream.url(), more).await;
    let mut first = proxy.sent(chat("first")).await;
    proxy.await_tiny_held(1).await;
    let mut second = proxy.sent(chat("second")).await;
    proxy.await_tiny_held(2).await;

    let full = proxy.ask(chat("third")).await;
    full.is_error(503, "hold_queue_full");
    assert_eq!(full.get("x-should-retry"), Some("true"));
    assert_retry_after_in_range(&full);

    upstream.wake();
    let call = upstream.call().await;
    proxy.await_tiny_held(1).await;
    let mut third = proxy.sent(chat("third")).await;
    proxy.await_tiny_held(2).await;
    let full = proxy.ask(chat("fourth")).await;
    full.is_error(429, "saturated");
    assert_eq!(full.get("x-should-retry"), Some("true"));
    assert_retry_after_in_range(&full);

    call.echo().await;
    upstream.call().await.echo().await;
    upstream.call().await.echo().await;
    for (client, text) in [(&mut first, "first"), (&mut second, "second"), (&mut third, "third")] {
        assert_eq!(client.response().await.json()["text"], text);
    }
    assert_eq!((proxy.refused("hold_queue_full").await, proxy.refused("saturated").await), (1, 1));
    proxy.stop(&[("completed", 3)]).await;
}

#[tokio::test]
async fn held_bytes_are_bounded_per_route_and_in_total() {
    let upstream = TestUpstream::cold().await;
    let limits = "limits: { maxBodyBytes: 3000, maxBufferedBytes: 5000 }\n";
    let config = routes(&[
        route("tiny", &upstream.url(), "hold: { maxBytes: 4000 }"),
        route("other", &upstream.url(), ""),
    ]);
    let proxy = TestProxy::start(&format!("{limits}{config}")).await;
    let body = |model: &str, size: usize| {
        let bare = format!(r#"{{"model":"{model}","text":""}}"#).len();
        post(CHAT, &format!(r#"{{"model":"{model}","text":"{}"}}"#, "x".repeat(size - bare)))
    };
    let client = proxy.sent(body("tiny", 2900)).await;
    proxy.await_tiny_field("held_bytes", 2900).await;
    let full = proxy.ask(body("tiny", 1200)).await;
    full.is_error(503, "hold_queue_full");
    assert!(full.text().contains("4000"), "names the limit: {}", full.text());
    let other = proxy.sent(body("other", 1200)).await;
    until("the other", async || proxy.route("other").await["held_bytes"] == 1200).await;
    // 2,900 + 1,200 bytes are buffered; another 1,200 would exceed the limit of 5,000 over all routes.
    let full = proxy.ask(body("other", 1200)).await;
    full.is_error(503, "hold_queue_full");
    assert_retry_after_in_range(&full);
    assert_eq!(proxy.metric("anteroom_buffered_bytes", &[]).await, 4100);
    assert_eq!((proxy.route("tiny").await["held"].as_u64(), upstream.requests()), (Some(1), 0));
    drop((client, other));
    until("all bytes to be given back", async || proxy.metric("anteroom_buffered_bytes", &[]).await == 0)
        .await;
    proxy.stop(&[("client_gone", 2)]).await;
}

#[tokio::test]
async fn oversized_body_is_refused_before_it_arrives() {
    let upstream = TestUpstream::cold().await;
    let limits = "limits: { maxBodyBytes: 64KiB }\n";
    let config = format!("{limits}{}", routes(&[route("tiny", &upstream.url(), "")]));
    let proxy = TestProxy::start(&config).await;
    let bystander = proxy.sent(chat("stays")).await;
    proxy.await_tiny_held(1).await;

    // Rejected by the announced length, without a 100 Continue.
    let head = post_with(CHAT, &[("Expect", "100-continue")], "").replace("Length: 0", "Length: 65537");
    let mut client = proxy.sent(head).await;
    let first = client.head().await.unwrap();
    assert_eq!(first.status(), 413, "not 100 Continue");

    // Rejected by the number of received bytes if no length is announced.
    let mut client =
        proxy.sent(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")).await;
    let chunk = format!("4000\r\n{}\r\n", "x".repeat(0x4000));
    for _ in 0..4 {
        client.send(&chunk).await;
    }
    client.send("1\r\nx\r\n").await;
    let response = client.response().await;
    response.is_error(413, "request_too_large");
    assert_eq!(response.get("x-should-retry"), Some("false"));
    assert!(response.text().contains("65536"), "names the limit: {}", response.text());

    // A client that sends its whole body before it reads gets the error as well.
    let mut client = proxy.client().await;
    client.send(post(CHAT, "").replace("Length: 0", "Length: 33554432")).await;
    let large = vec![b'x'; 32 << 20];
    let _ = crate::support::soon("the end of the upload", client.stream.write_all(&large)).await;
    client.response().await.is_error(413, "request_too_large");

    assert_eq!((proxy.route("tiny").await["held"].as_u64(), upstream.requests()), (Some(1), 0));
    assert_eq!(proxy.refused("request_too_large").await, 3);
    drop(bystander);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn streamed_body_is_bounded_and_breaks_at_the_server() {
    let mut upstream = TestUpstream::warm().await;
    let limits = "limits: { maxBodyBytes: 64KiB }\n";
    let config = format!("{limits}{}", routes(&[route("tiny", &upstream.url(), "match: {}")]));
    let proxy = TestProxy::start(&config).await;
    warm_up(&proxy, &mut upstream).await;

    let mut client =
        proxy.sent(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")).await;
    let chunk = format!("4000\r\n{}\r\n", "x".repeat(0x4000));
    client.send(&chunk).await;
    let mut call = upstream.call().await;
    for _ in 0..3 {
        client.send(&chunk).await;
    }
    client.send("1\r\nx\r\n").await;
    client.response().await.is_error(413, "request_too_large");
    let head = call.head.clone();
    assert_eq!(call.wire.body(&head).await, None, "the server sees that it is not whole");

    // With an announced length nothing is dispatched.
    let requests = upstream.requests();
    let response = proxy.ask(post(CHAT, "").replace("Length: 0", "Length: 65537")).await;
    response.is_error(413, "request_too_large");
    assert_eq!(upstream.requests(), requests);
    proxy.await_tiny_in_flight(0).await;

    // The endpoint stays ready: the next request is dispatched at once.
    let mut client = proxy.sent(chat("next")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
}

/// Makes the target of a route without models known to be up, so that bodies stream.
async fn warm_up(proxy: &TestProxy, upstream: &mut TestUpstream) {
    let mut client = proxy.sent(chat("warm")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    call.finish(LAST).await;
    assert_eq!(client.response().await.status(), 200);
}
