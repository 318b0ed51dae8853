//! Slow attacks: trickled heads (Slowloris), trickled bodies (R.U.D.Y.), responses read byte by byte (CVE-2019-9511 and
//! older). They use the real connection code on a paused clock.

use std::time::Duration;

use anteroom::error::Outcome;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, split},
    time::{Instant, sleep},
};

use crate::{
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, block, frame, ping,
        post, post_fields, settings, window,
    },
    memory::{MemoryTest, settle},
    recorder::TINY_BODY,
    support::wire::{CHAT, post_with},
};

const MATCH_TINY: &str = "match: { models: [tiny] }";
const MATCH_ANY: &str = "match: {}";

/// Sends `begin`, then `part` at every interval. Returns the seconds until the connection ends, and the bytes received.
async fn trickle(client: DuplexStream, begin: &[u8], part: &[u8], every: Duration) -> (f64, String) {
    let began = Instant::now();
    let (mut read, mut write) = split(client);
    write.write_all(begin).await.unwrap();
    let part = part.to_vec();
    let trickling = tokio::spawn(async move {
        loop {
            sleep(every).await;
            if write.write_all(&part).await.is_err() {
                return;
            }
        }
    });
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(3600), read.read_to_end(&mut answer)).await;
    trickling.abort();
    (began.elapsed().as_secs_f64(), String::from_utf8_lossy(&answer).into_owned())
}

