//! HTTP/2 clients that do not read their responses: their windows stay shut.

use std::io::Write as _;

use anteroom::config::budget::{ANSWER_COST_BYTES, STREAM_COST_BYTES};

use crate::{
    frames::{DATA, HEADERS, RST_STREAM, RawH2, get, post, window},
    recorder::{Recorder, TINY_BODY},
    served::ServeProcess,
    support::{TestProxy, TestUpstream, route, routes, soon, until, wire::CHAT},
};

/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113, section 6.5.2).
const INITIAL_WINDOW_SETTING: u16 = 4;

async fn start(recorder: &Recorder) -> TestProxy {
    let limits = "maxBodyBytes: 1MiB, maxBufferedBytes: 1MiB, stallTimeout: 10m";
    let route = route("tiny", &recorder.upstream.url(), "hold: { maxBytes: 1MiB }");
    TestProxy::start(&format!("limits: {{ {limits} }}\n{}", routes(&[route]))).await
}

async fn answers(proxy: &TestProxy) -> u64 {
    proxy.metric("anteroom_memory_bytes", &["kind=\"answer\""]).await
}

/// 1 MiB for bodies gives another 128 KiB for responses: 29 responses with status 404, of 300 to 400 bytes plus 4 KiB
/// each. Streams beyond that end at once; unread ones end after a second until half of the room is free.
#[tokio::test]
async fn unread_answers_are_bounded_and_end_early() {
    const UNREAD_REQUESTS: u32 = 200;
    let recorder = Recorder::new().await;
    let proxy = start(&recorder).await;
    let mut client = RawH2::with_settings(proxy.address, &[(INITIAL_WINDOW_SETTING, 0)]).await;
    let path = format!("/{}", "a".repeat(4000));
    let asked: Vec<u8> = (0..UNREAD_REQUESTS).flat_map(|number| get(2 * number + 1, &path)).collect();
    client.send(asked).await;
    let (mut heads, mut ended) = (0, 0);
    soon("all streams but some 14 to end", async {
        while ended < UNREAD_REQUESTS - 15 {
            match client.frame_of(&[HEADERS, RST_STREAM]).await.expect("a frame").kind {
                HEADERS => heads += 1,
                _ => ended += 1,
            }
            if heads + ended == UNREAD_REQUESTS && heads > ended {
                let bytes = answers(&proxy).await;
                assert!(bytes <= 128 << 10, "{bytes}");
            }
        }
    })
    .await;
    assert!((20..32).contains(&heads), "{heads}");
    until("half of the room to be free", async || answers(&proxy).await <= 64 << 10).await;
    client.send(get(2 * UNREAD_REQUESTS + 1, "/short")).await;
    assert_eq!(client.answer(2 * UNREAD_REQUESTS + 1).await, Ok(404), "there is room for others");
    drop(client);
    until("all memory to be given back", async || answers(&proxy).await == 0).await;
}

