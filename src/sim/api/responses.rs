//! The Responses API.

use super::{
    answer::{ApiError, SimResponse},
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
use std::sync::Arc;
use tokio_util::task::AbortOnDropHandle;

#[derive(Deserialize)]
struct ResponsesRequest {
    model: String,
    input: Value,
    #[serde(default)]
    instructions: Value,
    max_output_tokens: Option<u64>,
    stream: Option<bool>,
    store: Option<bool>,
    background: Option<bool>,
}

struct ResponsesWriter {
    server: Arc<SimServer>,
    id: String,
    item: String,
    created: u64,
    model: String,
    store: bool,
    background: bool,
    text: String,
    sequence: u64,
}

pub(super) async fn responses(call: InferenceCall) -> Result<SimResponse, ApiError> {
    let request: ResponsesRequest = parse(&call.body)?;
    check_model(&call.server, &request.model)?;
    let prompt = Prompt::of([&request.instructions, &request.input]);
    let mut generation = call.server.engine.submit(prompt, request.max_output_tokens);
    let stream = request.stream.unwrap_or(false);
    let mut writer = ResponsesWriter {
        server: Arc::clone(&call.server),
        id: call.id("resp_"),
        item: call.id("msg_"),
        created: call.created(),
        model: request.model,
        store: request.store.unwrap_or(true),
        background: request.background.unwrap_or(false),
        text: String::new(),
        sequence: 0,
    };
    if stream {
        // Unlike vLLM, a streamed background response ends with its client.
        return Ok(events(&call, writer, generation));
    }
    if writer.background {
        let queued = writer.response("queued", None);
        let (server, id) = (Arc::clone(&call.server), writer.id.clone());
        server.store.put(&id, queued.clone());
        let task = tokio::spawn(async move {
            writer.text = generation.text().await;
            writer.finished(&generation);
        });
        server.store.attach(&id, AbortOnDropHandle::new(task));
        return Ok(whole(&call, &queued));
    }
    writer.text = generation.text().await;
    Ok(whole(&call, &writer.finished(&generation)))
}

// === impl ResponsesWriter ===

impl ResponsesWriter {
    fn response(&self, status: &str, done: Option<&Generation>) -> Value {
        let length = done.is_some_and(|generation| generation.finish == FinishReason::Length);
        let output = if done.is_some() { vec![self.item("completed")] } else { Vec::new() };
        let usage = done.map(|generation| {
            json!({
                "input_tokens": generation.prompt_tokens, "output_tokens": generation.tokens,
                "total_tokens": generation.prompt_tokens + generation.tokens,
            })
        });
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "model": self.model,
            "status": status, "output": output, "usage": usage, "background": self.background,
            "incomplete_details": length.then(|| json!({"reason": "max_output_tokens"})), "error": null,
        })
    }

    /// Builds the final response and stores it if requested.
    fn finished(&self, generation: &Generation) -> Value {
        let status = if generation.finish == FinishReason::Length { "incomplete" } else { "completed" };
        let response = self.response(status, Some(generation));
        if self.store || self.background {
            self.server.store.put(&self.id, response.clone());
        }
        response
    }

    fn item(&self, status: &str) -> Value {
        let content = if status == "completed" { vec![self.part()] } else { Vec::new() };
        json!({
            "id": self.item, "type": "message", "role": "assistant", "status": status, "content": content,
        })
    }

    fn part(&self) -> Value {
        json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": null})
    }

    fn event(&mut self, name: &str, mut fields: Value) -> Bytes {
        fields["type"] = json!(name);
        fields["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        named(name, &fields)
    }

    /// Builds an event about the text of the item.
    fn part_event(&mut self, name: &str, key: &str, value: Value) -> Bytes {
        let mut fields = json!({"item_id": self.item, "output_index": 0, "content_index": 0});
        fields[key] = value;
        self.event(name, fields)
    }
}

impl EventFormat for ResponsesWriter {
    fn prelude(&mut self) -> Vec<Bytes> {
        let response = self.response("in_progress", None);
        vec![
            self.event("response.created", json!({"response": response})),
            self.event("response.in_progress", json!({"response": response})),
        ]
    }

    fn opening(&mut self, _: &Generation) -> Vec<Bytes> {
        let item = self.item("in_progress");
        let part = self.part();
        vec![
            self.event("response.output_item.added", json!({"output_index": 0, "item": item})),
            self.part_event("response.content_part.added", "part", part),
        ]
    }

    fn token(&mut self, word: &str) -> Bytes {
        self.text.push_str(word);
        self.part_event("response.output_text.delta", "delta", json!(word))
    }

    fn closing(&mut self, generation: &Generation) -> Vec<Bytes> {
        let (text, part, item) = (json!(self.text), self.part(), self.item("completed"));
        let response = self.finished(generation);
        vec![
            self.part_event("response.output_text.done", "text", text),
            self.part_event("response.content_part.done", "part", part),
            self.event("response.output_item.done", json!({"output_index": 0, "item": item})),
            // Like vLLM, also sent for an incomplete response; its status differs.
            self.event("response.completed", json!({"response": response})),
        ]
    }
}
