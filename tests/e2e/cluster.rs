//! Pods of a cluster, directly and behind a gateway.

use std::collections::BTreeMap;

use anteroom::{
    domain::{Role, Roles},
    state::Protocol,
};
use http::Version;

use crate::support::{
    TestProxy, TestUpstream,
    cluster::{FakeCluster, FakePodState},
    h2c::H2c,
    until,
    upstream::{LAST, STREAM, answer, chunk},
    wire::{CHAT, chat, post_with, streaming},
};

use FakePodState::{Dead, NotReady, Ready, Terminating};

/// Waits until this many endpoints are ready.
async fn await_ready_endpoints(proxy: &TestProxy, count: usize) {
    until(&format!("{count} open endpoints"), async || {
        let endpoints = proxy.route("tiny").await["endpoints"].as_array().unwrap().clone();
        endpoints.iter().filter(|endpoint| endpoint["ready"] == true).count() == count
    })
    .await;
}

fn cluster() -> FakeCluster {
    FakeCluster::speaking(Protocol::Http1)
}

#[tokio::test]
async fn first_answering_pod_gets_the_held_requests() {
    let (one, mut two) = (TestUpstream::cold().await, TestUpstream::cold().await);
    let cluster = cluster();
    let proxy = cluster.proxy(None, "").await;
    cluster.publish_pods(&[(one.address, NotReady), (two.address, NotReady)]);
    let mut client = proxy.sent(chat("hello")).await;
    proxy.await_tiny_starting().await;
    one.probed().await;
    two.wake();
    let mut call = two.call().await;
    assert_eq!(call.text().await, "hello");
    call.reply("hello").await;
    assert_eq!(client.response().await.json()["text"], "hello");
    // No request is waiting, so the other endpoint is not probed; the cluster's readiness opens it.
    cluster.publish_pods(&[(one.address, Ready), (two.address, NotReady)]);
    await_ready_endpoints(&proxy, 2).await;
    proxy.stop(&[("completed", 1)]).await;
    assert_eq!(one.requests(), 0);
}

#[tokio::test]
async fn streams_spread_and_outlive_a_terminating_pod() {
    let mut pods = [TestUpstream::warm().await, TestUpstream::warm().await, TestUpstream::warm().await];
    let all = |word| pods.each_ref().map(|pod| (pod.address, word));
    let cluster = cluster();
    let ready = all(Ready);
    cluster.publish_pods(&ready);
    let proxy = cluster.proxy(None, "concurrency: { max: 4 }").await;
    let mut clients = Vec::new();
    for number in 0..12 {
        clients.push(proxy.sent(streaming(&number.to_string())).await);
        proxy.await_tiny_in_flight(number + 1).await;
    }
    // All pods are full, with 4 requests each. The next request is held.
    let mut late = proxy.sent(streaming("late")).await;
    proxy.await_tiny_held(1).await;
    let mut calls = BTreeMap::new();
    for (index, pod) in pods.iter_mut().enumerate() {
        assert_eq!(pod.requests(), 4);
        for _ in 0..4 {
            let mut call = pod.call().await;
            let text = call.text().await;
            call.send(STREAM).await;
            call.send(chunk(&text)).await;
            calls.insert(text.parse::<usize>().unwrap(), (index, call));
        }
    }
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.head().await.unwrap().status(), 200);
        assert_eq!(client.parts_until(&number.to_string()).await, number.to_string());
    }
    // The first pod terminates: its streams continue, but its slots are not reused.
    let words = [(ready[0].0, Terminating), ready[1], ready[2]];
    cluster.publish_pods(&words);
    await_ready_endpoints(&proxy, 2).await;
    let mut ended = 0;
    let of_first: Vec<_> =
        calls.iter().filter(|(_, (pod, _))| *pod == 0).map(|(number, _)| *number).collect();
    for number in &of_first[..2] {
        let (_, mut call) = calls.remove(number).unwrap();
        call.send(chunk("more")).await;
        call.finish(LAST).await;
        assert_eq!(clients[*number].rest().await.as_deref(), Some("more"));
        ended += 1;
    }
    proxy.await_tiny_in_flight(12 - ended).await;
    proxy.await_tiny_held(1).await;
    // The pod is removed from the cluster: running streams continue to their end.
    cluster.publish_pods(&words[1..]);
    for number in &of_first[2..] {
        let (_, call) = calls.remove(number).unwrap();
        call.finish(LAST).await;
        assert_eq!(clients[*number].rest().await.as_deref(), Some(""));
    }
    await_ready_endpoints(&proxy, 2).await;
    assert_eq!(pods[0].requests(), 4, "nothing new");
    // The held request gets a free slot on another pod.
    let (number, (pod, _)) = calls.iter().map(|(number, (pod, _))| (*number, (*pod, ()))).next().unwrap();
    let (_, call) = calls.remove(&number).unwrap();
    call.finish(LAST).await;
    let mut call = pods[pod].call().await;
    assert_eq!(call.text().await, "late");
    call.send(STREAM).await;
    call.finish(LAST).await;
    assert_eq!(late.response().await.status(), 200);
    for (_, (_, call)) in calls {
        call.finish(LAST).await;
    }
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("completed", 13)]).await;
}

