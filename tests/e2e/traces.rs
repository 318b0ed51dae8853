//! Traces: spans exported to a real OTLP collector, and the trace context sent to endpoints.

use std::collections::BTreeSet;

use anteroom::telemetry::traces::names;

use crate::support::{
    TestProxy, TestUpstream,
    collector::{Collector, ReceivedSpan},
    route, routes, until,
    upstream::{LAST, Port, STREAM, chunk},
    wire::{CHAT, chat, get, post, post_with, streaming},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACED_BODY: &str = r#"{"model":"tiny","text":"x"}"#;

/// Starts a proxy with the route `tiny` that exports traces to this collector.
async fn traced(collector: &Collector, upstream: &str, more: &str, traces: &str) -> TestProxy {
    TestProxy::start(&(collector.config(traces) + &routes(&[route("tiny", upstream, more)]))).await
}

/// Returns the attributes of a span, without those in `but`, which differ between runs.
fn attributes_except(span: &ReceivedSpan, but: &[&str]) -> Vec<(String, String)> {
    let attributes = span.attributes();
    for key in but {
        assert!(attributes.contains_key(*key), "{key} in {attributes:?}");
    }
    attributes.into_iter().filter(|(key, _)| !but.contains(&key.as_str())).collect()
}

fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut all: Vec<_> = all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_held_request_shows_its_cold_start() {
    let collector = Collector::grpc().await;
    let mut upstream = TestUpstream::cold().await;
    let settings = "serviceName: waiting-room, headers: { authorization: Bearer x }";
    let proxy = traced(&collector, &upstream.url(), "", settings).await;
    let fields = [
        ("traceparent", PARENT),
        ("tracestate", "a=1"),
        ("tracestate", "b=2"),
        ("User-Agent", "test/1"),
        ("X-Request-Id", "mine"),
        ("X-Forwarded-For", "198.51.100.7, 10.0.0.1"),
        ("X-Forwarded-Proto", "https"),
    ];
    let mut client = proxy.sent(post_with(&format!("{CHAT}?key=secret"), &fields, TRACED_BODY)).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    let call = upstream.call().await;
    let told = call.head.clone();
    call.echo().await;
    assert_eq!(client.response().await.status(), 200);
    let record = proxy.admin("/api/v1/cold-starts").await.json()["cold_starts"][0].clone();
    proxy.stop(&[("completed", 1)]).await;

    assert_eq!(collector.services(), ["waiting-room"]);
    assert_eq!(collector.headers()[0]["authorization"], "Bearer x");
    let trace = collector.only_trace();
    trace.is_whole();
    let server = trace.server();
    assert_eq!((server.trace_id().as_str(), server.parent().as_str()), (TRACE, "b7ad6b7169203331"));
    assert_eq!(server.0.trace_state, "a=1,b=2");
    assert_eq!(server.name(), "POST /v1/chat/completions");
    let expected = pairs(&[
        ("http.request.method", "POST"),
        ("http.route", CHAT),
        ("http.response.status_code", "200"),
        ("url.path", CHAT),
        ("url.scheme", "https"),
        ("server.address", "api.test"),
        ("client.address", "198.51.100.7"),
        ("network.peer.address", "127.0.0.1"),
        ("network.protocol.version", "1.1"),
        ("user_agent.original", "test/1"),
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.provider.name", "openai"),
        ("gen_ai.request.model", "tiny"),
        ("anteroom.route", "tiny"),
        ("anteroom.outcome", "completed"),
        ("anteroom.request_id", "mine"),
        ("anteroom.cold_start", "true"),
    ]);
    assert_eq!(attributes_except(server, &["network.peer.port"]), expected);
    assert!(!server.is_error() && server.events().is_empty());

    // Checks the span of the hold and those of its phases.
    let [hold] = trace.holds()[..] else { panic!("{trace:#?}") };
    assert_eq!(hold.parent(), server.id());
    assert_eq!(hold.get(names::COLD_START_ID), record["id"].to_string());
    let phases = trace.within(hold);
    let shown: Vec<_> = phases.iter().map(|phase| phase.name()).collect();
    assert_eq!(shown, ["cold_start.signal", "cold_start.load", "cold_start.dispatch"]);
    for pair in phases.windows(2) {
        assert_eq!(pair[0].times().1, pair[1].times().0, "without a gap");
    }
    // The phases start and end with the hold, except for the time between two lines of code.
    let sum: u64 = phases.iter().map(|phase| phase.nanoseconds()).sum();
    assert!(sum <= hold.nanoseconds(), "{sum} of {}", hold.nanoseconds());
    let recorded: f64 = record["phases"]
        .as_array()
        .unwrap()
        .iter()
        .take(3)
        .map(|phase| phase["duration_ms"].as_f64().unwrap())
        .sum();
    assert!(sum as f64 <= recorded * 1e6 + 1e3, "{sum} of {recorded} ms");

    // Checks the span of the attempt at the endpoint.
    let [attempt] = trace.attempts()[..] else { panic!("{trace:#?}") };
    let traceparent = format!("00-{TRACE}-{}-01", attempt.id());
    assert_eq!(
        told.get("traceparent"),
        Some(&*traceparent),
        "the endpoint's own spans belong to the attempt"
    );
    assert_eq!(told.all("tracestate"), ["a=1", "b=2"]);
    assert_eq!((attempt.name(), attempt.parent()), ("POST", server.id()));
    assert!(attempt.times().0 >= hold.times().1, "first it waits, then it is sent");
    let expected = pairs(&[
        ("http.request.method", "POST"),
        ("http.response.status_code", "200"),
        ("url.full", &format!("{}{CHAT}", upstream.url())),
        ("server.address", "127.0.0.1"),
        ("server.port", &upstream.address.port().to_string()),
        ("network.protocol.version", "1.1"),
    ]);
    assert_eq!(attributes_except(attempt, &[]), expected);
    assert_eq!(attempt.events(), [names::FIRST_BYTE]);
    assert_eq!(trace.within(server).len(), 2);
}

#[tokio::test]
async fn every_attempt_is_a_span_of_its_own() {
    let collector = Collector::http().await;
    let mut upstream = TestUpstream::cold().await;
    let proxy = traced(&collector, &upstream.url(), "", "protocol: http").await;
    let mut client = proxy.sent(chat("x")).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    let mut told = Vec::new();
    let mut call = upstream.call().await;
    told.push(call.head.get("traceparent").unwrap().to_owned());
    call.body().await;
    call.reset();
    let call = upstream.call().await;
    told.push(call.head.get("traceparent").unwrap().to_owned());
    call.echo().await;
    client.response().await;
    proxy.stop(&[("completed", 1)]).await;

    assert_eq!(collector.services(), ["anteroom"]);
    let trace = collector.only_trace();
    trace.is_whole();
    let server = trace.server();
    assert_eq!((server.parent().as_str(), server.get(names::OUTCOME).as_str()), ("", "completed"));
    assert_eq!(server.events(), [names::HELD_AGAIN]);
    assert_eq!(trace.holds().len(), 2, "it was held until it was ready, and again");
    let [first, second] = trace.attempts()[..] else { panic!("{trace:#?}") };
    for (attempt, told) in [first, second].into_iter().zip(told) {
        assert_eq!(told, format!("00-{}-{}-01", attempt.trace_id(), attempt.id()));
    }
    assert_eq!((first.get(names::ERROR_TYPE).as_str(), first.is_error()), ("reset", true));
    assert_eq!(first.get(names::RESEND_COUNT), "");
    assert_eq!((second.get(names::RESEND_COUNT).as_str(), second.is_error()), ("1", false));
}

#[tokio::test]
async fn a_stream_is_one_attempt_until_its_last_byte() {
    let collector = Collector::grpc().await;
    let mut upstream = TestUpstream::warm().await;
    let proxy = traced(&collector, &upstream.url(), "match: { models: [tiny, other] }", "").await;
    let mut client = proxy.client().await;
    // The first request is held until the target is known to be up; the test is about the second.
    client.send(chat("x")).await;
    upstream.call().await.echo().await;
    client.response().await;
    client.send(streaming("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    assert_eq!(client.head().await.unwrap().status(), 200);
    call.send(chunk("data: {}\n\n")).await;
    client.parts_until("data: {}").await;
    call.finish(chunk("data: [DONE]\n\n") + LAST).await;
    client.rest().await.expect("all of it");
    proxy.stop(&[("completed", 2)]).await;

    let spans = collector.spans();
    let streamed = |span: &&ReceivedSpan| span.get(names::STREAM) == "true";
    let server = spans.iter().find(streamed).expect("the one that streams");
    assert_eq!(server.get(names::COLD_START), "false");
    let trace = collector.trace(&server.trace_id());
    trace.is_whole();
    assert!(trace.holds().is_empty());
    let [attempt] = trace.attempts()[..] else { panic!("{trace:#?}") };
    let first_byte = attempt.0.events[0].time_unix_nano;
    assert!(attempt.times().0 <= first_byte && first_byte < attempt.times().1);
}

#[tokio::test]
async fn cold_stream_records_its_first_token() {
    let collector = Collector::grpc().await;
    let mut upstream = TestUpstream::cold().await;
    let more = "keepalive: { mode: comment, after: 10ms, interval: 10ms }";
    let proxy = traced(&collector, &upstream.url(), more, "").await;
    let mut client = proxy.sent(streaming("x")).await;
    assert_eq!(client.head().await.unwrap().status(), 200);
    proxy.await_tiny_starting().await;
    upstream.wake();
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    let token = r#"data: {"choices":[{"delta":{"content":"one"}}]}"#;
    call.send(chunk(&format!("{token}\n\n"))).await;
    client.parts_until("one").await;
    call.finish(chunk("data: [DONE]\n\n") + LAST).await;
    client.rest().await.expect("all of it");
    proxy.stop(&[("completed", 1)]).await;

    let trace = collector.only_trace();
    trace.is_whole();
    let server = trace.server();
    assert_eq!((server.get(names::STATUS_CODE), server.is_error()), ("200".into(), false));
    assert_eq!(server.events(), [names::EARLY_200]);
    let [attempt] = trace.attempts()[..] else { panic!("{trace:#?}") };
    assert_eq!(attempt.events(), [names::FIRST_BYTE, names::FIRST_TOKEN]);
    let after = server.get(names::FIRST_CHUNK).parse::<f64>().unwrap();
    let at = (attempt.0.events[1].time_unix_nano - server.times().0) as f64 / 1e9;
    assert!((after - at).abs() < 1e-6, "{after} s by the attribute, {at} s by the event");
}

#[tokio::test]
async fn early_200_is_the_recorded_status() {
    let collector = Collector::grpc().await;
    let upstream = TestUpstream::cold().await;
    let more = "hold: { timeout: 3s }, keepalive: { mode: comment, after: 10ms, interval: 10ms }";
    let proxy = traced(&collector, &upstream.url(), more, "").await;
    let mut client = proxy.sent(streaming("x")).await;
    assert_eq!(client.head().await.unwrap().status(), 200);
    assert!(client.rest().await.unwrap().contains("cold_start_timeout"));
    // A client that disconnects while it waits.
    let mut other = proxy.sent(post(CHAT, TRACED_BODY)).await;
    proxy.await_tiny_held(1).await;
    other.shutdown().await;
    drop(other);
    proxy.await_outcome("client_gone", 499, 1).await;
    proxy.stop(&[("cold_start_timeout", 1), ("client_gone", 1)]).await;

    let spans = collector.spans();
    let of_outcome = |outcome: &str| {
        let server = spans.iter().find(|span| span.get(names::OUTCOME) == outcome).expect(outcome);
        let trace = collector.trace(&server.trace_id());
        trace.is_whole();
        trace
    };
    let late = of_outcome("cold_start_timeout");
    let server = late.server();
    assert_eq!((server.get(names::STATUS_CODE), server.is_error()), ("200".into(), true));
    assert_eq!(
        (server.get(names::ERROR_TYPE), server.events()),
        ("cold_start_timeout".into(), vec![names::EARLY_200])
    );
    assert!(server.nanoseconds() >= 300_000_000, "as long as it may be held: {server:#?}");
    assert!(!late.within(late.holds()[0]).is_empty(), "it shows as much of the cold start as there was");
    assert!(late.attempts().is_empty());

    let gone = of_outcome("client_gone");
    assert_eq!(gone.server().get(names::STATUS_CODE), "", "nothing went out");
    assert_eq!(
        (gone.server().get(names::ERROR_TYPE), gone.server().is_error()),
        ("client_gone".into(), true)
    );
}

#[tokio::test]
async fn rejected_request_has_a_span() {
    let collector = Collector::grpc().await;
    let upstream = TestUpstream::cold().await;
    let proxy = traced(&collector, &upstream.url(), "", "").await;
    let mut client = proxy.client().await;
    client.ask(post(CHAT, r#"{"model":"nope"}"#)).await.is_error(404, "model_not_found");
    client.ask(post_with(CHAT, &[("x-anteroom-max-wait", "0")], TRACED_BODY)).await.is_error(503, "no_wait");
    client.ask(get("/wp-login.php")).await.is_error(404, "unknown_path");
    assert_eq!(client.ask(get("/v1/models")).await.status(), 200);
    proxy.stop(&[]).await;

    let spans = collector.spans();
    let shown: BTreeSet<_> = spans
        .iter()
        .map(|span| {
            assert_eq!(
                (span.kind(), span.parent()),
                (opentelemetry_proto::tonic::trace::v1::span::SpanKind::Server, String::new())
            );
            let said = [names::STATUS_CODE, names::OUTCOME, names::ERROR_TYPE, names::ANTEROOM_ROUTE];
            (span.name().to_owned(), said.map(|key| span.get(key)).join(" "), span.is_error())
        })
        .collect();
    let expected = [
        ("GET", "404 unknown_path  ", false),
        ("GET /v1/models", "200   ", false),
        ("POST /v1/chat/completions", "404 model_not_found  ", false),
        ("POST /v1/chat/completions", "503 no_wait no_wait tiny", true),
    ];
    let expected = expected.map(|(name, said, error)| (name.to_owned(), said.to_owned(), error));
    assert_eq!(shown, BTreeSet::from(expected));
}

#[tokio::test]
async fn unsampled_trace_is_propagated_not_exported() {
    let collector = Collector::grpc().await;
    let mut upstream = TestUpstream::warm().await;
    let proxy = traced(&collector, &upstream.url(), "", "sampleRatio: 0").await;
    let mut client = proxy.client().await;
    let mut ask = async |fields: &[(&str, &str)]| {
        client.send(post_with(CHAT, fields, TRACED_BODY)).await;
        let call = upstream.call().await;
        let head = call.head.clone();
        call.echo().await;
        assert_eq!(client.response().await.status(), 200);
        head
    };
    // The sampling decision of the caller is kept.
    let unsampled = PARENT.replace("-01", "-00");
    let head = ask(&[("traceparent", &unsampled), ("tracestate", "a=1")]).await;
    assert_eq!((head.get("traceparent"), head.get("tracestate")), (Some(&*unsampled), Some("a=1")));
    // Without a caller's decision, the proxy decides for the endpoint as well.
    let head = ask(&[]).await;
    let decided = head.get("traceparent").unwrap();
    assert!(decided.len() == 55 && decided.ends_with("-00"), "{decided}");
    // An invalid or repeated `traceparent` starts a new trace, and `tracestate` without a parent is dropped.
    for fields in [
        &[("traceparent", "00-0-0-00"), ("tracestate", "a=1")][..],
        &[("traceparent", PARENT), ("traceparent", PARENT), ("tracestate", "a=1")],
    ] {
        let head = ask(fields).await;
        let decided = head.get("traceparent").unwrap();
        assert!(decided.ends_with("-00") && !decided.contains(TRACE), "{decided}");
        assert_eq!(head.get("tracestate"), None);
    }
    let head = ask(&[("traceparent", PARENT)]).await;
    assert!(head.get("traceparent").unwrap().starts_with(&PARENT[..36]), "the ratio is for what begins here");
    proxy.stop(&[("completed", 5)]).await;
    let trace = collector.only_trace();
    assert_eq!(trace.server().trace_id(), TRACE);
}

#[tokio::test]
async fn record_has_trace_id_without_export() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let unsampled = PARENT.replace("-01", "-00");
    let mut client = proxy.sent(post_with(CHAT, &[("traceparent", &unsampled)], TRACED_BODY)).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    let call = upstream.call().await;
    assert_eq!(call.head.get("traceparent"), Some(&*unsampled));
    call.echo().await;
    client.response().await;
    let record = proxy.admin("/api/v1/cold-starts").await.json()["cold_starts"][0].clone();
    assert_eq!(record["trace_id"], TRACE);
    let text = proxy.metrics().await;
    assert!(!text.contains(" # {"), "nobody exports it, so there is nothing to lead to");
    assert!(!text.contains("anteroom_spans"), "{text}");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn silent_collector_costs_no_request() {
    let port = Port::reserve();
    let mut upstream = TestUpstream::warm().await;
    let down = format!("traces: {{ endpoint: \"{}\" }}\n", port.url());
    let proxy = TestProxy::start(&(down + &routes(&[route("tiny", &upstream.url(), "")]))).await;
    let mut client = proxy.client().await;
    for _ in 0..3 {
        client.send(chat("x")).await;
        upstream.call().await.echo().await;
        assert_eq!(client.response().await.status(), 200);
    }
    // A server span and an attempt for each request, and one hold for the first.
    until("the spans to be given up", async || {
        proxy.metric("anteroom_spans_total", &["outcome=\"failed\""]).await == 7
    })
    .await;
    assert_eq!(proxy.metric("anteroom_spans_total", &["outcome=\"exported\""]).await, 0);
    proxy.stop(&[("completed", 3)]).await;

    let silent = Collector::grpc().await;
    silent.fall_silent();
    let proxy = traced(&silent, &upstream.url(), "", "").await;
    let mut client = proxy.client().await;
    client.send(chat("x")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
    assert!(silent.spans().is_empty());
}

/// Sample of OpenMetrics text: series, value, and exemplar if present.
type MetricSample<'a> = (&'a str, f64, Option<(&'a str, f64, f64)>);

/// Parses a line by the ABNF of OpenMetrics 1.0.
fn sample(line: &str) -> MetricSample<'_> {
    let (sample, exemplar) = match line.split_once(" # ") {
        Some((sample, exemplar)) => (sample, Some(exemplar)),
        None => (line, None),
    };
    let (series, value) = sample.rsplit_once(' ').expect(line);
    let exemplar = exemplar.map(|exemplar| {
        let (labels, rest) = exemplar.strip_prefix('{').and_then(|rest| rest.split_once("} ")).expect(line);
        let trace = labels.strip_prefix("trace_id=\"").and_then(|id| id.strip_suffix('"')).expect(line);
        assert!(trace.len() == 32 && trace.bytes().all(|byte| byte.is_ascii_hexdigit()), "{line}");
        let (value, at) = rest.split_once(' ').expect(line);
        (trace, value.parse().expect(line), at.parse().expect(line))
    });
    (series, value.parse().expect(line), exemplar)
}

#[tokio::test]
async fn exemplars_lead_from_the_metrics_to_the_trace() {
    let collector = Collector::grpc().await;
    let mut upstream = TestUpstream::cold().await;
    let proxy = traced(&collector, &upstream.url(), "", "sampleRatio: 0").await;
    let mut held = proxy.sent(post_with(CHAT, &[("traceparent", PARENT)], TRACED_BODY)).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    upstream.call().await.echo().await;
    held.response().await;
    // A request that is not exported, and one that was not held: neither leads to a useful trace.
    for fields in [&[][..], &[("traceparent", PARENT)]] {
        held.send(post_with(CHAT, fields, TRACED_BODY)).await;
        upstream.call().await.echo().await;
        held.response().await;
    }
    proxy.await_outcome("completed", 200, 3).await;
    let text = proxy.metrics().await;
    assert!(text.ends_with("# EOF\n"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let mut leading = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, count, exemplar) = sample(line);
        let Some((trace, value, at)) = exemplar else { continue };
        let (name, labels) = series.split_once('{').expect(line);
        let le = labels.strip_prefix("le=\"").and_then(|rest| rest.split_once('"')).expect(line).0;
        assert!(name.ends_with("_bucket"), "exemplars are for buckets: {line}");
        assert!(le == "+Inf" || value <= le.parse::<f64>().unwrap(), "{line}");
        assert!(count >= 1.0 && (now - at).abs() < 60.0, "{line}");
        assert_eq!(trace, TRACE, "{line}");
        leading.insert(name.trim_end_matches("_bucket"));
    }
    let expected = [
        "anteroom_cold_start_actuation_seconds",
        "anteroom_cold_start_duration_seconds",
        "anteroom_cold_start_phase_duration_seconds",
        "anteroom_hold_duration_seconds",
        "anteroom_time_to_first_byte_seconds",
    ];
    assert_eq!(leading, BTreeSet::from(expected));
    proxy.stop(&[("completed", 3)]).await;
}
