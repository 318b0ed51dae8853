//! Heartbeats to waiting clients, and errors that occur after the early head.

use std::{io::Write, time::Duration};

use flate2::{Compression, write::GzEncoder};
use serde_json::Value;

use crate::support::{
    TestProxy, TestUpstream, Wire,
    upstream::{LAST, STREAM, UpstreamCall, answer, chunk},
    wire::{BodyPart, CHAT, chat, post, post_with, streaming},
};

const EARLY_HEARTBEATS: &str = "keepalive: { mode: comment, after: 10ms, interval: 10ms }";

/// Returns the next part, which must be a heartbeat.
async fn next_heartbeat(client: &mut Wire) -> String {
    match client.part().await {
        BodyPart::Data(data) => String::from_utf8(data).unwrap(),
        other => panic!("{other:?} instead of a heartbeat"),
    }
}

/// Sends a request that is held, and returns the client after its early head and first heartbeat.
async fn early(proxy: &TestProxy, request: &str, content_type: &str) -> (Wire, String) {
    let mut client = proxy.sent(request).await;
    let head = client.head().await.unwrap();
    assert_eq!((head.status(), head.get("transfer-encoding")), (200, Some("chunked")));
    assert!(head.get("content-type").unwrap().starts_with(content_type), "{head:?}");
    assert_eq!(head.get("cache-control"), Some("no-cache"));
    assert_eq!(head.get("x-request-id").map(str::len), Some(32));
    // The total wait is not known yet.
    assert_eq!(head.get("server-timing"), None);
    let first = next_heartbeat(&mut client).await;
    (client, first)
}

/// Returns the rest of the stream after the heartbeats, which must be whole comment lines, and after the empty event
/// that accompanies them where the API has one.
async fn after_beats(client: &mut Wire) -> String {
    let rest = client.rest().await.expect("an orderly end");
    let is_beat = |line: &&str| line.starts_with(": ");
    let events: String = rest.split_inclusive('\n').skip_while(is_beat).collect();
    match events.split_once("\n\n") {
        Some((first, rest)) if is_empty(first) => rest.to_owned(),
        _ => events,
    }
}

/// Returns true if an event is a chunk without content, or Anthropic's `ping`.
fn is_empty(event: &str) -> bool {
    if event == "event: ping\ndata: {\"type\": \"ping\"}" {
        return true;
    }
    let data = event.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok());
    data.is_some_and(|chunk| {
        let choice = &chunk["choices"][0];
        choice["finish_reason"].is_null() && (choice["delta"]["content"] == "" || choice["text"] == "")
    })
}

/// Returns the error in a single event.
fn error_of(event: &str) -> Value {
    let data = event.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n"));
    let json: Value = serde_json::from_str(data.unwrap_or_else(|| panic!("one event: {event:?}"))).unwrap();
    assert!(json["error"]["message"].is_string(), "{json}");
    json["error"].clone()
}

