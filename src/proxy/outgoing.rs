//! Request bodies sent to endpoints: buffered, or streamed and replayable until the response begins.

use std::{
    iter::successors,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::time::{Sleep, sleep_until};

use super::{
    intake::{BufferedBody, UnreadBody, body_pace, slow_body_error},
    memory::{Memory, Owner, Share},
    pace::Pace,
};
use crate::{config::Limits, error::ProxyError};

/// The body of one dispatch.
#[derive(Debug)]
pub enum OutgoingBody {
    /// A buffered body; `None` if empty or sent.
    Full(Option<Bytes>),
    /// A body that is still arriving from the client.
    Stream(Box<BodyReplay>),
}

/// A request body that streams from the client to an endpoint. Keeps the parts sent so far for a retry; dropped when the
/// response begins.
pub(super) struct StreamedBody(Arc<Mutex<StreamedState>>);

/// One dispatch of a streamed body: first the parts that earlier dispatches sent, then the rest as it arrives.
#[derive(Debug)]
pub struct BodyReplay {
    state: Arc<Mutex<StreamedState>>,
    /// Number of this dispatch, which may read only while it equals [`StreamedState::current`].
    number: u32,
    /// Parts sent by this dispatch.
    sent: usize,
    pace: Pace,
    timer: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
struct StreamedState {
    /// `None` once taken for buffering, or aborted.
    incoming: Option<Incoming>,
    owner: Owner,
    has_ended: bool,
    /// Number of the dispatch that may read. Each dispatch supersedes those before it.
    current: u32,
    /// Number of parts received from the client.
    arrived: usize,
    kept: KeptParts,
    /// Bytes until `limits.maxBodyBytes` is reached.
    left: usize,
}

/// Parts received from the client, for a retry.
#[derive(Debug)]
enum KeptParts {
    /// All parts, as slices of read buffers, with their share of the memory.
    All(Vec<Bytes>, Share),
    /// No parts: the request must not be retried, memory ran out, or the response has begun.
    Nothing,
}

/// Parts kept of one body. Bounds the unaccounted overhead of each part, as a client can send bytes one by one.
const MAX_KEPT_PARTS: usize = 4096;

/// Reason for aborting a streamed body.
#[derive(Debug, thiserror::Error)]
pub enum BodyAbort {
    /// The client closed its connection, or violated the framing.
    #[error("the client aborted its request")]
    Broken(#[from] hyper::Error),
    /// More than `limits.maxBodyBytes`.
    #[error("the body is larger than allowed")]
    TooLarge,
    /// Slower than `limits.bodyTimeout` and `limits.minRate` allow.
    #[error("the body arrived too slowly")]
    TooSlow,
    /// A later dispatch sends the body.
    #[error("the body goes to another endpoint")]
    Superseded,
}

// === impl OutgoingBody ===

impl Body for OutgoingBody {
    type Data = Bytes;
    type Error = BodyAbort;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyAbort>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream(replay) => replay.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Self::Stream(replay) => replay.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Stream(replay) => replay.size_hint(),
        }
    }
}

// === impl StreamedBody ===

impl StreamedBody {
    /// Wraps a body before its first read.
    pub(super) fn new(body: UnreadBody) -> Self {
        Self(Arc::new(Mutex::new(StreamedState {
            incoming: Some(body.incoming),
            owner: body.owner,
            has_ended: false,
            current: 0,
            arrived: 0,
            kept: KeptParts::Nothing,
            left: 0,
        })))
    }

    /// Returns `true` if another dispatch can send the whole body.
    pub(super) fn can_replay(&self) -> bool {
        let state = self.0.lock();
        state.incoming.is_some() && (state.arrived == 0 || matches!(state.kept, KeptParts::All(..)))
    }

    /// Starts a dispatch and supersedes earlier ones. With `keep`, parts are kept while there is memory. Returns `None` if
    /// the body cannot be sent again.
    pub(super) fn replay(&self, limits: &Limits, keep: Option<&Arc<Memory>>) -> Option<OutgoingBody> {
        if !self.can_replay() {
            return None;
        }
        let mut state = self.0.lock();
        if state.arrived == 0 {
            state.left = limits.max_body_bytes.get();
            state.kept = keep.map_or(KeptParts::Nothing, |memory| {
                KeptParts::All(Vec::new(), memory.kept_share(state.owner))
            });
        }
        state.current += 1;
        let (number, pace) = (state.current, Pace::new(body_pace(limits)));
        Some(OutgoingBody::Stream(Box::new(BodyReplay {
            state: self.0.clone(),
            number,
            sent: 0,
            pace,
            timer: None,
        })))
    }

    /// Reads the body to its end and supersedes earlier dispatches.
    ///
    /// # Errors
    /// As [`BufferedBody::read`], and [`ProxyError::Internal`] if it cannot be sent again.
    pub(super) async fn buffer(
        self,
        limits: &Limits,
        memory: &Arc<Memory>,
    ) -> Result<BufferedBody, ProxyError> {
        let (incoming, owner, kept) = {
            let mut state = self.0.lock();
            state.current += 1;
            (state.incoming.take(), state.owner, std::mem::replace(&mut state.kept, KeptParts::Nothing))
        };
        let (parts, share) = match kept {
            KeptParts::All(parts, mut share) => {
                share.wait();
                (parts, share)
            }
            KeptParts::Nothing => (Vec::new(), memory.share(owner)),
        };
        let incoming = incoming.ok_or(ProxyError::Internal)?;
        BufferedBody::read_rest((parts, share), incoming, limits, memory, 0).await
    }
}

impl Drop for StreamedBody {
    fn drop(&mut self) {
        self.0.lock().kept = KeptParts::Nothing;
    }
}

// === impl BodyReplay ===

impl BodyReplay {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyAbort>>> {
        let mut state = self.state.lock();
        if state.current != self.number || state.incoming.is_none() {
            return Poll::Ready(Some(Err(BodyAbort::Superseded)));
        }
        if self.sent < state.arrived {
            let part = state.kept.get(self.sent).ok_or(BodyAbort::Superseded);
            self.sent += 1;
            return Poll::Ready(Some(part.map(Frame::data)));
        }
        let polled = match state.poll_arrival(cx) {
            Poll::Pending => {
                let timer =
                    self.timer.get_or_insert_with(|| Box::pin(sleep_until(self.pace.start_waiting())));
                ready!(timer.as_mut().poll(cx));
                Some(Err(BodyAbort::TooSlow))
            }
            Poll::Ready(polled) => polled,
        };
        match &polled {
            Some(Ok(frame)) => {
                self.timer = None;
                self.pace.credit_bytes(frame.data_ref().map_or(0, Bytes::len));
                self.sent += 1;
            }
            // A later dispatch must not take the parts so far for the whole body.
            Some(Err(_)) => state.incoming = None,
            None => state.has_ended = true,
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        let state = self.state.lock();
        self.sent == state.arrived && state.incoming.as_ref().is_some_and(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.state.lock();
        let mut hint = state.incoming.as_ref().map(Incoming::size_hint).unwrap_or_default();
        let kept = state.kept.bytes_from(self.sent);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + kept);
        }
        hint.set_lower(hint.lower() + kept);
        hint
    }
}

// === impl StreamedState ===

impl StreamedState {
    /// Polls the client for the next part, and keeps it.
    fn poll_arrival(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyAbort>>> {
        let Some(incoming) = self.incoming.as_mut().filter(|_| !self.has_ended) else {
            return Poll::Ready(None);
        };
        let frame = match ready!(Pin::new(incoming).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other.map(|frame| frame.map_err(BodyAbort::from))),
        };
        let part = frame.data_ref();
        match self.left.checked_sub(part.map_or(0, Bytes::len)) {
            None => return Poll::Ready(Some(Err(BodyAbort::TooLarge))),
            Some(left) => self.left = left,
        }
        self.kept.push(part);
        self.arrived += 1;
        Poll::Ready(Some(Ok(frame)))
    }
}

// === impl KeptParts ===

impl KeptParts {
    fn get(&self, part: usize) -> Option<Bytes> {
        match self {
            Self::All(parts, _) => parts.get(part).cloned(),
            Self::Nothing => None,
        }
    }

    fn bytes_from(&self, part: usize) -> u64 {
        match self {
            Self::All(parts, _) => parts.iter().skip(part).map(|part| part.len() as u64).sum(),
            Self::Nothing => 0,
        }
    }

    /// Keeps a part. Drops all parts if it cannot, or for trailers (`None`).
    fn push(&mut self, part: Option<&Bytes>) {
        let Self::All(parts, share) = self else { return };
        match part {
            Some(part) if parts.len() < MAX_KEPT_PARTS && share.grow(part.len()) => parts.push(part.clone()),
            _ => *self = Self::Nothing,
        }
    }
}

// === impl BodyAbort ===

impl BodyAbort {
    /// Finds an aborted body among the causes of `error`, and returns the error for the client.
    pub(super) fn from_error_chain(
        error: &(dyn std::error::Error + 'static),
        limits: &Limits,
    ) -> Option<ProxyError> {
        let mut causes = successors(Some(error), |error| error.source());
        match causes.find_map(|cause| cause.downcast_ref::<Self>())? {
            Self::TooLarge => Some(ProxyError::RequestTooLarge { limit: limits.max_body_bytes.get() }),
            Self::TooSlow => Some(slow_body_error(limits)),
            Self::Broken(_) => Some(ProxyError::InvalidRequest("The request body was aborted.".into())),
            Self::Superseded => None,
        }
    }
}
