//! Handshakes between threads, run by loom in every order that the memory model allows.
//!
//! Compiles the types that need a memory order a second time, with the atomics and the mutex of [`sync`]. Each model is
//! also run with weaker orders and must fail then: it would notice.

#![allow(unused, reason = "the models use only a part of the types")]
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

#[path = "../src/hold.rs"]
mod hold;
#[path = "../src/demand/idle.rs"]
mod idle;
#[path = "../src/telemetry/pulse.rs"]
mod pulse;
#[path = "../src/admission/quiet.rs"]
mod quiet;
#[path = "../src/state/slots.rs"]
mod slots;
#[path = "models/sync.rs"]
mod sync;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use anteroom::domain;
use futures_util::FutureExt as _;
use hold::{Bounds, HoldQueue};
use idle::IdleFlag;
use loom::thread::spawn;
use pulse::Pulse;
use quiet::QuietRequests;
use slots::Slots;
use sync::{Orders, atomic::AtomicU32};

/// Two threads and an invariant, which the model returns, with orders that are too weak for it.
type Handshake = (&'static str, Orders, fn() -> bool);

const HANDSHAKES: [Handshake; 8] = [
    ("free slot goes to the waiter", Orders::AcquireRelease, free_slot_goes_to_the_waiter),
    ("dispatched request is held or in flight", Orders::Relaxed, dispatched_request_is_held_or_in_flight),
    ("held request or its target is seen", Orders::AcquireRelease, held_request_or_its_target_is_seen),
    ("retired endpoint is vacant or refuses", Orders::AcquireRelease, retired_endpoint_is_vacant_or_refuses),
    ("last response wakes the owner", Orders::AcquireRelease, last_response_wakes_the_owner),
    ("first request is seen or an edge", Orders::AcquireRelease, first_request_is_seen_or_an_edge),
    ("quiet request hides no other", Orders::Relaxed, quiet_request_hides_no_other),
    ("change is rendered or pending", Orders::Relaxed, change_is_rendered_or_pending),
];

fn main() {
    for (name, too_weak, model) in HANDSHAKES {
        for orders in [Orders::FenceBefore, Orders::FenceAfter] {
            assert_eq!(violations(orders, model), 0, "{name}: {orders:?}");
        }
        assert!(violations(too_weak, model) > 0, "{name}: not even {too_weak:?} makes the model fail");
        println!("{name}: ok");
    }
}

/// Returns the number of executions in which the invariant does not hold.
fn violations(orders: Orders, model: fn() -> bool) -> usize {
    orders.apply();
    let violations = Arc::new(AtomicUsize::new(0));
    let counted = violations.clone();
    loom::model(move || _ = counted.fetch_add(usize::from(!model()), Ordering::Relaxed));
    violations.load(Ordering::Relaxed)
}

/// Runs two threads to their ends.
fn both<A: 'static, B>(one: impl FnOnce() -> A + 'static, other: impl FnOnce() -> B) -> (A, B) {
    let one = spawn(one);
    let other = other();
    (one.join().unwrap(), other)
}

/// Returns a ready endpoint.
fn endpoint(in_flight: u32) -> Arc<Slots> {
    let slots = Arc::new(Slots::default());
    slots.open();
    assert!((0..in_flight).all(|_| slots.acquire(|| in_flight)));
    slots
}

fn join(queue: &Arc<HoldQueue<()>>) -> hold::Ticket<()> {
    queue.join(1, Bounds { requests: 1, bytes: 1 }).unwrap()
}

/// Releases waiters to an endpoint with one slot, as the gate does.
fn pump(queue: &HoldQueue<()>, slots: &Slots) {
    queue.release(|| slots.acquire(|| 1).then_some(()));
}

fn free_slot_goes_to_the_waiter() -> bool {
    let (queue, slots) = (Arc::<HoldQueue<()>>::default(), endpoint(1));
    let (arrival, free) = (queue.clone(), slots.clone());
    let arrives = move || {
        let ticket = join(&arrival);
        pump(&arrival, &free);
        ticket
    };
    let ends = || {
        slots.release();
        pump(&queue, &slots);
    };
    let (mut ticket, ()) = both(arrives, ends);
    ticket.released().now_or_never().is_some()
}

