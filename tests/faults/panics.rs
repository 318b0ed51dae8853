//! Panics: one request fails and is counted, its slot is freed, and all others continue.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use anteroom::{error::Outcome, upstream::UpstreamIo};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf},
    time::sleep,
};

use crate::{
    memory::{InMemoryProxy, connection, read_request},
    support::wire::{chat, streaming},
};

/// Behaviours of a connection to the endpoint.
const WORKS: u8 = 0;
const PANICS_ON_DIAL: u8 = 1;
const PANICS_ON_READ: u8 = 2;

/// Connection that panics when it is read.
struct PanickingIo(DuplexStream);

impl AsyncRead for PanickingIo {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        panic!("a defect in a connection to an endpoint")
    }
}

impl AsyncWrite for PanickingIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

struct PanicTest {
    world: InMemoryProxy,
    behaves: Arc<AtomicU8>,
    requests: Arc<AtomicUsize>,
}

fn rig(more: &str) -> PanicTest {
    let (behaves, requests) = (Arc::new(AtomicU8::new(WORKS)), Arc::new(AtomicUsize::new(0)));
    let (behaviour, counted) = (behaves.clone(), requests.clone());
    let world = InMemoryProxy::new(more, move || {
        let (ours, mut theirs) = connection();
        let counted = counted.clone();
        tokio::spawn(async move {
            if read_request(&mut theirs).await {
                counted.fetch_add(1, SeqCst);
                let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
                let _ = theirs.write_all(answer).await;
            }
        });
        match behaviour.load(SeqCst) {
            PANICS_ON_DIAL => panic!("a defect in the request path"),
            PANICS_ON_READ => Ok(Box::new(PanickingIo(ours)) as Box<dyn UpstreamIo>),
            _ => Ok(Box::new(ours)),
        }
    });
    PanicTest { world, behaves, requests }
}

/// Reads a response with a length from a kept-alive connection.
async fn answer(client: &mut DuplexStream) -> String {
    let mut heard = Vec::new();
    while !heard.ends_with(b"\r\n\r\n") {
        heard.push(client.read_u8().await.unwrap());
    }
    let head = String::from_utf8(heard).unwrap();
    let length =
        head.to_lowercase().split("content-length: ").nth(1).unwrap().split('\r').next().unwrap().parse();
    let mut body = vec![0; length.unwrap()];
    client.read_exact(&mut body).await.unwrap();
    head + &String::from_utf8(body).unwrap()
}

/// Panic of a request, dispatched at once or after a hold: the client gets a 500, counted as `internal`. The permit is
/// returned; the client's connection and the thread serve the next request.
#[tokio::test(start_paused = true)]
async fn panic_costs_only_its_request() {
    let PanicTest { world, behaves, requests } = rig("concurrency: { max: 1, rampStart: 1 }");
    let mut client = world.client();
    for held_first in [false, true] {
        behaves.store(PANICS_ON_DIAL, SeqCst);
        if held_first {
            world.endpoint.retire();
        } else {
            world.gate.target().ready(&world.endpoint, None);
        }
        client.write_all(chat("panics").as_bytes()).await.unwrap();
        if held_first {
            sleep(Duration::from_secs(1)).await;
            assert_eq!(world.gate.held(), 1);
            world.gate.target().ready(&world.endpoint, None);
        }
        let heard = answer(&mut client).await;
        assert!(heard.starts_with("HTTP/1.1 500") && heard.contains("\"internal\""), "{heard}");
        world.assert_conservation();
        assert_eq!((world.gate.held(), world.endpoint.in_flight()), (0, 0));
        behaves.store(WORKS, SeqCst);
        client.write_all(chat("the next one").as_bytes()).await.unwrap();
        assert!(answer(&mut client).await.ends_with("ok"));
    }
    drop(client);
    sleep(Duration::from_secs(1)).await;
    world.is_over(&[(Outcome::Completed, 2), (Outcome::Internal, 2)]);
    assert_eq!(requests.load(SeqCst), 2);
}

/// After an early 200 the status cannot change: the client sees its stream break off. The request is counted and its
/// slot freed; the connections of other clients are unaffected.
#[tokio::test(start_paused = true)]
async fn panic_after_early_answer_breaks_the_stream() {
    let PanicTest { world, behaves, .. } =
        rig("concurrency: { max: 1, rampStart: 1 }, keepalive: { after: 1s, interval: 1s }");
    let panics = world.ask(&streaming("panics"));
    sleep(Duration::from_secs(5)).await;
    assert_eq!(world.gate.held(), 1);
    let neighbour = world.ask(&streaming("waits behind it"));
    sleep(Duration::from_secs(5)).await;
    behaves.store(PANICS_ON_DIAL, SeqCst);
    // The next request is dispatched on the thread that panics, and must not be lost with it.
    world.gate.target().ready(&world.endpoint, None);
    let heard = panics.await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 200") && !heard.ends_with("0\r\n\r\n"), "{heard}");
    let _ = neighbour.await.unwrap();
    sleep(Duration::from_secs(1)).await;
    world.is_over(&[(Outcome::Internal, 2)]);
    behaves.store(WORKS, SeqCst);
    assert!(world.ask(&chat("the next one")).await.unwrap().ends_with("ok"));
}

/// A panic in the task of an upstream connection counts as a broken connection. The request was already written, so it
/// is retried once and then fails with 502.
#[tokio::test(start_paused = true)]
async fn panic_in_upstream_connection_is_a_broken_one() {
    let PanicTest { world, behaves, .. } = rig("");
    world.watch(|| true);
    behaves.store(PANICS_ON_READ, SeqCst);
    let heard = world.ask(&chat("x")).await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 50"), "{heard}");
    world.assert_conservation();
    behaves.store(WORKS, SeqCst);
    assert!(world.ask(&chat("the next one")).await.unwrap().ends_with("ok"));
    sleep(Duration::from_secs(1)).await;
    assert_eq!((world.gate.held(), world.gate.in_flight()), (0, 0));
    assert_eq!(world.gate.counters().ended_as(Outcome::Completed), 1);
}
