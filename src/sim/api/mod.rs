//! Routes and injected failures.

mod answer;
mod chat;
mod messages;
mod other;
mod responses;
mod sleep;
mod stream;

pub(super) use responses::ResponseStore;

use super::{
    connection::ConnectionReset,
    fault::{self, InjectedFault},
    metrics,
    server::SimServer,
};
use answer::{Answer, ApiError, json, text};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use serde_json::json;
use std::{
    convert::Infallible,
    sync::{Arc, atomic::Ordering::Relaxed},
};

/// Limit of request bodies, above any prompt or recording.
const MAX_BODY_BYTES: usize = 256 << 20;

/// Routes that use the engine: their requests are numbered and subject to injected failures.
#[derive(Clone, Copy, PartialEq)]
enum InferenceRoute {
    Chat,
    Completions,
    Embeddings,
    Messages,
    Responses,
    Transcriptions,
}

/// A complete inference request.
struct InferenceCall {
    server: Arc<SimServer>,
    reset: ConnectionReset,
    content_type: Option<HeaderValue>,
    body: Bytes,
    sequence: u64,
    /// Share of the response body after which to reset the connection.
    cut: Option<f64>,
    /// Random part of the ids.
    key: u128,
}

pub(super) async fn answer(
    server: Arc<SimServer>,
    reset: ConnectionReset,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    if !server.ready.load(Relaxed) {
        let loading = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "The model is still loading.");
        return Ok(loading.into());
    }
    Ok(route(server, reset, request).await.unwrap_or_else(Answer::from))
}

async fn route(
    server: Arc<SimServer>,
    reset: ConnectionReset,
    request: Request<Incoming>,
) -> Result<Answer, ApiError> {
    let path = request.uri().path().to_owned();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    // hyper omits the body of a response to HEAD.
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    let post = request.method() == Method::POST;
    let task = match segments.as_slice() {
        ["health"] if get => return Ok(text("")),
        ["version"] if get => {
            return Ok(json(&json!({"version": concat!(env!("CARGO_PKG_VERSION"), "+sim")})));
        }
        ["metrics"] if get => {
            return Ok(text(metrics::render(&server.engine.read(), server.args.first_model())));
        }
        ["sleep" | "wake_up" | "is_sleeping" | "collective_rpc"] if server.args.enable_sleep_mode => {
            return sleep::answer(&server, request).await;
        }
        ["v1", "models"] if get => return Ok(other::models(&server)),
        // Model names may contain slashes.
        ["v1", "models", name @ ..] if get => return other::model(&server, &name.join("/")),
        ["v1", "responses", id] if get => return server.store.get(id),
        ["v1", "responses", id, "cancel"] if post => return server.store.cancel(id),
        ["tokenize"] if post => return other::tokenize(&server, &read(request).await?),
        ["detokenize"] if post => return other::detokenize(&server, &read(request).await?),
        ["v1", "messages", "count_tokens"] if post => {
            return messages::count_tokens(&server, &read(request).await?);
        }
        ["v1", "chat", "completions"] => InferenceRoute::Chat,
        ["v1", "completions"] => InferenceRoute::Completions,
        ["v1", "embeddings"] => InferenceRoute::Embeddings,
        ["v1", "messages"] => InferenceRoute::Messages,
        ["v1", "responses"] => InferenceRoute::Responses,
        ["v1", "audio", "transcriptions"] => InferenceRoute::Transcriptions,
        ["health" | "version" | "metrics" | "tokenize" | "detokenize"]
        | ["v1", "models", ..]
        | ["v1", "responses", _]
        | ["v1", "responses", _, "cancel"]
        | ["v1", "messages", "count_tokens"] => return Err(ApiError::http(StatusCode::METHOD_NOT_ALLOWED)),
        _ => return Err(ApiError::http(StatusCode::NOT_FOUND)),
    };
    if !post {
        return Err(ApiError::http(StatusCode::METHOD_NOT_ALLOWED));
    }
    infer(server, reset, request, task).await
}

async fn infer(
    server: Arc<SimServer>,
    reset: ConnectionReset,
    request: Request<Incoming>,
    task: InferenceRoute,
) -> Result<Answer, ApiError> {
    let content_type = request.headers().get(header::CONTENT_TYPE).cloned();
    let body = read(request).await?;
    let sequence = server.sequence.fetch_add(1, Relaxed);
    if server.args.exit_after.is_some_and(|count| sequence + 1 >= count) {
        server.crash.cancel();
        // No answer: the server is about to crash.
        return std::future::pending().await;
    }
    let cut = match fault::for_request(&server.args, sequence) {
        InjectedFault::None => None,
        InjectedFault::ResetMidBody(share) => Some(share),
        InjectedFault::ResetBeforeHead => return reset.now().await,
        InjectedFault::Error(status) => {
            return Err(ApiError::new(status, "Failure injected by --error-rate."));
        }
    };
    let key = fault::rng(!server.args.seed, sequence).u128(..);
    let call = InferenceCall { server, reset, content_type, body, sequence, cut, key };
    match task {
        InferenceRoute::Chat => chat::chat(call).await,
        InferenceRoute::Completions => chat::completions(call).await,
        InferenceRoute::Embeddings => other::embeddings(call).await,
        InferenceRoute::Messages => Ok(messages::messages(call).await.unwrap_or_else(ApiError::anthropic)),
        InferenceRoute::Responses => responses::responses(call).await,
        InferenceRoute::Transcriptions => other::transcriptions(call).await,
    }
}

async fn read(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    match Limited::new(request.into_body(), MAX_BODY_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::http(StatusCode::PAYLOAD_TOO_LARGE)),
        Err(error) => Err(ApiError::bad_request(format!("The body cannot be read: {error}"))),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::bad_request(error.to_string()))
}

fn check_model(server: &SimServer, model: &str) -> Result<(), ApiError> {
    if server.args.serves(model) { Ok(()) } else { Err(ApiError::unknown_model(model)) }
}

// === impl InferenceCall ===

impl InferenceCall {
    fn id(&self, prefix: &str) -> String {
        format!("{prefix}{:032x}", self.key)
    }

    /// Returns a deterministic time: one second per request from 2025-01-01.
    fn created(&self) -> u64 {
        created(self.sequence)
    }

    fn content_type(&self) -> &str {
        self.content_type.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

fn created(sequence: u64) -> u64 {
    1_735_689_600 + sequence
}
