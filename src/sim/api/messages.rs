//! Anthropic's API: `/v1/messages` and `/v1/messages/count_tokens`.

use super::{
    answer::{ApiError, SimResponse, json},
    call::{InferenceCall, check_model, parse, whole},
    stream::{EventFormat, events, named},
};
use crate::sim::{
    engine::{FinishReason, Generation},
    server::SimServer,
    text::Prompt,
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct MessagesRequest {
    model: String,
    max_tokens: u64,
    stream: Option<bool>,
    #[serde(flatten)]
    prompt: MessagesPrompt,
}

#[derive(Deserialize)]
struct CountRequest {
    model: String,
    #[serde(flatten)]
    prompt: MessagesPrompt,
}

#[derive(Deserialize)]
struct MessagesPrompt {
    messages: Vec<Value>,
    #[serde(default)]
    system: Value,
}

struct MessagesWriter {
    id: String,
    model: String,
}

pub(super) async fn messages(call: InferenceCall) -> Result<SimResponse, ApiError> {
    let request: MessagesRequest = parse(&call.body)?;
    check_model(&call.server, &request.model)?;
    let mut generation = call.server.engine.submit(request.prompt.read(), Some(request.max_tokens));
    let writer = MessagesWriter { id: call.id("msg_"), model: request.model };
    if request.stream.unwrap_or(false) {
        return Ok(events(&call, writer, generation));
    }
    let text = generation.text().await;
    let content = json!([{"type": "text", "text": text}]);
    let reason = json!(stop_reason(&generation));
    Ok(whole(&call, &writer.message(&content, &reason, &generation)))
}

pub(super) fn count_tokens(server: &SimServer, body: &[u8]) -> Result<SimResponse, ApiError> {
    let count = || {
        let request: CountRequest = parse(body)?;
        check_model(server, &request.model)?;
        Ok(json(&json!({"input_tokens": request.prompt.read().tokens})))
    };
    Ok(count().unwrap_or_else(ApiError::anthropic))
}

fn stop_reason(generation: &Generation) -> &'static str {
    match generation.finish {
        FinishReason::Length => "max_tokens",
        FinishReason::Stop | FinishReason::Abort => "end_turn",
    }
}

fn usage(generation: &Generation) -> Value {
    json!({"input_tokens": generation.prompt_tokens, "output_tokens": generation.tokens})
}

// === impl MessagesPrompt ===

impl MessagesPrompt {
    fn read(&self) -> Prompt {
        Prompt::of([&self.system].into_iter().chain(&self.messages))
    }
}

// === impl MessagesWriter ===

impl MessagesWriter {
    fn message(&self, content: &Value, stop_reason: &Value, generation: &Generation) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": stop_reason, "stop_sequence": null, "usage": usage(generation),
        })
    }
}

impl EventFormat for MessagesWriter {
    fn opening(&mut self, generation: &Generation) -> Vec<Bytes> {
        let mut message = self.message(&json!([]), &Value::Null, generation);
        message["usage"]["output_tokens"] = json!(0);
        let block = json!({
            "type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""},
        });
        vec![
            named("message_start", &json!({"type": "message_start", "message": message})),
            named("content_block_start", &block),
        ]
    }

    fn token(&mut self, word: &str) -> Bytes {
        let delta = json!({
            "type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word},
        });
        named("content_block_delta", &delta)
    }

    fn closing(&mut self, generation: &Generation) -> Vec<Bytes> {
        let delta = json!({
            "type": "message_delta", "usage": usage(generation),
            "delta": {"stop_reason": stop_reason(generation), "stop_sequence": null},
        });
        vec![
            named("content_block_stop", &json!({"type": "content_block_stop", "index": 0})),
            named("message_delta", &delta),
            named("message_stop", &json!({"type": "message_stop"})),
        ]
    }
}
