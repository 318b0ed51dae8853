//! Idle connections: many, from one or many sources, and more than there are file descriptors.

use std::{io::Write as _, net::SocketAddr};

use anteroom::config::budget::CONNECTION_COST_BYTES;
use tokio::{io::AsyncReadExt, task::JoinSet};

use crate::{
    frames::{
        ACK, ConnectionEnd, END_HEADERS, GOAWAY, HEADERS, PING, PREFACE, RawH2, block, code, field, frame,
        get as h2_get, post as h2_post, settings,
    },
    served::{ServeProcess, connect_from, files, source},
    support::{
        TestProxy, TestUpstream, Wire, h2, route, routes, soon, until,
        upstream::answer,
        wire::{CHAT, chat, get, post},
    },
};

/// Payload of the PING that h2 sends after its first GOAWAY.
const GRACEFUL_PING: [u8; 8] = [0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54];

/// Opens `count` connections, 200 at a time. Every other one sends a request and is kept alive after the response.
async fn connect(count: usize, to: SocketAddr) -> Vec<Wire> {
    let mut open = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for number in 0..count {
        opening.spawn(async move {
            let stream = connect_from(source(number), to).await;
            let mut client = Wire { stream, buf: Vec::new() };
            if number % 2 == 0 {
                assert_eq!(client.ask(get("/health")).await.status(), 200);
            }
            client
        });
        if opening.len() >= 200 {
            open.push(opening.join_next().await.unwrap().unwrap());
        }
    }
    while let Some(client) = opening.join_next().await {
        open.push(client.unwrap());
    }
    open
}

/// Opens `count` idle connections: others are served, memory stays within bounds, and all are closed on time.
async fn idle(count: usize, timeout: &str) {
    let mut upstream = TestUpstream::warm().await;
    let limits = format!("headerTimeout: {timeout}, idleTimeout: {timeout}, maxConnections: {}", count + 100);
    let mut served = ServeProcess::start("", &limits, &upstream.url()).await;
    served.listens().await;
    Wire::connect(served.address).await.ask(get("/health")).await;
    let before = served.memory("VmRSS:");
    let open = connect(count, served.address).await;
    let each = served.memory("VmRSS:").saturating_sub(before) / count;
    let _ = writeln!(std::io::stderr(), "{count} idle connections: {each} bytes of memory each");

    let mut client = Wire::connect(served.address).await;
    client.send(chat("new")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200, "a new one is served");
    assert_eq!(Wire::connect(served.admin).await.ask(get("/readyz")).await.status(), 200);

    // A read buffer and a write buffer of 8 KiB at most, a task, and the allocator's overhead.
    assert!(each < CONNECTION_COST_BYTES, "{each} bytes of memory for each of {count} connections");
    for mut client in open {
        // A reset counts as an end.
        let mut rest = Vec::new();
        let _ = soon("the end of an idle connection", client.stream.read_to_end(&mut rest)).await;
    }
}

#[tokio::test]
async fn idle_connections_cost_little_and_time_out() {
    anteroom::app::raise_file_limit();
    idle(2000.min(files() / 4), "4s").await;
}

/// The largest input that is not counted separately: a head just below the counted size; a frame of 16 KiB that lacks a
/// byte.
#[tokio::test]
async fn idle_connection_costs_at_most_its_estimate() {
    anteroom::app::raise_file_limit();
    let count = 1000.min(files() / 4);
    let upstream = TestUpstream::warm().await;
    let mut http1 = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(8 << 10)).into_bytes();
    http1.truncate(8 << 10);
    let head = [block(&[(":method", "GET")]), field("x", "x".repeat(17 << 10))].concat();
    let mut http2 = [PREFACE, &settings(&[]), &frame(HEADERS, END_HEADERS, 1, &head[..16 << 10])].concat();
    http2.pop();
    for (name, bytes) in [("HTTP/1", http1), ("HTTP/2", http2)] {
        let mut served = ServeProcess::start("", "headerTimeout: 10m", &upstream.url()).await;
        served.listens().await;
        Wire::connect(served.address).await.ask(get("/health")).await;
        let before = served.memory("VmRSS:");
        let mut open = Vec::new();
        for number in 0..count {
            let mut client =
                Wire { stream: connect_from(source(number), served.address).await, buf: Vec::new() };
            client.send(&bytes).await;
            open.push(client);
        }
        // The proxy's one thread reads connections in order: after these requests it has read all others.
        for _ in 0..3 {
            assert_eq!(Wire::connect(served.address).await.ask(get("/health")).await.status(), 200);
        }
        let each = served.memory("VmRSS:").saturating_sub(before) / count;
        let _ = writeln!(std::io::stderr(), "{count} connections of {name}: {each} bytes of memory each");
        assert!(each < CONNECTION_COST_BYTES, "{each} bytes for each of {count} of {name}");
    }
}

