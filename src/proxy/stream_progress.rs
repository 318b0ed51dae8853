//! Progress of one HTTP/2 stream, shared by its request, its response body and its task.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Progress of one HTTP/2 stream. Only its own task changes it, so memory ordering does not matter.
#[derive(Debug, Default)]
pub struct StreamProgress {
    /// The client has to take the head or a part of the body before the body is polled again.
    is_unread: AtomicBool,
    /// Bytes that the body produced since the last [`StreamProgress::take_produced`].
    produced: AtomicUsize,
    /// The body comes from a model server.
    relays: AtomicBool,
    /// The client stopped reading, and the stream is being dropped.
    stalled: AtomicBool,
}

// === impl StreamProgress ===

impl StreamProgress {
    /// Records a poll of the response body, or its head. `produced`: bytes of the part, `None` if the body waits for the
    /// endpoint. `relays`: the body comes from a model server.
    pub(super) fn record_poll(&self, produced: Option<usize>, relays: bool) {
        self.is_unread.store(produced.is_some(), Ordering::Relaxed);
        self.produced.fetch_add(produced.unwrap_or(0), Ordering::Relaxed);
        self.relays.store(relays, Ordering::Relaxed);
    }

    /// Returns the bytes that the body produced since the last call.
    pub(super) fn take_produced(&self) -> usize {
        self.produced.swap(0, Ordering::Relaxed)
    }

    /// Returns `true` if the response has begun and waits for the client rather than for the endpoint.
    pub(super) fn is_unread(&self) -> bool {
        self.is_unread.load(Ordering::Relaxed)
    }

    /// Returns `true` if the body comes from a model server.
    pub(super) fn relays(&self) -> bool {
        self.relays.load(Ordering::Relaxed)
    }

    /// Records that the client stopped reading.
    pub(super) fn stalls(&self) {
        self.stalled.store(true, Ordering::Relaxed);
    }

    /// Returns `true` if the client stopped reading.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }
}
