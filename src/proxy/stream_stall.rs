//! HTTP/2 clients that stop reading one stream: its window stays full, and hyper asks its body for nothing.
//!
//! hyper runs each stream as a task of its own. The executor that spawns them wraps each in a watch: after every poll
//! it is known whether the stream handed something out, waited for the endpoint, or did not get to ask the body at
//! all, which is because of the window. That for too long ends the stream.

use std::{
    cell::Cell,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use hyper::rt::Executor;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep};

thread_local! {
    /// What the body of the stream that is being polled did.
    static ASKED: Cell<Asked> = const { Cell::new(Asked::Not) };
    /// A stream is being ended because its client stopped reading.
    static ENDING: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Not,
    Waited,
    Gave,
}

/// Spawns the streams of a connection, each with a limit to how long its client may read nothing.
#[derive(Clone, Copy, Debug)]
pub struct StreamExecutor(pub Duration);

pin_project! {
    struct Watched<F> {
        #[pin]
        stream: Option<F>,
        stall: Duration,
        began: bool,
        timer: Option<Pin<Box<Sleep>>>,
    }
}

/// A body has been asked for its next part, and gave one or has to wait for it.
pub fn asked(gave: bool) {
    ASKED.set(if gave { Asked::Gave } else { Asked::Waited });
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
        tokio::spawn(Watched { stream: Some(stream), stall: self.0, began: false, timer: None });
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
        *this.began |= asked != Asked::Not;
        if !*this.began || asked == Asked::Waited {
            // The head is not out yet, or the endpoint has nothing: no fault of the client's.
            *this.timer = None;
            return Poll::Pending;
        }
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(*this.stall)));
        if asked == Asked::Gave {
            timer.as_mut().reset(Instant::now() + *this.stall);
        }
        if timer.as_mut().poll(cx).is_ready() {
            ENDING.set(true);
            this.stream.set(None);
            ENDING.set(false);
            return Poll::Ready(());
        }
        Poll::Pending
    }
}
