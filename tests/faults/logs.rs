//! A log that nobody reads: standard error is a pipe, and it is full.

use crate::{
    law,
    served::Served,
    sim::prompt,
    support::{
        Upstream, route, routes, until,
        wire::{CHAT, post},
    },
};

/// A route to a process that prints far more than a pipe takes (64 KiB on Linux), and dies.
const CHATTY: &str = r#"  - name: chatty
    match: { models: [chatty] }
    target: { process: { command: [sh, -c, "yes $(printf %0900d 0) | head -n 4000; exit 3 # {port}"] } }
"#;

async fn metric(proxy: &Served, name: &str) -> u64 {
    let text = law::ask(proxy.admin, "/metrics").await.text();
    let line = text.lines().find(|line| line.starts_with(name)).expect(name);
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// 4,000 lines of 900 bytes are 3.6 MB: 64 KiB fit into the pipe, 1,024 lines into the queue, the others are dropped and
/// counted. Everything else goes on as if somebody read them; once somebody does, the log says how many are missing.
#[tokio::test]
async fn unread_log_blocks_nothing_and_drops_are_counted() {
    let upstream = Upstream::warm().await.automatic(|call| async move { call.echo().await });
    let config = routes(&[route("tiny", &upstream.url(), "")]) + CHATTY;
    let proxy = Served::spawn(&config, |folder| {
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

    drop(unread);
    let said = proxy.logged("log lines were dropped").await;
    assert!(said["dropped"].as_u64() > Some(0), "{said}");
    proxy.stop().await.are(&[("cold_start_failed", 1), ("completed", 1)]);
}
