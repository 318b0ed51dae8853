//! Connections in memory, on a paused clock.

use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::join_all,
    stream::{self, BoxStream, FuturesUnordered},
};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, WriteHalf, duplex, split},
    task::JoinHandle,
    time::timeout,
};
use tonic::{Code, Status, body::Body};
use tower::{Layer as _, Service as _};

use super::*;
use crate::{config::budget::GRPC_CALLS, places::InUseGuard};

const END_HEADERS_FLAG: u8 = 4;

const END_STREAM_FLAG: u8 = 1;

/// Start of a connection: the preface, and an empty SETTINGS frame.
const PREFACE_AND_SETTINGS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// Connects a client. Also returns the semaphore with the place of its connection.
async fn connected() -> (DuplexStream, Arc<Semaphore>) {
    connected_as(Caller::default()).await
}

async fn connected_as(caller: Caller) -> (DuplexStream, Arc<Semaphore>) {
    let (client, stream) = duplex(16 << 10);
    let places = Arc::new(Semaphore::new(1));
    let open = places.clone().acquire_owned().await.unwrap();
    let place = Places::new(1, 1).enter(Source::default(), CancellationToken::new());
    let connection = GrpcConnection::open(stream, caller, None, place, open).await.unwrap();
    let (_, health) = tonic_health::server::health_reporter();
    let incoming = tokio_stream::once(Ok::<_, Infallible>(connection));
    let serving = server(100).add_routes(Routes::new(health)).serve_with_incoming(incoming);
    tokio::spawn(serving);
    (client, places)
}

/// Waits until the connection has released its place, and returns the time that took.
async fn time_until_released(places: &Semaphore) -> Duration {
    let start = Instant::now();
    let place = timeout(Duration::from_secs(600), places.acquire()).await;
    drop(place.expect("it keeps its place").unwrap());
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn silent_client_loses_its_place_after_10_s() {
    let (silent, places) = connected().await;
    assert_eq!(time_until_released(&places).await.as_secs(), 10);
    drop(silent);

    let (mut slow, places) = connected().await;
    slow.write_all(&PREFACE_AND_SETTINGS[..1]).await.unwrap();
    sleep(Duration::from_secs(9)).await;
    slow.write_all(&PREFACE_AND_SETTINGS[1..PREFACE.len() - 1]).await.unwrap();
    assert_eq!(
        time_until_released(&places).await.as_secs(),
        1,
        "10 s from the beginning, 9 of which are over"
    );
}

#[tokio::test(start_paused = true)]
async fn silent_client_is_pinged() {
    let (mut client, places) = connected().await;
    sleep(Duration::from_secs(9)).await;
    client.write_all(PREFACE_AND_SETTINGS).await.unwrap();
    let reading = tokio::spawn(async move { client.read_to_end(&mut Vec::new()).await });
    let freed = time_until_released(&places).await.as_secs();
    assert!((19..=21).contains(&freed), "a ping after 10 s, no answer for 10 s: {freed} s");
    reading.await.unwrap().unwrap();
}

/// Builds an HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
}

/// A client that reads everything and answers PINGs.
struct LiveClient {
    writes: Arc<tokio::sync::Mutex<WriteHalf<DuplexStream>>>,
    /// Time at which the connection ended, and the last frame before.
    reading: JoinHandle<(Instant, Vec<u8>)>,
}

impl LiveClient {
    async fn new(client: DuplexStream) -> Self {
        const PING_FRAME: u8 = 6;
        let (mut reads, writes) = split(client);
        let writes = Arc::new(tokio::sync::Mutex::new(writes));
        let answers = writes.clone();
        let reading = tokio::spawn(async move {
            let mut last = Vec::new();
            loop {
                let mut head = [0; 9];
                if reads.read_exact(&mut head).await.is_err() {
                    return (Instant::now(), last);
                }
                let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
                reads.read_exact(&mut payload).await.unwrap();
                if (head[3], head[4]) == (PING_FRAME, 0) {
                    let _ = answers.lock().await.write_all(&frame(PING_FRAME, 1, 0, &payload)).await;
                }
                last = [&head[..], &payload].concat();
            }
        });
        let live = Self { writes, reading };
        live.send(PREFACE_AND_SETTINGS).await;
        live
    }

    async fn send(&self, bytes: &[u8]) {
        self.writes.lock().await.write_all(bytes).await.unwrap();
    }

    /// Waits for the end, announced by GOAWAY without an error. Returns the seconds until then, and the last call
    /// processed.
    async fn ended_after(self) -> (u64, u8) {
        let began = Instant::now();
        let (ended, last) = timeout(Duration::from_secs(3600), self.reading).await.unwrap().unwrap();
        assert_eq!(last[..12], frame(7, 0, 0, &[0; 8])[..12], "{last:?}");
        assert_eq!(last[13..], [0; 4], "{last:?}");
        ((ended - began).as_secs(), last[12])
    }
}

