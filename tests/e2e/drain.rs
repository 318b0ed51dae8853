//! Shutdown: orderly, with an outcome for every request.

use anteroom::drain::StopSignal;
use tokio::net::TcpStream;

use crate::support::{
    TestProxy, TestUpstream, h2, route, routes, soon, until,
    upstream::{LAST, STREAM, answer, chunk},
    wire::{BodyPart, CHAT, chat, get, streaming},
};
use anteroom::app::Command;

async fn start(times: &str, url: &str, more: &str) -> TestProxy {
    TestProxy::start(&format!("{times}\n{}", routes(&[route("tiny", url, more)]))).await
}

async fn stop(proxy: &TestProxy, request: StopSignal) {
    proxy.commands.send(Command::Stop(request)).await.unwrap();
}

async fn unready(proxy: &TestProxy) {
    until("not to be ready", async || proxy.admin("/readyz").await.status() == 503).await;
}

async fn refuses_connections(proxy: &TestProxy) {
    until("nothing to be accepted", async || TcpStream::connect(proxy.address).await.is_err()).await;
}

#[tokio::test]
async fn unready_proxy_serves_during_the_drain_delay() {
    let (mut up, down) = (TestUpstream::warm().await, TestUpstream::cold().await);
    let config = routes(&[route("tiny", &up.url(), ""), route("down", &down.url(), "")]);
    let proxy = TestProxy::start(&format!("drainDelay: 10m\n{config}")).await;
    let mut client = proxy.sent(chat("before")).await;
    up.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(proxy.admin("/readyz").await.status(), 200);

    stop(&proxy, StopSignal::Terminate).await;
    unready(&proxy).await;
    assert_eq!(proxy.admin("/livez").await.status(), 200, "a restart would help nobody");
    let mut client = proxy.sent(chat("after")).await;
    up.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    // While draining, no new cold start begins.
    let refused = proxy.ask(crate::support::wire::post(CHAT, r#"{"model":"down"}"#)).await;
    refused.is_error(503, "draining");
    assert_eq!((refused.get("retry-after"), refused.get("x-should-retry")), (Some("1"), Some("true")));
    assert_eq!((proxy.refused("draining").await, down.accepted()), (1, 0));

    // A second stop request ends the drain at once.
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn drain_ends_with_the_last_request() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("drainTimeout: 10m", &upstream.url(), "").await;
    let mut idle = proxy.client().await;
    assert_eq!(idle.ask(get("/health")).await.status(), 200);
    let mut silent = proxy.client().await;
    let mut client = proxy.sent(streaming("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    let mut sender = h2::connect(proxy.address).await;
    let request = sender.send_request(h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#));
    let mut second = upstream.call().await;

    stop(&proxy, StopSignal::Interrupt).await;
    refuses_connections(&proxy).await;
    assert_eq!(idle.end().await, b"", "nobody waits for who has nothing under way");
    assert_eq!(silent.end().await, b"");
    for token in ["one", "two"] {
        call.send(chunk(token)).await;
        client.parts_until(token).await;
    }
    call.finish(LAST).await;
    assert_eq!(client.rest().await.as_deref(), Some(""));
    assert_eq!(client.end().await, b"", "and its connection is not kept");
    second.body().await;
    second.finish(answer("200 OK", &[], "{}")).await;
    assert_eq!(soon("HTTP/2", request).await.unwrap().status(), 200);
    // Otherwise only the timeout of ten minutes would end the drain.
    proxy.stop(&[("completed", 2)]).await;
}

#[tokio::test]
async fn drain_serves_held_requests_once_target_is_ready() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = start("drainTimeout: 10m", &upstream.url(), "").await;
    let mut client = proxy.sent(chat("held")).await;
    proxy.await_tiny_held(1).await;
    stop(&proxy, StopSignal::Interrupt).await;
    refuses_connections(&proxy).await;
    proxy.await_tiny_held(1).await;
    upstream.wake();
    upstream.call().await.echo().await;
    let response = client.response().await;
    assert_eq!((response.status(), response.get("connection")), (200, Some("close")));
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn drain_rejects_held_requests_without_target() {
    let upstream = TestUpstream::cold().await;
    let keepalive = "keepalive: { after: 10ms, interval: 10ms }";
    // A quarter of the timeout is reserved for sending the errors.
    let proxy = start("drainTimeout: 8s", &upstream.url(), keepalive).await;
    let mut client = proxy.sent(chat("held")).await;
    let mut stream = proxy.sent(streaming("hears")).await;
    stream.head().await.unwrap();
    proxy.await_tiny_held(2).await;
    stop(&proxy, StopSignal::Interrupt).await;
    let response = client.response().await;
    response.is_error(503, "draining");
    assert_eq!((response.get("retry-after"), response.get("x-should-retry")), (Some("1"), Some("true")));
    let rest = stream.rest().await.expect("an orderly end");
    let event = rest.lines().rfind(|line| line.starts_with("data: ")).expect("an event");
    assert!(event.contains(r#""code":"draining""#), "{event}");
    proxy.stop(&[("draining", 2)]).await;
}

#[tokio::test]
async fn requests_beyond_drain_timeout_are_cut_off() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("drainTimeout: 200ms", &upstream.url(), "").await;
    let mut client = proxy.sent(streaming("endless")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    let mut unanswered = proxy.sent(chat("unanswered")).await;
    let second = upstream.call().await;
    stop(&proxy, StopSignal::Interrupt).await;
    assert_eq!(client.part().await, BodyPart::Broken);
    assert_eq!(unanswered.end().await, b"");
    call.gone().await;
    second.gone().await;
    proxy.stop(&[("draining", 2)]).await;
}

#[tokio::test]
async fn second_stop_request_ends_at_once() {
    let (mut upstream, cold) = (TestUpstream::warm().await, TestUpstream::cold().await);
    let config = routes(&[route("tiny", &upstream.url(), ""), route("cold", &cold.url(), "")]);
    let proxy = TestProxy::start(&format!("drainDelay: 10m\ndrainTimeout: 10m\n{config}")).await;
    let mut client = proxy.sent(streaming("endless")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    let mut held = proxy.sent(crate::support::wire::post(CHAT, r#"{"model":"cold"}"#)).await;
    until("held", async || proxy.route("cold").await["held"] == 1).await;
    stop(&proxy, StopSignal::Terminate).await;
    unready(&proxy).await;
    proxy.stop(&[("draining", 2)]).await;
    assert_eq!(client.part().await, BodyPart::Broken);
    held.end().await;
}

#[tokio::test]
async fn draining_closes_kept_connections() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start("drainTimeout: 10m", &upstream.url(), "").await;
    let mut client = proxy.sent(chat("one") + &chat("two")).await;
    let call = upstream.call().await;
    stop(&proxy, StopSignal::Interrupt).await;
    refuses_connections(&proxy).await;
    call.echo().await;
    let response = client.response().await;
    assert_eq!((response.status(), response.get("connection")), (200, Some("close")));
    // The pipelined request behind the last response is not accepted; closing the connection signals that.
    assert_eq!(client.end().await, b"");
    assert_eq!(upstream.requests(), 1);
    proxy.stop(&[("completed", 1)]).await;
}
