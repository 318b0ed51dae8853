//! Detects the first token in a streamed response.

use http::HeaderMap;
use serde_json::Value;

/// Scans a stream of server-sent events, split at any byte, for the first one with generated content. Buffers at most
/// one event of [`FirstToken::MAX_EVENT_BYTES`].
#[derive(Debug, Default)]
pub struct FirstToken {
    /// Data of the current event, a line feed after each line, followed by the incomplete line.
    event: Vec<u8>,
    /// Start of the incomplete line.
    line: usize,
    /// The incomplete line is not empty.
    has_line_bytes: bool,
    /// The event is too long and is skipped.
    is_skipping: bool,
    /// The last byte was a carriage return; a following line feed belongs to it.
    after_return: bool,
}

// === impl FirstToken ===

impl FirstToken {
    /// Maximum size of an event; longer ones are skipped. Events with a few tokens are shorter, but one that repeats
    /// the request may be long (`response.created`).
    pub const MAX_EVENT_BYTES: usize = 64 << 10;

    /// Returns whether a response with this head can have a first token: a successful, unencoded stream of events.
    pub fn may_be_in(status: http::StatusCode, headers: &HeaderMap) -> bool {
        let encoded = headers.get(http::header::CONTENT_ENCODING);
        status.is_success()
            && is_event_stream(headers)
            && encoded.is_none_or(|encoding| encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
    }

    /// Consumes the next part. Returns true once, when the first event with a token is complete.
    pub fn is_in(&mut self, mut part: &[u8]) -> bool {
        while !part.is_empty() {
            if std::mem::take(&mut self.after_return) && part[0] == b'\n' {
                part = &part[1..];
                continue;
            }
            let Some(end) = part.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
                self.keep(part);
                return false;
            };
            self.keep(&part[..end]);
            self.after_return = part[end] == b'\r';
            part = &part[end + 1..];
            if self.end_line() {
                return true;
            }
        }
        false
    }

    fn keep(&mut self, part: &[u8]) {
        self.has_line_bytes |= !part.is_empty();
        if self.event.len() + part.len() > Self::MAX_EVENT_BYTES {
            self.is_skipping = true;
            self.event = Vec::new();
        }
        if !self.is_skipping {
            self.event.extend_from_slice(part);
        }
    }

    /// Ends the current line. Returns true if it completes an event with a token.
    fn end_line(&mut self) -> bool {
        if !std::mem::take(&mut self.has_line_bytes) {
            let found = !self.is_skipping && has_token(&self.event);
            *self = Self {
                event: std::mem::take(&mut self.event),
                after_return: self.after_return,
                ..Self::default()
            };
            self.event.clear();
            return found;
        }
        if self.is_skipping {
            return false;
        }
        // One space after the colon is syntax (WHATWG HTML, section 9.2.6). Other fields are irrelevant.
        let line = &self.event[self.line..];
        match line.strip_prefix(b"data:") {
            Some(value) => {
                let prefix = line.len() - value.strip_prefix(b" ").unwrap_or(value).len();
                self.event.drain(self.line..self.line + prefix);
                self.event.push(b'\n');
            }
            None => self.event.truncate(self.line),
        }
        self.line = self.event.len();
        false
    }
}

/// Returns whether a response is a stream of server-sent events.
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
}

/// Returns whether a response is declared as JSON.
pub fn is_json(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|kind| {
        let suffix = kind.rsplit(|byte| *byte == b'+').next();
        kind.eq_ignore_ascii_case(b"application/json")
            || suffix.is_some_and(|suffix| suffix.len() < kind.len() && suffix.eq_ignore_ascii_case(b"json"))
    })
}

/// Returns the media type of a response, without parameters.
fn media_type(headers: &HeaderMap) -> Option<&[u8]> {
    let kind = headers.get(http::header::CONTENT_TYPE)?.as_bytes();
    kind.split(|byte| *byte == b';').next().map(<[u8]>::trim_ascii)
}

/// Returns whether an event has generated content: text, reasoning or a tool call. Excludes the role that vLLM sends
/// first, and the framing events of the Responses and Messages APIs.
fn has_token(data: &[u8]) -> bool {
    let Ok(event) = serde_json::from_slice::<Value>(data) else { return false };
    if let Some(choices) = event["choices"].as_array() {
        return choices.iter().any(|choice| {
            let delta = &choice["delta"];
            // Completions have `text`; chats have one of two names for reasoning (DeepSeek; OpenAI and current vLLM).
            [
                &choice["text"],
                &delta["content"],
                &delta["reasoning_content"],
                &delta["reasoning"],
                &delta["refusal"],
            ]
            .into_iter()
            .chain([&delta["tool_calls"], &delta["function_call"]])
            .any(is_something)
        });
    }
    match event["type"].as_str().unwrap_or_default() {
        "content_block_delta" => {
            let delta = &event["delta"];
            ["text", "thinking", "partial_json"].into_iter().any(|part| is_something(&delta[part]))
        }
        // The name of a tool; its arguments follow.
        "content_block_start" => is_something(&event["content_block"]["name"]),
        "response.output_item.added" => is_something(&event["item"]["name"]),
        kind => kind.ends_with(".delta") && is_something(&event["delta"]),
    }
}

