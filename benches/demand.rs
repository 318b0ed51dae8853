//! Cost of demand tracking per request and of the metric for KEDA, also with several threads on one route.
//!
//! `cargo bench --bench demand`

use std::sync::Arc;

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    demand::{Capacity, Demand, queue_depth},
    domain::Policy,
    state::Endpoint,
};
use divan::{Bencher, black_box};

fn main() {
    divan::main();
}

fn warm_gate() -> Arc<Gate> {
    let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
    let endpoint = Endpoint::new("127.0.0.1:1", u32::MAX);
    gate.target().add(&endpoint);
    gate.target().ready(&endpoint, None);
    gate
}

/// Demand updates of a warm request: one at its start, one at its end.
#[divan::bench(threads = [1, 2, 4, 8])]
fn update(bencher: Bencher<'_, '_>) {
    let demand = Demand::default();
    bencher.bench(|| {
        demand.record_activity();
        demand.notify_if_idle();
    });
}

/// Admission and release of a warm request, including demand.
#[divan::bench(threads = [1, 2, 4, 8])]
fn enter_and_leave(bencher: Bencher<'_, '_>) {
    let gate = warm_gate();
    bencher.bench(|| drop(black_box(gate.enter())));
}

/// Admission and release of a request that is held at zero and disconnects, including demand.
#[divan::bench(threads = [1, 2, 4, 8])]
fn hold_and_leave(bencher: Bencher<'_, '_>) {
    let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
    bencher.bench(|| drop(black_box(gate.hold(2048, true).expect("room"))));
}

/// One read of the metric for KEDA, with several threads.
#[divan::bench(threads = [1, 2, 4, 8])]
fn value(bencher: Bencher<'_, '_>) {
    let gate = warm_gate();
    bencher.bench(|| {
        drop(black_box(gate.enter()));
        queue_depth(&gate.counts_everywhere(), Capacity::from(&**gate.policy()))
    });
}
