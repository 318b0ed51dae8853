//! Hostile or broken model servers: a client gets one complete response, or one that is recognizably incomplete; and
//! the next client on the connection gets its own.

use crate::support::{
    TestProxy, TestUpstream, Wire, route, routes, soon,
    upstream::{STREAM, UpstreamCall, answer},
    wire::{chat, streaming},
};

/// Returns the bytes a client receives when the model server sends `bytes` and closes the connection.
async fn relayed(bytes: &[u8]) -> String {
    let bytes = bytes.to_vec();
    let upstream = TestUpstream::warm().await.automatic(move |call| send(call, bytes.clone()));
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let request = chat("x").replace("Host:", "Connection: close\r\nHost:");
    let mut client = proxy.sent(request).await;
    let end = String::from_utf8_lossy(&client.end().await).into_owned();
    proxy.await_tiny_in_flight(0).await;
    end
}

async fn send(mut call: UpstreamCall, bytes: Vec<u8>) {
    use tokio::io::AsyncWriteExt as _;
    call.body().await;
    // The proxy may close the connection.
    let _ = call.wire.stream.write_all(&bytes).await;
    let _ = call.wire.stream.shutdown().await;
    call.gone().await;
}

fn status(answer: &str) -> &str {
    answer.get(9..12).unwrap_or_default()
}

