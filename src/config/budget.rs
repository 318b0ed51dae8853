//! The most memory that clients can make this process take, by its limits, and the limits that fit the memory there is.

mod listeners;

use std::fmt;

use super::{Limits, MemoryLimit};
use crate::domain::ByteCount;
pub use listeners::*;

/// The most that a client's connection takes that is not counted by itself. Over HTTP/1: two read buffers of 8 KiB, 16 KiB that
/// came ahead of their turn. Over HTTP/2: a read buffer that grows to 32 KiB for a frame of 16, and what h2 keeps, without streams.
/// `connections_cost_no_more_than_is_computed` measures 21 and 34 KiB.
pub const CONNECTION_COST_BYTES: usize = 40 << 10;

/// Over HTTP/1, how much of a head costs nothing but its connection: hyper's first read buffer. Beyond it, what has come is
/// counted. hyper reserves room for twice as much, but memory that nothing was written to is not resident.
pub const UNCOUNTED_HEAD_BYTES: usize = 8 << 10;

/// Over HTTP/2, how much memory a head may take that has begun and is not whole, for each byte of `maxHeaderBytes`: of the
/// shortest fields, which count for 33 bytes (RFC 9113, section 6.5.2), `HeaderMap` keeps 104 bytes each, in a table of a power
/// of two.
pub const H2_HEAD_FACTOR: usize = 4;

/// What a request over HTTP/2 takes besides its head and body: its stream, its task, its place in the queue. 5.4 KiB measured by
/// `held_stream_costs_no_more_than_it_counts_for`.
pub const STREAM_COST_BYTES: usize = 8 << 10;

/// What an unread answer counts for besides its body: the stream's state, its task and its head. 2.2 KiB measured by
/// `unread_answer_costs_no_more_than_it_counts_for`, and as much again for larger heads.
pub const ANSWER_COST_BYTES: usize = 4 << 10;

/// How much of an answer is read ahead from a model server, on each of its connections, and so the largest head of an answer.
pub const UPSTREAM_BUFFER_BYTES: usize = 64 << 10;

/// How much of an answer is written ahead to a client, beyond the part that was read last.
pub const SEND_BUFFER_BYTES: usize = 64 << 10;

/// What is on its way from a model server to a client that reads slowly: what is written ahead, the part that was read last, and
/// what is read ahead.
pub const RELAY_COST_BYTES: usize = SEND_BUFFER_BYTES + 2 * UPSTREAM_BUFFER_BYTES;

/// Bytes read at once of a WebSocket, in each direction.
pub const TUNNEL_BUFFER_BYTES: usize = 16 << 10;

/// Most memory of a WebSocket whose client does not read: a buffer in each direction, and what came with the head of the answer.
pub const TUNNEL_COST_BYTES: usize = 2 * TUNNEL_BUFFER_BYTES + UPSTREAM_BUFFER_BYTES;

/// Returns the bytes that answers of ours may take that are not read, on top of `maxBufferedBytes`: an eighth of it, and room for
/// some.
pub const fn max_answer_bytes(buffered: usize) -> usize {
    at_least(buffered / 8, 64 << 10)
}

/// Returns the bytes that answers of model servers and WebSockets may take whose clients do not read, on top of
/// `maxBufferedBytes`: a quarter of it, and room for some twenty.
pub const fn max_relay_bytes(buffered: usize) -> usize {
    at_least(buffered / 4, 4 << 20)
}

/// Returns the bytes that requests may take besides their bodies, on top of `maxBufferedBytes`: a quarter of it, and room for those
/// of one connection of HTTP/2.
pub const fn max_request_bytes(buffered: usize) -> usize {
    at_least(buffered / 4, 10 << 20)
}

const fn at_least(bytes: usize, least: usize) -> usize {
    if bytes > least { bytes } else { least }
}

/// The part of the memory that is for bodies, and that for connections, where limits are not set.
const DEFAULT_DIVISOR: usize = 4;

/// The most memory that limits allow, by what takes it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorstCase {
    /// How many connections there are then.
    pub connections: usize,
    /// What these take.
    pub of_connections: usize,
    /// Bodies, and heads that are not whole.
    pub bodies: usize,
    /// Requests besides their bodies.
    pub requests: usize,
    /// Answers that are not read.
    pub answers: usize,
    /// Answers of model servers and WebSockets whose clients do not read.
    pub relays: usize,
}

// === impl WorstCase ===

impl WorstCase {
    /// That of these limits.
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

    /// All of it, with [`BASE_BYTES`].
    pub fn total(&self) -> usize {
        self.of_connections.saturating_add(self.of_buffered()).saturating_add(BASE_BYTES)
    }

    /// The part that follows from `maxBufferedBytes`.
    fn of_buffered(&self) -> usize {
        [self.bodies, self.requests, self.answers, self.relays].into_iter().fold(0, usize::saturating_add)
    }

    /// All of it, for people.
    pub(super) fn total_mebibytes(&self) -> String {
        mebibytes(self.total())
    }

    /// What is wrong with it where there is this much memory, and the way out.
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

/// Rounded up.
pub(super) fn mebibytes(bytes: usize) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

// === impl Limits ===

impl Limits {
    /// The bytes of bodies that fit this much memory: a quarter of it, at least one body, at most the default.
    pub fn fitting_bytes(&self, memory: usize) -> ByteCount {
        let quarter = memory / DEFAULT_DIVISOR;
        let fitting = ByteCount::bytes(quarter - quarter % (1 << 20));
        fitting.max(self.max_body_bytes).min(Self::default().max_buffered_bytes)
    }

    /// The connections that fit this much memory: as many as a quarter of it has room for, or what bodies and [`BASE_BYTES`]
    /// leave of it, at most the default.
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

    /// What is left unset fits from 512 MiB on, whatever the machine.
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
