//! Events without content, for APIs that have them.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};

use super::ApiFormat;

/// Returns whether the API has an empty event that may precede all others. OpenAI's Responses API has none: its SDKs
/// require `response.created` first.
pub const fn has_empty_event(shape: ApiFormat) -> bool {
    matches!(shape, ApiFormat::Chat | ApiFormat::Completion | ApiFormat::Messages)
}

/// Creates an event without content: a chunk of the completion `id`, or Anthropic's `ping`. `None` if the API has none.
pub fn empty_event(shape: ApiFormat, model: &str, id: &str) -> Option<Bytes> {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let prefix = if shape == ApiFormat::Chat { "chatcmpl" } else { "cmpl" };
    empty(shape, json!({"id": format!("{prefix}-{id}"), "created": created, "model": model}))
}

/// Creates an empty event to send before `next`, as a chunk of the same completion: openai-go's accumulator rejects
/// chunks with different ids. `model` and `id` are used if `next` has none.
pub fn empty_event_before(next: &[u8], shape: ApiFormat, model: &str, id: &str) -> Option<Bytes> {
    let data = next.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"data:"));
    let first = data.and_then(|data| serde_json::from_slice::<Value>(data).ok());
    match first {
        Some(first) if first["id"].is_string() => {
            empty(shape, json!({"id": first["id"], "created": first["created"], "model": first["model"]}))
        }
        _ => empty_event(shape, model, id),
    }
}

fn empty(shape: ApiFormat, mut chunk: Value) -> Option<Bytes> {
    let (object, choice) = match shape {
        ApiFormat::Chat => (
            "chat.completion.chunk",
            json!({"index": 0, "delta": {"content": ""}, "logprobs": null, "finish_reason": null}),
        ),
        ApiFormat::Completion => {
            ("text_completion", json!({"index": 0, "text": "", "logprobs": null, "finish_reason": null}))
        }
        ApiFormat::Messages => {
            return Some(Bytes::from_static(b"event: ping\ndata: {\"type\": \"ping\"}\n\n"));
        }
        ApiFormat::Responses | ApiFormat::Plain | ApiFormat::Form | ApiFormat::Opaque => return None,
    };
    chunk["object"] = object.into();
    chunk["choices"] = json!([choice]);
    Some(format!("data: {chunk}\n\n").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(event: &[u8]) -> Value {
        let data = event.strip_prefix(b"data: ").and_then(|data| data.strip_suffix(b"\n\n"));
        serde_json::from_slice(data.unwrap()).unwrap()
    }

    #[test]
    fn empty_event_takes_the_next_completion_id() {
        let next =
            b"data: {\"id\":\"chatcmpl-7\",\"created\":5,\"model\":\"org/m\",\"choices\":[]}\n\ndata: [DO";
        let empty = chunk(&empty_event_before(next, ApiFormat::Chat, "tiny", "0123").unwrap());
        assert_eq!(
            empty,
            json!({
                "id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 5, "model": "org/m",
                "choices": [{"index": 0, "delta": {"content": ""}, "logprobs": null, "finish_reason": null}],
            })
        );
        // An event that is cut, one without an id, and none at all.
        for next in [&b"data: {\"id\":\"cmpl-7\",\"crea"[..], b"data: {\"error\":{}}\n\n", b""] {
            let empty = chunk(&empty_event_before(next, ApiFormat::Completion, "tiny", "0123").unwrap());
            assert_eq!((&empty["id"], &empty["model"]), (&json!("cmpl-0123"), &json!("tiny")));
            assert_eq!(
                (&empty["object"], &empty["choices"][0]["text"]),
                (&json!("text_completion"), &json!(""))
            );
        }
    }

    #[test]
    fn empty_event_exists_where_the_api_has_one() {
        use ApiFormat::{Chat, Completion, Form, Messages, Opaque, Plain, Responses};
        for shape in [Chat, Completion, Messages, Responses, Plain, Form, Opaque] {
            assert_eq!(empty_event(shape, "tiny", "0").is_some(), has_empty_event(shape), "{shape:?}");
        }
        let ping = empty_event(ApiFormat::Messages, "tiny", "0").unwrap();
        assert_eq!(ping, &b"event: ping\ndata: {\"type\": \"ping\"}\n\n"[..]);
    }
}
