//! Model servers that accept and then do nothing, or too little: the route's timeouts bound them, to the second.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use anteroom::{error::Outcome, upstream::UpstreamIo};
use tokio::{
    io::{AsyncWriteExt, DuplexStream},
    time::{Instant, sleep},
};

use crate::{
    memory::{InMemoryProxy, connection, read_request},
    support::wire::{chat, streaming},
};

/// Returns a proxy whose server runs `serve` on each connection, and the number of connections.
fn proxy_with_server<F>(
    more: &str,
    serve: impl Fn(DuplexStream) -> F + Send + Sync + 'static,
) -> (InMemoryProxy, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let world = InMemoryProxy::new(more, move || {
        counted.fetch_add(1, SeqCst);
        let (ours, theirs) = connection();
        tokio::spawn(serve(theirs));
        Ok(Box::new(ours) as Box<dyn UpstreamIo>)
    });
    world.watch(|| true);
    (world, connections)
}

async fn every_second(mut io: DuplexStream, text: &str, byte_by_byte: bool) {
    if read_request(&mut io).await {
        let size = if byte_by_byte { 1 } else { text.len() };
        for part in text.as_bytes().chunks(size).cycle() {
            if io.write_all(part).await.is_err() {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Whatever a server does instead of sending a complete head, `upstream.responseTimeout` ends it: the client gets 502;
/// no other server is tried, since this one may be working on the request; and the slot is freed.
#[tokio::test(start_paused = true)]
async fn missing_head_fails_at_response_timeout() {
    const RESPONSE_TIMEOUT_5S: &str = "upstream: { responseTimeout: 5s }";
    let servers = [
        (
            "never answers",
            proxy_with_server(RESPONSE_TIMEOUT_5S, |mut io| async move {
                read_request(&mut io).await;
                std::future::pending().await
            }),
        ),
        (
            "does not even read",
            proxy_with_server(RESPONSE_TIMEOUT_5S, |io| async move {
                let _kept = io;
                std::future::pending().await
            }),
        ),
        (
            "trickles a head",
            proxy_with_server(RESPONSE_TIMEOUT_5S, |io| {
                every_second(io, "HTTP/1.1 200 OK\r\nX: xxxxxxxx", true)
            }),
        ),
        (
            "informs for ever",
            proxy_with_server(RESPONSE_TIMEOUT_5S, |io| {
                every_second(io, "HTTP/1.1 103 Early Hints\r\n\r\n", false)
            }),
        ),
    ];
    for (what, (world, connections)) in servers {
        let began = Instant::now();
        let heard = world.ask(&chat("x")).await.unwrap();
        assert!(heard.starts_with("HTTP/1.1 502") && heard.contains("\"upstream_error\""), "{what}: {heard}");
        assert!(heard.contains("sent no response head within 5s"), "{what}: {heard}");
        assert_eq!((began.elapsed().as_secs(), connections.load(SeqCst)), (5, 1), "{what}");
        sleep(Duration::from_secs(1)).await;
        world.is_over(&[(Outcome::UpstreamError, 1)]);
    }
}

/// A server that closes every connection at once has done nothing: the request waits for one that responds, until its
/// own deadline, with backoff between attempts: 50, 100, 200, 400 and 800 ms, then every second. In 30 s that is at
/// most 5 + 29 + 1 tries.
#[tokio::test(start_paused = true)]
async fn closing_server_is_retried_with_backoff() {
    let (world, connections) = proxy_with_server("hold: { timeout: 30s }", |io| async move { drop(io) });
    let began = Instant::now();
    let heard = world.ask(&chat("x")).await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 504") && heard.contains("cold_start_timeout"), "{heard}");
    assert_eq!(began.elapsed().as_secs(), 30);
    let tries = connections.load(SeqCst);
    assert!((10..=35).contains(&tries), "{tries}");
    sleep(Duration::from_secs(1)).await;
    world.is_over(&[(Outcome::ColdStartTimeout, 1)]);
}

/// A slow body may take any time as long as no pause exceeds `upstream.idleTimeout`. One that stops is cut off after
/// one to two times that, and the client sees an incomplete response.
#[tokio::test(start_paused = true)]
async fn a_body_may_trickle_but_not_stop() {
    const IDLE_TIMEOUT_5S: &str = "upstream: { idleTimeout: 5s }";
    let (trickling, _) = proxy_with_server(IDLE_TIMEOUT_5S, |mut io| async move {
        read_request(&mut io).await;
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let _ = io.write_all(head.as_bytes()).await;
        for _ in 0..100 {
            sleep(Duration::from_secs(4)).await;
            let _ = io.write_all(b"1\r\nx\r\n").await;
        }
        let _ = io.write_all(b"0\r\n\r\n").await;
    });
    let began = Instant::now();
    let heard = trickling.ask(&streaming("x")).await.unwrap();
    assert!(heard.ends_with("0\r\n\r\n"), "{heard}");
    assert_eq!(began.elapsed().as_secs(), 400, "100 times 4 s");
    trickling.is_over(&[(Outcome::Completed, 1)]);

    let (stopping, _) = proxy_with_server(IDLE_TIMEOUT_5S, |mut io| async move {
        read_request(&mut io).await;
        let _ = io.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n").await;
        std::future::pending().await
    });
    let began = Instant::now();
    let heard = stopping.ask(&streaming("x")).await.unwrap();
    assert!(heard.ends_with("x\r\n"), "{heard}");
    assert!((5..=10).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    sleep(Duration::from_secs(1)).await;
    stopping.is_over(&[(Outcome::UpstreamError, 1)]);
}
