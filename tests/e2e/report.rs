//! Metrics: all documented ones exist, admitted requests equal held, in-flight and ended ones, and clients cannot
//! create series.

use crate::support::{
    TestProxy, TestUpstream, route, routes,
    upstream::{LAST, STREAM},
    wire::{CHAT, chat, get, post, post_with, streaming},
};

/// Returns the series of a scrape, without their values.
fn series(text: &str) -> Vec<&str> {
    let mut series: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap().0)
        .collect();
    series.sort_unstable();
    series
}

#[tokio::test]
async fn documented_metrics_exist() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(chat("x")).await;
    proxy.await_tiny_starting().await;
    upstream.wake();
    upstream.call().await.echo().await;
    client.response().await;
    proxy.await_outcome("completed", 200, 1).await;
    proxy.ask(get("/nothing")).await.is_error(404, "unknown_path");
    let text = proxy.metrics().await;
    assert!(text.ends_with("# EOF\n"));
    for expected in [
        r#"anteroom_requests_total{route="tiny",outcome="completed",code="200",cold_start="true"} 1"#,
        r#"anteroom_admitted_requests_total{route="tiny"} 1"#,
        r#"anteroom_refused_requests_total{route="",reason="unknown_path",code="404"} 1"#,
        r#"anteroom_held_requests{route="tiny"} 0"#,
        r#"anteroom_held_bytes{route="tiny"} 0"#,
        r#"anteroom_in_flight_requests{route="tiny"} 0"#,
        r#"anteroom_endpoints{route="tiny",state="ready"} 1"#,
        r#"anteroom_endpoints{route="tiny",state="not_ready"} 0"#,
        r#"anteroom_hold_duration_seconds_count{route="tiny",outcome="dispatched"} 1"#,
        r#"anteroom_hold_duration_seconds_bucket{le="1800.0",route="tiny",outcome="dispatched"} 1"#,
        r#"anteroom_time_to_first_byte_seconds_count{route="tiny",cold_start="true"} 1"#,
        r#"anteroom_cold_start_duration_seconds_count{route="tiny",outcome="completed",kind="cold_start"} 1"#,
        r#"anteroom_cold_start_actuation_seconds_count{route="tiny",kind="cold_start"} 1"#,
        r#"anteroom_cold_start_phase_duration_seconds_count{route="tiny",phase="load"} 1"#,
        r#"anteroom_cold_start_phase_duration_seconds_count{route="tiny",phase="first_byte"} 1"#,
        r#"anteroom_cold_start_phase_duration_seconds_bucket{le="1800.0",route="tiny",phase="load"} 1"#,
        "anteroom_buffered_bytes 0",
    ] {
        assert!(text.lines().any(|line| line == expected), "{expected}\nin\n{text}");
    }
    // OpenMetrics: each family is described exactly once.
    let described: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let mut once = described.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(described.len(), once.len(), "{described:?}");
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn admitted_is_held_in_flight_and_ended() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "concurrency: { max: 2, rampStart: 2 }").await;
    let balance = async |held: u64, in_flight: u64, ended: u64| {
        proxy.await_tiny_held(held).await;
        proxy.await_tiny_in_flight(in_flight).await;
        let text = proxy.metrics().await;
        let sum = |name: &str| -> u64 {
            let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
            lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
        };
        let parts = [
            sum("anteroom_held_requests"),
            sum("anteroom_in_flight_requests"),
            sum("anteroom_requests_total"),
        ];
        assert_eq!(parts, [held, in_flight, ended]);
        assert_eq!(sum("anteroom_admitted_requests_total"), held + in_flight + ended);
    };
    let mut clients = Vec::new();
    for number in 0..5 {
        clients.push(proxy.sent(streaming(&number.to_string())).await);
        proxy.await_tiny_held(number + 1).await;
    }
    balance(5, 0, 0).await;
    // One client disconnects; its outcome is counted as soon as it is no longer held.
    clients.pop();
    proxy.await_outcome("client_gone", 499, 1).await;
    balance(4, 0, 1).await;
    upstream.wake();
    let (mut one, two) = (upstream.call().await, upstream.call().await);
    balance(2, 2, 1).await;
    one.body().await;
    one.send(STREAM).await;
    one.finish(LAST).await;
    proxy.await_outcome("completed", 200, 1).await;
    balance(1, 2, 2).await;
    // Rejected requests do not count as admitted.
    proxy.ask(post(CHAT, "{")).await.is_error(400, "invalid_request");
    proxy.ask(post(CHAT, r#"{"model":"x"}"#)).await.is_error(404, "model_not_found");
    balance(1, 2, 2).await;
    drop((two, clients));
    proxy.await_tiny_held(0).await;
    proxy.await_tiny_in_flight(0).await;
    proxy.stop(&[("completed", 1), ("client_gone", 4)]).await;
}

#[tokio::test]
async fn clients_cannot_create_series() {
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let config = routes(&[route("tiny", &upstream.url(), ""), route("other", &upstream.url(), "")]);
    let proxy = TestProxy::start(&config).await;
    let burst = async |number: usize| {
        let odd = format!("odd-{number}\\\"\\n{{}}");
        let mut client = proxy.client().await;
        client.ask(chat("x")).await;
        client.ask(post(CHAT, &format!(r#"{{"model":"{odd}"}}"#))).await.is_error(404, "model_not_found");
        client.ask(get(&format!("/path-{number}"))).await.is_error(404, "unknown_path");
        client.ask(get(&format!("/v1/models/odd-{number}"))).await.is_error(404, "model_not_found");
        client.ask(get(CHAT).replace("GET", &format!("M{number}"))).await.is_error(405, "method_not_allowed");
        let fields =
            [("x-request-id", &*format!("id-{number}")), ("User-Agent", &*format!("agent-{number}"))];
        client.ask(post_with(CHAT, &fields, r#"{"model":"tiny","text":""}"#)).await;
        client.ask(chat("x").replace("api.test", &format!("host-{number}.test"))).await;
    };
    burst(0).await;
    proxy.await_outcome("completed", 200, 3).await;
    let before = proxy.metrics().await;
    for number in 1..=20 {
        burst(number).await;
    }
    proxy.await_outcome("completed", 200, 63).await;
    let after = proxy.metrics().await;
    assert_eq!(series(&before), series(&after));
    assert!(!after.contains("odd-"), "{after}");
    proxy.stop(&[("completed", 63)]).await;
}

#[tokio::test]
async fn unusual_status_creates_no_series() {
    let upstream = TestUpstream::warm().await.automatic(async |mut call| {
        let status = call.text().await;
        call.finish(crate::support::upstream::answer(&format!("{status} Odd"), &[], "")).await;
    });
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    for status in 600..650 {
        assert_eq!(proxy.ask(chat(&status.to_string())).await.status(), status);
    }
    let labels = ["outcome=\"completed\"", "code=\"other\""];
    crate::support::until("all to be counted", async || {
        proxy.metric("anteroom_requests_total", &labels).await == 50
    })
    .await;
    proxy.stop(&[("completed", 50)]).await;
}