fn is_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOKENS: [&str; 16] = [
        r#"{"choices":[{"index":0,"delta":{"content":"Hi"}}]}"#,
        r#"{"choices":[{"delta":{"content":null,"reasoning_content":"Hm"}}]}"#,
        r#"{"choices":[{"delta":{"reasoning":"Hm"}}]}"#,
        r#"{"choices":[{"delta":{"refusal":"No"}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":""}}]}}]}"#,
        r#"{"choices":[{"delta":{"content":""}},{"index":1,"delta":{"content":"second"}}]}"#,
        r#"{"object":"text_completion","choices":[{"text":" world"}]}"#,
        r#"{"type":"response.output_text.delta","delta":"Hi","sequence_number":4}"#,
        r#"{"type":"response.reasoning_text.delta","delta":"Hm"}"#,
        r#"{"type":"response.function_call_arguments.delta","delta":"{"}"#,
        r#"{"type":"response.output_item.added","item":{"type":"function_call","name":"f"}}"#,
        r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}"#,
        r#"{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"Hm"}}"#,
        r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{"}}"#,
        r#"{"type":"content_block_start","content_block":{"type":"tool_use","name":"f","input":{}}}"#,
        r#"{"type":"transcript.text.delta","delta":"Hi"}"#,
    ];

    const NONE: [&str; 15] = [
        r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
        r#"{"choices":[{"delta":{"role":"assistant","content":null,"tool_calls":[]}}]}"#,
        r#"{"choices":[],"usage":{"prompt_tokens":3}}"#,
        r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
        r#"{"choices":[{"text":""}]}"#,
        r#"{"type":"response.created","response":{"instructions":"delta"}}"#,
        r#"{"type":"response.output_item.added","item":{"type":"message","content":[]}}"#,
        r#"{"type":"response.output_text.delta","delta":""}"#,
        r#"{"type":"message_start","message":{"content":[]}}"#,
        r#"{"type":"content_block_start","content_block":{"type":"text","text":""}}"#,
        r#"{"type":"content_block_delta","delta":{"type":"signature_delta","signature":"x"}}"#,
        r#"{"type":"ping"}"#,
        r#"{"error":{"message":"Hi"}}"#,
        "[DONE]",
        "",
    ];

    #[test]
    fn token_is_generated_content() {
        for event in TOKENS {
            assert!(FirstToken::default().is_in(format!("data: {event}\n\n").as_bytes()), "{event}");
        }
        for event in NONE {
            assert!(!FirstToken::default().is_in(format!("data: {event}\n\n").as_bytes()), "{event}");
        }
    }

    #[test]
    fn event_ends_with_an_empty_line() {
        let token = TOKENS[0];
        let (a, b) = token.split_at(token.find(',').unwrap());
        for (text, found) in [
            (format!("data: {token}\n"), false),
            (format!("data:{token}\n\n"), true),
            (format!("event: x\nid: 7\ndata: {token}\n: beat\n\n"), true),
            (format!("data: {a}\ndata: {b}\n\n"), true),
            (format!("data: {token}\r\n\r\n"), true),
            (format!("data: {token}\r\r"), true),
            (format!(": data: {token}\n\n"), false),
            (format!("datum: {token}\n\n"), false),
            (format!("data: {a}\n\ndata: {b}\n\n"), false),
            (format!("\n\n: beat\n\ndata: {}\n\ndata: {token}\n\n", NONE[0]), true),
        ] {
            assert_eq!(FirstToken::default().is_in(text.as_bytes()), found, "{text:?}");
        }
    }

    #[test]
    fn long_event_is_skipped_and_not_buffered() {
        let mut first = FirstToken::default();
        let long = format!("data: {}", " ".repeat(FirstToken::MAX_EVENT_BYTES));
        for line in [&*long, "\n", "data: ", TOKENS[0], "\n", ": x", "\n"] {
            assert!(!first.is_in(line.as_bytes()), "still the same event");
            assert!(
                first.event.len() <= FirstToken::MAX_EVENT_BYTES + 1,
                "with the line feed of its last line"
            );
        }
        assert!(!first.is_in(b"\n"), "that was its end");
        assert!(first.is_in(format!("data: {}\n\n", TOKENS[0]).as_bytes()));
    }

    #[test]
    fn only_unencoded_success_stream_has_first_token() {
        let may = |status: u16, fields: &[(&'static str, &'static str)]| {
            let fields = fields.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            FirstToken::may_be_in(http::StatusCode::from_u16(status).unwrap(), &fields.collect())
        };
        let stream = ("content-type", "text/event-stream; charset=utf-8");
        assert!(may(200, &[stream]) && may(200, &[stream, ("content-encoding", "identity")]));
        assert!(!may(500, &[stream]) && !may(200, &[stream, ("content-encoding", "gzip")]));
        assert!(!may(200, &[("content-type", "application/json")]) && !may(200, &[]));
    }

    fn line_end() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["\n", "\r\n", "\r"])
    }

    proptest! {
        /// However a stream is cut into parts: the token is found in the part that ends its event, neither before nor
        /// later, and memory stays bounded.
        #[test]
        fn first_token_is_found_however_a_stream_is_split(
            before in prop::collection::vec((prop::sample::select(NONE.to_vec()), 0..3_u8), 0..6),
            token in prop::sample::select(TOKENS.to_vec()),
            end in line_end(),
            after in ".{0,40}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
        ) {
            let mut text = String::new();
            for (event, more) in before {
                text += &match more {
                    0 => format!("data: {event}{end}{end}"),
                    1 => format!(": beat{end}event: x{end}data:{event}{end}{end}"),
                    _ => format!("{end}: beat{end}"),
                };
            }
            text += &format!("data: {token}{end}");
            // The carriage return of a second line end ends the event already.
            let over = text.len() + 1;
            text += end;
            text += &after;
            let bytes = text.as_bytes();
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut first = FirstToken::default();
            for cut in cuts.windows(2) {
                let found = first.is_in(&bytes[cut[0]..cut[1]]);
                prop_assert_eq!(found, (cut[0] + 1..=cut[1]).contains(&over), "{:?} of {:?}", cut, &text);
                prop_assert!(first.event.len() <= FirstToken::MAX_EVENT_BYTES);
                if found {
                    break;
                }
            }
        }
    }
}
