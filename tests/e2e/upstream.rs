//! Failing model servers and gateways: the cases with and without a retry.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::{
    TestProxy, TestUpstream, h2, soon, until,
    upstream::{LAST, Port, STREAM, answer, chunk},
    wire::{BodyPart, CHAT, chat, streaming},
};

const CLOSE: &[(&str, &str)] = &[("Connection", "close")];

/// Returns a request that waits for at most `wait`.
fn chat_with_max_wait(wait: &str) -> String {
    chat("late").replace("\r\n\r\n", &format!("\r\nx-anteroom-max-wait: {wait}\r\n\r\n"))
}

/// Makes the target known to be up.
async fn warm_up(proxy: &TestProxy, upstream: &mut TestUpstream) {
    let mut client = proxy.sent(chat("warm")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.finish(answer("200 OK", CLOSE, "{}")).await;
    assert_eq!(client.response().await.status(), 200);
    proxy.await_tiny_in_flight(0).await;
}

#[tokio::test]
async fn failed_connect_is_held_again_at_the_head() {
    let port = Port::reserve();
    let mut upstream = TestUpstream::on(port.listen(), true);
    let proxy = TestProxy::tiny(&port.url(), "concurrency: { max: 8, rampStart: 1 }").await;
    warm_up(&proxy, &mut upstream).await;
    drop(upstream);
    // The connection is refused, so the request was not sent, and is held again.
    until("nobody to listen", async || tokio::net::TcpStream::connect(&port.url()[7..]).await.is_err()).await;
    let mut first = proxy.sent(chat("first")).await;
    proxy.await_tiny_held(1).await;
    let mut second = proxy.sent(chat("second")).await;
    proxy.await_tiny_held(2).await;

    let mut upstream = TestUpstream::on(port.listen(), true);
    for (client, text) in [(&mut first, "first"), (&mut second, "second")] {
        let mut call = upstream.call().await;
        assert_eq!(call.text().await, text);
        call.reply(text).await;
        assert_eq!(client.response().await.json()["text"], text);
    }
    assert_eq!(upstream.requests(), 2);
    proxy.stop(&[("completed", 3)]).await;
}

#[tokio::test]
async fn requeued_request_keeps_its_deadline() {
    let port = Port::reserve();
    let mut upstream = TestUpstream::on(port.listen(), true);
    let proxy = TestProxy::tiny(&port.url(), "").await;
    warm_up(&proxy, &mut upstream).await;
    drop(upstream);
    until("nobody to listen", async || tokio::net::TcpStream::connect(&port.url()[7..]).await.is_err()).await;
    let late = proxy.ask(chat_with_max_wait("100ms")).await;
    late.is_error(504, "cold_start_timeout");
    assert!(
        late.text().contains("It was dispatched once before; the last error: cannot connect"),
        "{}",
        late.text()
    );
    proxy.stop(&[("completed", 1), ("cold_start_timeout", 1)]).await;
}

/// The deadline also applies while the request waits for the probe of the server that broke off.
#[tokio::test]
async fn request_awaiting_a_probe_keeps_its_deadline() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    warm_up(&proxy, &mut upstream).await;
    upstream.sleep();
    let mut client = proxy.sent(chat_with_max_wait("200ms")).await;
    upstream.call().await.reset();
    let late = client.response().await;
    late.is_error(504, "cold_start_timeout");
    assert!(late.text().contains("broke the connection off before it answered"), "{}", late.text());
    proxy.stop(&[("completed", 1), ("cold_start_timeout", 1)]).await;
}

