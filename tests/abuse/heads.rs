//! Header bombs: too large, too many fields, and large heads from few bytes (HPACK, CVE-2016-6581).

use crate::{
    frames::{
        CONTINUATION, ConnectionEnd, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, NEWEST_TABLE_ENTRY,
        RawH2, block, field, frame, indexed_field,
    },
    recorder::Recorder,
    support::{TestProxy, TestUpstream, route, routes, wire::get_with},
};

async fn start(limits: &str, url: &str) -> TestProxy {
    TestProxy::start(&format!("limits: {{ {limits} }}\n{}", routes(&[route("tiny", url, "")]))).await
}

const HEALTH: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":path", "/health"), (":authority", "api.test")];

/// GET over HTTP/2 with `count` more fields of this name.
fn get_h2(name: &str, count: usize) -> Vec<u8> {
    let mut block = block(&HEALTH);
    block.extend(field(name, "1").repeat(count));
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)
}

#[tokio::test]
async fn number_of_fields_is_limited() {
    let upstream = TestUpstream::cold().await;
    for (limits, most) in [("", 100), ("maxHeaders: 20", 20), ("maxHeaders: 300", 300)] {
        let proxy = start(limits, &upstream.url()).await;
        // Host counts as one of the fields.
        for (more, status) in [(most - 1, 200), (most, 431), (most * 3, 431)] {
            let fields = vec![("X", "1"); more];
            let mut client = proxy.sent(get_with("/health", &fields)).await;
            assert_eq!(client.head().await.unwrap().status(), status, "{more} and Host of {most}");
        }
        for (count, status) in [(most, 200), (most + 1, 431), (most * 3, 431)] {
            // Cookie crumbs count as fields, too (RFC 9113, section 8.2.3).
            for name in ["x", "cookie"] {
                let mut client = RawH2::connect(proxy.address).await;
                client.send(get_h2(name, count)).await;
                assert_eq!(client.answer(1).await, Ok(status), "{count} of {most} over HTTP/2");
            }
        }
        proxy.stop(&[]).await;
    }
    assert_eq!(upstream.accepted(), 0);
}

#[tokio::test]
async fn head_over_http_1_has_exactly_its_bound() {
    let upstream = TestUpstream::cold().await;
    for (limits, most) in
        [("", 64 << 10), ("maxHeaderBytes: 8KiB", 8 << 10), ("maxHeaderBytes: 100000", 100_000)]
    {
        let proxy = start(limits, &upstream.url()).await;
        let base = get_with("/health", &[("X", "")]).len();
        for (size, status) in [(most, 200), (most + 1, 431), (most * 3 / 2, 431), (most * 4, 431)] {
            // The head in one part, in two parts, and behind another request.
            let head = get_with("/health", &[("X", &"v".repeat(size - base))]);
            assert_eq!(head.len(), size);
            for (before, first) in [("", size), ("", size / 2), (&*get_with("/health", &[]), size)] {
                let mut client = proxy.sent(format!("{before}{}", &head[..first])).await;
                if !before.is_empty() {
                    assert_eq!(client.response().await.status(), 200);
                }
                // The response may arrive before the whole head is sent.
                let _ =
                    tokio::io::AsyncWriteExt::write_all(&mut client.stream, &head.as_bytes()[first..]).await;
                assert_eq!(
                    client.head().await.unwrap().status(),
                    status,
                    "{size} of {most}, {first} at once"
                );
            }
        }
        proxy.stop(&[]).await;
    }
    assert_eq!(upstream.accepted(), 0);
}

#[tokio::test]
async fn http_2_head_has_the_same_limit() {
    let upstream = TestUpstream::cold().await;
    let proxy = start("maxHeaderBytes: 8KiB", &upstream.url()).await;
    // Each field counts 32 bytes more than its length (RFC 9113, section 6.5.2).
    for (size, status) in [(7000, 200), (9000, 431), (15_000, 431)] {
        let mut client = RawH2::connect(proxy.address).await;
        let block = [block(&HEALTH), field("x", "v".repeat(size))].concat();
        client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)).await;
        assert_eq!(client.answer(1).await, Ok(status), "{size}");
    }
    // Several frames, far beyond the bound: the excess is not stored.
    let mut client = RawH2::connect(proxy.address).await;
    let mut bytes = frame(HEADERS, END_STREAM, 1, &block(&HEALTH));
    for last in [false, false, true] {
        let flags = if last { END_HEADERS } else { 0 };
        bytes.extend(frame(CONTINUATION, flags, 1, &field("x", "v".repeat(15_000))));
    }
    client.send(bytes).await;
    assert!(matches!(client.answer(1).await, Ok(431) | Err(ENHANCE_YOUR_CALM)));
    drop(client);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn hpack_bomb_is_rejected() {
    // Each copy of a field of 4,000 bytes takes one byte: 16,000 copies in one frame would be 64 MB.
    let recorder = Recorder::new().await;
    let proxy = start("", &recorder.upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    let bomb =
        [block(&HEALTH), indexed_field("x", &"v".repeat(4000)), vec![NEWEST_TABLE_ENTRY; 12_000]].concat();
    client.try_send(frame(HEADERS, END_HEADERS | END_STREAM, 1, &bomb)).await;
    assert_eq!(
        client.end().await,
        ConnectionEnd::GoAway(ENHANCE_YOUR_CALM, "header_list_way_too_large".into())
    );
    // Smaller bombs: each below four times the bound, so each gets a 431.
    let mut client = RawH2::connect(proxy.address).await;
    let small =
        [block(&HEALTH), indexed_field("x", &"v".repeat(4000)), vec![NEWEST_TABLE_ENTRY; 20]].concat();
    for number in 0..50 {
        client.send(frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, &small)).await;
        let refused = client.frame_of(&[HEADERS]).await.expect("an answer to each");
        assert_eq!(refused.stream, 2 * number + 1);
    }
    // Otherwise shutdown would wait for this client, which does not react to GOAWAY.
    drop(client);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn hpack_table_is_bounded() {
    // A table size update above the announced maximum (RFC 7541, section 4.2) is a compression error.
    let upstream = TestUpstream::cold().await;
    let proxy = start("", &upstream.url()).await;
    let mut client = RawH2::connect(proxy.address).await;
    client.settled().await;
    // 0x3f, then 4096 + 1 - 31 in 7 bits each.
    let update = [&[0x3f, 0xe2, 0x1f][..], &block(&HEALTH)].concat();
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, &update)).await;
    assert!(matches!(client.end().await, ConnectionEnd::GoAway(..)));
    proxy.stop(&[]).await;
}
