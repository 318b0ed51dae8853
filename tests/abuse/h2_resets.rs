//! HTTP/2 clients that open requests in order to reset them: rapid reset (CVE-2023-44487), resets provoked from the
//! proxy (MadeYouReset, CVE-2025-8671), and more streams than allowed.
//!
//! In all cases nothing is left of a reset request: no ticket, permit, body byte or task.

use tokio::io::AsyncWriteExt as _;

use crate::{
    frames::{
        ACK, CANCEL, ConnectionEnd, DATA, END_HEADERS, ENHANCE_YOUR_CALM, GOAWAY, HEADERS, PREFACE, PRIORITY,
        PROTOCOL_ERROR, RST_STREAM, RawH2, SETTINGS, block, code, frame, post, post_fields, reset, settings,
        window,
    },
    memory::{MemoryTest, settle, tasks},
    recorder::{Recorder, TINY_BODY},
    support::{TestProxy, TestUpstream, route, routes, until, wire::CHAT},
};

const REFUSED_STREAM: u32 = 0x7;

async fn start(limits: &str, url: &str) -> TestProxy {
    TestProxy::start(&format!("limits: {{ {limits} }}\n{}", routes(&[route("tiny", url, "")]))).await
}

/// Asserts that nothing is left of the requests of a disconnected client, and that at most one activation was started.
async fn nothing_is_left(proxy: &TestProxy) {
    let gate = proxy.gate().await;
    until("every request to have ended", async || {
        let counters = gate.counters();
        gate.held() == 0 && gate.in_flight() == 0 && counters.admitted() == counters.ended_in_all()
    })
    .await;
    until("every byte to be given back", async || proxy.shared.memory.bodies() == 0).await;
    let counts = gate.counts();
    assert_eq!((counts.held, counts.in_flight), (0, 0));
    assert!(counts.activations <= 1, "{counts:?}");
}

#[tokio::test]
async fn hang_up_behind_bytes_over_http_2_is_noticed() {
    // The proxy reads input at any time and drops bytes that belong to no request, so it notices a disconnect behind
    // them.
    let upstream = TestUpstream::cold().await;
    let proxy = start("", &upstream.url()).await;
    for how in ["closes", "resets"] {
        let mut client = RawH2::connect(proxy.address).await;
        client.send(post(1, CHAT, TINY_BODY)).await;
        proxy.await_tiny_held(1).await;
        // The body of another request, up to its window, and frames of unknown kind.
        client.send(frame(HEADERS, END_HEADERS, 3, &block(&post_fields(CHAT)))).await;
        client.send(frame(DATA, 0, 3, &[b'x'; 16 << 10]).repeat(4)).await;
        client.send(frame(0xee, 0, 0, &[b'x'; 16 << 10]).repeat(16)).await;
        match how {
            "closes" => drop(client),
            _ => crate::support::upstream::reset(client.wire.stream),
        }
        nothing_is_left(&proxy).await;
    }
    assert_eq!(upstream.requests(), 0);
    proxy.stop(&[("client_gone", 2)]).await;
}

