//! Detection of HTTP/2 clients that stop reading one stream: its window stays full, and hyper no longer polls its body.
//!
//! hyper runs each stream as a task. [`StreamExecutor`] spawns these tasks and wraps them, since only dropping its task
//! ends a stream whose body is not polled. Every poll shows one of three things: the stream produced data, it waits for
//! the endpoint, or it did not poll the body at all, which is due to the window. If the last persists, or the window
//! opens too slowly, the stream is ended.
//!
//! The executor gets an opaque future, so the service hands over the [`StreamProgress`] of each request: hyper spawns a
//! stream right after it has called the service. Over HTTP/1 there is no such state; over HTTP/2 it costs an allocation
//! per request, and some unshared atomics per poll.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::rt::Executor;
use parking_lot::Mutex;
use pin_project_lite::pin_project;

use super::{
    body::{Body, BodyError},
    memory::{Memory, UnreadKind},
    pace::Allowed,
    stall::{Kept, Stall},
    stream_progress::StreamProgress,
};
use crate::config::budget::RELAY_COST_BYTES;

/// Executor for the streams of a connection, with a limit on slow reading.
#[derive(Clone, Debug)]
pub struct StreamExecutor {
    /// Limit while there is memory for unread responses.
    allowed: Allowed,
    /// Accounting that shortens the limit when memory is short.
    memory: Arc<Memory>,
    /// State of the stream that is spawned next.
    next: Arc<Mutex<Option<Arc<StreamProgress>>>>,
}

/// Body of a response over HTTP/2. Records in the state of its stream whether it waits for the client.
pub struct H2ResponseBody {
    body: Body,
    state: Arc<StreamProgress>,
}

pin_project! {
    struct Watched<F> {
        #[pin]
        stream: Option<F>,
        state: Arc<StreamProgress>,
        stall: Stall,
        memory: Arc<Memory>,
    }
}

// === impl StreamExecutor ===

impl StreamExecutor {
    /// Creates the executor of a connection.
    pub fn new(allowed: Allowed, memory: Arc<Memory>) -> Self {
        Self { allowed, memory, next: Arc::default() }
    }

    /// Creates the state of a stream. Only for the service, when hyper calls it.
    pub(super) fn begin(&self) -> Arc<StreamProgress> {
        let state = Arc::<StreamProgress>::default();
        let unspawned = self.next.lock().replace(state.clone());
        debug_assert!(unspawned.is_none(), "hyper called the service twice without spawning a stream");
        state
    }
}

impl<F: Future + Send + 'static> Executor<F> for StreamExecutor
where
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        // Without a request, there is no response either, and the default state never counts as unread.
        let state = self.next.lock().take().unwrap_or_default();
        let (stall, memory) = (Stall::new(self.allowed), self.memory.clone());
        tokio::spawn(Watched { stream: Some(stream), state, stall, memory });
    }
}

// === impl H2ResponseBody ===

impl H2ResponseBody {
    /// Wraps the body of a response whose head is sent next.
    pub(super) fn new(body: Body, state: Arc<StreamProgress>) -> Self {
        // The client is expected to read from here on.
        state.record_poll(Some(0), body.relays());
        Self { body, state }
    }
}

impl http_body::Body for H2ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Self { body, state } = self.get_mut();
        let part = Pin::new(&mut *body).poll_frame(cx);
        let produced = match &part {
            Poll::Pending => None,
            Poll::Ready(Some(Ok(frame))) => Some(frame.data_ref().map_or(0, Bytes::len)),
            Poll::Ready(_) => Some(0),
        };
        state.record_poll(produced, body.relays());
        part
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

// === impl Watched ===

impl<F: Future> Future for Watched<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let Some(stream) = this.stream.as_mut().as_pin_mut() else { return Poll::Ready(()) };
        if stream.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let produced = this.state.take_produced();
        if !this.state.is_unread() {
            // The head has not been sent, or the endpoint has no data: the client has taken all there was.
            this.stall.rest();
            return Poll::Pending;
        }
        if produced > 0 {
            this.stall.moved(produced);
        }
        let kept = if this.state.relays() {
            Kept::Unread(UnreadKind::Relay, RELAY_COST_BYTES)
        } else {
            Kept::Answer
        };
        let over = this.stall.poll_over(this.memory, kept, cx);
        if over.is_ready() {
            this.state.stalls();
            this.stream.set(None);
        }
        over
    }
}
