//! One request, measured by the client.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::bench::http::BaseUrl;

/// Request to send.
#[derive(Clone, Debug)]
pub(super) struct RequestSpec {
    pub(super) base: BaseUrl,
    pub(super) path: &'static str,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) id: String,
    pub(super) deadline: Instant,
    /// Value of `--timeout`, for the error text.
    pub(super) timeout: Duration,
}

/// Times and outcome of a request.
#[derive(Clone, Debug)]
pub(super) struct TimedRequest {
    /// Time of sending, on an established connection.
    pub(super) sent: Instant,
    /// Arrival of the first token of a streamed answer. Heartbeats and the role do not count.
    pub(super) first_token: Option<Instant>,
    /// End of the answer, complete or not.
    pub(super) ended: Instant,
    pub(super) status: Option<StatusCode>,
    /// `x-request-id` of the answer, or of the request if the answer has none.
    pub(super) id: String,
    pub(super) error: Option<String>,
}

/// Longest line of a stream that is buffered.
const MAX_SSE_LINE_BYTES: usize = 4 << 20;

/// Length to which the body of an answer is truncated in an error.
const MAX_ERROR_CHARS: usize = 500;

/// Sends a request and reads its answer to the end.
pub(super) async fn send(spec: RequestSpec) -> TimedRequest {
    let now = Instant::now();
    let mut trace = TimedRequest {
        sent: now,
        first_token: None,
        ended: now,
        status: None,
        id: spec.id.clone(),
        error: None,
    };
    let timed_out =
        || Err(format!("no complete answer within {} (--timeout)", humantime::format_duration(spec.timeout)));
    let ended = timeout_at(spec.deadline, trace.exchange(&spec)).await;
    trace.error = ended.unwrap_or_else(|_| timed_out()).err();
    trace.ended = Instant::now();
    trace
}

// === impl TimedRequest ===

impl TimedRequest {
    async fn exchange(&mut self, spec: &RequestSpec) -> Result<(), String> {
        let mut headers = spec.headers.clone();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("x-request-id", HeaderValue::from_str(&spec.id).map_err(|error| error.to_string())?);
        let request = spec.base.request(Method::POST, spec.path, &headers, spec.body.clone())?;
        let mut connection = spec.base.connect().await?;
        self.sent = Instant::now();
        let response = connection.send(request).await?;
        self.status = Some(response.status());
        if let Some(id) = response.headers().get("x-request-id").and_then(|id| id.to_str().ok()) {
            id.clone_into(&mut self.id);
        }
        let kind = response.headers().get(header::CONTENT_TYPE);
        let streams =
            kind.is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/event-stream"));
        if response.status() == StatusCode::OK && streams {
            return self.read_stream(response.into_body()).await;
        }
        let ok = response.status().is_success();
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| format!("answer interrupted: {error}"))?.to_bytes();
        let value = serde_json::from_slice::<Value>(&body).ok();
        match value.as_ref().and_then(error_message) {
            Some(error) => Err(error),
            None if !ok => Err(truncated(&String::from_utf8_lossy(&body))),
            None if value.is_none() => Err("the answer is not JSON".to_owned()),
            None => Ok(()),
        }
    }

    async fn read_stream(&mut self, mut body: Incoming) -> Result<(), String> {
        let mut lines = LineBuffer::default();
        let mut done = false;
        while let Some(frame) = body.frame().await {
            let now = Instant::now();
            let frame = frame.map_err(|error| format!("answer interrupted: {error}"))?;
            for line in lines.take(frame.data_ref().map_or(&[][..], |data| data))? {
                done |= self.line(&line, now)?;
            }
        }
        if done { Ok(()) } else { Err("the answer ended without [DONE]".to_owned()) }
    }

    /// Processes a line of the stream. Returns `true` after the last one.
    fn line(&mut self, line: &str, now: Instant) -> Result<bool, String> {
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { return Ok(false) };
        if data == "[DONE]" {
            return Ok(true);
        }
        let chunk: Value =
            serde_json::from_str(data).map_err(|error| format!("a chunk is not JSON: {error}"))?;
        if let Some(error) = error_message(&chunk) {
            return Err(error);
        }
        if self.first_token.is_none() && has_token(&chunk) {
            self.first_token = Some(now);
        }
        Ok(false)
    }
}

