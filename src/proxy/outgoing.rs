//! Request bodies on their way to an endpoint: buffered ones, and streamed ones that can be replayed until the answer
//! begins.

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
    intake::{Buffered, Unread, allowed, too_slow},
    memory::{Memory, Share},
    pace::Pace,
};
use crate::{config::Limits, error::ProxyError, places::Source};

/// The body of one dispatch.
#[derive(Debug)]
pub enum Outgoing {
    /// Buffered; taken when it is sent.
    Full(Option<Bytes>),
    /// As it arrives from the client.
    Stream(Box<Replay>),
}

/// A request body that streams from the client to an endpoint. Until the answer begins, the parts that were passed on are
/// kept, so that another dispatch can send them again. Dropping it forgets them.
pub(super) struct Streamed(Arc<Mutex<StreamedState>>);

/// One dispatch of a streamed body: the parts that earlier dispatches passed on, then the rest as it arrives.
#[derive(Debug)]
pub struct Replay {
    state: Arc<Mutex<StreamedState>>,
    number: u32,
    /// How many parts this dispatch has passed on.
    passed: usize,
    pace: Pace,
    timer: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
struct StreamedState {
    /// `None` once it has been taken to be buffered, or was cut off.
    incoming: Option<Incoming>,
    source: Source,
    /// All of it has come.
    has_ended: bool,
    /// The dispatch that may read. Each later one supersedes those before it.
    current: u32,
    /// How many parts have come from the client.
    arrived: usize,
    kept: KeptParts,
    /// How many more bytes may come.
    left: usize,
}

/// The parts that have come from the client.
#[derive(Debug)]
enum KeptParts {
    /// All of them, as slices of read buffers, with their share of the memory.
    All(Vec<Bytes>, Share),
    /// Nothing: the request may be written only once, there was no memory left, or the answer has begun.
    Nothing,
}

/// The most parts that are kept of one body. Each takes memory of its own, which is not counted, and a client
/// can send bytes one by one.
const MAX_KEPT_PARTS: usize = 4096;

/// Why a streamed body was cut off.
#[derive(Debug, thiserror::Error)]
pub enum CutOff {
    /// The client closed its connection, or sent what is not a body.
    #[error("the client broke its request off")]
    Broken(#[from] hyper::Error),
    /// More than `limits.maxBodyBytes`.
    #[error("the body is larger than allowed")]
    TooLarge,
    /// Slower than `limits.bodyTimeout` and `limits.minRate` allow.
    #[error("the body stopped arriving, or came too slowly")]
    TooSlow,
    /// The endpoint had failed by then.
    #[error("the body goes to another endpoint")]
    Superseded,
}

// === impl Outgoing ===

impl Body for Outgoing {
    type Data = Bytes;
    type Error = CutOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
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

// === impl Streamed ===

impl Streamed {
    /// A body of which nothing has been read.
    pub(super) fn new(body: Unread) -> Self {
        Self(Arc::new(Mutex::new(StreamedState {
            incoming: Some(body.incoming),
            source: body.source,
            has_ended: false,
            current: 0,
            arrived: 0,
            kept: KeptParts::Nothing,
            left: 0,
        })))
    }

    /// Returns whether another dispatch can send all of it.
    pub(super) fn is_left(&self) -> bool {
        let state = self.0.lock();
        state.incoming.is_some() && (state.arrived == 0 || matches!(state.kept, KeptParts::All(..)))
    }

    /// Begins a dispatch, and cuts off those before it. With `keep`, the parts are kept for as long as there is
    /// memory for them. Returns `None` if the body cannot be sent again.
    pub(super) fn replay(&self, limits: &Limits, keep: Option<&Arc<Memory>>) -> Option<Outgoing> {
        if !self.is_left() {
            return None;
        }
        let mut state = self.0.lock();
        if state.arrived == 0 {
            state.left = limits.max_body_bytes.get();
            state.kept = keep.map_or(KeptParts::Nothing, |memory| {
                KeptParts::All(Vec::new(), memory.kept_share(state.source))
            });
        }
        state.current += 1;
        let (number, pace) = (state.current, Pace::new(allowed(limits)));
        Some(Outgoing::Stream(Box::new(Replay {
            state: self.0.clone(),
            number,
            passed: 0,
            pace,
            timer: None,
        })))
    }

