//! A member of a crowd: encoding of its request and parsing of the response.

use std::sync::LazyLock;

use memchr::{memchr, memmem};
use serde_json::Value;

use crate::http::{self, Framing};

/// Bytes of a request body.
pub(crate) const MEMBER_BODY_BYTES: usize = 2048;
/// Prefix of the number that identifies a request.
const NUMBER_PREFIX: &[u8] = b"\"user\":\"n";
const DIGITS: usize = 8;

/// A response: its bytes on the wire and its body.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) response: Vec<u8>,
    pub(crate) body: Vec<u8>,
}

/// JSON response.
pub(crate) static PLAIN: LazyLock<Reply> = LazyLock::new(|| {
    let body = crate::backend::COMPLETION_BODY.as_bytes().to_vec();
    let head = format!("content-type: application/json\r\ncontent-length: {}", body.len());
    Reply::new(&head, &body, body.clone())
});

/// Response of server-sent events.
pub(crate) static STREAMED: LazyLock<Reply> = LazyLock::new(|| {
    let chunk = |content: &str| {
        let choice = format!(r#"{{"index":0,"delta":{{"content":"{content}"}},"finish_reason":null}}"#);
        format!(
            "data: {{\"id\":\"chatcmpl-0\",\"object\":\"chat.completion.chunk\",\"model\":\"tiny\",\"choices\":[{choice}]}}\n\n"
        )
    };
    let body = ["Hello", ".", " How", " can I help?"].map(chunk).concat() + "data: [DONE]\n\n";
    let framed = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let head = "content-type: text/event-stream\r\ntransfer-encoding: chunked";
    Reply::new(head, framed.as_bytes(), body.into_bytes())
});

/// A request that carries a number.
#[derive(Debug)]
pub(crate) struct NumberedRequest {
    bytes: Vec<u8>,
    digits: usize,
}

/// State of a member's pending response. Most responses arrive in one piece, so that nothing is buffered.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    /// The head of a stream has arrived, perhaps long before its content.
    begun: bool,
    /// Received bytes of an incomplete head or chunk.
    part: Vec<u8>,
    /// Text of the stream without heartbeats.
    text: Vec<u8>,
}

/// Result of one read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReadProgress {
    /// The head of a 200 arrived before its body.
    pub(crate) begun: bool,
    pub(crate) heartbeats: u32,
    pub(crate) end: Option<RequestEnd>,
}

/// Expected end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestEnd {
    /// The model server's response, complete.
    Served,
    /// The queue was full: 503, `hold_queue_full`.
    Refused,
}

// === impl Reply ===

