//! Forwarding of heads, bodies and trailers in both directions, part by part.

use http_body_util::BodyExt as _;

use crate::support::{
    TestProxy, TestUpstream, h2, soon,
    upstream::{LAST, STREAM, answer, chunk},
    wire::{BodyPart, CHAT, chat, get, post_with, streaming},
};

const TINY_BODY: &str = r#"{"model":"tiny"}"#;

/// Makes the target known to be up.
async fn warm_up(proxy: &TestProxy, upstream: &mut TestUpstream) {
    let mut client = proxy.sent(chat("warm")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.await_tiny_in_flight(0).await;
}

/// nginx in front of the proxy would buffer events, so the header is sent even if the request was not held.
#[tokio::test]
async fn event_streams_tell_nginx_not_to_buffer() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    warm_up(&proxy, &mut upstream).await;
    for (kind, own, expected) in [
        ("text/event-stream", None, Some("no")),
        ("Text/Event-Stream; charset=utf-8", None, Some("no")),
        ("text/event-stream", Some("yes"), Some("yes")),
        ("text/event-streams", None, None),
        ("application/json", None, None),
    ] {
        let mut client = proxy.sent(streaming("x")).await;
        let mut call = upstream.call().await;
        call.body().await;
        let fields = own.map(|own| ("X-Accel-Buffering", own));
        let fields: Vec<_> = [("Content-Type", kind)].into_iter().chain(fields).collect();
        call.finish(answer("200 OK", &fields, "data: 1\n\n")).await;
        assert_eq!(client.response().await.get("x-accel-buffering"), expected, "{kind}");
    }
    proxy.stop(&[("completed", 6)]).await;
}

