//! A request being answered: step by step, so that one that waits keeps no room for what it took to get there.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::Response;

use super::{body::Body, memory::AnswersFull};

/// A request on its way to an answer. Dropping it gives it up.
///
/// Its steps are on the heap: hyper keeps the room of what it polls for as long as the connection lives, also while a
/// client does nothing. And a request that is held for minutes is as large as the step that it is in.
pub struct Answering(Step);

/// A part of the way.
pub(super) type Step = Pin<Box<dyn Future<Output = Next> + Send>>;

/// What a step comes to.
#[expect(clippy::large_enum_variant, reason = "the large one is the usual one, and on its way out")]
pub(super) enum Next {
    /// The answer, or none: then the stream or the connection ends.
    Answer(Result<Response<Body>, AnswersFull>),
    /// Another step, in place of this one.
    Step(Step),
}

/// A request that waits: at its end there is an answer, whatever it is.
pub(super) type Held = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// How far a request got.
#[expect(clippy::large_enum_variant, reason = "the large one is the usual one, and on its way out")]
pub(super) enum Served {
    /// To its answer.
    Answer(Response<Body>),
    /// Into the queue.
    Held(Held),
}

// === impl Answering ===

impl Answering {
    pub(super) const fn new(step: Step) -> Self {
        Self(step)
    }
}

impl Future for Answering {
    type Output = Result<Response<Body>, AnswersFull>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            match ready!(self.0.as_mut().poll(cx)) {
                Next::Answer(answer) => return Poll::Ready(answer),
                Next::Step(step) => self.0 = step,
            }
        }
    }
}

// === impl Served ===

impl From<Response<Body>> for Served {
    fn from(response: Response<Body>) -> Self {
        Self::Answer(response)
    }
}
