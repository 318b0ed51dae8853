//! Stream parsers of common benchmark tools. Each copies the real one as of 2026-11-29, bugs included, to check that
//! the proxy's output suits all of them.
//!
//! The real `vllm bench serve` runs in tests/vllm.

use serde_json::Value;

use crate::support::{
    TestProxy, TestUpstream,
    upstream::{LAST, STREAM, chunk},
    wire::{BodyPart, CHAT, chat, post_with},
};

/// Result of parsing a stream: the text, and the index of the part taken for the first token.
type ParsedStream = Result<(String, usize), String>;

const TOKENS: [&str; 3] = ["Who", " waits", "?"];

fn event(token: &str) -> String {
    let delta =
        serde_json::json!({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": token}}]});
    format!("data: {delta}\n\n")
}

fn content(event: &Value) -> Option<&str> {
    event["choices"].get(0).map(|choice| choice["delta"]["content"].as_str().unwrap_or_default())
}

/// `vllm bench serve`, backend openai-chat: trims every part as received, splits at empty lines, skips lines that begin
/// with a colon, and takes the first event with choices for the first token.
fn vllm(parts: &[String]) -> ParsedStream {
    let (mut buffer, mut text, mut first) = (String::new(), String::new(), None);
    for (number, part) in parts.iter().enumerate() {
        buffer += part.trim();
        let mut messages = Vec::new();
        while let Some((message, rest)) = buffer.split_once("\n\n") {
            messages.push(message.trim().to_owned());
            buffer = rest.to_owned();
        }
        // A complete event whose end was trimmed.
        if let Some(data) = buffer.strip_prefix("data: ")
            && (data.trim() == "[DONE]" || serde_json::from_str::<Value>(data).is_ok())
        {
            messages.push(std::mem::take(&mut buffer));
        }
        for message in messages.iter().filter(|message| !message.is_empty() && !message.starts_with(':')) {
            let data = message.strip_prefix("data: ").unwrap_or(message);
            if data != "[DONE]" {
                let event: Value = serde_json::from_str(data).map_err(|error| format!("{error}: {data}"))?;
                if let Some(content) = content(&event) {
                    first.get_or_insert(number);
                    text += content;
                }
            }
        }
    }
    Ok((text, first.ok_or("never received a valid chunk")?))
}

/// sglang's `bench_serving`: every non-empty line is JSON behind an optional `data: `, or `[DONE]`; the first token is
/// the first content.
fn sglang(parts: &[String]) -> ParsedStream {
    let (mut text, mut first) = (String::new(), None);
    for (number, part) in parts.iter().enumerate() {
        for line in part.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let data = line.strip_prefix("data: ").unwrap_or(line);
            if data != "[DONE]" {
                let event: Value = serde_json::from_str(data).map_err(|error| format!("{error}: {data}"))?;
                let content = content(&event).unwrap_or_default();
                if !content.is_empty() {
                    first.get_or_insert(number);
                    text += content;
                }
            }
        }
    }
    Ok((text, first.ok_or("no token")?))
}

/// llmperf: drops the first six bytes of every non-empty line, whatever they are, and raises on an `error`.
fn llmperf(parts: &[String]) -> ParsedStream {
    let (mut text, mut first) = (String::new(), None);
    for (number, part) in parts.iter().enumerate() {
        for line in part.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let data = line.get(6..).unwrap_or_default();
            if data != "[DONE]" {
                let event: Value = serde_json::from_str(data).map_err(|error| format!("{error}: {data}"))?;
                if !event["error"].is_null() {
                    return Err(event["error"].to_string());
                }
                let content = content(&event).unwrap_or_default();
                if !content.is_empty() {
                    first.get_or_insert(number);
                    text += content;
                }
            }
        }
    }
    Ok((text, first.ok_or("no token")?))
}

/// Returns the parts of a stream as received, and the index of the part with the first token.
async fn stream(choice: &str, cold: bool) -> (Vec<String>, usize) {
    let mut upstream = if cold { TestUpstream::cold().await } else { TestUpstream::warm().await };
    let keepalive = "keepalive: { after: 10ms, interval: 10ms, whileStreaming: true }";
    let proxy = TestProxy::tiny(&upstream.url(), keepalive).await;
    if !cold {
        let mut client = proxy.sent(chat("warm")).await;
        upstream.call().await.echo().await;
        client.response().await;
    }
    let body = r#"{"model":"tiny","stream":true}"#;
    let mut client = proxy.sent(post_with(CHAT, &[("x-anteroom-keepalive", choice)], body)).await;
    let mut parts = Vec::new();
    if cold && choice != "off" {
        client.head().await.unwrap();
        parts.push(beat(&mut client).await);
        parts.push(beat(&mut client).await);
    }
    if cold {
        proxy.await_tiny_held(1).await;
        upstream.wake();
    }
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    if !cold || choice == "off" {
        client.head().await.unwrap();
    }
    let mut first = None;
    for token in TOKENS {
        // A pause before each token, long enough for heartbeats.
        for _ in 0..if choice == "off" { 0 } else { 2 } {
            parts.push(beat(&mut client).await);
        }
        call.send(chunk(&event(token))).await;
        while parts.last().is_none_or(|part| !part.ends_with(&event(token))) {
            parts.push(beat(&mut client).await);
        }
        first.get_or_insert(parts.len() - 1);
    }
    call.finish(chunk("data: [DONE]\n\n") + LAST).await;
    while let BodyPart::Data(part) = client.part().await {
        parts.push(String::from_utf8(part).unwrap());
    }
    proxy.stop(&[("completed", if cold { 1 } else { 2 })]).await;
    (parts, first.unwrap())
}

async fn beat(client: &mut crate::support::Wire) -> String {
    match client.part().await {
        BodyPart::Data(data) => String::from_utf8(data).unwrap(),
        other => panic!("{other:?} instead of a part"),
    }
}

#[tokio::test]
async fn vllm_reads_every_token_among_comments() {
    for cold in [true, false] {
        for choice in ["comment", "off"] {
            let (parts, first) = stream(choice, cold).await;
            assert_eq!(vllm(&parts), Ok((TOKENS.concat(), first)), "{choice}, cold {cold}: {parts:#?}");
        }
    }
    // `vllm bench serve` treats chunks as ordinary events: the text is right, the time to first token is not; hence
    // `comment` is the default.
    let (parts, first) = stream("chunk", true).await;
    let (text, found) = vllm(&parts).unwrap();
    assert!(text == TOKENS.concat() && found < first);
}

#[tokio::test]
async fn sglang_and_llmperf_read_every_token_among_chunks() {
    for cold in [true, false] {
        for choice in ["chunk", "off"] {
            let (parts, first) = stream(choice, cold).await;
            for read in [sglang, llmperf] {
                assert_eq!(read(&parts), Ok((TOKENS.concat(), first)), "{choice}, cold {cold}: {parts:#?}");
            }
        }
    }
    // Neither sglang nor llmperf parses comments; their users can choose `chunk`.
    let (parts, _) = stream("comment", true).await;
    assert!(sglang(&parts).is_err() && llmperf(&parts).is_err());
}
