//! Clients that disconnect: held requests leave the queue, and requests in flight end at the model server too.

use tokio::io::AsyncWriteExt as _;

use crate::support::{
    TestProxy, TestUpstream, Wire, h2, soon, until,
    upstream::{STREAM, chunk, reset},
    wire::{CHAT, chat, get, post_with, streaming},
};

const REQUEST_BODY: &str = r#"{"model":"tiny"}"#;

fn chunked() -> String {
    format!(
        "POST {CHAT} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{REQUEST_BODY}\r\n0\r\n\r\n",
        REQUEST_BODY.len()
    )
}

/// Returns a request of exactly this many bytes.
fn filling(bytes: usize) -> String {
    let request = |content: usize| {
        post_with(CHAT, &[], &format!(r#"{{"model":"tiny","text":"{}"}}"#, "x".repeat(content)))
    };
    // A longer Content-Length takes more digits.
    let request = (1..bytes).rev().take(300).map(request).find(|request| request.len() <= bytes).unwrap();
    assert_eq!(request.len(), bytes);
    request
}

#[tokio::test]
async fn disconnected_held_client_leaves_the_queue() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let bystander = proxy.sent(chat("stays")).await;
    proxy.await_tiny_held(1).await;
    let requests = [
        ("with a body of known length", chat("goes")),
        ("with a chunked body", chunked()),
        ("with a stream to come", streaming("goes")),
        ("of HTTP/1.0", chat("goes").replace("HTTP/1.1", "HTTP/1.0")),
        ("that would close", post_with(CHAT, &[("Connection", "close")], REQUEST_BODY)),
        // The size of hyper's read buffer: a read that fills it does not show whether more follows.
        ("that fills a buffer", filling(8192)),
        ("that fills two", filling(16384)),
        ("of many buffers", filling(300_000)),
    ];
    let mut gone = 0;
    for (what, request) in requests {
        for how in ["closes", "resets", "ends its sending side"] {
            let mut client = proxy.client().await;
            // Disconnects are detected on kept-alive connections as well as on new ones.
            assert_eq!(client.ask(get("/health")).await.status(), 200);
            client.send(&request).await;
            proxy.await_tiny_held(2).await;
            match how {
                "closes" => drop(client),
                "resets" => reset(client.stream),
                _ => client.shutdown().await,
            }
            proxy.await_tiny_held(1).await;
            gone += 1;
            proxy.await_outcome("client_gone", 499, gone).await;
            assert_eq!(proxy.metric("anteroom_held_requests", &[]).await, 1, "{what}, {how}");
        }
    }
    assert_eq!(upstream.requests(), 0);
    drop(bystander);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", gone + 1)]).await;
}

#[tokio::test]
async fn hangup_behind_pipelined_bytes_is_noticed() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    // Old clients send a line break after the body; others pipeline.
    for extra in ["\r\n", &chat("pipelined")] {
        let client = proxy.sent(chat("held") + extra).await;
        proxy.await_tiny_held(1).await;
        drop(client);
        proxy.await_tiny_held(0).await;
    }
    proxy.stop(&[("client_gone", 2)]).await;
}

/// Ways to disconnect.
const DISCONNECT_KINDS: [&str; 3] = ["closes", "resets", "ends its sending side"];

async fn disconnect_as(mut client: Wire, how: &str) {
    match how {
        "closes" => drop(client),
        "resets" => reset(client.stream),
        _ => {
            client.shutdown().await;
            assert!(client.end().await.is_empty(), "half a connection is none");
        }
    }
}

#[tokio::test]
async fn held_hang_up_behind_unread_bytes_is_noticed() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut gone = 0;
    for size in [16 << 10, 60_000, 900_000] {
        for how in DISCONNECT_KINDS {
            let mut client = proxy.sent(chat("held")).await;
            proxy.await_tiny_held(1).await;
            client.send("x".repeat(size)).await;
            disconnect_as(client, how).await;
            proxy.await_tiny_held(0).await;
            gone += 1;
            proxy.await_outcome("client_gone", 499, gone).await;
        }
        // The pipelined request is in the same segment as the first, as far as both fit.
        let client = proxy.sent(chat("held") + &chat("pipelined").repeat(size / 150)).await;
        proxy.await_tiny_held(1).await;
        reset(client.stream);
        proxy.await_tiny_held(0).await;
        gone += 1;
    }
    assert_eq!(upstream.requests(), 0);
    proxy.stop(&[("client_gone", gone)]).await;
}

