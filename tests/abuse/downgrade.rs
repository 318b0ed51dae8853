//! Request smuggling through HTTP/2: content that is framing in HTTP/2 and plain text in HTTP/1, or the reverse (H2.CL,
//! H2.TE and header injection; RFC 9113, sections 8.1.1 and 8.2).

use crate::{
    frames::{
        DATA, END_HEADERS, END_STREAM, HEADERS, PROTOCOL_ERROR, RawH2, block, field, frame, post, post_fields,
    },
    recorder::{Recorder, TINY_BODY},
    support::{TestProxy, wire::CHAT},
};

/// Header fields of a POST of [`TINY_BODY`].
type Fields = Vec<(Vec<u8>, Vec<u8>)>;

fn fields() -> Fields {
    post_fields(CHAT).into_iter().map(|(name, value)| (name.into(), value.into())).collect()
}

fn and(name: &str, value: &str) -> Fields {
    let mut fields = fields();
    fields.push((name.into(), value.into()));
    fields
}

fn instead(name: &str, value: &str) -> Fields {
    let mut fields = fields();
    fields.iter_mut().find(|(known, _)| known == name.as_bytes()).unwrap().1 = value.into();
    fields
}

fn without(name: &str) -> Fields {
    fields().into_iter().filter(|(known, _)| known != name.as_bytes()).collect()
}

fn request(stream: u32, fields: &Fields, body: &str) -> Vec<u8> {
    let block: Vec<u8> = fields.iter().flat_map(|(name, value)| field(name, value)).collect();
    [frame(HEADERS, END_HEADERS, stream, &block), frame(DATA, END_STREAM, stream, body.as_bytes())].concat()
}

