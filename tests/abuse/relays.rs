//! Clients that request large responses from model servers and do not read them, on a paused clock.

use std::time::Duration;

use anteroom::{
    config::budget::{ANSWER_COST_BYTES, RELAY_COST_BYTES},
    error::Outcome,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    frames::{ACK, PREFACE, SETTINGS, frame, post, settings},
    memory::{MemoryTest, settle},
    recorder::TINY_BODY,
    support::wire::{CHAT, post_with},
};

/// All requests are dispatched at once, even to a new endpoint.
const RAMPED_TINY_ROUTE: &str = "match: { models: [tiny] }, concurrency: { rampStart: 64 }";
const ENDLESS: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113, section 6.5.2).
const INITIAL_WINDOW_SIZE: u16 = 4;

/// Opens an HTTP/2 connection with this window for each stream, and sends `streams` requests on it.
async fn ask_h2(memory: &MemoryTest, streams: u32, stream_window: u32) -> DuplexStream {
    let mut client = memory.client(1 << 20);
    let asks: Vec<u8> = (0..streams).flat_map(|number| post(2 * number + 1, CHAT, TINY_BODY)).collect();
    let hello = [PREFACE, &settings(&[(INITIAL_WINDOW_SIZE, stream_window)]), &frame(SETTINGS, ACK, 0, &[])];
    client.write_all(&[&hello.concat()[..], &asks[..]].concat()).await.unwrap();
    client
}

async fn ask_h1(memory: &MemoryTest) -> DuplexStream {
    let mut client = memory.client(1024);
    client.write_all(post_with(CHAT, &[], TINY_BODY).as_bytes()).await.unwrap();
    client
}

/// Reads 10,000 bytes every 370 ms. Between reads it counts as a client that does not read.
fn read_in_bites(mut client: DuplexStream) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut bite = vec![0; 10_000];
        while client.read_exact(&mut bite).await.is_ok() {
            sleep(Duration::from_millis(370)).await;
        }
    })
}

fn relays(memory: &MemoryTest) -> usize {
    memory.shared.memory.kinds().into_iter().find(|(kind, _)| *kind == "relay").unwrap().1
}

/// 1 MiB for bodies gives 4 MiB for unread data: 21 responses of 192 KiB, or 10 in half of it, including the reader.
#[tokio::test(start_paused = true)]
async fn unread_relays_end_early_while_memory_is_short() {
    for is_h2 in [false, true] {
        for (count, after_1_s, after_5_s) in [(9, 0, 0), (15, 0, 6), (30, 10, 21)] {
            let limits = "maxBufferedBytes: 1MiB, maxBodyBytes: 1MiB, stallTimeout: 60s, minRate: 1000";
            let memory = MemoryTest::serving(limits, RAMPED_TINY_ROUTE, ENDLESS, b"a\r\n0123456789\r\n");
            memory.ready();
            let case = format!("HTTP/2: {is_h2}, {count}");
            let ended = || memory.gate.counters().ended_as(Outcome::ClientStalled);
            let began = Instant::now();
            let at = async |seconds: f64| sleep_until(began + Duration::from_secs_f64(seconds)).await;
            let reader = read_in_bites(ask_h1(&memory).await);
            let mut unread = Vec::new();
            if is_h2 {
                unread.push(ask_h2(&memory, count, 10).await);
            } else {
                for _ in 0..count {
                    unread.push(ask_h1(&memory).await);
                }
            }
            at(0.9).await;
            assert_eq!(ended(), 0, "{case}");
            at(4.9).await;
            assert_eq!(ended(), after_1_s, "{case}");
            at(6.5).await;
            assert_eq!(ended(), after_5_s, "{case}");
            let left = u64::from(count) - after_5_s;
            let used = relays(&memory) as u64;
            assert!((left..=left + 1).contains(&(used / RELAY_COST_BYTES as u64)), "{case}: {used}");
            at(59.0).await;
            assert_eq!(ended(), after_5_s, "{case}: there is room for the others");
            at(62.0).await;
            assert_eq!(ended(), u64::from(count), "{case}");
            assert!(!reader.is_finished(), "{case}: a client that reads is never cut off");
            assert_eq!(memory.gate.in_flight(), 1, "{case}: the reader");
            reader.abort();
            drop(unread);
            let _ = reader.await;
            settle().await;
            assert!(memory.is_empty(), "{case}");
            assert_eq!(relays(&memory), 0, "{case}");
        }
    }
}

/// h2 keeps the end of a response that has completed while the client does not open the window of its stream. 300 ends of
/// 4,000 bytes exceed 2 MiB, half of the memory for unread data; 240 do not.
#[tokio::test(start_paused = true)]
async fn unsent_ends_of_relays_count_until_they_are_dropped() {
    const BYTES: usize = 4000;
    const EACH: usize = ANSWER_COST_BYTES + BYTES;
    const STREAMS: u32 = 60;
    const PER_CLIENT: usize = STREAMS as usize * EACH;
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {BYTES}\r\n\r\n{}", "a".repeat(BYTES));
    let limits = "maxBufferedBytes: 1MiB, maxBodyBytes: 1MiB, stallTimeout: 10s, idleTimeout: 1m";
    let memory = MemoryTest::serving(limits, RAMPED_TINY_ROUTE, answer.as_bytes(), b"");
    memory.ready();
    let reader = ask_h2(&memory, 10, 1 << 16).await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(relays(&memory), 0, "the windows take all of it");
    let mut unread = Vec::new();
    for count in 1..=5 {
        unread.push(ask_h2(&memory, STREAMS, 10).await);
        sleep(Duration::from_millis(100)).await;
        assert_eq!(relays(&memory), count * PER_CLIENT);
    }
    let completed = memory.gate.counters().ended_as(Outcome::Completed);
    assert_eq!((completed, memory.is_empty()), (10 + 5 * u64::from(STREAMS), true));

    sleep(Duration::from_millis(5500)).await;
    assert_eq!(relays(&memory), 4 * PER_CLIENT, "the one that has been behind for longest has ended");
    unread.remove(0).read_to_end(&mut Vec::new()).await.unwrap();
    sleep(Duration::from_secs(20)).await;
    assert_eq!(relays(&memory), 4 * PER_CLIENT, "there is room for the others");
    drop(unread.pop());
    settle().await;
    assert_eq!(relays(&memory), 3 * PER_CLIENT, "one is gone");
    sleep(Duration::from_secs(50)).await;
    assert_eq!(relays(&memory), 0, "idle connections end");
    drop((reader, unread));
}
