//! Requests that make a healthy server drop the connection, next to the requests of others.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use anteroom::{error::Outcome, upstream::UpstreamIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    time::{Instant, sleep},
};

use crate::{
    memory::{InMemoryProxy, connection},
    support::wire::chat,
};

const SECONDS: u64 = 60;
const CLIENTS: u64 = 32;

/// Takes one second per response, and closes the connection at once if the body contains `poison`.
async fn serve(mut io: DuplexStream) {
    let mut request = Vec::new();
    loop {
        while !request.ends_with(b"}") {
            let mut part = [0; 512];
            match io.read(&mut part).await {
                Ok(0) | Err(_) => return,
                Ok(read) => request.extend_from_slice(&part[..read]),
            }
        }
        if String::from_utf8_lossy(&request).contains("poison") {
            return;
        }
        request.clear();
        sleep(Duration::from_secs(1)).await;
        if io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
            return;
        }
    }
}

/// One poisoned body per second next to 32 sequential clients with one second per request: 32 × 60 responses in a
/// minute. Each poisoned body is sent twice, 50 ms apart, and occupies a slot in between: 60 × 50 ms out of 32 × 60 s,
/// less than one percent.
#[tokio::test(start_paused = true)]
async fn poisoned_bodies_cost_the_others_nothing() {
    let dialled = Arc::new(AtomicUsize::new(0));
    let counted = dialled.clone();
    let world = Arc::new(InMemoryProxy::new("concurrency: { max: 64 }", move || {
        counted.fetch_add(1, SeqCst);
        let (ours, theirs) = connection();
        tokio::spawn(serve(theirs));
        Ok(Box::new(ours) as Box<dyn UpstreamIo>)
    }));
    world.watch(|| true);
    let began = Instant::now();
    let end = began + Duration::from_secs(SECONDS) + Duration::from_millis(500);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let world = world.clone();
            tokio::spawn(async move {
                let mut answers = 0;
                while Instant::now() < end {
                    assert!(world.ask(&chat("x")).await.unwrap().starts_with("HTTP/1.1 200"));
                    answers += 1;
                }
                answers
            })
        })
        .collect();
    let mut poisoned = Vec::new();
    for _ in 0..SECONDS {
        // Sends the poisoned body between two rounds of responses.
        sleep(Duration::from_millis(500)).await;
        poisoned.push(world.ask(&chat("poison")));
        sleep(Duration::from_millis(500)).await;
        assert!(world.endpoint.limit() >= CLIENTS as u32, "at least what it has shown to bear");
    }
    let mut answers = 0;
    for client in clients {
        answers += client.await.unwrap();
    }
    assert!(answers * 100 >= CLIENTS * SECONDS * 99, "{answers}");
    for poison in poisoned {
        let heard = poison.await.unwrap();
        assert!(heard.starts_with("HTTP/1.1 502"), "{heard}");
    }
    assert!(began.elapsed() < Duration::from_secs(SECONDS + 5), "{:?}", began.elapsed());
    sleep(Duration::from_secs(1)).await;
    world.is_over(&[(Outcome::Completed, answers), (Outcome::UpstreamError, SECONDS)]);
    let most = CLIENTS as usize + 3 * SECONDS as usize;
    assert!(
        dialled.load(SeqCst) <= most,
        "{}: a pooled one was stale at most once each",
        dialled.load(SeqCst)
    );
}
