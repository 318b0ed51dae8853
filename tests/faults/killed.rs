//! Model servers killed with SIGKILL, as the kernel does when memory runs out.

use std::time::Duration;

use crate::{
    served::{ANTEROOM, ProxyProcess},
    sim::{SimAddress, prompt, streaming},
    support::{Wire, route, routes, until, wire::BodyPart},
};
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process};
use tokio::time::{sleep, timeout};

const HOUR: &str = "1h";

/// Starts a proxy with one `url` route and these further settings.
async fn start_proxy_before(place: &SimAddress, more: &str) -> ProxyProcess {
    ProxyProcess::start(&routes(&[route("tiny", &place.url(), more)])).await
}

/// A server is killed before the head of a response: the request returns to its place in the queue, ahead of later
/// ones, and the next server serves it. A request that kills two servers is not sent to a third, and the request behind
/// it is served.
#[tokio::test]
async fn request_without_head_moves_to_one_other_server() {
    let place = SimAddress::reserve();
    let mut first = place.up(&["--time-to-first-token", HOUR]).await;
    let proxy = start_proxy_before(&place, "concurrency: { max: 1 }").await;
    let mut lucky = proxy.sent(prompt("once is forgiven")).await;
    first.runs(1).await;
    first.kill();
    let mut second = place.up(&[]).await;
    assert_eq!(lucky.response().await.status(), 200);
    assert_eq!(second.answered().await, 1);
    second.kill();

    let mut first = place.up(&["--time-to-first-token", HOUR]).await;
    let mut deadly = proxy.sent(prompt("kills servers")).await;
    first.runs(1).await;
    let mut later = proxy.sent(prompt("came later")).await;
    proxy.held(1).await;
    first.kill();
    proxy.held(2).await;
    let mut second = place.up(&["--time-to-first-token", HOUR]).await;
    second.runs(1).await;
    second.kill();
    // If the later request had been dispatched first, the deadly one would still be held now.
    deadly.response().await.is_error(502, "upstream_error");
    proxy.held(1).await;
    let third = place.up(&[]).await;
    assert_eq!(later.response().await.status(), 200);
    assert_eq!(third.answered().await, 1, "the deadly one never came here");
    proxy.stop().await.assert_outcomes(&[("completed", 2), ("upstream_error", 1)]);
}

/// A server is killed with many unanswered requests in flight, over reused connections: the next server serves each of
/// them.
#[tokio::test]
async fn headless_requests_move_to_the_next_server() {
    all_are_served_by_the_next_server("").await;
}

/// Many unanswered requests of a route without models, whose bodies stream to the server: the next server serves each
/// of them.
#[tokio::test]
async fn streamed_bodies_are_served_by_the_next_server() {
    all_are_served_by_the_next_server(", match: {}").await;
}

async fn all_are_served_by_the_next_server(more: &str) {
    const MANY: u64 = 24;
    let place = SimAddress::reserve();
    let mut first = place.up(&["--time-to-first-token", "3s"]).await;
    let proxy = start_proxy_before(&place, &format!("concurrency: {{ max: 64, rampStart: 64 }}{more}")).await;
    let mut clients = Vec::new();
    for _ in 0..MANY {
        clients.push(Wire::connect(proxy.address).await);
    }
    for client in &mut clients {
        client.send(prompt("makes a connection")).await;
    }
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    for client in &mut clients {
        client.send(prompt("in flight")).await;
    }
    first.runs(MANY).await;
    first.kill();
    let second = place.up(&[]).await;
    for client in &mut clients {
        assert_eq!(client.response().await.status(), 200);
    }
    assert_eq!(second.answered().await, MANY);
    proxy.stop().await.assert_outcomes(&[("completed", 2 * MANY)]);
}

/// A server is killed in the middle of a stream: the client sees its response break off, and no other server gets the
/// request.
#[tokio::test]
async fn broken_stream_is_seen_by_its_client_only() {
    let place = SimAddress::reserve();
    let mut first = place.up(&["--inter-token-time", HOUR]).await;
    let proxy = start_proxy_before(&place, "").await;
    let mut clients = Vec::new();
    for number in 0..8 {
        let mut client = proxy.sent(streaming(&format!("stream {number}"))).await;
        assert_eq!(client.head().await.unwrap().status(), 200);
        assert!(matches!(client.part().await, BodyPart::Data(_)));
        clients.push(client);
    }
    first.kill();
    for client in &mut clients {
        assert_eq!(client.rest().await, None, "an end that is none");
    }
    let second = place.up(&[]).await;
    assert_eq!(proxy.ask(prompt("the next one")).await.status(), 200);
    assert_eq!(second.answered().await, 1);
    proxy.stop().await.assert_outcomes(&[("completed", 1), ("upstream_error", 8)]);
}

