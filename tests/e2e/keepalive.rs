//! What a waiting client hears, and how it hears of what fails after that.

use serde_json::Value;

use crate::support::{
    Proxy, Upstream, Wire,
    upstream::{LAST, STREAM, answer, chunk},
    wire::{CHAT, Part, chat, post, streaming},
};

const SOON: &str = "keepalive: { mode: comment, after: 10ms, interval: 10ms }";

/// The next part, which is one heartbeat.
async fn beat(client: &mut Wire) -> String {
    match client.part().await {
        Part::Data(data) => String::from_utf8(data).unwrap(),
        other => panic!("{other:?} instead of a heartbeat"),
    }
}

/// A held client that has got its early answer, and the first heartbeat.
async fn early(proxy: &Proxy, request: &str, content_type: &str) -> (Wire, String) {
    let mut client = proxy.sent(request).await;
    let head = client.head().await.unwrap();
    assert_eq!((head.status(), head.get("transfer-encoding")), (200, Some("chunked")));
    assert!(head.get("content-type").unwrap().starts_with(content_type), "{head:?}");
    assert_eq!(head.get("cache-control"), Some("no-cache"));
    assert_eq!(head.get("x-request-id").map(str::len), Some(32));
    // It does not know yet how long it will have waited.
    assert_eq!(head.get("server-timing"), None);
    let first = beat(&mut client).await;
    (client, first)
}

/// What comes after the heartbeats, which must be whole comment lines.
async fn after_beats(client: &mut Wire) -> String {
    let rest = client.rest().await.expect("an orderly end");
    let is_beat = |line: &&str| line.starts_with(": ");
    rest.split_inclusive('\n').skip_while(is_beat).collect()
}

/// The error that one event holds.
fn error_of(event: &str) -> Value {
    let data = event.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n"));
    let json: Value = serde_json::from_str(data.unwrap_or_else(|| panic!("one event: {event:?}"))).unwrap();
    assert!(json["error"]["message"].is_string(), "{json}");
    json["error"].clone()
}

#[tokio::test]
async fn a_streaming_client_hears_comments_and_then_its_answer_as_it_is() {
    let mut upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), SOON).await;
    let (mut first, beat_1) = early(&proxy, &streaming("first"), "text/event-stream").await;
    let (mut second, beat_2) = early(&proxy, &streaming("second"), "text/event-stream").await;
    for (line, position) in [(&beat_1, 1), (&beat_2, 2)] {
        assert!(line.starts_with(": cold start phase="), "{line:?}");
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "one newline: {line:?}");
        assert!(line.contains(" waited=0s") && line.contains(&format!(" position={position}")), "{line:?}");
    }
    for _ in 0..3 {
        let line = beat(&mut first).await;
        assert!(line.starts_with(": cold start ") && line.matches('\n').count() == 1, "{line:?}");
    }
    upstream.wake();
    let mut calls = [upstream.call().await, upstream.call().await];
    // Dispatched, but without an answer: the client goes on hearing.
    for client in [&mut first, &mut second] {
        client.parts_until("phase=first_byte").await;
    }
    for call in &mut calls {
        call.body().await;
        call.send(STREAM).await;
        call.send(chunk("data: 1\n\ndata: ")).await;
    }
    for client in [&mut first, &mut second] {
        // No heartbeat comes between the parts of an answer, nor within an event.
        let all = client.parts_until("data: 1\n\ndata: ").await;
        assert!(all.ends_with("data: 1\n\ndata: "), "{all:?}");
    }
    for call in calls {
        call.finish(chunk("2\n\n") + LAST).await;
    }
    for client in [&mut first, &mut second] {
        assert_eq!(client.rest().await.as_deref(), Some("2\n\n"));
    }
    proxy.ended("completed", 200, 2).await;
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn who_is_answered_in_time_or_does_not_stream_gets_no_early_answer() {
    for (keepalive, request) in [
        ("keepalive: { mode: comment, after: 10m }", streaming("x")),
        (SOON, chat("x")),
        ("keepalive: { mode: off, after: 10ms, interval: 10ms }", streaming("x")),
        ("keepalive: { mode: chunk, after: 10ms, interval: 10ms }", chat("x")),
    ] {
        let mut upstream = Upstream::cold().await;
        let proxy = Proxy::tiny(&upstream.url(), keepalive).await;
        let mut client = proxy.sent(request).await;
        proxy.held(1).await;
        upstream.probed().await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
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
async fn a_deadline_that_passes_after_the_early_answer_is_an_event() {
    let upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), &format!("{SOON}, hold: {{ timeout: 100ms }}")).await;
    let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    let error = error_of(&after_beats(&mut client).await);
    assert_eq!(
        (error["code"].as_str(), error["type"].as_str()),
        (Some("cold_start_timeout"), Some("server_error"))
    );
    // It is counted as what it was.
    proxy.ended("cold_start_timeout", 504, 1).await;
    proxy.stop(&[("cold_start_timeout", 1)]).await;
}

