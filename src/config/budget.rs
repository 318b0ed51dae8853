//! Maximum memory that clients can make this process take under its limits, and limits that fit the memory available.

mod listeners;

use std::fmt;

use super::{Limits, MemoryLimit};
use crate::domain::ByteCount;
pub use listeners::*;

/// Maximum memory of a client's connection that is not counted otherwise, in bytes. Over HTTP/1: two read buffers of 8
/// KiB, and 16 KiB read ahead. Over HTTP/2: a read buffer that grows to 32 KiB for a frame of 16, and what h2 keeps
/// without streams. `connections_cost_no_more_than_is_computed` measures 21 and 34 KiB.
pub const CONNECTION_COST_BYTES: usize = 40 << 10;

/// Bytes of an HTTP/1 head that the cost of its connection covers: hyper's first read buffer. Beyond it, the bytes that
/// have arrived are counted. hyper reserves twice as much, but memory that nothing was written to is not resident.
pub const UNCOUNTED_HEAD_BYTES: usize = 8 << 10;

/// Maximum memory of an incomplete HTTP/2 head, per byte of `maxHeaderBytes`: of the shortest fields, which count for
/// 33 bytes (RFC 9113, section 6.5.2), `HeaderMap` keeps 104 bytes each, in a table whose size is a power of two.
pub const H2_HEAD_FACTOR: usize = 4;

/// Memory of an HTTP/2 request besides its head and body, in bytes: its stream, its task, its place in the queue.
/// `held_stream_costs_no_more_than_it_counts_for` measures 5.4 KiB.
pub const STREAM_COST_BYTES: usize = 8 << 10;

/// Memory of an unread response besides its body, in bytes: the stream's state, its task and its head.
/// `unread_answer_costs_no_more_than_it_counts_for` measures 2.2 KiB; as much again is for larger heads.
pub const ANSWER_COST_BYTES: usize = 4 << 10;

/// Bytes of a response read ahead from a model server, per connection; also the maximum size of a response head.
pub const UPSTREAM_BUFFER_BYTES: usize = 64 << 10;

/// Bytes of a response written ahead to a client, beyond the part that was read last.
pub const SEND_BUFFER_BYTES: usize = 64 << 10;

/// Memory of a response on its way to a client that reads slowly, in bytes: those written ahead, the part that was read
/// last, and those read ahead.
pub const RELAY_COST_BYTES: usize = SEND_BUFFER_BYTES + 2 * UPSTREAM_BUFFER_BYTES;

/// Bytes per read of a WebSocket, in each direction.
pub const TUNNEL_BUFFER_BYTES: usize = 16 << 10;

/// Maximum memory of a WebSocket whose client does not read, in bytes: a buffer in each direction, and bytes received
/// with the head of the response.
pub const TUNNEL_COST_BYTES: usize = 2 * TUNNEL_BUFFER_BYTES + UPSTREAM_BUFFER_BYTES;

/// Returns the maximum bytes of the proxy's unread responses, on top of `maxBufferedBytes`: an eighth of it, and at
/// least room for some.
pub const fn max_answer_bytes(buffered: usize) -> usize {
    at_least(buffered / 8, 64 << 10)
}

/// Returns the maximum bytes of model server responses and WebSockets whose clients do not read, on top of
/// `maxBufferedBytes`: a quarter of it, and at least room for some twenty.
pub const fn max_relay_bytes(buffered: usize) -> usize {
    at_least(buffered / 4, 4 << 20)
}

/// Returns the maximum bytes of requests besides their bodies, on top of `maxBufferedBytes`: a quarter of it, and at
/// least room for those of one HTTP/2 connection.
pub const fn max_request_bytes(buffered: usize) -> usize {
    at_least(buffered / 4, 10 << 20)
}

const fn at_least(bytes: usize, least: usize) -> usize {
    if bytes > least { bytes } else { least }
}

/// Divisor of the memory: the part for bodies, and that for connections, if limits are not set.
const DEFAULT_DIVISOR: usize = 4;

/// Maximum memory that limits allow, by purpose, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorstCase {
    /// Number of connections.
    pub connections: usize,
    /// Memory of the connections.
    pub of_connections: usize,
    /// Bodies and incomplete heads.
    pub bodies: usize,
    /// Requests besides their bodies.
    pub requests: usize,
    /// Unread responses of the proxy.
    pub answers: usize,
    /// Responses of model servers, and WebSockets, whose clients do not read.
    pub relays: usize,
}

// === impl WorstCase ===