#[tokio::test]
async fn invalid_http_2_requests_are_rejected() {
    let cases: Vec<(&str, Fields, &str)> = vec![
        ("H2.CL: a length below the data", and("content-length", "5"), TINY_BODY),
        ("H2.CL: a length above the data", and("content-length", "500"), TINY_BODY),
        ("H2.CL: no number", and("content-length", "1x"), TINY_BODY),
        ("H2.CL: a plus", and("content-length", "+16"), TINY_BODY),
        (
            "H2.CL: two lengths",
            [and("content-length", "16"), vec![(b"content-length".into(), b"5".into())]].concat(),
            TINY_BODY,
        ),
        ("H2.TE", and("transfer-encoding", "chunked"), "0\r\n\r\n"),
        ("connection", and("connection", "close"), TINY_BODY),
        ("keep-alive", and("keep-alive", "timeout=5"), TINY_BODY),
        ("proxy-connection", and("proxy-connection", "keep-alive"), TINY_BODY),
        ("upgrade", and("upgrade", "h2c"), TINY_BODY),
        ("te that is not trailers", and("te", "chunked"), TINY_BODY),
        ("a line end in a value", and("x", "a\r\ntransfer-encoding: chunked"), TINY_BODY),
        ("a line feed in a value", and("x", "a\nb"), TINY_BODY),
        ("a carriage return in a value", and("x", "a\rb"), TINY_BODY),
        ("a zero byte in a value", and("x", "a\0b"), TINY_BODY),
        ("a line end in a name", and("x: a\r\ntransfer-encoding", "chunked"), TINY_BODY),
        ("a colon in a name", and("x:y", "1"), TINY_BODY),
        ("a space in a name", and("x y", "1"), TINY_BODY),
        ("capitals in a name", and("X-Capital", "1"), TINY_BODY),
        ("no name", and("", "1"), TINY_BODY),
        ("a path with a space", instead(":path", "/v1/chat/completions HTTP/1.1"), TINY_BODY),
        ("a path with a line end", instead(":path", "/v1/x HTTP/1.1\r\nx: "), TINY_BODY),
        ("a path with a zero byte", instead(":path", "/v1/chat/completions\0"), TINY_BODY),
        ("no path", without(":path"), TINY_BODY),
        ("an empty path", instead(":path", ""), TINY_BODY),
        ("no method", without(":method"), TINY_BODY),
        ("a method with a space", instead(":method", "POST /evil HTTP/1.1"), TINY_BODY),
        ("a method with a line end", instead(":method", "POST\r\nx"), TINY_BODY),
        ("a scheme with a line end", instead(":scheme", "http\r\nx"), TINY_BODY),
        ("an authority with a line end", instead(":authority", "api.test\r\nx: y"), TINY_BODY),
        ("an authority with a user", instead(":authority", "evil.test@api.test"), TINY_BODY),
        ("an authority with a path", instead(":authority", "api.test/evil"), TINY_BODY),
        ("two methods", [vec![(b":method".into(), b"GET".into())], fields()].concat(), TINY_BODY),
        ("two paths", [vec![(b":path".into(), b"/v1/models".into())], fields()].concat(), TINY_BODY),
        ("two authorities", [vec![(b":authority".into(), b"evil".into())], fields()].concat(), TINY_BODY),
        (
            "a pseudo-header behind a field",
            [fields(), vec![(b":path".into(), b"/".into())]].concat(),
            TINY_BODY,
        ),
        (
            "a pseudo-header of answers",
            [vec![(b":status".into(), b"200".into())], fields()].concat(),
            TINY_BODY,
        ),
        (
            "a pseudo-header that there is not",
            [vec![(b":evil".into(), b"1".into())], fields()].concat(),
            TINY_BODY,
        ),
        (
            "CONNECT with a protocol",
            [vec![(b":protocol".into(), b"websocket".into())], fields()].concat(),
            TINY_BODY,
        ),
    ];
    let mut wrong = Vec::new();
    for matching in ["", "match: {}"] {
        let recorder = Recorder::new().await;
        let proxy = TestProxy::tiny(&recorder.upstream.url(), matching).await;
        recorder.taken(&proxy).await;
        for (what, fields, body) in &cases {
            let mut client = RawH2::connect(proxy.address).await;
            client.send(request(1, fields, body)).await;
            let answer = client.answer(1).await;
            // The next request is served, on the same connection if that is still open.
            let mut next = Err(0);
            if client.try_send(post(3, CHAT, TINY_BODY)).await {
                next = client.try_answer(3).await.unwrap_or(Err(0));
            }
            if next.is_err() {
                let mut other = RawH2::connect(proxy.address).await;
                other.send(post(1, CHAT, TINY_BODY)).await;
                next = other.answer(1).await;
            }
            let mut seen = recorder.taken(&proxy).await;
            let last = seen.pop().map(|seen| seen.body);
            let refused = match answer {
                Ok(status) => (400..500).contains(&status),
                Err(code) => code == PROTOCOL_ERROR,
            };
            let nothing = seen.iter().all(|seen| seen.body == "(broken)");
            if !refused || !nothing || next != Ok(200) || last.as_deref() != Some(TINY_BODY) {
                wrong.push(format!(
                    "{what} ({matching}): {answer:?}, then {next:?}; the server saw {seen:?}, {last:?}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn valid_http_2_requests_are_reframed() {
    let recorder = Recorder::new().await;
    let proxy = TestProxy::tiny(&recorder.upstream.url(), "").await;
    let cases: Vec<(&str, Fields)> = vec![
        ("a length that is right", and("content-length", "16")),
        ("a Host beside the authority", and("host", "api.test")),
        ("te: trailers", and("te", "trailers")),
        ("an expectation", and("expect", "100-continue")),
        ("a cookie in crumbs", [and("cookie", "a=1"), vec![(b"cookie".into(), b"b=2".into())]].concat()),
    ];
    for (what, fields) in &cases {
        let mut client = RawH2::connect(proxy.address).await;
        client.send(request(1, fields, TINY_BODY)).await;
        assert_eq!(client.answer(1).await, Ok(200), "{what}");
    }
    let seen = recorder.taken(&proxy).await;
    assert_eq!(seen.len(), cases.len());
    for seen in seen {
        assert_eq!((&*seen.body, seen.head.get("content-length")), (TINY_BODY, Some("16")), "{seen:?}");
        assert_eq!(seen.head.get("host"), Some("api.test"));
    }
}

#[tokio::test]
async fn host_beside_another_authority_is_ignored() {
    let recorder = Recorder::new().await;
    let proxy = TestProxy::tiny(&recorder.upstream.url(), "").await;
    let mut client = RawH2::connect(proxy.address).await;
    client.send(request(1, &and("host", "evil.test"), TINY_BODY)).await;
    let answer = client.answer(1).await;
    for seen in recorder.taken(&proxy).await {
        assert_eq!(
            (seen.head.get("host"), seen.head.get("x-forwarded-host")),
            (Some("api.test"), Some("api.test"))
        );
    }
    assert!(matches!(answer, Ok(200 | 400) | Err(PROTOCOL_ERROR)), "{answer:?}");
}

#[tokio::test]
async fn http_2_trailers_never_become_headers() {
    for matching in ["", "match: {}"] {
        let recorder = Recorder::new().await;
        let proxy = TestProxy::tiny(&recorder.upstream.url(), matching).await;
        recorder.taken(&proxy).await;
        let mut client = RawH2::connect(proxy.address).await;
        let trailers = [("content-length", "5"), ("authorization", "Bearer evil"), ("host", "evil.test")];
        client
            .send(
                [
                    frame(HEADERS, END_HEADERS, 1, &block(&post_fields(CHAT))),
                    frame(DATA, 0, 1, TINY_BODY.as_bytes()),
                    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&trailers)),
                ]
                .concat(),
            )
            .await;
        assert_eq!(client.answer(1).await, Ok(200), "{matching}");
        let [seen] = &recorder.taken(&proxy).await[..] else { panic!("one request") };
        assert_eq!((&*seen.body, seen.head.get("host")), (TINY_BODY, Some("api.test")));
        assert_eq!(seen.head.get("authorization"), None);
    }
}