#[tokio::test]
async fn an_error_of_the_server_after_the_early_answer_is_an_event() {
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
        let mut upstream = Upstream::cold().await;
        // It is no gateway.
        let more = format!("{SOON}, gateway: {{ notYet: {{ for: 0s }} }}");
        let proxy = Proxy::tiny(&upstream.url(), &more).await;
        let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
        upstream.wake();
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer(status, &[("Content-Type", "application/json")], body)).await;
        let error = error_of(&after_beats(&mut client).await);
        assert_eq!((error["message"].as_str(), error["type"].as_str()), (Some(message), Some(kind)));
        assert_eq!(error["code"].to_string().trim_matches('"'), code);
        proxy.ended("completed", code.parse().unwrap(), 1).await;
        proxy.stop(&[("completed", 1)]).await;
    }
    // An answer that is no stream is one event.
    let mut upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), SOON).await;
    let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    upstream.wake();
    upstream.call().await.echo().await;
    assert_eq!(after_beats(&mut client).await, "data: {\"text\":\"x\"}\n\n");
}

#[tokio::test]
async fn what_breaks_after_the_early_answer_is_an_event_of_its_own() {
    for (begun, told) in
        [("data: half an ev", "data: half an ev\n\n"), ("data: 1\n\n", "data: 1\n\n"), ("", "")]
    {
        let mut upstream = Upstream::cold().await;
        let proxy = Proxy::tiny(&upstream.url(), SOON).await;
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
        proxy.ended("upstream_error", 200, 1).await;
        proxy.stop(&[("upstream_error", 1)]).await;
    }
    // Before the head it is tried again, and told when that is over.
    let mut upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), SOON).await;
    let (mut client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    upstream.wake();
    for _ in 0..2 {
        let mut call = upstream.call().await;
        call.body().await;
        call.reset();
    }
    assert_eq!(error_of(&after_beats(&mut client).await)["code"], "upstream_error");
    proxy.ended("upstream_error", 502, 1).await;
    proxy.stop(&[("upstream_error", 1)]).await;
}

#[tokio::test]
async fn a_client_that_hears_may_hang_up_as_well() {
    let upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), SOON).await;
    let (client, _) = early(&proxy, &streaming("x"), "text/event-stream").await;
    drop(client);
    proxy.held(0).await;
    proxy.ended("client_gone", 499, 1).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn an_sdk_that_bears_little_silence_hears_sooner() {
    let upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), "keepalive: { after: 10m, interval: 10m }").await;
    let request = streaming("x").replace("Host:", "x-stainless-read-timeout: 0.1\r\nHost:");
    let (mut client, _) = early(&proxy, &request, "text/event-stream").await;
    beat(&mut client).await;
    beat(&mut client).await;
    assert_eq!(proxy.route("tiny").await["held"], 1, "and its time-out is no deadline any more");
    drop(client);
    proxy.held(0).await;
    proxy.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn chunks_are_of_the_shape_that_was_asked_for() {
    let mut upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), "keepalive: { mode: chunk, after: 10ms, interval: 10ms }").await;
    let body = r#"{"model":"tiny","stream":true}"#;
    for (path, object, content) in [
        (CHAT, "chat.completion.chunk", "/choices/0/delta/content"),
        ("/v1/completions", "text_completion", "/choices/0/text"),
    ] {
        let (mut client, first) = early(&proxy, &post(path, body), "text/event-stream").await;
        for event in [first, beat(&mut client).await] {
            let data = event.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n")).unwrap();
            let chunk: Value = serde_json::from_str(data).unwrap();
            assert_eq!((&chunk["object"], &chunk["model"]), (&object.into(), &"tiny".into()));
            assert_eq!(chunk.pointer(content).and_then(Value::as_str), Some(""));
            assert_eq!(chunk["choices"][0]["finish_reason"], Value::Null);
        }
    }
    proxy.held(0).await;
    // Of events that are not ours to imitate there are comments.
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
async fn white_space_goes_before_json_where_it_was_asked_for() {
    let keepalive = "keepalive: { mode: whitespace, after: 10ms, interval: 10ms }";
    let mut upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), keepalive).await;
    let (mut client, first) = early(&proxy, &chat("x"), "application/json").await;
    assert_eq!((&*first, &*beat(&mut client).await), ("\n", "\n"));
    let (mut stream, first) = early(&proxy, &streaming("y"), "text/event-stream").await;
    assert!(first.starts_with(": "), "a stream has its comments: {first:?}");
    upstream.wake();
    upstream.call().await.echo().await;
    upstream.call().await.echo().await;
    assert_eq!(client.rest().await.unwrap().trim_start_matches('\n'), r#"{"text":"x"}"#);
    assert_eq!(after_beats(&mut stream).await, "data: {\"text\":\"y\"}\n\n");
    proxy.stop(&[("completed", 2)]).await;

    // What fails is the JSON.
    let upstream = Upstream::cold().await;
    let proxy = Proxy::tiny(&upstream.url(), &format!("{keepalive}, hold: {{ timeout: 100ms }}")).await;
    let (mut client, _) = early(&proxy, &chat("x"), "application/json").await;
    let error: Value = serde_json::from_str(&client.rest().await.unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "cold_start_timeout");
    proxy.stop(&[("cold_start_timeout", 1)]).await;
}

/// Speech is bytes whatever is asked for, and what is rendered or counted is JSON also with `stream: true`.
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
        let mut upstream = Upstream::cold().await;
        let keepalive = format!("keepalive: {{ mode: {mode}, after: 1ms, interval: 1ms }}");
        let proxy = Proxy::tiny(&upstream.url(), &keepalive).await;
        let mut client = proxy.sent(post(path, body)).await;
        proxy.held(1).await;
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