/// Builds a call without a message, to a method of gRPC's health service.
fn call(method: &str, flags: u8, stream: u8) -> Vec<u8> {
    let field = |name: &str, value: &str| {
        let length = |text: &str| u8::try_from(text.len()).unwrap();
        [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
    };
    let fields = [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":path", &format!("/grpc.health.v1.Health/{method}")),
        field(":authority", "a"),
        field("content-type", "application/grpc"),
    ];
    frame(1, flags, stream, &fields.concat())
}

#[tokio::test(start_paused = true)]
async fn idle_connection_gets_goaway() {
    let (client, places) = connected().await;
    assert_eq!(LiveClient::new(client).await.ended_after().await, (300, 0));
    assert_eq!(places.available_permits(), 1);
}

#[tokio::test(start_paused = true)]
async fn connection_with_calls_is_not_idle() {
    let (client, _places) = connected().await;
    let client = LiveClient::new(client).await;
    for number in 0..20 {
        client.send(&call("Check", END_HEADERS_FLAG | END_STREAM_FLAG, 2 * number + 1)).await;
        sleep(Duration::from_secs(299)).await;
    }
    let (seconds, last) = client.ended_after().await;
    assert!(seconds <= 600, "{seconds}");
    assert_eq!(last, 39);
}

#[tokio::test(start_paused = true)]
async fn connection_with_a_stream_does_not_end() {
    let caller = Caller::default();
    let (client, _places) = connected_as(caller.clone()).await;
    let client = LiveClient::new(client).await;
    let stream = InUseGuard::new(caller.open_calls.clone());
    sleep(Duration::from_secs(36_000)).await;
    assert!(!client.reading.is_finished());
    drop(stream);
    let (seconds, _) = client.ended_after().await;
    assert!(seconds <= 600, "{seconds}");

    // A stream of the health service keeps the connection open as well.
    let (client, _places) = connected().await;
    let client = LiveClient::new(client).await;
    let watch = [call("Watch", END_HEADERS_FLAG, 1), frame(0, END_STREAM_FLAG, 1, &[0; 5])].concat();
    client.send(&watch).await;
    sleep(Duration::from_secs(36_000)).await;
    assert!(!client.reading.is_finished());
    const RST_STREAM: u8 = 3;
    client.send(&frame(RST_STREAM, 0, 1, &[0, 0, 0, 8])).await;
    let (seconds, last) = client.ended_after().await;
    assert!((seconds, last) <= (600, 1), "{seconds}, {last}");
}

/// Sends `bytes` after the start of a connection, and reads the responses. Returns `true` if the connection ends by
/// then.
async fn ends_connection(bytes: &[u8]) -> bool {
    let (client, places) = connected().await;
    let (mut reads, mut writes) = split(client);
    let reading = tokio::spawn(async move { reads.read_to_end(&mut Vec::new()).await });
    writes.write_all(PREFACE_AND_SETTINGS).await.unwrap();
    let sent =
        writes.write_all(bytes).await.is_ok() && writes.write_all(&frame(6, 0, 0, b"read all")).await.is_ok();
    // The timeout is shorter than the server's ping interval.
    let ended = timeout(Duration::from_secs(5), places.acquire()).await.is_ok();
    reading.abort();
    ended || !sent
}

#[tokio::test(start_paused = true)]
async fn control_frames_are_limited() {
    const FRAME_BURST: usize = MAX_CONTROL_FRAMES as usize;
    for (what, control) in [
        ("PING", frame(6, 0, 0, b"floodflo")),
        ("PING that answers none", frame(6, 1, 0, b"answered")),
        ("SETTINGS", frame(4, 0, 0, &[])),
        ("PRIORITY", frame(2, 0, 1, &[0, 0, 0, 0, 16])),
        ("WINDOW_UPDATE", frame(8, 0, 0, &[0, 0, 0, 1])),
        ("no known kind", frame(0xee, 0, 0, b"what")),
    ] {
        assert!(!ends_connection(&control.repeat(FRAME_BURST / 2)).await, "{what}");
        assert!(ends_connection(&control.repeat(2 * FRAME_BURST)).await, "{what}");
    }
}

