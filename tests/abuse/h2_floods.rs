//! Floods of frames other than requests: CONTINUATION (CVE-2024-27316), PING (CVE-2019-9512), SETTINGS (CVE-2019-9515),
//! PRIORITY (CVE-2019-9513), empty DATA (CVE-2019-9518), WINDOW_UPDATE; windows that stay shut (CVE-2019-9511,
//! CVE-2019-9517); and invalid frames.

use crate::{
    frames::{
        CONTINUATION, ConnectionEnd, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR,
        GOAWAY, HEADERS, PING, PREFACE, PRIORITY, PROTOCOL_ERROR, PUSH_PROMISE, RST_STREAM, RawH2, SETTINGS,
        block, field, frame, get, ping, post, post_fields, settings, window,
    },
    recorder::{Recorder, TINY_BODY},
    support::{TestProxy, TestUpstream, Wire, route, routes, soon, until, upstream::answer, wire::CHAT},
};

const FRAME_SIZE_ERROR: u32 = 0x6;

async fn start(limits: &str, url: &str) -> TestProxy {
    TestProxy::start(&format!("limits: {{ {limits} }}\n{}", routes(&[route("tiny", url, "")]))).await
}

/// Asserts that the proxy still serves other clients.
async fn serves(proxy: &TestProxy) {
    let mut client = RawH2::connect(proxy.address).await;
    client.send(post(1, CHAT, TINY_BODY)).await;
    assert_eq!(client.answer(1).await, Ok(200));
}

#[tokio::test]
async fn continuation_flood_ends_the_connection() {
    let recorder = Recorder::new().await;
    let proxy = start("maxHeaderBytes: 64KiB", &recorder.upstream.url()).await;
    // Fragments of three kinds: whole fields, nothing, and part of a field that never ends.
    let endless = [&[0, 1, b'x', 127, 0xff, 0xff, 0xff, 0x7f][..], &[b'v'; 100]].concat();
    for (what, part) in [("fields", field("x", "y")), ("nothing", Vec::new()), ("half a field", endless)] {
        let mut client = RawH2::connect(proxy.address).await;
        client.send(frame(HEADERS, END_STREAM, 1, &block(&post_fields(CHAT)))).await;
        let mut flood = Vec::new();
        for _ in 0..10_000 {
            flood.extend(frame(CONTINUATION, 0, 1, &part));
        }
        client.try_send(&flood).await;
        // Five frames are allowed: a head of 64 KiB in frames of 16 KiB, plus a quarter.
        let end = client.end().await;
        let told = ConnectionEnd::GoAway(ENHANCE_YOUR_CALM, "too_many_continuations".into());
        assert!(end == told || end == ConnectionEnd::Cut || what == "half a field", "{what}: {end:?}");
    }
    assert_eq!(proxy.gate().await.counters().admitted(), 0);
    serves(&proxy).await;
}

#[tokio::test]
async fn control_frames_above_the_limit_end_it() {
    let recorder = Recorder::new().await;
    let proxy = start("maxControlFrames: 200", &recorder.upstream.url()).await;
    let on_nothing = [&0_u32.to_be_bytes()[..], &[16]].concat();
    let floods: [(&str, Vec<u8>); 7] = [
        ("PING", ping()),
        ("PING that answers none", frame(PING, 1, 0, b"answered")),
        ("SETTINGS", settings(&[])),
        ("SETTINGS that change the windows", settings(&[(4, 1 << 16)])),
        ("PRIORITY", frame(PRIORITY, 0, 1, &on_nothing)),
        ("WINDOW_UPDATE", window(0, 1)),
        ("frames of no known kind", frame(0xee, 0, 0, b"what")),
    ];
    for (what, flood) in floods {
        // SETTINGS, its acknowledgement and two PINGs also count towards the limit of 200 frames.
        let mut client = RawH2::connect(proxy.address).await;
        client.settled().await;
        client.send(flood.repeat(150)).await;
        client.settled().await;
        client.send(post(1, CHAT, TINY_BODY)).await;
        assert_eq!(client.answer(1).await, Ok(200), "{what}");
        client.try_send(flood.repeat(1000)).await;
        assert_eq!(client.end().await, ConnectionEnd::Cut, "{what}");
    }
    serves(&proxy).await;
}

