//! Bodies and events in OpenAI's formats, except errors.

use bytes::Bytes;
use serde_json::{Value, json};

/// Last event of a stream of chunks.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

/// Formats an event. Data with several lines, such as pretty-printed JSON, becomes several `data` lines.
pub fn sse_data(data: &[u8]) -> Bytes {
    let mut event = Vec::with_capacity(data.len() + 8);
    let mut rest = data;
    loop {
        let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        event.extend_from_slice(b"data: ");
        event.extend_from_slice(&rest[..end.unwrap_or(rest.len())]);
        event.push(b'\n');
        let Some(end) = end else { break };
        rest = &rest[end..];
        rest = rest.strip_prefix(b"\r\n").unwrap_or(&rest[1..]);
    }
    event.push(b'\n');
    event.into()
}

/// Formats a comment. It ends with one newline: an empty line would dispatch an event, which breaks openai-go and,
/// after an `id:`, openai-python. Line breaks in the text would end the comment and become spaces.
pub fn sse_comment(text: &str) -> Bytes {
    format!(": {}\n", text.replace(['\r', '\n'], " ")).into()
}

/// `owned_by` of models not described by a server.
pub const MADE_UP_OWNER: &str = "anteroom";

/// Formats the response to `GET /v1/models`.
pub fn model_list<'a>(entries: impl IntoIterator<Item = &'a Value>) -> Bytes {
    let data: Vec<_> = entries.into_iter().collect();
    json!({"object": "list", "data": data}).to_string().into()
}

/// Formats a model named by a route but not described by a server. vLLM's clients load the tokenizer by `root`, which
/// equals the id unless vLLM serves the model under another name.
pub fn model_entry(id: &str) -> Value {
    json!({
        "id": id, "object": "model", "created": 0, "owned_by": MADE_UP_OWNER, "root": id, "parent": null,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multi_line_text_is_one_event() {
        for (data, event) in [
            ("{}", "data: {}\n\n"),
            ("", "data: \n\n"),
            ("{\n  \"a\": 1\r\n}\r", "data: {\ndata:   \"a\": 1\ndata: }\ndata: \n\n"),
        ] {
            assert_eq!(sse_data(data.as_bytes()), event.as_bytes());
        }
    }
}
