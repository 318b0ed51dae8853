//! The queue of held requests: everything that happens to one of them, with many others waiting.
//!
//! `cargo bench --bench queue`

use std::{sync::Arc, time::Duration};

use anteroom::hold::{Bounds, HoldQueue, Ticket};
use divan::{Bencher, black_box};
use tokio::runtime::{Builder, Runtime};

const UNBOUNDED: Bounds = Bounds { requests: usize::MAX, bytes: usize::MAX };

/// That the cost does not depend on how many there are shows in a tenth of them.
const WAITING: [usize; 3] = [0, 10_000, 100_000];

fn main() {
    divan::main();
}

type Queue = Arc<HoldQueue<()>>;

fn join(queue: &Queue) -> Ticket<()> {
    queue.join(2048, UNBOUNDED).expect("no bounds")
}

fn filled(waiting: usize) -> (Queue, Vec<Ticket<()>>) {
    let queue = Queue::default();
    let held = (0..waiting).map(|_| join(&queue)).collect();
    (queue, held)
}

/// One comes and goes at once.
#[divan::bench(args = WAITING)]
fn join_and_leave(bencher: Bencher<'_, '_>, waiting: usize) {
    let (queue, _held) = filled(waiting);
    bencher.bench_local(|| drop(black_box(join(&queue))));
}

/// One comes.
#[divan::bench(args = WAITING)]
fn push(bencher: Bencher<'_, '_>, waiting: usize) {
    let (queue, _held) = filled(waiting);
    // What is returned is dropped outside of what is measured.
    bencher.bench_local(|| join(&queue));
}

/// The first one is let go.
#[divan::bench(args = WAITING)]
fn pop(bencher: Bencher<'_, '_>, waiting: usize) {
    let (queue, _held) = filled(waiting);
    bencher.with_inputs(|| join(&queue)).bench_local_values(|ticket| {
        let mut permit = Some(());
        assert_eq!(queue.release(|| permit.take()), 1);
        ticket
    });
}

/// One from anywhere in the middle hangs up.
#[divan::bench(args = [10_000, 100_000])]
fn cancel(bencher: Bencher<'_, '_>, waiting: usize) {
    let (queue, mut held) = filled(waiting);
    bencher
        .with_inputs(|| {
            let place = fastrand::usize(..held.len());
            std::mem::replace(&mut held[place], join(&queue))
        })
        .bench_local_values(drop);
}

/// One from the front comes back after its dispatch failed.
#[divan::bench(args = WAITING)]
fn come_back(bencher: Bencher<'_, '_>, waiting: usize) {
    let queue = Queue::default();
    let first = join(&queue);
    let place = first.place();
    drop(first);
    let _held: Vec<_> = (0..waiting).map(|_| join(&queue)).collect();
    bencher.bench_local(|| drop(black_box(queue.rejoin(place, 2048))));
}

/// Where one stands, for its heartbeat.
#[divan::bench(args = WAITING)]
fn position(bencher: Bencher<'_, '_>, waiting: usize) {
    let (_, _entered) = paused();
    let (queue, held) = filled(waiting);
    let spot = held.get(waiting / 2).map_or_else(|| join(&queue).spot(), Ticket::spot);
    bencher.bench_local(|| spot.ahead());
}

/// The same of the first one that asks in a second, which looks at the whole queue.
#[divan::bench(args = WAITING)]
fn position_first(bencher: Bencher<'_, '_>, waiting: usize) {
    let (runtime, _entered) = paused();
    let (queue, held) = filled(waiting);
    let spot = held.get(waiting / 2).map_or_else(|| join(&queue).spot(), Ticket::spot);
    bencher
        .with_inputs(|| runtime.block_on(tokio::time::advance(Duration::from_secs(2))))
        .bench_local_values(|()| spot.ahead());
}

/// A runtime whose clock stands still.
fn paused() -> (&'static Runtime, tokio::runtime::EnterGuard<'static>) {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    // As long as the benchmark, which is a process of its own.
    let runtime: &'static Runtime = Box::leak(Box::new(runtime));
    (runtime, runtime.enter())
}

/// All of them, in their order.
#[divan::bench(args = [100_000], sample_count = 10)]
fn release(bencher: Bencher<'_, '_>, waiting: usize) {
    bencher.with_inputs(|| filled(waiting)).bench_local_values(|(queue, held)| {
        assert_eq!(queue.release(|| Some(())), waiting);
        (queue, held)
    });
}

/// All clients hang up, in any order.
#[divan::bench(args = [100_000], sample_count = 10)]
fn storm(bencher: Bencher<'_, '_>, waiting: usize) {
    bencher
        .with_inputs(|| {
            let (queue, mut held) = filled(waiting);
            fastrand::shuffle(&mut held);
            (queue, held)
        })
        .bench_local_values(|(queue, held)| {
            drop(held);
            assert!(queue.is_empty());
        });
}

/// One comes and goes, with so many cores at the same queue.
#[divan::bench(threads = [1, 2, 4, 8])]
fn contended(bencher: Bencher<'_, '_>) {
    let (queue, _held) = filled(100_000);
    bencher.bench(|| drop(black_box(join(&queue))));
}
