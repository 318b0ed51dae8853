//! Memory of model server responses and WebSockets while their clients do not read.
//!
//! Each counts at its maximum, since the bytes in hyper's buffers cannot be observed. A client that is briefly behind
//! looks like one that has stopped reading, so none is rejected; instead, the time a client may be behind shrinks. The
//! bound can be exceeded only by clients that fell behind within the last [`MIN_UNREAD_TIME`].

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::totals::Memory;
use crate::config::budget::max_relay_bytes;

/// Memory counted while a client does not read, released on drop.
#[derive(Debug)]
pub struct UnreadShare {
    memory: Arc<Memory>,
    kind: UnreadKind,
    bytes: usize,
}

/// Kind of an [`UnreadShare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnreadKind {
    /// Response of a model server.
    Relay,
    /// WebSocket.
    Tunnel,
}

/// Time a client may be behind with reading while more than half of the memory is taken. A reader on a lossy connection
/// catches up within 5 s: retransmission of a lost packet takes 3 s at most for the first two tries (RFC 6298: 1 s,
/// doubled).
const SHORT_UNREAD_TIME: Duration = Duration::from_secs(5);

/// Time a client may be behind while all of the memory is taken.
const MIN_UNREAD_TIME: Duration = Duration::from_secs(1);

// === impl Memory ===

impl Memory {
    /// Counts the memory held for a client that has stopped reading.
    pub(in crate::proxy) fn count_unread(self: &Arc<Self>, kind: UnreadKind, bytes: usize) -> UnreadShare {
        self.unread[kind as usize].fetch_add(bytes, Ordering::Relaxed);
        UnreadShare { memory: self.clone(), kind, bytes }
    }

    /// Returns the time a client may be behind; `None` while memory is not short.
    pub(in crate::proxy) fn max_unread_time(&self) -> Option<Duration> {
        let used: usize = self.unread.iter().map(|bytes| bytes.load(Ordering::Relaxed)).sum();
        let max = max_relay_bytes(self.max());
        match used {
            _ if used > max => Some(MIN_UNREAD_TIME),
            _ if used > max / 2 => Some(SHORT_UNREAD_TIME),
            _ => None,
        }
    }
}

// === impl UnreadShare ===

impl Drop for UnreadShare {
    fn drop(&mut self) {
        self.memory.unread[self.kind as usize].fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unread data may take 16 MiB, a quarter of 64 MiB.
    #[test]
    fn unread_time_shrinks_as_memory_fills() {
        let memory = Memory::new(64 << 20);
        let relays = memory.count_unread(UnreadKind::Relay, 6 << 20);
        let tunnels = memory.count_unread(UnreadKind::Tunnel, 2 << 20);
        assert_eq!(memory.max_unread_time(), None);
        let more = memory.count_unread(UnreadKind::Tunnel, 1);
        assert_eq!(memory.max_unread_time(), Some(Duration::from_secs(5)));
        let rest = memory.count_unread(UnreadKind::Relay, 8 << 20);
        assert_eq!(memory.max_unread_time(), Some(Duration::from_secs(1)));
        assert_eq!(memory.kinds()[5..], [("relay", 14 << 20), ("tunnel", (2 << 20) + 1)]);
        drop((relays, tunnels, more, rest));
        assert_eq!(memory.kinds()[5..], [("relay", 0), ("tunnel", 0)]);
    }
}
