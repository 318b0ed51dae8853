//! An unread log: standard error is a pipe, and it is full.

use std::net::SocketAddr;

use crate::{
    law,
    served::ProxyProcess,
    sim::prompt,
    support::{
        TestUpstream, Wire, route, routes, until,
        wire::{CHAT, post},
    },
};

/// Route to a process that prints far more than a pipe holds (64 KiB on Linux), then exits.
const CHATTY_ROUTE: &str = r#"  - name: chatty
    match: { models: [chatty] }
    target: { process: { command: [sh, -c, "yes $(printf %0900d 0) | head -n 4000; exit 3 # {port}"] } }
"#;

async fn metric(proxy: &ProxyProcess, name: &str) -> u64 {
    let text = law::ask(proxy.admin, "/metrics").await.text();
    let line = text.lines().find(|line| line.starts_with(name)).expect(name);
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Returns an HTTP/2 preface and acknowledgements of PINGs that were never sent: h2 logs a warning for each.
fn stray_pings(count: usize) -> Vec<u8> {
    const H2_PREFACE_AND_SETTINGS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    [H2_PREFACE_AND_SETTINGS, &b"\0\0\x08\x06\x01\0\0\0\0answered".repeat(count)].concat()
}

/// Opens a connection to each HTTP/2 listener and sends `count` stray acknowledgements of PINGs on it.
async fn send_stray_pings(proxy: &ProxyProcess, scaler: SocketAddr, count: usize) -> [Wire; 2] {
    let mut clients = [Wire::connect(proxy.address).await, Wire::connect(scaler).await];
    for client in &mut clients {
        client.send(stray_pings(count)).await;
    }
    clients
}

/// Returns an address that was free a moment ago.
fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// 9,000 warnings on each of two listeners stay below the limit on control frames, and would make 2 MB of log.
#[tokio::test]
async fn clients_cannot_fill_the_log() {
    let upstream = TestUpstream::warm().await.automatic(|call| async move { call.echo().await });
    let scaler = free_address();
    let config = format!("scaler: {scaler}\n{}", routes(&[route("tiny", &upstream.url(), "")]));
    let proxy = ProxyProcess::start(&config).await;
    let clients = send_stray_pings(&proxy, scaler, 9_000).await;
    let said = proxy.logged("log lines were left out").await;
    assert_eq!(said["mostly_of"], "h2::proto::ping_pong", "{said}");
    until("all to be counted", async || {
        // 100 lines at once and 5 per second are logged.
        metric(&proxy, "anteroom_limited_log_lines_total").await > 17_000
    })
    .await;
    assert!(proxy.count_log_lines("recv PING ack that we never sent") < 1_000);
    assert_eq!(proxy.ask(prompt("a neighbour")).await.status(), 200);
    drop(clients);
    proxy.stop().await.assert_outcomes(&[("completed", 1)]);
}

/// 4,000 lines of 900 bytes are 3.6 MB: the pipe holds 64 KiB, the queue 1,024 lines; the rest is dropped and counted.
/// Everything else continues normally, and once the log is read, it reports the number of dropped lines.
#[tokio::test]
async fn unread_log_blocks_nothing_and_drops_are_counted() {
    let upstream = TestUpstream::warm().await.automatic(|call| async move { call.echo().await });
    let scaler = free_address();
    let config = format!("scaler: {scaler}\n{}{CHATTY_ROUTE}", routes(&[route("tiny", &upstream.url(), "")]));
    let proxy = ProxyProcess::spawn(&config, |folder| {
        let mut command = std::process::Command::new("env");
        command.args(["RUST_LOG=debug", crate::served::ANTEROOM]).args(crate::served::arguments(folder));
        command
    })
    .await;
    let chatty = proxy.ask(post(CHAT, r#"{"model":"chatty","messages":[]}"#));
    let (unread, failed) = tokio::join!(proxy.unread_log(), chatty);
    failed.is_error(503, "cold_start_failed");
    assert!(failed.text().contains("exited with code 3"), "{}", failed.text());
    assert_eq!(proxy.ask(prompt("a neighbour")).await.status(), 200);
    until("dropped lines to be counted", async || {
        metric(&proxy, "anteroom_dropped_log_lines_total").await > 0
    })
    .await;

    // 2,400 acknowledgements are 41 KB of frames.
    let clients = send_stray_pings(&proxy, scaler, 2_400).await;
    for _ in 0..20 {
        assert_eq!(proxy.ask(prompt("a neighbour of a flood")).await.status(), 200);
    }

    drop((unread, clients));
    let said = proxy.logged("log lines were dropped").await;
    assert!(said["dropped"].as_u64() > Some(0), "{said}");
    proxy.stop().await.assert_outcomes(&[("cold_start_failed", 1), ("completed", 21)]);
}
