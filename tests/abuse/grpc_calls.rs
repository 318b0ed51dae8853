//! Incomplete, unread and malformed calls to KEDA's scaler and the replicas' port: KEDA, other replicas and probes are
//! served meanwhile.

use std::net::SocketAddr;

use anteroom::{
    config::budget::{GRPC_CALLS, GRPC_MESSAGE_BYTES, GRPC_REFLECTIONS, SCALER_STREAMS},
    scaler::keda::proto::{IsActiveResponse, ScaledObjectRef, external_scaler_client::ExternalScalerClient},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Streaming, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, RawH2, block,
        field, frame, settings,
    },
    served::connect_from,
    support::{
        TestProxy, TestUpstream, Wire, route, routes, soon, until,
        upstream::Port,
        wire::{chat, get},
    },
};

pub const IS_ACTIVE: &str = "/externalscaler.ExternalScaler/IsActive";
pub const STREAM_IS_ACTIVE: &str = "/externalscaler.ExternalScaler/StreamIsActive";
pub const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";
pub const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
pub const PEERS_WATCH: &str = "/anteroom.peers.v1.Peers/Watch";

/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113, section 6.5.2).
pub const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 4;

/// Returns a distinct source address for each attacker.
pub fn attacker(number: usize) -> SocketAddr {
    let [_, _, high, low] = u32::try_from(number + 256).unwrap().to_be_bytes();
    SocketAddr::from(([127, 2, high, low], 0))
}

/// Encodes the fields that begin a call.
pub fn head(path: &str) -> Vec<u8> {
    block(&[
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "a"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ])
}

/// Encodes the start of a call with a message announced as `size` bytes.
pub fn begun(stream: u32, path: &str, size: usize, message: &[u8]) -> Vec<u8> {
    let prefix = [&[0][..], &u32::try_from(size).unwrap().to_be_bytes(), message].concat();
    [frame(HEADERS, END_HEADERS, stream, &head(path)), frame(DATA, 0, stream, &prefix)].concat()
}

/// Encodes a whole call.
pub fn call(stream: u32, path: &str, message: &[u8]) -> Vec<u8> {
    [begun(stream, path, message.len(), message), frame(DATA, END_STREAM, stream, &[])].concat()
}

/// Encodes a `ScaledObjectRef` of `name` and `namespace`, with a route (protobuf by hand).
pub fn object(name: &str, route: &str) -> Vec<u8> {
    let text = |tag: u8, text: &[u8]| {
        assert!(text.len() < 256);
        let mut length = vec![tag];
        match u8::try_from(text.len()).unwrap() {
            short @ ..128 => length.push(short),
            long => length.extend([long, 1]),
        }
        [&length[..], text].concat()
    };
    let entry = [text(0x0a, b"route"), text(0x12, route.as_bytes())].concat();
    assert!(entry.len() < 256);
    [text(0x0a, name.as_bytes()), text(0x12, b"ml"), text(0x1a, &entry)].concat()
}

pub async fn connect_hostile(number: usize, to: SocketAddr, bytes: &[u8]) -> RawH2 {
    let mut stream = connect_from(attacker(number), to).await;
    // The proxy may close the connection during the write.
    let _ = soon("the other side to read", stream.write_all(bytes)).await;
    RawH2 { wire: Wire { stream, buf: Vec::new() } }
}

/// Waits until the connection is closed, and discards everything received before.
async fn closed(client: &mut RawH2) {
    let mut rest = Vec::new();
    // A reset counts as an end.
    let _ = soon("the end of the connection", client.wire.stream.read_to_end(&mut rest)).await;
}

/// KEDA: a connection with a stream, and calls over this and new connections.
struct KedaClient {
    client: ExternalScalerClient<Channel>,
    stream: Streaming<IsActiveResponse>,
    scaler: SocketAddr,
}

fn tiny() -> ScaledObjectRef {
    ScaledObjectRef {
        name: "vllm".into(),
        namespace: "ml".into(),
        scaler_metadata: [("route".into(), "tiny".into())].into(),
    }
}

