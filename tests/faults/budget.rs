//! Memory pressure: the total size of all bodies at its limit.

use tokio::io::AsyncWriteExt as _;

use crate::support::{
    TestProxy, TestUpstream, Wire, route, routes, until,
    wire::{CHAT, post},
};

const KIB: usize = 1024;

/// Returns a request whose body has `size` bytes.
fn large(size: usize) -> String {
    let padding = size - r#"{"model":"tiny","p":""}"#.len();
    post(CHAT, &format!(r#"{{"model":"tiny","p":"{}"}}"#, "x".repeat(padding)))
}

fn chunked(size: usize) -> String {
    let body = large(size);
    let body = body.split_once("\r\n\r\n").unwrap().1;
    let chunks: String = body
        .as_bytes()
        .chunks(10_000)
        .map(|part| crate::support::upstream::chunk(&String::from_utf8_lossy(part)))
        .collect();
    format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n")
}

/// Waits until bodies take this many bytes in total.
async fn used(proxy: &TestProxy, bytes: usize) {
    until(&format!("{bytes} to be used"), async || proxy.shared.memory.bodies() == bytes).await;
}

/// Bodies on several connections fill the budget, each below its own limit. Surplus requests get 503 `hold_queue_full`
/// while they are still arriving; admitted bodies stay. Every body that completes, breaks off or stalls releases its
/// bytes, and a body that did not fit before then fits.
#[tokio::test]
async fn excess_bodies_are_rejected_and_bytes_released() {
    let mut upstream = TestUpstream::cold().await;
    let route = route("tiny", &upstream.url(), "");
    let proxy = TestProxy::start(&format!(
        "limits: {{ maxBodyBytes: 400KiB, maxBufferedBytes: 1MiB, bodyTimeout: 30s }}\n{}",
        routes(&[route])
    ))
    .await;
    // Two complete bodies are held.
    let mut waiting = vec![proxy.sent(large(300 * KIB)).await, proxy.sent(chunked(300 * KIB)).await];
    proxy.await_tiny_held(2).await;
    used(&proxy, 600 * KIB).await;
    // Two more arrive in part: 1,000 of 1,024 KiB are used.
    let part = large(300 * KIB);
    let head = part.find("\r\n\r\n").unwrap() + 4;
    let mut coming: Vec<Wire> = Vec::new();
    for _ in 0..2 {
        coming.push(proxy.sent(&part[..head + 200 * KIB]).await);
    }
    used(&proxy, 1000 * KIB).await;
    // Surplus on several connections at once: each is rejected after 24 KiB, although its length announces more.
    let mut surplus = Vec::new();
    for _ in 0..5 {
        surplus.push(proxy.sent(&part[..head + 100 * KIB]).await);
    }
    for mut client in surplus {
        let response = client.response().await;
        response.is_error(503, "hold_queue_full");
        assert!(response.text().contains("all request bodies together"), "{}", response.text());
        assert_eq!(response.get("retry-after"), Some("1"));
    }
    used(&proxy, 1000 * KIB).await;
    assert_eq!(proxy.route("tiny").await["held"], 2, "who is inside stays");
    // One of the partial bodies breaks off with a reset.
    crate::support::upstream::reset(coming.pop().unwrap().stream);
    used(&proxy, 800 * KIB).await;
    waiting.push(proxy.sent(large(200 * KIB)).await);
    proxy.await_tiny_held(3).await;
    // A held client hangs up.
    drop(waiting.remove(0));
    used(&proxy, 700 * KIB).await;
    // The other partial body completes.
    coming[0].send(&part[head + 200 * KIB..]).await;
    waiting.append(&mut coming);
    proxy.await_tiny_held(3).await;
    upstream.wake();
    for _ in 0..3 {
        upstream.call().await.echo().await;
    }
    for mut client in waiting {
        assert_eq!(client.response().await.status(), 200);
    }
    used(&proxy, 0).await;
    assert_eq!(proxy.refused("hold_queue_full").await, 5);
    proxy.stop(&[("client_gone", 1), ("completed", 3)]).await;
}

/// A body that stalls releases its bytes when it times out.
#[tokio::test]
async fn stalled_body_releases_its_bytes() {
    let upstream = TestUpstream::cold().await;
    let config = routes(&[route("tiny", &upstream.url(), "")]);
    let proxy = TestProxy::start(&format!("limits: {{ bodyTimeout: 2s }}\n{config}")).await;
    let request = large(300 * KIB);
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(proxy.sent(&request[..request.len() / 2]).await);
    }
    for mut client in clients {
        client.response().await.is_error(408, "request_timeout");
    }
    used(&proxy, 0).await;
    proxy.stop(&[]).await;
}

/// Many bodies that stall just before their end leave room for complete requests: a small one is served at once, and a
/// large one takes the memory of bodies that have stalled for 5 s, long before their `bodyTimeout`.
#[tokio::test]
async fn unfinished_bodies_keep_no_finished_request_waiting() {
    let mut upstream = TestUpstream::warm().await;
    let route = route("tiny", &upstream.url(), "hold: { maxBytes: 1600KiB }");
    let limits = "limits: { maxBodyBytes: 400KiB, maxBufferedBytes: 1600KiB, bodyTimeout: 10m, minRate: 0 }";
    let proxy = TestProxy::start(&format!("{limits}\n{}", routes(&[route]))).await;
    let attack = large(400 * KIB);
    let mut stalled = Vec::new();
    for _ in 0..3 {
        stalled.push(proxy.sent(&attack[..attack.len() - 300]).await);
    }
    let head = attack.find("\r\n\r\n").unwrap() + 4;
    used(&proxy, 3 * (attack.len() - head - 300)).await;
    let mut small = proxy.sent(large(KIB)).await;
    upstream.call().await.echo().await;
    assert_eq!(small.response().await.status(), 200);

    until("a large one to be served", async || {
        let mut client = proxy.sent(&attack).await;
        tokio::select! {
            call = upstream.call() => call.echo().await,
            response = client.response() => {
                response.is_error(503, "hold_queue_full");
                return false;
            }
        }
        client.response().await.status() == 200
    })
    .await;
    let mut evicted = 0;
    for mut client in stalled {
        // The write may fail on a connection whose body was evicted.
        let _ = client.stream.write_all(&attack.as_bytes()[attack.len() - 300..]).await;
        tokio::select! {
            call = upstream.call() => {
                call.echo().await;
                assert_eq!(client.response().await.status(), 200);
            }
            response = client.response() => {
                response.is_error(503, "hold_queue_full");
                evicted += 1;
            }
        }
    }
    assert_eq!(evicted, 1, "no more than it takes");
    used(&proxy, 0).await;
}
