//! Response bodies: short ones of the proxy, those relayed from an endpoint, and early ones that keep a waiting client
//! informed.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use thiserror::Error;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::{
    decoder::ContentDecoder,
    exchange::Exchange,
    first_token::TokenWatch,
    forward,
    heartbeat::ResponseHeartbeats,
    lease::Lease,
    memory::{AnswersFull, Memory},
    responses::watch::ResponseIdWatch,
};
use crate::{domain::Period, error::Outcome, history::Event, openai};

/// Maximum decoded size of a response that had to be read as a whole, in bytes.
const MAX_DECODED_BYTES: usize = 1 << 20;

/// Body of a response.
pub enum Body {
    /// Body of the proxy's own response.
    Full(Option<Bytes>, Option<Exchange>),
    /// Body of an endpoint's response.
    Relay(Relay),
    /// Body of an early response to a client whose request is held.
    Early(Pin<Box<dyn EarlyBody>>),
}

/// Body of an early response. A trait, so that this module does not depend on `keepalive`.
pub trait EarlyBody: http_body::Body<Data = Bytes, Error = BodyError> + Send {
    /// Returns `true` once the body relays a model server's response, or the error in its place.
    fn relays(&self) -> bool;
}

/// An endpoint's response, relayed part by part. Owns the permit: the request is in flight until the last byte.
pub struct Relay {
    /// Bytes read before relaying began.
    begun: Option<Bytes>,
    incoming: Incoming,
    lease: Option<Lease>,
    exchange: Exchange,
    idle: IdleTimeout,
    /// Sends heartbeats during pauses.
    beats: Option<Box<ResponseHeartbeats>>,
    /// Decodes a content coding that the head sent to the client does not name.
    decoder: Option<Box<ContentDecoder>>,
    /// Detects the first token, if a cold start waits for it.
    first_token_watch: Option<Box<TokenWatch>>,
    /// Detects the id of a response that the server stores.
    stored_id_watch: Option<Box<ResponseIdWatch>>,
    /// Deadline of the whole response.
    response_deadline: Option<Pin<Box<Sleep>>>,
    /// Error to return after the parts before it have been sent.
    failed: Option<Box<BodyError>>,
}

/// Idle timeout of the endpoint, and heartbeats within it. The timer is armed once and checked when it fires, so that a
/// part costs no timer operation; the timeout takes effect after one to two times its length.
struct IdleTimeout {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    progress: bool,
}

/// Threshold that a pause has reached.
enum IdleThreshold {
    /// A heartbeat is due.
    Beat,
    /// The idle timeout has passed.
    Over,
}

/// Reason for breaking off a response. The client's connection ends before the message does.
#[derive(Debug, Error)]
pub enum BodyError {
    #[error("the endpoint broke its answer off: {0}")]
    Broken(hyper::Error),
    #[error("the endpoint paused its answer for more than {}", Period::from(*.0))]
    Paused(Duration),
    #[error("the request exceeded `timeouts.request` of the route")]
    TookTooLong,
    #[error(
        "the endpoint encoded its answer as `{0}`, which it was asked not to and which cannot be decoded here"
    )]
    Encoded(String),
    #[error("the endpoint encoded its answer, which cannot be decoded: {0}")]
    Undecodable(io::Error),
    #[error("the endpoint answered with {0}, and the client was told that it would be {1}")]
    Form(String, &'static str),
}

// === impl Body ===

