//! Detection of HTTP/2 clients that stop reading one stream: its window stays full, and hyper no longer polls its body.
//!
//! hyper runs each stream as a task. [`StreamExecutor`] spawns these tasks and wraps them, since a stream whose body is
//! not polled can be ended only by dropping it. Every poll shows one of three things: the stream produced data, it waits
//! for the endpoint, or it did not poll the body at all, which is due to the window. If the last persists, or the window
//! opens too slowly, the stream is ended.
//!
//! Once a body has ended, h2 may still hold the end of it, up to 64 KiB and the last part, and nothing but the end of the
//! connection takes that back from a client that does not read. The task therefore stays, and counts these bytes until
//! h2 drops them. Only while memory is short does it end the connection, as that ends other streams, too.
//!
//! The executor gets an opaque future, so the service hands over the [`StreamProgress`] of each request: hyper spawns a
//! stream right after it has called the service. Over HTTP/1 there is no such state; over HTTP/2 it costs an allocation
//! per request, and some uncontended atomics per poll and part.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::rt::Executor;
use parking_lot::Mutex;
use pin_project_lite::pin_project;

use super::{
    body::{Body, BodyError},
    connection_state::ConnectionState,
    memory::{Memory, UnreadKind},
    pace::PaceLimit,
    stall::{HeldMemory, Stall},
    stream_progress::{StreamProgress, UnsentPart},
};
use crate::config::budget::{ANSWER_COST_BYTES, RELAY_COST_BYTES};

/// Executor for the streams of a connection, with a limit on slow reading.
#[derive(Clone, Debug)]
pub struct StreamExecutor {
    /// Limit while there is memory for unread responses.
    allowed: PaceLimit,
    /// Accounting that shortens the limit when memory is short.
    memory: Arc<Memory>,
    connection: Arc<ConnectionState>,
    /// State of the stream that is spawned next.
    next: Arc<Mutex<Option<Arc<StreamProgress>>>>,
}

/// Body of a response over HTTP/2. Records whether it waits for the client, and which of its bytes are unsent.
pub struct H2ResponseBody {
    body: Body,
    progress: Arc<StreamProgress>,
}

pin_project! {
    #[project = WatchedProjection]
    struct StallGuarded<F> {
        // `None` once it has ended.
        #[pin]
        stream: Option<F>,
        progress: Arc<StreamProgress>,
        stall: Stall,
        memory: Arc<Memory>,
        connection: Arc<ConnectionState>,
    }
}

/// Limit on a client that does not take the end of a response: none until memory is short.
const WHILE_MEMORY_LASTS: PaceLimit = PaceLimit { pause: Duration::from_secs(365 * 24 * 60 * 60), rate: 0 };

// === impl StreamExecutor ===

impl StreamExecutor {
    /// Creates the executor of a connection.
    pub fn new(allowed: PaceLimit, memory: Arc<Memory>, connection: Arc<ConnectionState>) -> Self {
        Self { allowed, memory, connection, next: Arc::default() }
    }

    /// Creates the state of a stream. Only for the service, when hyper calls it.
    pub(super) fn begin(&self) -> Arc<StreamProgress> {
        let progress = Arc::<StreamProgress>::default();
        let unspawned = self.next.lock().replace(progress.clone());
        debug_assert!(unspawned.is_none(), "hyper called the service twice without spawning a stream");
        progress
    }
}

impl<F: Future + Send + 'static> Executor<F> for StreamExecutor
where
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        // Other futures that hyper spawns have no response, and their fresh state never counts as unread.
        let progress = self.next.lock().take().unwrap_or_default();
        let (memory, connection) = (self.memory.clone(), self.connection.clone());
        let stall = Stall::new(self.allowed);
        tokio::spawn(StallGuarded { stream: Some(stream), progress, stall, memory, connection });
    }
}

// === impl H2ResponseBody ===

impl H2ResponseBody {
    /// Wraps the body of a response whose head is sent next.
    pub(super) fn new(body: Body, progress: Arc<StreamProgress>) -> Self {
        // The client is expected to read from here on.
        progress.record_poll(Some(0), body.relays());
        Self { body, progress }
    }
}

impl http_body::Body for H2ResponseBody {
    type Data = UnsentPart;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<UnsentPart>, BodyError>>> {
        let Self { body, progress } = self.get_mut();
        let part = Pin::new(&mut *body).poll_frame(cx);
        let produced = match &part {
            Poll::Pending => None,
            Poll::Ready(Some(Ok(frame))) => Some(frame.data_ref().map_or(0, Bytes::len)),
            Poll::Ready(_) => Some(0),
        };
        progress.record_poll(produced, body.relays());
        part.map_ok(|frame| frame.map_data(|bytes| progress.send(bytes)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

// === impl Watched ===

impl<F: Future> Future for StallGuarded<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let Some(stream) = this.stream.as_mut().as_pin_mut() else { return this.poll_sent(cx) };
        if stream.poll(cx).is_pending() {
            ready!(this.poll_over(cx));
            this.progress.record_stream_stall();
        }
        // Resets the stream if it has not ended by itself.
        this.stream.set(None);
        if this.progress.unsent() == 0 {
            return Poll::Ready(());
        }
        *this.stall = Stall::new(WHILE_MEMORY_LASTS);
        // The connection was woken before and sends first, so that a client that reads costs no timer.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<F> WatchedProjection<'_, F> {
    /// Polls the limit on slow reading after a poll of the stream. Completes when it has been exceeded.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let produced = self.progress.take_produced();
        if !self.progress.is_unread() {
            // The head has not been sent, or the endpoint has no data: the client has taken all there was.
            self.stall.stop_clock();
            return Poll::Pending;
        }
        if produced > 0 {
            self.stall.credit_read(produced);
        }
        let kept = match self.progress.relays() {
            true => HeldMemory::Unread(UnreadKind::Relay, RELAY_COST_BYTES),
            false => HeldMemory::Answer,
        };
        self.stall.poll_over(self.memory, kept, cx)
    }

    /// Completes when h2 has sent or dropped all data of a stream that has ended, or when its memory is needed elsewhere.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.progress.poll_sent(cx).is_ready() {
            return Poll::Ready(());
        }
        let kept = match self.progress.relays() {
            true => HeldMemory::Unread(UnreadKind::Relay, ANSWER_COST_BYTES + self.progress.unsent()),
            false => HeldMemory::Answer,
        };
        ready!(self.stall.poll_over(self.memory, kept, cx));
        self.connection.break_off();
        Poll::Ready(())
    }
}