fn hello() -> Vec<u8> {
    [PREFACE, &settings(&[]), &frame(SETTINGS, ACK, 0, &[])].concat()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn trickling_first_head_times_out_after_30_s() {
    let memory = MemoryTest::new("headerTimeout: 30s, idleTimeout: 2m", MATCH_TINY);
    let open = frame(HEADERS, END_STREAM, 1, &block(&post_fields(CHAT)));
    let cases: [(&str, Vec<u8>, Vec<u8>); 7] = [
        ("HTTP/1.1, nothing", vec![], vec![]),
        ("HTTP/1.1, the first line", b"P".to_vec(), b"O".to_vec()),
        ("HTTP/1.1, a field", b"POST / HTTP/1.1\r\nX: ".to_vec(), b"x".to_vec()),
        ("HTTP/2, its preface and nothing", hello(), vec![]),
        ("HTTP/2, PINGs", hello(), ping()),
        ("HTTP/2, windows", hello(), window(0, 1)),
        ("HTTP/2, HEADERS without an end", [hello(), open.clone()].concat(), vec![]),
    ];
    for (what, begin, part) in cases {
        let (took, _) = trickle(memory.client(64 << 10), &begin, &part, seconds(7)).await;
        assert_eq!(took.round(), 30.0, "{what}");
    }
    // CONTINUATION every 7 s: four frames, no more than allowed.
    let part = frame(CONTINUATION, 0, 1, &[]);
    let (took, _) = trickle(memory.client(64 << 10), &[hello(), open].concat(), &part, seconds(7)).await;
    assert_eq!(took.round(), 30.0, "HTTP/2, CONTINUATION");
    assert_eq!(memory.gate.counters().admitted(), 0);
}

#[tokio::test(start_paused = true)]
async fn endless_h2_head_counts_as_idle() {
    let memory = MemoryTest::new("headerTimeout: 30s, idleTimeout: 2m", MATCH_TINY);
    memory.ready();
    let begin =
        [hello(), post(1, CHAT, TINY_BODY), frame(HEADERS, 0, 3, &block(&post_fields(CHAT)))].concat();
    // PINGs are not allowed within a head, so nothing is sent; PINGs before it change nothing.
    let (took, _) = trickle(memory.client(64 << 10), &begin, &[], seconds(7)).await;
    assert_eq!(took.round(), 125.0, "2 minutes until GOAWAY, and 5 s");
    let begin = [hello(), post(1, CHAT, TINY_BODY)].concat();
    let (took, _) = trickle(memory.client(64 << 10), &begin, &ping(), seconds(7)).await;
    assert_eq!(took.round(), 125.0, "PINGs keep nothing open");
    assert_eq!(memory.gate.counters().admitted(), 2);
}

#[tokio::test(start_paused = true)]
async fn trickling_body_is_cut_off() {
    // A byte every 29 s never triggers `bodyTimeout`; 100 KB would occupy a connection for a month. The budget is 30 s,
    // of which 29 s pass before the first byte, which restores 1/1000 s: 30.001 s.
    let head = post_with(CHAT, &[], "").replace("Length: 0", "Length: 100000").into_bytes();
    for (matching, is_up) in [(MATCH_TINY, false), (MATCH_TINY, true), (MATCH_ANY, false), (MATCH_ANY, true)]
    {
        let memory = MemoryTest::new("bodyTimeout: 30s, minRate: 1000", matching);
        if is_up {
            memory.ready();
        }
        let (took, answer) = trickle(memory.client(64 << 10), &head, b"x", seconds(29)).await;
        assert!(answer.starts_with("HTTP/1.1 408"), "{matching}: {answer}");
        assert!((30.0..30.1).contains(&took), "{matching}: {took}");
        settle().await;
        assert!(memory.is_empty(), "{matching}");
        assert_eq!(memory.gate.counts().activations, 0, "{matching}: a body that has not come wakes nothing");
    }
    // 100 bytes a second where `minRate` is 1,000: it loses 0.9 s each second, so 33.3 s in all. The 34th part is not
    // awaited.
    let memory = MemoryTest::new("bodyTimeout: 30s, minRate: 1000", MATCH_TINY);
    let (took, answer) = trickle(memory.client(64 << 10), &head, &[b'x'; 100], seconds(1)).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!((33.0..34.0).contains(&took), "{took}");
}

#[tokio::test(start_paused = true)]
async fn trickling_http_2_body_is_cut_off() {
    let memory = MemoryTest::new("bodyTimeout: 30s, minRate: 1000, idleTimeout: 1m", MATCH_TINY);
    let begin = [hello(), frame(HEADERS, END_HEADERS, 1, &block(&post_fields(CHAT)))].concat();
    let client = memory.client(64 << 10);
    let counters = memory.gate.counters();
    // 408 after 30.001 s, and the connection is idle from then on: GOAWAY after a minute, and 5 s.
    let (took, _) = trickle(client, &begin, &frame(DATA, 0, 1, b"x"), seconds(29)).await;
    assert!((95.0..96.0).contains(&took), "{took}");
    assert_eq!(counters.admitted(), 0);
    assert!(memory.is_empty());
}

#[tokio::test(start_paused = true)]
async fn slow_body_at_min_rate_is_accepted() {
    // 300 s at 1,000 bytes a second, with pauses of 20 s.
    for rate in ["1000", "0"] {
        let memory = MemoryTest::new(&format!("bodyTimeout: 30s, minRate: {rate}"), MATCH_TINY);
        memory.ready();
        let body = format!(r#"{{"model":"tiny","text":"{}"}}"#, "x".repeat(300_000 - 27));
        let head = post_with(CHAT, &[("Connection", "close")], "")
            .replace("Length: 0", &format!("Length: {}", body.len()));
        let mut client = memory.client(1 << 20);
        client.write_all(head.as_bytes()).await.unwrap();
        for part in body.as_bytes().chunks(20_000) {
            sleep(seconds(20)).await;
            client.write_all(part).await.unwrap();
        }
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{rate}: {answer}");
    }
    // Without a rate only the pauses count, which is the reason for `minRate`.
    let memory = MemoryTest::new("bodyTimeout: 30s, minRate: 0", MATCH_TINY);
    let head = post_with(CHAT, &[], "").replace("Length: 0", "Length: 100000").into_bytes();
    let (took, answer) = trickle(memory.client(64 << 10), &head, b"x", seconds(29)).await;
    assert_eq!((took, &*answer), (3600.0, ""), "for as long as we looked");
}

const ENDLESS: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

/// Returns the seconds until the only request ends because its client is too slow.
async fn stalls(memory: &MemoryTest) -> f64 {
    let began = Instant::now();
    while memory.gate.counters().ended_as(Outcome::ClientStalled) == 0 {
        assert!(began.elapsed() < seconds(3600), "it goes on for ever");
        sleep(Duration::from_millis(10)).await;
    }
    began.elapsed().as_secs_f64()
}

#[tokio::test(start_paused = true)]
async fn response_read_byte_by_byte_is_cut_off() {
    // A byte every 59 s: of the budget of 60 s, 59 s pass, and the byte restores 1/1000 s.
    let memory =
        MemoryTest::serving("stallTimeout: 60s, minRate: 1000", MATCH_TINY, ENDLESS, b"a\r\n0123456789\r\n");
    memory.ready();
    let mut client = memory.client(1024);
    client.write_all(post_with(CHAT, &[], TINY_BODY).as_bytes()).await.unwrap();
    let reading = tokio::spawn(async move {
        let mut byte = [0];
        loop {
            sleep(seconds(59)).await;
            if client.read(&mut byte).await.is_ok_and(|read| read == 0) {
                return;
            }
        }
    });
    let took = stalls(&memory).await;
    assert!((60.0..60.1).contains(&took), "{took}");
    settle().await;
    assert!(memory.is_empty(), "the endpoint is free again");
    reading.abort();
}

#[tokio::test(start_paused = true)]
async fn window_opened_byte_by_byte_is_cut_off() {
    // 10 bytes every 50 s: the budget of 60 s loses 50 s, and each part restores 1/100 s.
    let memory =
        MemoryTest::serving("stallTimeout: 60s, minRate: 1000", MATCH_TINY, ENDLESS, b"a\r\n0123456789\r\n");
    memory.ready();
    let client = memory.client(64 << 10);
    let (mut read, mut write) = split(client);
    let hello =
        [PREFACE, &settings(&[(4, 10)]), &frame(SETTINGS, ACK, 0, &[]), &post(1, CHAT, TINY_BODY)].concat();
    write.write_all(&hello).await.unwrap();
    let opening = tokio::spawn(async move {
        loop {
            sleep(seconds(50)).await;
            if write.write_all(&window(1, 10)).await.is_err() {
                return;
            }
        }
    });
    let reading = tokio::spawn(async move {
        let mut all = Vec::new();
        let _ = read.read_to_end(&mut all).await;
    });
    let took = stalls(&memory).await;
    assert!((60.0..60.1).contains(&took), "{took}");
    settle().await;
    assert!(memory.is_empty(), "the endpoint is free again");
    opening.abort();
    reading.abort();
}

#[tokio::test(start_paused = true)]
async fn reader_at_its_rate_or_idle_is_served() {
    // 2,000 bytes a second, read every 40 s for an hour; the rate is 1,000.
    let part = format!("3e8\r\n{}\r\n", "x".repeat(1000));
    let memory =
        MemoryTest::serving("stallTimeout: 60s, minRate: 1000", MATCH_TINY, ENDLESS, part.as_bytes());
    memory.ready();
    let mut client = memory.client(1024);
    client.write_all(post_with(CHAT, &[], TINY_BODY).as_bytes()).await.unwrap();
    let mut bite = vec![0; 80_000];
    for _ in 0..90 {
        sleep(seconds(40)).await;
        client.read_exact(&mut bite).await.unwrap();
    }
    assert_eq!(memory.gate.counters().ended_as(Outcome::ClientStalled), 0);
}