impl Body {
    /// Creates a response of the proxy to a request that was not admitted.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        Self::Full(Some(bytes.into()).filter(|bytes| !bytes.is_empty()), None)
    }

    /// Creates a response of the proxy to an admitted request. The request ends with this response.
    pub fn for_admitted(bytes: Bytes, exchange: Exchange) -> Self {
        Self::Full(Some(bytes), Some(exchange))
    }

    /// Counts a response of the proxy until it has been sent; see [`Memory::answer`].
    pub(super) fn counted(self, memory: &Arc<Memory>, is_only: bool) -> Result<Self, AnswersFull> {
        match self {
            Self::Full(Some(bytes), exchange) => {
                Ok(Self::Full(Some(memory.answer(bytes, is_only)?), exchange))
            }
            other => Ok(other),
        }
    }

    /// Decodes the content coding that the head of the response names, as the head sent to the client names none.
    pub(super) fn decode(&mut self, head: &HeaderMap) -> Result<(), BodyError> {
        let Some(decoder) = ContentDecoder::of(head).map_err(BodyError::Encoded)? else { return Ok(()) };
        match self {
            Self::Relay(relay) => relay.decoder = Some(decoder),
            Self::Full(Some(bytes), _) => {
                *bytes = decoder
                    .whole(std::mem::take(bytes), MAX_DECODED_BYTES)
                    .map_err(BodyError::Undecodable)?;
            }
            Self::Full(None, _) | Self::Early(_) => {}
        }
        Ok(())
    }

    /// Sends heartbeats from here on.
    pub(super) fn inform(&mut self, beats: ResponseHeartbeats) {
        if let Self::Relay(relay) = self {
            relay.beats = Some(Box::new(beats));
        }
    }

    /// Sets the model name that heartbeats contain.
    pub(super) fn name_model(&mut self, model: Option<Box<str>>) {
        if let Self::Relay(Relay { beats: Some(beats), .. }) = self {
            beats.name_model(model);
        }
    }

    /// Returns `true` if the bytes come from a model server.
    pub(super) fn relays(&self) -> bool {
        match self {
            Self::Full(..) => false,
            Self::Relay(_) => true,
            Self::Early(early) => early.relays(),
        }
    }

    /// Ends a response that cannot be used, and accounts for `error`.
    pub(super) fn give_up(&mut self, error: BodyError) -> BodyError {
        match self {
            Self::Relay(relay) => return relay.fail(error),
            Self::Full(_, Some(exchange)) => exchange.fail_response(&error),
            Self::Full(_, None) | Self::Early(_) => {}
        }
        error
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Full(bytes, _) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Relay(relay) => relay.poll_frame(cx),
            Self::Early(early) => early.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes, _) => bytes.is_none(),
            Self::Relay(relay) => relay.is_end_stream(),
            Self::Early(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes, _) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Relay(relay) => relay.incoming.size_hint(),
            Self::Early(_) => SizeHint::default(),
        }
    }
}

// === impl Relay ===

impl Relay {
    /// Relays an endpoint's response, which must be complete by `deadline`.
    pub(super) fn new(
        incoming: Incoming,
        lease: Lease,
        exchange: Exchange,
        deadline: Option<Instant>,
        watch: Option<Box<TokenWatch>>,
        made: Option<Box<ResponseIdWatch>>,
        beats: Option<Box<ResponseHeartbeats>>,
    ) -> Self {
        let limit = exchange.gate().policy().upstream.idle_timeout.get();
        exchange.relays();
        let mut relay = Self {
            begun: None,
            incoming,
            lease: Some(lease),
            exchange,
            idle: IdleTimeout { limit, timer: None, progress: false },
            beats,
            decoder: None,
            first_token_watch: watch,
            stored_id_watch: made,
            response_deadline: deadline.map(|deadline| Box::pin(sleep_until(deadline))),
            failed: None,
        };
        if relay.incoming.is_end_stream() {
            relay.complete();
        }
        relay
    }

    /// Prepends bytes of the response that have been read already.
    pub(super) fn begun_with(mut self, begun: Bytes) -> Self {
        self.begun = Some(begun).filter(|begun| !begun.is_empty());
        self
    }

    /// Returns the account of the request.
    pub const fn exchange(&mut self) -> &mut Exchange {
        &mut self.exchange
    }