#[tokio::test]
async fn http_1_response_is_streamed_part_by_part() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(streaming("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    let head = client.head().await.unwrap();
    assert_eq!(head.get("content-type"), Some("text/event-stream"));
    assert_eq!((head.get("transfer-encoding"), head.get("content-length")), (Some("chunked"), None));
    for token in 0..50 {
        // The next part is sent only once the client has this one, a whole event or half of one.
        for part in [format!("data: {token}"), "\n\n".into()] {
            call.send(chunk(&part)).await;
            assert_eq!(client.part().await, BodyPart::Data(part.into_bytes()));
        }
    }
    call.finish(LAST).await;
    assert_eq!(client.part().await, BodyPart::Last(String::new()));

    // With a Content-Length instead of chunks: the length is kept, and each part is forwarded as it arrives.
    client.send(chat("y")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n").await;
    assert_eq!(client.head().await.unwrap().get("content-length"), Some("10"));
    for part in [b"01234", b"56789"] {
        call.send(part).await;
        assert_eq!(client.exact(5).await.unwrap(), part);
    }
    call.finish("").await;

    // A response with neither Content-Length nor chunks ends with its connection.
    client.send(chat("z")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send("HTTP/1.1 200 OK\r\n\r\n").await;
    let head = client.head().await.unwrap();
    assert_eq!(head.get("transfer-encoding"), Some("chunked"));
    call.send("to the end").await;
    client.parts_until("to the end").await;
    drop(call);
    assert_eq!(client.part().await, BodyPart::Last(String::new()));
    proxy.stop(&[("completed", 3)]).await;
}

#[tokio::test]
async fn http_2_response_is_streamed_part_by_part() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = h2::connect(proxy.address).await;
    let request = client.send_request(h2::post(proxy.address, CHAT, TINY_BODY));
    let answering = async {
        let mut call = upstream.call().await;
        assert_eq!(call.head.start, format!("POST {CHAT} HTTP/1.1"));
        assert_eq!(call.head.get("host"), Some(&*proxy.address.to_string()));
        assert_eq!((call.head.get("via"), call.head.get("content-length")), (Some("2 anteroom"), Some("16")));
        assert_eq!(call.body().await, TINY_BODY);
        call.send(STREAM.replace("\r\n\r\n", "\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\n\r\n"))
            .await;
        call
    };
    let (response, mut call) = tokio::join!(request, answering);
    let mut body = response.unwrap().into_body();
    for token in ["1", "2", "3"] {
        call.send(chunk(token)).await;
        let frame = soon("a part", body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), token);
    }
    call.finish(LAST).await;
    assert_eq!(soon("the end", body.collect()).await.unwrap().to_bytes(), "");
    proxy.await_outcome("completed", 200, 1).await;
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn trailers_pass_to_clients_sending_te_trailers() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let head = "HTTP/1.1 200 OK\r\nTrailer: x-usage\r\nTransfer-Encoding: chunked\r\n\r\n";
    let tail = "0\r\nx-usage: 42\r\n\r\n";
    let mut client =
        proxy.sent(post_with(CHAT, &[("TE", "trailers"), ("Connection", "TE")], TINY_BODY)).await;
    let mut call = upstream.call().await;
    assert_eq!((call.head.get("te"), call.head.get("connection")), (Some("trailers"), Some("TE")));
    call.body().await;
    call.finish(format!("{head}{}{tail}", chunk("x"))).await;
    assert_eq!(client.head().await.unwrap().get("trailer"), Some("x-usage"));
    assert_eq!(client.part().await, BodyPart::Data(b"x".to_vec()));
    assert_eq!(client.part().await, BodyPart::Last("x-usage: 42\r\n".into()));

    // A client without `TE: trailers` gets the end of the body without trailers.
    client.send(post_with(CHAT, &[], TINY_BODY)).await;
    let mut call = upstream.call().await;
    assert_eq!(call.head.get("te"), None);
    call.body().await;
    call.finish(format!("{head}{}{tail}", chunk("x"))).await;
    client.head().await.unwrap();
    assert_eq!(client.part().await, BodyPart::Data(b"x".to_vec()));
    assert_eq!(client.part().await, BodyPart::Last(String::new()));

    let mut sender = h2::connect(proxy.address).await;
    let request = sender.send_request(h2::post(proxy.address, CHAT, TINY_BODY));
    let answering = async {
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(format!("{head}{}{tail}", chunk("x"))).await;
    };
    let (response, ()) = tokio::join!(request, answering);
    let body = soon("the body", response.unwrap().into_body().collect()).await.unwrap();
    assert_eq!(body.trailers().unwrap()["x-usage"], "42");
    assert_eq!(body.to_bytes(), "x");
    proxy.stop(&[("completed", 3)]).await;
}

#[tokio::test]
async fn bodiless_responses_end_with_their_head() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}").await;
    warm_up(&proxy, &mut upstream).await;
    let mut client = proxy.client().await;

    // HEAD: Content-Length of the corresponding GET.
    client.send(get("/v1/responses/r").replace("GET", "HEAD")).await;
    let call = upstream.call().await;
    assert_eq!(call.head.line(), "HEAD /v1/responses/r");
    call.finish("HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n").await;
    assert_eq!(client.head().await.unwrap().get("content-length"), Some("1234"));

    for status in ["204 No Content", "304 Not Modified"] {
        client.send(get("/v1/responses/r")).await;
        upstream.call().await.finish(format!("HTTP/1.1 {status}\r\nETag: \"1\"\r\n\r\n")).await;
        let head = client.head().await.unwrap();
        assert_eq!(head.start, format!("HTTP/1.1 {status}"));
        assert_eq!((head.get("etag"), head.get("transfer-encoding")), (Some("\"1\""), None));
    }
    // Interim responses are for the sender of the request, here the proxy, and are not forwarded.
    client.send(chat("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n").await;
    call.finish(answer("201 Created", &[], "done")).await;
    let response = client.response().await;
    assert_eq!((response.status(), &*response.text()), (201, "done"));

    // A response with a complete, empty body.
    client.send(chat("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.finish(answer("200 OK", &[], "")).await;
    assert_eq!(client.response().await.get("content-length"), Some("0"));
    proxy.await_outcome("completed", 200, 3).await;
    proxy.stop(&[("completed", 6)]).await;
}

#[tokio::test]
async fn large_bodies_pass_unchanged_both_ways() {
    let upstream = TestUpstream::warm().await.automatic(async |mut call| {
        // Echoes the body unchanged, with a Content-Length or in chunks.
        let body = call.body().await;
        if call.head.get("x-chunked").is_some() {
            let chunks: String = body
                .as_bytes()
                .chunks(50_000)
                .map(|part| chunk(std::str::from_utf8(part).unwrap()))
                .collect();
            call.finish(format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}{LAST}")).await;
        } else {
            call.finish(answer("200 OK", &[], &body)).await;
        }
    });
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let text: String = (0..1_000_000).map(|number| format!("{number:07} ")).collect();
    let body = format!(r#"{{"model":"tiny","text":"{text}"}}"#);
    for fields in [&[][..], &[("x-chunked", "1")]] {
        let mut client = proxy.client().await;
        let request = post_with(CHAT, fields, &body);
        let (mut read, mut write) = client.stream.split();
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut first = [0; 1];
        let sending = async { write.write_all(request.as_bytes()).await.unwrap() };
        let reading = async { read.read_exact(&mut first).await.unwrap() };
        soon("the exchange", async { tokio::join!(sending, reading) }).await;
        client.buf = first.to_vec();
        let response = client.response().await;
        assert_eq!(response.get("content-length").is_some(), fields.is_empty());
        assert!(response.body == body.as_bytes(), "{} bytes", response.body.len());
    }
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn upload_streams_when_the_target_is_warm() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}").await;
    warm_up(&proxy, &mut upstream).await;
    let mut client = proxy
        .sent(format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n"))
        .await;
    let mut call = upstream.call().await;
    assert_eq!(call.head.get("transfer-encoding"), Some("chunked"));
    for part in ["one", "two", "three"] {
        client.send(chunk(part)).await;
        assert_eq!(call.wire.part().await, BodyPart::Data(part.into()));
    }
    // The response may start before the request body has ended.
    call.send(STREAM).await;
    assert_eq!(client.head().await.unwrap().status(), 200);
    client.send(LAST).await;
    assert_eq!(call.wire.part().await, BodyPart::Last(String::new()));
    call.finish(LAST).await;
    assert_eq!(client.part().await, BodyPart::Last(String::new()));
    // The connection can be reused.
    client.send(chat("next")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);

    // The response may also end first: the rest of the body is never parsed as a request, by the proxy or by the
    // server.
    client
        .send(format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n"))
        .await;
    client.send(chunk("first")).await;
    let mut call = upstream.call().await;
    assert_eq!(call.wire.part().await, BodyPart::Data(b"first".into()));
    call.send(answer("401 Unauthorized", &[], "no")).await;
    let response = client.response().await;
    assert_eq!((response.status(), &*response.text()), (401, "no"));
    client.send(chunk(&chat("smuggled")) + LAST).await;
    // Either the rest is forwarded and the connections are reused, or both are closed.
    if let Some(rest) = call.wire.rest().await {
        assert_eq!(rest, chat("smuggled"));
        call.finish("").await;
    }
    let mut client = proxy.sent(chat("after")).await;
    let mut after = upstream.call().await;
    assert_eq!(after.text().await, "after");
    after.reply("after").await;
    assert_eq!(client.response().await.status(), 200);
    assert_eq!((upstream.requests(), upstream.pending()), (5, 0));
    proxy.stop(&[("completed", 5)]).await;
}

#[tokio::test]
async fn client_expecting_100_continue_gets_it() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let request = post_with(CHAT, &[("Expect", "100-continue")], TINY_BODY);
    let (head, body) = request.split_at(request.len() - TINY_BODY.len());
    let mut client = proxy.sent(head).await;
    assert_eq!(client.head().await.unwrap().status(), 100);
    client.send(body).await;
    proxy.await_tiny_held(1).await;
    upstream.wake();
    let call = upstream.call().await;
    assert_eq!(call.head.get("expect"), None);
    call.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn request_heads_are_rewritten_correctly() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let fields = [
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "secret"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Authorization", "Basic x"),
        ("TE", "gzip"),
        ("Upgrade", "h2c"),
        ("X-Forwarded-For", "198.51.100.7"),
        ("Forwarded", "for=198.51.100.7"),
        ("Via", "1.1 lb"),
        ("X-Request-Id", "mine"),
        ("traceparent", traceparent),
        ("tracestate", "a=b"),
        ("Authorization", "Bearer sk-1"),
        ("X-Twice", "1"),
        ("X-Twice", "2"),
        ("OpenAI-Organization", "org"),
        ("Accept-Encoding", "gzip"),
    ];
    let mut client = proxy.sent(post_with(&format!("{CHAT}?a=b%20c"), &fields, TINY_BODY)).await;
    let mut call = upstream.call().await;
    let head = call.head.clone();
    assert_eq!(head.start, format!("POST {CHAT}?a=b%20c HTTP/1.1"));
    for gone in
        ["connection", "x-hop", "keep-alive", "proxy-connection", "proxy-authorization", "te", "upgrade"]
    {
        assert_eq!(head.get(gone), None, "{gone}");
    }
    for (name, value) in [
        ("host", "api.test"),
        ("x-forwarded-for", "198.51.100.7, 127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "api.test"),
        ("forwarded", "for=198.51.100.7, for=127.0.0.1;proto=http"),
        ("via", "1.1 lb, 1.1 anteroom"),
        ("x-request-id", "mine"),
        ("traceparent", traceparent),
        ("tracestate", "a=b"),
        ("authorization", "Bearer sk-1"),
        ("openai-organization", "org"),
        ("accept-encoding", "gzip"),
        ("content-length", "16"),
        ("content-type", "application/json"),
    ] {
        assert_eq!(head.get(name), Some(value), "{name}");
    }
    assert_eq!(head.all("x-twice"), ["1", "2"]);
    assert_eq!(call.body().await, TINY_BODY);

    let fields = [
        ("Connection", "X-Hop"),
        ("X-Hop", "secret"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authenticate", "Basic"),
        ("Upgrade", "h2c"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("Via", "1.1 gateway"),
        ("openai-processing-ms", "5"),
        ("Server", "uvicorn"),
        ("Date", "Thu, 01 Jan 2026 00:00:00 GMT"),
    ];
    call.finish(answer("200 Fine", &fields, "{}")).await;
    let head = client.response().await.head;
    for gone in ["x-hop", "proxy-authenticate", "upgrade", "connection", "transfer-encoding"] {
        assert_eq!(head.get(gone), None, "{gone}");
    }
    assert_eq!(head.all("set-cookie"), ["a=1", "b=2"]);
    for (name, value) in [
        ("via", "1.1 gateway, 1.1 anteroom"),
        // The proxy sets `keep-alive` for its own connection to the client.
        ("keep-alive", "timeout=660"),
        ("openai-processing-ms", "5"),
        ("server", "uvicorn"),
        ("date", "Thu, 01 Jan 2026 00:00:00 GMT"),
        ("x-request-id", "mine"),
    ] {
        assert_eq!(head.get(name), Some(value), "{name}");
    }

    // A request without an id gets one, which the server and the client receive; an invalid `traceparent` is not
    // forwarded.
    client.send(post_with(CHAT, &[("traceparent", "00-0-0-00")], TINY_BODY)).await;
    let call = upstream.call().await;
    assert_eq!(call.head.get("traceparent"), None);
    let id = call.head.get("x-request-id").unwrap().to_owned();
    assert_eq!(id.len(), 32);
    call.echo().await;
    assert_eq!(client.response().await.get("x-request-id"), Some(&*id));
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(chat("one") + &get("/health") + &chat("two")).await;
    let mut call = upstream.call().await;
    assert_eq!(call.text().await, "one");
    call.reply("one").await;
    assert_eq!(client.response().await.json()["text"], "one");
    assert_eq!(client.response().await.json()["status"], "ok");
    let mut call = upstream.call().await;
    assert_eq!(call.text().await, "two");
    call.reply("two").await;
    assert_eq!(client.response().await.json()["text"], "two");
    assert_eq!(upstream.requests(), 2);
    proxy.stop(&[("completed", 2)]).await;
}