pub async fn channel(to: SocketAddr) -> Channel {
    soon("a connection", Channel::from_shared(format!("http://{to}")).unwrap().connect()).await.unwrap()
}

// === impl KedaClient ===

impl KedaClient {
    async fn connect(scaler: SocketAddr) -> Self {
        let mut client = ExternalScalerClient::new(channel(scaler).await);
        let mut stream = soon("a stream", client.stream_is_active(tiny())).await.unwrap().into_inner();
        assert!(!soon("the state", stream.message()).await.unwrap().unwrap().result);
        Self { client, stream, scaler }
    }

    /// Asserts that every call is served, on the existing connection and on a new one.
    async fn is_served(&mut self) {
        let mut again = ExternalScalerClient::new(channel(self.scaler).await);
        for client in [&mut self.client, &mut again] {
            assert!(!soon("a poll", client.is_active(tiny())).await.unwrap().into_inner().result);
        }
        let mut stream = soon("a stream", again.stream_is_active(tiny())).await.unwrap().into_inner();
        assert!(!soon("the state", stream.message()).await.unwrap().unwrap().result);
        let mut health = HealthClient::new(channel(self.scaler).await);
        soon("health", health.check(HealthCheckRequest::default())).await.unwrap();
    }

    /// Asserts that demand is pushed over the first stream.
    async fn expect_push(mut self, proxy: &TestProxy, upstream: &mut TestUpstream) {
        let mut client = proxy.sent(chat("x")).await;
        assert!(soon("a push", self.stream.message()).await.unwrap().unwrap().result);
        upstream.wake();
        upstream.call().await.echo().await;
        assert_eq!(client.response().await.status(), 200);
    }
}

async fn keda_scene() -> (TestProxy, TestUpstream, KedaClient, SocketAddr) {
    let upstream = TestUpstream::cold().await;
    let config = format!("scaler: 127.0.0.1:0\n{}", routes(&[route("tiny", &upstream.url(), "")]));
    let proxy = TestProxy::start(&config).await;
    let scaler = proxy.scaler.unwrap();
    (proxy, upstream, KedaClient::connect(scaler).await, scaler)
}

async fn ends(proxy: TestProxy, mut upstream: TestUpstream, keda: KedaClient) {
    let probe = Wire::connect(proxy.admin).await.ask(get("/livez").replace("api.test", "localhost")).await;
    assert_eq!(probe.status(), 200);
    keda.expect_push(&proxy, &mut upstream).await;
    proxy.stop(&[("completed", 1)]).await;
}

/// Heads with an incomplete message, without a message, and without the end of the stream.
fn half_sent(count: usize) -> Vec<u8> {
    let calls = (0..count).flat_map(|number| {
        let stream = u32::try_from(2 * number + 1).unwrap();
        match number % 3 {
            0 => begun(stream, IS_ACTIVE, 100, &[0x0a]),
            1 => frame(HEADERS, END_HEADERS, stream, &head(STREAM_IS_ACTIVE)),
            _ => begun(stream, IS_ACTIVE, object("a", "tiny").len(), &object("a", "tiny")),
        }
    });
    [PREFACE.to_vec(), settings(&[])].into_iter().flatten().chain(calls).collect()
}

#[tokio::test]
async fn half_sent_calls_keep_no_scaler_out() {
    let (proxy, upstream, mut keda, scaler) = keda_scene().await;
    let mut open = Vec::new();
    for number in 0..8 {
        open.push(connect_hostile(number, scaler, &half_sent(GRPC_CALLS)).await);
        open.last_mut().unwrap().settled().await;
        keda.is_served().await;
    }
    // Sends as many incomplete calls from KEDA's own address.
    let mut stream = TcpStream::connect(scaler).await.unwrap();
    stream.write_all(&half_sent(GRPC_CALLS)).await.unwrap();
    let mut own = RawH2 { wire: Wire { stream, buf: Vec::new() } };
    own.settled().await;
    keda.is_served().await;
    // The oldest calls were rejected.
    let answered = soon("an answer", async {
        loop {
            let frame = open[0].frame().await.expect("an answer before the end");
            if frame.kind == HEADERS {
                break frame;
            }
        }
    })
    .await;
    assert_eq!(answered.flags & END_STREAM, END_STREAM, "with the head alone");
    ends(proxy, upstream, keda).await;
}