impl Reply {
    fn new(head: &str, framed: &[u8], body: Vec<u8>) -> Self {
        let response = [format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n").as_bytes(), framed].concat();
        Self { response, body }
    }

    /// Checks the text of a stream that has ended.
    pub(crate) fn ended(&self, text: &[u8]) -> Result<RequestEnd, String> {
        // After heartbeats there may be an event without content.
        let event = memmem::find(text, b"\n\n").map_or(0, |end| end + 2);
        let is_empty = memmem::find(&text[..event], br#""delta":{"content":""}"#).is_some();
        let text = if is_empty { &text[event..] } else { text };
        if text == self.body {
            Ok(RequestEnd::Served)
        } else {
            Err(format!("unexpected text of a stream: {}", String::from_utf8_lossy(text)))
        }
    }
}

// === impl ReadProgress ===

impl ReadProgress {
    /// Recognizes the comments that report the time waited, including the final one.
    pub(crate) fn is_heartbeat(comment: &[u8]) -> bool {
        memmem::find(comment, b" waited=").is_some()
    }
}

// === impl NumberedRequest ===

impl NumberedRequest {
    /// Creates a chat request with a body of [`MEMBER_BODY_BYTES`] bytes, the model name near the end.
    pub(crate) fn new(streamed: bool) -> Self {
        let start = r#"{"messages":[{"role":"user","content":""#;
        let user = String::from_utf8_lossy(NUMBER_PREFIX);
        let end = format!(
            r#""}}],"model":"tiny","stream":{streamed},"max_tokens":64,{user}{}"}}"#,
            "0".repeat(DIGITS)
        );
        let text = "Tell me more about it. ".chars().cycle();
        let body: String = start
            .chars()
            .chain(text.take(MEMBER_BODY_BYTES - start.len() - end.len()))
            .chain(end.chars())
            .collect();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: loadtest\r\nAccept: */*\r\n\
                    Content-Type: application/json\r\nContent-Length: 2048\r\n\r\n";
        let bytes = [head.as_bytes(), body.as_bytes()].concat();
        let digits = bytes.len() - DIGITS - 2;
        Self { bytes, digits }
    }

    pub(crate) fn numbered(&mut self, number: u32) -> &[u8] {
        let digits = format!("{number:0DIGITS$}");
        self.bytes[self.digits..self.digits + DIGITS].copy_from_slice(&digits.as_bytes()[..DIGITS]);
        &self.bytes
    }

    /// Returns the body alone.
    pub(crate) fn body(&mut self, number: u32) -> &[u8] {
        let bytes = self.numbered(number);
        &bytes[bytes.len() - MEMBER_BODY_BYTES..]
    }

    /// Extracts the number from a request body.
    pub(crate) fn number(body: &[u8]) -> Option<u32> {
        let at = memmem::rfind(body, NUMBER_PREFIX)? + NUMBER_PREFIX.len();
        std::str::from_utf8(body.get(at..at + DIGITS)?).ok()?.parse().ok()
    }
}

// === impl Inbox ===

impl Inbox {
    /// Processes the bytes of one read.
    ///
    /// # Errors
    /// Any response other than those of [`RequestEnd`].
    pub(crate) fn take(&mut self, read: &[u8]) -> Result<ReadProgress, String> {
        let mut news = ReadProgress::default();
        let kept = std::mem::take(&mut self.part);
        let joined;
        let mut rest = if kept.is_empty() {
            read
        } else {
            joined = [kept.as_slice(), read].concat();
            &joined
        };
        if !self.begun {
            rest = match self.head(rest, &mut news)? {
                Some(rest) => rest,
                None => return Ok(self.keep(rest, news)),
            };
        }
        while self.begun && news.end.is_none() {
            match self.chunk(rest, &mut news)? {
                Some(left) => rest = left,
                None => return Ok(self.keep(rest, news)),
            }
        }
        if rest.is_empty() { Ok(news) } else { Err("received data after the response".into()) }
    }

    fn keep(&mut self, rest: &[u8], news: ReadProgress) -> ReadProgress {
        self.part = rest.to_vec();
        news
    }

    /// Parses a complete response, or the head of a stream; returns the remaining bytes.
    fn head<'a>(&mut self, buf: &'a [u8], news: &mut ReadProgress) -> Result<Option<&'a [u8]>, String> {
        let Some(head) = http::head(buf).map_err(|error| error.to_string())? else { return Ok(None) };
        let status = http::status(head.start);
        let after = &buf[head.len..];
        let length = match head.body {
            Framing::Chunked if status == Some(200) => {
                self.begun = true;
                news.begun = true;
                return Ok(Some(after));
            }
            Framing::Length(length) => length,
            other => return Err(format!("{} with a body of {other:?}", String::from_utf8_lossy(head.start))),
        };
        let Some((body, rest)) = after.split_at_checked(length) else { return Ok(None) };
        news.end = Some(match status {
            Some(200) if body == PLAIN.body => RequestEnd::Served,
            Some(503) => refusal(&buf[..head.len], body)?,
            _ => {
                let (status, body) = (String::from_utf8_lossy(head.start), String::from_utf8_lossy(body));
                return Err(format!("{status}: {body}"));
            }
        });
        Ok(Some(rest))
    }

    /// Parses a chunk of a stream; returns the remaining bytes.
    fn chunk<'a>(&mut self, buf: &'a [u8], news: &mut ReadProgress) -> Result<Option<&'a [u8]>, String> {
        let Some(end) = memchr(b'\n', buf) else { return Ok(None) };
        let size = std::str::from_utf8(&buf[..end]).ok().map(str::trim_end);
        let size = size.and_then(|size| usize::from_str_radix(size, 16).ok()).ok_or("a chunk has no size")?;
        let Some((data, after)) = buf[end + 1..].split_at_checked(size) else { return Ok(None) };
        let Some(rest) = after.get(2..) else { return Ok(None) };
        if size == 0 {
            let text = std::mem::take(&mut self.text);
            self.begun = false;
            news.end = Some(STREAMED.ended(&text)?);
        } else if data.starts_with(b":") {
            news.heartbeats += u32::from(ReadProgress::is_heartbeat(data));
        } else {
            self.text.extend_from_slice(data);
        }
        Ok(Some(rest))
    }
}

/// Checks that a 503 is that of a full queue: in OpenAI's format, with the headers that SDKs evaluate.
fn refusal(head: &[u8], body: &[u8]) -> Result<RequestEnd, String> {
    let said: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = &said["error"];
    let text = |key: &str| error[key].as_str().unwrap_or_default();
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let has = |line: &str| head.contains(&format!("\r\n{line}"));
    let shaped = text("code") == "hold_queue_full"
        && text("type") == "server_error"
        && !text("message").is_empty()
        && error.get("param").is_some_and(Value::is_null);
    let headers =
        ["content-type: application/json", "retry-after: ", "x-should-retry: true", "x-request-id: "];
    if shaped && headers.into_iter().all(has) {
        return Ok(RequestEnd::Refused);
    }
    Err(format!("a 503 other than that of a full queue: {head}{said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(end: RequestEnd) -> ReadProgress {
        ReadProgress { end: Some(end), ..ReadProgress::default() }
    }

    /// Cuts the bytes in two at every position; the results must all be equal.
    fn parse_split_everywhere(bytes: &[u8]) -> Vec<Result<ReadProgress, String>> {
        let sum = |one: ReadProgress, two: ReadProgress| ReadProgress {
            begun: one.begun || two.begun,
            heartbeats: one.heartbeats + two.heartbeats,
            end: one.end.or(two.end),
        };
        let cut = |at: usize| {
            let mut inbox = Inbox::default();
            let first = inbox.take(&bytes[..at])?;
            Ok(sum(first, inbox.take(&bytes[at..])?))
        };
        (1..bytes.len()).map(cut).collect()
    }

    #[test]
    fn request_has_its_size_and_number() {
        for streamed in [false, true] {
            let mut message = NumberedRequest::new(streamed);
            let bytes = message.numbered(1234);
            let head = http::head(bytes).unwrap().unwrap();
            assert_eq!(head.body, Framing::Length(MEMBER_BODY_BYTES));
            let body = &bytes[head.len..];
            assert_eq!(body.len(), MEMBER_BODY_BYTES);
            let json: Value = serde_json::from_slice(body).unwrap();
            assert_eq!((&json["model"], &json["stream"]), (&"tiny".into(), &streamed.into()));
            assert_eq!(NumberedRequest::number(body), Some(1234));
        }
    }

    #[test]
    fn plain_response_counts_as_served() {
        let reply = &PLAIN.response;
        assert!(parse_split_everywhere(reply).into_iter().all(|news| news == Ok(end(RequestEnd::Served))));
        let changed = String::from_utf8_lossy(reply).replace("tiny", "huge");
        assert!(Inbox::default().take(changed.as_bytes()).is_err());
    }

    #[test]
    fn heartbeats_are_counted_apart_from_the_stream() {
        let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
        let beat = chunk(": cold start phase=load waited=20s position=1\n\n");
        let timing = chunk(": server-timing: hold;dur=1.0\n\n");
        let body = String::from_utf8(STREAMED.body.clone()).unwrap();
        let empty =
            "data: {\"id\":\"chatcmpl-0\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"}}]}\n\n";
        let body = empty.to_owned() + &body;
        let (one, two) = body.split_at(100);
        let (one, two) = (chunk(one), chunk(two));
        let answer = format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{beat}{beat}{timing}{one}{two}0\r\n\r\n"
        );
        let expected = ReadProgress { begun: true, heartbeats: 2, end: Some(RequestEnd::Served) };
        assert!(parse_split_everywhere(answer.as_bytes()).into_iter().all(|news| news == Ok(expected)));
        let cut = answer.replace(&two, "");
        assert!(Inbox::default().take(cut.as_bytes()).is_err());
    }

    #[test]
    fn refusal_has_openai_format() {
        let body =
            r#"{"error":{"message":"full","type":"server_error","param":null,"code":"hold_queue_full"}}"#;
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nx-request-id: 1\r\n\
             retry-after: 5\r\nx-should-retry: true\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        assert!(
            parse_split_everywhere(answer.as_bytes())
                .into_iter()
                .all(|news| news == Ok(end(RequestEnd::Refused)))
        );
        for wrong in
            [("hold_queue_full", "queue_hold_full"), ("x-should-retry", "x-would-retry-"), ("503 ", "500 ")]
        {
            let answer = answer.replace(wrong.0, wrong.1);
            assert!(Inbox::default().take(answer.as_bytes()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn unexpected_response_is_an_error() {
        let twice = [PLAIN.response.as_slice(), &PLAIN.response].concat();
        assert!(Inbox::default().take(&twice).is_err());
    }
}
