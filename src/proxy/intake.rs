//! Reading request bodies into memory: accounted from the first byte, bounded, and stored at their exact size.

use std::{future::Future, pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::timeout_at;

use super::{
    memory::{Memory, Owner, Share},
    pace::{Pace, PaceLimit},
};
use crate::{admission::Gate, config::Limits, error::ProxyError};

/// A request body before its first read.
#[derive(Debug)]
pub struct UnreadBody {
    pub(super) incoming: Incoming,
    /// Source and route that its memory is accounted to.
    pub(super) owner: Owner,
}

/// A request body in memory.
#[derive(Debug)]
pub struct BufferedBody {
    /// The whole body.
    pub bytes: Bytes,
    /// Returns its memory on drop.
    #[expect(dead_code, reason = "held for its Drop")]
    share: Share,
    /// `bytes` keeps a larger read buffer alive.
    is_slice: bool,
}

// === impl UnreadBody ===

impl UnreadBody {
    /// Accounts the body to a route.
    pub(super) fn set_route(&mut self, gate: &Arc<Gate>) {
        self.owner.route = Arc::as_ptr(gate).addr();
    }
}

// === impl BufferedBody ===

impl BufferedBody {
    /// Reads a body to its end. `besides`: other bytes that the request holds meanwhile.
    ///
    /// # Errors
    /// The body is too large, too slow or aborted, or there is no memory left for it.
    pub async fn read(
        body: UnreadBody,
        limits: &Limits,
        memory: &Arc<Memory>,
        besides: usize,
    ) -> Result<Self, ProxyError> {
        let share = memory.share(body.owner);
        Self::read_rest((Vec::new(), share), body.incoming, limits, memory, besides).await
    }

    /// Reads the rest of a body whose first `parts` are accounted in `share`.
    ///
    /// # Errors
    /// As [`BufferedBody::read`].
    pub(super) async fn read_rest(
        (parts, mut share): (Vec<Bytes>, Share),
        mut body: Incoming,
        limits: &Limits,
        memory: &Arc<Memory>,
        besides: usize,
    ) -> Result<Self, ProxyError> {
        let limit = limits.max_body_bytes.get();
        // Reserves at most 1 MiB for a length that is only announced.
        let expected = check_content_length(&body, limits)?.unwrap_or(0).min(1 << 20);
        let mut pace = Pace::new(body_pace(limits));
        let mut joined = JoinedBody { expected, ..JoinedBody::default() };
        for part in parts {
            joined.push(part);
        }
        // A body of known length ends with its last byte: no further poll.
        while !body.is_end_stream()
            && let Some(frame) = next_frame(&mut body, &mut pace, limits, &mut share, memory, besides).await?
        {
            // Request trailers are dropped; model servers ignore them.
            let Ok(data) = frame.into_data() else { continue };
            if share.bytes() + data.len() > limit {
                return Err(ProxyError::RequestTooLarge { limit });
            }
            if !share.grow(data.len()) {
                return Err(ProxyError::BuffersFull(share.max()));
            }
            joined.push(data);
        }
        if !share.finish() {
            return Err(ProxyError::BuffersFull(share.max()));
        }
        let JoinedBody { first, rest, .. } = joined;
        if rest.is_empty() {
            return Ok(Self { is_slice: !first.is_empty(), bytes: first, share });
        }
        Ok(Self { bytes: rest.into_boxed_slice().into(), share, is_slice: false })
    }

    /// Copies the body out of its read buffer, which is several times its size.
    pub fn detach(&mut self) {
        if std::mem::take(&mut self.is_slice) {
            self.bytes = Bytes::copy_from_slice(&self.bytes);
        }
    }
}

/// Joins the parts of a body. A single part is not copied.
#[derive(Default)]
struct JoinedBody {
    first: Bytes,
    /// All parts, once there are two.
    rest: Vec<u8>,
    /// Capacity to reserve, in bytes.
    expected: usize,
}

impl JoinedBody {
    fn push(&mut self, part: Bytes) {
        if self.first.is_empty() && self.rest.is_empty() {
            self.first = part;
            return;
        }
        if self.rest.is_empty() {
            self.rest.reserve(self.expected.max(self.first.len() + part.len()));
            self.rest.extend_from_slice(&self.first);
            self.first = Bytes::new();
        }
        self.rest.extend_from_slice(&part);
    }
}

/// Returns the length that the client announced, if any.
///
/// # Errors
/// [`ProxyError::RequestTooLarge`] if it exceeds the limit.
pub fn check_content_length(body: &Incoming, limits: &Limits) -> Result<Option<usize>, ProxyError> {
    let limit = limits.max_body_bytes.get();
    let announced = body.size_hint().exact().map(|length| usize::try_from(length).unwrap_or(usize::MAX));
    if announced.is_some_and(|length| length > limit) {
        return Err(ProxyError::RequestTooLarge { limit });
    }
    Ok(announced)
}

/// Returns the pace that a request body must keep.
pub(super) fn body_pace(limits: &Limits) -> PaceLimit {
    PaceLimit { pause: limits.body_timeout.get(), rate: limits.min_rate.get() }
}

async fn next_frame(
    body: &mut Incoming,
    pace: &mut Pace,
    limits: &Limits,
    share: &mut Share,
    memory: &Arc<Memory>,
    besides: usize,
) -> Result<Option<Frame<Bytes>>, ProxyError> {
    let mut next = pin!(body.frame());
    // Most frames have arrived already; the clock is read only for the others.
    let arrived = match std::future::poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx))).await {
        Poll::Ready(frame) => frame,
        Poll::Pending => {
            if !share.wait() {
                return Err(ProxyError::BuffersFull(share.max()));
            }
            let mut of_request = None;
            // Resolves to `None` if the memory of the body or its request was reclaimed for others.
            let arrives = std::future::poll_fn(|cx| match next.as_mut().poll(cx) {
                Poll::Ready(frame) => Poll::Ready(Some(frame)),
                Poll::Pending if memory.poll_waiting(&mut of_request, besides, cx).is_ready() => {
                    Poll::Ready(None)
                }
                Poll::Pending => share.poll_evicted(cx).map(|()| None),
            });
            match timeout_at(pace.start_waiting(), arrives).await {
                Ok(Some(frame)) => frame,
                Ok(None) => return Err(ProxyError::BuffersFull(share.max())),
                Err(_) => return Err(slow_body_error(limits)),
            }
        }
    };
    match arrived {
        None => Ok(None),
        Some(Ok(frame)) => {
            pace.credit_bytes(frame.data_ref().map_or(0, Bytes::len));
            Ok(Some(frame))
        }
        Some(Err(error)) => {
            Err(ProxyError::InvalidRequest(format!("The request body was aborted: {error}.")))
        }
    }
}

/// Returns the error for a body below the required pace.
pub fn slow_body_error(limits: &Limits) -> ProxyError {
    ProxyError::RequestTimeout { pause: limits.body_timeout.get(), rate: limits.min_rate }
}

/// Returns `None` if `future` takes longer than `limit`. Creates the timer only if the first poll is pending.
pub async fn timeout_if_pending<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    if let Poll::Ready(output) = std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await {
        return Some(output);
    }
    tokio::time::timeout(limit, future).await.ok()
}
