//! Records of single requests: the first token, the phases of the wait, and the events.

use serde_json::Value;

use crate::support::{
    TestProxy, TestUpstream, Wire, route, routes, until,
    upstream::{LAST, Port, STREAM, answer, chunk},
    wire::{CHAT, chat, get, post_with, streaming},
};

const ROLE: &str = r#"data: {"choices":[{"delta":{"role":"assistant","content":""}}]}"#;
const TOKEN: &str = r#"data: {"choices":[{"delta":{"content":"Hi"}}]}"#;

/// Returns a chat with this request id.
fn chat_with_id(id: &str, text: &str) -> String {
    post_with(CHAT, &[("x-request-id", id)], &format!(r#"{{"model":"tiny","text":"{text}"}}"#))
}

fn named_stream(id: &str) -> String {
    post_with(CHAT, &[("x-request-id", id)], r#"{"model":"tiny","stream":true}"#)
}

impl TestProxy {
    /// Returns the newest request with this id, once it has ended.
    async fn story(&self, id: &str) -> Value {
        until("the request to have ended", async || {
            let answer = self.admin(&format!("/api/v1/requests/{id}")).await;
            answer.status() == 200 && answer.json()["requests"][0]["outcome"].is_string()
        })
        .await;
        self.admin(&format!("/api/v1/requests/{id}")).await.json()["requests"][0].clone()
    }

    /// Returns the newest cold-start record, once there is one.
    async fn record(&self) -> Value {
        let newest = async || self.admin("/api/v1/cold-starts").await.json()["cold_starts"][0].clone();
        until("a record", async || newest().await.is_object()).await;
        newest().await
    }
}

/// Returns the names of the events, and checks that their times are in order.
fn events(story: &Value) -> Vec<&str> {
    let events = story["events"].as_array().unwrap();
    let at: Vec<_> = events.iter().map(|event| event["at_ms"].as_f64().unwrap()).collect();
    assert!(at.is_sorted(), "{story}");
    assert!(at.last() <= story["total_ms"].as_f64().as_ref(), "{story}");
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

fn phases(record: &Value) -> Vec<&str> {
    record["phases"].as_array().unwrap().iter().map(|span| span["name"].as_str().unwrap()).collect()
}

/// Parses the entries of a `server-timing` header.
fn entries(timing: &str) -> Vec<(&str, f64)> {
    let entry = |entry| {
        let (name, dur): (&str, &str) = str::split_once(entry, ";dur=").unwrap();
        (name, dur.parse().unwrap())
    };
    timing.split(", ").map(entry).collect()
}

/// Starts a cold start whose first response is a stream, and sends the head of that response.
async fn first_answer(
    upstream: &mut TestUpstream,
    proxy: &TestProxy,
) -> (Wire, crate::support::upstream::UpstreamCall) {
    let client = proxy.sent(named_stream("first")).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    call.send(chunk(&format!("{ROLE}\n\n"))).await;
    (client, call)
}

#[tokio::test]
async fn first_token_ends_the_record_not_the_role() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "keepalive: { after: 10m }").await;
    let (mut client, mut call) = first_answer(&mut upstream, &proxy).await;
    client.head().await.unwrap();
    client.parts_until("role").await;
    let running = proxy.route("tiny").await["cold_start"].clone();
    assert!(phases(&running).contains(&"first_byte"), "it has begun to answer: {running}");
    assert!(proxy.admin("/api/v1/cold-starts").await.json()["cold_starts"].as_array().unwrap().is_empty());
    // The event of the first token arrives in two parts.
    let (a, b) = TOKEN.split_at(20);
    call.send(chunk(a)).await;
    client.parts_until(a).await;
    assert!(proxy.route("tiny").await["cold_start"].is_object(), "not yet");
    call.send(chunk(&format!("{b}\n\n"))).await;
    client.parts_until(b).await;
    let record = proxy.record().await;
    assert_eq!(phases(&record)[1..], ["load", "dispatch", "first_byte", "first_token"], "{record}");
    assert_eq!(
        (record["request_id"].as_str(), record["outcome"].as_str()),
        (Some("first"), Some("completed"))
    );
    assert!(record["t_e2e_ms"].as_f64().unwrap() >= record["t_actuation_ms"].as_f64().unwrap());
    call.finish(LAST).await;
    assert_eq!(client.rest().await.as_deref(), Some(""));
    let story = proxy.story("first").await;
    assert_eq!(
        events(&story),
        ["arrived", "held", "dispatched", "first_byte", "first_token", "ended"],
        "{story}"
    );
    assert_eq!(story["cold_start"], record["id"]);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn answer_without_token_ends_the_record() {
    // The stream breaks off; the stream ends; the client disconnects; the response is not a stream; the response is an
    // error.
    for case in ["breaks", "ends", "goes", "whole", "error"] {
        let mut upstream = TestUpstream::cold().await;
        // The target is not a gateway.
        let more = "keepalive: { after: 10m }, gateway: { notYet: { for: 0s } }";
        let proxy = TestProxy::tiny(&upstream.url(), more).await;
        let outcome = if let "whole" | "error" = case {
            let mut client = proxy.sent(named_stream("first")).await;
            proxy.await_tiny_starting().await;
            upstream.wake();
            let mut call = upstream.call().await;
            call.body().await;
            let status = if case == "error" { "500 Oops" } else { "200 OK" };
            let kind = if case == "error" { "text/event-stream" } else { "application/json" };
            call.finish(answer(status, &[("Content-Type", kind)], &format!("{TOKEN}\n\n"))).await;
            client.response().await;
            "completed"
        } else {
            let (mut client, call) = first_answer(&mut upstream, &proxy).await;
            client.head().await.unwrap();
            client.parts_until("role").await;
            match case {
                "breaks" => {
                    call.reset();
                    assert_eq!(client.rest().await, None);
                    "upstream_error"
                }
                "ends" => {
                    call.finish(LAST).await;
                    client.rest().await.unwrap();
                    "completed"
                }
                _ => {
                    drop(client);
                    call.gone().await;
                    "client_gone"
                }
            }
        };
        let record = proxy.record().await;
        assert_eq!(phases(&record).last(), Some(&"first_byte"), "{case}: {record}");
        assert_eq!(record["outcome"], "completed", "{case}: it was answered");
        let story = proxy.story("first").await;
        assert_eq!(story["outcome"], outcome, "{case}");
        let reason = story["reason"].as_str().unwrap_or_default();
        match case {
            "breaks" => assert!(reason.starts_with("the endpoint broke its answer off"), "{reason}"),
            "goes" => assert_eq!(reason, "The client disconnected during the answer."),
            "error" => assert_eq!(reason, "The model server answered 500."),
            _ => assert_eq!(reason, ""),
        }
        proxy.stop(&[(outcome, 1)]).await;
    }
}

#[tokio::test]
async fn server_timing_reports_the_hold() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 1 }").await;
    let mut first = proxy.sent(chat("first")).await;
    proxy.await_tiny_starting().await;
    upstream.probed().await;
    let mut second = proxy.sent(chat("second")).await;
    proxy.await_tiny_held(2).await;
    upstream.wake();
    let call = upstream.call().await;
    proxy.await_tiny_in_flight(1).await;
    let mut third = proxy.sent(chat("third")).await;
    proxy.await_tiny_held(2).await;
    call.echo().await;
    upstream.call().await.echo().await;
    upstream.call().await.echo().await;
    let mut loads = Vec::new();
    for (client, expected) in [
        (&mut first, vec!["hold", "signal", "load", "dispatch", "upstream"]),
        (&mut second, vec!["hold", "load", "dispatch", "queue", "upstream"]),
        (&mut third, vec!["hold", "queue", "upstream"]),
    ] {
        let response = client.response().await;
        let entries = entries(response.get("server-timing").unwrap());
        let names: Vec<_> = entries.iter().map(|(name, _)| *name).collect();
        // Entries below 0.05 ms are included: for the first request `queue` is only the wake-up of its task.
        let names: Vec<_> =
            names.into_iter().filter(|name| expected[1] == "queue" || expected.contains(name)).collect();
        assert_eq!(names, expected, "{entries:?}");
        let parts: f64 = entries[1..entries.len() - 1].iter().map(|(_, dur)| dur).sum();
        assert!((parts - entries[0].1).abs() < 1e-6, "they sum to the hold: {entries:?}");
        loads.extend(entries.iter().filter(|(name, _)| *name == "load").map(|(_, dur)| *dur));
    }
    assert!(loads[0] > loads[1], "the second one saw only the rest: {loads:?}");
    proxy.stop(&[("completed", 3)]).await;
}

#[tokio::test]
async fn early_response_ends_with_timing_comment() {
    let mut upstream = TestUpstream::cold().await;
    let proxy =
        TestProxy::tiny(&upstream.url(), "keepalive: { mode: comment, after: 10ms, interval: 10ms }").await;
    let mut client = proxy.sent(named_stream("early")).await;
    let head = client.head().await.unwrap();
    assert_eq!(head.get("server-timing"), None);
    client.parts_until(": cold start phase=").await;
    upstream.wake();
    let mut call = upstream.call().await;
    call.body().await;
    client.parts_until("phase=first_byte").await;
    call.send(STREAM).await;
    call.finish(chunk(&format!("{TOKEN}\n\n")) + LAST).await;
    let rest = client.rest().await.unwrap();
    let lines: Vec<_> = rest.lines().filter(|line| !line.contains("phase=")).collect();
    let timing = lines[0].strip_prefix(": server-timing: ").unwrap_or_else(|| panic!("{rest:?}"));
    let entries = entries(timing);
    let sum: f64 = entries[1..entries.len() - 1].iter().map(|(_, dur)| dur).sum();
    assert!((sum - entries[0].1).abs() < 1e-6 && entries.iter().any(|(name, _)| *name == "load"), "{timing}");
    assert!(
        lines[1].starts_with("data: ") && lines[1].contains("\"content\":\"\"") && lines[2].is_empty(),
        "{rest:?}"
    );
    assert_eq!(lines[3..], [TOKEN, ""], "one line, an event with no content, and then the answer as it is");
    let story = proxy.story("early").await;
    assert_eq!(
        events(&story),
        ["arrived", "held", "early_answer", "dispatched", "first_byte", "first_token", "ended"]
    );
    assert!(story["heartbeats"]["count"].as_u64().unwrap() >= 2, "{story}");
    assert_eq!(phases(&proxy.record().await).last(), Some(&"first_token"), "seen under an early answer, too");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn request_behind_a_tokenless_stream_waits() {
    let mut upstream = TestUpstream::cold().await;
    let more = "concurrency: { max: 1 }, keepalive: { mode: comment, after: 10ms, interval: 10ms }";
    let proxy = TestProxy::tiny(&upstream.url(), more).await;
    let (mut first, call) = first_answer(&mut upstream, &proxy).await;
    first.head().await.unwrap();
    first.parts_until("role").await;
    assert!(proxy.route("tiny").await["cold_start"].is_object(), "its first token is still to come");
    let mut second = proxy.sent(chat_with_id("second", "")).await;
    proxy.await_tiny_held(1).await;
    let mut stream = proxy.sent(streaming("")).await;
    stream.head().await.unwrap();
    let beats = stream.parts_until("waited=").await;
    assert!(beats.starts_with(": waiting phase=queue ") && !beats.contains("left="), "{beats:?}");
    call.finish(LAST).await;
    upstream.call().await.echo().await;
    second.response().await;
    let story = proxy.story("second").await;
    assert_eq!((&story["events"][1]["why"], story.get("cold_start")), (&"saturated".into(), None), "{story}");
    drop(stream);
    proxy.await_tiny_held(0).await;
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("completed", 2), ("client_gone", 1)]).await;
}

