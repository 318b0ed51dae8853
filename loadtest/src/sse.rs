//! Streams of the load test: server-sent events as model servers write them, one per chunk of the body, all of the
//! same length. The text of each event carries its stream, its number and the time it was written.

/// Head of a streamed response. Model servers send the last header to keep nginx from buffering events.
pub(crate) const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\
    transfer-encoding: chunked\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n\r\n";

/// End of the body.
pub(crate) const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

const EVENT_PREFIX: &str = concat!(
    r#"data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1750000000,"#,
    r#""model":"tiny","choices":[{"index":0,"delta":{"content":""#
);
/// Hexadecimal digits of the stream, the number and the timestamp.
const STAMP_HEX_DIGITS: usize = 8 + 8 + 16;
const EVENT_SUFFIX: &str = concat!(r#""},"logprobs":null,"finish_reason":null}]}"#, "\n\n");

/// Bytes of an event.
pub(crate) const LEN: usize = EVENT_PREFIX.len() + STAMP_HEX_DIGITS + EVENT_SUFFIX.len();

/// Content of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EventStamp {
    /// Connection of the backend that carries the stream.
    pub(crate) stream: u32,
    /// Number of the event, from 0, without gaps.
    pub(crate) number: u32,
    /// Write time of the event, from [`crate::clock::stamp`].
    pub(crate) written: u64,
}

/// Reusable buffer with the chunk of one event.
#[derive(Debug)]
pub(crate) struct EventChunk {
    bytes: Vec<u8>,
    mark: usize,
}

// === impl EventChunk ===

impl EventChunk {
    pub(crate) fn new() -> Self {
        let size = format!("{LEN:x}\r\n");
        let mark = size.len() + EVENT_PREFIX.len();
        let bytes =
            [&size, EVENT_PREFIX, &"0".repeat(STAMP_HEX_DIGITS), EVENT_SUFFIX, "\r\n"].concat().into_bytes();
        Self { bytes, mark }
    }

    /// Fills in `mark` and returns the bytes to send, framing included.
    pub(crate) fn with(&mut self, mark: EventStamp) -> &[u8] {
        let digits = &mut self.bytes[self.mark..self.mark + STAMP_HEX_DIGITS];
        hex(&mut digits[..8], mark.stream.into());
        hex(&mut digits[8..16], mark.number.into());
        hex(&mut digits[16..], mark.written);
        &self.bytes
    }
}

/// Reads an event. Returns `None` if it is not one of the load test's, or was visibly changed.
pub(crate) fn read(event: &[u8]) -> Option<EventStamp> {
    let mark = event.strip_prefix(EVENT_PREFIX.as_bytes())?.strip_suffix(EVENT_SUFFIX.as_bytes())?;
    let number = |digits: &[u8]| u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
    if mark.len() != STAMP_HEX_DIGITS {
        return None;
    }
    Some(EventStamp {
        stream: u32::try_from(number(&mark[..8])?).ok()?,
        number: u32::try_from(number(&mark[8..16])?).ok()?,
        written: number(&mark[16..])?,
    })
}

fn hex(digits: &mut [u8], mut value: u64) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(value & 15) as usize];
        value >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http;

    #[test]
    fn event_round_trips_its_stamp() {
        let mark = EventStamp { stream: 0xdead, number: 17, written: 0x0123_4567_89ab_cdef };
        let mut template = EventChunk::new();
        let bytes = template.with(mark);
        let chunk = http::chunk(bytes).unwrap().unwrap();
        assert_eq!((chunk.len, chunk.data.len()), (bytes.len(), LEN));
        assert_eq!(read(chunk.data), Some(mark));
        assert_eq!(read(&chunk.data[1..]), None);
        assert!((180..260).contains(&LEN), "{LEN}");
    }

    #[test]
    fn event_is_a_completion_chunk() {
        let mut template = EventChunk::new();
        let bytes = template.with(EventStamp { stream: 1, number: 2, written: 3 });
        let data = http::chunk(bytes).unwrap().unwrap().data;
        let json = data.strip_prefix(b"data: ").unwrap();
        let value: serde_json::Value = serde_json::from_slice(json).unwrap();
        assert_eq!(value["choices"][0]["delta"]["content"].as_str().map(str::len), Some(STAMP_HEX_DIGITS));
    }
}
