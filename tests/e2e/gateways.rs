//! Gateways between the proxy and the servers: their responses before they discover the servers and after they lose
//! them. `tests/gateways` holds the recorded responses.

use std::{fs, path::Path};

use anteroom::state::Protocol;
use futures_util::{StreamExt as _, stream};

use crate::support::{
    TestProxy, TestUpstream,
    cluster::{FakeCluster, FakePodState::Ready},
    soon,
    upstream::{LAST, STREAM, answer, chunk},
    wire::{CHAT, chat, post, streaming},
};

/// Response from `tests/gateways`.
struct Fixture {
    name: String,
    status: u16,
    body: String,
    /// Complete response as sent on the wire.
    bytes: String,
}

impl Fixture {
    /// Reads all fixtures of a folder. Comment lines precede each head.
    fn all(folder: &str) -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gateways").join(folder);
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        files.iter().map(|file| Self::read(file)).collect()
    }

    fn read(file: &Path) -> Self {
        let text = fs::read_to_string(file).unwrap();
        let start = text.find("HTTP/1.1 ").unwrap();
        assert!(text[..start].lines().all(|line| line.starts_with("# ")), "{file:?}");
        let (head, body) = text[start..].split_once("\n\n").unwrap();
        let status = head["HTTP/1.1 ".len()..][..3].parse().unwrap();
        let (last, sent) = match head.contains("Transfer-Encoding: chunked") {
            true => (String::new(), chunk(body) + LAST),
            false => (format!("Content-Length: {}\r\n", body.len()), body.to_owned()),
        };
        let bytes = format!("{}\r\n{last}\r\n{sent}", head.replace('\n', "\r\n"));
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        Self { name, status, body: body.to_owned(), bytes }
    }

    /// Returns true if a server may have run the request that got this response.
    fn counts(&self) -> bool {
        matches!(self.status, 502 | 504) || (self.status == 500 && !self.body.is_empty())
    }
}

/// Starts a ready pod, and a proxy that sends its requests to a gateway.
async fn behind(gateway: &TestUpstream, more: &str) -> (TestUpstream, TestProxy) {
    let pod = TestUpstream::warm().await;
    let cluster = FakeCluster::speaking(Protocol::Http1);
    cluster.publish_pods(&[(pod.address, Ready)]);
    let proxy = cluster.proxy(Some(gateway.url()), more).await;
    (pod, proxy)
}

#[tokio::test]
async fn gateway_startup_errors_reach_no_client() {
    let fixtures = Fixture::all("not-yet");
    assert!(fixtures.len() > 30);
    let each = async |fixture: Fixture| {
        // The gateway's own health path is probed only if a server may have run the request.
        let mut gateway = TestUpstream::cold().await;
        let (_pod, proxy) = behind(&gateway, "").await;
        let mut client = proxy.sent(chat(&fixture.name)).await;
        for _ in 0..if fixture.counts() { 1 } else { 3 } {
            let mut call = gateway.call().await;
            assert_eq!(call.text().await, fixture.name);
            call.finish(&fixture.bytes).await;
        }
        if fixture.counts() {
            gateway.probed().await;
            assert_eq!(gateway.requests(), 1, "{}", fixture.name);
            gateway.wake();
        }
        gateway.call().await.echo().await;
        let response = client.response().await;
        assert_eq!((response.status(), response.json()["text"].as_str()), (200, Some(&*fixture.name)));
        assert_eq!(gateway.probes() > 0, fixture.counts(), "{}", fixture.name);
        proxy.stop(&[("completed", 1)]).await;
    };
    stream::iter(fixtures).for_each_concurrent(4, each).await;
}

#[tokio::test]
async fn model_server_error_is_forwarded_at_once() {
    let fixtures = Fixture::all("model");
    assert!(fixtures.len() > 10);
    let each = async |fixture: Fixture| {
        let mut gateway = TestUpstream::cold().await;
        let (_pod, proxy) = behind(&gateway, "").await;
        let mut client = proxy.sent(chat(&fixture.name)).await;
        let mut call = gateway.call().await;
        call.body().await;
        call.finish(&fixture.bytes).await;
        let response = client.response().await;
        assert_eq!((response.status(), response.text()), (fixture.status, fixture.body), "{}", fixture.name);
        assert_eq!((gateway.requests(), gateway.probes()), (1, 0), "{}", fixture.name);
        proxy.stop(&[("completed", 1)]).await;
    };
    stream::iter(fixtures).for_each_concurrent(4, each).await;
}

/// A long timeout, so that a slow probe on a busy machine does not count as failed.
const LONG_PROBE_TIMEOUT: &str = "readiness: { interval: 10ms, timeout: 30s }";

const NOT_FOUND: &str = "404 page not found\n";