#[tokio::test]
async fn poisoned_request_reaches_two_servers_at_most() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for how in ["resets", "closes", "half a head", "no HTTP"] {
        let before = upstream.requests();
        let mut client = proxy.sent(chat(how)).await;
        for dispatch in 1..=2 {
            let mut call = upstream.call().await;
            assert_eq!(call.text().await, how, "dispatch {dispatch}");
            match how {
                "resets" => call.reset(),
                "closes" => drop(call),
                "half a head" => call.send("HTTP/1.1 200 OK\r\nContent-").await,
                _ => call.send("220 mail.example.com ESMTP\r\n").await,
            }
        }
        let response = client.response().await;
        response.is_error(502, "upstream_error");
        assert_eq!((response.get("x-should-retry"), response.get("retry-after")), (Some("false"), None));
        assert_eq!(upstream.requests() - before, 2, "{how}");
    }
    proxy.await_outcome("upstream_error", 502, 4).await;

    // A single failure is retried.
    let mut client = proxy.sent(chat("lucky")).await;
    upstream.call().await.reset();
    upstream.call().await.echo().await;
    let response = client.response().await;
    assert_eq!(response.json()["text"], "lucky");
    assert!(response.get("server-timing").is_some(), "it was held in between");
    proxy.stop(&[("completed", 1), ("upstream_error", 4)]).await;
}

/// Both idle connections have been closed when the next request is written to one of them: it is replaced by a new
/// connection, not by the other idle one.
#[tokio::test]
async fn stale_connections_cost_no_try() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    warm_up(&proxy, &mut upstream).await;
    let mut clients = [proxy.sent(chat("a")).await, proxy.sent(chat("b")).await];
    let calls = [upstream.call().await, upstream.call().await];
    let pooled = calls.each_ref().map(|call| call.connection);
    for call in calls {
        call.echo().await;
    }
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.await_tiny_in_flight(0).await;

    let mut client = proxy.sent(chat("next")).await;
    let stale = upstream.call().await;
    assert!(pooled.contains(&stale.connection));
    stale.reset();
    let mut call = upstream.call().await;
    assert!(!pooled.contains(&call.connection), "a new one");
    // The new connection breaks too, which costs one of two tries.
    assert_eq!(call.text().await, "next");
    call.reset();
    let call = upstream.call().await;
    assert!(!pooled.contains(&call.connection), "what has failed gets no pooled one again");
    call.echo().await;
    assert_eq!(client.response().await.json()["text"], "next");
    proxy.stop(&[("completed", 4)]).await;
}

/// While a server resets everything, the request waits until it responds, instead of using up its tries.
#[tokio::test]
async fn temporarily_resetting_server_is_retried() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(chat("pooled")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.await_tiny_in_flight(0).await;

    upstream.sleep();
    let mut client = proxy.sent(chat("patient")).await;
    upstream.call().await.reset();
    upstream.call().await.reset();
    proxy.await_tiny_held(1).await;
    upstream.probed().await;
    assert_eq!(upstream.pending(), 0);
    upstream.wake();
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "patient");
    proxy.stop(&[("completed", 2)]).await;
}

/// A healthy server drops the connection for one body: it is sent twice, with a pause in between, and the other
/// requests keep their full share of the server.
#[tokio::test]
async fn dropped_connection_keeps_concurrency_limit() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 8 }").await;
    // First complete 8 concurrent requests, so that the ramp reaches the full limit.
    let mut proven = Vec::new();
    for number in 0..8 {
        proven.push((proxy.sent(chat(&format!("{number}"))).await, upstream.call().await));
    }
    for (mut client, call) in proven {
        call.finish(answer("200 OK", CLOSE, "{}")).await;
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.await_tiny_in_flight(0).await;
    let mut others = Vec::new();
    for number in 0..6 {
        others.push((proxy.sent(chat(&format!("{number}"))).await, upstream.call().await));
    }
    let began = Instant::now();
    let mut poison = proxy.sent(chat("poison")).await;
    upstream.call().await.reset();
    upstream.call().await.reset();
    assert!(began.elapsed() >= Duration::from_millis(50), "it rests before it comes back");
    let answer = poison.response().await;
    answer.is_error(502, "upstream_error");
    assert!(answer.text().contains("the request was sent twice, and the server answered a probe or others"));
    let gate = proxy.gate().await;
    assert_eq!(gate.target().endpoints()[0].limit(), 8);
    // There is room for two more at once.
    for number in 6..8 {
        others.push((proxy.sent(chat(&format!("{number}"))).await, upstream.call().await));
    }
    for (mut client, call) in others {
        call.echo().await;
        assert_eq!(client.response().await.status(), 200);
    }
    proxy.stop(&[("completed", 16), ("upstream_error", 1)]).await;
}