    /// Polls for the next part. Errors are returned one poll later: on an error hyper drops what it has not written
    /// yet, which may include the head.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Some(Err(*error)));
        }
        match ready!(self.poll_next(cx)) {
            Some(Err(error)) => {
                self.failed = Some(Box::new(error));
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            part => Poll::Ready(part),
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(over) = &mut self.response_deadline
            && over.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(self.fail(BodyError::TookTooLong))));
        }
        let frame = match self.poll_part(cx) {
            Poll::Pending => return self.poll_pause(cx),
            Poll::Ready(frame) => frame,
        };
        match frame {
            // Completes the request without another poll if this part is known to be the last, such as trailers. SDKs
            // often disconnect after the last event of a stream, before they see the end of the response: it counts as
            // complete.
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    forward::remove_reserved(trailers);
                }
                if let Some(watch) = &mut self.first_token_watch
                    && frame.data_ref().is_some_and(|data| watch.observe(data))
                {
                    self.first_token_watch = None;
                    self.exchange.record(Event::FirstToken);
                }
                if let Some(made) = &mut self.stored_id_watch
                    && frame.data_ref().is_some_and(|data| made.observe(data))
                {
                    self.stored_id_watch = None;
                }
                if frame.is_trailers() || self.is_end_stream() {
                    self.complete();
                } else if frame.data_ref().is_some_and(|data| data.ends_with(openai::DONE)) {
                    self.exchange.end(Outcome::Completed);
                }
                let frame = if self.beats.is_some() { self.after_beats(frame) } else { frame };
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(self.fail(error)))),
            None => {
                self.complete();
                Poll::Ready(None)
            }
        }
    }

    /// Polls for the next part of the response, decoded if necessary.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.decoder.is_some() {
            return self.poll_decoded(cx);
        }
        let frame = ready!(poll_incoming(&mut self.begun, &mut self.incoming, cx));
        self.record_arrival();
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Broken)))
    }

    fn poll_decoded(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let Some(decoder) = &mut self.decoder else { return Poll::Ready(None) };
            match decoder.next() {
                Ok(Some(part)) => return Poll::Ready(Some(Ok(Frame::data(part)))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(BodyError::Undecodable(error)))),
            }
            let frame = ready!(poll_incoming(&mut self.begun, &mut self.incoming, cx));
            self.record_arrival();
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(part) => {
                        if let Some(decoder) = &mut self.decoder {
                            decoder.push(part);
                        }
                    }
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(BodyError::Broken(error)))),
                None => {
                    let rest = self.decoder.take().map(|decoder| decoder.finish());
                    return Poll::Ready(match rest {
                        Some(Ok(rest)) if !rest.is_empty() => Some(Ok(Frame::data(rest))),
                        Some(Err(error)) => Some(Err(BodyError::Undecodable(error))),
                        _ => None,
                    });
                }
            }
        }
    }

    fn record_arrival(&mut self) {
        self.idle.progress = true;
        if let Some(beats) = &mut self.beats {
            beats.record_part();
        }
    }

    /// Polls the timers of a pause, which may produce a heartbeat.
    fn poll_pause(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let pause = ready!(self.idle.poll(cx, self.beats.as_deref_mut()));
            let beats = self.beats.as_mut().filter(|_| matches!(pause, IdleThreshold::Beat));
            let Some(beats) = beats else {
                let paused = BodyError::Paused(self.idle.limit);
                return Poll::Ready(Some(Err(self.fail(paused))));
            };
            if let Some(beat) = beats.beat(self.exchange.id(), self.exchange.started().elapsed()) {
                self.exchange.record(Event::Heartbeat);
                return Poll::Ready(Some(Ok(Frame::data(beat))));
            }
        }
    }

    /// Passes a part of the response on, after an empty event if the last heartbeats require one.
    fn after_beats(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        let Some(beats) = &mut self.beats else { return frame };
        let frame = frame.map_data(|part| beats.pass(part, self.exchange.id()));
        if beats.is_finished() {
            self.beats = None;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.decoder.is_none() && self.begun.is_none() && self.incoming.is_end_stream()
    }

    /// Releases the endpoint for the next request, as the whole response has been read, even if the client has not
    /// received all of it.
    fn complete(&mut self) {
        self.first_token_watch = None;
        if let Some(Lease { connection, pool, permit }) = self.lease.take() {
            pool.put_back(connection);
            drop(permit);
            self.exchange.end(Outcome::Completed);
        }
    }

    fn fail(&mut self, error: BodyError) -> BodyError {
        self.lease = None;
        self.first_token_watch = None;
        self.exchange.fail_response(&error);
        error
    }
}

/// Polls for the next part as sent by the endpoint, starting with the bytes read before.
fn poll_incoming(
    begun: &mut Option<Bytes>,
    incoming: &mut Incoming,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
    match begun.take() {
        Some(begun) => Poll::Ready(Some(Ok(Frame::data(begun)))),
        None => Pin::new(incoming).poll_frame(cx),
    }
}

impl IdleTimeout {
    /// Completes when the pause reaches the idle timeout, or when a heartbeat is due.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut beats: Option<&mut ResponseHeartbeats>,
    ) -> Poll<IdleThreshold> {
        loop {
            let due = beats.as_mut().map(|beats| beats.due(self.limit));
            let timer = self.timer.get_or_insert_with(|| {
                self.progress = false;
                Box::pin(match due {
                    Some((beat, over)) => sleep_until(beat.min(over)),
                    None => sleep(self.limit),
                })
            });
            ready!(timer.as_mut().poll(cx));
            self.timer = None;
            match due {
                _ if self.progress => {}
                Some((_, over)) if Instant::now() < over => return Poll::Ready(IdleThreshold::Beat),
                _ => return Poll::Ready(IdleThreshold::Over),
            }
        }
    }
}