#[tokio::test]
async fn heads_of_closed_streams_are_limited() {
    let recorder = Recorder::new().await;
    let proxy = start("maxControlFrames: 200", &recorder.upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    // HEADERS that open a new stream do not count towards the limit of 200 frames.
    for stream in (1..600).step_by(2) {
        client.send(post(stream, CHAT, TINY_BODY)).await;
        assert_eq!(client.answer(stream).await, Ok(200), "{stream}");
    }
    client.try_send(frame(HEADERS, END_HEADERS | END_STREAM, 1, &[]).repeat(1000)).await;
    assert_eq!(client.end().await, ConnectionEnd::Cut);
    serves(&proxy).await;
}

#[tokio::test]
async fn admin_listener_speaks_no_http_2() {
    let recorder = Recorder::new().await;
    let proxy = start("", &recorder.upstream.url()).await;
    for cut in [1, 23, 24] {
        let mut client = Wire::connect(proxy.admin).await;
        let (first, rest) = PREFACE.split_at(cut);
        client.send(first).await;
        client.send(rest).await;
        assert_eq!(client.end().await, b"", "no SETTINGS, whichever way it is cut: {cut}");
    }
    let mut client = Wire::connect(proxy.admin).await;
    assert_eq!(client.ask("GET /livez HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 200);
}

#[tokio::test]
async fn unread_frame_replies_end_the_connection() {
    // Internal data buffering (CVE-2019-9517): replies are not collected; reading stops until the client reads.
    let recorder = Recorder::new().await;
    let proxy = start("maxControlFrames: 100000000, stallTimeout: 200ms", &recorder.upstream.url()).await;
    for flood in [ping(), settings(&[])] {
        let mut client = RawH2::connect(proxy.address).await;
        let flood = flood.repeat(10_000);
        let mut sent = 0;
        soon("the end", async {
            while client.try_send(&flood).await {
                sent += flood.len();
            }
        })
        .await;
        // Includes the kernel's buffers on both sides.
        assert!(sent < 128 << 20, "{sent}");
    }
    serves(&proxy).await;
}

#[tokio::test]
async fn empty_data_frames_end_the_connection() {
    let recorder = Recorder::new().await;
    let proxy = start("", &recorder.upstream.url()).await;
    for empty in [frame(DATA, 0, 1, &[]), frame(DATA, 8, 1, &[0])] {
        let mut client = RawH2::connect(proxy.address).await;
        client.send(frame(HEADERS, END_HEADERS, 1, &block(&post_fields(CHAT)))).await;
        client.try_send(empty.repeat(5000)).await;
        assert_eq!(
            client.end().await,
            ConnectionEnd::GoAway(ENHANCE_YOUR_CALM, "too_many_data_frames".into())
        );
    }
    assert_eq!(proxy.gate().await.counters().admitted(), 0);
    serves(&proxy).await;
}

#[tokio::test]
async fn windows_that_overflow_are_errors() {
    let upstream = TestUpstream::cold().await;
    let proxy = start("", &upstream.url()).await;
    let most = (1 << 31) - 1;
    let ends: [(&str, Vec<u8>, u32); 4] = [
        ("the connection's", window(0, most), FLOW_CONTROL_ERROR),
        ("the connection's, by nothing", window(0, 0), PROTOCOL_ERROR),
        ("by a setting", settings(&[(4, 1 << 31)]), FLOW_CONTROL_ERROR),
        ("a stream's that there is not", window(99, 1), PROTOCOL_ERROR),
    ];
    for (what, bytes, expected) in ends {
        let mut client = RawH2::connect(proxy.address).await;
        client.send(bytes).await;
        match client.end().await {
            ConnectionEnd::GoAway(code, _) => {
                assert!([expected, PROTOCOL_ERROR].contains(&code), "{what}: {code}")
            }
            ConnectionEnd::Cut => panic!("{what}: no word"),
        }
    }
    let mut client = RawH2::connect(proxy.address).await;
    client.send(post(1, CHAT, TINY_BODY)).await;
    proxy.await_tiny_held(1).await;
    client.send(window(1, most)).await;
    assert_eq!(client.answer(1).await, Err(FLOW_CONTROL_ERROR));
    proxy.await_tiny_held(0).await;
}

#[tokio::test]
async fn closed_window_releases_the_endpoint() {
    // SETTINGS_INITIAL_WINDOW_SIZE is 0: heads pass, bodies never do.
    const STALLED_STREAMS: u32 = 20;
    let body = "x".repeat(100 << 10);
    let upstream = TestUpstream::warm().await.automatic(move |mut call| {
        let body = body.clone();
        async move {
            call.body().await;
            let mut call = call;
            // The proxy may close the connection.
            let _ = tokio::io::AsyncWriteExt::write_all(
                &mut call.wire.stream,
                answer("200 OK", &[], &body).as_bytes(),
            )
            .await;
            call.gone().await;
        }
    });
    let proxy = start("stallTimeout: 200ms", &upstream.url()).await;
    let mut client = RawH2::with_settings(proxy.address, &[(4, 0)]).await;
    for number in 0..STALLED_STREAMS {
        client.send(post(2 * number + 1, CHAT, TINY_BODY)).await;
    }
    for _ in 0..STALLED_STREAMS {
        assert_eq!(client.frame_of(&[HEADERS]).await.unwrap().payload[0], 0x88, "200");
    }
    proxy.await_outcome("client_stalled", 200, STALLED_STREAMS.into()).await;
    proxy.await_tiny_in_flight(0).await;
    for _ in 0..STALLED_STREAMS {
        assert!(client.frame_of(&[RST_STREAM]).await.is_some());
    }
    // Otherwise shutdown would wait for this client, which does not react to GOAWAY.
    drop(client);
    proxy.stop(&[("client_stalled", STALLED_STREAMS.into())]).await;
}

#[tokio::test]
async fn local_responses_time_out_on_closed_window() {
    let recorder = Recorder::new().await;
    let proxy = start("stallTimeout: 200ms", &recorder.upstream.url()).await;
    let mut client = RawH2::with_settings(proxy.address, &[(4, 0)]).await;
    client.send(get(1, "/v1/models")).await;
    assert_eq!(client.answer(1).await, Ok(200));
    assert!(client.frame_of(&[RST_STREAM]).await.is_some());
}

#[tokio::test]
async fn invalid_frames_are_errors() {
    let upstream = TestUpstream::cold().await;
    let proxy = start("", &upstream.url()).await;
    let head = block(&post_fields(CHAT));
    let open = |stream| frame(HEADERS, END_HEADERS, stream, &head);
    let cases: Vec<(&str, Vec<u8>, u32)> = vec![
        ("DATA on no stream", frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        ("DATA on an idle stream", frame(DATA, 0, 5, b"x"), PROTOCOL_ERROR),
        ("HEADERS on no stream", frame(HEADERS, END_HEADERS, 0, &head), PROTOCOL_ERROR),
        ("HEADERS on a stream of ours", open(2), PROTOCOL_ERROR),
        ("HEADERS on an earlier stream", [open(5), open(3)].concat(), PROTOCOL_ERROR),
        ("CONTINUATION behind nothing", frame(CONTINUATION, END_HEADERS, 1, &head), PROTOCOL_ERROR),
        (
            "DATA within a head",
            [frame(HEADERS, 0, 1, &head), frame(DATA, 0, 1, b"x")].concat(),
            PROTOCOL_ERROR,
        ),
        (
            "CONTINUATION of another stream",
            [frame(HEADERS, 0, 1, &head), frame(CONTINUATION, END_HEADERS, 3, &[])].concat(),
            PROTOCOL_ERROR,
        ),
        (
            "PUSH_PROMISE",
            frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], &head[..]].concat()),
            PROTOCOL_ERROR,
        ),
        ("padding beyond the frame", frame(DATA, 8, 1, &[200, 0]), PROTOCOL_ERROR),
        ("a frame that is too large", frame(DATA, 0, 1, &vec![0; (16 << 10) + 1]), FRAME_SIZE_ERROR),
        ("PING of 7 bytes", frame(PING, 0, 0, b"1234567"), FRAME_SIZE_ERROR),
        ("SETTINGS of 5 bytes", frame(SETTINGS, 0, 0, b"12345"), FRAME_SIZE_ERROR),
        ("SETTINGS on a stream", frame(SETTINGS, 0, 1, &[]), PROTOCOL_ERROR),
        ("an acknowledgement of nothing", frame(SETTINGS, 1, 0, &[]), PROTOCOL_ERROR),
        ("RST_STREAM of an idle stream", frame(RST_STREAM, 0, 7, &8_u32.to_be_bytes()), PROTOCOL_ERROR),
        ("an index beyond the table", frame(HEADERS, END_HEADERS, 1, &[0xff, 0x80, 0x10]), 0x9),
    ];
    for (what, bytes, expected) in cases {
        let mut client = RawH2::connect(proxy.address).await;
        client.settled().await;
        client.send(bytes).await;
        let end = client.end().await;
        // A framing error may be reported as a protocol error.
        assert!(
            matches!(&end, ConnectionEnd::GoAway(code, _) if [expected, PROTOCOL_ERROR].contains(code)),
            "{what}: {end:?}"
        );
    }
    until("nothing to be left", async || proxy.gate().await.held() == 0).await;
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn goaway_from_client_finishes_its_streams() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("", &upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    client.send(post(1, CHAT, TINY_BODY)).await;
    let call = upstream.call().await;
    client.send(frame(GOAWAY, 0, 0, &[0; 8])).await;
    call.echo().await;
    assert_eq!(client.answer(1).await, Ok(200));
    proxy.stop(&[("completed", 1)]).await;
}