fn dispatched_request_is_held_or_in_flight() -> bool {
    let (queue, slots) = (Arc::<HoldQueue<()>>::default(), endpoint(0));
    let _ticket = join(&queue);
    let (held, in_flight) = (queue.clone(), slots.clone());
    // The reader is the spawned thread: loom finds stale reads of the main thread only in part.
    let reads = move || held.len() + in_flight.in_flight() as usize;
    both(reads, || pump(&queue, &slots)).0 > 0
}

fn held_request_or_its_target_is_seen() -> bool {
    let (queue, slots) = (Arc::<HoldQueue<()>>::default(), endpoint(0));
    let (arrival, known) = (queue.clone(), slots.clone());
    let retires = || {
        slots.close();
        !queue.is_empty()
    };
    let ((_ticket, is_up), is_seen) = both(move || (join(&arrival), known.is_open()), retires);
    // A request that finds no open endpoint starts the target itself; any other one must be seen.
    !is_up || is_seen
}

/// Closes an endpoint, and returns true if nothing is in flight; otherwise, its owner waits for a notification.
fn retire(slots: &Slots) -> bool {
    slots.close();
    slots.in_flight() == 0
}

fn retired_endpoint_is_vacant_or_refuses() -> bool {
    let slots = endpoint(0);
    let wanted = slots.clone();
    let (is_taken, is_vacant) = both(move || wanted.acquire(|| 1), || retire(&slots));
    // A refused request may have been counted briefly; the owner is notified then.
    if is_taken { !is_vacant } else { is_vacant || slots.attention().now_or_never().is_some() }
}

fn last_response_wakes_the_owner() -> bool {
    let slots = endpoint(1);
    let busy = slots.clone();
    let ((), is_vacant) = both(move || busy.release(), || retire(&slots));
    is_vacant || slots.attention().now_or_never().is_some()
}

fn first_request_is_seen_or_an_edge() -> bool {
    let (idle, slots) = (Arc::new(IdleFlag::new(false)), endpoint(0));
    let edges = Arc::new(AtomicUsize::new(0));
    let publish = |edges: &AtomicUsize| _ = edges.fetch_add(1, Ordering::Relaxed);
    let (flag, free, published) = (idle.clone(), slots.clone(), edges.clone());
    let arrives = move || {
        if free.acquire(|| 1) && flag.clear() {
            publish(&published);
        }
    };
    let reads = || idle.observe(|| slots.in_flight(), |in_flight| *in_flight > 0, || publish(&edges));
    let ((), seen) = both(arrives, reads);
    match edges.load(Ordering::Relaxed) {
        0 => seen > 0,
        edges => edges == 1,
    }
}

fn quiet_request_hides_no_other() -> bool {
    let (quiet, slots) = (Arc::new(QuietRequests::default()), endpoint(1));
    let (counted, free) = (quiet.clone(), slots.clone());
    let comes_and_goes = move || {
        free.acquire(|| 2);
        counted.begin();
        counted.end();
        free.release();
    };
    both(comes_and_goes, || quiet.subtract_from(|| slots.in_flight().into())).1 > 0
}

fn change_is_rendered_or_pending() -> bool {
    let (pulse, state) = (Arc::new(Pulse::default()), Arc::new(AtomicU32::new(0)));
    pulse.watch(true);
    // The notification of an earlier change is still pending.
    pulse.notify_change();
    let (changed, new) = (pulse.clone(), state.clone());
    let changes = move || {
        new.store(1, Ordering::Relaxed);
        changed.notify_change();
    };
    let renders = || {
        pulse.clear_pending();
        state.load(Ordering::Relaxed)
    };
    let ((), rendered) = both(changes, renders);
    rendered == 1 || pulse.await_change().now_or_never().is_some()
}
