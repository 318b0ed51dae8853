//! WebSockets through routes of the HTTP Add-on: a tunnel counts as one request in flight until it ends.

use anteroom::{
    config::budget::TUNNEL_COST_BYTES,
    domain::{Intercept, InterceptTimeouts, Period},
    drain::StopSignal,
    error::Outcome,
};

use crate::support::{
    TestProxy, TestUpstream, Wire,
    proxy::{options, parse},
    route, routes, until,
    upstream::{UpstreamCall, answer},
    wire::get,
};

const SWITCHING_PROTOCOLS: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nX-KEDA-HTTP-Cold-Start: spoofed\r\n\r\n";

fn upgrade(to: &str) -> String {
    let fields = format!(
        "\r\nConnection: keep-alive, Upgrade\r\nUpgrade: {to}\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    get("/chat").replace("\r\n\r\n", &fields)
}

/// Opens a tunnel and returns both ends, after checking the request at the application and the response at the client.
async fn open(proxy: &TestProxy, upstream: &mut TestUpstream, cold: &str) -> (Wire, UpstreamCall) {
    let mut client = proxy.sent(upgrade("websocket")).await;
    let mut call = upstream.call().await;
    assert_eq!(call.head.get("upgrade"), Some("websocket"));
    assert_eq!(call.head.get("connection"), Some("Upgrade"));
    assert_eq!(call.head.get("sec-websocket-key"), Some("dGhlIHNhbXBsZSBub25jZQ=="));
    // The first bytes of the new protocol arrive together with the response.
    call.send([SWITCHING_PROTOCOLS.as_bytes(), b"hello"].concat()).await;
    let head = client.head().await.unwrap();
    assert_eq!(
        (head.status(), head.get("upgrade"), head.get("connection")),
        (101, Some("websocket"), Some("Upgrade"))
    );
    assert_eq!(head.get("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    assert_eq!(head.get("x-keda-http-cold-start"), Some(cold));
    assert_eq!(client.exact(5).await.unwrap(), b"hello");
    (client, call)
}

async fn both_ways(client: &mut Wire, call: &mut UpstreamCall) {
    for text in [&b"ping"[..], &[b'x'; 100_000]] {
        client.send(text).await;
        assert_eq!(call.wire.exact(text.len()).await.unwrap(), text);
        call.send(text).await;
        assert_eq!(client.exact(text.len()).await.unwrap(), text);
    }
}

#[tokio::test]
async fn tunnel_is_in_flight_until_closed() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    let (mut client, mut call) = open(&proxy, &mut upstream, "false").await;
    both_ways(&mut client, &mut call).await;
    proxy.await_tiny_in_flight(1).await;
    call.send("bye").await;
    drop(call);
    assert_eq!(client.end().await, b"bye");
    drop(client);
    proxy.await_outcome("completed", 101, 1).await;
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("completed", 1)]).await;
}

/// Sends more than the kernel buffers on both sides hold.
#[tokio::test]
async fn unread_tunnel_counts_until_it_is_read() {
    const BYTES: usize = 32 << 20;
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    let (mut client, mut call) = open(&proxy, &mut upstream, "false").await;
    let used = async || proxy.metric("anteroom_memory_bytes", &["kind=\"tunnel\""]).await;
    assert_eq!(used().await, 0);
    let sending = tokio::spawn(async move {
        call.send(vec![b'x'; BYTES]).await;
        call
    });
    until("the tunnel to count", async || used().await == TUNNEL_COST_BYTES as u64).await;
    assert_eq!(client.exact(BYTES).await.unwrap().len(), BYTES);
    until("all memory to be given back", async || used().await == 0).await;
    drop(sending.await.unwrap());
    drop(client);
    proxy.await_tiny_in_flight(0).await;
}

#[tokio::test]
async fn closing_client_still_receives_the_rest() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    let waking = async {
        proxy.await_tiny_held(1).await;
        proxy.await_tiny_starting().await;
        upstream.wake();
    };
    let mut client = proxy.sent(upgrade("WebSocket")).await;
    waking.await;
    let mut call = upstream.call().await;
    call.send(SWITCHING_PROTOCOLS).await;
    assert_eq!(client.head().await.unwrap().get("x-keda-http-cold-start"), Some("true"));
    both_ways(&mut client, &mut call).await;
    client.shutdown().await;
    assert_eq!(call.wire.end().await, b"");
    call.send("the rest").await;
    drop(call);
    assert_eq!(client.end().await, b"the rest");
    proxy.await_outcome("completed", 101, 1).await;
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn tunnel_ends_with_its_limit_and_the_proxy() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    let (mut client, call) = open(&proxy, &mut upstream, "false").await;
    let timeouts = InterceptTimeouts { request: Some(Period::from_secs(3)), ..InterceptTimeouts::default() };
    proxy.intercept(&upstream.url(), Intercept { timeouts, ..Intercept::default() }).await;
    let (mut bounded, bounded_call) = open(&proxy, &mut upstream, "false").await;
    assert_eq!(bounded.end().await, b"");
    bounded_call.gone().await;
    proxy.await_outcome("upstream_error", 101, 1).await;
    proxy.await_tiny_in_flight(1).await;

    // The other tunnel has no limit, and is closed at the end of the drain: at once, after a second stop request.
    let commands = proxy.commands.clone();
    let stopping = tokio::spawn(proxy.stopped(StopSignal::Interrupt));
    commands.send(anteroom::app::Command::Stop(StopSignal::Interrupt)).await.unwrap();
    assert_eq!(client.end().await, b"");
    call.gone().await;
    let account = stopping.await.unwrap();
    assert_eq!((account.ended_as(Outcome::UpstreamError), account.ended_as(Outcome::Draining)), (1, 1));
}

