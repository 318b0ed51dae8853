//! Request smuggling over HTTP/1.1: CL.TE, TE.CL, TE.TE, and chunk lines and heads that two readers could interpret
//! differently (CVE-2019-18277, CVE-2021-40346, CVE-2023-25690, CVE-2025-55315 and similar).
//!
//! Each test request is followed, in the same write, by a second one. Either the first is refused and the connection
//! closed, so the second is never read; or the model server receives exactly one request, and the second one gets its
//! own response.

use crate::{
    recorder::{RecordedRequest, Recorder, TINY_BODY},
    support::{
        TestProxy, Wire, route, routes, soon,
        wire::{CHAT, WireResponse, chat, post_with},
    },
};

/// Expected outcome of a test request.
#[derive(Clone, Copy, Debug)]
enum ExpectedOutcome {
    /// At most a truncated request reaches the model server; nothing after it is served.
    Refuse,
    /// A request with this body reaches the model server, and the next one is served as well.
    Pass(&'static str),
    /// Same as `Pass`, but the connection then closes: RFC 9112, section 6.1, on a length beside chunks.
    PassAndClose(&'static str),
    /// `Refuse` or `Pass`.
    Either(&'static str),
    /// Refused, but its end is unambiguous.
    Unserved,
}
use ExpectedOutcome::{Either, Pass, PassAndClose, Refuse, Unserved};

const NEXT: &str = "GET /health HTTP/1.1\r\nHost: api.test\r\n\r\n";

/// Returns up to two responses, and true if the connection ended before the second.
async fn responses(client: &mut Wire) -> (Vec<WireResponse>, bool) {
    let mut responses = Vec::new();
    while responses.len() < 2 {
        let Some(head) = client.head().await else { return (responses, true) };
        if head.status() >= 200 {
            let body = client.body(&head).await.unwrap_or_default();
            responses.push(WireResponse { head, body });
        }
    }
    (responses, false)
}

/// Sends each test request to a route with models, whose bodies are read first, and to one without, whose bodies
/// stream.
async fn all(cases: &[(&str, String, ExpectedOutcome)]) -> Vec<RecordedRequest> {
    let mut wrong = Vec::new();
    let mut all = Vec::new();
    for matching in ["", "match: {}"] {
        let recorder = Recorder::new().await;
        // Incomplete requests stay incomplete, so the timeouts are short.
        let limits = "limits: { headerTimeout: 300ms, bodyTimeout: 300ms, idleTimeout: 1s }\n";
        let config = format!("{limits}{}", routes(&[route("tiny", &recorder.upstream.url(), matching)]));
        let proxy = TestProxy::start(&config).await;
        recorder.taken(&proxy).await;
        for (what, bytes, must) in cases {
            // Shown if the test fails.
            println!("{what} ({matching})");
            let mut client = proxy.client().await;
            let _ =
                tokio::io::AsyncWriteExt::write_all(&mut client.stream, format!("{bytes}{NEXT}").as_bytes())
                    .await;
            let (responses, closed) = soon(what, responses(&mut client)).await;
            let seen = recorder.taken(&proxy).await;
            let codes: Vec<_> = responses.iter().map(WireResponse::status).collect();
            let bodies: Vec<_> = seen.iter().map(|seen| &*seen.body).collect();
            let refused = (bodies.is_empty() || bodies == ["(broken)"])
                && closed
                && (codes.is_empty() || codes.len() == 1 && codes[0] >= 400);
            let is_next = |response: &WireResponse| response.text() == r#"{"status":"ok"}"#;
            let passed = |body: &str| {
                bodies == [body] && codes == [200, 200] && !is_next(&responses[0]) && is_next(&responses[1])
            };
            let good = match must {
                Refuse => refused,
                Pass(body) => passed(body),
                PassAndClose(body) => bodies == [*body] && codes == [200] && closed,
                Either(body) => refused || passed(body),
                Unserved => bodies.is_empty() && codes == [404, 200] && is_next(&responses[1]),
            };
            if !good {
                wrong.push(format!(
                    "{what} ({matching}), {must:?}: the server saw {bodies:?}, the client {codes:?}, closed: {closed}"
                ));
            }
            all.extend(seen);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    all
}

fn chunked() -> String {
    format!("{:x}\r\n{TINY_BODY}\r\n0\r\n\r\n", TINY_BODY.len())
}

/// A POST with exactly these header lines besides Host, and these bytes as its body.
fn with(lines: &str, body: &str) -> String {
    format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\n{lines}\r\n{body}")
}

const TE: &str = "Transfer-Encoding: chunked\r\n";
const CL: &str = "Content-Length: 16\r\n";

#[tokio::test]
async fn cl_te_is_the_last_request_of_its_connection() {
    // A request framed by Content-Length has, within its body, the last chunk and a second request, which a reader of
    // chunks would serve. The other cases do the reverse.
    let hidden = format!("0\r\n\r\n{}", chat("hidden"));
    let long = format!("Content-Length: {}\r\n", hidden.len());
    let cases = [
        ("CL, TE", with(&format!("{CL}{TE}"), &chunked()), PassAndClose(TINY_BODY)),
        ("TE, CL", with(&format!("{TE}{CL}"), &chunked()), PassAndClose(TINY_BODY)),
        ("TE.CL", with(&format!("{TE}Content-Length: 4\r\n"), &chunked()), PassAndClose(TINY_BODY)),
        (
            "CL.0 of a chunked body",
            with(&format!("Content-Length: 0\r\n{TE}"), &chunked()),
            PassAndClose(TINY_BODY),
        ),
        (
            "a bad CL beside TE",
            with(&format!("{TE}Content-Length: x\r\n"), &chunked()),
            PassAndClose(TINY_BODY),
        ),
        ("a bad CL before TE", with(&format!("Content-Length: x\r\n{TE}"), &chunked()), Refuse),
    ];
    all(&cases).await;
    // An empty body names no model.
    let recorder = Recorder::new().await;
    let proxy = TestProxy::tiny(&recorder.upstream.url(), "").await;
    let mut client = proxy.sent(with(&format!("{long}{TE}"), &hidden)).await;
    client.response().await.is_error(400, "invalid_request");
    assert_eq!(client.end().await, b"", "CL.TE: what is hidden in the length is no request");
    assert!(recorder.taken(&proxy).await.is_empty());
}

#[tokio::test]
async fn content_length_is_one_number() {
    let cases = [
        ("as it should be", with(CL, TINY_BODY), Pass(TINY_BODY)),
        ("twice, equal", with(&format!("{CL}{CL}"), TINY_BODY), Either(TINY_BODY)),
        ("twice, differing", with(&format!("{CL}Content-Length: 5\r\n"), TINY_BODY), Refuse),
        (
            "twice, differing, the shorter first",
            with(&format!("Content-Length: 5\r\n{CL}"), TINY_BODY),
            Refuse,
        ),
        ("a list of equals", with("Content-Length: 16, 16\r\n", TINY_BODY), Either(TINY_BODY)),
        ("a list", with("Content-Length: 16, 5\r\n", TINY_BODY), Refuse),
        ("a comma", with("Content-Length: 16,\r\n", TINY_BODY), Refuse),
        ("+", with("Content-Length: +16\r\n", TINY_BODY), Refuse),
        ("-", with("Content-Length: -16\r\n", TINY_BODY), Refuse),
        ("hexadecimal", with("Content-Length: 0x10\r\n", TINY_BODY), Refuse),
        ("a space within", with("Content-Length: 1 6\r\n", TINY_BODY), Refuse),
        ("spaces around", with("Content-Length: \t16 \r\n", TINY_BODY), Pass(TINY_BODY)),
        ("a vertical tab before", with("Content-Length: \x0b16\r\n", TINY_BODY), Refuse),
        ("a form feed behind", with("Content-Length: 16\x0c\r\n", TINY_BODY), Refuse),
        ("a zero byte behind", with("Content-Length: 16\0\r\n", TINY_BODY), Refuse),
        ("nothing", with("Content-Length:\r\n", TINY_BODY), Refuse),
        ("2^64", with("Content-Length: 18446744073709551616\r\n", TINY_BODY), Refuse),
        ("2^64 - 1", with("Content-Length: 18446744073709551615\r\n", TINY_BODY), Refuse),
        ("2^64 + 16", with("Content-Length: 18446744073709551632\r\n", TINY_BODY), Refuse),
    ];
    let cases: Vec<_> =
        cases.into_iter().filter(|(what, ..)| *what != "an underscore for the dash").collect();
    all(&cases).await;
}

#[tokio::test]
async fn transfer_encoding_is_chunked_or_refused() {
    let te = |value: &str| with(&format!("Transfer-Encoding: {value}\r\n"), &chunked());
    let over = |value: &str| with(&format!("{CL}Transfer-Encoding: {value}\r\n"), TINY_BODY);
    let line = |line: &str| with(line, &chunked());
    let cases = [
        ("as it should be", te("chunked"), Pass(TINY_BODY)),
        ("mixed case", te("cHuNkEd"), Either(TINY_BODY)),
        ("xchunked", te("xchunked"), Refuse),
        ("xchunked over a length", over("xchunked"), Refuse),
        ("chunked, identity", te("chunked, identity"), Refuse),
        ("chunked, identity over a length", over("chunked, identity"), Refuse),
        ("identity, chunked", te("identity, chunked"), Refuse),
        ("identity over a length", over("identity"), Refuse),
        ("a list with nothing in it", te(", chunked"), Refuse),
        ("chunked with a parameter", te("chunked;q=1"), Refuse),
        ("quoted", te("\"chunked\""), Refuse),
        ("folded", line("Transfer-Encoding:\r\n chunked\r\n"), Refuse),
        ("folded by a tab", line("Transfer-Encoding:\r\n\tchunked\r\n"), Refuse),
        ("folded over a length", with(&format!("{CL}Transfer-Encoding:\r\n chunked\r\n"), TINY_BODY), Refuse),
        ("folded behind", line("Transfer-Encoding: chunked\r\n , identity\r\n"), Refuse),
        ("a tab before", te("\tchunked"), Either(TINY_BODY)),
        ("a tab behind", te("chunked\t"), Either(TINY_BODY)),
        ("a vertical tab before", te("\x0bchunked"), Refuse),
        ("a vertical tab behind", te("chunked\x0b"), Refuse),
        ("two headers", line(&format!("{TE}{TE}")), Refuse),
        ("two headers, the second odd", line(&format!("{TE}Transfer-Encoding: x\r\n")), Refuse),
        ("two headers, the first odd", line(&format!("Transfer-Encoding: x\r\n{TE}")), Refuse),
        ("two headers, the first empty", line(&format!("Transfer-Encoding:\r\n{TE}")), Refuse),
        ("a space before the colon", line("Transfer-Encoding : chunked\r\n"), Refuse),
        ("a tab before the colon", line("Transfer-Encoding\t: chunked\r\n"), Refuse),
        ("a space before the name", line(" Transfer-Encoding: chunked\r\n"), Refuse),
        ("behind a carriage return", line("X: y\rTransfer-Encoding: chunked\r\n"), Refuse),
        ("behind a line feed", with(&format!("{CL}X: y\nTransfer-Encoding: x\r\n"), TINY_BODY), Refuse),
        ("in HTTP/1.0", te("chunked").replace("HTTP/1.1", "HTTP/1.0"), Refuse),
        ("in HTTP/1.0 with a length", over("chunked").replace("HTTP/1.1", "HTTP/1.0"), Refuse),
    ];
    all(&cases).await;
}

#[tokio::test]
async fn chunk_length_must_match_its_size() {
    let te = |body: &str| with(TE, body);
    let size = |size: &str| te(&format!("{size}\r\n{TINY_BODY}\r\n0\r\n\r\n"));
    let huge = "x".repeat(17 << 10);
    // Each below the bound, together above it.
    let many: String =
        TINY_BODY.chars().map(|byte| format!("1;{}\r\n{byte}\r\n", "e".repeat(2000))).collect();
    let cases = [
        ("more than 64 bits", size("10000000000000010"), Refuse),
        ("2^64 - 1", size("ffffffffffffffff"), Refuse),
        ("2^63", size("8000000000000000"), Refuse),
        ("negative", size("-10"), Refuse),
        ("a plus", size("+10"), Refuse),
        ("0x", size("0x10"), Refuse),
        ("a space before", size(" 10"), Refuse),
        ("a space behind", size("10 "), Either(TINY_BODY)),
        ("a tab behind", size("10\t"), Either(TINY_BODY)),
        ("an underscore", size("1_0"), Refuse),
        ("no size", size(""), Refuse),
        ("zeros before", size("00000010"), Either(TINY_BODY)),
        ("an extension", size("10;name=value"), Pass(TINY_BODY)),
        ("a quoted extension", size("10;name=\"va;lue\""), Either(TINY_BODY)),
        ("an extension without a semicolon", size("10 name=value"), Refuse),
        ("a huge extension", size(&format!("10;{huge}")), Refuse),
        ("many extensions", te(&format!("{many}0\r\n\r\n")), Refuse),
        ("a huge extension of the last chunk", te(&format!("10\r\n{TINY_BODY}\r\n0;{huge}\r\n\r\n")), Refuse),
        ("a line feed ends the extension", size("10;a\nb"), Refuse),
        ("a carriage return in the extension", size("10;a\rb"), Refuse),
        ("a line feed ends the size", te(&format!("10\n{TINY_BODY}\r\n0\r\n\r\n")), Refuse),
        ("a carriage return ends the size", te(&format!("10\r{TINY_BODY}\r\n0\r\n\r\n")), Refuse),
        ("a line feed ends the data", te(&format!("10\r\n{TINY_BODY}\n0\r\n\r\n")), Refuse),
        ("nothing ends the data", te(&format!("10\r\n{TINY_BODY}0\r\n\r\n")), Refuse),
        ("two bytes that are no end", te(&format!("10\r\n{TINY_BODY}xx0\r\n\r\n")), Refuse),
        ("a line feed ends the last chunk", te(&format!("10\r\n{TINY_BODY}\r\n0\n\r\n")), Refuse),
        ("a line feed in a quoted extension", size("10;a=\"\n\""), Refuse),
        (
            "a line feed ends the last chunk's extension",
            te(&format!("10\r\n{TINY_BODY}\r\n0;a\n\r\n")),
            Refuse,
        ),
        ("a line feed ends the body", te(&format!("10\r\n{TINY_BODY}\r\n0\r\n\n")), Refuse),
        ("a carriage return ends the body", te(&format!("10\r\n{TINY_BODY}\r\n0\r\n\r")), Refuse),
    ];
    all(&cases).await;
}

#[tokio::test]
async fn trailers_hide_no_request() {
    // A reader that takes the line feed as the end reads two requests; hyper reads the first as trailers and its body
    // as the next request.
    let inner = chat("inner");
    let outer = post_with(CHAT, &[], &inner);
    let body = |trailers: &str| with(TE, &format!("10\r\n{TINY_BODY}\r\n0\r\n{trailers}"));
    let trailers = [
        ("a line feed", "\n"),
        ("a trailer that a line feed ends", "X-T: 1\n\n"),
        ("the same, and a whole line end", "X-T: 1\n\r\n"),
        ("a line feed behind a whole trailer", "X-T: 1\r\n\n"),
        ("a line feed between trailers", "X-T: 1\nX-U: 2\r\n\r\n"),
        ("a carriage return within a trailer", "X-T: 1\r2\r\n\r\n"),
        ("a space and a line feed", " \n\r\n"),
    ];
    let alone: Vec<_> = trailers.map(|(what, end)| (what, body(end), Refuse)).into();
    let hidden: Vec<_> = trailers.map(|(what, end)| (what, body(end) + &outer, Refuse)).into();
    all(&alone).await;
    all(&hidden).await;
    // The same requests where the body is not read, and behind a valid request.
    let recorder = Recorder::new().await;
    let proxy = TestProxy::tiny(&recorder.upstream.url(), "").await;
    for (what, bytes, _) in &hidden {
        println!("{what}");
        let unread = bytes.replacen(CHAT, "/v1/unknown", 1);
        for (first, status) in [(chat("first"), 200), (String::new(), 404)] {
            let behind = if first.is_empty() { &unread } else { bytes };
            let mut client = proxy.sent(first + behind).await;
            let (responses, closed) = soon(what, responses(&mut client)).await;
            let codes: Vec<_> = responses.iter().map(WireResponse::status).collect();
            assert!(matches!(codes[..], [code] | [code, 400] if code == status), "{codes:?}");
            assert!(closed || client.end().await.is_empty());
            let seen = recorder.taken(&proxy).await;
            assert!(!seen.iter().any(|seen| seen.body.contains("inner")), "{seen:?}");
            assert_eq!(seen.len(), usize::from(status == 200), "{seen:?}");
        }
    }
}

#[tokio::test]
async fn line_must_end_in_crlf() {
    let line = |line: &str| with(&format!("{line}\r\n{CL}"), TINY_BODY);
    let cases = [
        ("line feeds alone", line("X: 1").replace("\r\n", "\n"), Either(TINY_BODY)),
        ("one line feed alone", line("X: 1\nContent-Length: 5"), Refuse),
        ("one carriage return alone", line("X: 1\rContent-Length: 5"), Refuse),
        ("a carriage return at the end of a value", line("X: 1\r"), Refuse),
        ("two carriage returns", line("X: 1\r").replace("1\r\r", "\r\r"), Refuse),
        ("a zero byte in a value", line("X: a\0b"), Refuse),
        ("a zero byte in a name", line("X\0Y: a"), Refuse),
        ("a carriage return in a name", line("X\rY: a"), Refuse),
        ("a folded value", line("X: a\r\n b"), Refuse),
        ("a folded first line", line("X: a").replace("Host:", " X: y\r\nHost:"), Refuse),
        ("a space before the colon", line("X : a"), Refuse),
        ("no colon", line("X"), Refuse),
        ("no name", line(": a"), Refuse),
        ("a byte of no name", line("X[]: a"), Refuse),
        ("bytes above ASCII in a name", line("Xé: a"), Refuse),
        ("a line feed at once before the head", format!("\n{}", line("X: 1")), Either(TINY_BODY)),
        ("line ends before the head", format!("\r\n\r\n{}", line("X: 1")), Either(TINY_BODY)),
    ];
    all(&cases).await;
}

#[tokio::test]
async fn target_and_host_must_be_unambiguous() {
    let target = |target: &str| with(CL, TINY_BODY).replacen(CHAT, target, 1);
    let hosts = |hosts: &str| with(CL, TINY_BODY).replacen("Host: api.test\r\n", hosts, 1);
    let cases = [
        ("two hosts", hosts("Host: api.test\r\nHost: evil.test\r\n"), Refuse),
        ("two equal hosts", hosts("Host: api.test\r\nHost: api.test\r\n"), Refuse),
        ("no host", hosts(""), Refuse),
        ("an empty host", hosts("Host:\r\n"), Either(TINY_BODY)),
        ("a list of hosts", hosts("Host: api.test, evil.test\r\n"), Refuse),
        ("a host with a user", hosts("Host: evil.test@api.test\r\n"), Refuse),
        ("a host with a path", hosts("Host: api.test/x\r\n"), Refuse),
        ("a host with a fragment", hosts("Host: api.test#x\r\n"), Refuse),
        ("a bracket for a host", hosts("Host: ]\r\n"), Refuse),
        ("half an address", hosts("Host: [::1\r\n"), Refuse),
        ("an address without brackets", hosts("Host: ::1\r\n"), Refuse),
        ("a port without a host", hosts("Host: :80\r\n"), Refuse),
        ("a port that is none", hosts("Host: api.test:b\r\n"), Refuse),
        ("a port of 17 bits", hosts("Host: api.test:65536\r\n"), Refuse),
        ("two ports", hosts("Host: api.test:80:80\r\n"), Refuse),
        ("a space before the host's colon", hosts("Host : api.test\r\n"), Refuse),
        ("absolute form, the same host", target(&format!("http://api.test{CHAT}")), Pass(TINY_BODY)),
        ("absolute form, another host", target(&format!("http://other.test{CHAT}")), Pass(TINY_BODY)),
        (
            "absolute form, a host that is none",
            hosts("Host: a:b\r\n").replacen(CHAT, &format!("http://api.test{CHAT}"), 1),
            Refuse,
        ),
        ("absolute form, no host", target(&format!("http://{CHAT}")), Refuse),
        ("absolute form, a user", target(&format!("http://api.test@evil.test{CHAT}")), Refuse),
        ("authority form", target("api.test:80"), Unserved),
        ("asterisk form", target("*"), Unserved),
        ("a space in the target", target("/v1/chat/completions HTTP/1.1 x"), Refuse),
        ("a tab in the target", target("/v1/chat\t/completions"), Refuse),
        ("a tab for the space", with(CL, TINY_BODY).replacen(' ', "\t", 1), Refuse),
        ("two spaces", with(CL, TINY_BODY).replacen(' ', "  ", 1), Refuse),
        ("a carriage return in the target", target("/v1/chat/completions\rX"), Refuse),
        ("a zero byte in the target", target("/v1/chat/completions\0"), Refuse),
        ("a fragment", target("/v1/chat/completions#x"), Either(TINY_BODY)),
        ("no version", format!("POST {CHAT}\r\n\r\n"), Refuse),
        ("another version", with(CL, TINY_BODY).replace("HTTP/1.1", "HTTP/1.9"), Refuse),
        ("two digits of version", with(CL, TINY_BODY).replace("HTTP/1.1", "HTTP/1.11"), Refuse),
        ("HTTP/2 in words", with(CL, TINY_BODY).replace("HTTP/1.1", "HTTP/2.0"), Refuse),
        ("a tunnel", with(CL, TINY_BODY).replacen(&format!("POST {CHAT}"), "CONNECT api.test:80", 1), Refuse),
    ];
    for seen in all(&cases).await {
        let host = seen.head.get("host").unwrap();
        assert_eq!(Some(host), seen.head.get("x-forwarded-host"), "{seen:?}");
        assert!(["api.test", "other.test", ""].contains(&host), "{seen:?}");
    }
}

#[tokio::test]
async fn trailers_never_become_fields_of_a_head() {
    let trailers = "Content-Length: 5\r\nTransfer-Encoding: x\r\nHost: evil.test\r\nAuthorization: Bearer evil\r\n\
                    X-Forwarded-For: 6.6.6.6\r\nX-Trailer: 1\r\n";
    let announced =
        "Trailer: Content-Length, Transfer-Encoding, Host, Authorization, X-Forwarded-For, X-Trailer\r\n";
    let body = format!("10\r\n{TINY_BODY}\r\n0\r\n{trailers}\r\n");
    let huge = format!("10\r\n{TINY_BODY}\r\n0\r\nX: {}\r\n\r\n", "x".repeat(17 << 10));
    let most = format!("10\r\n{TINY_BODY}\r\n0\r\nX: {}\r\n\r\n", "x".repeat(16_000));
    let many: String = (0..101).map(|number| format!("X-{number}: 1\r\n")).collect();
    let cases = [
        ("trailers", with(TE, &body), Pass(TINY_BODY)),
        ("announced trailers", with(&format!("{announced}{TE}"), &body), Pass(TINY_BODY)),
        ("huge trailers", with(TE, &huge), Refuse),
        ("many trailers", with(TE, &format!("10\r\n{TINY_BODY}\r\n0\r\n{many}\r\n")), Refuse),
        ("trailers as large as they may be", with(TE, &most), Pass(TINY_BODY)),
        ("a folded trailer", with(TE, &format!("10\r\n{TINY_BODY}\r\n0\r\nX: 1\r\n 2\r\n\r\n")), Refuse),
        ("a trailer without a colon", with(TE, &format!("10\r\n{TINY_BODY}\r\n0\r\nX\r\n\r\n")), Refuse),
    ];
    for seen in all(&cases).await {
        assert_eq!(seen.head.get("host"), Some("api.test"));
        assert_eq!((seen.head.get("authorization"), seen.head.get("x-trailer")), (None, None));
        assert_eq!(seen.head.get("x-forwarded-for"), Some("127.0.0.1"));
    }
}

#[tokio::test]
async fn streamed_trailer_stays_a_trailer() {
    // The recorder reads bodies up to their last chunk and fails on anything after it; this test inspects the trailers
    // of that chunk.
    let mut upstream = crate::support::TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}").await;
    let body = format!(
        "10\r\n{TINY_BODY}\r\n0\r\nAuthorization: Bearer evil\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\nX-Ok: 1\r\n\r\n"
    );
    let lines = format!("Trailer: Authorization, Content-Length, Transfer-Encoding, X-Ok\r\n{TE}");
    let mut warm = proxy.sent(chat("warm")).await;
    upstream.call().await.echo().await;
    assert_eq!(warm.response().await.status(), 200);
    let mut client = proxy.sent(with(&lines, &body)).await;
    let mut call = upstream.call().await;
    let mut trailers = String::new();
    while let crate::support::wire::BodyPart::Data(_) | crate::support::wire::BodyPart::Last(_) = {
        let part = call.wire.part().await;
        if let crate::support::wire::BodyPart::Last(last) = &part {
            trailers = last.to_lowercase();
            crate::support::wire::BodyPart::Broken
        } else {
            part
        }
    } {}
    for framing in ["authorization", "content-length", "transfer-encoding"] {
        assert!(!trailers.contains(framing), "{trailers:?}");
    }
    call.finish(crate::support::upstream::answer("200 OK", &[], "")).await;
    assert_eq!(client.response().await.status(), 200);
}

#[tokio::test]
async fn connection_header_cannot_remove_credentials() {
    // A proxy removes the fields that a client lists in `Connection` (RFC 9110, section 7.6.1); this must not remove a
    // key, or the addresses that a load balancer has added.
    let kept = [
        ("Authorization", "Bearer key"),
        ("X-Forwarded-For", "198.51.100.7"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "lb.test"),
        ("Forwarded", "for=198.51.100.7"),
        ("Via", "1.1 lb"),
        ("X-Real-IP", "198.51.100.7"),
        ("Cookie", "session=1"),
        ("X-Request-Id", "mine"),
        ("Api-Key", "secret"),
        ("X-Goog-Api-Key", "secret"),
        ("X-Tenant", "one"),
        ("X-Auth-Request-Email", "a@b.test"),
        ("Openai-Organization", "one"),
        ("Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ];
    let recorder = Recorder::new().await;
    let proxy = TestProxy::tiny(&recorder.upstream.url(), "").await;
    let names: Vec<_> = kept.iter().map(|(name, _)| *name).collect();
    let connection = format!("close, Content-Length, Content-Type, Host, X-Secret, {}", names.join(", "));
    let mut fields = vec![("Connection", &*connection), ("X-Secret", "1")];
    fields.extend(kept);
    assert_eq!(proxy.ask(post_with(CHAT, &fields, TINY_BODY)).await.status(), 200);
    let [seen] = &recorder.taken(&proxy).await[..] else { panic!("one request") };
    for (name, value) in kept {
        let got = seen.head.get(name).unwrap_or_default();
        assert!(got.starts_with(value), "{name}: {got:?}");
    }
    assert_eq!(seen.head.get("x-forwarded-for"), Some("198.51.100.7, 127.0.0.1"));
    assert_eq!(
        (seen.head.get("content-length"), seen.head.get("content-type")),
        (Some("16"), Some("application/json"))
    );
    assert_eq!((seen.head.get("x-secret"), seen.head.get("connection")), (None, None));
    assert_eq!(seen.body, TINY_BODY);
}

#[tokio::test]
async fn upgrade_to_h2c_is_not_passed_on() {
    // h2c smuggling: a proxy that forwards the upgrade becomes a tunnel that bypasses its rules.
    let h2c =
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n";
    let websocket =
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let cases = [
        ("h2c", with(&format!("{h2c}{CL}"), TINY_BODY), Either(TINY_BODY)),
        ("h2c, not named", with(&format!("Upgrade: h2c\r\n{CL}"), TINY_BODY), Either(TINY_BODY)),
        (
            "a WebSocket to a route for models",
            with(&format!("{websocket}{CL}"), TINY_BODY),
            Either(TINY_BODY),
        ),
        (
            "several protocols",
            with(&format!("Connection: upgrade\r\nUpgrade: h2c, TLS/1.0\r\n{CL}"), TINY_BODY),
            Either(TINY_BODY),
        ),
    ];
    for seen in all(&cases).await {
        assert!(seen.head.get("connection").is_none_or(|connection| connection == "TE"), "{seen:?}");
    }
}

#[tokio::test]
async fn bodies_and_expectations_are_taken_as_they_are() {
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: api.test\r\n{CL}\r\n{TINY_BODY}");
    let cases = [
        ("a GET with a body that looks like a request", get("/v1/responses/resp_1"), Either(TINY_BODY)),
        ("Expect", with(&format!("Expect: 100-continue\r\n{CL}"), TINY_BODY), Pass(TINY_BODY)),
        (
            "Expect twice",
            with(&format!("Expect: 100-continue\r\nExpect: 100-continue\r\n{CL}"), TINY_BODY),
            Either(TINY_BODY),
        ),
        (
            "Expect something else",
            with(&format!("Expect: the-impossible\r\n{CL}"), TINY_BODY),
            Either(TINY_BODY),
        ),
        (
            "Expect without a body",
            with("Expect: 100-continue\r\nContent-Length: 16\r\n", TINY_BODY),
            Either(TINY_BODY),
        ),
        ("Expect with chunks", with(&format!("Expect: 100-continue\r\n{TE}"), &chunked()), Pass(TINY_BODY)),
        (
            "Expect in HTTP/1.0 with chunks",
            with(&format!("Expect: 100-continue\r\n{TE}"), &chunked()).replace("HTTP/1.1", "HTTP/1.0"),
            Refuse,
        ),
    ];
    all(&cases).await;
}