impl WorstCase {
    /// Computes the worst case of these limits.
    pub fn of(limits: &Limits) -> Self {
        let (connections, bodies) = (limits.max_connections, limits.max_buffered_bytes.get());
        Self {
            connections,
            of_connections: connections.saturating_mul(CONNECTION_COST_BYTES),
            bodies,
            requests: max_request_bytes(bodies),
            answers: max_answer_bytes(bodies),
            relays: max_relay_bytes(bodies),
        }
    }

    /// Returns the total, including [`BASE_BYTES`].
    pub fn total(&self) -> usize {
        self.of_connections.saturating_add(self.of_buffered()).saturating_add(BASE_BYTES)
    }

    /// Returns the part that follows from `maxBufferedBytes`.
    fn of_buffered(&self) -> usize {
        [self.bodies, self.requests, self.answers, self.relays].into_iter().fold(0, usize::saturating_add)
    }

    /// Returns the total as text, in MiB.
    pub(super) fn total_mebibytes(&self) -> String {
        mebibytes(self.total())
    }

    /// Checks that the total fits the available memory. The error states the remedy.
    pub(super) fn check(&self, memory: &MemoryLimit) -> Result<(), String> {
        if self.total() <= memory.bytes {
            return Ok(());
        }
        Err(format!(
            "clients can make this process take {}, more than {memory}: lower maxConnections ({}) or \
             maxBufferedBytes ({}), or give it more memory",
            mebibytes(self.total()),
            mebibytes(self.of_connections),
            mebibytes(self.of_buffered()),
        ))
    }
}

impl fmt::Display for WorstCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} connections {}, bodies {}, requests {}, answers {}, all else {}",
            self.connections,
            mebibytes(self.of_connections),
            mebibytes(self.bodies),
            mebibytes(self.requests),
            mebibytes(self.answers.saturating_add(self.relays)),
            mebibytes(BASE_BYTES),
        )
    }
}

/// Formats bytes as MiB, rounded up.
pub(super) fn mebibytes(bytes: usize) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

// === impl Limits ===

impl Limits {
    /// Returns the bytes of bodies that fit this much memory: a quarter of it, at least one body, at most the default.
    pub fn fitting_bytes(&self, memory: usize) -> ByteCount {
        let quarter = memory / DEFAULT_DIVISOR;
        let fitting = ByteCount::bytes(quarter - quarter % (1 << 20));
        fitting.max(self.max_body_bytes).min(Self::default().max_buffered_bytes)
    }

    /// Returns the number of connections that fit this much memory: as many as fit a quarter of it, or what bodies and
    /// [`BASE_BYTES`] leave of it, at most the default.
    pub fn fitting_connections(memory: usize) -> usize {
        let bodies = memory / DEFAULT_DIVISOR;
        let others = BASE_BYTES
            + bodies
            + max_request_bytes(bodies)
            + max_answer_bytes(bodies)
            + max_relay_bytes(bodies);
        let room = bodies.min(memory.saturating_sub(others));
        (room / CONNECTION_COST_BYTES).clamp(1, Self::default().max_connections)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unset limits fit from 512 MiB on.
    #[test]
    fn unset_limits_fit_the_memory() {
        for mebibytes in [512, 768, 1024, 1500, 2048, 4096, 8192, 1 << 16] {
            let memory = MemoryLimit { bytes: mebibytes << 20, source: "the machine" };
            let mut limits = Limits::default();
            limits.max_buffered_bytes = limits.fitting_bytes(memory.bytes);
            limits.max_connections = Limits::fitting_connections(memory.bytes);
            assert_eq!(WorstCase::of(&limits).check(&memory), Ok(()), "{mebibytes}");
        }
        let fitting =
            |memory: usize| (Limits::default().fitting_bytes(memory), Limits::fitting_connections(memory));
        assert_eq!(fitting(1 << 30), (ByteCount::mebibytes(256), 6553));
        assert_eq!(fitting(64 << 30), (ByteCount::mebibytes(1024), 65_536));
        assert_eq!(fitting(1 << 20), (ByteCount::mebibytes(32), 1), "one body of the largest size");
    }

    #[test]
    fn limits_above_the_memory_are_named() {
        let memory = MemoryLimit { bytes: 1 << 30, source: "the memory limit of the cgroup" };
        let error = WorstCase::of(&Limits::default()).check(&memory).unwrap_err();
        let message = "clients can make this process take 4465 MiB, more than 1024 MiB (the memory limit of the cgroup): \
                       lower maxConnections (2560 MiB) or maxBufferedBytes (1664 MiB), or give it more memory";
        assert_eq!(error, message);
    }
}