/// Streams and responses that are never read, as their windows are 0.
#[tokio::test]
async fn unread_calls_keep_no_scaler_out() {
    let (proxy, upstream, mut keda, scaler) = keda_scene().await;
    let mut open = Vec::new();
    for (number, path) in [IS_ACTIVE, HEALTH_WATCH, IS_ACTIVE, HEALTH_WATCH].into_iter().enumerate() {
        let message = if path == IS_ACTIVE { object("a", "tiny") } else { Vec::new() };
        let calls = (0..2 * u32::try_from(GRPC_CALLS).unwrap())
            .flat_map(|call_number| call(2 * call_number + 1, path, &message));
        let begin = [PREFACE.to_vec(), settings(&[(SETTINGS_INITIAL_WINDOW_SIZE, 0)])].into_iter().flatten();
        let bytes: Vec<u8> = begin.chain(calls).collect();
        let mut client = connect_hostile(number, scaler, &bytes).await;
        closed(&mut client).await;
        keda.is_served().await;
        open.push(client);
    }
    ends(proxy, upstream, keda).await;
}

/// Fills all available stream slots with unread push streams, whose clients do not read the error that evicts them.
#[tokio::test]
async fn unread_streams_end_with_their_connection() {
    let (proxy, upstream, mut keda, scaler) = keda_scene().await;
    let calls = (0..u32::try_from(SCALER_STREAMS).unwrap())
        .flat_map(|number| call(2 * number + 1, STREAM_IS_ACTIVE, &object("a", "tiny")));
    let begin = [PREFACE.to_vec(), settings(&[(SETTINGS_INITIAL_WINDOW_SIZE, 0)])].into_iter().flatten();
    let bytes: Vec<u8> = begin.chain(calls).collect();
    let (mut reads, mut writes) = connect_from(attacker(0), scaler).await.into_split();
    let ending = tokio::spawn(async move { tokio::io::copy(&mut reads, &mut tokio::io::sink()).await });
    soon("all to be taken", writes.write_all(&bytes)).await.unwrap();
    let streams = async || proxy.metric("anteroom_scaler_streams", &["route=\"tiny\""]).await;
    // KEDA's stream has one of the slots.
    until("all streams", async || streams().await + 1 >= SCALER_STREAMS as u64).await;
    keda.is_served().await;
    // Each new stream evicts one; those evicted first have had a second to end.
    until("the end of what is not read", async || {
        keda.is_served().await;
        streams().await <= 2
    })
    .await;
    // A reset counts as an end.
    let _ = soon("the end of the connection", ending).await;
    ends(proxy, upstream, keda).await;
}

#[tokio::test]
async fn reflection_streams_keep_no_scaler_out() {
    let (proxy, upstream, mut keda, scaler) = keda_scene().await;
    let begin = [PREFACE, &settings(&[])].concat();
    let mut open = Vec::new();
    for number in 0..4 {
        let calls = (0..10 * GRPC_REFLECTIONS).flat_map(|call| {
            frame(HEADERS, END_HEADERS, u32::try_from(2 * call + 1).unwrap(), &head(REFLECTION))
        });
        let bytes: Vec<u8> = begin.iter().copied().chain(calls).collect();
        let mut client = connect_hostile(number, scaler, &bytes).await;
        // Evicted streams end, with trailers and RST_STREAM.
        client.frame_of(&[RST_STREAM, GOAWAY]).await;
        keda.is_served().await;
        open.push(client);
    }
    ends(proxy, upstream, keda).await;
}