/// Clients that read are served meanwhile, also with errors over HTTP/1.1.
#[tokio::test]
async fn readers_are_served_beside_unread_answers() {
    let recorder = Recorder::new().await;
    let proxy = start(&recorder).await;
    let mut silent = RawH2::with_settings(proxy.address, &[(INITIAL_WINDOW_SETTING, 0)]).await;
    for number in 0..100 {
        silent.send(get(2 * number + 1, "/nowhere")).await;
    }
    silent.settled().await;
    assert_eq!(proxy.ask("GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 404);
    let mut client = RawH2::connect(proxy.address).await;
    client.send(post(1, CHAT, TINY_BODY)).await;
    assert_eq!(client.answer(1).await, Ok(200));
}

/// All responses with the list of models share one buffer; a path in an error message is truncated.
#[tokio::test]
async fn answers_are_shared_or_short() {
    let recorder = Recorder::new().await;
    let proxy = start(&recorder).await;
    let mut client = RawH2::with_settings(proxy.address, &[(INITIAL_WINDOW_SETTING, 0)]).await;
    for number in 0..10 {
        client.send(get(2 * number + 1, "/v1/models")).await;
        assert_eq!(client.answer(2 * number + 1).await, Ok(200));
    }
    assert_eq!(answers(&proxy).await, 10 * ANSWER_COST_BYTES as u64);
    // A response read to its end costs nothing.
    client.send([window(0, 1 << 20), window(1, 1 << 20)].concat()).await;
    assert_eq!(client.frame_of(&[DATA]).await.unwrap().stream, 1);
    until("one to be given back", async || answers(&proxy).await == 9 * ANSWER_COST_BYTES as u64).await;

    let path = "a".repeat(4000);
    let response = proxy.ask(format!("GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
    let text = response.text();
    assert!(text.len() < 600 && text.contains(&format!("/{}…", &path[..127])), "{text}");
    let model = "m".repeat(30 << 10);
    let body = format!("{{\"model\":\"{model}\"}}");
    let response = proxy.ask(crate::support::wire::post(CHAT, &body)).await;
    response.is_error(400, "invalid_request");
    assert!(response.text().len() < 300, "{}", response.text());
}

/// Returns the resident bytes that each of 4,000 streams adds, without those of its connection. `open` opens a connection with
/// so many streams.
async fn bytes_per_stream(served: &ServeProcess, open: impl AsyncFn(usize) -> RawH2) -> usize {
    const CLIENT_COUNT: usize = 10;
    const STREAMS_PER_CLIENT: usize = 400;
    let mut clients = Vec::new();
    for _ in 0..CLIENT_COUNT {
        clients.push(open(1).await);
    }
    let before = served.memory("VmRSS:");
    for _ in 0..CLIENT_COUNT {
        clients.push(open(STREAMS_PER_CLIENT).await);
    }
    served.memory("VmRSS:").saturating_sub(before) / (CLIENT_COUNT * STREAMS_PER_CLIENT)
}

/// Sends `request` on so many streams of a connection.
async fn send_on_streams(mut client: RawH2, streams: usize, request: impl Fn(u32) -> Vec<u8>) -> RawH2 {
    for number in 0..streams {
        client.send(request(2 * u32::try_from(number).unwrap() + 1)).await;
    }
    client.settled().await;
    client
}

/// Unread responses, in a separate process.
#[tokio::test]
async fn unread_response_costs_at_most_its_accounting() {
    let recorder = Recorder::new().await;
    let mut served = ServeProcess::start("", "stallTimeout: 10m", &recorder.upstream.url()).await;
    served.listens().await;
    let address = served.address;
    let each = bytes_per_stream(&served, async |streams| {
        let client = RawH2::with_settings(address, &[(INITIAL_WINDOW_SETTING, 0)]).await;
        send_on_streams(client, streams, |id| get(id, "/nowhere")).await
    })
    .await;
    let _ = writeln!(std::io::stderr(), "an unread answer: {each} bytes");
    assert!(each < ANSWER_COST_BYTES + 1024, "{each} bytes, with a body of some 300");
}

/// Held requests, the most expensive state of a request: its stream, task, place in the queue and story. In a separate
/// process; without optimisation, tasks are larger than necessary.
#[tokio::test]
async fn held_stream_costs_at_most_its_accounting() {
    let cold = TestUpstream::cold().await;
    let held = "hold: { maxRequests: 10000 }";
    let mut served = ServeProcess::with_routes("", "", &[route("tiny", &cold.url(), held)]).await;
    served.listens().await;
    let address = served.address;
    let each = bytes_per_stream(&served, async |streams| {
        send_on_streams(RawH2::connect(address).await, streams, |id| post(id, CHAT, TINY_BODY)).await
    })
    .await;
    let _ = writeln!(std::io::stderr(), "a held request over HTTP/2: {each} bytes");
    assert!(each < STREAM_COST_BYTES + 1024, "{each} bytes, with a head of five short fields");
}