#[tokio::test]
async fn rapid_reset_in_one_burst_ends_the_connection() {
    let upstream = TestUpstream::cold().await;
    let proxy = start("maxRapidResets: 100", &upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    client.settled().await;
    let burst: Vec<u8> = (0..2000)
        .flat_map(|number| [post(2 * number + 1, CHAT, TINY_BODY), reset(2 * number + 1, CANCEL)].concat())
        .collect();
    client.try_send(burst).await;
    // Ended by h2 for requests not yet accepted, or by the proxy for accepted ones.
    let end = client.end().await;
    assert!(
        end == ConnectionEnd::GoAway(ENHANCE_YOUR_CALM, "too_many_resets".into())
            || end == ConnectionEnd::Cut,
        "{end:?}"
    );
    nothing_is_left(&proxy).await;
    let admitted = proxy.gate().await.counters().admitted();
    assert!(admitted <= 150, "{admitted} of 2000 were let in");
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn slow_rapid_reset_ends_the_connection() {
    let upstream = TestUpstream::cold().await;
    let proxy = start("maxRapidResets: 50", &upstream.url()).await;
    let gate = proxy.gate().await;
    let mut client = RawH2::connect(proxy.address).await;
    client.settled().await;
    for number in 0..51 {
        // Half of all requests may be reset this quickly, and 50 in any case.
        client.send(post(2 * number + 1, CHAT, TINY_BODY)).await;
        until("it to be held", async || gate.held() == 1).await;
        client.send(reset(2 * number + 1, CANCEL)).await;
        until("it to be gone", async || gate.held() == 0).await;
    }
    client.try_send(post(103, CHAT, TINY_BODY)).await;
    assert_eq!(client.end().await, ConnectionEnd::Cut, "after the 51st reset nothing more is read");
    assert_eq!(gate.counters().admitted(), 51);
    nothing_is_left(&proxy).await;
}

#[tokio::test]
async fn occasional_resets_are_tolerated() {
    let recorder = Recorder::new().await;
    let proxy = start("maxRapidResets: 5", &recorder.upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    for round in 0..30 {
        let stream = 6 * round + 1;
        for stream in [stream, stream + 2] {
            client.send(post(stream, CHAT, TINY_BODY)).await;
            assert_eq!(client.answer(stream).await, Ok(200));
        }
        client.send([post(stream + 4, CHAT, TINY_BODY), reset(stream + 4, CANCEL)].concat()).await;
    }
    nothing_is_left(&proxy).await;
}

#[tokio::test]
async fn made_you_reset_is_bounded_and_leaves_nothing() {
    // Each violation makes the proxy reset a stream that the client itself never resets (CVE-2025-8671).
    type Violation = fn(u32) -> Vec<u8>;
    let violations: [(&str, Violation); 4] = [
        ("a window that grows by nothing", |stream| window(stream, 0)),
        ("a window beyond its largest", |stream| window(stream, (1 << 31) - 1)),
        ("data behind the end", |stream| frame(DATA, 0, stream, b"x")),
        ("a head behind the end", |stream| frame(HEADERS, 4, stream, &block(&[("x", "1")]))),
    ];
    for (what, violation) in violations {
        let upstream = TestUpstream::cold().await;
        let proxy = start("maxRapidResets: 20", &upstream.url()).await;
        let gate = proxy.gate().await;
        let mut client = RawH2::connect(proxy.address).await;
        client.settled().await;
        let mut ended = None;
        for number in 0..100 {
            let stream = 2 * number + 1;
            if !client.try_send(post(stream, CHAT, TINY_BODY)).await {
                ended = Some(ConnectionEnd::Cut);
                break;
            }
            let admitted = gate.counters().admitted();
            until("it to be held", async || gate.held() > 0 || gate.counters().admitted() > admitted).await;
            client.try_send(violation(stream)).await;
            match client.frame_of(&[RST_STREAM, crate::frames::GOAWAY]).await {
                Some(frame) if frame.kind == RST_STREAM => {
                    assert_eq!(frame.stream, stream);
                    until("its work to end", async || gate.held() == 0).await;
                }
                Some(frame) => {
                    ended = Some(ConnectionEnd::GoAway(code(&frame.payload[4..]), String::new()));
                    break;
                }
                None => {
                    ended = Some(ConnectionEnd::Cut);
                    break;
                }
            }
        }
        assert!(ended.is_some(), "{what}: 100 resets, and no end");
        let admitted = gate.counters().admitted();
        assert!(admitted <= 22, "{what}: {admitted}");
        nothing_is_left(&proxy).await;
    }
}

#[tokio::test]
async fn self_dependent_stream_is_a_stream_error() {
    let recorder = Recorder::new().await;
    let proxy = start("maxRapidResets: 20", &recorder.upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    let on_itself = [&1_u32.to_be_bytes()[..], &[16]].concat();
    client.send(frame(PRIORITY, 0, 1, &on_itself)).await;
    let told = client.frame_of(&[RST_STREAM, GOAWAY]).await.unwrap();
    assert_eq!((told.kind, code(&told.payload)), (RST_STREAM, PROTOCOL_ERROR));
    // The connection stays usable.
    client.send(post(3, CHAT, TINY_BODY)).await;
    assert_eq!(client.answer(3).await, Ok(200));
}

#[tokio::test]
async fn streams_above_the_limit_are_refused() {
    let upstream = TestUpstream::cold().await;
    let proxy = start("maxConcurrentStreams: 4, maxHeaderBytes: 16KiB", &upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    let told = client.frame_of(&[SETTINGS]).await.unwrap().payload;
    let told: Vec<_> =
        told.chunks(6).map(|pair| (u16::from_be_bytes([pair[0], pair[1]]), code(&pair[2..]))).collect();
    assert!(told.contains(&(3, 4)), "SETTINGS_MAX_CONCURRENT_STREAMS in {told:?}");
    assert!(told.contains(&(6, 16 << 10)), "SETTINGS_MAX_HEADER_LIST_SIZE in {told:?}");
    client.settled().await;
    for number in 0..4 {
        client.send(post(2 * number + 1, CHAT, TINY_BODY)).await;
    }
    proxy.await_tiny_held(4).await;
    client.send(post(9, CHAT, TINY_BODY)).await;
    assert_eq!(client.answer(9).await, Err(REFUSED_STREAM));
    proxy.await_tiny_held(4).await;
    // A stream that ends makes room for another.
    client.send(reset(1, CANCEL)).await;
    proxy.await_tiny_held(3).await;
    client.send(post(11, CHAT, TINY_BODY)).await;
    proxy.await_tiny_held(4).await;
    drop(client);
    nothing_is_left(&proxy).await;
}

#[tokio::test(start_paused = true)]
async fn reset_request_leaves_no_task() {
    let memory = MemoryTest::new("maxRapidResets: 100000", "match: { models: [tiny] }");
    let mut client = memory.client(1 << 20);
    let hello = [PREFACE, &settings(&[]), &frame(SETTINGS, ACK, 0, &[])].concat();
    client.write_all(&hello).await.unwrap();
    settle().await;
    let before = tasks();
    for number in 0..500 {
        let stream = 2 * number + 1;
        client.write_all(&post(stream, CHAT, TINY_BODY)).await.unwrap();
        settle().await;
        assert_eq!((memory.gate.held(), tasks()), (1, before + 1));
        client.write_all(&reset(stream, CANCEL)).await.unwrap();
        settle().await;
        assert_eq!((memory.gate.held(), tasks()), (0, before));
    }
    // An incomplete request is not admitted and wakes nothing.
    let admitted = memory.gate.counters().admitted();
    assert_eq!(admitted, 500);
    client.write_all(&frame(HEADERS, 4, 1001, &block(&post_fields(CHAT)))).await.unwrap();
    client.write_all(&frame(DATA, 0, 1001, &TINY_BODY.as_bytes()[..5])).await.unwrap();
    settle().await;
    assert_eq!(memory.shared.memory.bodies(), 5);
    client.write_all(&reset(1001, CANCEL)).await.unwrap();
    settle().await;
    assert_eq!((memory.gate.counters().admitted(), tasks()), (admitted, before));
    assert!(memory.is_empty());
    // All requests share one activation, with the lease of a single request.
    assert_eq!(memory.gate.counts().activations, 1);
    drop(client);
    settle().await;
    assert_eq!(tasks(), before - 1);
}

#[tokio::test(start_paused = true)]
async fn reset_partial_requests_wake_nothing() {
    let memory = MemoryTest::new("", "match: { models: [tiny] }");
    let mut client = memory.client(1 << 20);
    client.write_all(&[PREFACE, &settings(&[]), &frame(SETTINGS, ACK, 0, &[])].concat()).await.unwrap();
    for number in 0..50 {
        let stream = 2 * number + 1;
        client.write_all(&frame(HEADERS, 4, stream, &block(&post_fields(CHAT)))).await.unwrap();
        client.write_all(&frame(DATA, 0, stream, b"{\"model\":\"tiny\"")).await.unwrap();
        settle().await;
        client.write_all(&reset(stream, CANCEL)).await.unwrap();
        settle().await;
    }
    let counts = memory.gate.counts();
    assert_eq!((counts.activations, counts.is_active()), (0, false));
    assert!(memory.is_empty());
}
