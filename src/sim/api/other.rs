//! Models, tokens, embeddings and transcriptions.

use super::{
    answer::{ApiError, PLAIN_TEXT, SimResponse, json},
    call::{InferenceCall, check_model, created, parse, whole, whole_of_type},
};
use crate::sim::{
    server::SimServer,
    text::{Prompt, token_id, token_word},
};
use futures_util::{future, stream};
use serde::Deserialize;
use serde_json::{Value, json};
use std::convert::Infallible;

const MAX_MODEL_LEN: u32 = 32_768;
const DEFAULT_DIMENSIONS: usize = 16;

#[derive(Deserialize)]
struct EmbeddingRequest {
    model: String,
    input: Value,
    dimensions: Option<usize>,
}

#[derive(Deserialize)]
struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<TextMessage>>,
}

#[derive(Deserialize)]
struct TextMessage {
    content: String,
}

#[derive(Deserialize)]
struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u64>,
}

pub(super) fn models(server: &SimServer) -> SimResponse {
    let names = &server.args.models;
    let listed: Vec<Value> =
        if names.is_empty() { vec![card("sim")] } else { names.iter().map(|name| card(name)).collect() };
    json(&json!({"object": "list", "data": listed}))
}

pub(super) fn model(server: &SimServer, name: &str) -> Result<SimResponse, ApiError> {
    let name = name.replace("%2F", "/").replace("%2f", "/");
    check_model(server, &name)?;
    Ok(json(&card(&name)))
}

fn card(name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": created(0), "owned_by": "vllm", "root": name, "parent": null,
        "max_model_len": MAX_MODEL_LEN,
    })
}

pub(super) fn tokenize(server: &SimServer, body: &[u8]) -> Result<SimResponse, ApiError> {
    let request: TokenizeRequest = parse(body)?;
    check_model_if_named(server, request.model.as_deref())?;
    let texts = match (request.prompt, request.messages) {
        (Some(prompt), _) => vec![prompt],
        (None, Some(messages)) => messages.into_iter().map(|message| message.content).collect(),
        (None, None) => return Err(ApiError::bad_request("missing field `prompt`")),
    };
    let tokens: Vec<u64> = texts.iter().flat_map(|text| text.split_whitespace()).map(token_id).collect();
    let count = tokens.len();
    let body = json!({"count": count, "max_model_len": MAX_MODEL_LEN, "tokens": tokens, "token_strs": null});
    Ok(json(&body))
}

pub(super) fn detokenize(server: &SimServer, body: &[u8]) -> Result<SimResponse, ApiError> {
    let request: DetokenizeRequest = parse(body)?;
    check_model_if_named(server, request.model.as_deref())?;
    let prompt: String = request.tokens.into_iter().map(token_word).collect();
    Ok(json(&json!({"prompt": prompt})))
}

fn check_model_if_named(server: &SimServer, model: Option<&str>) -> Result<(), ApiError> {
    model.map_or(Ok(()), |model| check_model(server, model))
}

pub(super) async fn embeddings(call: InferenceCall) -> Result<SimResponse, ApiError> {
    let request: EmbeddingRequest = parse(&call.body)?;
    check_model(&call.server, &request.model)?;
    let dimensions = request.dimensions.unwrap_or(DEFAULT_DIMENSIONS);
    if !(1..=8192).contains(&dimensions) {
        return Err(ApiError::bad_request("`dimensions` must be from 1 to 8192"));
    }
    // A list of strings or token lists is a batch; a list of numbers is a single input.
    let inputs = match &request.input {
        Value::Array(items) if !items.iter().all(Value::is_number) => items.iter().collect(),
        input => vec![input],
    };
    let prompt = Prompt::of(inputs.iter().copied());
    call.server.engine.submit(prompt, None).pool().await;
    let data: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(index, input)| {
            let embedding = Prompt::of([*input]).embedding(call.server.args.seed, dimensions);
            json!({"index": index, "object": "embedding", "embedding": embedding})
        })
        .collect();
    let body = json!({
        "id": call.id("embd-"), "object": "list", "created": call.created(), "model": request.model, "data": data,
        "usage": {"prompt_tokens": prompt.tokens, "total_tokens": prompt.tokens, "completion_tokens": 0},
    });
    Ok(whole(&call, &body))
}

pub(super) async fn transcriptions(call: InferenceCall) -> Result<SimResponse, ApiError> {
    let boundary = multer::parse_boundary(call.content_type())
        .map_err(|error| ApiError::bad_request(format!("The body is not a form: {error}")))?;
    let body = stream::once(future::ready(Ok::<_, Infallible>(call.body.clone())));
    let mut form = multer::Multipart::new(body, boundary);
    let bad_form = |error| ApiError::bad_request(format!("The form cannot be read: {error}"));
    let (mut model, mut format, mut prompt) = (None, String::new(), None);
    while let Some(field) = form.next_field().await.map_err(bad_form)? {
        match field.name() {
            Some("model") => model = Some(field.text().await.map_err(bad_form)?),
            Some("response_format") => format = field.text().await.map_err(bad_form)?,
            Some("file") => {
                let recording = field.bytes().await.map_err(bad_form)?;
                let mut audio = Prompt::new();
                audio.read_bytes(&recording);
                prompt = Some((audio, recording.len()));
            }
            _ => {}
        }
    }
    let model = model.ok_or_else(|| ApiError::bad_request("missing field `model`"))?;
    let (audio, length) = prompt.ok_or_else(|| ApiError::bad_request("missing field `file`"))?;
    check_model(&call.server, &model)?;
    let text = call.server.engine.submit(audio, None).text().await;
    if format == "text" {
        return Ok(whole_of_type(&call, PLAIN_TEXT, text.into()));
    }
    // Assumes 16 kHz, 16 bit, mono.
    let seconds = length.div_ceil(32_000);
    Ok(whole(&call, &json!({"text": text, "usage": {"type": "duration", "seconds": seconds}})))
}
