//! Inference requests and their complete responses.

use super::answer::{ApiError, SimResponse, encode, of_type};
use crate::sim::{reset::ConnectionReset, server::SimServer};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, LengthLimitError, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use serde::{Serialize, de::DeserializeOwned};
use std::{convert::Infallible, sync::Arc};
use tokio::task::yield_now;

/// Limit of request bodies, above any prompt or recording.
const MAX_REQUEST_BODY_BYTES: usize = 256 << 20;

/// A complete inference request.
pub(super) struct InferenceCall {
    pub(super) server: Arc<SimServer>,
    pub(super) reset: ConnectionReset,
    pub(super) content_type: Option<HeaderValue>,
    pub(super) body: Bytes,
    pub(super) sequence: u64,
    /// Share of the response body after which to reset the connection.
    pub(super) cut: Option<f64>,
    /// Random part of the ids.
    pub(super) key: u128,
}

pub(super) async fn read(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    match Limited::new(request.into_body(), MAX_REQUEST_BODY_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::http(StatusCode::PAYLOAD_TOO_LARGE)),
        Err(error) => Err(ApiError::bad_request(format!("The body cannot be read: {error}"))),
    }
}

pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::bad_request(error.to_string()))
}

pub(super) fn check_model(server: &SimServer, model: &str) -> Result<(), ApiError> {
    if server.args.serves(model) { Ok(()) } else { Err(ApiError::unknown_model(model)) }
}

pub(super) fn created(sequence: u64) -> u64 {
    1_735_689_600 + sequence
}

/// Builds a JSON response, subject to an injected reset.
pub(super) fn whole(call: &InferenceCall, body: &impl Serialize) -> SimResponse {
    whole_of_type(call, "application/json", encode(body).into())
}

/// Builds a response, truncated by a reset if the call has one injected.
pub(super) fn whole_of_type(call: &InferenceCall, content_type: &'static str, body: Bytes) -> SimResponse {
    let Some(share) = call.cut else { return of_type(content_type, body) };
    let length = body.len();
    let part = body.slice(..(share * length as f64) as usize);
    let mut answer = Response::new(cut_after(part, call.reset.clone()));
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_LENGTH, length.into());
    answer
}

/// Builds a body that ends with a reset.
fn cut_after(part: Bytes, reset: ConnectionReset) -> UnsyncBoxBody<Bytes, Infallible> {
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

// === impl InferenceCall ===

impl InferenceCall {
    pub(super) fn id(&self, prefix: &str) -> String {
        format!("{prefix}{:032x}", self.key)
    }

    /// Returns a deterministic time: one second per request from 2025-01-01.
    pub(super) fn created(&self) -> u64 {
        created(self.sequence)
    }

    pub(super) fn content_type(&self) -> &str {
        self.content_type.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}