/// The same test at full size, run by `.ci/run abuse`. Client and server are separate processes, each with its own
/// limit of open files.
#[tokio::test]
#[ignore = "a minute, and 100,000 files in each of two processes"]
async fn a_hundred_thousand_idle_connections() {
    anteroom::app::raise_file_limit();
    // The proxy reserves up to 4,096 files for other uses, and the test needs some as well.
    let count = 100_000.min(files().saturating_sub(4096 + 500));
    if count < 100_000 {
        let _ =
            writeln!(std::io::stderr(), "{count} instead of 100000: a process may have {} files", files());
    }
    idle(count, "20s").await;
}

#[tokio::test]
async fn soft_file_limit_is_raised() {
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let mut served = ServeProcess::start("ulimit -Sn 128", "maxConnections: 100", &upstream.url()).await;
    let said = served.listens().await;
    assert!(!said.contains("open files"), "100 connections fit: {said}");
    assert!(served.files() > 128, "{}", served.files());

    let mut served = ServeProcess::start("ulimit -n 200", "", &upstream.url()).await;
    let said = served.listens().await;
    assert!(said.contains("open files") && said.contains("ulimit"), "{said}");
    assert_eq!(served.files(), 200);
    // Twice as many connections as files: the newest connections are served, and so is the admin port.
    let mut open = Vec::new();
    for number in 0..400 {
        open.push(connect_from(source(number), served.address).await);
    }
    let mut last = Wire { stream: open.pop().unwrap(), buf: Vec::new() };
    for _ in 0..3 {
        assert_eq!(last.ask(chat("in")).await.status(), 200, "there are files for connections to endpoints");
        assert_eq!(Wire::connect(served.admin).await.ask(get("/readyz")).await.status(), 200);
    }
    // Closed connections make room.
    drop(open);
    assert_eq!(Wire::connect(served.address).await.ask(chat("next")).await.status(), 200);
}

#[tokio::test]
async fn connections_per_source_are_limited() {
    let mut upstream = TestUpstream::warm().await;
    let config = format!(
        "limits: {{ maxConnectionsPerSource: 3 }}\n{}",
        routes(&[route("tiny", &upstream.url(), "")])
    );
    let proxy = TestProxy::start(&config).await;
    let (one, other) = (source(0), source(250));
    let from = async |source| Wire { stream: connect_from(source, proxy.address).await, buf: Vec::new() };
    let mut open = Vec::new();
    let mut calls = Vec::new();
    for _ in 0..3 {
        let mut client = from(one).await;
        client.send(chat("busy")).await;
        calls.push(upstream.call().await);
        open.push(client);
    }
    assert_eq!(from(one).await.end().await, b"", "the fourth is closed without a word: all are busy");
    let mut another = from(other).await;
    assert_eq!(another.ask(get("/health")).await.status(), 200, "others are served");
    drop((open.pop(), calls.pop()));
    until("a place to be free", async || proxy.shared.connections.open() == 3).await;
    let mut client = from(one).await;
    assert_eq!(client.ask(get("/health")).await.status(), 200);
    // The client is now idle: after a second a new connection from its source evicts it, not a connection from another
    // source.
    until("the idle connection to make room", async || {
        let mut newcomer = from(one).await;
        newcomer.send(get("/health")).await;
        newcomer.head().await.is_some_and(|head| head.status() == 200)
    })
    .await;
    assert_eq!(client.end().await, b"");
    assert_eq!(another.ask(get("/health")).await.status(), 200);
    for (call, mut client) in calls.into_iter().zip(open) {
        call.echo().await;
        assert_eq!(client.response().await.status(), 200, "what is under way is never given up");
    }
    proxy.stop(&[("client_gone", 1), ("completed", 2)]).await;
}