#[tokio::test]
async fn unaware_gateway_is_retried() {
    let pod = TestUpstream::cold().await;
    let mut envoy = TestUpstream::warm().await;
    let cluster = cluster();
    let proxy = cluster.proxy(Some(envoy.url()), "").await;
    cluster.publish_pods(&[(pod.address, NotReady)]);
    let mut client = proxy.sent(chat("patience")).await;
    pod.probed().await;
    assert_eq!(envoy.accepted(), 0, "a gateway's word at zero is worth nothing");
    pod.wake();
    for _ in 0..3 {
        let mut call = envoy.call().await;
        assert_eq!(call.text().await, "patience");
        call.finish(answer(
            "503 Service Unavailable",
            &[("content-type", "text/plain")],
            "no healthy upstream",
        ))
        .await;
    }
    let mut call = envoy.call().await;
    assert_eq!(call.text().await, "patience");
    call.reply("served").await;
    assert_eq!(client.response().await.json()["text"], "served");
    assert_eq!((pod.requests(), envoy.probes()), (0, 0));
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn server_queues_are_summed_while_there_is_demand() {
    let server = async |waiting: u32| {
        TestUpstream::warm().await.automatic(move |call| async move {
            if call.head.line() == "GET /metrics" {
                let series = format!("vllm:num_requests_waiting{{model_name=\"tiny\"}} {waiting}.0\n");
                return call.finish(answer("200 OK", &[], &series)).await;
            }
            call.echo().await;
        })
    };
    let (one, two) = (server(3).await, server(4).await);
    let cluster = cluster();
    cluster.publish_pods(&[(one.address, Ready), (two.address, Ready)]);
    let proxy = cluster.proxy(None, "scaling: { serverQueue: true }").await;
    await_ready_endpoints(&proxy, 2).await;
    let gate = proxy.gate().await;
    assert_eq!((one.requests(), two.requests()), (0, 0), "nobody asks while there is no demand");
    assert_eq!(proxy.ask(chat("hello")).await.status(), 200);
    until("3 + 4", async || gate.demand().server_queue() == 7).await;
    cluster.publish_pods(&[(two.address, Ready)]);
    until("4", async || gate.demand().server_queue() == 4).await;
    cluster.publish_pods(&[]);
    until("0", async || gate.demand().server_queue() == 0).await;
    proxy.stop(&[("completed", 1)]).await;
}

// === pods of several roles ===

/// Creates a cluster in which decode pods serve and prefill pods are required.
fn of_two_roles() -> (FakeCluster, Role, Role) {
    let labels = |role: &str| [("role".to_owned(), role.to_owned())].into();
    let groups = ["decode", "prefill"].map(|role| (role.to_owned(), labels(role))).into();
    let cluster = FakeCluster::with_roles(Roles { serve: labels("decode"), groups });
    (cluster, Role { is_helper: false, groups: 0b01 }, Role { is_helper: true, groups: 0b10 })
}

#[tokio::test]
async fn prefill_alone_gets_nothing_and_opens_nothing() {
    let (mut decode, prefill) = (TestUpstream::cold().await, TestUpstream::warm().await);
    let (cluster, serves, helps) = of_two_roles();
    let proxy = cluster.proxy(None, "").await;
    cluster.publish_pods_with_roles(&[(decode.address, NotReady, serves), (prefill.address, Ready, helps)]);
    let mut client = proxy.sent(chat("whole")).await;
    proxy.await_tiny_starting().await;
    decode.probed().await;
    decode.wake();
    let mut call = decode.call().await;
    assert_eq!(call.text().await, "whole");
    call.reply("served").await;
    assert_eq!(client.response().await.json()["text"], "served");
    // Without any prefill pod, requests are held.
    cluster
        .publish_pods_with_roles(&[(decode.address, Ready, serves), (prefill.address, Terminating, helps)]);
    await_ready_endpoints(&proxy, 0).await;
    let mut client = proxy.sent(chat("waits")).await;
    proxy.await_tiny_held(1).await;
    cluster.publish_pods_with_roles(&[(decode.address, Ready, serves), (prefill.address, Ready, helps)]);
    decode.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "waits");
    proxy.stop(&[("completed", 2)]).await;
    assert_eq!(prefill.requests(), 0);
}

