//! Detection of HTTP/2 clients that stop reading one stream: its window stays full, and hyper no longer polls its body.
//!
//! hyper runs each stream as a task. The executor that spawns these tasks wraps them. Every poll shows one of three
//! things: the stream produced data, it waits for the endpoint, or it did not poll the body at all, which is due to the
//! window. If the last persists, or the window opens too slowly, the stream is ended.

use std::{
    cell::Cell,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use hyper::rt::Executor;
use pin_project_lite::pin_project;

use super::{
    memory::{Memory, UnreadKind},
    pace::Allowed,
    stall::{Kept, Stall},
};
use crate::config::budget::RELAY_COST_BYTES;

thread_local! {
    /// Result of polling the body during the current poll of the stream.
    static ASKED: Cell<Asked> = const { Cell::new(Asked::Not) };
    /// The body polled last is the response of a model server.
    static RELAYS: Cell<bool> = const { Cell::new(false) };
    /// A stream is being dropped because its client stopped reading.
    static ENDING: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Not,
    /// Waits for the endpoint, possibly after producing data.
    Waited,
    /// Produced this many bytes.
    Gave(usize),
}

/// Executor for the streams of a connection, with a limit on slow reading.
#[derive(Clone, Debug)]
pub struct StreamExecutor {
    /// Limit while there is memory for unread responses.
    pub allowed: Allowed,
    /// Accounting that shortens the limit when memory is short.
    pub memory: Arc<Memory>,
}

pin_project! {
    struct Watched<F> {
        #[pin]
        stream: Option<F>,
        began: bool,
        relays: bool,
        stall: Stall,
        memory: Arc<Memory>,
    }
}

/// Records a poll of a response body. `gave`: bytes of the part it produced, `None` if it waits for one. `relays`: the
/// body comes from a model server.
pub fn asked(gave: Option<usize>, relays: bool) {
    RELAYS.set(relays);
    ASKED.set(match (gave, ASKED.get()) {
        (None, _) => Asked::Waited,
        (Some(more), Asked::Gave(bytes)) => Asked::Gave(bytes + more),
        (Some(bytes), _) => Asked::Gave(bytes),
    });
}

/// Returns `true` while a stream is dropped because its client stopped reading.
pub fn is_ending() -> bool {
    ENDING.get()
}

impl<F: Future + Send + 'static> Executor<F> for StreamExecutor
where
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        let (stall, memory) = (Stall::new(self.allowed), self.memory.clone());
        tokio::spawn(Watched { stream: Some(stream), began: false, relays: false, stall, memory });
    }
}

impl<F: Future> Future for Watched<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let Some(stream) = this.stream.as_mut().as_pin_mut() else { return Poll::Ready(()) };
        ASKED.set(Asked::Not);
        if stream.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let asked = ASKED.get();
        if asked != Asked::Not {
            (*this.began, *this.relays) = (true, RELAYS.get());
        }
        if !*this.began || asked == Asked::Waited {
            // The head has not been sent, or the endpoint has no data: the client has taken all there was.
            this.stall.rest();
            return Poll::Pending;
        }
        if let Asked::Gave(bytes) = asked {
            this.stall.moved(bytes);
        }
        let kept =
            if *this.relays { Kept::Unread(UnreadKind::Relay, RELAY_COST_BYTES) } else { Kept::Answer };
        let over = this.stall.poll_over(this.memory, kept, cx);
        if over.is_ready() {
            ENDING.set(true);
            this.stream.set(None);
            ENDING.set(false);
        }
        over
    }
}
