//! Request bodies coming in: counted from their first byte, bounded, and kept at their exact size.

use std::{future::Future, pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::timeout_at;

use super::{
    memory::{Memory, Share},
    pace::{Allowed, Pace},
};
use crate::{config::Limits, error::ProxyError, places::Source};

/// A request body of which nothing has been read.
#[derive(Debug)]
pub struct Unread {
    pub(super) incoming: Incoming,
    /// Where it comes from: memory is shared between sources.
    pub(super) source: Source,
}

/// A request body, read to its end.
#[derive(Debug)]
pub struct Buffered {
    /// All of it.
    pub bytes: Bytes,
    /// Its part of the memory, until it is dropped.
    #[expect(dead_code, reason = "counts when it is dropped")]
    share: Share,
    /// It is a slice of a larger read buffer.
    sliced: bool,
}

// === impl Buffered ===

impl Buffered {
    /// Reads a body to its end. `besides`: bytes that its request keeps meanwhile.
    ///
    /// # Errors
    /// When it is larger than allowed, comes too slowly or breaks off, or when there is no memory for it.
    pub async fn read(
        body: Unread,
        limits: &Limits,
        memory: &Arc<Memory>,
        besides: usize,
    ) -> Result<Self, ProxyError> {
        let share = memory.share(body.source);
        Self::read_rest((Vec::new(), share), body.incoming, limits, memory, besides).await
    }

    /// Reads the rest of a body whose first `parts` have been read, and are counted in `share`.
    ///
    /// # Errors
    /// As [`Buffered::read`].
    pub(super) async fn read_rest(
        (parts, mut share): (Vec<Bytes>, Share),
        mut body: Incoming,
        limits: &Limits,
        memory: &Arc<Memory>,
        besides: usize,
    ) -> Result<Self, ProxyError> {
        let limit = limits.max_body_bytes.get();
        // What the client tells is believed only so far.
        let expected = told_to_fit(&body, limits)?.unwrap_or(0).min(1 << 20);
        let mut pace = Pace::new(allowed(limits));
        let mut joined = Joined { expected, ..Joined::default() };
        for part in parts {
            joined.push(part);
        }
        // The end of a body whose length is known is not waited for.
        while !body.is_end_stream()
            && let Some(frame) = next_frame(&mut body, &mut pace, limits, &mut share, memory, besides).await?
        {
            // Trailers of a request say nothing to a model server.
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
        let Joined { first, rest, .. } = joined;
        if rest.is_empty() {
            return Ok(Self { sliced: !first.is_empty(), bytes: first, share });
        }
        Ok(Self { bytes: rest.into_boxed_slice().into(), share, sliced: false })
    }

    /// Lets go of the read buffer that the body came in, which is several times its size.
    pub fn settle(&mut self) {
        if std::mem::take(&mut self.sliced) {
            self.bytes = Bytes::copy_from_slice(&self.bytes);
        }
    }
}

/// The parts of a body as one piece. A single one is not copied.
#[derive(Default)]
struct Joined {
    first: Bytes,
    /// All of them, once there are two.
    rest: Vec<u8>,
    /// Bytes to make room for.
    expected: usize,
}

impl Joined {
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

/// The size that a body tells beforehand, if it does.
///
/// # Errors
/// When that is larger than allowed: none of it needs to be read.
pub fn told_to_fit(body: &Incoming, limits: &Limits) -> Result<Option<usize>, ProxyError> {
    let limit = limits.max_body_bytes.get();
    let told = body.size_hint().exact().map(|told| usize::try_from(told).unwrap_or(usize::MAX));
    if told.is_some_and(|told| told > limit) {
        return Err(ProxyError::RequestTooLarge { limit });
    }
    Ok(told)
}

/// How slowly a body may come in.
pub(super) fn allowed(limits: &Limits) -> Allowed {
    Allowed { pause: limits.body_timeout.get(), rate: limits.min_rate.get() }
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
    // The clock is not looked at for what is there already, which most is.
    let came = match std::future::poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx))).await {
        Poll::Ready(came) => came,
        Poll::Pending => {
            if !share.wait() {
                return Err(ProxyError::BuffersFull(share.max()));
            }
            let mut of_request = None;
            // `None`: its memory, or that of its request, was given to another one.
            let arrives = std::future::poll_fn(|cx| match next.as_mut().poll(cx) {
                Poll::Ready(came) => Poll::Ready(Some(came)),
                Poll::Pending if memory.poll_waiting(&mut of_request, besides, cx).is_ready() => {
                    Poll::Ready(None)
                }
                Poll::Pending => share.poll_evicted(cx).map(|()| None),
            });
            match timeout_at(pace.waits(), arrives).await {
                Ok(Some(came)) => came,
                Ok(None) => return Err(ProxyError::BuffersFull(share.max())),
                Err(_) => return Err(too_slow(limits)),
            }
        }
    };
    match came {
        None => Ok(None),
        Some(Ok(frame)) => {
            pace.moved(frame.data_ref().map_or(0, Bytes::len));
            Ok(Some(frame))
        }
        Some(Err(error)) => Err(ProxyError::InvalidRequest(format!("The request body broke off: {error}."))),
    }
}

/// A body that came too slowly.
pub fn too_slow(limits: &Limits) -> ProxyError {
    ProxyError::RequestTimeout { pause: limits.body_timeout.get(), rate: limits.min_rate }
}

/// `future`, or nothing when it takes longer than `limit`. The timer is made when the future first has to wait, which
/// most do not.
pub async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    if let Poll::Ready(output) = std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await {
        return Some(output);
    }
    tokio::time::timeout(limit, future).await.ok()
}