#[tokio::test]
async fn gateway_waits_for_both_roles() {
    let (decode, prefill) = (TestUpstream::cold().await, TestUpstream::warm().await);
    let mut router = TestUpstream::warm().await;
    let (cluster, serves, helps) = of_two_roles();
    let proxy = cluster.proxy(Some(router.url()), "").await;
    cluster.publish_pods_with_roles(&[(decode.address, NotReady, serves), (prefill.address, Ready, helps)]);
    let mut client = proxy.sent(chat("patient")).await;
    proxy.await_tiny_starting().await;
    decode.probed().await;
    assert_eq!(router.accepted(), 0, "it would have said 429");
    decode.wake();
    router.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "patient");
    proxy.stop(&[("completed", 1)]).await;
}

// === HTTP/2 to the pods ===

fn h2c() -> FakeCluster {
    FakeCluster::speaking(Protocol::H2c)
}

#[tokio::test]
async fn http_2_pod_is_probed_and_served_over_http_2() {
    let mut pod = H2c::new(100, false).await;
    let cluster = h2c();
    cluster.publish_pods(&[(pod.address, NotReady)]);
    let proxy = cluster.proxy(None, "").await;
    let fields = [("TE", "trailers, gzip"), ("Connection", "X-Mine"), ("X-Mine", "1"), ("X-Theirs", "2")];
    let body = r#"{"model":"tiny","text":"hello"}"#;
    let mut client = proxy.sent(post_with(CHAT, &fields, body)).await;
    proxy.await_tiny_starting().await;
    pod.wake();
    let mut call = pod.call().await;
    assert_eq!(call.text().await, "hello");
    let request = &call.request;
    assert_eq!(request.version(), Version::HTTP_2);
    assert_eq!(
        request.uri().to_string(),
        format!("http://api.test{CHAT}"),
        "the client's Host, as :authority"
    );
    let header = |name| request.headers().get(name).map(|value| value.to_str().unwrap());
    for (name, expected) in [
        ("te", Some("trailers")),
        ("x-theirs", Some("2")),
        ("x-forwarded-host", Some("api.test")),
        ("content-length", Some("31")),
        ("x-mine", None),
        ("host", None),
        ("connection", None),
    ] {
        assert_eq!(header(name), expected, "{name}");
    }
    call.reply("served");
    let response = client.response().await;
    assert_eq!((response.status(), response.json()["text"].as_str()), (200, Some("served")));
    assert_eq!(response.head.start, "HTTP/1.1 200 OK");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn requests_share_h2_connections_up_to_a_limit() {
    let mut pod = H2c::new(2, true).await;
    let cluster = h2c();
    cluster.publish_pods(&[(pod.address, Ready)]);
    let proxy = cluster.proxy(None, "").await;
    let mut clients = Vec::new();
    let mut calls = Vec::new();
    // One at a time: the stream limit of a connection is known only once the server's SETTINGS have arrived.
    for number in 0..5 {
        clients.push(proxy.sent(chat(&number.to_string())).await);
        calls.push(pod.call().await);
    }
    let connections: Vec<_> = calls.iter().map(|call| call.connection).collect();
    assert_eq!(connections, [0, 0, 1, 1, 2]);
    for (number, (mut client, mut call)) in clients.into_iter().zip(calls).enumerate() {
        let text = call.text().await;
        assert_eq!(text, number.to_string());
        call.reply(&text);
        assert_eq!(client.response().await.json()["text"], text);
    }
    // Requests share the connections that exist; none opens one of its own.
    assert_eq!(pod.accepted(), 3);
    proxy.stop(&[("completed", 5)]).await;
}

#[tokio::test]
async fn burst_opens_one_h2_connection() {
    let mut pod = H2c::new(100, true).await;
    let cluster = h2c();
    cluster.publish_pods(&[(pod.address, Ready)]);
    let proxy = cluster.proxy(None, "").await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(proxy.client().await);
    }
    for client in &mut clients {
        client.send(chat("at once")).await;
    }
    for _ in 0..20 {
        let mut call = pod.call().await;
        call.text().await;
        call.reply("served");
    }
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    assert_eq!(pod.accepted(), 1);
    proxy.stop(&[("completed", 20)]).await;
}

