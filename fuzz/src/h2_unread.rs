//! Any HTTP/2 frames of a client that reads little or nothing of its responses: the connection ends in time and
//! leaves no resources behind.

use std::{io, sync::Arc, time::Duration};

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    config::Config,
    proxy::{Proxy, RouteTable, Shared, serve_connection},
    state::Endpoint,
    upstream::{Dial, Dialer, Dialing, UpstreamIo},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    runtime::Builder,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Configuration with short timeouts, far below [`MAX_CONNECTION_TIME`] in total.
const CONFIG: &str = "\
listen: 127.0.0.1:0
admin: 127.0.0.1:0
limits: { headerTimeout: 5s, bodyTimeout: 5s, stallTimeout: 5s, idleTimeout: 20s }
routes: [{ name: tiny, match: { models: [tiny] }, target: { url: \"http://127.0.0.1:1\" }, hold: { timeout: 10s } }]
";

/// Time by which the connection must have ended; far more than the sum of all timeouts.
const MAX_CONNECTION_TIME: Duration = Duration::from_secs(300);

/// Bytes that the client's side buffers unread.
const UNREAD_BYTES: usize = 4 << 10;

/// Bytes of a response body.
const ANSWER_BYTES: usize = 100_000;

const CLIENT_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A server that responds to every read.
struct ReadResponder;

impl Dial for ReadResponder {
    fn dial(&self, _: &str) -> Dialing {
        let (ours, mut theirs) = duplex(UNREAD_BYTES);
        tokio::spawn(async move {
            let body = " ".repeat(ANSWER_BYTES);
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {ANSWER_BYTES}\r\n\r\n{body}");
            let mut part = [0; 1024];
            while let Ok(1..) = theirs.read(&mut part).await {
                if theirs.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        Box::pin(async { io::Result::Ok(Box::new(ours) as Box<dyn UpstreamIo>) })
    }
}

/// Checks an input whose lowest bit of the first byte makes the server ready; the other bits are the KiB the client
/// reads before it stops. The rest is frames: kind, flags, stream and payload length in one byte each, then the
/// payload. For kind 255 only the payload is sent, which need not be a frame.
pub fn holds(input: &[u8]) {
    let Some((first, frames)) = input.split_first() else { return };
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let mut config = Config::parse(CONFIG, "fuzz.yaml").expect("a valid configuration");
        let route = config.routes.remove(0);
        let endpoint = Endpoint::new("memory:1", 4);
        let gate = Gate::new(route.name.clone(), route.policy(), ColdStarts::new(|_| {}));
        let shared = Shared::new(config.limits);
        shared.table.store(Arc::new(RouteTable::new([(route, gate.clone())])));
        let proxy = Proxy::new(shared.clone(), Dialer::Other(Arc::new(ReadResponder)));
        gate.target().add(&endpoint);
        if first & 1 != 0 {
            gate.target().ready(&endpoint, None);
        }

        let (client, server) = duplex(UNREAD_BYTES);
        let sending = tokio::spawn(send(client, usize::from(first >> 1) << 10, sent(frames)));
        let served =
            timeout(MAX_CONNECTION_TIME, serve_connection(server, None, proxy, CancellationToken::new()))
                .await;
        assert!(served.is_ok(), "the connection does not end");
        sending.abort();
        // The tasks of the connection's streams end after it.
        sleep(Duration::from_secs(1)).await;
        assert_eq!((gate.held(), gate.in_flight(), gate.held_bytes()), (0, 0, 0), "a request is left");
        assert_eq!((endpoint.in_flight(), shared.memory.bodies()), (0, 0), "a place or a byte is left");
        assert_eq!(gate.counters().admitted(), gate.counters().ended_in_all(), "a request has no outcome");
    });
}

/// Returns the bytes sent over the connection.
fn sent(mut frames: &[u8]) -> Vec<u8> {
    let mut bytes = [CLIENT_PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
    while let [kind, flags, stream, length, rest @ ..] = frames {
        let (payload, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        if *kind != 255 {
            bytes.extend([0, 0, payload.len() as u8, *kind, *flags, 0, 0, 0, *stream]);
        }
        bytes.extend_from_slice(payload);
        frames = rest;
    }
    bytes
}

/// Sends `bytes` while reading `reads` bytes; afterwards the client stays connected and idle.
async fn send(client: DuplexStream, reads: usize, bytes: Vec<u8>) {
    let (reading, mut writing) = tokio::io::split(client);
    let read = async move {
        let mut reading = reading.take(reads as u64);
        let _ = tokio::io::copy(&mut reading, &mut tokio::io::sink()).await;
        reading
    };
    let _open = tokio::join!(read, async move {
        let _ = writing.write_all(&bytes).await;
        writing
    });
    std::future::pending::<()>().await;
}
