//! Requests that two parsers could interpret differently. Either the proxy rejects them, or the model server gets
//! exactly the requests and bodies that the proxy counted.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::support::{
    TestProxy, TestUpstream,
    wire::{CHAT, chat, get, post},
};

/// Required outcome for some bytes.
enum RequiredOutcome {
    /// No request reaches the model server; the client gets 4xx or no response.
    Refuse,
    /// Exactly these bodies reach it, in this order.
    Pass(&'static [&'static str]),
    /// Either of the two.
    RefuseOrPass(&'static [&'static str]),
}
use RequiredOutcome::{Pass, Refuse, RefuseOrPass};

/// Model server that records the bodies of its requests.
struct BodyRecorder {
    upstream: TestUpstream,
    bodies: Arc<Mutex<Vec<String>>>,
}

impl BodyRecorder {
    async fn new() -> Self {
        let bodies: Arc<Mutex<Vec<String>>> = Arc::default();
        let record = bodies.clone();
        let upstream = TestUpstream::warm().await.automatic(move |mut call| {
            let record = record.clone();
            async move {
                let body = call
                    .wire
                    .body(&call.head)
                    .await
                    .map_or_else(|| "(broken)".into(), |body| String::from_utf8_lossy(&body).into_owned());
                record.lock().push(body);
                call.reply("").await;
            }
        });
        Self { upstream, bodies }
    }

    /// Returns the bodies received since the last call. Sends a sentinel last, so nothing else may be in flight.
    async fn taken(&self, proxy: &TestProxy) -> Vec<String> {
        let mut client = proxy.client().await;
        assert_eq!(client.ask(post(CHAT, SENTINEL)).await.status(), 200);
        let mut bodies = std::mem::take(&mut *self.bodies.lock());
        assert_eq!(bodies.pop().as_deref(), Some(SENTINEL));
        bodies
    }
}

const SENTINEL: &str = r#"{"model":"tiny","text":"sentinel"}"#;
const VALID_BODY: &str = r#"{"model":"tiny"}"#;

