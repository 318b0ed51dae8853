//! `/v1/chat/completions` and `/v1/completions`, which differ only in `choices`.

use super::{
    answer::{ApiError, SimResponse},
    call::{InferenceCall, check_model, parse, whole},
    stream::{self, EventFormat},
};
use crate::sim::{engine::Generation, text::Prompt};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Deserialize)]
struct ChatRequest {
    model: String,
    messages: Vec<Value>,
    max_completion_tokens: Option<u64>,
    #[serde(flatten)]
    common: CommonParams,
}

#[derive(Deserialize)]
struct CompletionRequest {
    model: String,
    prompt: Value,
    #[serde(flatten)]
    common: CommonParams,
}

#[derive(Deserialize)]
struct CommonParams {
    max_tokens: Option<u64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// A response, or a chunk of a streamed one.
#[derive(Serialize)]
struct Envelope<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChatChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<TokenUsage>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    #[serde(flatten)]
    content: Content<'a>,
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Content<'a> {
    Message(ChatMessage<'a>),
    Delta(ChatMessage<'a>),
    Text(&'a str),
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    content: &'a str,
}

#[derive(Serialize)]
struct TokenUsage {
    prompt_tokens: u64,
    total_tokens: u64,
    completion_tokens: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum ChatApi {
    Chat,
    Completion,
}

/// Common fields of all chunks of a response.
struct ChatWriter {
    kind: ChatApi,
    id: String,
    created: u64,
    model: String,
    include_usage: bool,
}

pub(super) async fn chat(call: InferenceCall) -> Result<SimResponse, ApiError> {
    let request: ChatRequest = parse(&call.body)?;
    let limit = request.max_completion_tokens.or(request.common.max_tokens);
    let prompt = Prompt::of(&request.messages);
    respond(call, ChatApi::Chat, request.model, prompt, limit, request.common).await
}

pub(super) async fn completions(call: InferenceCall) -> Result<SimResponse, ApiError> {
    let request: CompletionRequest = parse(&call.body)?;
    // Unlike vLLM, whose default for completions is 16 tokens, uses --tokens.
    let limit = request.common.max_tokens;
    let prompt = Prompt::of([&request.prompt]);
    respond(call, ChatApi::Completion, request.model, prompt, limit, request.common).await
}

async fn respond(
    call: InferenceCall,
    kind: ChatApi,
    model: String,
    prompt: Prompt,
    limit: Option<u64>,
    common: CommonParams,
) -> Result<SimResponse, ApiError> {
    check_model(&call.server, &model)?;
    let id = call.id(if kind == ChatApi::Chat { "chatcmpl-" } else { "cmpl-" });
    let include_usage = common.stream_options.is_some_and(|options| options.include_usage);
    let writer = ChatWriter { kind, id, created: call.created(), model, include_usage };
    let mut generation = call.server.engine.submit(prompt, limit);
    if common.stream.unwrap_or(false) {
        return Ok(stream::events(&call, writer, generation));
    }
    let text = generation.text().await;
    let (object, content) = match kind {
        ChatApi::Chat => {
            ("chat.completion", Content::Message(ChatMessage { role: Some("assistant"), content: &text }))
        }
        ChatApi::Completion => ("text_completion", Content::Text(&text)),
    };
    let choice = ChatChoice::new(content, Some(generation.finish.name()));
    Ok(whole(&call, &writer.envelope(object, &[choice], Some(TokenUsage::of(&generation)))))
}

// === impl ChatChoice ===

impl<'a> ChatChoice<'a> {
    fn new(content: Content<'a>, finish_reason: Option<&'static str>) -> Self {
        Self { index: 0, content, logprobs: None, finish_reason }
    }
}

// === impl TokenUsage ===

impl TokenUsage {
    fn of(generation: &Generation) -> Self {
        let (prompt_tokens, completion_tokens) = (generation.prompt_tokens, generation.tokens);
        Self { prompt_tokens, total_tokens: prompt_tokens + completion_tokens, completion_tokens }
    }
}

// === impl ChatWriter ===

impl ChatWriter {
    fn envelope<'a>(
        &'a self,
        object: &'static str,
        choices: &'a [ChatChoice<'a>],
        usage: Option<TokenUsage>,
    ) -> Envelope<'a> {
        Envelope { id: &self.id, object, created: self.created, model: &self.model, choices, usage }
    }

    fn chunk(&self, choices: &[ChatChoice<'_>], usage: Option<TokenUsage>) -> Bytes {
        let object = match self.kind {
            ChatApi::Chat => "chat.completion.chunk",
            ChatApi::Completion => "text_completion",
        };
        stream::data(&self.envelope(object, choices, usage))
    }

    fn content<'a>(&self, content: &'a str) -> Content<'a> {
        match self.kind {
            ChatApi::Chat => Content::Delta(ChatMessage { role: None, content }),
            ChatApi::Completion => Content::Text(content),
        }
    }
}

impl EventFormat for ChatWriter {
    fn opening(&mut self, _: &Generation) -> Vec<Bytes> {
        match self.kind {
            ChatApi::Chat => {
                let role = Content::Delta(ChatMessage { role: Some("assistant"), content: "" });
                vec![self.chunk(&[ChatChoice::new(role, None)], None)]
            }
            ChatApi::Completion => Vec::new(),
        }
    }

    fn token(&mut self, word: &str) -> Bytes {
        self.chunk(&[ChatChoice::new(self.content(word), None)], None)
    }

    fn closing(&mut self, generation: &Generation) -> Vec<Bytes> {
        let last = ChatChoice::new(self.content(""), Some(generation.finish.name()));
        let mut chunks = vec![self.chunk(&[last], None)];
        if self.include_usage {
            chunks.push(self.chunk(&[], Some(TokenUsage::of(generation))));
        }
        chunks.push(Bytes::from_static(b"data: [DONE]\n\n"));
        chunks
    }
}