/// h2 itself limits empty CONTINUATION and DATA frames. The test fails if h2 raises these limits.
#[tokio::test(start_paused = true)]
async fn empty_frames_of_a_call_are_limited() {
    assert!(!ends_connection(&call("Check", END_HEADERS_FLAG, 1)).await);
    assert!(
        ends_connection(&[call("Check", 0, 1), frame(9, 0, 1, &[]).repeat(1_000)].concat()).await,
        "CONTINUATION"
    );
    assert!(
        ends_connection(&[call("Check", END_HEADERS_FLAG, 1), frame(0, 0, 1, &[]).repeat(1_000)].concat())
            .await,
        "DATA"
    );
    let empty_heads = frame(1, END_HEADERS_FLAG, 1, &[]).repeat(2 * MAX_CONTROL_FRAMES as usize);
    assert!(
        ends_connection(&[call("Check", END_HEADERS_FLAG, 1), empty_heads].concat()).await,
        "HEADERS: by us"
    );
}

type Parts = BoxStream<'static, Result<Frame<Bytes>, Infallible>>;

/// Returns a part of a body.
fn part(bytes: &'static [u8]) -> Result<Frame<Bytes>, Infallible> {
    Ok(Frame::data(Bytes::from_static(bytes)))
}

/// Returns the response to a call of gRPC's health service with this body.
async fn response_to_call(caller: &Caller, method: &str, body: Parts) -> http::Response<Body> {
    let (_, health) = tonic_health::server::health_reporter();
    let request = http::Request::post(format!("/grpc.health.v1.Health/{method}"));
    let request = request.extension(caller.clone()).body(Body::new(StreamBody::new(body))).unwrap();
    CallLayer.layer(Routes::new(health)).call(request).await.unwrap()
}

fn code(fields: &http::HeaderMap) -> Code {
    Status::from_header_map(fields).expect("a status").code()
}

/// A message of `HealthCheckRequest` without a name.
const EMPTY_MESSAGE: &[u8] = &[0; 5];

#[tokio::test(start_paused = true)]
async fn call_without_end_fails_after_10_s() {
    let trickle = stream::unfold((), |()| async {
        sleep(Duration::from_millis(100)).await;
        Some((part(&[0]), ()))
    });
    for method in ["Check", "Watch"] {
        for (what, body) in [
            ("a head alone", stream::pending().boxed()),
            ("a part", stream::iter([part(&EMPTY_MESSAGE[..4])]).chain(stream::pending()).boxed()),
            ("no end", stream::iter([part(EMPTY_MESSAGE)]).chain(stream::pending()).boxed()),
        ] {
            let start = Instant::now();
            let answer = response_to_call(&Caller::default(), method, body).await;
            assert_eq!(start.elapsed().as_secs(), 10, "{method}: {what}");
            assert_eq!(code(answer.headers()), Code::DeadlineExceeded, "{method}: {what}");
        }
    }
    // 100 of 256 bytes in 10 s.
    let body = stream::iter([part(&[0, 0, 0, 1, 0])]).chain(trickle).boxed();
    let answer = response_to_call(&Caller::default(), "Check", body).await;
    assert_eq!(code(answer.headers()), Code::DeadlineExceeded, "a message that trickles");
}

#[tokio::test(start_paused = true)]
async fn call_above_its_size_fails_at_once() {
    let many = stream::iter((0..10_000).map(|_| part(EMPTY_MESSAGE))).boxed();
    let start = Instant::now();
    let answer = response_to_call(&Caller::default(), "Check", many).await;
    assert_eq!(code(answer.headers()), Code::OutOfRange);
    assert_eq!(start.elapsed().as_secs(), 0);
}

#[tokio::test(start_paused = true)]
async fn incomplete_calls_are_bounded_complete_are_not() {
    let caller = Caller::default();
    let whole = || stream::iter([part(EMPTY_MESSAGE)]).boxed();
    // One source may take at most half of the places.
    let waiting = (0..GRPC_CALLS / 2).map(|_| response_to_call(&caller, "Check", stream::pending().boxed()));
    let mut waiting: FuturesUnordered<_> = waiting.collect();
    assert!(timeout(Duration::from_secs(1), waiting.next()).await.is_err());
    // All are open at the same time, but none waits for its message.
    let answers = (0..2 * GRPC_CALLS).map(|_| response_to_call(&caller, "Check", whole()));
    let mut answers = join_all(answers).await;
    assert!(timeout(Duration::from_secs(1), waiting.next()).await.is_ok(), "evicted by what is not read");
    assert!(
        answers.iter().all(|answer| answer.status() == 200 && answer.headers().get("grpc-status").is_none())
    );
    // Evicted responses end with an error when they are read.
    let first = answers.remove(0).into_body().collect().await.unwrap();
    assert_eq!(code(first.trailers().unwrap()), Code::ResourceExhausted);
    let last = answers.pop().unwrap().into_body().collect().await.unwrap();
    assert_eq!(code(last.trailers().unwrap()), Code::Ok);
}
