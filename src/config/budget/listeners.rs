//! The memory whose bounds are constants: of the process itself, and of the listeners that do not serve requests, which are
//! admin, KEDA's scaler and the replicas' port. `full_listeners_take_less_than_base_bytes` measures the sum.

use super::{CONNECTION_COST_BYTES, H2_HEAD_FACTOR};
use crate::places::max_leaving_streams;

/// Connections that the admin port takes, those that were evicted and are about to end, and the bytes that a request there may
/// take.
pub const ADMIN_CONNECTIONS: usize = 512;
/// See [`ADMIN_CONNECTIONS`].
pub const ADMIN_LEAVING_CONNECTIONS: usize = 64;
/// See [`ADMIN_CONNECTIONS`].
pub const ADMIN_REQUEST_BYTES: usize = 32 << 10;

/// Answers of the admin port under way that grow with the routes or the requests kept.
pub const ADMIN_ANSWERS: usize = 8;

/// Dashboards that follow the state, each of which may have an event under way.
pub const ADMIN_WATCHERS: usize = 16;

/// Connections that the scaler takes, and as many the replicas' port; and those that were evicted and are about to end.
pub const GRPC_CONNECTIONS: usize = 128;
/// See [`GRPC_CONNECTIONS`].
pub const GRPC_LEAVING_CONNECTIONS: usize = 32;

/// Most bytes of the head of a call, as HTTP/2 counts them.
pub const GRPC_HEAD_BYTES: u32 = 8 << 10;

/// Most bytes of the message of a call: names, and the metadata of a trigger.
pub const GRPC_MESSAGE_BYTES: usize = 8 << 10;

/// Calls of a listener whose message is not whole or whose answer is not read, and streams of health.
pub const GRPC_CALLS: usize = 256;

/// Streams of reflection of a listener.
pub const GRPC_REFLECTIONS: usize = 16;

/// Streams of the scaler: two for each ScaledObject.
pub const SCALER_STREAMS: usize = 8192;

/// Other replicas that are followed.
pub const PEER_REPLICAS: usize = 64;

/// Streams of other replicas: one for each, and some more, since a replica that reconnects may come before its former
/// connection is known to be dead.
pub const PEER_STREAMS: usize = PEER_REPLICAS + 16;

/// Bytes of what other replicas say that are kept: of all of them, and of each one even where the others have used those up.
pub const PEER_BOARD_BYTES: usize = 12 << 20;
/// See [`PEER_BOARD_BYTES`].
pub const PEER_SHARE_BYTES: usize = 128 << 10;

/// Routes that [`BASE_BYTES`] has room for.
pub const BASE_ROUTES: usize = 1000;

/// A connection of gRPC, with TLS, one head that is not whole, and no calls.
pub const GRPC_CONNECTION_BYTES: usize =
    CONNECTION_COST_BYTES + H2_HEAD_FACTOR * GRPC_HEAD_BYTES as usize + GRPC_TLS_BYTES;

/// The state of TLS, and a record of 16 KiB.
const GRPC_TLS_BYTES: usize = 24 << 10;

/// One of [`GRPC_CALLS`]: its stream and task, its message in a buffer that has grown to it, and a token.
pub const GRPC_CALL_BYTES: usize = (6 << 10) + 2 * GRPC_MESSAGE_BYTES + GRPC_HEAD_BYTES as usize;

/// One of [`GRPC_REFLECTIONS`]: the same, its window of 16 KiB, and three answers of at most 16 KiB.
pub const GRPC_REFLECTION_BYTES: usize = GRPC_CALL_BYTES + (64 << 10);

/// One stream of the scaler: what HTTP/2 keeps of it, its task, and names of 253 bytes.
const SCALER_STREAM_BYTES: usize = 4 << 10;

/// One stream of a replica: a report of 500 routes that is not read, and the counts told of [`BASE_ROUTES`] routes.
const PEER_STREAM_BYTES: usize = (96 << 10) + 2 * 112 * BASE_ROUTES;

/// A connection to the admin port besides its request.
const ADMIN_CONNECTION_BYTES: usize = 8 << 10;

/// An answer of the admin port that tells of [`BASE_ROUTES`] routes.
const ADMIN_ANSWER_BYTES: usize = 1 << 20;

/// The process at rest, with [`BASE_ROUTES`] routes: code, threads, tables. An estimate for a release build: the larger code of
/// a debug build takes 69 MiB, which the test's sum has room for.
const REST_BYTES: usize = 40 << 20;

/// What is remembered of requests that have ended (4 MiB by default), and lines of the log that are not written (2 MiB).
const HISTORY_BYTES: usize = 6 << 20;

/// Model servers of responses that clients may name again: 65,536, with ids of at most 128 bytes.
const RESPONSES_BYTES: usize = 16 << 20;

const GRPC_CONNECTIONS_BYTES: usize = (GRPC_CONNECTIONS + GRPC_LEAVING_CONNECTIONS) * GRPC_CONNECTION_BYTES;
const GRPC_CALLS_BYTES: usize = with_leaving(GRPC_CALLS) * GRPC_CALL_BYTES;

/// The parts of [`BASE_BYTES`], in bytes.
pub const BASE_PARTS: [(&str, usize); 10] = [
    ("the process at rest, with 1,000 routes", REST_BYTES),
    ("requests that have ended, lines of the log", HISTORY_BYTES),
    ("responses whose endpoint is remembered", RESPONSES_BYTES),
    (
        "connections to `admin`",
        (ADMIN_CONNECTIONS + ADMIN_LEAVING_CONNECTIONS) * (ADMIN_REQUEST_BYTES + ADMIN_CONNECTION_BYTES),
    ),
    ("its large answers and its dashboards", (ADMIN_ANSWERS + ADMIN_WATCHERS) * ADMIN_ANSWER_BYTES),
    ("connections to the scaler and to replicas", 2 * GRPC_CONNECTIONS_BYTES),
    (
        "their calls that are not whole or not read",
        2 * GRPC_CALLS_BYTES + with_leaving(GRPC_REFLECTIONS) * GRPC_REFLECTION_BYTES,
    ),
    ("streams of the scaler", with_leaving(SCALER_STREAMS) * SCALER_STREAM_BYTES),
    ("streams of replicas", with_leaving(PEER_STREAMS) * PEER_STREAM_BYTES),
    ("what replicas say", PEER_BOARD_BYTES + PEER_REPLICAS * PEER_SHARE_BYTES),
];

/// What this process takes besides requests: [`BASE_PARTS`], rounded up to whole MiB.
pub const BASE_BYTES: usize = {
    let (mut sum, mut part) = (0, 0);
    while part < BASE_PARTS.len() {
        sum += BASE_PARTS[part].1;
        part += 1;
    }
    sum.next_multiple_of(1 << 20)
};

/// Streams that may exist where this many have a place.
const fn with_leaving(places: usize) -> usize {
    places + max_leaving_streams(places)
}
