//! Connections in memory, on a paused clock.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::timeout,
};

use super::*;

/// What a client begins with: the preface of RFC 9113, section 3.4, and settings that change nothing.
const BEGINNING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// A client that has connected, and the places that there are for others.
async fn connected() -> (DuplexStream, Arc<Semaphore>) {
    let (client, stream) = duplex(16 << 10);
    let places = Arc::new(Semaphore::new(1));
    let open = places.clone().acquire_owned().await.unwrap();
    let place = Places::new(1, 1).enter(Source::default(), CancellationToken::new());
    let connection = Connection::open(stream, Caller::default(), None, place, open).await.unwrap();
    let (_, health) = tonic_health::server::health_reporter();
    let incoming = tokio_stream::once(Ok::<_, Infallible>(connection));
    tokio::spawn(server().add_service(health).serve_with_incoming(incoming));
    (client, places)
}

/// When there is a place again.
async fn freed(places: &Semaphore) -> Duration {
    let start = Instant::now();
    let place = timeout(Duration::from_secs(600), places.acquire()).await;
    drop(place.expect("it keeps its place").unwrap());
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_or_not_enough_loses_its_place_after_10_s() {
    let (silent, places) = connected().await;
    assert_eq!(freed(&places).await.as_secs(), 10);
    drop(silent);

    let (mut slow, places) = connected().await;
    slow.write_all(&BEGINNING[..1]).await.unwrap();
    sleep(Duration::from_secs(9)).await;
    slow.write_all(&BEGINNING[1..PREFACE - 1]).await.unwrap();
    assert_eq!(freed(&places).await.as_secs(), 1, "10 s from the beginning, 9 of which are over");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_begun_is_asked_whether_it_is_there() {
    let (mut client, places) = connected().await;
    sleep(Duration::from_secs(9)).await;
    client.write_all(BEGINNING).await.unwrap();
    let reading = tokio::spawn(async move { client.read_to_end(&mut Vec::new()).await });
    let freed = freed(&places).await.as_secs();
    assert!((19..=21).contains(&freed), "a ping after 10 s, no answer for 10 s: {freed} s");
    reading.await.unwrap().unwrap();
}