#[tokio::test]
async fn streaming_client_gets_heartbeats_then_response() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await;
    let (mut first, beat_1) = early(&proxy, &streaming("first"), "text/event-stream").await;
    let (mut second, beat_2) = early(&proxy, &streaming("second"), "text/event-stream").await;
    for (line, position) in [(&beat_1, 1), (&beat_2, 2)] {
        assert!(line.starts_with(": cold start phase="), "{line:?}");
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "one newline: {line:?}");
        let (_, waited) = line.split_once(" waited=").unwrap();
        let seconds = waited.split_once("s ").unwrap().0;
        assert!(seconds.parse::<u64>().is_ok(), "{line:?}");
        assert!(line.contains(&format!(" position={position}")), "{line:?}");
    }
    for _ in 0..3 {
        let line = next_heartbeat(&mut first).await;
        assert!(line.starts_with(": cold start ") && line.matches('\n').count() == 1, "{line:?}");
    }
    upstream.wake();
    let mut calls = [upstream.call().await, upstream.call().await];
    // Dispatched, but without a response: heartbeats continue.
    for client in [&mut first, &mut second] {
        client.parts_until("phase=first_byte").await;
    }
    for call in &mut calls {
        call.body().await;
        call.send(STREAM).await;
        call.send(chunk("data: 1\n\ndata: ")).await;
    }
    for client in [&mut first, &mut second] {
        // No heartbeat between the parts of a response, nor inside an event.
        let all = client.parts_until("data: 1\n\ndata: ").await;
        assert!(all.ends_with("data: 1\n\ndata: "), "{all:?}");
    }
    for call in calls {
        call.finish(chunk("2\n\n") + LAST).await;
    }
    for client in [&mut first, &mut second] {
        assert_eq!(client.rest().await.as_deref(), Some("2\n\n"));
    }
    proxy.await_outcome("completed", 200, 2).await;
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn fast_or_plain_requests_get_no_early_answer() {
    for (keepalive, request) in [
        ("keepalive: { mode: comment, after: 10m }", streaming("x")),
        (EARLY_HEARTBEATS, chat("x")),
        ("keepalive: { mode: off, after: 10ms, interval: 10ms }", streaming("x")),
        ("keepalive: { mode: chunk, after: 10ms, interval: 10ms }", chat("x")),
    ] {
        let mut upstream = TestUpstream::cold().await;
        let proxy = TestProxy::tiny(&upstream.url(), keepalive).await;
        let mut client = proxy.sent(request).await;
        proxy.await_tiny_held(1).await;
        upstream.probed().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer("200 OK", &[("x-own", "1")], "the answer")).await;
        let response = client.response().await;
        assert_eq!((response.get("x-own"), &*response.text()), (Some("1"), "the answer"), "{keepalive}");
        assert_eq!(response.get("x-anteroom-cold-start"), Some("true"));
        proxy.stop(&[("completed", 1)]).await;
    }
}

#[tokio::test]
async fn deadline_after_early_answer_is_an_event() {
    let upstream = TestUpstream::cold().await;
    let proxy =
        TestProxy::tiny(&upstream.url(), &format!("{EARLY_HEARTBEATS}, hold: {{ timeout: 3s }}")).await;
    let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    let error = error_of(&after_beats(&mut client).await);
    assert_eq!(
        (error["code"].as_str(), error["type"].as_str()),
        (Some("cold_start_timeout"), Some("server_error"))
    );
    // Metrics count the original outcome and status.
    proxy.await_outcome("cold_start_timeout", 504, 1).await;
    proxy.stop(&[("cold_start_timeout", 1)]).await;
}

#[tokio::test]
async fn server_error_after_early_answer_is_an_event() {
    let own = r#"{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}"#;
    let cases = [
        ("400 Bad Request", own, "400", "BadRequestError", "too long"),
        (
            "404 Not Found",
            r#"{"detail":"Not Found"}"#,
            "404",
            "invalid_request_error",
            r#"{"detail":"Not Found"}"#,
        ),
        (
            "500 Internal Server Error",
            "Internal Server Error",
            "500",
            "server_error",
            "Internal Server Error",
        ),
        ("503 Busy", "two\nlines", "503", "server_error", "two\nlines"),
    ];
    for (status, body, code, kind, message) in cases {
        let mut upstream = TestUpstream::cold().await;
        // The target is not a gateway.
        let more = format!("{EARLY_HEARTBEATS}, gateway: {{ notYet: {{ for: 0s }} }}");
        let proxy = TestProxy::tiny(&upstream.url(), &more).await;
        let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer(status, &[("Content-Type", "application/json")], body)).await;
        let error = error_of(&after_beats(&mut client).await);
        assert_eq!((error["message"].as_str(), error["type"].as_str()), (Some(message), Some(kind)));
        assert_eq!(error["code"].to_string().trim_matches('"'), code);
        proxy.await_outcome("completed", code.parse().unwrap(), 1).await;
        proxy.stop(&[("completed", 1)]).await;
    }
    // A response that is not a stream becomes one event.
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await;
    let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    upstream.wake();
    upstream.call().await.echo().await;
    assert_eq!(after_beats(&mut client).await, "data: {\"text\":\"x\"}\n\n");
}

