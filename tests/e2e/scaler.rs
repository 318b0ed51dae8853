//! The external scaler as KEDA uses it: over gRPC, on a real port.

use std::net::SocketAddr;

use anteroom::{
    app::{BoundProxy, Command},
    drain::StopSignal,
    scaler::keda::proto::{
        self, GetMetricsRequest, ScaledObjectRef, external_scaler_client::ExternalScalerClient,
    },
};
use tonic::{Code, Streaming, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::{
    TestProxy, TestUpstream,
    proxy::{options, parse},
    route, routes, soon, until,
    upstream::{LAST, STREAM},
    wire::{chat, streaming},
};

pub type Scaler = ExternalScalerClient<Channel>;

/// Returns a configuration with these routes and a scaler.
pub fn scaled(of: &[String]) -> String {
    format!("scaler: 127.0.0.1:0\n{}", routes(of))
}

pub async fn channel(address: Option<SocketAddr>) -> Channel {
    let uri = format!("http://{}", address.unwrap());
    soon("a connection", Channel::from_shared(uri).unwrap().connect()).await.unwrap()
}

pub async fn scaler(proxy: &TestProxy) -> Scaler {
    Scaler::new(channel(proxy.scaler).await)
}

/// Returns a ScaledObject with this key in the metadata of its trigger.
pub fn object(key: &str, route: &str) -> ScaledObjectRef {
    ScaledObjectRef {
        name: "vllm".into(),
        namespace: "ml".into(),
        scaler_metadata: [("scalerAddress", "anteroom:9090"), (key, route)]
            .map(|(key, value)| (key.into(), value.into()))
            .into(),
    }
}

pub fn tiny() -> ScaledObjectRef {
    object("route", "tiny")
}

/// Returns the next message of a stream, or `None` at its clean end.
pub async fn next<T>(stream: &mut Streaming<T>) -> Option<T> {
    soon("a message or the end", stream.message()).await.expect("no error")
}

async fn active(scaler: &mut Scaler) -> bool {
    scaler.is_active(tiny()).await.unwrap().into_inner().result
}

/// Returns the values of the metric with this name, as integer and as float.
async fn value(scaler: &mut Scaler, name: &str) -> Vec<(String, i64, f64)> {
    let request = GetMetricsRequest { scaled_object_ref: Some(tiny()), metric_name: name.into() };
    let values = scaler.get_metrics(request).await.unwrap().into_inner().metric_values;
    values
        .into_iter()
        .map(|value| (value.metric_name, value.metric_value, value.metric_value_float))
        .collect()
}

#[tokio::test]
async fn demand_lasts_from_request_to_last_byte() {
    let mut upstream = TestUpstream::cold().await;
    let more = "scaling: { linger: 0s, requestRate: { target: 20 } }, concurrency: { max: 4 }";
    let proxy = TestProxy::start(&scaled(&[route("tiny", &upstream.url(), more)])).await;
    let mut scaler = scaler(&proxy).await;
    let (depth, rate) = ("tiny-queue-depth".to_owned(), "tiny-request-rate".to_owned());

    let specs = scaler.get_metric_spec(tiny()).await.unwrap().into_inner().metric_specs;
    let specs: Vec<_> = specs.into_iter().map(|spec| (spec.metric_name, spec.target_size)).collect();
    assert_eq!(specs, [(depth.clone(), 5), (rate.clone(), 20)]);
    assert_eq!(value(&mut scaler, "").await, [(depth.clone(), 0, 0.0), (rate.clone(), 0, 0.0)]);
    assert!(!active(&mut scaler).await);
    let mut stream = scaler.stream_is_active(tiny()).await.unwrap().into_inner();
    assert!(!next(&mut stream).await.unwrap().result, "the state at once");
    assert_eq!(proxy.metric("anteroom_scaler_streams", &["route=\"tiny\""]).await, 1);

    let mut clients = vec![proxy.sent(streaming("0")).await];
    assert!(next(&mut stream).await.unwrap().result);
    for number in 1..12 {
        clients.push(proxy.sent(chat(&number.to_string())).await);
    }
    proxy.await_tiny_held(12).await;
    assert!(active(&mut scaler).await);
    assert_eq!(value(&mut scaler, &depth).await, [(depth.clone(), 5, 5.0)], "12 wait, and nothing is up");
    assert_eq!(proxy.metric("anteroom_scaler_pushes_total", &["route=\"tiny\""]).await, 1);

    upstream.wake();
    let mut calls = Vec::new();
    for _ in 0..4 {
        calls.push(upstream.call().await);
    }
    proxy.await_tiny_held(8).await;
    assert_eq!(value(&mut scaler, &depth).await, [(depth.clone(), 13, 13.0)], "8 + 4 × 5 ÷ 4");
    for call in calls.drain(..) {
        call.echo().await;
    }
    for _ in 4..12 {
        upstream.call().await.echo().await;
    }
    for client in &mut clients[1..] {
        assert_eq!(client.response().await.status(), 200);
    }
    until("no demand", async || !active(&mut scaler).await).await;
    let depth_only = &value(&mut scaler, "").await[0];
    assert_eq!(depth_only, &(depth, 0, 0.0), "no linger, no lease");
    proxy.stop(&[("completed", 12)]).await;
    // Repeated messages may have arrived in between.
    while let Some(said) = next(&mut stream).await {
        let _ = said;
    }
}

#[tokio::test]
async fn poll_returning_true_ends_the_signal_phase() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::start(&scaled(&[route("tiny", &upstream.url(), "")])).await;
    let mut scaler = scaler(&proxy).await;
    let _client = proxy.sent(streaming("x")).await;
    proxy.await_tiny_held(1).await;
    until("a cold start", async || proxy.route("tiny").await["phase"] == "signal").await;
    assert!(active(&mut scaler).await);
    // No stream is open, so KEDA scales by polling.
    let route = proxy.route("tiny").await;
    let first = &route["cold_start"]["phases"][0];
    assert_eq!((&first["name"], first["unfinished"].is_null()), (&"signal".into(), true), "{route}");
    assert_ne!(route["phase"], "signal");
}

