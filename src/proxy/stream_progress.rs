//! Progress of one HTTP/2 stream, shared by its request, its response body, its task, and its data in h2's buffer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use futures_util::task::AtomicWaker;

/// Progress of one HTTP/2 stream. Its task and that of its connection run on one thread, so memory ordering does not
/// matter.
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
    /// Bytes of parts that hyper and h2 hold.
    unsent: AtomicUsize,
    /// Task that waits until `unsent` is 0.
    sent: AtomicWaker,
}

/// Part of a response body. Counts as unsent until it is dropped: by h2, once it has been written to the connection or
/// its stream has been reset.
pub struct UnsentPart {
    bytes: Bytes,
    len: usize,
    stream: Arc<StreamProgress>,
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

    /// Counts `bytes` as unsent until the returned part is dropped.
    pub(super) fn send(self: &Arc<Self>, bytes: Bytes) -> UnsentPart {
        self.unsent.fetch_add(bytes.len(), Ordering::Relaxed);
        UnsentPart { len: bytes.len(), bytes, stream: self.clone() }
    }

    /// Returns the unsent bytes.
    pub(super) fn unsent(&self) -> usize {
        self.unsent.load(Ordering::Relaxed)
    }

    /// Completes when no byte is unsent.
    pub(super) fn poll_sent(&self, cx: &Context<'_>) -> Poll<()> {
        self.sent.register(cx.waker());
        if self.unsent() == 0 { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Records that the client stopped reading.
    pub(super) fn record_stream_stall(&self) {
        self.stalled.store(true, Ordering::Relaxed);
    }

    /// Returns `true` if the client stopped reading.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }
}

// === impl UnsentPart ===

impl Buf for UnsentPart {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

impl Drop for UnsentPart {
    fn drop(&mut self) {
        if self.stream.unsent.fetch_sub(self.len, Ordering::Relaxed) == self.len {
            self.stream.sent.wake();
        }
    }
}