/// Returns a route to a process that records its pid, starts a child, as vLLM does for its engine, and then runs
/// `then`.
fn process(pids: &std::path::Path, then: &str) -> String {
    let script = format!(r#"sleep 600 & echo $! >> "$1"; echo $$ >> "$1"; {then}"#);
    let command = serde_json::json!(["sh", "-c", script, "-", pids, ANTEROOM, "{port}"]);
    let target = format!("target: {{ process: {{ command: {command} }} }}");
    format!(
        "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nallowedHosts: [\"*\"]\nworkers: 1\nroutes:\n  - {{ name: tiny, match: {{ models: [tiny] }}, {target}, readiness: {{ interval: 10ms }} }}\n"
    )
}

fn recorded_pids(pids: &std::path::Path) -> Vec<Pid> {
    let text = std::fs::read_to_string(pids).unwrap_or_default();
    text.lines().map(|line| Pid::from_raw(line.parse().unwrap()).unwrap()).collect()
}

fn alive(pid: &Pid) -> bool {
    test_kill_process(*pid).is_ok()
}

/// A server is killed while loading: all held requests fail at once, and the error names the signal; the child process
/// is killed too. The next request triggers a new start after the backoff.
#[tokio::test]
async fn crash_while_loading_fails_held_requests() {
    let pids = tempfile::NamedTempFile::new().unwrap();
    let then =
        r#"[ $(wc -l < "$1") -gt 2 ] || exec "$2" sim --port "$3" --hang-load; exec "$2" sim --port "$3""#;
    let proxy = ProxyProcess::start(&process(pids.path(), then)).await;
    let mut waiting = Vec::new();
    for number in 0..5 {
        waiting.push(proxy.sent(prompt(&format!("waits {number}"))).await);
    }
    proxy.held(5).await;
    until("a server", async || recorded_pids(pids.path()).len() == 2).await;
    let [child, server] = recorded_pids(pids.path()).try_into().unwrap();
    kill_process(server, Signal::KILL).unwrap();
    for client in &mut waiting {
        let response = client.response().await;
        response.is_error(503, "cold_start_failed");
        assert!(response.text().contains("SIGKILL"), "{}", response.text());
    }
    until("its child to end", async || !alive(&child)).await;
    assert_eq!(proxy.ask(prompt("the next")).await.status(), 200);
    assert_eq!(recorded_pids(pids.path()).len(), 4, "two starts");
    proxy.stop().await.assert_outcomes(&[("cold_start_failed", 5), ("completed", 1)]);
}

/// A server is killed with an unanswered request: the request is held, starts the next server, and gets its response
/// from it.
#[tokio::test]
async fn crash_while_serving_restarts_for_the_unanswered() {
    let pids = tempfile::NamedTempFile::new().unwrap();
    let slow = r#"[ $(wc -l < "$1") -gt 2 ] || exec "$2" sim --port "$3" --time-to-first-token 1h; exec "$2" sim --port "$3""#;
    let proxy = ProxyProcess::start(&process(pids.path(), slow)).await;
    let mut client = proxy.sent(prompt("x")).await;
    proxy.in_flight(1).await;
    let [child, server] = recorded_pids(pids.path()).try_into().unwrap();
    kill_process(server, Signal::KILL).unwrap();
    assert_eq!(client.response().await.status(), 200);
    assert!(!alive(&child) && recorded_pids(pids.path()).len() == 4);
    proxy.stop().await.assert_outcomes(&[("completed", 1)]);
}

/// Anteroom itself is killed while its model server is slow to stop: the next Anteroom at the same address does not
/// start a second server, for which the machine might lack memory, and reports what it waits for.
#[tokio::test]
async fn restart_waits_for_previous_server() {
    let pids = tempfile::NamedTempFile::new().unwrap();
    // The shell ignores SIGTERM; only its child, the stand-in, exits.
    let stubborn = r#"trap "" TERM; "$2" sim --port "$3" & while :; do wait; sleep 600; done"#;
    let config = process(pids.path(), stubborn).replace("command:", "stopTimeout: 1h, command:");
    let mut first = ProxyProcess::start(&config).await;
    assert_eq!(first.ask(prompt("x")).await.status(), 200);
    let [_, server] = recorded_pids(pids.path()).try_into().unwrap();
    first.signal(Signal::KILL);
    first.exited().await;

    let config = config.replacen("127.0.0.1:0", &first.address.to_string(), 1);
    let second = ProxyProcess::start(&config).await;
    let mut client = second.sent(prompt("y")).await;
    second.logged("waiting for an earlier model server of this route to stop").await;
    assert!(alive(&server) && recorded_pids(pids.path()).len() == 2, "only the first one runs");
    kill_process_group(server, Signal::KILL).unwrap();
    assert_eq!(client.response().await.status(), 200);
    let [_, _, _, server] = recorded_pids(pids.path()).try_into().unwrap();
    kill_process_group(server, Signal::KILL).unwrap();
    second.logged("the target has died").await;
    second.stop().await.assert_outcomes(&[("completed", 1)]);
}

/// A server that is stopped with a request in flight (SIGSTOP, or a hung GPU) closes nothing and sends nothing.
/// Distinguishing it from a long prompt takes 10 s of silence and three probes, half a minute in all; later requests
/// are held, and served once the server continues.
#[tokio::test]
async fn stopped_server_gets_no_requests_until_resumed() {
    let place = SimAddress::reserve();
    let server = place.up(&[]).await;
    let proxy = start_proxy_before(&place, "readiness: { interval: 10ms, timeout: 100ms }").await;
    // The first request waits for a probe, so only the second one has the usual response time.
    for _ in 0..2 {
        assert_eq!(proxy.ask(prompt("is answered at once")).await.status(), 200);
    }
    server.stop().await;
    let mut in_flight = proxy.sent(prompt("nobody answers it")).await;
    const SILENT: &str = "the server answers neither requests nor probes; sending no more requests to it";
    let noticed = async {
        while proxy.count_log_lines(SILENT) == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(300), noticed).await.expect(SILENT);
    let mut later = proxy.sent(prompt("would wait there, too")).await;
    proxy.held(1).await;
    server.signal(Signal::CONT);
    assert_eq!(later.response().await.status(), 200);
    assert_eq!(in_flight.response().await.status(), 200, "it was not given up");
    proxy.stop().await.assert_outcomes(&[("completed", 4)]);
}