#[tokio::test]
async fn hang_up_behind_unread_bytes_ends_the_work() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for (gone, how) in (1..).zip(DISCONNECT_KINDS) {
        let mut client = proxy.sent(chat("goes")).await;
        let mut call = upstream.call().await;
        call.body().await;
        client.send("x".repeat(60_000)).await;
        disconnect_as(client, how).await;
        call.gone().await;
        proxy.await_outcome("client_gone", 499, gone).await;
    }
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("client_gone", 3)]).await;
}

/// Streams an upload to a server that does not read it, until the proxy stops reading it too.
async fn stalled_upload(proxy: &TestProxy) -> Wire {
    const PART_BYTES: usize = 32 << 10;
    let mut client = proxy.sent(post_with(CHAT, &[], "").replace("Length: 0", "Length: 20000000")).await;
    let mut sent = 0;
    loop {
        client.send([b'x'; PART_BYTES]).await;
        sent += PART_BYTES;
        // Ends once the proxy leaves the last part unread for 50 polls. If the upload is only slow, reading detects the
        // disconnect, as for any other request.
        let mut looks = 0;
        until("its bytes to be read, or not", async || {
            looks += 1;
            proxy.shared.memory.bodies() == sent || looks > 50
        })
        .await;
        if looks > 50 {
            // More than is read ahead, so that the rest stays in the kernel, which has room for 64 KiB.
            client.send([b'x'; 24 << 10]).await;
            return client;
        }
    }
}

#[tokio::test]
async fn hang_up_behind_a_stalled_upload_is_noticed() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}").await;
    let mut client = proxy.sent(chat("warm")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    for (gone, how) in (1..).zip(DISCONNECT_KINDS) {
        let client = stalled_upload(&proxy).await;
        let call = upstream.call().await;
        disconnect_as(client, how).await;
        proxy.await_outcome("client_gone", 499, gone).await;
        call.gone().await;
    }
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("completed", 1), ("client_gone", 3)]).await;
}

#[tokio::test]
async fn client_that_sends_on_without_end_is_cut_off() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(chat("held")).await;
    proxy.await_tiny_held(1).await;
    let junk = vec![b'x'; 64 << 10];
    soon("the end", async { while client.stream.write_all(&junk).await.is_ok() {} }).await;
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_after_a_hold() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    // Pipelines the requests in one segment, and one at a time.
    let mut at_once = proxy.sent(chat("first") + &chat("second") + &chat("third")).await;
    proxy.await_tiny_held(1).await;
    let mut client = proxy.sent(chat("first")).await;
    proxy.await_tiny_held(2).await;
    client.send(chat("second")).await;
    client.send(filling(10_000)).await;
    // The held request gets the last response on the connection: the client must retry the others.
    let mut many = proxy.sent(chat("first")).await;
    proxy.await_tiny_held(3).await;
    many.send(chat("not answered").repeat(500)).await;
    upstream.wake();
    let upstream = upstream.automatic(|call| call.echo());
    for client in [&mut at_once, &mut client] {
        for text in ["first", "second"] {
            assert_eq!(client.response().await.json()["text"], text);
        }
        assert_eq!(client.response().await.status(), 200);
    }
    let response = many.response().await;
    assert_eq!((response.status(), response.get("connection")), (200, Some("close")));
    assert_eq!(many.end().await, b"");
    assert_eq!(upstream.requests(), 7);
    upstream.sleep();
    proxy.stop(&[("completed", 7)]).await;
}

#[tokio::test]
async fn h2_reset_leaves_the_queue_alone() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = h2::connect(proxy.address).await;
    let stays = client.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny","text":"stays"}"#));
    proxy.await_tiny_held(1).await;
    let goes = tokio::spawn(client.send_request(h2::post(proxy.address, CHAT, REQUEST_BODY)));
    proxy.await_tiny_held(2).await;
    goes.abort();
    proxy.await_tiny_held(1).await;
    proxy.await_outcome("client_gone", 499, 1).await;
    upstream.wake();
    upstream.call().await.echo().await;
    assert_eq!(soon("the answer", stays).await.unwrap().status(), 200);

    upstream.sleep();
    proxy.stop(&[("completed", 1), ("client_gone", 1)]).await;
}