/// Returns whether a chunk contains model output: text, reasoning or a tool call.
fn has_token(chunk: &Value) -> bool {
    let has_text = |value: &Value, keys: &[&str]| {
        keys.iter().any(|key| value[*key].as_str().is_some_and(|text| !text.is_empty()))
    };
    let choices = chunk["choices"].as_array();
    choices.is_some_and(|choices| {
        choices.iter().any(|choice| {
            let delta = &choice["delta"];
            has_text(choice, &["text"])
                || has_text(delta, &["content", "reasoning_content", "reasoning"])
                || delta["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty())
        })
    })
}

fn error_message(body: &Value) -> Option<String> {
    let error = body.get("error").filter(|error| !error.is_null())?;
    Some(truncated(error["message"].as_str().unwrap_or(&error.to_string())))
}

fn truncated(text: &str) -> String {
    let text = text.trim();
    if text.is_empty() { "no body".to_owned() } else { text.chars().take(MAX_ERROR_CHARS).collect() }
}

/// Splits a stream into lines.
#[derive(Default)]
struct LineBuffer(Vec<u8>);

impl LineBuffer {
    /// Returns the lines completed by `part`.
    fn take(&mut self, part: &[u8]) -> Result<Vec<String>, String> {
        let Some(end) = part.iter().rposition(|byte| *byte == b'\n') else {
            if self.0.len() + part.len() > MAX_SSE_LINE_BYTES {
                return Err(format!("a line of the answer is longer than {MAX_SSE_LINE_BYTES} bytes"));
            }
            self.0.extend_from_slice(part);
            return Ok(Vec::new());
        };
        let (ending, rest) = part.split_at(end + 1);
        self.0.extend_from_slice(ending);
        let whole = std::mem::replace(&mut self.0, rest.to_vec());
        Ok(String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_are_reassembled_from_parts() {
        let mut lines = LineBuffer::default();
        assert!(lines.take(b"data: {\"a\"").unwrap().is_empty());
        assert_eq!(lines.take(b": 1}\r\n\n: beat\nda").unwrap(), ["data: {\"a\": 1}", "", ": beat"]);
        assert_eq!(lines.take(b"ta: [DONE]\n").unwrap(), ["data: [DONE]"]);
        assert!(lines.take(&vec![b'x'; MAX_SSE_LINE_BYTES + 1]).is_err());
    }

    #[test]
    fn token_is_text_reasoning_or_tool_call() {
        let delta = |delta: Value| has_token(&json!({"choices": [{"delta": delta}]}));
        assert!(!delta(json!({"role": "assistant", "content": ""})));
        assert!(!delta(json!({"role": "assistant", "content": null, "tool_calls": []})));
        assert!(delta(json!({"content": "Hi"})));
        assert!(delta(json!({"reasoning_content": "Hm"})));
        assert!(delta(json!({"tool_calls": [{"index": 0}]})));
        assert!(has_token(&json!({"choices": [{"text": "Hi"}]})));
        assert!(!has_token(&json!({"choices": [], "usage": {"total_tokens": 3}})));
    }

    #[test]
    fn error_message_is_extracted_from_the_body() {
        assert_eq!(error_message(&json!({"error": {"message": "No."}})), Some("No.".to_owned()));
        assert_eq!(error_message(&json!({"error": "No."})), Some("\"No.\"".to_owned()));
        assert_eq!(error_message(&json!({"error": null, "choices": []})), None);
        assert_eq!(truncated(" \n"), "no body");
    }
}
