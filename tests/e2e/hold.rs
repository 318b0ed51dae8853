//! Holding and releasing: first in, first out, within the endpoint's limit, which ramps up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::time::sleep;

use crate::support::{
    TestProxy, TestUpstream,
    upstream::{LAST, STREAM, chunk},
    wire::{chat, streaming},
};

/// Sends chats `0`, `1`, … on separate connections, each held before the next one is sent.
async fn held_in_order(proxy: &TestProxy, count: usize) -> Vec<crate::support::Wire> {
    let mut clients = Vec::new();
    for number in 0..count {
        clients.push(proxy.sent(chat(&number.to_string())).await);
        proxy.await_tiny_held(number as u64 + 1).await;
    }
    clients
}

#[tokio::test]
async fn held_requests_go_in_order_within_the_limit() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 2, rampStart: 2 }").await;
    let mut clients = held_in_order(&proxy, 6).await;
    upstream.probed().await;
    assert_eq!(upstream.requests(), 0, "nothing is sent to what is not ready");
    upstream.wake();

    let (mut first, mut second) = (upstream.call().await, upstream.call().await);
    // Released together over separate connections, so they may arrive in either order.
    let mut texts = [first.text().await, second.text().await];
    texts.sort();
    assert_eq!(texts, ["0", "1"]);
    proxy.await_tiny_in_flight(2).await;
    assert_eq!((proxy.route("tiny").await["held"].as_u64(), upstream.pending()), (Some(4), 0));
    first.reply(&texts[0]).await;
    for expected in ["2", "3", "4", "5"] {
        let mut next = upstream.call().await;
        assert_eq!(next.text().await, expected);
        assert_eq!(upstream.pending(), 0, "two in flight, {expected} being one of them");
        next.reply(expected).await;
    }
    second.reply(&texts[1]).await;
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.await_outcome("completed", 200, 6).await;
    proxy.stop(&[("completed", 6)]).await;
}

#[tokio::test]
async fn ramp_doubles_with_each_round_of_first_bytes() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 8, rampStart: 2 }").await;
    let mut clients = Vec::new();
    for number in 0..20 {
        clients.push(proxy.sent(streaming(&number.to_string())).await);
    }
    proxy.await_tiny_held(20).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    let mut calls = Vec::new();
    // The limit starts at two; after two first bytes it is four, although neither response has ended; then it reaches
    // the maximum.
    let mut answered = 0;
    for in_flight in [2, 4, 8] {
        while calls.len() < in_flight {
            calls.push(upstream.call().await);
        }
        // Without successful probes, only first bytes widen the ramp, for 5 s.
        upstream.sleep();
        proxy.await_tiny_in_flight(in_flight as u64).await;
        let route = proxy.route("tiny").await;
        assert_eq!(route["endpoints"][0]["limit"].as_u64(), Some(in_flight as u64));
        assert_eq!((upstream.pending(), upstream.requests()), (0, in_flight));
        for call in &mut calls[answered..] {
            call.send(STREAM).await;
            call.send(chunk("data: x\n\n")).await;
        }
        answered = in_flight;
    }
    // From here on, each completed request releases one held request.
    for sent in 8..20 {
        calls.remove(0).finish(LAST).await;
        let mut call = upstream.call().await;
        assert_eq!((upstream.pending(), upstream.requests()), (0, sent + 1));
        call.send(STREAM).await;
        calls.push(call);
    }
    for call in calls {
        call.finish(LAST).await;
    }
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.await_outcome("completed", 200, 20).await;
    proxy.stop(&[("completed", 20)]).await;
}

#[tokio::test]
async fn swallowed_requests_do_not_hold_up_the_others() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let _clients = held_in_order(&proxy, 12).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    // The first 4 never get a response.
    let mut calls = Vec::new();
    while calls.len() < 12 {
        calls.push(upstream.call().await);
    }
    proxy.await_tiny_in_flight(12).await;
    drop(calls);
}

