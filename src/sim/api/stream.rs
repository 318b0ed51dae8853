//! Server-sent events: one loop for all APIs, with a format per API.

use super::{
    answer::{SimResponse, encode},
    call::InferenceCall,
};
use crate::sim::{engine::Generation, reset::ConnectionReset};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use serde::Serialize;
use std::{collections::VecDeque, convert::Infallible};
use tokio::task::yield_now;

/// Event format of an API.
pub(super) trait EventFormat: Send + 'static {
    /// Returns the events before the first token.
    fn prelude(&mut self) -> Vec<Bytes> {
        Vec::new()
    }

    /// Returns the events sent together with the first token.
    fn opening(&mut self, generation: &Generation) -> Vec<Bytes>;

    /// Returns the event of a token.
    fn token(&mut self, word: &str) -> Bytes;

    /// Returns the events after the last token.
    fn closing(&mut self, generation: &Generation) -> Vec<Bytes>;
}

struct EventStream<D> {
    dialect: D,
    generation: Generation,
    queue: VecDeque<Bytes>,
    opened: bool,
    closed: bool,
    sent: u64,
    /// Number of events before the connection is reset.
    cut: Option<u64>,
    reset: ConnectionReset,
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

/// Builds a streamed response. Sends the head immediately and each event as its own chunk.
pub(super) fn events<D: EventFormat>(
    call: &InferenceCall,
    mut dialect: D,
    generation: Generation,
) -> SimResponse {
    // Sends at least one event before the reset, and never all of them: there are more events than tokens.
    let cut = call.cut.map(|share| 1 + (share * generation.budget as f64) as u64);
    let queue = VecDeque::from(dialect.prelude());
    let reset = call.reset.clone();
    let events =
        EventStream { dialect, generation, queue, opened: false, closed: false, sent: 0, cut, reset };
    let body = stream::unfold(events, |mut events| async move {
        let event = events.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(event)), events))
    });
    let mut answer = Response::new(StreamBody::new(body).boxed_unsync());
    let content_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, content_type);
    answer
}

// === impl EventStream ===

impl<D: EventFormat> EventStream<D> {
    async fn next(&mut self) -> Option<Bytes> {
        // hyper flushes only when the body is pending. Without yielding, tokens without delay would be sent in one piece,
        // and a reset would overtake them.
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