/// A node died without a FIN: its pod sends nothing, and its connections stay open. A terminating pod may still
/// respond; once the cluster reports that it has ended, requests without a head move to another pod, and a started
/// response may continue for a while.
#[tokio::test]
async fn dead_pod_requeues_unanswered_requests() {
    let (mut one, mut two) = (TestUpstream::warm().await, TestUpstream::warm().await);
    let cluster = cluster();
    cluster.publish_pods(&[(one.address, Ready)]);
    let proxy = cluster.proxy(None, "").await;
    let mut streamed = proxy.sent(streaming("streams")).await;
    let mut stream = one.call().await;
    stream.text().await;
    stream.send(STREAM).await;
    stream.send(chunk("one")).await;
    streamed.head().await.unwrap();
    streamed.parts_until("one").await;
    let mut waiting = proxy.sent(chat("waits")).await;
    let silent = one.call().await;
    cluster.publish_pods(&[(one.address, Terminating), (two.address, Ready)]);
    until("the other pod only", async || {
        let endpoints = proxy.route("tiny").await["endpoints"].as_array().unwrap().clone();
        endpoints.len() == 2 && endpoints.iter().filter(|endpoint| endpoint["ready"] == true).count() == 1
    })
    .await;
    assert_eq!((proxy.route("tiny").await["in_flight"].as_u64(), two.requests()), (Some(2), 0));

    cluster.publish_pods(&[(one.address, Dead), (two.address, Ready)]);
    two.call().await.echo().await;
    assert_eq!(waiting.response().await.json()["text"], "waits");
    silent.gone().await;
    stream.send(chunk("two")).await;
    streamed.parts_until("two").await;
    stream.finish(LAST).await;
    assert_eq!(streamed.rest().await.as_deref(), Some(""));
    proxy.stop(&[("completed", 2)]).await;
}