/// Starts a proxy with these limits in front of a warm server that echoes.
async fn limited(limits: &str) -> (TestProxy, TestUpstream) {
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let config = format!("limits: {{ {limits} }}\n{}", routes(&[route("tiny", &upstream.url(), "")]));
    (TestProxy::start(&config).await, upstream)
}

#[tokio::test]
async fn full_listener_evicts_oldest_idle_connections() {
    let (proxy, _upstream) = limited("maxConnections: 3").await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut client = proxy.client().await;
        assert_eq!(client.ask(get("/health")).await.status(), 200);
        open.push(client);
    }
    // The first connection is used again, which makes the second the oldest.
    assert_eq!(open[0].ask(chat("again")).await.status(), 200);
    let mut fourth = proxy.client().await;
    assert_eq!(fourth.ask(chat("new")).await.status(), 200);
    assert_eq!(open.remove(1).end().await, b"", "closed in order, without a word");
    for client in &mut open {
        assert_eq!(client.ask(chat("kept")).await.status(), 200);
    }
    // HTTP/2 gets GOAWAY: requests already sent are still served.
    drop(open);
    until("two places", async || proxy.shared.connections.open() == 1).await;
    let mut h2 = RawH2::connect(proxy.address).await;
    h2.send(h2_get(1, "/v1/models")).await;
    assert_eq!(h2.answer(1).await, Ok(200));
    assert_eq!(fourth.ask(get("/health")).await.status(), 200);
    let mut others = Vec::new();
    for _ in 0..2 {
        let mut client = proxy.client().await;
        assert_eq!(client.ask(get("/health")).await.status(), 200);
        others.push(client);
    }
    let goaway = h2.frame_of(&[GOAWAY]).await.expect("GOAWAY, but the connection ended");
    assert_eq!((&goaway.payload[..4], code(&goaway.payload[4..])), (&[0x7f, 0xff, 0xff, 0xff][..], 0));
    h2.send(h2_get(3, "/v1/models")).await;
    assert_eq!(h2.answer(3).await, Ok(200));
    proxy.stop(&[("completed", 4)]).await;
}

#[tokio::test]
async fn idle_http_2_connection_gets_goaway() {
    let (proxy, _upstream) = limited("idleTimeout: 200ms").await;
    let mut client = RawH2::connect(proxy.address).await;
    client.send(h2_get(1, "/v1/models")).await;
    assert_eq!(client.answer(1).await, Ok(200));
    let goaway = client.frame_of(&[GOAWAY]).await.expect("GOAWAY, but the connection ended");
    assert_eq!(code(&goaway.payload[4..]), 0, "no error");
    // A request that crossed the GOAWAY is served, as its last stream id allows.
    client.send(h2_post(3, CHAT, r#"{"model":"tiny"}"#)).await;
    assert_eq!(client.answer(3).await, Ok(200));
    // After the client acknowledges the PING sent with it, the connection ends by itself.
    client.send(frame(PING, ACK, 0, &GRACEFUL_PING)).await;
    assert_eq!(client.end().await, ConnectionEnd::GoAway(0, String::new()));
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn http_1_answers_state_the_keep_alive_time() {
    let (proxy, upstream) = limited("idleTimeout: 90s").await;
    let mut client = proxy.client().await;
    for request in [get("/health"), chat("warm"), get("/nothing"), post(CHAT, "{")] {
        let response = client.ask(&request).await;
        assert_eq!(response.get("keep-alive"), Some("timeout=90"), "{request}");
        assert_eq!(response.get("connection"), None);
    }
    for request in [
        get("/health").replace("Host", "Connection: Close\r\nHost"),
        get("/health").replace("HTTP/1.1", "HTTP/1.0"),
    ] {
        assert_eq!(proxy.ask(&request).await.get("keep-alive"), None, "{request}");
    }
    let mut h2 = h2::connect(proxy.address).await;
    let response = h2.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#)).await.unwrap();
    assert!(!response.headers().contains_key("keep-alive"));
    proxy.stop(&[("completed", 2)]).await;
    drop(upstream);

    // The upstream's own `Keep-Alive` is not passed on.
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(chat("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.finish(answer("200 OK", &[("Keep-Alive", "timeout=5")], "{}")).await;
    assert_eq!(client.response().await.get("keep-alive"), Some("timeout=660"), "eleven minutes by default");
    proxy.stop(&[("completed", 1)]).await;
}
