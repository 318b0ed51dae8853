//! Cost of a request before admission: route lookup and extraction of the model from the body.
//!
//! `cargo bench --bench hot_path`

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    domain::{Policy, Route},
    openai::{scan_json, scan_multipart},
    proxy::{RequestModel, RouteTable},
};
use bytes::Bytes;
use divan::{Bencher, black_box, counter::BytesCount};
use futures_util::FutureExt;
use http::HeaderMap;
use serde_json::{Value, json};

fn main() {
    divan::main();
}

/// Lookup of the middle route, with one route per model.
#[divan::bench(args = [1, 100, 10_000])]
fn route_match(bencher: Bencher<'_, '_>, routes: usize) {
    find(
        bencher,
        "localhost:8080",
        (0..routes).map(|number| json!({ "models": [format!("model-{number}")] })),
    );
}

/// Lookup of the middle route, with one route per host and path and a common model, like tenants.
#[divan::bench(args = [1, 100, 10_000])]
fn route_match_by_host(bencher: Bencher<'_, '_>, routes: usize) {
    let host = format!("tenant-{}.example.com", routes / 2);
    let middle = format!("model-{}", routes / 2);
    let matching = |number| json!({ "hosts": [format!("tenant-{number}.example.com")], "paths": ["/v1"], "models": [&middle] });
    find(bencher, &host, (0..routes).map(matching));
}

fn find(bencher: Bencher<'_, '_>, host: &str, matching: impl ExactSizeIterator<Item = Value>) {
    // Gates need a tokio runtime for their clock.
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _entered = runtime.enter();
    let cold_starts = ColdStarts::new(|_| {});
    let model = format!("model-{}", matching.len() / 2);
    let table = RouteTable::new(matching.enumerate().map(|(number, matching)| {
        let route: Route = serde_json::from_value(json!({
            "name": format!("route-{number}"), "match": matching, "target": { "url": "http://127.0.0.1:1" },
        }))
        .expect("a route");
        let gate = Gate::new(route.name.clone(), Policy::default(), cold_starts.clone());
        (route, gate)
    }));
    let headers = HeaderMap::new();
    bencher.bench_local(|| {
        let model = RequestModel::Read(Some(black_box(&model)));
        let found = table.find(black_box(host), black_box("/v1/chat/completions"), &headers, model);
        black_box(found);
    });
}

/// A body with `model` at its end, so that the scan reads all of it.
#[divan::bench(args = [2 << 10, 200 << 10, 8 << 20])]
fn model_scan(bencher: Bencher<'_, '_>, bytes: usize) {
    scan(bencher, json!([{ "role": "user", "content": "lorem ipsum ".repeat(bytes / 12) }]));
}

/// The worst case: a token every few bytes instead of long strings.
#[divan::bench(args = [2 << 10, 200 << 10, 8 << 20])]
fn model_scan_of_tokens(bencher: Bencher<'_, '_>, bytes: usize) {
    scan(bencher, vec![json!({ "a": [1, -2.5e3, null], "b\n": "\u{1}" }); bytes / 37].into());
}

fn scan(bencher: Bencher<'_, '_>, messages: Value) {
    let mut body = json!({ "messages": messages, "stream": true }).to_string();
    body.truncate(body.len() - 1);
    body.push_str(r#","model":"tiny"}"#);
    bencher
        .counter(BytesCount::of_slice(body.as_bytes()))
        .bench_local(|| scan_json(black_box(body.as_bytes())).expect("JSON"));
}

/// A form with its file before `model`.
#[divan::bench(args = [200 << 10, 8 << 20])]
fn form_scan(bencher: Bencher<'_, '_>, bytes: usize) {
    let part = "--b\r\nContent-Disposition: form-data; name=\"";
    let mut form = format!("{part}file\"; filename=\"a.wav\"\r\n\r\n").into_bytes();
    form.extend((0..bytes).map(|place| (place * 31) as u8));
    form.extend(format!("\r\n{part}model\"\r\n\r\nwhisper\r\n--b--\r\n").into_bytes());
    let form = Bytes::from(form);
    bencher.counter(BytesCount::of_slice(&form)).bench_local(|| {
        scan_multipart(form.clone(), "b").now_or_never().expect("all is there").expect("a form")
    });
}
