//! Memory of a process whose other listeners (admin, KEDA's scaler, the replicas' port) are full.

use std::{io::Write as _, net::SocketAddr};

use anteroom::{
    config::budget::{
        ADMIN_ANSWERS, ADMIN_CONNECTIONS, ADMIN_REQUEST_BYTES, BASE_BYTES, BASE_ROUTES, GRPC_CALLS,
        GRPC_CONNECTIONS, GRPC_MESSAGE_BYTES, PEER_STREAMS, SCALER_STREAMS,
    },
    scaler::keda::proto::{ScaledObjectRef, external_scaler_client::ExternalScalerClient},
};
use tokio::io::AsyncWriteExt as _;

use crate::{
    frames::{HEADERS, PREFACE, RawH2, field, frame, post, settings},
    grpc_calls::{
        IS_ACTIVE, PEERS_WATCH, SETTINGS_INITIAL_WINDOW_SIZE, STREAM_IS_ACTIVE, attacker, begun, call,
        channel, connect_hostile, head, object,
    },
    served::{ServeProcess, connect_from},
    support::{
        TestProxy, TestUpstream, Wire, route, routes, soon, until,
        upstream::Port,
        wire::{CHAT, get},
    },
};

/// Connections per source, below the per-source limit of every listener.
const PER_SOURCE: usize = 32;

/// Returns a route name as long as a long namespace and name.
fn name(number: usize) -> String {
    format!("route-{number:0>58}")
}

