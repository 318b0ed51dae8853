//! Memory bounded by constants: that of the process itself, and of the listeners that do not serve requests, which are
//! admin, the KEDA scaler and the port for replicas. `full_listeners_take_less_than_base_bytes` measures the sum.

use super::costs::{CONNECTION_COST_BYTES, H2_HEAD_FACTOR};
use crate::places::max_leaving_streams;

/// Maximum number of connections to the admin port.
pub const ADMIN_CONNECTIONS: usize = 512;
/// Maximum number of evicted connections to the admin port that have not closed yet.
pub const ADMIN_LEAVING_CONNECTIONS: usize = 64;
/// Maximum size of a request to the admin port, in bytes.
pub const ADMIN_REQUEST_BYTES: usize = 32 << 10;

/// Maximum number of concurrent admin responses whose size depends on the number of routes or of requests kept.
pub const ADMIN_ANSWERS: usize = 8;

/// Maximum number of dashboards that subscribe to the state, each with at most one unsent event.
pub const ADMIN_WATCHERS: usize = 16;

/// Maximum number of connections to the scaler; the port for replicas has the same maximum.
pub const GRPC_CONNECTIONS: usize = 128;
/// Maximum number of evicted gRPC connections per port that have not closed yet.
pub const GRPC_LEAVING_CONNECTIONS: usize = 32;

/// Maximum size of the head of a call, in bytes as HTTP/2 counts them.
pub const GRPC_HEAD_BYTES: u32 = 8 << 10;

/// Maximum size of the message of a call, in bytes: names, and the metadata of a trigger.
pub const GRPC_MESSAGE_BYTES: usize = 8 << 10;

/// Maximum number of calls of a listener with an incomplete message or an unread response, including streams of the
/// health service.
pub const GRPC_CALLS: usize = 256;

/// Maximum number of streams of the reflection service per listener.
pub const GRPC_REFLECTIONS: usize = 16;

/// Maximum number of streams of the scaler: KEDA opens two for each ScaledObject.
pub const SCALER_STREAMS: usize = 8192;

/// Maximum number of other replicas that are followed.
pub const PEER_REPLICAS: usize = 64;

/// Maximum number of streams of other replicas: one for each, and some more, since a replica may reconnect before its
/// former connection is known to be dead.
pub const PEER_STREAMS: usize = PEER_REPLICAS + 16;

/// Maximum bytes kept of the reports of all other replicas.
pub const PEER_BOARD_BYTES: usize = 12 << 20;
/// Bytes of reports that each replica may use, even if the others have used up [`PEER_BOARD_BYTES`].
pub const PEER_SHARE_BYTES: usize = 128 << 10;

/// Number of routes for which [`BASE_BYTES`] has memory.
pub const BASE_ROUTES: usize = 1000;

/// Memory of a gRPC connection, with TLS, one incomplete head, and no calls, in bytes.
pub const GRPC_CONNECTION_BYTES: usize =
    CONNECTION_COST_BYTES + H2_HEAD_FACTOR * GRPC_HEAD_BYTES as usize + GRPC_TLS_BYTES;

/// Memory of TLS, in bytes: its state, and a record of 16 KiB.
const GRPC_TLS_BYTES: usize = 24 << 10;

/// Memory of one of [`GRPC_CALLS`], in bytes: its stream and task, its message in a buffer that has grown to it, and a
/// token.
pub const GRPC_CALL_BYTES: usize = (6 << 10) + 2 * GRPC_MESSAGE_BYTES + GRPC_HEAD_BYTES as usize;

/// Memory of one of [`GRPC_REFLECTIONS`], in bytes: that of a call, its window of 16 KiB, and three responses of at
/// most 16 KiB.
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

/// Returns the maximum number of open streams: `places` admitted ones, and evicted ones that have not ended yet.
const fn with_leaving(places: usize) -> usize {
    places + max_leaving_streams(places)
}
