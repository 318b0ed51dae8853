//! Model servers that send invalid responses.

use tokio::io::AsyncWriteExt as _;

use crate::support::{
    TestProxy, TestUpstream, route, routes,
    upstream::UpstreamCall,
    wire::{chat, post},
};

/// Heads above the size limit. A retry would fail the same way and is not made.
const TOO_LARGE: [&str; 2] = ["a head of a megabyte", "a thousand headers"];

/// Returns bytes sent in place of a head, and heads that are invalid.
fn heads() -> Vec<(&'static str, Vec<u8>)> {
    let text = |text: &str| text.as_bytes().to_vec();
    vec![
        ("nothing but NULs", vec![0; 64]),
        ("a TLS alert", vec![0x15, 3, 3, 0, 2, 2, 70]),
        ("HTTP/2", text("HTTP/2.0 200 OK\r\n\r\n")),
        ("HTTP/0.9", text("<html>hello</html>\r\n\r\n")),
        ("another protocol", text("SSH-2.0-OpenSSH_9.7\r\n")),
        ("a status of two digits", text("HTTP/1.1 99 No\r\n\r\n")),
        ("a header without a colon", text("HTTP/1.1 200 OK\r\nno colon\r\n\r\n")),
        ("a header name with a space", text("HTTP/1.1 200 OK\r\nbad name: x\r\ncontent-length: 0\r\n\r\n")),
        ("a length that is none", text("HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n")),
        ("a negative length", text("HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n")),
        ("two lengths", text("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx")),
        ("a head of a megabyte", {
            let mut head = text("HTTP/1.1 200 OK\r\nx: ");
            head.resize(1 << 20, b'x');
            head
        }),
        ("a thousand headers", {
            let many: String = (0..1000).map(|number| format!("x-{number}: 1\r\n")).collect();
            text(&format!("HTTP/1.1 200 OK\r\n{many}\r\n"))
        }),
    ]
}

/// Valid heads with a body that violates them.
const BODIES: [(&str, &str); 5] = [
    ("less than its length", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345"),
    ("a chunk without a size", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nxx\r\n0\r\n\r\n"),
    (
        "a chunk that is too large",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nx",
    ),
    (
        "a chunk longer than it says",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nxyz\r\n0\r\n\r\n",
    ),
    ("no last chunk", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n"),
];

/// For each case, at most two tries are made (one if the head is too large), the client gets 502, and the next request
/// is served. If the head has already been sent, the client sees the response break off, and there is no retry.
#[tokio::test]
async fn invalid_response_leaves_the_next_request_alone() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let heads = heads();
    let mut completed = 0;
    let mut good = async |upstream: &mut TestUpstream| {
        let mut client = proxy.sent(chat("good")).await;
        upstream.call().await.echo().await;
        assert_eq!(client.response().await.json()["text"], "good");
        completed += 1;
    };
    for (what, said) in &heads {
        let before = upstream.requests();
        let mut client = proxy.sent(chat(what)).await;
        let tries = if TOO_LARGE.contains(what) { 1 } else { 2 };
        for _ in 0..tries {
            let mut call = upstream.call().await;
            call.body().await;
            // The proxy closes at once where the error is evident, so the write may fail.
            let _ = call.wire.stream.write_all(said).await;
        }
        let response = client.response().await;
        assert_eq!((response.status(), &*response.code()), (502, "upstream_error"), "{what}");
        assert_eq!(upstream.requests() - before, tries, "{what}");
        good(&mut upstream).await;
    }
    for (what, said) in BODIES {
        let before = upstream.requests();
        let mut client = proxy.sent(chat(what)).await;
        let mut call = upstream.call().await;
        call.body().await;
        call.send(said).await;
        drop(call);
        // The head may be sent before the error is detected, depending on how the bytes arrive.
        if let Some(head) = client.head().await {
            assert_eq!(head.status(), 200, "{what}");
            let all = client.body(&head).await;
            assert!(all.is_none(), "{what}: {all:?}");
        }
        assert_eq!(upstream.requests() - before, 1, "{what}");
        good(&mut upstream).await;
    }
    let failed = (heads.len() + BODIES.len()) as u64;
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("completed", completed), ("upstream_error", failed)]).await;
}

/// Thousands of informational responses, as fast as the connection takes them, are not a response: the response timeout
/// applies. The same thread serves other requests in the meantime.
#[tokio::test]
async fn informational_response_flood_fails() {
    let mut upstream = TestUpstream::warm().await;
    // Only the flood may time out.
    let proxy = TestProxy::start(&routes(&[
        route("tiny", &upstream.url(), "upstream: { responseTimeout: 300ms }"),
        route("other", &upstream.url(), ""),
    ]))
    .await;
    let other = post("/v1/chat/completions", r#"{"model":"other","text":"other"}"#);
    // Makes the target known to be up before the flood begins.
    let mut client = proxy.sent(&other).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "other");

    let mut flooded = proxy.sent(chat("flooded")).await;
    let call = upstream.call().await;
    let flooding = tokio::spawn(flood(call));
    let mut client = proxy.sent(&other).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "other");
    flooded.response().await.is_error(502, "upstream_error");
    flooding.await.unwrap();
    proxy.stop(&[("completed", 2), ("upstream_error", 1)]).await;
}

/// Sends a bounded flood: a busy machine would read an endless one for half a minute before it checks the timeout.
async fn flood(mut call: UpstreamCall) {
    call.body().await;
    let early = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n".repeat(100);
    for _ in 0..200 {
        if call.wire.stream.write_all(early.as_bytes()).await.is_err() {
            return;
        }
    }
    call.gone().await;
}
