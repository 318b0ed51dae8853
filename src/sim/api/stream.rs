//! Server-sent events: one loop for all APIs, each of which says what its events look like.

use super::{
    Call,
    answer::{Answer, encode},
};
use crate::sim::{connection::Reset, engine::Generation};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use serde::Serialize;
use std::{collections::VecDeque, convert::Infallible};
use tokio::task::yield_now;

/// How one API writes a stream.
pub(super) trait Dialect: Send + 'static {
    /// Events that do not wait for the first token.
    fn prelude(&mut self) -> Vec<Bytes> {
        Vec::new()
    }

    /// Events that come with the first token.
    fn opening(&mut self, generation: &Generation) -> Vec<Bytes>;

    /// The event of one token.
    fn token(&mut self, word: &str) -> Bytes;

    /// Events after the last token.
    fn closing(&mut self, generation: &Generation) -> Vec<Bytes>;
}

struct Events<D> {
    dialect: D,
    generation: Generation,
    queue: VecDeque<Bytes>,
    opened: bool,
    closed: bool,
    sent: u64,
    /// How many events the client gets before its connection is reset.
    cut: Option<u64>,
    reset: Reset,
}

pub(super) fn data(event: &impl Serialize) -> Bytes {
    frame(b"data: ", event)
}

pub(super) fn named(name: &str, event: &impl Serialize) -> Bytes {
    frame(format!("event: {name}\ndata: ").as_bytes(), event)
}

fn frame(start: &[u8], event: &impl Serialize) -> Bytes {
    [start, &encode(event), b"\n\n"].concat().into()
}

/// The response starts at once; its events come as the generation gets its turn, each as a chunk of its own.
pub(super) fn events<D: Dialect>(call: &Call, mut dialect: D, generation: Generation) -> Answer {
    // At least one event goes out, and never all: there are more of them than tokens.
    let cut = call.cut.map(|share| 1 + (share * generation.budget as f64) as u64);
    let queue = VecDeque::from(dialect.prelude());
    let reset = call.reset.clone();
    let events = Events { dialect, generation, queue, opened: false, closed: false, sent: 0, cut, reset };
    let body = stream::unfold(events, |mut events| async move {
        let event = events.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(event)), events))
    });
    let mut answer = Response::new(StreamBody::new(body).boxed_unsync());
    let content_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, content_type);
    answer
}

/// A body that ends with a reset.
pub(super) fn cut_after(part: Bytes, reset: Reset) -> UnsyncBoxBody<Bytes, Infallible> {
    let body = stream::unfold(Some(part), move |part| {
        let reset = reset.clone();
        async move {
            match part {
                Some(part) => Some((Ok::<_, Infallible>(Frame::data(part)), None)),
                None => {
                    yield_now().await;
                    reset.now().await
                }
            }
        }
    });
    StreamBody::new(body).boxed_unsync()
}

// === impl Events ===

impl<D: Dialect> Events<D> {
    async fn next(&mut self) -> Option<Bytes> {
        // hyper flushes when a body has nothing ready. Without this a stream with no time between its tokens
        // would leave in one piece, and a reset would overtake what it is to follow.
        if self.sent > 0 {
            yield_now().await;
        }
        if self.cut == Some(self.sent) {
            return self.reset.now().await;
        }
        if self.queue.is_empty() && !self.closed {
            match self.generation.next().await {
                Some(word) => {
                    if !self.opened {
                        self.opened = true;
                        self.queue.extend(self.dialect.opening(&self.generation));
                    }
                    self.queue.push_back(self.dialect.token(word));
                }
                None => {
                    self.closed = true;
                    self.queue.extend(self.dialect.closing(&self.generation));
                }
            }
        }
        self.sent += 1;
        self.queue.pop_front()
    }
}
