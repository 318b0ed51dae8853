//! Demand: what it costs a request to be counted, and KEDA to be told, also with several threads at the same route.
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

/// What demand costs a warm request: once when it comes, once when it goes.
#[divan::bench(threads = [1, 2, 4, 8])]
fn update(bencher: Bencher<'_, '_>) {
    let demand = Demand::default();
    bencher.bench(|| {
        demand.touch();
        demand.rise();
    });
}

/// A warm request from its admission to its end, demand included.
#[divan::bench(threads = [1, 2, 4, 8])]
fn enter_and_leave(bencher: Bencher<'_, '_>) {
    let gate = warm_gate();
    bencher.bench(|| drop(black_box(gate.enter())));
}

/// The same of one that is held while nothing is up, and hangs up.
#[divan::bench(threads = [1, 2, 4, 8])]
fn hold_and_leave(bencher: Bencher<'_, '_>) {
    let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
    bencher.bench(|| drop(black_box(gate.hold(2048, true).expect("room"))));
}

/// What KEDA is told, once, while so many threads ask or serve.
#[divan::bench(threads = [1, 2, 4, 8])]
fn value(bencher: Bencher<'_, '_>) {
    let gate = warm_gate();
    bencher.bench(|| {
        drop(black_box(gate.enter()));
        queue_depth(&gate.counts_everywhere(), Capacity::from(&**gate.policy()))
    });
}