#[tokio::test]
async fn live_streams_count_until_their_last_byte() {
    let mut upstream = TestUpstream::warm().await;
    let more = "scaling: { linger: 0s }, concurrency: { max: 64 }";
    let proxy = TestProxy::start(&scaled(&[route("tiny", &upstream.url(), more)])).await;
    let mut scaler = scaler(&proxy).await;
    let mut client = proxy.sent(streaming("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    assert!(active(&mut scaler).await);
    let name = "tiny-queue-depth".to_owned();
    assert_eq!(value(&mut scaler, &name).await, [(name.clone(), 1, 5.0 / 64.0)], "1 × 5 ÷ 64");
    call.finish(LAST).await;
    client.rest().await;
    until("no demand", async || !active(&mut scaler).await).await;
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn push_ends_the_signal_phase() {
    for has_stream in [true, false] {
        let mut upstream = TestUpstream::cold().await;
        let proxy = TestProxy::start(&scaled(&[route("tiny", &upstream.url(), "")])).await;
        let mut scaler = scaler(&proxy).await;
        let mut stream = None;
        if has_stream {
            let mut open = scaler.stream_is_active(tiny()).await.unwrap().into_inner();
            assert!(!next(&mut open).await.unwrap().result);
            stream = Some(open);
        }
        let mut client = proxy.sent(chat("x")).await;
        if let Some(stream) = &mut stream {
            assert!(next(stream).await.unwrap().result);
        }
        proxy.await_tiny_starting().await;
        upstream.wake();
        upstream.call().await.echo().await;
        assert_eq!(client.response().await.status(), 200);
        proxy.await_outcome("completed", 200, 1).await;
        let records = proxy.admin("/api/v1/cold-starts").await.json();
        let phases = records["cold_starts"][0]["phases"].as_array().unwrap().clone();
        let phases: Vec<_> = phases.iter().map(|span| span["name"].as_str().unwrap().to_owned()).collect();
        let expected = ["signal", "load", "dispatch", "first_byte"];
        assert_eq!(phases, expected[usize::from(!has_stream)..]);
        proxy.stop(&[("completed", 1)]).await;
    }
}

#[tokio::test]
async fn invalid_trigger_error_names_the_remedy() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::start(&scaled(&[route("tiny", &upstream.url(), "")])).await;
    let mut scaler = scaler(&proxy).await;
    for metadata in [object("other", "tiny"), ScaledObjectRef::default()] {
        let status = scaler.stream_is_active(metadata.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(scaler.stream_metric_spec(metadata).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let status = scaler.is_active(object("route", "other/tiny")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "the route of another namespace");
    let request = GetMetricsRequest { scaled_object_ref: Some(tiny()), metric_name: "queue".into() };
    let status = scaler.get_metrics(request).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (
            Code::NotFound,
            "ScaledObject ml/vllm, route \"tiny\": there is no metric \"queue\"; there is tiny-queue-depth"
        )
    );
    let huge = object("route", &"x".repeat(70_000));
    assert_eq!(scaler.is_active(huge).await.unwrap_err().code(), Code::OutOfRange);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn early_scaled_object_is_answered_and_starts_it() {
    let upstream = TestUpstream::cold().await;
    let config = |routes: &[String]| format!("drainTimeout: 1s\n{}", scaled(routes));
    let other = route("other", &upstream.url(), "");
    let proxy = TestProxy::start(&config(std::slice::from_ref(&other))).await;
    let mut scaler = scaler(&proxy).await;
    // The calls that KEDA makes: for the HPA, for the streams, and with each poll.
    let specs = |specs: proto::GetMetricSpecResponse| {
        let [spec] = specs.metric_specs.try_into().unwrap();
        (spec.metric_name, spec.target_size)
    };
    let depth = "tiny-queue-depth".to_owned();
    let told = scaler.get_metric_spec(tiny()).await.unwrap().into_inner();
    assert_eq!(specs(told), (depth.clone(), 5), "else KEDA makes no HPA and no stream");
    let mut stream = scaler.stream_is_active(tiny()).await.unwrap().into_inner();
    let mut metrics = scaler.stream_metric_spec(tiny()).await.unwrap().into_inner();
    assert!(!next(&mut stream).await.unwrap().result);
    assert_eq!(specs(next(&mut metrics).await.unwrap()), (depth.clone(), 5));
    assert_eq!(value(&mut scaler, &depth).await, [(depth.clone(), 0, 0.0)]);
    assert!(!active(&mut scaler).await);
    // An InterceptorRoute may appear in the cluster later; a route from the file does not count as one.
    let theirs = scaler.get_metric_spec(object("interceptorRoute", "other")).await.unwrap().into_inner();
    assert_eq!(specs(theirs), ("other-concurrency".into(), 100));

    proxy.reload(&config(&[other, route("tiny", &upstream.url(), "scaling: { target: 7 }")])).await;
    assert_eq!(specs(next(&mut metrics).await.unwrap()), (depth.clone(), 7));
    let _client = proxy.sent(chat("x")).await;
    assert!(next(&mut stream).await.unwrap().result, "on the stream that was there before the route");
    assert_eq!(proxy.metric("anteroom_scaler_streams", &["route=\"tiny\""]).await, 1);
    assert_eq!(value(&mut scaler, &depth).await, [(depth.clone(), 1, 1.0)]);
    drop((stream, metrics));
    proxy.stop(&[("draining", 1)]).await;
}

#[tokio::test]
async fn reload_brings_awaited_route_and_new_specs() {
    let upstream = TestUpstream::cold().await;
    let with =
        |more: &str| scaled(&[route("other", &upstream.url(), ""), route("tiny", &upstream.url(), more)]);
    let proxy =
        TestProxy::start(&format!("drainTimeout: 1s\n{}", scaled(&[route("other", &upstream.url(), "")])))
            .await;
    let mut scaler = scaler(&proxy).await;
    let mut stream = scaler.stream_is_active(tiny()).await.unwrap().into_inner();
    assert!(!next(&mut stream).await.unwrap().result, "no error, from which KEDA would back off");
    let mut specs = scaler.stream_metric_spec(tiny()).await.unwrap().into_inner();
    assert_eq!(next(&mut specs).await.unwrap().metric_specs[0].target_size, 5);
    proxy.reload(&with("")).await;
    let _client = proxy.sent(chat("x")).await;
    assert!(next(&mut stream).await.unwrap().result);
    proxy.reload(&with("scaling: { target: 7 }")).await;
    assert_eq!(next(&mut specs).await.unwrap().metric_specs[0].target_size, 7);
    drop((stream, specs));
    proxy.stop(&[("draining", 1)]).await;
}

#[tokio::test]
async fn draining_ends_streams_but_still_answers() {
    let upstream = TestUpstream::cold().await;
    let config = scaled(&[route("tiny", &upstream.url(), "")]);
    let proxy = TestProxy::start(&format!("drainDelay: 10m\n{config}")).await;
    let mut scaler = scaler(&proxy).await;
    let serving = async |scaler: Option<SocketAddr>| {
        let request = HealthCheckRequest { service: "externalscaler.ExternalScaler".into() };
        HealthClient::new(channel(scaler).await).check(request).await.unwrap().into_inner().status()
    };
    assert_eq!(serving(proxy.scaler).await, tonic_health::pb::health_check_response::ServingStatus::Serving);
    let mut client = proxy.sent(chat("x")).await;
    proxy.await_tiny_held(1).await;
    let mut stream = scaler.stream_is_active(tiny()).await.unwrap().into_inner();
    let mut specs = scaler.stream_metric_spec(tiny()).await.unwrap().into_inner();
    assert!(next(&mut stream).await.unwrap().result);
    assert!(next(&mut specs).await.is_some());

    proxy.commands.send(Command::Stop(StopSignal::Terminate)).await.unwrap();
    assert!(next(&mut stream).await.is_none(), "status OK");
    assert!(next(&mut specs).await.is_none());
    let mut again = self::scaler(&proxy).await;
    assert!(active(&mut again).await, "its request is still held");
    let mut stream = again.stream_is_active(tiny()).await.unwrap().into_inner();
    assert!(next(&mut stream).await.unwrap().result);
    let not = tonic_health::pb::health_check_response::ServingStatus::NotServing;
    assert_eq!(serving(proxy.scaler).await, not);

    let address = proxy.scaler.unwrap();
    // A second stop request ends the drain without waiting for held requests.
    proxy.stop(&[("draining", 1)]).await;
    assert!(next(&mut stream).await.is_none(), "status OK");
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
    client.end().await;
}

#[tokio::test]
async fn scaler_supports_reflection() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::start(&scaled(&[route("tiny", &upstream.url(), "")])).await;
    let mut reflection = ServerReflectionClient::new(channel(proxy.scaler).await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers =
        reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        next(&mut answers).await.unwrap().message_response
    else {
        panic!("no list")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["externalscaler.ExternalScaler", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|known| known == name), "{names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("peers")), "not served here: {names:?}");
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn taken_port_fails_the_start_and_names_the_key() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let routes = routes(&[route("tiny", "http://127.0.0.1:9", "")]);
    for (config, key) in [
        (format!("scaler: {address}\n{routes}"), "scaler"),
        (format!("peers: {{ listen: {address}, service: \"localhost:9091\" }}\n{routes}"), "peers.listen"),
    ] {
        let error = BoundProxy::new(parse(&config), options()).await.err().unwrap().to_string();
        assert!(error.contains(&format!("cannot listen on {address} (`{key}`)")), "{error}");
    }
}