#[tokio::test]
async fn server_that_resets_above_8_answers_everybody() {
    let (now, resets) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (now.clone(), resets.clone());
    let upstream = TestUpstream::cold().await.automatic(move |call| {
        let (now, resets) = counts.clone();
        async move {
            let has_room = now.fetch_add(1, SeqCst) < 8;
            if has_room {
                sleep(Duration::from_millis(400)).await;
            }
            // Decremented before the proxy can notice the end and dispatch the next request.
            now.fetch_sub(1, SeqCst);
            if has_room {
                call.echo().await;
            } else {
                resets.fetch_add(1, SeqCst);
                call.reset();
            }
        }
    });
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut clients = held_in_order(&proxy, 48).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    // 16 are tried, then 9 every 5 s, instead of all held requests over and over.
    let resets = resets.load(SeqCst);
    assert!(resets <= 24, "{resets} of 48");
    proxy.stop(&[("completed", 48)]).await;
}

#[tokio::test]
async fn ready_target_gets_its_full_limit_at_once() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 3, rampStart: 1 }").await;
    let mut clients = Vec::new();
    for number in 0..4 {
        clients.push(proxy.sent(chat(&number.to_string())).await);
    }
    let calls = [upstream.call().await, upstream.call().await, upstream.call().await];
    proxy.await_tiny_held(1).await;
    assert_eq!(upstream.pending(), 0);
    for call in calls {
        call.echo().await;
    }
    upstream.call().await.echo().await;
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.stop(&[("completed", 4)]).await;
}

#[tokio::test]
async fn permit_is_held_until_the_last_byte() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 1 }").await;
    let mut first = proxy.sent(streaming("first")).await;
    let mut call = upstream.call().await;
    let mut second = proxy.sent(chat("second")).await;
    proxy.await_tiny_held(1).await;
    call.send(STREAM).await;
    first.head().await.unwrap();
    for token in ["one", "two"] {
        call.send(chunk(token)).await;
        first.parts_until(token).await;
        let route = proxy.route("tiny").await;
        assert_eq!((route["held"].as_u64(), route["in_flight"].as_u64()), (Some(1), Some(1)), "{token}");
    }
    assert_eq!(upstream.pending(), 0);
    call.finish(LAST).await;
    assert_eq!(first.rest().await.as_deref(), Some(""));
    upstream.call().await.echo().await;
    assert_eq!(second.response().await.json()["text"], "second");
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn one_activation_serves_all_held_requests() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut clients = held_in_order(&proxy, 3).await;
    proxy.await_tiny_starting().await;
    let route = proxy.route("tiny").await;
    assert_eq!(route["phase"], "load", "of a url target, the next thing to come is being ready: {route}");
    assert!(route["held_bytes"].as_u64().unwrap() > 0);
    upstream.wake();
    for _ in 0..3 {
        upstream.call().await.echo().await;
    }
    for client in &mut clients {
        let response = client.response().await;
        assert_eq!(response.get("x-anteroom-cold-start"), Some("true"));
        assert_eq!(response.get("x-keda-http-cold-start"), Some("true"));
        let timing = response.get("server-timing").unwrap();
        assert!(timing.starts_with("hold;dur=") && timing.contains("upstream;dur="), "{timing}");
    }
    let records = proxy.admin("/api/v1/cold-starts?route=tiny&limit=5").await.json();
    let records = records["cold_starts"].as_array().unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(
        (records[0]["outcome"].as_str(), records[0]["held_peak"].as_u64()),
        (Some("completed"), Some(3))
    );
    assert_eq!(records[0]["released"].as_u64(), Some(3));

    // The next request finds a warm target.
    clients[0].send(chat("warm")).await;
    upstream.call().await.echo().await;
    let warm = clients[0].response().await;
    for name in ["x-anteroom-cold-start", "x-keda-http-cold-start", "server-timing"] {
        assert_eq!(warm.get(name), None, "{name}");
    }
    assert_eq!(proxy.metric("anteroom_requests_total", &["cold_start=\"true\""]).await, 3);
    proxy.stop(&[("completed", 4)]).await;
}
