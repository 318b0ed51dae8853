//! gRPC through a route of the HTTP Add-on: HTTP/2 on both sides, and trailers with the status of the call.

use std::{net::SocketAddr, sync::Arc};

use anteroom::{
    domain::{Intercept, Matcher},
    state::Protocol,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, transport::Server};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
    server::{HealthReporter, health_reporter},
};

use crate::{
    scaler::channel,
    support::{
        cluster::{FakeCluster, FakePodState},
        soon,
    },
};

fn request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

/// Starts a pod that serves gRPC's standard health service.
async fn application() -> (SocketAddr, HealthReporter) {
    let (reporter, service) = health_reporter();
    reporter.set_service_status("app", ServingStatus::Serving).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving =
        Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    (address, reporter)
}

#[tokio::test]
async fn grpc_calls_and_statuses_pass_after_a_cold_start() {
    let (address, reporter) = application().await;
    let cluster = FakeCluster::speaking(Protocol::H2c);
    cluster.publish_pods(&[]);
    let anything = Intercept { rules: vec![Matcher::default()], ..Intercept::default() };
    let proxy = cluster.intercepting(Arc::new(anything)).await;
    let client = HealthClient::new(channel(Some(proxy.address)).await);

    let mut waiting = client.clone();
    let held = tokio::spawn(async move { waiting.check(request("app")).await });
    proxy.await_tiny_held(1).await;
    cluster.publish_pods(&[(address, FakePodState::Ready)]);
    let answer = soon("the answer to the held call", held).await.unwrap().unwrap();
    assert_eq!(answer.metadata().get("x-keda-http-cold-start").unwrap(), "true");
    assert_eq!(answer.into_inner().status, ServingStatus::Serving as i32);

    let mut warm = client.clone();
    let failed = soon("a status", warm.check(request("other"))).await.unwrap_err();
    assert_eq!(failed.code(), Code::NotFound, "the application's own word");
    let mut stream = soon("a stream", warm.watch(request("app"))).await.unwrap().into_inner();
    let first = soon("its first message", stream.message()).await.unwrap().unwrap();
    assert_eq!(first.status, ServingStatus::Serving as i32);
    reporter.set_service_status("app", ServingStatus::NotServing).await;
    let second = soon("its second message", stream.message()).await.unwrap().unwrap();
    assert_eq!(second.status, ServingStatus::NotServing as i32);
    proxy.await_tiny_in_flight(1).await;
    drop(stream);
    proxy.await_tiny_in_flight(0).await;
    drop((warm, client));
    proxy.stop(&[("completed", 2), ("client_gone", 1)]).await;
}
