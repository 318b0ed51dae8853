//! Large heads that never end, on many connections, over HTTP/1 and HTTP/2.

use tokio::{io::AsyncReadExt, task::JoinSet};

use crate::{
    frames::{END_HEADERS, HEADERS, RawH2, block, field, frame, post_fields},
    recorder::{Recorder, TINY_BODY},
    support::{
        TestProxy, Wire, route, routes, soon, until,
        wire::{CHAT, get_with, post},
    },
};

/// Three quarters of `maxBufferedBytes`, in bytes.
const HEADS_BUDGET_BYTES: u64 = 3 << 20;

async fn start(recorder: &Recorder) -> TestProxy {
    let limits = "maxBodyBytes: 1MiB, maxBufferedBytes: 4MiB, headerTimeout: 10m";
    let route = route("tiny", &recorder.upstream.url(), "hold: { maxBytes: 1MiB }");
    TestProxy::start(&format!("limits: {{ {limits} }}\n{}", routes(&[route]))).await
}

async fn heads(proxy: &TestProxy) -> u64 {
    proxy.metric("anteroom_memory_bytes", &["kind=\"head\""]).await
}

/// Waits until all but `left` of the connections are closed. Returns the others.
async fn await_closed_except(clients: Vec<Wire>, left: usize) -> JoinSet<()> {
    let mut open: JoinSet<()> = clients
        .into_iter()
        .map(|mut client| async move {
            while client.stream.read(&mut [0; 1024]).await.is_ok_and(|read| read > 0) {}
        })
        .collect();
    soon("connections to end", async {
        while open.len() > left {
            open.join_next().await.unwrap().unwrap();
        }
    })
    .await;
    open
}

/// Asserts that other clients are served meanwhile, one of them with a large head.
async fn serves_others(proxy: &TestProxy) {
    let large = get_with("/health", &[("Cookie", &"c".repeat(40_000))]);
    let mut client = proxy.sent(&large[..30_000]).await;
    assert_eq!(client.ask(&large[30_000..]).await.status(), 200);
    assert_eq!(proxy.ask(post(CHAT, TINY_BODY)).await.status(), 200);
}

/// 60 KB each, of which 51,808 bytes are counted, so 60 fit.
#[tokio::test]
async fn partial_heads_are_bounded_and_the_oldest_end() {
    let recorder = Recorder::new().await;
    let proxy = start(&recorder).await;
    let head = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(60_000 - 19));
    let mut clients = Vec::new();
    for _ in 0..200 {
        clients.push(proxy.sent(&head).await);
    }
    let open = await_closed_except(clients, 60).await;
    assert!(heads(&proxy).await <= HEADS_BUDGET_BYTES);
    serves_others(&proxy).await;
    drop(open);
    until("all memory to be given back", async || heads(&proxy).await == 0).await;
}

/// A HEADERS frame without END_HEADERS counts as 256 KiB however short it is, so 12 fit.
#[tokio::test]
async fn open_header_blocks_are_bounded_oldest_end_first() {
    let recorder = Recorder::new().await;
    let proxy = start(&recorder).await;
    let begins = [block(&post_fields(CHAT)), field("x", "x")].concat();
    let mut clients = Vec::new();
    for _ in 0..40 {
        let mut client = RawH2::connect(proxy.address).await;
        client.send(frame(HEADERS, 0, 1, &begins)).await;
        clients.push(client.wire);
    }
    let open = await_closed_except(clients, 12).await;
    assert!(heads(&proxy).await <= HEADS_BUDGET_BYTES);
    serves_others(&proxy).await;
    drop(open);
    until("all memory to be given back", async || heads(&proxy).await == 0).await;
}

/// Streams with large heads whose bodies never arrive: each counts as about 24 KiB, so 128 fit.
#[tokio::test]
async fn bodiless_requests_are_bounded_oldest_end_first() {
    let recorder = Recorder::new().await;
    let proxy = start(&recorder).await;
    let head = [block(&post_fields(CHAT)), field("x", "x".repeat(15_000))].concat();
    let mut client = RawH2::connect(proxy.address).await;
    for number in 0..400 {
        client.send(frame(HEADERS, END_HEADERS, 2 * number + 1, &head)).await;
    }
    for number in 0..250 {
        let refused = client.frame_of(&[HEADERS]).await.expect("an answer to those that are given up");
        assert!(refused.stream < 2 * 400, "{number}: stream {}", refused.stream);
    }
    assert!(heads(&proxy).await <= HEADS_BUDGET_BYTES);
    serves_others(&proxy).await;
    drop(client);
    until("all memory to be given back", async || heads(&proxy).await == 0).await;
}