/// Routes without models stream bodies to the server as they arrive. If the server breaks off, the body is sent again:
/// first the kept part, then the rest.
#[tokio::test]
async fn streamed_body_is_sent_again() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}").await;
    warm_up(&proxy, &mut upstream).await;
    let mut client = proxy.sent(chat("whole")).await;
    let mut call = upstream.call().await;
    assert_eq!(call.text().await, "whole");
    call.reset();
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "whole");

    // Broken off after half of the body.
    let request = chat("in two parts");
    let (first, second) = request.split_at(request.len() - 10);
    let mut client = proxy.sent(first).await;
    let mut call = upstream.call().await;
    call.wire.exact(5).await.unwrap();
    call.reset();
    client.send(second).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "in two parts");

    // The body is sent in chunks; the second server gets the first ones again.
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n");
    let mut client = proxy.sent(head).await;
    let mut call = upstream.call().await;
    for part in [r#"{"text":"#, r#""chu"#] {
        client.send(chunk(part)).await;
        assert_eq!(call.wire.part().await, BodyPart::Data(part.into()));
    }
    call.reset();
    client.send(chunk(r#"nks"}"#) + LAST).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "chunks");
    proxy.stop(&[("completed", 4)]).await;
}

/// The kept part of a streamed body counts towards held bytes until the response begins, and takes at most a quarter of
/// their memory. A body without room is sent only once.
#[tokio::test]
async fn kept_part_of_a_streamed_body_is_bounded() {
    let mut upstream = TestUpstream::warm().await;
    let limits = "limits: { maxBufferedBytes: 192KiB, maxBodyBytes: 64KiB }";
    let proxy = TestProxy::tiny_with(&upstream.url(), "match: {}, hold: { maxBytes: 64KiB }", limits).await;
    warm_up(&proxy, &mut upstream).await;
    let buffered = async || proxy.metric("anteroom_buffered_bytes", &[]).await;
    let body = "x".repeat(40 << 10);
    let mut client = proxy.sent(chat(&body)).await;
    let mut call = upstream.call().await;
    assert_eq!(call.text().await.len(), body.len());
    assert!(buffered().await > body.len() as u64);

    let mut second = proxy.sent(chat(&body)).await;
    let mut broken = upstream.call().await;
    broken.body().await;
    assert!(buffered().await < 2 * body.len() as u64);
    broken.reset();
    let answer = second.response().await;
    answer.is_error(502, "upstream_error");
    assert!(
        answer.text().contains("sent once, and its streamed body is no longer available"),
        "{}",
        answer.text()
    );

    call.send(STREAM).await;
    client.head().await.unwrap();
    assert_eq!(buffered().await, 0);
    call.finish(LAST).await;
    proxy.stop(&[("completed", 2), ("upstream_error", 1)]).await;
}

#[tokio::test]
async fn empty_gateway_is_retried_with_backoff() {
    let sayings = [
        answer("503 Service Unavailable", &[("content-type", "text/plain")], "no healthy upstream"),
        answer(
            "503 Service Unavailable",
            &[("x-llm-d-request-dropped-reason", "rejected-no-endpoints")],
            "x",
        ),
    ];
    for saying in sayings {
        // The health path succeeds even without endpoints, so the probe finds the target up.
        let mut upstream = TestUpstream::warm().await;
        let proxy = TestProxy::tiny(&upstream.url(), "").await;
        let mut client = proxy.sent(chat("patient")).await;
        let began = Instant::now();
        let mut backoff = Duration::ZERO;
        for dispatch in 1..=4 {
            let mut call = upstream.call().await;
            assert_eq!(call.text().await, "patient");
            assert!(began.elapsed() >= backoff, "dispatch {dispatch}: 50 ms, doubled each time");
            backoff += Duration::from_millis(25 << dispatch);
            assert!(upstream.probes() >= dispatch, "and each time it is probed first");
            call.finish(&saying).await;
        }
        let other = proxy.sent(chat("later")).await;
        let mut call = upstream.call().await;
        assert_eq!(call.text().await, "patient", "it is ahead of who came later");
        call.reply("patient").await;
        assert_eq!(client.response().await.json()["text"], "patient");
        upstream.call().await.echo().await;
        drop(other);
    }
}

#[tokio::test]
async fn server_503_passes_unchanged() {
    let mut upstream = TestUpstream::warm().await;
    // A long timeout, so that a slow probe on a busy machine does not count as failed.
    let proxy = TestProxy::tiny(&upstream.url(), "readiness: { interval: 10ms, timeout: 30s }").await;
    // Until its first response, the target may be a gateway that has not discovered its servers.
    warm_up(&proxy, &mut upstream).await;
    let long = "x".repeat(5000);
    let bodies = ["{\"error\":{\"message\":\"overloaded\"}}", "", &long];
    for body in bodies {
        let mut client = proxy.sent(chat("once")).await;
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer("503 Service Unavailable", &[("x-own", "1"), ("retry-after", "7")], body)).await;
        let response = client.response().await;
        assert_eq!((response.status(), &*response.text()), (503, body));
        assert_eq!((response.get("x-own"), response.get("retry-after")), (Some("1"), Some("7")));
        assert_eq!(response.get("content-length"), Some(&*body.len().to_string()));
    }
    let mut client = proxy.sent(chat("once")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send("HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    call.finish(chunk("streamed") + LAST).await;
    assert_eq!(client.response().await.text(), "streamed");
    assert_eq!(upstream.requests(), 5);
    proxy.await_outcome("completed", 503, 4).await;
    proxy.stop(&[("completed", 5)]).await;
}

#[tokio::test]
async fn no_retry_after_the_first_byte() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    // A stream that breaks off lacks the last chunk.
    let mut client = proxy.sent(streaming("chunked")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    call.send(chunk("data: 1\n\n")).await;
    client.parts_until("data: 1").await;
    call.reset();
    assert_eq!(client.part().await, BodyPart::Broken);

    // A body with a Content-Length ends short of it.
    let mut client = proxy.sent(chat("length")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345").await;
    let head = client.head().await.unwrap();
    assert_eq!(head.get("content-length"), Some("10"));
    assert_eq!(client.exact(5).await.as_deref(), Some(&b"12345"[..]));
    drop(call);
    assert_eq!(client.end().await, b"");

    // An HTTP/2 stream is reset.
    use http_body_util::BodyExt as _;
    let mut sender = h2::connect(proxy.address).await;
    let request = sender.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#));
    let answering = async {
        let mut call = upstream.call().await;
        call.body().await;
        call.send(STREAM).await;
        call.send(chunk("data: 1\n\n")).await;
        call
    };
    let (response, call) = tokio::join!(request, answering);
    let mut body = response.unwrap().into_body();
    soon("the first part", body.frame()).await.unwrap().unwrap();
    drop(call);
    assert!(soon("the end", body.frame()).await.is_some_and(|end| end.is_err()));

    assert_eq!(upstream.requests(), 3);
    proxy.await_outcome("upstream_error", 200, 3).await;
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("upstream_error", 3)]).await;
}

#[tokio::test]
async fn response_time_out_is_not_retried() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "upstream: { responseTimeout: 50ms }").await;
    let mut client = proxy.sent(chat("slow")).await;
    let call = upstream.call().await;
    client.response().await.is_error(502, "upstream_error");
    call.gone().await;
    assert_eq!(upstream.requests(), 1);
    proxy.stop(&[("upstream_error", 1)]).await;
}

