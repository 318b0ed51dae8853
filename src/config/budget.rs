//! Maximum memory that clients can make this process take under its limits, and limits that fit the memory available.

mod costs;
mod listeners;

use std::fmt;

use super::{Limits, MemoryLimit, memory_limit::mebibytes};
use crate::domain::ByteCount;
pub use costs::*;
pub use listeners::*;

/// Returns the maximum bytes of the proxy's unread responses, on top of `maxBufferedBytes`: an eighth of it, and at
/// least enough for a few responses.
pub const fn max_answer_bytes(buffered: usize) -> usize {
    at_least(buffered / 8, 64 << 10)
}

/// Returns the maximum bytes of model server responses and WebSockets whose clients do not read, on top of
/// `maxBufferedBytes`: a quarter of it, and at least enough for about twenty responses.
pub const fn max_relay_bytes(buffered: usize) -> usize {
    at_least(buffered / 4, 4 << 20)
}

/// Returns the maximum bytes of requests besides their bodies, on top of `maxBufferedBytes`: a quarter of it, and at
/// least enough for the requests of one HTTP/2 connection.
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
    pub connection_bytes: usize,
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
            connection_bytes: connections.saturating_mul(CONNECTION_COST_BYTES),
            bodies,
            requests: max_request_bytes(bodies),
            answers: max_answer_bytes(bodies),
            relays: max_relay_bytes(bodies),
        }
    }

    /// Returns the total, including [`BASE_BYTES`].
    pub fn total(&self) -> usize {
        self.connection_bytes.saturating_add(self.buffered_share_bytes()).saturating_add(BASE_BYTES)
    }

    /// Returns the part that follows from `maxBufferedBytes`.
    fn buffered_share_bytes(&self) -> usize {
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
            mebibytes(self.connection_bytes),
            mebibytes(self.buffered_share_bytes()),
        ))
    }
}

impl fmt::Display for WorstCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} connections {}, bodies {}, requests {}, answers {}, all else {}",
            self.connections,
            mebibytes(self.connection_bytes),
            mebibytes(self.bodies),
            mebibytes(self.requests),
            mebibytes(self.answers.saturating_add(self.relays)),
            mebibytes(BASE_BYTES),
        )
    }
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

    /// With 512 MiB of memory or more, unset limits fit.
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
