use std::{
    sync::{Arc, atomic::Ordering},
    task::Context,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::advance;

use super::*;
use crate::places::Source;

const KIB: usize = 1024;

fn kinds(memory: &Memory) -> [usize; 3] {
    let [body, unfinished_body, _, _, answer, ..] = memory.kinds().map(|(_, bytes)| bytes);
    [body, unfinished_body, answer]
}

fn source(number: u8) -> Owner {
    Owner { source: Source::of([192, 0, 2, number].into()), route: 0 }
}

/// Creates an unfinished body of `kib` KiB.
fn arriving(memory: &Arc<Memory>, number: u8, kib: usize) -> Share {
    arriving_for(memory, source(number), kib)
}

fn arriving_for(memory: &Arc<Memory>, owner: Owner, kib: usize) -> Share {
    let mut share = memory.share(owner);
    assert!(share.grow(KIB) && share.wait() && share.grow((kib - 1) * KIB));
    share
}

fn is_evicted(share: &Share) -> bool {
    share.poll_evicted(&Context::from_waker(std::task::Waker::noop())).is_ready()
}

/// Unfinished bodies may take 300 of 400 KiB.
#[tokio::test(start_paused = true)]
async fn finished_bodies_find_room_beside_unfinished_ones() {
    let memory = Memory::new(400 * KIB);
    let mut unfinished = arriving(&memory, 1, 300);
    assert!(!unfinished.grow(1));
    let mut finished = memory.share(source(1));
    assert!(finished.grow(100 * KIB) && !finished.grow(1));
    assert_eq!(kinds(&memory), [100 * KIB, 300 * KIB, 0]);
    assert!(!finished.wait(), "it is not whole, and so has no room");
    drop(finished);
    assert!(unfinished.finish());
    assert_eq!(kinds(&memory), [300 * KIB, 0, 0]);
    drop(unfinished);
    assert_eq!(kinds(&memory), [0; 3]);
    assert!(memory.arriving.lock().is_empty(), "nothing is kept of who has gone");
}

/// Eviction after 5 s without 16 KiB, and only when another body needs the memory.
#[tokio::test(start_paused = true)]
async fn stalled_body_is_evicted_progressing_one_kept() {
    let memory = Memory::new(400 * KIB);
    let [mut stalled, mut progressing] = [1, 2].map(|number| arriving(&memory, number, 100));
    advance(Duration::from_secs(4)).await;
    assert!(progressing.grow(16 * KIB) && stalled.grow(16 * KIB - 1));
    // Its source holds more than the other sources.
    let mut other = arriving(&memory, 3, 60);
    assert!(!other.grow(90 * KIB), "nothing has stalled for 5 s");
    advance(Duration::from_secs(1)).await;
    assert!(other.grow(90 * KIB));
    assert!(is_evicted(&stalled) && !is_evicted(&progressing));
    assert!(!stalled.grow(1) && !stalled.finish());
    assert!(progressing.finish() && other.finish());
    drop((stalled, progressing, other));
    assert_eq!(kinds(&memory), [0; 3]);
}

/// 16 KiB every 4 s is no stall, but for bodies of 400 KiB it is slow.
#[tokio::test(start_paused = true)]
async fn dripping_bodies_of_one_source_are_evicted() {
    let memory = Memory::new(4000 * KIB);
    let mut dripping: Vec<_> = (0..6).map(|_| arriving(&memory, 1, 400)).collect();
    for _ in 0..2 {
        assert!(!memory.share(source(1)).grow(1601 * KIB), "none of them is slow yet");
        advance(Duration::from_secs(4)).await;
        dripping.iter_mut().for_each(|share| assert!(share.grow(16 * KIB)));
    }
    // 3000 - 6 × 432 = 408 KiB are left.
    assert!(!dripping[0].grow(409 * KIB), "one that is slow takes nothing from its neighbours");
    assert!(!dripping.iter().any(is_evicted));
    let mut large = arriving(&memory, 1, 400);
    for _ in 0..6 {
        assert!(large.grow(100 * KIB));
    }
    let evicted = dripping.iter().filter(|share| is_evicted(share)).count();
    assert_eq!(evicted, 2, "408 + 2 × 432 KiB: as many as it takes");
    advance(Duration::from_secs(4)).await;
    let mut third = arriving(&memory, 1, 432);
    assert!(!is_evicted(&large));
    assert!(third.grow(864 * KIB), "{:?}", kinds(&memory));
    assert!(!is_evicted(&large), "one that has just begun stays");
    assert!(large.finish());
}

/// The bodies of the larger source are evicted, oldest first, until both sources hold the same.
#[tokio::test(start_paused = true)]
async fn sources_have_equal_shares_when_there_is_no_room() {
    let memory = Memory::new(4000 * KIB);
    let mut flood = Vec::new();
    for _ in 0..30 {
        flood.push(arriving(&memory, 1, 100));
        advance(Duration::from_millis(100)).await;
    }
    assert!(!memory.share(source(1)).grow(1001 * KIB), "it has all of its share");
    let mut large = arriving(&memory, 2, 100);
    for _ in 1..15 {
        assert!(large.grow(100 * KIB));
    }
    assert!(!large.grow(100 * KIB));
    let evicted: Vec<_> = flood.iter().map(is_evicted).collect();
    assert_eq!(evicted, [[true; 15], [false; 15]].concat());
    // The only body of a source is not evicted for a smaller source while it grows.
    let third = arriving(&memory, 3, 700);
    assert!(!is_evicted(&large) && !is_evicted(&third));
    assert!(!flood[29].grow(150 * KIB) && !is_evicted(&large), "nothing comes back");
}

/// Bodies of one source, as behind a load balancer: those of the larger route are evicted, until both routes hold
/// the same.
#[tokio::test(start_paused = true)]
async fn routes_of_a_source_have_equal_shares() {
    let memory = Memory::new(4000 * KIB);
    let owner = |route| Owner { route, ..source(1) };
    let flood: Vec<_> = (0..30).map(|_| arriving_for(&memory, owner(1), 100)).collect();
    let other = arriving(&memory, 2, 1);
    assert!(!is_evicted(&other));
    assert!(!memory.share(owner(1)).grow(1100 * KIB), "the route has all of its share");
    let mut large = arriving_for(&memory, owner(2), 100);
    for _ in 1..14 {
        assert!(large.grow(100 * KIB), "{:?}", kinds(&memory));
    }
    assert!(!large.grow(100 * KIB));
    assert_eq!(flood.iter().filter(|share| !is_evicted(share)).count(), 15);
    assert!(!is_evicted(&other), "its source holds less");
    assert!(!arriving_for(&memory, owner(1), 1).grow(150 * KIB) && !is_evicted(&large), "nothing comes back");
}

/// A newcomer of a larger source does not evict a slow body unless that body is stalled.
#[tokio::test(start_paused = true)]
async fn slow_body_is_evicted_for_smaller_sources_only() {
    let memory = Memory::new(4000 * KIB);
    let mut slow = arriving(&memory, 1, 400);
    advance(Duration::from_secs(4)).await;
    let mut other = arriving(&memory, 2, 2500);
    assert!(slow.grow(16 * KIB));
    advance(Duration::from_secs(1)).await;
    assert!(!other.grow(100 * KIB) && !is_evicted(&slow));
    // The scan for the larger source does not apply to a smaller one.
    let _third = arriving(&memory, 3, 200);
    assert!(is_evicted(&slow) && !is_evicted(&other));
}

/// Parts of streamed bodies may take 100 of 400 KiB, until one of the bodies is buffered.
#[tokio::test(start_paused = true)]
async fn kept_parts_leave_room_for_bodies() {
    let memory = Memory::new(400 * KIB);
    let mut kept = memory.kept_share(source(1));
    assert!(kept.grow(100 * KIB) && !kept.grow(1));
    let body = arriving(&memory, 1, 100);
    assert!(kept.wait() && kept.grow(100 * KIB) && !kept.grow(1));
    let mut other = memory.kept_share(source(1));
    assert!(!other.grow(1));
    drop(body);
    assert!(other.grow(100 * KIB));
    drop((kept, other));
    assert_eq!((kinds(&memory), memory.kept.load(Ordering::Relaxed)), ([0; 3], 0));
}

#[test]
fn responses_count_until_bytes_are_dropped() {
    let memory = Memory::new(8 * 100 * KIB);
    let answer = memory.answer(Bytes::from(vec![0; 10 * KIB]), false).unwrap();
    assert_eq!(kinds(&memory), [0, 0, 14 * KIB]);
    let sent = answer.slice(5..);
    drop(answer);
    assert_eq!(kinds(&memory), [0, 0, 14 * KIB], "a part of it is in a send buffer");
    drop(sent);
    let shared = Bytes::from(vec![0; 1000 * KIB]);
    let answers: Vec<_> = (0..25).map(|_| memory.answer(shared.clone(), false).unwrap()).collect();
    assert!(memory.answer(Bytes::from_static(b"x"), false).is_err(), "25 × 4 KiB of 100 KiB");
    assert!(memory.answer(Bytes::from_static(b"x"), true).is_ok());
    assert!(memory.is_short_of_answers());
    drop(answers);
    assert_eq!(kinds(&memory), [0; 3]);
}