#[tokio::test]
async fn held_request_without_body_detects_disconnect() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}, concurrency: { max: 1 }").await;
    let _busy = proxy.sent(chat("busy")).await;
    let call = upstream.call().await;
    let client = proxy.sent(get("/v1/responses/resp_1")).await;
    proxy.await_tiny_held(1).await;
    drop(client);
    proxy.await_tiny_held(0).await;
    drop(call);
}

#[tokio::test]
async fn truncated_body_is_never_admitted() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for part in [
        post_with(CHAT, &[], REQUEST_BODY).trim_end_matches('}').to_owned(),
        chunked().trim_end_matches("0\r\n\r\n").to_owned(),
    ] {
        let client = proxy.sent(part).await;
        // The body is being read as soon as its bytes are counted.
        until("the body to be read", async || proxy.metric("anteroom_buffered_bytes", &[]).await > 0).await;
        drop(client);
        until("its bytes to be given back", async || proxy.metric("anteroom_buffered_bytes", &[]).await == 0)
            .await;
    }
    assert_eq!(proxy.metric("anteroom_admitted_requests_total", &[]).await, 0);
    assert_eq!(upstream.accepted(), 0, "half a request wakes nothing");
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn disconnect_mid_stream_ends_silent_work() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for gone in 1..=2 {
        let mut client = proxy.sent(streaming("goes")).await;
        let mut call = upstream.call().await;
        call.body().await;
        call.send(STREAM).await;
        call.send(chunk("data: 1\n\n")).await;
        client.head().await.unwrap();
        client.parts_until("data: 1").await;
        // From here on the server is silent.
        if gone == 1 {
            drop(client)
        } else {
            reset(client.stream)
        }
        assert_eq!(call.gone().await, b"", "the connection ends, without another request on it");
        proxy.await_outcome("client_gone", 200, gone).await;
    }
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("client_gone", 2)]).await;
}

#[tokio::test]
async fn disconnect_before_head_ends_the_work() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let client = proxy.sent(chat("goes")).await;
    let mut call = upstream.call().await;
    call.body().await;
    drop(client);
    call.gone().await;
    proxy.await_outcome("client_gone", 499, 1).await;
    proxy.await_tiny_in_flight(0).await;

    // The disconnect is not blamed on the server: the next request is dispatched at once, without a probe.
    let probes = upstream.probes();
    let mut next = proxy.sent(chat("next")).await;
    upstream.call().await.echo().await;
    assert_eq!((next.response().await.status(), upstream.probes()), (200, probes));
    proxy.stop(&[("completed", 1), ("client_gone", 1)]).await;
}

#[tokio::test]
async fn h2_reset_ends_the_work_at_the_server() {
    use http_body_util::BodyExt as _;

    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = h2::connect(proxy.address).await;
    let request = client.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny","stream":true}"#));
    let answering = async {
        let mut call = upstream.call().await;
        call.body().await;
        call.send(STREAM).await;
        call.send(chunk("data: 1\n\n")).await;
        call
    };
    let (response, call) = tokio::join!(request, answering);
    let mut response = response.unwrap();
    soon("the first part", response.body_mut().frame()).await.unwrap().unwrap();
    drop(response);
    call.gone().await;
    proxy.await_outcome("client_gone", 200, 1).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn lease_keeps_the_target_wanted() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let client = proxy.sent(chat("goes")).await;
    proxy.await_tiny_held(1).await;
    drop(client);
    proxy.await_tiny_held(0).await;
    // The lease keeps demand, so the target is probed and found ready: the next request is dispatched at once.
    upstream.probed().await;
    upstream.probed().await;
    upstream.wake();
    until("ready", async || proxy.route("tiny").await["state"] == "ready").await;
    let mut client: Wire = proxy.sent(chat("comes")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.get("server-timing"), None, "it did not wait");
    let records = proxy.admin("/api/v1/cold-starts").await.json();
    assert_eq!(records["cold_starts"][0]["outcome"], "abandoned");
    proxy.stop(&[("completed", 1), ("client_gone", 1)]).await;
}
