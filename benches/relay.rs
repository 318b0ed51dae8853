//! Requests through the whole proxy, over in-memory connections.
//!
//! `cargo bench --bench relay`

mod support;

use anteroom::openai::{FirstToken, OpenEvent, sse_comment};
use divan::{
    Bencher, black_box,
    counter::{BytesCount, ItemsCount},
};
use support::Harness;

fn main() {
    divan::main();
}

const STREAMED: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

fn request(stream: bool) -> (Vec<u8>, Vec<u8>) {
    let content = "lorem ipsum ".repeat(20);
    let body = serde_json::json!({
        "model": "tiny", "stream": stream, "messages": [{ "role": "user", "content": content }],
    })
    .to_string();
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         authorization: Bearer none\r\nuser-agent: bench\r\ncontent-length: {length}\r\n\r\n"
    );
    ([head.as_bytes(), body.as_bytes()].concat(), body.into_bytes())
}

/// Builds an event like vLLM, in its own chunk.
fn chunk(number: usize) -> Vec<u8> {
    let event = event(number);
    format!("{:x}\r\n{event}\r\n", event.len()).into_bytes()
}

fn event(number: usize) -> String {
    format!(
        "data: {{\"id\":\"chatcmpl-5f2b8c\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"tiny\",\
         \"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{number:06}\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
    )
}

/// A warm request with a small JSON response.
#[divan::bench]
fn warm_request(bencher: Bencher<'_, '_>) {
    const SMALL_RESPONSE: &[u8] =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n{\"choices\":[{}]}";
    let (request, body) = request(false);
    let mut between = Harness::new();
    bencher.bench_local(|| {
        between.request(&request, &body);
        between.answer(&SMALL_RESPONSE[..SMALL_RESPONSE.len() - 1], b"[{}]");
    });
}

/// One streamed event, from the server's write to the client's read.
#[divan::bench]
fn sse_event(bencher: Bencher<'_, '_>) {
    let mut between = streaming();
    let mut number = 0;
    bencher.with_inputs(|| next_event_number(&mut number)).bench_local_values(|number| {
        let chunk = chunk(number);
        between.answer(&chunk, &chunk[chunk.len() - 60..]);
    });
}

/// Several events in one write.
#[divan::bench(args = [10, 100])]
fn sse_burst(bencher: Bencher<'_, '_>, events: usize) {
    let mut between = streaming();
    let mut number = 0;
    bencher
        .counter(ItemsCount::new(events))
        .with_inputs(|| (0..events).flat_map(|_| chunk(next_event_number(&mut number))).collect::<Vec<_>>())
        .bench_local_refs(|burst| between.answer(burst, &burst[burst.len() - 60..]));
}

/// Returns consecutive numbers, so that events differ.
fn next_event_number(number: &mut usize) -> usize {
    *number = (*number + 1) % 1_000_000;
    *number
}

fn streaming() -> Harness {
    let (request, body) = request(true);
    let mut between = Harness::new();
    between.request(&request, &body);
    let first = [STREAMED.as_bytes(), &chunk(0)].concat();
    between.answer(&first, &chunk(0));
    between
}

/// Extra cost until the first token of the first stream of a cold start, whose events are parsed.
#[divan::bench]
fn first_token(bencher: Bencher<'_, '_>) {
    let event = event(0).replace("\"content\":\"000000\"", "\"role\":\"assistant\",\"content\":\"\"");
    let mut first = FirstToken::default();
    bencher.counter(BytesCount::of_slice(event.as_bytes())).bench_local(|| {
        assert!(!first.is_in(black_box(event.as_bytes())), "it has none");
    });
}

/// Extra cost of a stream after heartbeats, which tracks open events.
#[divan::bench]
fn open_event(bencher: Bencher<'_, '_>) {
    let event = event(0);
    let mut open = OpenEvent::default();
    bencher.counter(BytesCount::of_slice(event.as_bytes())).bench_local(|| {
        open.pass(black_box(event.as_bytes()));
        assert!(open.end().is_empty());
    });
}

/// Formatting of a heartbeat.
#[divan::bench]
fn heartbeat(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| sse_comment(black_box("cold start phase=load waited=12s position=512 left=31s")));
}
