//! One request, as a client sees it, on our own clock.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::bench::http::Base;

/// What is sent, and until when its answer is waited for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) base: Base,
    pub(super) path: &'static str,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) id: String,
    pub(super) deadline: Instant,
    /// `--timeout`, for the error.
    pub(super) limit: Duration,
}

/// What became of it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// When it was written, to a connection that was there.
    pub(super) sent: Instant,
    /// When the first token of a streamed answer was read; heartbeats and the role are none.
    pub(super) first_token: Option<Instant>,
    /// When its answer ended, for good or bad.
    pub(super) ended: Instant,
    pub(super) status: Option<StatusCode>,
    /// Its `x-request-id`: of the answer, or the one that we gave it.
    pub(super) id: String,
    pub(super) error: Option<String>,
}

/// The longest line of a stream that is put together.
const LONGEST_LINE: usize = 4 << 20;

/// The most of an answer that is shown as an error.
const SHOWN: usize = 500;

/// Sends a request and reads its answer to the end.
pub(super) async fn ask(asked: Asked) -> Seen {
    let now = Instant::now();
    let mut seen =
        Seen { sent: now, first_token: None, ended: now, status: None, id: asked.id.clone(), error: None };
    let late =
        || Err(format!("no whole answer within {} (--timeout)", humantime::format_duration(asked.limit)));
    let ended = timeout_at(asked.deadline, seen.exchange(&asked)).await;
    seen.error = ended.unwrap_or_else(|_| late()).err();
    seen.ended = Instant::now();
    seen
}

// === impl Seen ===

impl Seen {
    async fn exchange(&mut self, asked: &Asked) -> Result<(), String> {
        let mut headers = asked.headers.clone();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("x-request-id", HeaderValue::from_str(&asked.id).map_err(|error| error.to_string())?);
        let request = asked.base.request(Method::POST, asked.path, &headers, asked.body.clone())?;
        let mut connection = asked.base.connect().await?;
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
        let body = body.map_err(|error| format!("the answer broke off: {error}"))?.to_bytes();
        let value = serde_json::from_slice::<Value>(&body).ok();
        match value.as_ref().and_then(error_of) {
            Some(error) => Err(error),
            None if !ok => Err(shortened(&String::from_utf8_lossy(&body))),
            None if value.is_none() => Err("the answer is not JSON".to_owned()),
            None => Ok(()),
        }
    }

    async fn read_stream(&mut self, mut body: Incoming) -> Result<(), String> {
        let mut lines = Lines::default();
        let mut done = false;
        while let Some(frame) = body.frame().await {
            let now = Instant::now();
            let frame = frame.map_err(|error| format!("the answer broke off: {error}"))?;
            for line in lines.take(frame.data_ref().map_or(&[][..], |data| data))? {
                done |= self.line(&line, now)?;
            }
        }
        if done { Ok(()) } else { Err("the answer ended without [DONE]".to_owned()) }
    }

    /// Takes a line of the stream, and says whether it was the last.
    fn line(&mut self, line: &str, now: Instant) -> Result<bool, String> {
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { return Ok(false) };
        if data == "[DONE]" {
            return Ok(true);
        }
        let chunk: Value =
            serde_json::from_str(data).map_err(|error| format!("a chunk is not JSON: {error}"))?;
        if let Some(error) = error_of(&chunk) {
            return Err(error);
        }
        if self.first_token.is_none() && has_token(&chunk) {
            self.first_token = Some(now);
        }
        Ok(false)
    }
}

/// Whether a chunk of a stream has something that the model said: text, thoughts or a call of a tool.
fn has_token(chunk: &Value) -> bool {
    let said = |value: &Value, keys: &[&str]| {
        keys.iter().any(|key| value[*key].as_str().is_some_and(|text| !text.is_empty()))
    };
    let choices = chunk["choices"].as_array();
    choices.is_some_and(|choices| {
        choices.iter().any(|choice| {
            let delta = &choice["delta"];
            said(choice, &["text"])
                || said(delta, &["content", "reasoning_content", "reasoning"])
                || delta["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty())
        })
    })
}

fn error_of(body: &Value) -> Option<String> {
    let error = body.get("error").filter(|error| !error.is_null())?;
    Some(shortened(error["message"].as_str().unwrap_or(&error.to_string())))
}

fn shortened(text: &str) -> String {
    let text = text.trim();
    if text.is_empty() { "no body".to_owned() } else { text.chars().take(SHOWN).collect() }
}

/// The lines of a stream that comes in parts.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// The lines that `part` completes.
    fn take(&mut self, part: &[u8]) -> Result<Vec<String>, String> {
        let Some(end) = part.iter().rposition(|byte| *byte == b'\n') else {
            if self.0.len() + part.len() > LONGEST_LINE {
                return Err(format!("a line of the answer is longer than {LONGEST_LINE} bytes"));
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
    fn lines_are_whole_however_the_stream_is_cut() {
        let mut lines = Lines::default();
        assert!(lines.take(b"data: {\"a\"").unwrap().is_empty());
        assert_eq!(lines.take(b": 1}\r\n\n: beat\nda").unwrap(), ["data: {\"a\": 1}", "", ": beat"]);
        assert_eq!(lines.take(b"ta: [DONE]\n").unwrap(), ["data: [DONE]"]);
        assert!(lines.take(&vec![b'x'; LONGEST_LINE + 1]).is_err());
    }

    #[test]
    fn a_token_is_what_the_model_said() {
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
    fn an_error_is_told_in_its_own_words() {
        assert_eq!(error_of(&json!({"error": {"message": "No."}})), Some("No.".to_owned()));
        assert_eq!(error_of(&json!({"error": "No."})), Some("\"No.\"".to_owned()));
        assert_eq!(error_of(&json!({"error": null, "choices": []})), None);
        assert_eq!(shortened(" \n"), "no body");
    }
}