/// Over HTTP/2, waiting requests share their connection with a started response.
#[tokio::test]
async fn dead_pod_requeues_http_2_streams() {
    let (mut one, mut two) = (H2c::new(100, true).await, H2c::new(100, true).await);
    let cluster = h2c();
    cluster.publish_pods(&[(one.address, Ready)]);
    let proxy = cluster.proxy(None, "").await;
    let mut streamed = proxy.sent(streaming("streams")).await;
    let stream = one.call().await.stream();
    stream.send("one");
    streamed.head().await.unwrap();
    streamed.parts_until("one").await;
    let mut waiting = proxy.sent(chat("waits")).await;
    let silent = one.call().await;
    assert_eq!(silent.connection, 0);
    cluster.publish_pods(&[(one.address, Dead), (two.address, Ready)]);
    let mut call = two.call().await;
    assert_eq!(call.text().await, "waits");
    call.reply("served");
    assert_eq!(waiting.response().await.status(), 200);
    stream.send("two");
    streamed.parts_until("two").await;
    drop(stream);
    assert_eq!(streamed.rest().await.as_deref(), Some(""));
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn hangup_resets_only_its_own_stream() {
    let mut pod = H2c::new(100, true).await;
    let cluster = h2c();
    cluster.publish_pods(&[(pod.address, Ready)]);
    let proxy = cluster.proxy(None, "").await;
    let mut goes = proxy.sent(streaming("goes")).await;
    let gone = pod.call().await.stream();
    let mut stays = proxy.sent(streaming("stays")).await;
    let still = pod.call().await.stream();
    for (client, stream) in [(&mut goes, &gone), (&mut stays, &still)] {
        stream.send("one");
        assert_eq!(client.head().await.unwrap().status(), 200);
        client.parts_until("one").await;
    }
    drop(goes);
    gone.gone().await;
    proxy.await_tiny_in_flight(1).await;
    still.send("two");
    stays.parts_until("two").await;
    drop(still);
    assert_eq!(stays.rest().await.as_deref(), Some(""));
    assert_eq!(pod.accepted(), 1);
    proxy.stop(&[("completed", 1), ("client_gone", 1)]).await;
}

#[tokio::test]
async fn drained_connection_is_replaced() {
    let mut pod = H2c::new(100, true).await;
    let cluster = h2c();
    cluster.publish_pods(&[(pod.address, Ready)]);
    let proxy = cluster.proxy(None, "").await;
    let mut first = proxy.sent(streaming("first")).await;
    let stream = pod.call().await.stream();
    stream.send("one");
    first.head().await.unwrap();
    first.parts_until("one").await;
    pod.end_connections();
    // The request is served on the old connection or a new one, depending on how far the GOAWAY has got.
    for _ in 0..10 {
        let mut client = proxy.sent(chat("next")).await;
        let mut call = pod.call().await;
        call.text().await;
        call.reply("served");
        assert_eq!(client.response().await.status(), 200);
    }
    stream.send("two");
    first.parts_until("two").await;
    drop(stream);
    assert_eq!(first.rest().await.as_deref(), Some(""));
    proxy.stop(&[("completed", 11)]).await;
}

#[tokio::test]
async fn broken_request_is_written_twice_at_most() {
    let mut pod = H2c::new(100, true).await;
    let cluster = h2c();
    cluster.publish_pods(&[(pod.address, Ready)]);
    let proxy = cluster.proxy(None, "").await;
    let mut client = proxy.sent(chat("breaks servers")).await;
    for dispatch in 1..=2 {
        let mut call = pod.call().await;
        assert_eq!(call.text().await, "breaks servers", "dispatch {dispatch}");
        drop(call);
    }
    client.response().await.is_error(502, "upstream_error");
    // The endpoint answers its probe and stays available to others.
    let mut client = proxy.sent(chat("good")).await;
    let mut call = pod.call().await;
    assert_eq!(call.text().await, "good");
    call.reply("good");
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1), ("upstream_error", 1)]).await;
}

#[tokio::test]
async fn stalled_body_does_not_blame_the_pod() {
    let mut pod = H2c::new(100, true).await;
    let cluster = h2c();
    cluster.publish_pods(&[(pod.address, Ready)]);
    // Without models the body streams.
    let proxy = cluster.proxy_with(None, "match: {}", "limits: { bodyTimeout: 100ms }\n").await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\nContent-Length: 100\r\n\r\n{{");
    let mut client = proxy.sent(head).await;
    let call = pod.call().await;
    client.response().await.is_error(408, "request_timeout");
    drop(call);
    // A suspect endpoint would have been probed, over a connection of its own.
    let mut client = proxy.sent(post_with(CHAT, &[], "{}")).await;
    pod.call().await.reply("served");
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(pod.accepted(), 2, "the one that failed, and the next one");
    let account = proxy.stopped(anteroom::drain::StopSignal::Interrupt).await;
    assert_eq!(account.ended_as(anteroom::error::Outcome::UpstreamError), 0, "{account:?}");
}
