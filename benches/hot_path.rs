//! What every request pays for: finding its route, finding the model in its body, joining and leaving the queue.
//!
//! `cargo bench --bench hot_path`

use std::sync::Arc;

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    demand::{Capacity, Demand, queue_depth},
    domain::{Policy, Route},
    hold::{Bounds, HoldQueue, Ticket},
    openai::scan_json,
    proxy::{Model, RouteTable},
    state::Endpoint,
};
use divan::{Bencher, black_box, counter::BytesCount};
use http::HeaderMap;

const UNBOUNDED: Bounds = Bounds { requests: usize::MAX, bytes: usize::MAX };

fn main() {
    divan::main();
}

/// One route a model; the request is for the one in the middle.
#[divan::bench(args = [1, 100, 10_000])]
fn route_match(bencher: Bencher<'_, '_>, routes: usize) {
    // The gates' clock is tokio's.
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _entered = runtime.enter();
    let cold_starts = ColdStarts::new(|_| {});
    let table = RouteTable::new((0..routes).map(|number| {
        let route: Route = serde_json::from_value(serde_json::json!({
            "name": format!("route-{number}"),
            "match": { "models": [format!("model-{number}")] },
            "target": { "url": "http://127.0.0.1:1" },
        }))
        .expect("a route");
        let gate = Gate::new(route.name.clone(), Policy::default(), cold_starts.clone());
        (route, gate)
    }));
    let (model, headers) = (format!("model-{}", routes / 2), HeaderMap::new());
    bencher.bench_local(|| {
        let found = table.find(
            black_box("localhost:8080"),
            black_box("/v1/chat/completions"),
            &headers,
            Model::Read(Some(black_box(&model))),
        );
        black_box(found);
    });
}

/// A body of about so many bytes with `model` at its end: the scan reads all of it.
#[divan::bench(args = [2 << 10, 200 << 10, 8 << 20])]
fn model_scan(bencher: Bencher<'_, '_>, bytes: usize) {
    let body = serde_json::json!({
        "messages": [{ "role": "user", "content": "lorem ipsum ".repeat(bytes / 12) }],
        "stream": true,
    });
    let mut body = body.to_string();
    body.truncate(body.len() - 1);
    body.push_str(r#","model":"tiny"}"#);
    bencher
        .counter(BytesCount::of_slice(body.as_bytes()))
        .bench_local(|| scan_json(black_box(body.as_bytes())));
}

/// With so many waiting already.
#[divan::bench(args = [0, 100_000])]
fn join_and_leave(bencher: Bencher<'_, '_>, waiting: usize) {
    let queue: Arc<HoldQueue<()>> = Arc::default();
    let join = || queue.join(2048, UNBOUNDED).expect("no bounds");
    let held: Vec<Ticket<()>> = (0..waiting).map(|_| join()).collect();
    bencher.bench_local(|| drop(black_box(join())));
    drop(held);
}

/// What demand costs a warm request: once when it comes, once when it goes. Alone, and with another core at the same
/// route.
#[divan::bench(threads = [1, 2])]
fn demand(bencher: Bencher<'_, '_>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _entered = runtime.enter();
    let demand = Demand::default();
    bencher.bench(|| {
        demand.touch();
        demand.rise();
    });
}

/// A warm request from its admission to its end, demand included.
#[divan::bench(threads = [1, 2])]
fn enter_and_leave(bencher: Bencher<'_, '_>) {
    let gate = warm_gate();
    bencher.bench(|| drop(black_box(gate.enter())));
}

/// What KEDA is told, once.
#[divan::bench]
fn value(bencher: Bencher<'_, '_>) {
    let gate = warm_gate();
    bencher.bench(|| queue_depth(&gate.counts_everywhere(), Capacity::from(&**gate.policy())));
}

fn warm_gate() -> Arc<Gate> {
    let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
    let endpoint = Endpoint::new("127.0.0.1:1", u32::MAX);
    gate.target().add(&endpoint);
    gate.target().ready(&endpoint, None);
    gate
}

/// All of them, in their order.
#[divan::bench(args = [100_000], sample_count = 10)]
fn release(bencher: Bencher<'_, '_>, waiting: usize) {
    bencher
        .with_inputs(|| {
            let queue: Arc<HoldQueue<()>> = Arc::default();
            let held: Vec<_> =
                (0..waiting).map(|_| queue.join(2048, UNBOUNDED).expect("no bounds")).collect();
            (queue, held)
        })
        .bench_local_values(|(queue, held)| {
            assert_eq!(queue.release(|| Some(())), waiting);
            (queue, held)
        });
}