#[tokio::test]
async fn failure_after_early_answer_is_an_event() {
    for (begun, told) in
        [("data: half an ev", "data: half an ev\n\n"), ("data: 1\n\n", "data: 1\n\n"), ("", "")]
    {
        let mut upstream = TestUpstream::cold().await;
        let proxy = TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await;
        let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.send(STREAM).await;
        if !begun.is_empty() {
            call.send(chunk(begun)).await;
            client.parts_until(begun).await;
        }
        call.reset();
        let rest = after_beats(&mut client).await;
        let rest = format!("{begun}{rest}");
        let error = error_of(rest.strip_prefix(told).unwrap_or_else(|| panic!("{rest:?}")));
        assert_eq!(error["code"], "upstream_error");
        proxy.await_outcome("upstream_error", 200, 1).await;
        proxy.stop(&[("upstream_error", 1)]).await;
    }
    // Before the head the request is retried, and the client gets an error once the tries are used up.
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await;
    let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    upstream.wake();
    for _ in 0..2 {
        let mut call = upstream.call().await;
        call.body().await;
        call.reset();
    }
    assert_eq!(error_of(&after_beats(&mut client).await)["code"], "upstream_error");
    proxy.await_outcome("upstream_error", 502, 1).await;
    proxy.stop(&[("upstream_error", 1)]).await;
}

#[tokio::test]
async fn client_with_heartbeats_may_disconnect() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await;
    let (client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    drop(client);
    proxy.await_tiny_held(0).await;
    proxy.await_outcome("client_gone", 499, 1).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn short_sdk_timeout_advances_heartbeats() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "keepalive: { after: 10m, interval: 10m }").await;
    let request = streaming("x").replace("Host:", "x-stainless-read-timeout: 0.1\r\nHost:");
    let (mut client, _) = early(&proxy, &request, "text/event-stream").await;
    next_heartbeat(&mut client).await;
    next_heartbeat(&mut client).await;
    assert_eq!(proxy.route("tiny").await["held"], 1, "and its time-out is no deadline any more");
    drop(client);
    proxy.await_tiny_held(0).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn heartbeat_chunks_match_the_requested_api() {
    let mut upstream = TestUpstream::cold().await;
    let proxy =
        TestProxy::tiny(&upstream.url(), "keepalive: { mode: chunk, after: 10ms, interval: 10ms }").await;
    let body = r#"{"model":"tiny","stream":true}"#;
    for (path, object, content) in [
        (CHAT, "chat.completion.chunk", "/choices/0/delta/content"),
        ("/v1/completions", "text_completion", "/choices/0/text"),
    ] {
        let (mut client, first) = early(&proxy, &post(path, body), "text/event-stream").await;
        for event in [first, next_heartbeat(&mut client).await] {
            let data = event.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n")).unwrap();
            let chunk: Value = serde_json::from_str(data).unwrap();
            assert_eq!((&chunk["object"], &chunk["model"]), (&object.into(), &"tiny".into()));
            assert_eq!(chunk.pointer(content).and_then(Value::as_str), Some(""));
            assert_eq!(chunk["choices"][0]["finish_reason"], Value::Null);
        }
    }
    proxy.await_tiny_held(0).await;
    // Where the API has no event that the proxy could imitate, comments are sent.
    let (mut client, first) = early(&proxy, &post("/v1/responses", body), "text/event-stream").await;
    assert!(first.starts_with(": "), "{first:?}");
    upstream.wake();
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    call.finish(chunk("event: x\ndata: {}\n\n") + LAST).await;
    assert_eq!(after_beats(&mut client).await, "event: x\ndata: {}\n\n");
    proxy.stop(&[("completed", 1), ("client_gone", 2)]).await;
}