#[tokio::test]
async fn response_beyond_idle_timeout_is_cut_off() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "upstream: { idleTimeout: 50ms }").await;
    let mut client = proxy.sent(streaming("pauses")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    assert_eq!(client.part().await, BodyPart::Broken);
    call.gone().await;

    // The proxy reads the body of a 503 before it forwards it; the same timeout applies to that read.
    let mut client = proxy.sent(chat("pauses")).await;
    for _ in 0..2 {
        let mut call = upstream.call().await;
        call.body().await;
        call.send("HTTP/1.1 503 Busy\r\nContent-Length: 19\r\n\r\nno ").await;
        call.gone().await;
    }
    client.response().await.is_error(502, "upstream_error");
    proxy.stop(&[("upstream_error", 2)]).await;
}

#[tokio::test]
async fn pooled_connections_are_reused() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut connections = Vec::new();
    for text in ["one", "two", "three"] {
        let mut client = proxy.sent(chat(text)).await;
        let mut call = upstream.call().await;
        connections.push(call.connection);
        let text = call.text().await;
        call.reply(&text).await;
        assert_eq!(client.response().await.json()["text"], text);
        proxy.await_tiny_in_flight(0).await;
    }
    assert!(connections.iter().all(|connection| *connection == connections[0]), "{connections:?}");

    // The server closes the connection while it is idle.
    let mut client = proxy.sent(chat("close")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(answer("200 OK", &[], "{}")).await;
    assert_eq!(client.response().await.status(), 200);
    drop(call);
    let mut client = proxy.sent(chat("after")).await;
    upstream.call().await.echo().await;
    let response = client.response().await;
    assert_eq!((response.status(), response.get("server-timing")), (200, None), "and it was not held");

    // The server closes the connection while the next request is being sent.
    let mut client = proxy.sent(chat("crossing")).await;
    let call = upstream.call().await;
    let idle = call.connection;
    drop(call);
    let mut call = upstream.call().await;
    assert_ne!(call.connection, idle);
    assert_eq!(call.text().await, "crossing");
    call.reply("crossing").await;
    let response = client.response().await;
    assert_eq!((response.status(), response.get("server-timing")), (200, None));

    // The server announces the last response of the connection.
    let mut client = proxy.sent(chat("last")).await;
    let mut call = upstream.call().await;
    let last = call.connection;
    call.body().await;
    call.finish(answer("200 OK", CLOSE, "{}")).await;
    assert_eq!(client.response().await.status(), 200);
    let mut client = proxy.sent(chat("next")).await;
    let call = upstream.call().await;
    assert_ne!(call.connection, last);
    call.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 8)]).await;
}

