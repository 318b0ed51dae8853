//! Server-sent events: detection of the first token, and events and comments added to a stream.

use anteroom::openai::{Dialect, FirstToken, OpenEvent, sse_comment, sse_data};
use http::StatusCode;

use super::cuts;

/// Checks an input that is a model server's stream, up to its interruption.
pub fn holds(stream: &[u8]) {
    splits_do_not_change_result(stream);
    first_token_matches_slow_reader(stream);
    appended_event_is_separate(stream);
    written_events_round_trip(stream);
}

fn splits_do_not_change_result(stream: &[u8]) {
    let [bytes, parts] = cuts::of(stream);
    let found = part_with_first_token(&bytes);
    let mut end = 0;
    let mut part_of_end = None;
    for (index, part) in parts.iter().enumerate() {
        end += part.len();
        if part_of_end.is_none() && found.is_some_and(|found| found < end) {
            part_of_end = Some(index);
        }
    }
    assert_eq!(part_with_first_token(&parts), part_of_end);
    let end_after = |parts: &[&[u8]]| {
        let mut event = OpenEvent::default();
        parts.iter().for_each(|part| event.pass(part));
        event.end()
    };
    assert_eq!(end_after(&bytes), end_after(&[stream]));
    assert_eq!(end_after(&parts), end_after(&[stream]));
}

/// Returns the index of the part with the end of the first event that has a token.
fn part_with_first_token(parts: &[&[u8]]) -> Option<usize> {
    let mut first = FirstToken::default();
    parts.iter().position(|part| first.is_in(part))
}

fn first_token_matches_slow_reader(stream: &[u8]) {
    if stream.len() > FirstToken::MAX_EVENT_BYTES {
        return;
    }
    let (events, _) = read(stream);
    let has_token = |event: &&FramedEvent| FirstToken::default().is_in(&write(&event.data));
    let expected = events.iter().find(has_token).map(|event| event.end - 1);
    assert_eq!(part_with_first_token(&cuts::of(stream)[0]), expected);
}

fn appended_event_is_separate(stream: &[u8]) {
    let mut event = OpenEvent::default();
    event.pass(stream);
    let more = sse_data(b"{}");
    let (before, open) = read(stream);
    let (after, _) = read(&[stream, event.end(), &more].concat());
    let data = |events: &[FramedEvent]| events.iter().map(|event| event.data.clone()).collect::<Vec<_>>();
    let mut expected = data(&before);
    // The event that is still open ends with the data received so far.
    expected.extend(open);
    expected.push(b"{}".to_vec());
    assert_eq!(data(&after), expected);
    assert!(event.end().is_empty() || !event.end().starts_with(b"\r"));
}

fn written_events_round_trip(text: &[u8]) {
    let (events, open) = read(&sse_comment(&String::from_utf8_lossy(text)));
    assert!(events.is_empty() && open.is_none(), "a comment is no event");
    let (events, open) = read(&sse_data(text));
    let lines = |text: &[u8]| String::from_utf8_lossy(text).replace("\r\n", "\n").replace('\r', "\n");
    assert_eq!(events.len(), 1);
    assert_eq!(lines(&events[0].data), lines(text));
    assert_eq!(open, None);
    for (dialect, count) in [(Dialect::OpenAi, 1), (Dialect::Anthropic, 1), (Dialect::Responses, 2)] {
        let (events, open) = read(&dialect.upstream_error_event(StatusCode::BAD_GATEWAY, text, "id"));
        assert_eq!((events.len(), open), (count, None));
        let error: serde_json::Value = serde_json::from_slice(&events[0].data).expect("JSON");
        assert!(error.get("error").is_some(), "{error}");
    }
}

struct FramedEvent {
    data: Vec<u8>,
    /// Position after the byte that ended the event.
    end: usize,
}

/// Parses events as defined by WHATWG HTML, section 9.2.6, including those without data, which only some clients
/// ignore. Also returns the data of an unfinished event, as if it ended here.
fn read(stream: &[u8]) -> (Vec<FramedEvent>, Option<Vec<u8>>) {
    let mut lines = Vec::new();
    let (mut begin, mut at) = (0, 0);
    while at < stream.len() {
        let length = match stream[at..] {
            [b'\n', ..] | [b'\r', ..] => 1,
            _ => 0,
        };
        if length == 0 {
            at += 1;
            continue;
        }
        // A carriage return ends the event, whatever follows.
        lines.push((&stream[begin..at], at + 1));
        at += if stream[at..].starts_with(b"\r\n") { 2 } else { 1 };
        begin = at;
    }
    let mut events = Vec::new();
    let mut fields: Vec<&[u8]> = Vec::new();
    for (line, end) in lines {
        if line.is_empty() {
            if !fields.is_empty() {
                events.push(FramedEvent { data: data(&fields), end });
                fields.clear();
            }
        } else if !line.starts_with(b":") {
            fields.push(line);
        }
    }
    let last = &stream[begin..];
    if !last.is_empty() && !last.starts_with(b":") {
        fields.push(last);
    }
    let open = (!fields.is_empty()).then(|| data(&fields));
    (events, open)
}

fn data(fields: &[&[u8]]) -> Vec<u8> {
    let values = fields.iter().filter_map(|field| field.strip_prefix(b"data:"));
    let values: Vec<_> = values.map(|value| value.strip_prefix(b" ").unwrap_or(value)).collect();
    values.join(&b'\n')
}

fn write(data: &[u8]) -> Vec<u8> {
    let lines = data.split(|byte| *byte == b'\n');
    let mut event: Vec<u8> = lines.flat_map(|line| [b"data: ", line, b"\n"].concat()).collect();
    event.push(b'\n');
    event
}