    /// Reads the body to its end, and cuts off the dispatches before.
    ///
    /// # Errors
    /// As [`Buffered::read`], and [`ProxyError::Internal`] if it cannot be sent again.
    pub(super) async fn buffer(self, limits: &Limits, memory: &Arc<Memory>) -> Result<Buffered, ProxyError> {
        let (incoming, source, kept) = {
            let mut state = self.0.lock();
            state.current += 1;
            (state.incoming.take(), state.source, std::mem::replace(&mut state.kept, KeptParts::Nothing))
        };
        let (parts, share) = match kept {
            KeptParts::All(parts, mut share) => {
                share.wait();
                (parts, share)
            }
            KeptParts::Nothing => (Vec::new(), memory.share(source)),
        };
        // The request has been admitted, and is counted.
        let incoming = incoming.ok_or(ProxyError::Internal)?;
        Buffered::read_rest((parts, share), incoming, limits, memory, 0).await
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        self.0.lock().kept = KeptParts::Nothing;
    }
}

// === impl Replay ===

impl Replay {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        let mut state = self.state.lock();
        if state.current != self.number || state.incoming.is_none() {
            return Poll::Ready(Some(Err(CutOff::Superseded)));
        }
        if self.passed < state.arrived {
            let part = state.kept.get(self.passed).ok_or(CutOff::Superseded);
            self.passed += 1;
            return Poll::Ready(Some(part.map(Frame::data)));
        }
        let polled = match state.poll_arrival(cx) {
            Poll::Pending => {
                let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(self.pace.waits())));
                ready!(timer.as_mut().poll(cx));
                Some(Err(CutOff::TooSlow))
            }
            Poll::Ready(polled) => polled,
        };
        match &polled {
            Some(Ok(frame)) => {
                self.timer = None;
                self.pace.moved(frame.data_ref().map_or(0, Bytes::len));
                self.passed += 1;
            }
            // Nothing may take what has come for all of it.
            Some(Err(_)) => state.incoming = None,
            None => state.has_ended = true,
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        let state = self.state.lock();
        self.passed == state.arrived && state.incoming.as_ref().is_some_and(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.state.lock();
        let mut hint = state.incoming.as_ref().map(Incoming::size_hint).unwrap_or_default();
        let kept = state.kept.bytes_from(self.passed);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + kept);
        }
        hint.set_lower(hint.lower() + kept);
        hint
    }
}

// === impl StreamedState ===

impl StreamedState {
    /// Reads the next part from the client, and keeps it.
    fn poll_arrival(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        let Some(incoming) = self.incoming.as_mut().filter(|_| !self.has_ended) else {
            return Poll::Ready(None);
        };
        let frame = match ready!(Pin::new(incoming).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other.map(|frame| frame.map_err(CutOff::from))),
        };
        let part = frame.data_ref();
        match self.left.checked_sub(part.map_or(0, Bytes::len)) {
            None => return Poll::Ready(Some(Err(CutOff::TooLarge))),
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

    /// Keeps a part, or forgets all of them if it cannot. `None` stands for trailers, which are not kept.
    fn push(&mut self, part: Option<&Bytes>) {
        let Self::All(parts, share) = self else { return };
        match part {
            Some(part) if parts.len() < MAX_KEPT_PARTS && share.grow(part.len()) => parts.push(part.clone()),
            _ => *self = Self::Nothing,
        }
    }
}

// === impl CutOff ===

impl CutOff {
    /// Finds the error of the body among the causes of `error`, as the client is to read it.
    pub(super) fn among(error: &(dyn std::error::Error + 'static), limits: &Limits) -> Option<ProxyError> {
        let mut causes = successors(Some(error), |error| error.source());
        match causes.find_map(|cause| cause.downcast_ref::<Self>())? {
            Self::TooLarge => Some(ProxyError::RequestTooLarge { limit: limits.max_body_bytes.get() }),
            Self::TooSlow => Some(too_slow(limits)),
            Self::Broken(_) => Some(ProxyError::InvalidRequest("The request body broke off.".into())),
            Self::Superseded => None,
        }
    }
}
