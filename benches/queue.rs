//! Operations of the hold queue, with many requests waiting.
//!
//! `cargo bench --bench queue`

use std::{sync::Arc, time::Duration};

use anteroom::hold::{Bounds, HoldQueue, Ticket};
use divan::{Bencher, black_box};
use tokio::runtime::{Builder, Runtime};

const UNBOUNDED: Bounds = Bounds { requests: usize::MAX, bytes: usize::MAX };

/// Numbers of waiting requests. Equal costs for the last two show O(1).
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

/// A request joins and leaves immediately.
#[divan::bench(args = WAITING)]
fn join_and_leave(bencher: Bencher<'_, '_>, waiting: usize) {
    let (queue, _held) = filled(waiting);
    bencher.bench_local(|| drop(black_box(join(&queue))));
}

/// A request joins.
#[divan::bench(args = WAITING)]
fn push(bencher: Bencher<'_, '_>, waiting: usize) {
    let (queue, _held) = filled(waiting);
    // The returned value is dropped outside of the measurement.
    bencher.bench_local(|| join(&queue));
}

/// The first request is released.
#[divan::bench(args = WAITING)]
fn pop(bencher: Bencher<'_, '_>, waiting: usize) {
    let (queue, _held) = filled(waiting);
    bencher.with_inputs(|| join(&queue)).bench_local_values(|ticket| {
        let mut permit = Some(());
        assert_eq!(queue.release(|| permit.take()), 1);
        ticket
    });
}

/// A random request leaves.
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

/// A request returns to the front after a failed dispatch.
#[divan::bench(args = WAITING)]
fn requeue(bencher: Bencher<'_, '_>, waiting: usize) {
    let queue = Queue::default();
    let first = join(&queue);
    let place = first.place();
    drop(first);
    let _held: Vec<_> = (0..waiting).map(|_| join(&queue)).collect();
    bencher.bench_local(|| drop(black_box(queue.rejoin(place, 2048))));
}

/// Position of a request, for its heartbeat.
#[divan::bench(args = WAITING)]
fn position(bencher: Bencher<'_, '_>, waiting: usize) {
    let (_, _entered) = paused();
    let (queue, held) = filled(waiting);
    let spot = held.get(waiting / 2).map_or_else(|| join(&queue).position_handle(), Ticket::position_handle);
    bencher.bench_local(|| spot.ahead());
}

/// Position of a request in the first query of a second, which scans the whole queue.
#[divan::bench(args = WAITING)]
fn position_first(bencher: Bencher<'_, '_>, waiting: usize) {
    let (runtime, _entered) = paused();
    let (queue, held) = filled(waiting);
    let spot = held.get(waiting / 2).map_or_else(|| join(&queue).position_handle(), Ticket::position_handle);
    bencher
        .with_inputs(|| runtime.block_on(tokio::time::advance(Duration::from_secs(2))))
        .bench_local_values(|()| spot.ahead());
}

/// Creates a runtime with a paused clock.
fn paused() -> (&'static Runtime, tokio::runtime::EnterGuard<'static>) {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    // Leaked, so that it lives as long as the process.
    let runtime: &'static Runtime = Box::leak(Box::new(runtime));
    (runtime, runtime.enter())
}

/// All requests are released in order.
#[divan::bench(args = [100_000], sample_count = 10)]
fn release(bencher: Bencher<'_, '_>, waiting: usize) {
    bencher.with_inputs(|| filled(waiting)).bench_local_values(|(queue, held)| {
        assert_eq!(queue.release(|| Some(())), waiting);
        (queue, held)
    });
}

/// All requests leave in random order.
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

/// A request joins and leaves, with several threads on one queue.
#[divan::bench(threads = [1, 2, 4, 8])]
fn contended(bencher: Bencher<'_, '_>) {
    let (queue, _held) = filled(100_000);
    bencher.bench(|| drop(black_box(join(&queue))));
}
