//! Memory that one connection, request or response costs.

/// Maximum memory of a client's connection that is not counted otherwise, in bytes. Over HTTP/1: two read buffers of 8
/// KiB, and 16 KiB read ahead. Over HTTP/2: a read buffer that grows to 32 KiB for a frame of 16, and what h2 keeps
/// without streams. `idle_connection_costs_at_most_its_estimate` measures 21 and 34 KiB.
pub const CONNECTION_COST_BYTES: usize = 40 << 10;

/// Bytes of an HTTP/1 head that the cost of its connection covers: hyper's first read buffer. Beyond it, the bytes that
/// have arrived are counted. hyper reserves twice as much, but memory that nothing was written to is not resident.
pub const UNCOUNTED_HEAD_BYTES: usize = 8 << 10;

/// Maximum memory of an incomplete HTTP/2 head, per byte of `maxHeaderBytes`. The worst case is the shortest fields:
/// each counts 33 bytes (RFC 9113, section 6.5.2), and takes 104 bytes in `HeaderMap`, whose table has a power of two
/// as its size.
pub const H2_HEAD_FACTOR: usize = 4;

/// Memory of an HTTP/2 request besides its head and body, in bytes: its stream, its task, its place in the queue.
/// `held_stream_costs_at_most_its_accounting` measures 5.4 KiB.
pub const STREAM_COST_BYTES: usize = 8 << 10;

/// Memory of an unread response besides its body, in bytes: the stream's state, its task and its head.
/// `unread_response_costs_at_most_its_accounting` measures 2.2 KiB; as much again is for larger heads.
pub const ANSWER_COST_BYTES: usize = 4 << 10;

/// Bytes of a response read ahead from a model server, per connection; also the maximum size of a response head.
pub const UPSTREAM_BUFFER_BYTES: usize = 64 << 10;

/// Bytes of a response written ahead to a client, beyond the part that was read last.
pub const SEND_BUFFER_BYTES: usize = 64 << 10;

/// Memory of a response on its way to a client that reads slowly, in bytes: the bytes written ahead, the part that
/// was read last, and the bytes read ahead.
pub const RELAY_COST_BYTES: usize = SEND_BUFFER_BYTES + 2 * UPSTREAM_BUFFER_BYTES;

/// Bytes per read of a WebSocket, in each direction.
pub const TUNNEL_BUFFER_BYTES: usize = 16 << 10;

/// Maximum memory of a WebSocket whose client does not read, in bytes: a buffer in each direction, and bytes received
/// with the head of the response.
pub const TUNNEL_COST_BYTES: usize = 2 * TUNNEL_BUFFER_BYTES + UPSTREAM_BUFFER_BYTES;
