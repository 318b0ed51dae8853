//! The future of one request: a chain of boxed steps, so that a held request keeps only the memory of its current step.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::Response;

use super::{body::Body, memory::AnswersFull};

/// Resolves to the response. Dropping it cancels the request.
///
/// Steps are boxed because hyper reserves space for its service future for the lifetime of the connection, idle or not.
pub struct ResponseFuture(StepFuture);

/// One step towards the response.
pub(super) type StepFuture = Pin<Box<dyn Future<Output = NextStep> + Send>>;

/// Result of a step.
#[expect(clippy::large_enum_variant, reason = "the large variant is the common one")]
pub(super) enum NextStep {
    /// The response; on an error the stream or connection is closed without one.
    Answer(Result<Response<Body>, AnswersFull>),
    /// Replaces the current step.
    Continue(StepFuture),
}

/// A held request. Resolves to a response in every case, including errors.
pub(super) type HeldRequest = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// State of a request after routing and admission.
#[expect(clippy::large_enum_variant, reason = "the large variant is the common one")]
pub(super) enum ServeProgress {
    /// Answered, by an endpoint or by the proxy.
    Answer(Response<Body>),
    /// In the hold queue.
    Held(HeldRequest),
}

// === impl ResponseFuture ===

impl ResponseFuture {
    pub(super) const fn new(step: StepFuture) -> Self {
        Self(step)
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, AnswersFull>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            match ready!(self.0.as_mut().poll(cx)) {
                NextStep::Answer(answer) => return Poll::Ready(answer),
                NextStep::Continue(step) => self.0 = step,
            }
        }
    }
}

// === impl ServeProgress ===

impl From<Response<Body>> for ServeProgress {
    fn from(response: Response<Body>) -> Self {
        Self::Answer(response)
    }
}