/// Malformed calls get an error or lose their connection, and take no place.
#[tokio::test]
async fn invalid_calls_are_rejected_beside_keda() {
    let (proxy, upstream, mut keda, scaler) = keda_scene().await;
    let long = head(&format!("/{}", "a".repeat(4000)));
    let compressed = [1, 0, 0, 0, 1, 0];
    let cases: [(&str, Vec<u8>); 6] = [
        ("no such method", call(1, "/externalscaler.ExternalScaler/Nothing", &[])),
        ("no such service", call(1, "/nothing.Nothing/Nothing", &[])),
        ("a path that no method has", frame(HEADERS, END_HEADERS | END_STREAM, 1, &long)),
        ("a large message", begun(1, IS_ACTIVE, GRPC_MESSAGE_BYTES + 1, &[0; 1000])),
        (
            "compressed",
            [frame(HEADERS, END_HEADERS, 1, &head(IS_ACTIVE)), frame(DATA, 0, 1, &compressed)].concat(),
        ),
        ("large metadata", {
            let large: Vec<u8> =
                (0..100).flat_map(|number| field(format!("x{number}"), "x".repeat(100))).collect();
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[head(IS_ACTIVE), large].concat())
        }),
    ];
    for (number, (name, bytes)) in cases.into_iter().enumerate() {
        let begin = [PREFACE, &settings(&[]), &bytes[..]].concat();
        let mut client = connect_hostile(number, scaler, &begin).await;
        let answer = client.frame_of(&[HEADERS, RST_STREAM, GOAWAY]).await;
        assert!(answer.is_some(), "{name}: an answer, but the connection ended without a word");
        keda.is_served().await;
    }
    // A head that never ends.
    let endless = frame(CONTINUATION, 0, 1, &field("x", "x".repeat(10_000)));
    let begin =
        [PREFACE, &settings(&[]), &frame(HEADERS, 0, 1, &head(IS_ACTIVE)), &endless.repeat(20)].concat();
    let mut client = connect_hostile(100, scaler, &begin).await;
    closed(&mut client).await;
    keda.is_served().await;
    ends(proxy, upstream, keda).await;
}

/// Calls to the replicas' port while another replica follows this one.
#[tokio::test]
async fn half_sent_calls_keep_no_replica_out() {
    let upstream = TestUpstream::cold().await;
    let port = Port::reserve();
    let place = port.url().replace("http://", "");
    let config = |listen: &str, service: String| {
        format!(
            "peers: {{ listen: \"{listen}\", service: \"{service}\" }}\n{}",
            routes(&[route("tiny", &upstream.url(), "")])
        )
    };
    let first = TestProxy::start(&config("127.0.0.1:0", place.clone())).await;
    let peers = first.peers.unwrap();
    let calls = |path: &str, is_whole: bool| -> Vec<u8> {
        let calls = (0..GRPC_CALLS).flat_map(|number| {
            let stream = u32::try_from(2 * number + 1).unwrap();
            if is_whole { call(stream, path, &[]) } else { begun(stream, path, 100, &[]) }
        });
        let begin = [PREFACE.to_vec(), settings(&[(SETTINGS_INITIAL_WINDOW_SIZE, 0)])].into_iter().flatten();
        begin.chain(calls).collect()
    };
    let mut open = Vec::new();
    for number in 0..8 {
        open.push(connect_hostile(2 * number, peers, &calls(PEERS_WATCH, false)).await);
        open.push(connect_hostile(2 * number + 1, peers, &calls(PEERS_WATCH, true)).await);
    }
    let second = TestProxy::start(&config(&place, peers.to_string())).await;
    for proxy in [&first, &second] {
        until("each other", async || proxy.metric("anteroom_peers", &["connected"]).await == 1).await;
    }
    drop(open);
    second.stop(&[]).await;
    first.stop(&[]).await;
}