#[tokio::test]
async fn error_after_a_model_response_is_forwarded() {
    let mut gateway = TestUpstream::cold().await;
    let (_pod, proxy) = behind(&gateway, "").await;
    let mut client = proxy.sent(chat("first")).await;
    gateway.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    for status in ["404 Not Found", "429 Too Many Requests", "500 Oops"] {
        let mut client = proxy.sent(chat("later")).await;
        let mut call = gateway.call().await;
        call.body().await;
        call.finish(answer(status, &[("x-own", "1")], NOT_FOUND)).await;
        let response = client.response().await;
        assert_eq!((&*response.text(), response.get("x-own")), (NOT_FOUND, Some("1")), "{status}");
        assert_eq!(response.get("server-timing"), None, "it was not held");
    }
    assert_eq!(gateway.probes(), 0);
    proxy.stop(&[("completed", 4)]).await;
}

#[tokio::test]
async fn not_yet_follows_the_route() {
    for (more, status) in [
        ("gateway: { notYet: { for: 0s } }", "404 Not Found"),
        ("gateway: { notYet: { status: [503] } }", "404 Not Found"),
        ("gateway: { notYet: { status: [503] } }", "400 Bad Request"),
    ] {
        let mut gateway = TestUpstream::cold().await;
        let (_pod, proxy) = behind(&gateway, more).await;
        let mut client = proxy.sent(chat("once")).await;
        let mut call = gateway.call().await;
        call.body().await;
        call.finish(answer(status, &[], NOT_FOUND)).await;
        assert_eq!(client.response().await.text(), NOT_FOUND, "{more}");
        proxy.stop(&[("completed", 1)]).await;
    }
    let mut gateway = TestUpstream::cold().await;
    let (_pod, proxy) = behind(&gateway, "gateway: { notYet: { status: [425] } }").await;
    let mut client = proxy.sent(chat("twice")).await;
    let mut call = gateway.call().await;
    call.body().await;
    call.finish(answer("425 Too Early", &[], "")).await;
    gateway.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn possibly_executed_request_is_sent_at_most_twice() {
    // The gateway answers the health path itself, so probes prove nothing about the servers.
    let mut gateway = TestUpstream::warm().await;
    let (_pod, proxy) = behind(&gateway, "").await;
    let mut client = proxy.sent(chat("costly")).await;
    for _ in 0..2 {
        let mut call = gateway.call().await;
        assert_eq!(call.text().await, "costly");
        call.finish(answer("504 Gateway Timeout", &[], "stream timeout")).await;
    }
    let response = client.response().await;
    assert_eq!((response.status(), &*response.text()), (504, "stream timeout"), "unchanged");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn not_yet_keeps_deadline_and_heartbeats() {
    let not_yet = answer("404 Not Found", &[], NOT_FOUND);
    let always = not_yet.clone();
    let gateway = TestUpstream::warm().await.automatic(move |mut call| {
        let not_yet = always.clone();
        async move {
            call.body().await;
            call.finish(not_yet).await;
        }
    });
    let (_pod, proxy) = behind(&gateway, "hold: { timeout: 200ms }").await;
    proxy.ask(chat("late")).await.is_error(504, "cold_start_timeout");
    proxy.stop(&[("cold_start_timeout", 1)]).await;

    let mut gateway = TestUpstream::warm().await;
    let (_pod, proxy) = behind(&gateway, "keepalive: { after: 10ms, interval: 10ms }").await;
    let mut client = proxy.sent(streaming("told")).await;
    let mut call = gateway.call().await;
    call.body().await;
    call.finish(&not_yet).await;
    assert_eq!(client.head().await.unwrap().status(), 200);
    client.parts_until("waiting phase=").await;
    let mut call = gateway.call().await;
    assert_eq!(call.text().await, "told");
    call.finish(&not_yet).await;
    client.parts_until("waiting phase=").await;
    let mut call = gateway.call().await;
    call.body().await;
    call.send(STREAM).await;
    call.finish(chunk("data: [DONE]\n\n") + LAST).await;
    assert!(client.rest().await.unwrap().ends_with("data: [DONE]\n\n"));
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn url_that_is_not_ready_yet_is_held_and_recorded() {
    let mut dynamo = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&dynamo.url(), "").await;
    let mut client = proxy.sent(chat("patient")).await;
    proxy.await_tiny_starting().await;
    dynamo.wake();
    for _ in 0..2 {
        let mut call = dynamo.call().await;
        assert_eq!(call.text().await, "patient");
        let body = r#"{"message":"Model not found","type":"Not Found","code":404}"#;
        call.finish(answer("404 Not Found", &[], body)).await;
    }
    dynamo.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "patient");
    let records = proxy.admin("/api/v1/cold-starts?route=tiny").await.json();
    let record = &records["cold_starts"][0];
    let phases: Vec<_> =
        record["phases"].as_array().unwrap().iter().map(|phase| phase["name"].as_str().unwrap()).collect();
    assert_eq!(phases, ["signal", "load", "propagate", "dispatch", "first_byte"], "{record}");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn url_without_its_server_is_held_again() {
    // nginx in front of one server, which is killed after its first response: nginx's error page, and responses without
    // one.
    let page = "<html><body><h1>502 Bad Gateway</h1></body></html>";
    for (status, body) in
        [("502 Bad Gateway", page), ("503 Service Unavailable", "{}"), ("504 Gateway Timeout", "")]
    {
        let mut nginx = TestUpstream::warm().await;
        // One at a time, so that their order is visible.
        let proxy = TestProxy::tiny(&nginx.url(), "concurrency: { rampStart: 1 }").await;
        let mut client = proxy.sent(chat("warm")).await;
        nginx.call().await.echo().await;
        assert_eq!(client.response().await.status(), 200);
        assert_eq!(nginx.probes(), 1, "a warm request costs none");

        nginx.sleep();
        let mut client = proxy.sent(chat("held")).await;
        let mut call = nginx.call().await;
        call.body().await;
        call.finish(answer(status, &[], body)).await;
        proxy.await_tiny_starting().await;
        proxy.await_tiny_held(1).await;
        // Later requests are not dispatched at all.
        let mut second = proxy.sent(chat("second")).await;
        proxy.await_tiny_held(2).await;
        assert_eq!(nginx.requests(), 2);
        nginx.wake();
        for (client, text) in [(&mut client, "held"), (&mut second, "second")] {
            let mut call = nginx.call().await;
            assert_eq!(call.text().await, text);
            call.reply(text).await;
            assert_eq!(client.response().await.json()["text"], text, "{status}");
        }
        proxy.stop(&[("completed", 3)]).await;
    }
}

#[tokio::test]
async fn url_passing_its_probe_keeps_its_errors() {
    let mut server = TestUpstream::warm().await;
    let proxy = TestProxy::tiny(&server.url(), LONG_PROBE_TIMEOUT).await;
    let mut client = proxy.sent(chat("warm")).await;
    server.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    for status in ["502 Bad Gateway", "503 Busy", "504 Gateway Timeout"] {
        let mut client = proxy.sent(chat("once")).await;
        let mut call = server.call().await;
        call.body().await;
        call.finish(answer(status, &[("x-own", "1")], "overloaded")).await;
        let response = client.response().await;
        assert_eq!((&*response.text(), response.get("x-own")), ("overloaded", Some("1")), "{status}");
        assert_eq!(response.get("server-timing"), None, "it was not held");
    }
    assert_eq!(server.requests(), 4);
    proxy.stop(&[("completed", 4)]).await;
}

#[tokio::test]
async fn gateway_without_server_gets_startup_time() {
    let mut gateway = TestUpstream::warm().await;
    let (_pod, proxy) = behind(&gateway, "").await;
    let mut client = proxy.sent(chat("warm")).await;
    gateway.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    gateway.sleep();
    let mut client = proxy.sent(chat("held")).await;
    for body in ["<html>no server</html>", "<html>still none</html>"] {
        let mut call = gateway.call().await;
        assert_eq!(call.text().await, "held");
        call.finish(answer("503 Service Unavailable", &[], body)).await;
    }
    gateway.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn unrepeatable_body_passes_the_error_on() {
    let mut nginx = TestUpstream::warm().await;
    // Without models the body streams, and trailers are not kept.
    let proxy = TestProxy::tiny(&nginx.url(), "match: {}").await;
    let mut client = proxy.sent(post(CHAT, "{}")).await;
    nginx.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    nginx.sleep();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n");
    let mut client = proxy.sent(head + &chunk("{}") + "0\r\nX-Trailer: 1\r\n\r\n").await;
    let mut call = nginx.call().await;
    call.body().await;
    call.finish(answer("502 Bad Gateway", &[], "no server")).await;
    assert_eq!(client.response().await.text(), "no server");
    let mut client = proxy.sent(post(CHAT, r#"{"text":"held"}"#)).await;
    proxy.await_tiny_starting().await;
    nginx.wake();
    nginx.call().await.echo().await;
    assert_eq!(client.response().await.json()["text"], "held");
    proxy.stop(&[("completed", 3)]).await;
}

#[tokio::test]
async fn long_chunked_error_is_forwarded_whole() {
    let mut gateway = TestUpstream::cold().await;
    let (_pod, proxy) = behind(&gateway, "").await;
    let mut client = proxy.sent(chat("long")).await;
    let mut call = gateway.call().await;
    call.body().await;
    call.send("HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let part = "0123456789".repeat(4 << 10);
    for _ in 0..3 {
        call.send(chunk(&part)).await;
    }
    let head = soon("the head", client.head()).await.unwrap();
    assert_eq!(head.status(), 503);
    call.finish(chunk("end") + LAST).await;
    assert_eq!(client.rest().await.unwrap(), part.repeat(3) + "end");
    proxy.stop(&[("completed", 1)]).await;
}
