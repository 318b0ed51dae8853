//! Routes and injected failures.

mod answer;
mod call;
mod chat;
mod messages;
mod other;
mod responses;
mod sleep;
pub(super) mod store;
mod stream;

use super::{
    fault::{self, InjectedFault},
    metrics,
    reset::ConnectionReset,
    server::SimServer,
};
use answer::{ApiError, SimResponse, json, text};
use call::{InferenceCall, read};
use http::{Method, Request, StatusCode, header};
use hyper::body::Incoming;
use serde_json::json;
use std::{
    convert::Infallible,
    sync::{Arc, atomic::Ordering::Relaxed},
};

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

pub(super) async fn answer(
    server: Arc<SimServer>,
    reset: ConnectionReset,
    request: Request<Incoming>,
) -> Result<SimResponse, Infallible> {
    if !server.ready.load(Relaxed) {
        let loading = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "The model is still loading.");
        return Ok(loading.into());
    }
    Ok(route(server, reset, request).await.unwrap_or_else(SimResponse::from))
}

async fn route(
    server: Arc<SimServer>,
    reset: ConnectionReset,
    request: Request<Incoming>,
) -> Result<SimResponse, ApiError> {
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
) -> Result<SimResponse, ApiError> {
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
