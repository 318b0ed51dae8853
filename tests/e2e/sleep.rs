//! vLLM's sleep mode through the real listener, with a stand-in for vLLM as a process.

use std::net::SocketAddr;

use tokio::net::TcpStream;

use crate::support::{
    TestProxy, Wire, until,
    wire::{CHAT, get, post},
};

const BINARY: &str = env!("CARGO_BIN_EXE_anteroom");

/// Starts a proxy whose model server sleeps as soon as it is idle.
async fn sleeper(process: &str, arguments: &[&str]) -> TestProxy {
    let command = [BINARY, "sim", "--port", "{port}", "--model", "tiny", "--enable-sleep-mode"];
    let command =
        command.iter().chain(arguments).map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
    TestProxy::start(&format!(
        "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nallowedHosts: [\"*\"]\nworkers: 1\nroutes:\n  - name: tiny\n    match: {{ models: [tiny] }}\n    \
         readiness: {{ interval: 10ms }}\n    target:\n      process: {{ command: [{command}], whenIdle: sleep, \
         idleTimeout: 20ms, {process} }}\n"
    ))
    .await
}

fn chat(text: &str) -> String {
    post(CHAT, &format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":"{text}"}}]}}"#))
}

/// Waits until the server sleeps, and returns its address.
async fn asleep(proxy: &TestProxy) -> SocketAddr {
    until("sleep", async || proxy.route("tiny").await["state"] == "sleeping").await;
    let endpoint = proxy.route("tiny").await["endpoints"][0].clone();
    assert_eq!(endpoint["ready"], false, "{endpoint}");
    endpoint["address"].as_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn vllm_sleeps_when_idle_and_wakes_unchanged() {
    for level in 1..=2 {
        let proxy = sleeper(&format!("sleepLevel: {level}"), &[]).await;
        let says = async || {
            let answer = proxy.ask(chat("Who waits at the door?")).await;
            assert_eq!(answer.status(), 200, "{}", answer.text());
            answer.json()["choices"][0]["message"]["content"].clone()
        };
        let before = says().await;
        let server = asleep(&proxy).await;
        assert_eq!(
            Wire::connect(server).await.ask(get("/health")).await.status(),
            200,
            "it says nothing of sleep"
        );
        assert_eq!(says().await, before, "level {level}");
        assert_eq!(asleep(&proxy).await, server, "the same process");
        let records = proxy.admin("/api/v1/cold-starts").await.json();
        let kinds = [&records["cold_starts"][0]["kind"], &records["cold_starts"][1]["kind"]];
        assert_eq!(kinds, ["wake", "cold_start"], "{records}");
        for path in ["/wake_up", "/sleep", "/collective_rpc"] {
            proxy.ask(post(path, "{}")).await.is_error(404, "unknown_path");
        }
        proxy.stop(&[("completed", 2)]).await;
        assert!(TcpStream::connect(server).await.is_err(), "a server that sleeps is stopped with the proxy");
    }
}

#[tokio::test]
async fn requests_are_held_while_it_sleeps() {
    let proxy = sleeper("sleepLevel: 1", &["--wake-time", "500ms"]).await;
    assert_eq!(proxy.ask(chat("first")).await.status(), 200);
    asleep(&proxy).await;
    let mut clients = Vec::new();
    for number in 0..8 {
        clients.push(proxy.sent(chat(&format!("number {number}"))).await);
    }
    for client in &mut clients {
        let answer = client.response().await;
        assert_eq!(answer.status(), 200, "{}", answer.text());
    }
    let record = proxy.admin("/api/v1/cold-starts?limit=1").await.json()["cold_starts"][0].clone();
    assert_eq!((&record["kind"], &record["outcome"]), (&"wake".into(), &"completed".into()), "{record}");
    let phases: Vec<_> =
        record["phases"].as_array().unwrap().iter().map(|phase| phase["name"].clone()).collect();
    assert_eq!(phases, ["signal", "load", "dispatch", "first_byte"]);
    assert!(record["phases"][1]["duration_ms"].as_f64() >= Some(500.0), "the wake: {record}");
    proxy.stop(&[("completed", 9)]).await;
}
