//! HTTP/2 clients that stop reading one stream: its window stays full, and hyper asks its body for nothing.
//!
//! hyper runs each stream as a task of its own. The executor that spawns them wraps each in a watch: after every poll
//! it is known whether the stream handed something out, waited for the endpoint, or did not get to ask the body at
//! all, which is because of the window. That for too long, or a window that opens too slowly, ends the stream.

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
    /// What the body of the stream that is being polled did.
    static ASKED: Cell<Asked> = const { Cell::new(Asked::Not) };
    /// The last body that was asked is the answer of a model server.
    static RELAYS: Cell<bool> = const { Cell::new(false) };
    /// A stream is being ended because its client stopped reading.
    static ENDING: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Not,
    /// It waits for the endpoint; before that it may have given something.
    Waited,
    /// So many bytes.
    Gave(usize),
}

/// Spawns the streams of a connection, each with a limit to how slowly its client may read.
#[derive(Clone, Debug)]
pub struct StreamExecutor {
    /// The limit while there is memory for answers that are not read.
    pub allowed: Allowed,
    /// Where that is seen.
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

/// A body has been asked for its next part, and gave one of so many bytes or has to wait for it. `relays`: that comes from a model
/// server.
pub fn asked(gave: Option<usize>, relays: bool) {
    RELAYS.set(relays);
    ASKED.set(match (gave, ASKED.get()) {
        (None, _) => Asked::Waited,
        (Some(more), Asked::Gave(bytes)) => Asked::Gave(bytes + more),
        (Some(bytes), _) => Asked::Gave(bytes),
    });
}

/// Whether what is being dropped ends because its client stopped reading.
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
            // The head is not out yet, or the endpoint has nothing: no fault of the client's, which has all there was.
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
