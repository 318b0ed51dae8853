//! The routes, and what happens to a request before its route sees it.

mod answer;
mod chat;
mod messages;
mod other;
mod responses;
mod sleep;
mod stream;

pub(super) use responses::Store;

use super::{
    connection::Reset,
    fault::{self, Fate},
    metrics,
    server::Server,
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

/// A stand-in has no use for more, and this much is more than any prompt or recording.
const MAX_BODY: usize = 256 << 20;

/// Routes that ask the engine for something: these are numbered, and these fail.
#[derive(Clone, Copy, PartialEq)]
enum Task {
    Chat,
    Completions,
    Embeddings,
    Messages,
    Responses,
    Transcriptions,
}

/// A request, read to its end, that is to be answered.
struct Call {
    server: Arc<Server>,
    reset: Reset,
    content_type: Option<HeaderValue>,
    body: Bytes,
    sequence: u64,
    /// Where in the response's body the connection is to be reset.
    cut: Option<f64>,
    /// What its ids are made of.
    key: u128,
}

pub(super) async fn answer(
    server: Arc<Server>,
    reset: Reset,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    if !server.ready.load(Relaxed) {
        let loading = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "The model is still loading.");
        return Ok(loading.into());
    }
    Ok(route(server, reset, request).await.unwrap_or_else(Answer::from))
}

async fn route(server: Arc<Server>, reset: Reset, request: Request<Incoming>) -> Result<Answer, ApiError> {
    let path = request.uri().path().to_owned();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    // HEAD is answered as GET: hyper leaves the body out.
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
        // A model's name may have slashes in it.
        ["v1", "models", name @ ..] if get => return other::model(&server, &name.join("/")),
        ["v1", "responses", id] if get => return server.store.get(id),
        ["v1", "responses", id, "cancel"] if post => return server.store.cancel(id),
        ["tokenize"] if post => return other::tokenize(&server, &read(request).await?),
        ["detokenize"] if post => return other::detokenize(&server, &read(request).await?),
        ["v1", "messages", "count_tokens"] if post => {
            return messages::count_tokens(&server, &read(request).await?);
        }
        ["v1", "chat", "completions"] => Task::Chat,
        ["v1", "completions"] => Task::Completions,
        ["v1", "embeddings"] => Task::Embeddings,
        ["v1", "messages"] => Task::Messages,
        ["v1", "responses"] => Task::Responses,
        ["v1", "audio", "transcriptions"] => Task::Transcriptions,
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
    server: Arc<Server>,
    reset: Reset,
    request: Request<Incoming>,
    task: Task,
) -> Result<Answer, ApiError> {
    let content_type = request.headers().get(header::CONTENT_TYPE).cloned();
    let body = read(request).await?;
    let sequence = server.sequence.fetch_add(1, Relaxed);
    if server.args.exit_after.is_some_and(|count| sequence + 1 >= count) {
        server.crash.cancel();
        // The process ends; until it has, nothing is answered any more.
        return std::future::pending().await;
    }
    let cut = match fault::fate(&server.args, sequence) {
        Fate::Answer => None,
        Fate::ResetMidBody(share) => Some(share),
        Fate::ResetBeforeHead => return reset.now().await,
        Fate::Error(status) => return Err(ApiError::new(status, "A failure, as --error-rate asked.")),
    };
    let key = fault::rng(!server.args.seed, sequence).u128(..);
    let call = Call { server, reset, content_type, body, sequence, cut, key };
    match task {
        Task::Chat => chat::chat(call).await,
        Task::Completions => chat::completions(call).await,
        Task::Embeddings => other::embeddings(call).await,
        // Anthropic's clients want Anthropic's errors.
        Task::Messages => Ok(messages::messages(call).await.unwrap_or_else(ApiError::anthropic)),
        Task::Responses => responses::responses(call).await,
        Task::Transcriptions => other::transcriptions(call).await,
    }
}

async fn read(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::http(StatusCode::PAYLOAD_TOO_LARGE)),
        Err(error) => Err(ApiError::bad_request(format!("The body cannot be read: {error}"))),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::bad_request(error.to_string()))
}

fn known(server: &Server, model: &str) -> Result<(), ApiError> {
    if server.args.serves(model) { Ok(()) } else { Err(ApiError::unknown_model(model)) }
}

// === impl Call ===

impl Call {
    fn id(&self, prefix: &str) -> String {
        format!("{prefix}{:032x}", self.key)
    }

    /// Not the time of day, so that the same requests get the same bytes: a second a request from the start of
    /// 2025 on.
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