#[tokio::test]
async fn ambiguous_heads_are_refused_or_reframed() {
    let head = |lines: &str, body: &str| format!("HTTP/1.1 200 OK\r\n{lines}\r\n{body}");
    let whole = "5\r\nwhole\r\n0\r\n\r\n";
    let huge = "x".repeat(1 << 20);
    let many: String = (0..1000).map(|number| format!("X-{number}: 1\r\n")).collect();
    for (what, bytes) in [
        ("two lengths", head("Content-Length: 5\r\nContent-Length: 3\r\n", "whole")),
        ("a list of lengths", head("Content-Length: 5, 3\r\n", "whole")),
        ("a length with a plus", head("Content-Length: +5\r\n", "whole")),
        ("a negative length", head("Content-Length: -5\r\n", "whole")),
        ("a length beyond 64 bits", head("Content-Length: 18446744073709551621\r\n", "whole")),
        ("a zero byte", head("X: a\0b\r\nContent-Length: 5\r\n", "whole")),
        ("a carriage return alone", head("X: a\rSet-Cookie: evil\r\nContent-Length: 5\r\n", "whole")),
        ("a space before the colon", head("Content-Length : 5\r\n", "whole")),
        ("no colon", head("Content-Length\r\n", "whole")),
        ("a head of 1 MiB", head(&format!("X: {huge}\r\nContent-Length: 5\r\n"), "whole")),
        ("1,000 fields", head(&format!("{many}Content-Length: 5\r\n"), "whole")),
        ("no version", "200 OK\r\n\r\nwhole".into()),
        ("another version", head("Content-Length: 5\r\n", "whole").replace("HTTP/1.1", "HTTP/3.0")),
        ("no status", "HTTP/1.1 OK\r\n\r\nwhole".into()),
        ("a status of four digits", head("Content-Length: 5\r\n", "whole").replace("200", "2000")),
        ("a TLS alert", "\x15\x03\x01\x00\x02\x02\x28".into()),
        ("a preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
        ("an endless first line", huge.clone()),
    ] {
        let relayed = relayed(bytes.as_bytes()).await;
        assert_eq!(status(&relayed), "502", "{what}: {relayed}");
        assert!(!relayed.to_lowercase().contains("set-cookie"), "{what}: {relayed}");
    }
    for (what, bytes) in [
        ("a length and chunks", head("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", whole)),
        ("chunks and a length", head("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", whole)),
        ("a folded line", head("X: a\r\n Set-Cookie: evil\r\nContent-Length: 5\r\n", "whole")),
        ("no reason", head("Content-Length: 5\r\n", "whole").replace(" OK", "")),
    ] {
        let relayed = relayed(bytes.as_bytes()).await;
        let lower = relayed.to_lowercase();
        assert_eq!(lower.matches("http/1.1 ").count(), 1, "{what}: {relayed}");
        assert!(
            lower.matches("content-length").count() + lower.matches("transfer-encoding").count() == 1,
            "{what}: {relayed}"
        );
        assert!(
            !lower.contains("\nset-cookie") && (status(&relayed) == "502" || relayed.contains("whole")),
            "{what}: {relayed}"
        );
    }
}

#[tokio::test]
async fn truncated_response_does_not_look_complete() {
    let chunked = |body: &str| format!("{STREAM}{body}");
    for (what, bytes) in [
        ("no last chunk", chunked("5\r\nwhole\r\n")),
        ("half a chunk", chunked("5\r\nwho")),
        ("a size that is none", chunked("5\r\nwhole\r\nzz\r\n")),
        ("a size beyond 64 bits", chunked("5\r\nwhole\r\n10000000000000005\r\nwhole\r\n0\r\n\r\n")),
        ("a negative size", chunked("5\r\nwhole\r\n-5\r\nwhole\r\n0\r\n\r\n")),
        ("data beyond its size", chunked("5\r\nwholesome\r\n0\r\n\r\n")),
        (
            "a huge extension",
            chunked(&format!("5\r\nwhole\r\n5;{}\r\nwhole\r\n0\r\n\r\n", "x".repeat(17 << 10))),
        ),
        ("huge trailers", chunked(&format!("5\r\nwhole\r\n0\r\nX: {}\r\n\r\n", "x".repeat(17 << 10)))),
        ("a length that is not kept", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nwhole".into()),
    ] {
        let relayed = relayed(bytes.as_bytes()).await;
        assert!(!relayed.ends_with("0\r\n\r\n"), "{what}: {relayed}");
        let told = relayed.to_lowercase().contains("content-length: 500");
        assert!(told || relayed.to_lowercase().contains("chunked"), "{what}: {relayed}");
    }
}

#[tokio::test]
async fn bad_chunk_with_the_head_aborts_the_response() {
    for (what, body) in [
        ("the first chunk", "zz\r\n"),
        ("the second chunk", "5\r\nwhole\r\nzz\r\n"),
        ("the end", "5\r\nwhole\r\n0\r\nX\r\n\r\n"),
    ] {
        for (form, status) in [(STREAM.to_owned(), 200), (STREAM.replace("200 OK", "400 Bad"), 400)] {
            let bytes = format!("{form}{body}").into_bytes();
            let upstream = TestUpstream::warm().await.automatic(move |call| send(call, bytes.clone()));
            let proxy = TestProxy::tiny(&upstream.url(), "").await;
            let mut client = proxy.sent(chat("x")).await;
            let head =
                soon(what, client.head()).await.unwrap_or_else(|| panic!("{what}: no head of {status}"));
            assert_eq!(head.status(), status, "{what}");
            assert_eq!(client.body(&head).await, None, "{what}: it does not look whole");
            assert_eq!(client.end().await, b"", "{what}");
            proxy.await_outcome("upstream_error", status, 1).await;
            proxy.await_tiny_in_flight(0).await;
            proxy.stop(&[("upstream_error", 1)]).await;
        }
    }
}

#[tokio::test]
async fn response_trailers_never_become_headers() {
    let trailers = "Set-Cookie: evil\r\nContent-Length: 3\r\nX-Anteroom-Cold-Start: true\r\n";
    let relayed = relayed(format!("{STREAM}5\r\nwhole\r\n0\r\n{trailers}\r\n").as_bytes()).await;
    let (head, _) = relayed.split_once("\r\n\r\n").unwrap();
    assert!(
        !head.to_lowercase().contains("cookie") && !head.to_lowercase().contains("content-length"),
        "{relayed}"
    );
}

#[tokio::test]
async fn informational_heads_are_limited() {
    // Endless 1xx responses.
    for head in ["HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"] {
        let upstream = TestUpstream::warm().await.automatic(move |mut call| async move {
            call.body().await;
            let burst = head.repeat(100);
            while tokio::io::AsyncWriteExt::write_all(&mut call.wire.stream, burst.as_bytes()).await.is_ok() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        });
        let more = "upstream: { responseTimeout: 300ms }";
        let config = routes(&[route("tiny", &upstream.url(), more), route("other", &upstream.url(), "")]);
        let proxy = TestProxy::start(&config).await;
        let mut client = proxy.sent(chat("x")).await;
        // The same thread serves other requests meanwhile.
        assert_eq!(proxy.ask(crate::support::wire::get("/health")).await.status(), 200);
        client.response().await.is_error(502, "upstream_error");
        proxy.await_tiny_in_flight(0).await;
    }
}

#[tokio::test]
async fn bytes_after_a_response_are_discarded() {
    // Response splitting and connection poisoning: an unsolicited response would be taken for the next request's.
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let evil = answer("200 OK", &[("X-Evil", "1")], "evil");
    for _ in 0..20 {
        let mut client = proxy.sent(chat("first")).await;
        let mut call = upstream.call().await;
        call.body().await;
        let both = answer("200 OK", &[], "mine") + &evil;
        tokio::spawn(call.finish(both));
        assert_eq!(client.response().await.text(), "mine");
        let mut next = proxy.sent(chat("second")).await;
        // The request uses another connection, since the first one carried unsolicited bytes.
        upstream.call().await.echo().await;
        assert_eq!(next.response().await.json()["text"], "second");
        assert_eq!(client.buf, b"", "nor does the first client see it");
    }
}

/// hyper's client, like its server, reads a line feed after the last chunk as trailers, and drops what it cannot parse
/// of them. These are the upstream's own bytes, on a connection used for one request at a time by the proxy only: they
/// contain nothing from the proxy, and leftover bytes are never a response.
#[tokio::test]
async fn response_trailers_hide_no_response() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let whole = answer("200 OK", &[("X-Evil", "1")], "evil");
    let head_alone = "HTTP/1.1 200 OK\r\nX-Evil: 1\r\n\r\n".to_owned();
    for trailers in ["\n", "X-T: 1\n\n", "X-T: 1\n\r\n", "X-T: 1\r\n\n", "X-T: 1\r2\r\n", " \n\r\n"] {
        for hidden in [&whole, &head_alone] {
            let what = format!("{trailers:?}, then {hidden:?}");
            let mut client = proxy.sent(chat("first")).await;
            let mut call = upstream.call().await;
            call.body().await;
            tokio::spawn(call.finish(format!("{STREAM}5\r\nwhole\r\n0\r\n{trailers}{hidden}")));
            let head = soon(&what, client.head()).await.unwrap();
            assert_eq!((head.status(), head.get("x-evil")), (200, None), "{what}");
            let body = client.body(&head).await;
            assert!(body.is_none_or(|body| body == b"whole"), "{what}");
            let mut next = proxy.sent(chat("second")).await;
            upstream.call().await.echo().await;
            let response = next.response().await;
            assert_eq!((response.status(), response.get("x-evil")), (200, None), "{what}");
            assert_eq!(response.json()["text"], "second", "{what}");
            assert_eq!(client.buf, b"", "{what}");
        }
    }
}

#[tokio::test]
async fn reserved_fields_of_responses_are_removed() {
    let fields = [
        ("X-Anteroom-Cold-Start", "true"),
        ("X-Keda-Http-Cold-Start", "true"),
        ("X-Anteroom-Other", "true"),
        ("Server-Timing", "hold;dur=9, db;dur=2;desc=\"a, load\", Upstream;dur=9"),
        ("Connection", "close, X-Request-Id"),
        ("Keep-Alive", "timeout=1000"),
        ("Proxy-Authenticate", "Basic"),
        ("Upgrade", "h2c"),
    ];
    let relayed = relayed(answer("200 OK", &fields, "whole").as_bytes()).await.to_lowercase();
    for gone in ["x-anteroom-", "x-keda-http-cold-start", "keep-alive:", "proxy-authenticate", "upgrade:"] {
        assert!(!relayed.contains(gone), "{gone}: {relayed}");
    }
    assert!(relayed.contains("x-request-id"), "{relayed}");
    assert!(relayed.contains("server-timing: db;dur=2;desc=\"a, load\"\r\n"), "{relayed}");
}

#[tokio::test]
async fn early_response_does_not_mix_requests_up() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}").await;
    let mut warm: Wire = proxy.sent(streaming("warm")).await;
    upstream.call().await.echo().await;
    assert_eq!(warm.response().await.status(), 200);
    // A server that keeps the connection must not take the rest of the body for the next request.
    let request = chat("early");
    let (begin, rest) = request.split_at(request.len() - 5);
    let mut client = proxy.sent(begin).await;
    let mut call = upstream.call().await;
    let connection = call.connection;
    call.send(answer("200 OK", &[], "early")).await;
    let head = soon("the early answer", client.head()).await.unwrap();
    assert_eq!(client.body(&head).await.unwrap(), b"early");
    let mut next = proxy.sent(chat("next")).await;
    let call = upstream.call().await;
    assert_ne!(call.connection, connection, "a new connection, since the old one is not at a request's end");
    // The proxy may have closed the connection.
    let _ = tokio::io::AsyncWriteExt::write_all(&mut client.stream, rest.as_bytes()).await;
    call.echo().await;
    assert_eq!(next.response().await.json()["text"], "next");
}