/// Sends whole calls, then some whose messages lack a byte.
async fn calls(
    number: usize,
    to: SocketAddr,
    window: u32,
    whole: impl Iterator<Item = (&'static str, Vec<u8>)>,
    half_sent: (&str, usize),
) -> RawH2 {
    let mut streams = (1..).step_by(2);
    let mut bytes = [PREFACE, &settings(&[(SETTINGS_INITIAL_WINDOW_SIZE, window)])].concat();
    for (path, message) in whole {
        bytes.extend(call(streams.next().unwrap(), path, &message));
    }
    let (path, count) = half_sent;
    let message = vec![0; GRPC_MESSAGE_BYTES - 1];
    for _ in 0..count {
        bytes.extend(begun(streams.next().unwrap(), path, GRPC_MESSAGE_BYTES, &message));
    }
    let mut client = connect_hostile(number, to, &bytes).await;
    client.settled().await;
    // The head of one more call, incomplete, of the shortest possible fields.
    let names = (b'a'..=b'p').flat_map(|one| (b'a'..=b'o').map(move |other| [one, other]));
    let fields: Vec<u8> = names.flat_map(|name| field(name, "")).collect();
    client.send(frame(HEADERS, 0, streams.next().unwrap(), &[head(path), fields].concat())).await;
    client
}

#[tokio::test]
async fn full_listeners_take_less_than_base_bytes() {
    anteroom::app::raise_file_limit();
    let ports = [(); 2].map(|()| Port::reserve());
    let [scaler, peers] = ports.each_ref().map(|port| port.url().replace("http://", ""));
    let served_routes: Vec<_> = (0..BASE_ROUTES)
        .map(|number| route(&name(number), "http://127.0.0.1:1", "readiness: { interval: 10m }"))
        .collect();
    let config = format!(
        "scaler: \"{scaler}\"\npeers: {{ listen: \"{peers}\", service: \"{peers}\" }}\n{}",
        routes(&served_routes)
    );
    let [scaler, peers]: [SocketAddr; 2] = [scaler, peers].map(|address| address.parse().unwrap());
    let mut served = ServeProcess::start_with("", &config).await;
    served.listens().await;
    let say = |what: &str, served: &ServeProcess| {
        let (now, peak) = (served.memory("VmRSS:"), served.memory("VmHWM:"));
        let _ = writeln!(std::io::stderr(), "{what}: {} KiB, at most {} KiB", now >> 10, peak >> 10);
    };
    say("at rest", &served);

    // Sends a request to every route, so that each has activity to report.
    let mut clients = Vec::new();
    for connection in 0..10 {
        let mut client = RawH2::connect(served.address).await;
        for number in (connection..BASE_ROUTES).step_by(10) {
            let stream = u32::try_from(2 * (number / 10) + 1).unwrap();
            client.send(post(stream, CHAT, &format!(r#"{{"model":"{}"}}"#, name(number)))).await;
        }
        client.settled().await;
        clients.push(client);
    }
    say("with a request held for each route", &served);

    let per_connection = |count: usize| count.div_ceil(GRPC_CONNECTIONS);
    for number in 0..GRPC_CONNECTIONS {
        let streams = (0..per_connection(SCALER_STREAMS)).map(|stream| {
            let route = name((number + stream) % BASE_ROUTES);
            (STREAM_IS_ACTIVE, object(&format!("{number:0>120}{stream:0>133}"), &route))
        });
        let half_sent = (IS_ACTIVE, per_connection(GRPC_CALLS));
        clients.push(calls(number, scaler, 0, streams, half_sent).await);
    }
    say("with the scaler full", &served);
    for number in 0..GRPC_CONNECTIONS {
        let watches = (0..per_connection(PEER_STREAMS)).map(|_| (PEERS_WATCH, Vec::new()));
        let half_sent = (PEERS_WATCH, per_connection(GRPC_CALLS));
        clients.push(calls(number, peers, 1 << 20, watches, half_sent).await);
    }
    say("with the replicas' port full", &served);

    let mut admin = Vec::new();
    for number in 0..ADMIN_CONNECTIONS {
        let mut stream = connect_from(attacker(number / PER_SOURCE), served.admin).await;
        let path = match number {
            _ if number < ADMIN_ANSWERS => "/metrics",
            _ if number < 2 * ADMIN_ANSWERS => "/api/v1/routes",
            _ if number < 6 * ADMIN_ANSWERS => "/api/v1/events",
            _ => "/livez",
        };
        let mut request = get(path).replace("api.test", "localhost").into_bytes();
        if path == "/livez" {
            request.truncate(request.len() - 2);
            request.extend(b"X: ");
            request.resize(ADMIN_REQUEST_BYTES - 1, b'x');
        }
        let _ = soon("the request to be taken", stream.write_all(&request)).await;
        admin.push(stream);
    }
    let probe = || async {
        Wire::connect(served.admin).await.ask(get("/livez").replace("api.test", "localhost")).await
    };
    for _ in 0..3 {
        assert_eq!(probe().await.status(), 200);
    }
    say("with the admin port full", &served);

    let tiny = ScaledObjectRef {
        name: "vllm".into(),
        namespace: "ml".into(),
        scaler_metadata: [("route".into(), name(0))].into(),
    };
    let mut keda = ExternalScalerClient::new(channel(scaler).await);
    assert!(soon("a poll", keda.is_active(tiny.clone())).await.unwrap().into_inner().result);
    let mut stream = soon("a stream", keda.stream_is_active(tiny)).await.unwrap().into_inner();
    assert!(soon("the state", stream.message()).await.unwrap().unwrap().result);
    say("at the end", &served);
    let peak = served.memory("VmHWM:");
    assert!(peak < BASE_BYTES, "{peak} of {BASE_BYTES} bytes");
    assert!(served.child.try_wait().unwrap().is_none(), "it lives");
}

/// Opens more large unread responses than there are places; a scrape is served meanwhile, and a probe at once.
#[tokio::test]
async fn unread_answers_keep_no_scraper_out() {
    let upstream = TestUpstream::cold().await;
    // Enough routes for responses that exceed the socket buffers.
    let many: Vec<_> = (0..500)
        .map(|number| route(&name(number), &upstream.url(), "readiness: { interval: 10m }"))
        .collect();
    let proxy = TestProxy::start(&routes(&many)).await;
    let request = |path: &str| get(path).replace("api.test", "localhost");
    let mut open = Vec::new();
    for number in 0..4 * ADMIN_ANSWERS {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 << 10).unwrap();
        socket.bind(attacker(number)).unwrap();
        let mut stream = soon("a connection", socket.connect(proxy.admin)).await.unwrap();
        stream.write_all(request("/metrics").repeat(8).as_bytes()).await.unwrap();
        open.push(stream);
    }
    let probe = Wire::connect(proxy.admin).await.ask(request("/livez")).await;
    assert_eq!(probe.status(), 200);
    for _ in 0..3 {
        let scrape = Wire::connect(proxy.admin).await.ask(request("/metrics")).await;
        assert_eq!(scrape.status(), 200);
    }
    until("one that was given up", async || {
        let is_closed = |error: std::io::Error| error.kind() != std::io::ErrorKind::WouldBlock;
        open.iter().any(|stream| stream.try_write(b"x").is_err_and(is_closed))
    })
    .await;
    drop(open);
    proxy.stop(&[]).await;
}
