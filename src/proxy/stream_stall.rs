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
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::rt::Executor;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    memory::Memory,
    pace::{Allowed, Pace},
};

thread_local! {
    /// What the body of the stream that is being polled did.
    static ASKED: Cell<Asked> = const { Cell::new(Asked::Not) };
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

/// How long a stream may not be read while there is little memory left for answers.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(1);

pin_project! {
    struct Watched<F> {
        #[pin]
        stream: Option<F>,
        began: bool,
        pace: Pace,
        timer: Option<Pin<Box<Sleep>>>,
        memory: Arc<Memory>,
    }
}

/// A body has been asked for its next part, and gave one of so many bytes or has to wait for it.
pub fn asked(gave: Option<usize>) {
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
        let (pace, memory) = (Pace::new(self.allowed), self.memory.clone());
        tokio::spawn(Watched { stream: Some(stream), began: false, pace, timer: None, memory });
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
            // The head is not out yet, or the endpoint has nothing: no fault of the client's, which has all there was.
            this.pace.moved(usize::MAX);
            *this.timer = None;
            return Poll::Pending;
        }
        if let Asked::Gave(bytes) = asked {
            this.pace.moved(bytes);
        }
        let due = this.pace.waits();
        loop {
            let now = Instant::now();
            let is_unread = this.pace.waited() >= UNREAD_TIMEOUT && this.memory.is_short_of_answers();
            if due <= now || is_unread {
                ENDING.set(true);
                this.stream.set(None);
                ENDING.set(false);
                return Poll::Ready(());
            }
            // Whether memory is short is not notified.
            let next = due.min(now + UNREAD_TIMEOUT);
            let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(next)));
            if timer.deadline() > next || timer.is_elapsed() {
                timer.as_mut().reset(next);
            }
            ready!(timer.as_mut().poll(cx));
        }
    }
}
