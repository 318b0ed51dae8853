//! Bodies of answers: our own short ones, an endpoint's as it comes, and one that keeps a waiting client informed.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use thiserror::Error;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::{
    exchange::Exchange, first_token::TokenWatch, intake::Outgoing, keepalive::KeptAlive,
    responses::NewResponse, stream_stall,
};
use crate::{
    admission::Permit,
    domain::Period,
    error::Outcome,
    openai,
    upstream::{Connection, Upstream},
};

/// The body of an answer.
pub enum Body {
    /// Ours.
    Full(Option<Bytes>, Option<Exchange>),
    /// An endpoint's.
    Relay(Relay),
    /// An early answer to a client that waits.
    KeptAlive(Box<KeptAlive>),
}

/// An endpoint's answer, passed on part by part. It owns the permit: the request is in flight until its last byte.
pub struct Relay {
    /// What was read of it before it was passed on.
    begun: Option<Bytes>,
    incoming: Incoming,
    lease: Option<Lease>,
    exchange: Exchange,
    idle: Idle,
    /// Looks for the first token, where a cold start waits for it.
    watch: Option<Box<TokenWatch>>,
    /// Looks for the id of a response that the server keeps.
    made: Option<Box<NewResponse>>,
    /// When all of it must be out.
    over: Option<Pin<Box<Sleep>>>,
}

/// What a request in flight holds on to. The fields are dropped in their order: the connection before the permit, so
/// that who gets the permit next does not meet the request that it replaces.
pub struct Lease {
    /// Where it came over.
    pub connection: Connection<Outgoing>,
    /// Where that goes back to.
    pub pool: Arc<Upstream<Outgoing>>,
    /// The right to be in flight.
    pub permit: Permit,
}

/// How long the endpoint may pause. Armed once and looked at when it fires, so that a part costs no timer operation;
/// it strikes after one to two times the limit.
struct Idle {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    progress: bool,
}

/// Why an answer breaks off. The client sees a connection that ends before its message does.
#[derive(Debug, Error)]
pub enum BodyError {
    #[error("the endpoint broke its answer off: {0}")]
    Broken(hyper::Error),
    #[error("the endpoint paused its answer for more than {}", Period::from(*.0))]
    Paused(Duration),
    #[error("the request took longer than its route allows")]
    TookTooLong,
}

// === impl Body ===

impl Body {
    /// An answer of ours to a request that was not admitted.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        Self::Full(Some(bytes.into()).filter(|bytes| !bytes.is_empty()), None)
    }

    /// An answer of ours to an admitted request, which ends with it.
    pub fn ending(bytes: Bytes, exchange: Exchange) -> Self {
        Self::Full(Some(bytes), Some(exchange))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let part = match self.get_mut() {
            Self::Full(bytes, _) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Relay(relay) => relay.poll_frame(cx),
            Self::KeptAlive(kept) => kept.poll_frame(cx),
        };
        stream_stall::asked(match &part {
            Poll::Pending => None,
            Poll::Ready(Some(Ok(frame))) => Some(frame.data_ref().map_or(0, Bytes::len)),
            Poll::Ready(_) => Some(0),
        });
        part
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes, _) => bytes.is_none(),
            Self::Relay(relay) => relay.is_end_stream(),
            Self::KeptAlive(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes, _) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Relay(relay) => relay.incoming.size_hint(),
            Self::KeptAlive(_) => SizeHint::default(),
        }
    }
}

// === impl Relay ===

impl Relay {
    /// Passes an endpoint's answer on, which must be out at `deadline`.
    pub(super) fn new(
        incoming: Incoming,
        lease: Lease,
        exchange: Exchange,
        deadline: Option<Instant>,
        watch: Option<Box<TokenWatch>>,
        made: Option<Box<NewResponse>>,
    ) -> Self {
        let limit = exchange.gate().policy().upstream.idle_timeout.get();
        let mut relay = Self {
            begun: None,
            incoming,
            lease: Some(lease),
            exchange,
            idle: Idle { limit, timer: None, progress: false },
            watch,
            made,
            over: deadline.map(|deadline| Box::pin(sleep_until(deadline))),
        };
        if relay.incoming.is_end_stream() {
            relay.complete();
        }
        relay
    }

    /// The same, of an answer of which this has been read already.
    pub(super) fn begun_with(mut self, begun: Bytes) -> Self {
        self.begun = Some(begun).filter(|begun| !begun.is_empty());
        self
    }

    /// The account of the request.
    pub const fn exchange(&mut self) -> &mut Exchange {
        &mut self.exchange
    }

    /// The next part.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(begun) = self.begun.take() {
            return Poll::Ready(Some(Ok(Frame::data(begun))));
        }
        if let Some(over) = &mut self.over
            && over.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(self.fail(BodyError::TookTooLong))));
        }
        let frame = match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Pending => {
                ready!(self.idle.poll(cx));
                let paused = BodyError::Paused(self.idle.limit);
                return Poll::Ready(Some(Err(self.fail(paused))));
            }
            Poll::Ready(frame) => frame,
        };
        self.idle.progress = true;
        match frame {
            // The last part may be known to be the last, as trailers are: then nobody asks for another. After the last
            // event of a stream the SDKs hang up, often before they see that the answer ends there: they have it all.
            Some(Ok(frame)) => {
                if let Some(watch) = &mut self.watch
                    && frame.data_ref().is_some_and(|data| watch.sees(data))
                {
                    self.watch = None;
                    self.exchange.first_token();
                }
                if let Some(made) = &mut self.made
                    && frame.data_ref().is_some_and(|data| made.sees(data))
                {
                    self.made = None;
                }
                if frame.is_trailers() || self.incoming.is_end_stream() {
                    self.complete();
                } else if frame.data_ref().is_some_and(|data| data.ends_with(openai::DONE)) {
                    self.exchange.end(Outcome::Completed);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(self.fail(BodyError::Broken(error))))),
            None => {
                self.complete();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.begun.is_none() && self.incoming.is_end_stream()
    }

    /// All of it has been read: the endpoint is free for the next, whether or not the client has it all.
    fn complete(&mut self) {
        self.watch = None;
        if let Some(Lease { connection, pool, permit }) = self.lease.take() {
            pool.put_back(connection);
            drop(permit);
            self.exchange.end(Outcome::Completed);
        }
    }

    fn fail(&mut self, error: BodyError) -> BodyError {
        self.lease = None;
        self.watch = None;
        self.exchange.broke(&error);
        error
    }
}

impl Idle {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let timer = self.timer.get_or_insert_with(|| {
                self.progress = false;
                Box::pin(sleep(self.limit))
            });
            ready!(timer.as_mut().poll(cx));
            if !std::mem::take(&mut self.progress) {
                return Poll::Ready(());
            }
            self.timer = None;
        }
    }
}
