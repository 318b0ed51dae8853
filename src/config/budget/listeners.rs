//! Memory bounded by constants: that of the process itself, and of the listeners that do not serve requests, which are
//! admin, the KEDA scaler and the port for replicas. `full_listeners_take_less_than_base_bytes` measures the sum.

use super::costs::{CONNECTION_COST_BYTES, H2_HEAD_FACTOR};
use crate::places::max_leaving_streams;

/// Maximum number of connections to the admin port, of evicted ones that are about to end, and of bytes of a request
/// there.
pub const ADMIN_CONNECTIONS: usize = 512;
/// See [`ADMIN_CONNECTIONS`].
pub const ADMIN_LEAVING_CONNECTIONS: usize = 64;
/// See [`ADMIN_CONNECTIONS`].
pub const ADMIN_REQUEST_BYTES: usize = 32 << 10;

/// Admin responses under way whose size depends on the number of routes or of requests kept.
pub const ADMIN_ANSWERS: usize = 8;

/// Dashboards that follow the state, each with at most one event under way.
pub const ADMIN_WATCHERS: usize = 16;

/// Maximum number of connections to the scaler, and as many to the port for replicas; and of evicted ones that are
/// about to end.
pub const GRPC_CONNECTIONS: usize = 128;
/// See [`GRPC_CONNECTIONS`].
pub const GRPC_LEAVING_CONNECTIONS: usize = 32;

/// Maximum size of the head of a call, in bytes as HTTP/2 counts them.
pub const GRPC_HEAD_BYTES: u32 = 8 << 10;

/// Maximum size of the message of a call, in bytes: names, and the metadata of a trigger.
pub const GRPC_MESSAGE_BYTES: usize = 8 << 10;

/// Calls of a listener with an incomplete message or an unread response, and streams of health.
pub const GRPC_CALLS: usize = 256;

/// Streams of reflection per listener.
pub const GRPC_REFLECTIONS: usize = 16;

/// Streams of the scaler: two for each ScaledObject.
pub const SCALER_STREAMS: usize = 8192;

/// Maximum number of other replicas that are followed.
pub const PEER_REPLICAS: usize = 64;

/// Streams of other replicas: one for each, and some more, since a replica may reconnect before its former connection
/// is known to be dead.
pub const PEER_STREAMS: usize = PEER_REPLICAS + 16;

/// Bytes kept of the reports of other replicas: of all of them, and of each one even if the others have used those up.
pub const PEER_BOARD_BYTES: usize = 12 << 20;
/// See [`PEER_BOARD_BYTES`].
pub const PEER_SHARE_BYTES: usize = 128 << 10;

/// Routes that [`BASE_BYTES`] has room for.
pub const BASE_ROUTES: usize = 1000;

/// Memory of a gRPC connection, with TLS, one incomplete head, and no calls, in bytes.
pub const GRPC_CONNECTION_BYTES: usize =
    CONNECTION_COST_BYTES + H2_HEAD_FACTOR * GRPC_HEAD_BYTES as usize + GRPC_TLS_BYTES;

/// Memory of TLS, in bytes: its state, and a record of 16 KiB.
const GRPC_TLS_BYTES: usize = 24 << 10;

/// Memory of one of [`GRPC_CALLS`], in bytes: its stream and task, its message in a buffer that has grown to it, and a
/// token.
pub const GRPC_CALL_BYTES: usize = (6 << 10) + 2 * GRPC_MESSAGE_BYTES + GRPC_HEAD_BYTES as usize;

/// Memory of one of [`GRPC_REFLECTIONS`], in bytes: the same, its window of 16 KiB, and three responses of at most 16
/// KiB.
pub const GRPC_REFLECTION_BYTES: usize = GRPC_CALL_BYTES + (64 << 10);

/// Memory of a stream of the scaler: its HTTP/2 state, its task, and names of 253 bytes.
const SCALER_STREAM_BYTES: usize = 4 << 10;

/// Memory of a stream of a replica: an unread report of 500 routes, and the counts last sent of [`BASE_ROUTES`] routes.
const PEER_STREAM_BYTES: usize = (96 << 10) + 2 * 112 * BASE_ROUTES;

/// Memory of a connection to the admin port besides its request.
const ADMIN_CONNECTION_BYTES: usize = 8 << 10;

/// Memory of an admin response that covers [`BASE_ROUTES`] routes.
const ADMIN_ANSWER_BYTES: usize = 1 << 20;

/// Memory of the process at rest, with [`BASE_ROUTES`] routes: code, threads, tables. An estimate for a release build:
/// the larger code of a debug build takes 69 MiB, for which the test's sum has room.
const REST_BYTES: usize = 40 << 20;

/// Memory of ended requests (4 MiB by default), and of log lines that are not written yet (2 MiB).
const HISTORY_BYTES: usize = 6 << 20;

/// Memory of the model servers noted for responses that clients may refer to: 65,536, with ids of at most 128 bytes.
const RESPONSES_BYTES: usize = 16 << 20;

const GRPC_CONNECTIONS_BYTES: usize = (GRPC_CONNECTIONS + GRPC_LEAVING_CONNECTIONS) * GRPC_CONNECTION_BYTES;
const GRPC_CALLS_BYTES: usize = with_leaving(GRPC_CALLS) * GRPC_CALL_BYTES;

/// Parts of [`BASE_BYTES`], in bytes.
pub const BASE_PARTS: [(&str, usize); 10] = [
    ("the process at rest, with 1,000 routes", REST_BYTES),
    ("ended requests and unwritten log lines", HISTORY_BYTES),
    ("endpoints of stored responses", RESPONSES_BYTES),
    (
        "connections to `admin`",
        (ADMIN_CONNECTIONS + ADMIN_LEAVING_CONNECTIONS) * (ADMIN_REQUEST_BYTES + ADMIN_CONNECTION_BYTES),
    ),
    ("large admin responses and dashboards", (ADMIN_ANSWERS + ADMIN_WATCHERS) * ADMIN_ANSWER_BYTES),
    ("connections to the scaler and to replicas", 2 * GRPC_CONNECTIONS_BYTES),
    (
        "incomplete or unread gRPC calls",
        2 * GRPC_CALLS_BYTES + with_leaving(GRPC_REFLECTIONS) * GRPC_REFLECTION_BYTES,
    ),
    ("streams of the scaler", with_leaving(SCALER_STREAMS) * SCALER_STREAM_BYTES),
    ("streams of replicas", with_leaving(PEER_STREAMS) * PEER_STREAM_BYTES),
    ("reports of replicas", PEER_BOARD_BYTES + PEER_REPLICAS * PEER_SHARE_BYTES),
];

/// Memory of this process besides requests: [`BASE_PARTS`], rounded up to whole MiB.
pub const BASE_BYTES: usize = {
    let (mut sum, mut part) = (0, 0);
    while part < BASE_PARTS.len() {
        sum += BASE_PARTS[part].1;
        part += 1;
    }
    sum.next_multiple_of(1 << 20)
};

/// Returns the number of streams that may exist if this many have a place.
const fn with_leaving(places: usize) -> usize {
    places + max_leaving_streams(places)
}