/// Returns a text frame from the server.
fn text(words: &str) -> Vec<u8> {
    [&[0x81, words.len() as u8], words.as_bytes()].concat()
}

/// Parses the close frame at the end of a stream, after `before`; returns its code and reason.
fn close_of(stream: &[u8], before: &[u8]) -> (u16, String) {
    let [0x88, length, high, low, reason @ ..] = stream.strip_prefix(before).expect("all frames before")
    else {
        panic!("{stream:?}: no close frame")
    };
    assert_eq!(usize::from(*length), reason.len() + 2);
    (u16::from_be_bytes([*high, *low]), String::from_utf8(reason.to_vec()).unwrap())
}

#[tokio::test]
async fn websocket_that_fails_is_closed_with_its_reason() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    let open = async |upstream: &mut TestUpstream, words: &[u8]| {
        let client = proxy.sent(upgrade("websocket")).await;
        let mut call = upstream.call().await;
        call.send([SWITCHING_PROTOCOLS.as_bytes(), words].concat()).await;
        let mut client = client;
        assert_eq!(client.head().await.unwrap().status(), 101);
        let exact = client.exact(words.len()).await.unwrap();
        assert_eq!(exact, words);
        (client, call)
    };
    let hello = text("hello");
    // The server dies: by a reset, and in the order in which a kernel closes the connections of a process.
    let (mut client, call) = open(&mut upstream, &hello).await;
    call.reset();
    let (code, reason) = close_of(&client.end().await, b"");
    assert_eq!(code, 1011);
    assert!(reason.starts_with("upstream_error: "), "{reason}");
    let (mut client, call) = open(&mut upstream, &hello).await;
    drop(call);
    assert_eq!(close_of(&client.end().await, b"").0, 1011);
    proxy.await_outcome("upstream_error", 101, 2).await;
    // Inside a frame, no close frame can be inserted.
    let (mut client, call) = open(&mut upstream, &hello[..3]).await;
    call.reset();
    assert_eq!(client.end().await, b"");
    // After a close frame from the server, the proxy adds none.
    let goodbye = [0x88, 2, 0x03, 0xe8];
    let (mut client, call) = open(&mut upstream, &[&hello[..], &goodbye].concat()).await;
    drop(call);
    assert_eq!(client.end().await, b"");
    drop(client);
    proxy.await_outcome("completed", 101, 1).await;
    // After a close frame from the client, the server may end without one.
    let (mut client, mut call) = open(&mut upstream, &hello).await;
    let masked = [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8];
    client.send(masked).await;
    assert_eq!(call.wire.exact(masked.len()).await.unwrap(), masked);
    drop(call);
    assert_eq!(client.end().await, b"");
    drop(client);
    proxy.await_outcome("completed", 101, 2).await;
    // `timeouts.request` of the route closes the tunnel.
    let timeouts = InterceptTimeouts { request: Some(Period::from_secs(3)), ..InterceptTimeouts::default() };
    proxy.intercept(&upstream.url(), Intercept { timeouts, ..Intercept::default() }).await;
    let (mut client, call) = open(&mut upstream, &hello).await;
    let (code, reason) = close_of(&client.end().await, b"");
    assert_eq!(code, 1011);
    assert!(reason.starts_with("upstream_timeout: ") && reason.contains("timeouts.request"), "{reason}");
    call.gone().await;
    proxy.stop(&[("completed", 2), ("upstream_error", 4)]).await;
}

#[tokio::test]
async fn websocket_is_closed_before_draining_is_over() {
    let mut upstream = TestUpstream::warm().await;
    let mut config = parse(&routes(&[route("models", "http://127.0.0.1:1", "")]));
    config.drain_delay = Period::from_millis(0);
    // A quarter of the timeout is reserved for the close frame.
    config.drain_timeout = Period::from_secs(8);
    let proxy = TestProxy::start_with(config, options()).await;
    proxy.intercept(&upstream.url(), Intercept::default()).await;
    let mut client = proxy.sent(upgrade("websocket")).await;
    let mut call = upstream.call().await;
    call.send([SWITCHING_PROTOCOLS.as_bytes(), &text("hello")].concat()).await;
    assert_eq!(client.head().await.unwrap().status(), 101);
    let stopping = tokio::spawn(proxy.stopped(StopSignal::Terminate));
    let (code, reason) = close_of(&client.end().await, &text("hello"));
    assert_eq!(code, 1012);
    assert!(reason.starts_with("draining: "), "{reason}");
    call.gone().await;
    assert_eq!(stopping.await.unwrap().ended_as(Outcome::Draining), 1);
}

#[tokio::test]
async fn refused_upgrade_is_an_ordinary_answer() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::intercepting(&upstream.url(), Intercept::default()).await;
    let mut client = proxy.client().await;
    client.send(upgrade("websocket")).await;
    upstream.call().await.finish(answer("426 Upgrade Required", &[("Upgrade", "other")], "no")).await;
    let refused = client.response().await;
    assert_eq!((refused.status(), refused.text().as_str()), (426, "no"));
    // The connection still speaks HTTP/1.1. Switching to h2c would bypass the routing rules.
    client.send(upgrade("h2c")).await;
    let call = upstream.call().await;
    assert_eq!((call.head.get("upgrade"), call.head.get("connection")), (None, None));
    call.finish(answer("200 OK", &[], "plain")).await;
    assert_eq!(client.response().await.text(), "plain");
    // A switch of protocols without a request for it is an error.
    client.send(get("/")).await;
    upstream.call().await.finish(SWITCHING_PROTOCOLS).await;
    client.response().await.is_error(502, "upstream_error");
    proxy.stop(&[("completed", 2), ("upstream_error", 1)]).await;
}