#[tokio::test]
async fn whitespace_precedes_json_if_configured() {
    let keepalive = "keepalive: { mode: whitespace, after: 10ms, interval: 10ms }";
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), keepalive).await;
    let (mut client, first) = early(&proxy, &chat("x"), "application/json").await;
    assert_eq!((&*first, &*next_heartbeat(&mut client).await), ("\n", "\n"));
    let (mut stream, first) = early(&proxy, &streaming("y"), "text/event-stream").await;
    assert!(first.starts_with(": "), "a stream has its comments: {first:?}");
    upstream.wake();
    upstream.call().await.echo().await;
    upstream.call().await.echo().await;
    assert_eq!(client.rest().await.unwrap().trim_start_matches('\n'), r#"{"text":"x"}"#);
    assert_eq!(after_beats(&mut stream).await, "data: {\"text\":\"y\"}\n\n");
    proxy.stop(&[("completed", 2)]).await;

    // A failure is reported as the JSON body.
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), &format!("{keepalive}, hold: {{ timeout: 3s }}")).await;
    let (mut client, _) = early(&proxy, &chat("x"), "application/json").await;
    let error: Value = serde_json::from_str(&client.rest().await.unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "cold_start_timeout");
    proxy.stop(&[("cold_start_timeout", 1)]).await;
}

/// Speech is binary for any request, and rendering and token counts are JSON even with `stream: true`.
#[tokio::test]
async fn answers_of_unknown_form_get_no_heartbeats() {
    let stream = r#"{"model":"tiny","stream":true}"#;
    let whole = r#"{"model":"tiny"}"#;
    for (mode, path, body) in [
        ("comment", "/v1/audio/speech", stream),
        ("chunk", "/v1/audio/speech", stream),
        ("whitespace", "/v1/audio/speech", stream),
        ("whitespace", "/v1/audio/speech", whole),
        ("comment", "/v1/embeddings", stream),
        ("chunk", "/v1/chat/completions/render", stream),
    ] {
        let mut upstream = TestUpstream::cold().await;
        let keepalive = format!("keepalive: {{ mode: {mode}, after: 1ms, interval: 1ms }}");
        let proxy = TestProxy::tiny(&upstream.url(), &keepalive).await;
        let mut client = proxy.sent(post(path, body)).await;
        proxy.await_tiny_held(1).await;
        upstream.probed().await;
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer("200 OK", &[("Content-Type", "audio/mpeg")], "ID3\u{4}")).await;
        let response = client.response().await;
        assert_eq!(
            (response.get("content-type"), &*response.text()),
            (Some("audio/mpeg"), "ID3\u{4}"),
            "{mode} {path}"
        );
        proxy.stop(&[("completed", 1)]).await;
    }
}

/// Starts a proxy whose target is known to be up, so that requests are not held.
async fn warm(upstream: &mut TestUpstream, more: &str) -> TestProxy {
    let proxy = TestProxy::tiny(&upstream.url(), more).await;
    let mut client = proxy.sent(chat("warm")).await;
    upstream.call().await.echo().await;
    client.response().await;
    proxy.await_tiny_in_flight(0).await;
    proxy
}

fn gzip(text: &str) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(text.as_bytes()).unwrap();
    gzip.finish().unwrap()
}

/// Sends a response with an encoded body.
async fn finish_encoded(call: UpstreamCall, status: &str, kind: &str, coding: &str, body: &[u8]) {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Encoding: {coding}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    call.finish([head.as_bytes(), body].concat()).await;
}

const EVENT: &str = "data: {\"id\":\"chatcmpl-1\",\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n";