/// Sends each case to a route with models, which reads bodies first, and to one without, which streams them.
async fn all(cases: &[(&str, String, RequiredOutcome)]) {
    let mut wrong = Vec::new();
    for matching in ["", "match: {}"] {
        let recorder = BodyRecorder::new().await;
        let proxy = TestProxy::tiny(&recorder.upstream.url(), matching).await;
        recorder.taken(&proxy).await;
        for (what, bytes, must) in cases {
            let what = format!("{what} ({matching})");
            let mut client = proxy.sent(bytes).await;
            // No more bytes follow: an incomplete request stays incomplete.
            let answers = client_end(&mut client).await;
            let came = recorder.taken(&proxy).await;
            let codes: Vec<_> = answers
                .split("HTTP/1.1 ")
                .chain(answers.split("HTTP/1.0 ").skip(1))
                .filter_map(|answer| answer.get(..3)?.parse::<u16>().ok())
                .collect();
            let refused = came.is_empty() && codes.iter().all(|code| (400..500).contains(code));
            let passed = |bodies: &[&str]| {
                // A truncated body is truncated at the server as well.
                let came: Vec<_> = came.iter().map(String::as_str).collect();
                came == bodies && codes.iter().filter(|code| **code == 200).count() == bodies.len()
            };
            let good = match must {
                Refuse => refused || (came == ["(broken)"] && codes.iter().all(|code| *code >= 400)),
                Pass(bodies) => passed(bodies),
                RefuseOrPass(bodies) => refused || passed(bodies),
            };
            if !good {
                wrong.push(format!("{what}: the server saw {came:?}, the client {answers:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Closes the sending side after the first response, and reads to the end of the connection.
async fn client_end(client: &mut crate::support::Wire) -> String {
    let mut answers = String::new();
    let first = async {
        let head = client.head().await?;
        let body = client.body(&head).await?;
        Some(format!("{}\r\n\r\n{}", head.start, String::from_utf8_lossy(&body)))
    };
    // Without a response the proxy is waiting for more bytes, which never arrive.
    if let Ok(Some(first)) = tokio::time::timeout(std::time::Duration::from_millis(200), first).await {
        answers.push_str(&first);
    }
    let _ = tokio::io::AsyncWriteExt::shutdown(&mut client.stream).await;
    answers + &String::from_utf8_lossy(&client.end().await)
}

fn chunked() -> String {
    format!("{:x}\r\n{VALID_BODY}\r\n0\r\n\r\n", VALID_BODY.len())
}

/// Returns a POST with exactly these header lines besides Host, and this body.
fn with(lines: &str, body: &str) -> String {
    format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\n{lines}\r\n{body}")
}

#[tokio::test]
async fn conflicting_lengths_are_rejected_or_unambiguous() {
    let length = format!("Content-Length: {}\r\n", VALID_BODY.len());
    let te = "Transfer-Encoding: chunked\r\n";
    // By its Content-Length the body contains a second request, hidden behind the last chunk.
    let smuggled = format!("0\r\n\r\n{}", post(CHAT, r#"{"model":"tiny","text":"smuggled"}"#));
    let long = format!("Content-Length: {}\r\n", smuggled.len());
    let cases = [
        ("length, then chunks", with(&format!("{length}{te}"), &chunked()), RefuseOrPass(&[VALID_BODY])),
        ("chunks, then length", with(&format!("{te}{length}"), &chunked()), RefuseOrPass(&[VALID_BODY])),
        ("a request in what the length covers", with(&format!("{long}{te}"), &smuggled), RefuseOrPass(&[""])),
        (
            "the same length twice",
            with(&format!("{length}{length}"), VALID_BODY),
            RefuseOrPass(&[VALID_BODY]),
        ),
        (
            "the same length in a list",
            with("Content-Length: 16, 16\r\n", VALID_BODY),
            RefuseOrPass(&[VALID_BODY]),
        ),
        ("two lengths", with(&format!("{length}Content-Length: 5\r\n"), VALID_BODY), Refuse),
        (
            "two lengths, the shorter first",
            with(&format!("Content-Length: 5\r\n{length}"), VALID_BODY),
            Refuse,
        ),
        ("two lengths in a list", with("Content-Length: 16, 5\r\n", VALID_BODY), Refuse),
        ("a plus", with("Content-Length: +16\r\n", VALID_BODY), Refuse),
        ("a minus", with("Content-Length: -16\r\n", VALID_BODY), Refuse),
        ("a base", with("Content-Length: 0x10\r\n", VALID_BODY), Refuse),
        ("an exponent", with("Content-Length: 16e0\r\n", VALID_BODY), Refuse),
        ("a fraction", with("Content-Length: 16.0\r\n", VALID_BODY), Refuse),
        ("a space within", with("Content-Length: 1 6\r\n", VALID_BODY), Refuse),
        ("no number", with("Content-Length: \r\n", VALID_BODY), Refuse),
        ("too large a number", with("Content-Length: 99999999999999999999\r\n", VALID_BODY), Refuse),
        ("its negative in 64 bits", with("Content-Length: 18446744073709551615\r\n", VALID_BODY), Refuse),
        ("spaces around", with("Content-Length:  16 \t \r\n", VALID_BODY), Pass(&[VALID_BODY])),
        ("leading zeros", with("Content-Length: 0016\r\n", VALID_BODY), RefuseOrPass(&[VALID_BODY])),
    ];
    all(&cases).await;
}

#[tokio::test]
async fn chunked_has_one_accepted_spelling() {
    let te = |value: &str| with(&format!("Transfer-Encoding: {value}\r\n"), &chunked());
    let both = |value: &str| {
        with(&format!("Content-Length: {}\r\nTransfer-Encoding: {value}\r\n", VALID_BODY.len()), VALID_BODY)
    };
    let cases = [
        ("as it should be", te("chunked"), Pass(&[VALID_BODY])),
        ("in capitals", te("CHUNKED"), RefuseOrPass(&[VALID_BODY])),
        ("twice in a list", te("chunked, chunked"), Refuse),
        ("not at the end", te("chunked, gzip"), Refuse),
        ("not at the end, over a length", both("chunked, identity"), Refuse),
        ("something else over a length", both("xchunked"), Refuse),
        ("nothing over a length", both(""), Refuse),
        ("identity over a length", both("identity"), Refuse),
        ("a tab before the end", both("chunked\t"), Refuse),
        ("a vertical tab", both("\x0bchunked"), Refuse),
        ("quoted", both("\"chunked\""), Refuse),
        ("twice", with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", &chunked()), Refuse),
        (
            "twice, the second one odd",
            with("Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n", &chunked()),
            Refuse,
        ),
        ("behind another, which nobody would undo", te("gzip, chunked"), Refuse),
        ("with a space before the colon", with("Transfer-Encoding : chunked\r\n", &chunked()), Refuse),
        ("with a byte before the name", with("\x0bTransfer-Encoding: chunked\r\n", &chunked()), Refuse),
        ("folded", with("Transfer-Encoding:\r\n chunked\r\n", &chunked()), Refuse),
        ("in HTTP/1.0", te("chunked").replace("HTTP/1.1", "HTTP/1.0"), Refuse),
    ];
    all(&cases).await;
}

#[tokio::test]
async fn chunk_sizes_must_match_data() {
    let te = |body: &str| with("Transfer-Encoding: chunked\r\n", body);
    let size = |size: &str| te(&format!("{size}\r\n{VALID_BODY}\r\n0\r\n\r\n"));
    let ext = "x".repeat(20 << 10);
    let many: String =
        VALID_BODY.chars().map(|byte| format!("1;{}\r\n{byte}\r\n", "e".repeat(2000))).collect();
    let cases = [
        ("an extension", size("10;a=b"), Pass(&[VALID_BODY])),
        ("capitals and zeros", size("0010"), RefuseOrPass(&[VALID_BODY])),
        ("a base", size("0x10"), Refuse),
        ("a plus", size("+10"), Refuse),
        ("a minus", size("-10"), Refuse),
        ("a space before", size(" 10"), Refuse),
        ("a space behind", size("10 "), RefuseOrPass(&[VALID_BODY])),
        ("no size", size(""), Refuse),
        ("a size of 64 bits", size("ffffffffffffffff"), Refuse),
        ("a size of more than 64 bits", size("10000000000000010"), Refuse),
        ("an overlong extension", size(&format!("10;{ext}")), Refuse),
        ("overlong extensions together", te(&format!("{many}0\r\n\r\n")), Refuse),
        ("a line feed alone in an extension", size("10;a\nb"), Refuse),
        ("a line feed alone after the size", te(&format!("10\n{VALID_BODY}\r\n0\r\n\r\n")), Refuse),
        ("a line feed alone after the data", te(&format!("10\r\n{VALID_BODY}\n0\r\n\r\n")), Refuse),
        ("no end of the data", te(&format!("10\r\n{VALID_BODY}xx0\r\n\r\n")), Refuse),
        ("no last chunk", te(&format!("10\r\n{VALID_BODY}\r\n")), Refuse),
        ("half a chunk", te("10\r\n{\"mo"), Refuse),
        ("trailers", te(&format!("10\r\n{VALID_BODY}\r\n0\r\nX-Trailer: 1\r\n\r\n")), Pass(&[VALID_BODY])),
        (
            "trailers that would be framing",
            te(&format!(
                "10\r\n{VALID_BODY}\r\n0\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\nHost: evil\r\n\r\n"
            )),
            RefuseOrPass(&[VALID_BODY]),
        ),
        ("overlong trailers", te(&format!("10\r\n{VALID_BODY}\r\n0\r\nX: {ext}\r\n\r\n")), Refuse),
    ];
    all(&cases).await;
}

#[tokio::test]
async fn heads_are_read_strictly() {
    let post = |head: &str| format!("{head}\r\nContent-Length: 16\r\n\r\n{VALID_BODY}");
    let line = |line: &str| post(&format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\n{line}"));
    let host = |hosts: &str| post(&format!("POST {CHAT} HTTP/1.1{hosts}"));
    let cases = [
        ("line feeds alone", line("X: 1").replace("\r\n", "\n"), RefuseOrPass(&[VALID_BODY])),
        ("one line feed alone", line("X: 1\nContent-Length: 5"), Refuse),
        ("a carriage return alone", line("X: 1\rContent-Length: 5"), Refuse),
        ("a folded line", line("X: 1\r\n Content-Length: 5"), RefuseOrPass(&[VALID_BODY])),
        ("a space before the colon", line("X : 1"), Refuse),
        ("no colon", line("X"), Refuse),
        ("no name", line(": 1"), Refuse),
        ("a zero byte in a value", line("X: a\0b"), Refuse),
        ("a zero byte in a name", line("X\0: 1"), Refuse),
        ("a space in a name", line("X Y: 1"), Refuse),
        ("a byte of no name", line("X(: 1"), Refuse),
        ("a name that is no ASCII", line("Xé: 1"), Refuse),
        ("a value that is no ASCII", line("X: é"), Pass(&[VALID_BODY])),
        ("two hosts", host("\r\nHost: api.test\r\nHost: evil.test"), Refuse),
        ("the same host twice", host("\r\nHost: api.test\r\nHost: api.test"), Refuse),
        ("no host", host(""), Refuse),
        ("a host that is a list", host("\r\nHost: api.test, evil.test"), Refuse),
        ("a host with a space", host("\r\nHost: api.test evil.test"), Refuse),
        ("a host with a path", host("\r\nHost: api.test/evil"), Refuse),
        ("a host with a user", host("\r\nHost: api.test@evil.test"), Refuse),
        ("a host with a port", host("\r\nHost: api.test:8080"), Pass(&[VALID_BODY])),
        ("an IPv6 host", host("\r\nHost: [::1]:8080"), Pass(&[VALID_BODY])),
        (
            "a target with a user",
            post(&format!("POST http://api.test@evil.test{CHAT} HTTP/1.1\r\nHost: api.test")),
            Refuse,
        ),
        ("HTTP/0.9", format!("POST {CHAT}\r\n\r\n"), Refuse),
        ("HTTP/1.2", line("X: 1").replace("HTTP/1.1", "HTTP/1.2"), Refuse),
        ("HTTP/2.0 in words", line("X: 1").replace("HTTP/1.1", "HTTP/2.0"), Refuse),
        ("http in small letters", line("X: 1").replace("HTTP/1.1", "http/1.1"), Refuse),
        ("two spaces in the first line", line("X: 1").replacen(' ', "  ", 1), Refuse),
        ("a method of no letters", line("X: 1").replacen("POST", "PO(ST", 1), Refuse),
        ("a tunnel", post("CONNECT api.test:80 HTTP/1.1\r\nHost: api.test"), Refuse),
        ("a path that climbs", line("X: 1").replace(CHAT, "/v1/models/../chat/completions"), Refuse),
        ("a path in per cents", line("X: 1").replace(CHAT, "/v1/chat%2fcompletions"), Refuse),
        ("a path with a zero byte", line("X: 1").replace(CHAT, "/v1/chat/completions\0"), Refuse),
        ("no HTTP", "\x16\x03\x01\x02\x00\x01\x00".into(), Refuse),
    ];
    all(&cases).await;
}

#[tokio::test]
async fn absolute_form_overrides_host() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: { models: [tiny], hosts: [good.test] }").await;
    let request = |target: &str, host: &str| {
        format!("POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 16\r\n\r\n{VALID_BODY}")
    };
    let mut client = proxy.sent(request(&format!("http://good.test{CHAT}"), "evil.test")).await;
    let call = upstream.call().await;
    assert_eq!(call.head.line(), format!("POST {CHAT}"));
    assert_eq!(
        (call.head.get("host"), call.head.get("x-forwarded-host")),
        (Some("good.test"), Some("good.test"))
    );
    call.echo().await;
    assert_eq!(client.response().await.status(), 200);
    client.ask(request(&format!("http://evil.test{CHAT}"), "good.test")).await.is_error(404, "unknown_path");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn http_1_0_is_spoken() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let old = |text: &str| chat(text).replace("HTTP/1.1", "HTTP/1.0");
    let mut client = proxy.sent(old("kept").replace("Host:", "Connection: keep-alive\r\nHost:")).await;
    upstream.call().await.echo().await;
    let response = client.response().await;
    assert_eq!((response.status(), response.get("connection")), (200, Some("keep-alive")));
    // Without keep-alive the proxy closes; a response without a length ends with the connection, as HTTP/1.0 has no
    // chunks.
    client.send(old("closed")).await;
    let mut call = upstream.call().await;
    assert_eq!(call.head.start, format!("POST {CHAT} HTTP/1.1"));
    call.body().await;
    call.send(crate::support::upstream::STREAM).await;
    call.finish(crate::support::upstream::chunk("data: x\n\n") + crate::support::upstream::LAST).await;
    let head = client.head().await.unwrap();
    assert_eq!((head.status(), head.get("transfer-encoding")), (200, None));
    assert_eq!(client.end().await, b"data: x\n\n");
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn body_of_a_rejected_request_is_not_parsed() {
    let recorder = BodyRecorder::new().await;
    let proxy = TestProxy::tiny(&recorder.upstream.url(), "").await;
    let hidden = chat("hidden");
    for path in ["/v1/models", "/health", "/nothing", CHAT] {
        let request =
            get(path).replace("\r\n\r\n", &format!("\r\nContent-Length: {}\r\n\r\n{hidden}", hidden.len()));
        let mut client = proxy.sent(request).await;
        client.response().await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut client.stream).await;
        assert_eq!(String::from_utf8_lossy(&client.end().await), "", "one answer to {path}");
    }
    assert!(recorder.taken(&proxy).await.is_empty());
}

#[tokio::test]
async fn response_with_two_framings_passes_with_one() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for length in ["3", "300"] {
        let mut client = proxy.sent(chat("x")).await;
        let mut call = upstream.call().await;
        call.body().await;
        call.finish(format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n"
        ))
        .await;
        let head = client.head().await.unwrap();
        assert_eq!((head.get("content-length"), head.get("transfer-encoding")), (None, Some("chunked")));
        assert_eq!(client.rest().await.as_deref(), Some("whole"));
    }
    for lengths in ["Content-Length: 3\r\nContent-Length: 5", "Content-Length: 3, 5", "Content-Length: +5"] {
        let mut client = proxy.sent(chat("x")).await;
        for _ in 0..2 {
            let mut call = upstream.call().await;
            call.body().await;
            call.send(format!("HTTP/1.1 200 OK\r\n{lengths}\r\n\r\nwhole")).await;
            call.gone().await;
        }
        client.response().await.is_error(502, "upstream_error");
    }
    proxy.stop(&[("completed", 2), ("upstream_error", 3)]).await;
}