#[tokio::test]
async fn warm_request_is_recorded_only_on_failure() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    // The first request finds the target up.
    let mut client = proxy.sent(chat("first")).await;
    upstream.call().await.echo().await;
    client.response().await;
    proxy.await_outcome("completed", 200, 1).await;
    let begun = proxy.shared.history.begun();
    for number in 0..20 {
        client.send(chat_with_id(&format!("warm-{number}"), "x")).await;
        upstream.call().await.echo().await;
        assert_eq!(client.response().await.status(), 200);
    }
    // A client that disconnects during the response, which is not a failure.
    let mut gone = proxy.sent(named_stream("gone")).await;
    let mut call = upstream.call().await;
    call.send(STREAM).await;
    gone.head().await.unwrap();
    drop(gone);
    call.gone().await;
    proxy.await_outcome("client_gone", 200, 1).await;
    proxy.await_outcome("completed", 200, 21).await;
    assert_eq!(proxy.shared.history.begun(), begun, "nothing was made for any of them");
    let missing = proxy.admin("/api/v1/requests/warm-7").await;
    assert_eq!((missing.status(), &*missing.code()), (404, "request_not_kept"));
    let json = missing.json();
    let message = json["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("`warm-7`") && message.contains("the last 1000 that waited (now 1, since 2"),
        "{message}"
    );
    assert!(message.contains("It does not have requests that were answered at once"), "{message}");
    assert_eq!(
        (json["kept"]["waited"]["max"].as_u64(), json["kept"]["running"].as_u64()),
        (Some(1000), Some(0))
    );

    // A failed request is kept with the facts known at its end, although nothing was recorded before.
    let mut client = proxy.sent(chat_with_id("broken", "x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    call.reset();
    client.rest().await;
    let story = proxy.story("broken").await;
    assert_eq!((events(&story), story.get("path")), (vec!["arrived", "ended"], None), "{story}");
    assert!(story["reason"].as_str().unwrap().starts_with("the endpoint broke its answer off"), "{story}");
    let client = proxy.sent(chat_with_id("unheard", "x")).await;
    let call = upstream.call().await;
    drop(client);
    call.gone().await;
    let story = proxy.story("unheard").await;
    assert_eq!((&story["outcome"], story.get("status")), (&"client_gone".into(), None));
    assert_eq!(story["reason"], "The client disconnected before the answer began.");
    proxy.stop(&[("completed", 21), ("client_gone", 2), ("upstream_error", 1)]).await;
}

#[tokio::test]
async fn history_includes_failed_attempts() {
    let port = Port::reserve();
    let listener = port.listen();
    let mut upstream = TestUpstream::on(listener, true);
    let proxy = TestProxy::tiny(&port.url(), "").await;
    let mut client = proxy.sent(chat("first")).await;
    let mut call = upstream.call().await;
    call.body().await;
    // Closes the connection, so that the next request uses a new one: a request that breaks on a reused connection is
    // sent again without being held.
    call.finish(answer("200 OK", &[("Connection", "close")], "")).await;
    client.response().await;
    let trace = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let request = post_with(
        &format!("{CHAT}?key=secret"),
        &[("x-request-id", "tried/once more"), ("Authorization", "Bearer secret"), trace],
        r#"{"model":"tiny","text":"secret"}"#,
    );
    client.send(request).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.reset();
    upstream.call().await.echo().await;
    client.response().await;
    // The id has a space and a slash.
    let story = proxy.story("tried/once%20more").await;
    assert_eq!(
        events(&story),
        ["arrived", "dispatch_failed", "held", "dispatched", "first_byte", "ended"],
        "{story}"
    );
    assert_eq!(story["events"][1]["endpoint"], upstream.address.to_string());
    assert!(!story["events"][1]["reason"].as_str().unwrap().is_empty());
    assert_eq!(story["events"][2]["why"], "dispatch_failed");
    assert_eq!((&story["path"], &story["model"]), (&CHAT.into(), &"tiny".into()));
    assert_eq!(story["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    assert!(!story.to_string().contains("secret"), "{story}");
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn failures_are_listed_with_their_reasons() {
    let upstream = TestUpstream::cold().await;
    let more = "hold: { timeout: 3s, maxRequests: 1 }";
    let mut config = routes(&[route("tiny", &upstream.url(), more), route("other", &upstream.url(), "")]);
    config += "history: { requests: 2 }\n";
    let proxy = TestProxy::start(&config).await;
    let mut waits = proxy.sent(chat_with_id("waits", "x")).await;
    proxy.await_tiny_held(1).await;
    let held = proxy.admin("/api/v1/requests/waits").await.json()["requests"][0].clone();
    assert_eq!((held.get("outcome"), events(&held)), (None, vec!["arrived", "held"]), "while it waits");
    let running = proxy.admin("/api/v1/requests?outcome=running&route=tiny").await.json();
    assert_eq!(running["requests"][0]["request_id"], "waits");
    proxy.ask(chat_with_id("full", "x")).await.is_error(503, "hold_queue_full");
    waits.response().await.is_error(504, "cold_start_timeout");
    // Requests without a route are not recorded.
    proxy.ask(get("/nothing")).await.is_error(404, "unknown_path");
    let story = proxy.story("waits").await;
    assert!(story["reason"].as_str().unwrap().contains("did not become ready within 3s"), "{story}");
    assert_eq!((&story["status"], &story["admitted"]), (&504.into(), &true.into()));
    let failed = proxy.admin("/api/v1/requests?outcome=failed&limit=10").await.json();
    let listed = |key: &str| {
        let requests = failed["requests"].as_array().unwrap();
        requests.iter().map(|request| request[key].as_str().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(listed("request_id"), ["waits", "full"], "newest first: {failed}");
    assert_eq!(listed("outcome"), ["cold_start_timeout", "hold_queue_full"]);
    assert!(listed("reason")[1].contains("1 requests are held already"), "{failed}");
    assert_eq!(
        (&failed["requests"][1]["admitted"], &failed["requests"][1]["model"]),
        (&false.into(), &"tiny".into())
    );
    // Uses the same id more often than the history keeps requests.
    for text in ["a", "b", "c"] {
        let hasty = chat_with_id("again", text).replace("\r\n\r\n", "\r\nx-anteroom-max-wait: 20ms\r\n\r\n");
        proxy.ask(hasty).await.is_error(504, "cold_start_timeout");
        proxy.story("again").await;
        proxy.await_tiny_held(0).await;
    }
    let again = proxy.admin("/api/v1/requests/again").await.json();
    assert_eq!(again["requests"].as_array().unwrap().len(), 2);
    assert_eq!(proxy.admin("/api/v1/requests/waits").await.status(), 404, "two younger ones waited");
    assert_eq!(proxy.admin("/api/v1/requests/full").await.status(), 200, "those push out no refusal");
    assert!(
        proxy.admin("/api/v1/requests?route=other").await.json()["requests"].as_array().unwrap().is_empty()
    );
    // The history is disabled by a reload.
    proxy.reload(&config.replace("requests: 2", "requests: 0")).await;
    until("it to be off", async || proxy.admin("/api/v1/requests/full").await.status() == 404).await;
    let message = proxy.admin("/api/v1/requests/full").await.json()["error"]["message"].to_string();
    assert!(message.contains("`history.requests` is 0"), "{message}");
    proxy.stop(&[("cold_start_timeout", 4)]).await;
}