/// An early head has no Content-Encoding, so the proxy requests an unencoded response; a body that is encoded anyway is
/// decoded, or becomes an error that says so.
#[tokio::test]
async fn encoded_answers_after_an_early_head_are_decoded() {
    const JSON: &str = "application/json";
    const EVENTS: &str = "text/event-stream";
    const WHITESPACE: &str = "keepalive: { mode: whitespace, after: 10ms, interval: 10ms }";
    let own = r#"{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}"#;
    let asked = |stream: bool| {
        let body = format!(r#"{{"model":"tiny","stream":{stream}}}"#);
        post_with(CHAT, &[("Accept-Encoding", "gzip, br"), ("accept-encoding", "zstd")], &body)
    };
    for (keepalive, stream, status, kind, coding, body, told) in [
        (EARLY_HEARTBEATS, true, "200 OK", EVENTS, "gzip", gzip(EVENT), EVENT),
        (EARLY_HEARTBEATS, true, "400 Bad Request", JSON, "gzip", gzip(own), "too long"),
        (EARLY_HEARTBEATS, true, "422 Unprocessable", JSON, "gzip", gzip(own), "too long"),
        (EARLY_HEARTBEATS, true, "200 OK", EVENTS, "br", b"?".to_vec(), "`br`"),
        (EARLY_HEARTBEATS, true, "400 Bad Request", JSON, "zstd", b"?".to_vec(), "`zstd`"),
        (EARLY_HEARTBEATS, true, "200 OK", EVENTS, "gzip", EVENT.into(), "cannot be decoded"),
        (WHITESPACE, false, "200 OK", JSON, "gzip", gzip(r#"{"a":1}"#), r#"{"a":1}"#),
        (WHITESPACE, false, "400 Bad Request", JSON, "x-gzip", gzip(own), "too long"),
        (WHITESPACE, false, "200 OK", JSON, "br", b"?".to_vec(), "`br`"),
    ] {
        let mut upstream = TestUpstream::cold().await;
        let proxy = TestProxy::tiny(&upstream.url(), keepalive).await;
        let (mut client, _) = early(&proxy, &asked(stream), if stream { EVENTS } else { JSON }).await;
        upstream.wake();
        let mut call = upstream.call().await;
        assert_eq!(call.head.all("accept-encoding"), ["identity"]);
        call.body().await;
        finish_encoded(call, status, kind, coding, &body).await;
        let rest = after_beats(&mut client).await;
        let rest = rest.trim_start_matches('\n');
        match told {
            EVENT => assert_eq!(rest, EVENT),
            r#"{"a":1}"# => assert_eq!(rest, told),
            told if stream => assert!(error_of(rest)["message"].as_str().unwrap().contains(told), "{rest}"),
            told => {
                let error: Value = serde_json::from_str(rest).unwrap();
                assert!(error["error"]["message"].as_str().unwrap().contains(told), "{rest}");
            }
        }
        let lost = told.starts_with('`') || told == "cannot be decoded";
        proxy.stop(&[(if lost { "upstream_error" } else { "completed" }, 1)]).await;
    }
}

/// Without an early head, client and server negotiate the encoding.
#[tokio::test]
async fn encoded_answers_without_an_early_head_pass() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = warm(&mut upstream, "keepalive: { mode: chunk, interval: 1ms }").await;
    let mut client = proxy
        .sent(post_with(CHAT, &[("Accept-Encoding", "gzip")], r#"{"model":"tiny","stream":true}"#))
        .await;
    let mut call = upstream.call().await;
    assert_eq!(call.head.all("accept-encoding"), ["gzip"]);
    call.body().await;
    call.send(STREAM.replace("\r\n\r\n", "\r\nContent-Encoding: gzip\r\n\r\n")).await;
    assert_eq!(client.head().await.unwrap().get("content-encoding"), Some("gzip"));
    // The body is encoded, so no heartbeat may be inserted.
    tokio::time::sleep(Duration::from_millis(30)).await;
    let part = gzip(EVENT);
    call.send(format!("{:x}\r\n", part.len())).await;
    call.finish([&part[..], b"\r\n0\r\n\r\n"].concat()).await;
    assert_eq!(client.part().await, BodyPart::Data(part));
    proxy.stop(&[("completed", 2)]).await;
}

/// The form announced by an early head is kept, whatever the server sends.
#[tokio::test]
async fn answers_of_another_form_become_errors() {
    const WHITESPACE: &str = "keepalive: { mode: whitespace, after: 10ms, interval: 10ms }";
    for (keepalive, request, status, kind, message) in [
        (EARLY_HEARTBEATS, streaming("x"), "200 OK", "audio/mpeg", "answered with audio/mpeg"),
        (WHITESPACE, chat("x"), "200 OK", "audio/mpeg", "answered with audio/mpeg"),
        (WHITESPACE, chat("x"), "200 OK", "text/event-stream", "answered with text/event-stream"),
        (WHITESPACE, chat("x"), "422 Unprocessable", "text/plain", "ID3"),
    ] {
        let mut upstream = TestUpstream::cold().await;
        let proxy = TestProxy::tiny(&upstream.url(), keepalive).await;
        let (mut client, _) = early(&proxy, &request, "").await;
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer(status, &[("Content-Type", kind)], "ID3")).await;
        let rest = after_beats(&mut client).await;
        let rest = rest.trim_start_matches('\n');
        let error = match keepalive {
            EARLY_HEARTBEATS => error_of(rest),
            _ => serde_json::from_str::<Value>(rest).unwrap()["error"].clone(),
        };
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
        let outcome = if status == "200 OK" { "upstream_error" } else { "completed" };
        proxy.stop(&[(outcome, 1)]).await;
    }
}

const LATE_HEARTBEATS: &str = "keepalive: { after: 10m, interval: 10ms }";

/// The head of a response does not end the wait: heartbeats continue until the first byte of the body.
#[tokio::test]
async fn heartbeats_go_on_until_the_first_byte() {
    for cold in [true, false] {
        let mut upstream = if cold { TestUpstream::cold().await } else { TestUpstream::warm().await };
        let proxy = match cold {
            true => TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await,
            false => warm(&mut upstream, LATE_HEARTBEATS).await,
        };
        let mut client = if cold {
            let (client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
            upstream.wake();
            client
        } else {
            proxy.sent(streaming("x")).await
        };
        let mut call = upstream.call().await;
        call.body().await;
        call.send(STREAM).await;
        if cold {
            client.parts_until("server-timing").await;
        } else {
            assert_eq!(client.head().await.unwrap().get("x-accel-buffering"), Some("no"));
        }
        for _ in 0..3 {
            let line = next_heartbeat(&mut client).await;
            assert!(line.starts_with(": waiting phase=first_byte waited="), "{line:?}");
        }
        call.send(chunk(EVENT)).await;
        // An event of the same completion, without content, precedes it in the same write.
        let first = client.parts_until(EVENT).await;
        let events: String = first.split_inclusive('\n').skip_while(|line| line.starts_with(": ")).collect();
        let (empty, rest) = events.split_once("\n\n").unwrap();
        assert!(is_empty(empty) && empty.contains("\"id\":\"chatcmpl-1\""), "{events}");
        assert_eq!(rest, EVENT);
        // No heartbeats follow, however long the server takes.
        tokio::time::sleep(Duration::from_millis(50)).await;
        call.finish(chunk("data: 2\n\n") + LAST).await;
        assert_eq!(client.rest().await.as_deref(), Some("data: 2\n\n"));
        proxy.stop(&[("completed", if cold { 1 } else { 2 })]).await;
    }
}

/// The response's own head determines its form, even if the request body was not parsed, and for white space before
/// JSON; a response with a Content-Length leaves no room for heartbeats.
#[tokio::test]
async fn heartbeats_before_first_byte_follow_the_response() {
    let anything = |more: &str| format!("match: {{}}, {more}");
    let json = STREAM.replace("text/event-stream", "application/json");
    let length = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\n";
    for (more, head, expected) in [
        (anything(LATE_HEARTBEATS), STREAM, Some(": waiting ")),
        (anything("keepalive: { mode: chunk, interval: 10ms }"), STREAM, Some("data: {")),
        (anything("keepalive: { mode: whitespace, interval: 10ms }"), &*json, Some("\n")),
        (anything(LATE_HEARTBEATS), &*json, None),
        (anything("keepalive: { mode: off, interval: 10ms }"), STREAM, None),
        (anything(LATE_HEARTBEATS), length, None),
    ] {
        let mut upstream = TestUpstream::warm().await;
        let proxy = warm(&mut upstream, &more).await;
        let mut client = proxy.sent(streaming("x")).await;
        let mut call = upstream.call().await;
        call.body().await;
        call.send(head).await;
        let head = client.head().await.unwrap();
        if let Some(expected) = expected {
            for _ in 0..2 {
                let beat = next_heartbeat(&mut client).await;
                assert!(beat.starts_with(expected), "{beat:?}");
            }
        } else {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        match head.get("content-length") {
            Some(_) => call.finish("data: 1\n\n").await,
            None => call.finish(chunk("data: 1\n\n") + LAST).await,
        }
        let body = client.body(&head).await.unwrap();
        let body = String::from_utf8(body).unwrap();
        assert!(body.ends_with("data: 1\n\n") && (expected.is_some() || body.len() == 9), "{body:?}");
        proxy.stop(&[("completed", 2)]).await;
    }
}

/// `upstream.idleTimeout` still bounds the endpoint's own silence.
#[tokio::test]
async fn heartbeats_do_not_lift_the_idle_timeout() {
    let mut upstream = TestUpstream::warm().await;
    let more = "keepalive: { after: 10m, interval: 10ms }, upstream: { idleTimeout: 2s }";
    let proxy = warm(&mut upstream, more).await;
    let mut client = proxy.sent(streaming("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    client.parts_until(": waiting ").await;
    assert_eq!(client.rest().await, None, "it breaks off");
    proxy.stop(&[("completed", 1), ("upstream_error", 1)]).await;
}

/// Opt-in: heartbeats fill pauses between events, but never split one.
#[tokio::test]
async fn pauses_between_events_get_heartbeats_on_request() {
    for mode in ["comment", "chunk"] {
        for cold in [true, false] {
            let keepalive =
                format!("keepalive: {{ mode: {mode}, after: 10ms, interval: 10ms, whileStreaming: true }}");
            let mut upstream = if cold { TestUpstream::cold().await } else { TestUpstream::warm().await };
            let proxy = match cold {
                true => TestProxy::tiny(&upstream.url(), &keepalive).await,
                false => warm(&mut upstream, &keepalive).await,
            };
            let mut client = proxy.sent(streaming("x")).await;
            if cold {
                client.head().await.unwrap();
                upstream.wake();
            }
            let mut call = upstream.call().await;
            call.body().await;
            call.send(STREAM).await;
            call.send(chunk(EVENT)).await;
            if !cold {
                client.head().await.unwrap();
            }
            client.parts_until(EVENT).await;
            for _ in 0..2 {
                let beat = next_heartbeat(&mut client).await;
                let expected = if mode == "chunk" { "data: {" } else { ": waiting phase=next_event " };
                assert!(beat.starts_with(expected), "{beat:?}");
            }
            call.send(chunk("data: half")).await;
            client.parts_until("data: half").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            call.send(chunk(" of it\n")).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            call.send(chunk("\n")).await;
            let rest = client.parts_until("\n\n").await;
            assert!(rest.starts_with(" of it\n\n"), "{rest:?}");
            client.parts_until(if mode == "chunk" { "data: {" } else { ": waiting" }).await;
            // Nothing follows the last event.
            call.send(chunk("data: [DONE]\n\n")).await;
            client.parts_until("data: [DONE]\n\n").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            call.finish(LAST).await;
            assert_eq!(client.rest().await.as_deref(), Some(""));
            proxy.stop(&[("completed", if cold { 1 } else { 2 })]).await;
        }
    }
}

/// A client that tolerates less silence than the route's interval gets heartbeats earlier, even from a warm target.
#[tokio::test]
async fn short_sdk_timeout_advances_heartbeats_after_head() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = warm(&mut upstream, "keepalive: { after: 10m, interval: 10m }").await;
    let request = streaming("x").replace("Host:", "x-stainless-read-timeout: 0.1\r\nHost:");
    let mut client = proxy.sent(request).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    client.parts_until(": waiting phase=first_byte").await;
    call.finish(LAST).await;
    client.rest().await.unwrap();
    proxy.stop(&[("completed", 2)]).await;
}

/// The `chunk` mode sends no comments, not even the one with timings.
#[tokio::test]
async fn chunk_mode_sends_no_comments() {
    let keepalive = "keepalive: { mode: chunk, after: 10ms, interval: 10ms }";
    let body = r#"{"model":"tiny","stream":true}"#;
    for path in [CHAT, "/v1/completions", "/v1/messages"] {
        let mut upstream = TestUpstream::cold().await;
        let proxy = TestProxy::tiny(&upstream.url(), keepalive).await;
        let (mut client, first) = early(&proxy, &post(path, body), "text/event-stream").await;
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.send(STREAM).await;
        call.finish(chunk("data: 1\n\n") + LAST).await;
        let all = first + &client.rest().await.unwrap();
        let events: Vec<_> = all.split_terminator("\n\n").collect();
        let (last, beats) = events.split_last().unwrap();
        assert_eq!(*last, "data: 1");
        assert!(beats.iter().all(|event| is_empty(event)), "{all}");
        proxy.stop(&[("completed", 1)]).await;
    }
}

/// Events generated by the proxy are also separated from comments by an empty event.
#[tokio::test]
async fn errors_after_comments_follow_an_empty_event() {
    let upstream = TestUpstream::cold().await;
    let proxy =
        TestProxy::tiny(&upstream.url(), &format!("{EARLY_HEARTBEATS}, hold: {{ timeout: 3s }}")).await;
    let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    let rest = client.rest().await.unwrap();
    let events: String = rest.split_inclusive('\n').skip_while(|line| line.starts_with(": ")).collect();
    let (empty, error) = events.split_once("\n\n").unwrap();
    assert!(is_empty(empty), "{events}");
    assert_eq!(error_of(error)["code"], "cold_start_timeout");
    proxy.stop(&[("cold_start_timeout", 1)]).await;
}

fn choosing(choice: &str, path: &str, stream: bool) -> String {
    let body = format!(r#"{{"model":"tiny","stream":{stream}}}"#);
    post_with(path, &[("X-Anteroom-Keepalive", choice)], &body)
}

/// The client knows best what it can parse: its choice overrides the route's, and is not forwarded.
#[tokio::test]
async fn client_chooses_its_heartbeats() {
    for (mode, choice, expected) in [
        ("comment", "off", None),
        ("comment", "chunk", Some("data: {")),
        ("chunk", "comment", Some(": ")),
        ("off", "comment", Some(": ")),
        ("whitespace", "off", None),
    ] {
        let mut upstream = TestUpstream::cold().await;
        let keepalive = format!("keepalive: {{ mode: {mode}, after: 10ms, interval: 10ms }}");
        let proxy = TestProxy::tiny(&upstream.url(), &keepalive).await;
        let mut client = proxy.sent(choosing(choice, CHAT, true)).await;
        proxy.await_tiny_held(1).await;
        if let Some(expected) = expected {
            client.head().await.unwrap();
            let beat = next_heartbeat(&mut client).await;
            assert!(beat.starts_with(expected), "{mode}, {choice}: {beat:?}");
        } else {
            upstream.probed().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        upstream.wake();
        let mut call = upstream.call().await;
        assert_eq!(call.head.get("x-anteroom-keepalive"), None);
        call.body().await;
        call.finish(answer("200 OK", &[("Content-Type", "text/event-stream")], EVENT)).await;
        if expected.is_none() {
            let response = client.response().await;
            assert_eq!(
                (response.get("content-length"), &*response.text()),
                (Some(&*EVENT.len().to_string()), EVENT)
            );
        } else {
            assert!(client.rest().await.unwrap().ends_with(EVENT));
        }
        proxy.stop(&[("completed", 1)]).await;
    }
    // `off` also suppresses the white space before complete responses, and applies to warm responses too.
    let mut upstream = TestUpstream::warm().await;
    let proxy = warm(&mut upstream, LATE_HEARTBEATS).await;
    let mut client = proxy.sent(choosing("off", CHAT, true)).await;
    let mut call = upstream.call().await;
    assert_eq!(call.head.get("x-anteroom-keepalive"), None);
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    call.finish(chunk(EVENT) + LAST).await;
    assert_eq!(client.rest().await.as_deref(), Some(EVENT));
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn unreadable_choice_of_heartbeats_is_named() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), EARLY_HEARTBEATS).await;
    for choice in ["loud", "", "Off", "off, chunk", "whitespace"] {
        let response = proxy.ask(choosing(choice, CHAT, true)).await;
        response.is_error(400, "invalid_request");
        let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(
            message.contains("x-anteroom-keepalive") && message.contains(&format!("\"{choice}\"")),
            "{message}"
        );
    }
    assert_eq!(proxy.route("tiny").await["held"], 0, "and wakes nothing");
    proxy.stop(&[]).await;
}