#[tokio::test]
async fn bytes_after_a_response_reach_no_client() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for _ in 0..20 {
        let mut client = proxy.sent(chat("good")).await;
        let mut call = upstream.call().await;
        call.body().await;
        let evil = answer("200 OK", &[], "evil");
        call.finish(answer("200 OK", &[], "good") + &evil).await;
        assert_eq!(client.response().await.text(), "good");
        client.send(chat("next")).await;
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(answer("200 OK", CLOSE, "next")).await;
        assert_eq!(client.response().await.text(), "next");
    }
}

#[tokio::test]
async fn unrequested_protocol_switch_fails() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let request = chat("switch").replace("Host:", "Connection: upgrade\r\nUpgrade: websocket\r\nHost:");
    let mut client = proxy.sent(request).await;
    let mut call = upstream.call().await;
    assert_eq!((call.head.get("upgrade"), call.head.get("connection")), (None, None));
    call.body().await;
    call.send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").await;
    client.response().await.is_error(502, "upstream_error");
    call.gone().await;
    proxy.stop(&[("upstream_error", 1)]).await;
}

#[tokio::test]
async fn oversized_response_head_names_its_limit() {
    for (more, most) in [("", 100), ("upstream: { maxResponseHeaders: 300 }", 300)] {
        let mut upstream = TestUpstream::warm().await;
        let proxy = TestProxy::tiny(&upstream.url(), more).await;
        let mut ask = async |count: usize| {
            // `Content-Length` is one more field.
            let fields: String = (1..count).map(|number| format!("X-{number}: 1\r\n")).collect();
            let mut client = proxy.sent(chat("many")).await;
            let mut call = upstream.call().await;
            call.body().await;
            call.finish(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{fields}\r\n{{}}")).await;
            (client.response().await, upstream.requests())
        };
        let (passed, requests) = ask(most).await;
        assert_eq!((passed.status(), passed.get("x-99"), requests), (200, Some("1"), 1));
        let (refused, requests) = ask(most + 1).await;
        refused.is_error(502, "upstream_error");
        let text = refused.text();
        assert!(text.contains("upstream.maxResponseHeaders") && text.contains(&most.to_string()), "{text}");
        assert_eq!(requests, 2, "it would answer the same again");
        // The server is healthy: the next request is not held.
        let (next, _) = ask(2).await;
        assert_eq!((next.status(), next.get("server-timing")), (200, None));
        proxy.stop(&[("completed", 2), ("upstream_error", 1)]).await;
    }
}
