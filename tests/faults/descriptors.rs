//! Exhaustion of file descriptors: admitted requests continue, new connections wait, nothing spins, and service
//! recovers once descriptors are free.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use anteroom::error::Outcome;
use tokio::{sync::watch, time::Instant};

use crate::{
    memory::InMemoryProxy,
    served::ProxyProcess,
    sim::prompt,
    support::{
        TestUpstream, Wire, h2, route, routes, soon, until,
        upstream::UpstreamCall,
        wire::{CHAT, chat, get},
    },
};

/// Just enough descriptors for the proxy to start, so that they run out soon.
const DESCRIPTORS: u64 = 128;

/// Starts a server that responds to its requests once the gate is open.
async fn gated() -> (TestUpstream, watch::Sender<bool>) {
    let (gate, opened) = watch::channel(false);
    let answer = move |call: UpstreamCall| {
        let mut opened = opened.clone();
        async move {
            // A dropped gate means that the test is over.
            if opened.wait_for(|open| *open).await.is_ok() {
                call.echo().await;
            }
        }
    };
    (TestUpstream::warm().await.automatic(answer), gate)
}

/// More clients than descriptors: the proxy accepts as many as leave descriptors for its other work, and serves them;
/// the others wait in the accept backlog and are served afterwards. Nothing fails, no connection is accepted only to be
/// dropped, and nothing stays open.
#[tokio::test]
async fn clients_beyond_descriptors_wait_for_accept() {
    let (upstream, gate) = gated().await;
    let config = routes(&[route("tiny", &upstream.url(), "concurrency: { max: 16, rampStart: 16 }")]);
    let proxy = ProxyProcess::with_descriptors(&config, DESCRIPTORS).await;
    // The shortage is logged at the start.
    proxy.logged("limits.maxConnections exceeds the limit of open files").await;
    let before = proxy.resources();
    let mut clients = Vec::new();
    for number in 0..200 {
        clients.push(proxy.sent(chat(&format!("{number}"))).await);
    }
    proxy.in_flight(16).await;
    // 64 are accepted (128 less 64): 16 in flight, 48 held.
    proxy.held(48).await;
    gate.send_replace(true);
    for mut client in clients {
        assert_eq!(client.response().await.status(), 200);
    }
    assert_eq!((upstream.requests(), proxy.count_log_lines("cannot accept")), (200, 0));
    proxy.await_released_resources(before).await;
    proxy.stop().await.assert_outcomes(&[("completed", 200)]);
}

/// One HTTP/2 connection carries more requests than there are descriptors to dispatch them, and further clients
/// connect. Requests that cannot be dispatched wait without blaming the endpoint: it stays ready, dispatched requests
/// get responses, and all are served in the end. Accepting and connecting pause between attempts.
#[tokio::test]
async fn local_exhaustion_does_not_blame_the_endpoint() {
    const CONCURRENT_REQUESTS: usize = 150;
    let (upstream, gate) = gated().await;
    let more = "concurrency: { max: 1000, rampStart: 1000 }, upstream: { connectTimeout: 400ms }";
    let proxy =
        ProxyProcess::with_descriptors(&routes(&[route("tiny", &upstream.url(), more)]), DESCRIPTORS).await;
    let mut client = h2::connect(proxy.address).await;
    // The probe is done once, and this also measures the CPU time for as many requests.
    gate.send_replace(true);
    let body = r#"{"model":"tiny"}"#;
    for _ in 0..CONCURRENT_REQUESTS {
        let request = client.send_request(h2::post(proxy.address, CHAT, body));
        assert_eq!(soon("an answer", request).await.unwrap().status(), 200);
    }
    let worked = proxy.ticks();
    gate.send_replace(false);

    // Connect while descriptors are available.
    let mut admin = Wire::connect(proxy.admin).await;
    assert_eq!(admin.ask(get("/livez")).await.status(), 200);
    let began = Instant::now();
    let before = upstream.requests();
    let asked: Vec<_> = (0..CONCURRENT_REQUESTS)
        .map(|_| tokio::spawn(client.send_request(h2::post(proxy.address, CHAT, body))))
        .collect();
    // The process may have inherited descriptors with higher numbers.
    until("descriptors to run out", async || proxy.resources().descriptors >= DESCRIPTORS as usize).await;
    let late: Vec<_> = [(); 5].map(|()| tokio::spawn(connect_and_ask(proxy.address))).into();
    // Ten pauses of 100 ms: in that time, attempts to connect have timed out and been started again.
    until("clients that are not accepted", async || proxy.count_log_lines("cannot accept") >= 10).await;
    let sent = upstream.requests() - before;
    assert!(sent > 10 && sent < CONCURRENT_REQUESTS, "{sent} of them could be sent");
    // One thread accepts, and pauses for 100 ms after each failure.
    let refusals = proxy.count_log_lines("cannot accept");
    assert!(refusals as u128 <= began.elapsed().as_millis() / 100 + 1, "{refusals} in {:?}", began.elapsed());
    let routes = admin.ask(get("/api/v1/routes")).await.json();
    let tiny = &routes["routes"][0];
    assert_eq!((&tiny["state"], &tiny["endpoints"][0]["ready"]), (&"ready".into(), &true.into()), "{tiny:#}");
    let waited = proxy.ticks() - worked;
    assert!(waited <= worked + 20, "{waited} ticks to wait, {worked} for all that was done before");

    gate.send_replace(true);
    for asked in asked {
        assert_eq!(soon("an answer", asked).await.unwrap().unwrap().status(), 200);
    }
    for late in late {
        assert_eq!(soon("an answer", late).await.unwrap(), 200);
    }
    drop((client, admin));
    proxy.stop().await.assert_outcomes(&[("completed", 2 * CONCURRENT_REQUESTS as u64 + 5)]);
}

async fn connect_and_ask(address: std::net::SocketAddr) -> u16 {
    Wire::connect(address).await.ask(chat("late")).await.status()
}

/// Descriptors never become available: the request still times out at its deadline, or at most one connect timeout of 2
/// s later. Attempts are 50 ms apart, and the endpoint stays ready.
#[tokio::test(start_paused = true)]
async fn unsendable_request_has_a_deadline() {
    const EMFILE: i32 = 24;
    let tries = Arc::new(AtomicU64::new(0));
    let counted = tries.clone();
    let world = InMemoryProxy::new("hold: { timeout: 10s }", move || {
        counted.fetch_add(1, SeqCst);
        Err(std::io::Error::from_raw_os_error(EMFILE))
    });
    world.gate.target().ready(&world.endpoint, None);
    let began = Instant::now();
    let heard = world.ask(&chat("x")).await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 504") && heard.contains("cold_start_timeout"), "{heard}");
    let took = began.elapsed();
    assert!((10..=12).contains(&took.as_secs()), "{took:?}");
    let tries = u128::from(tries.load(SeqCst));
    assert!(tries > 10 && tries <= took.as_millis() / 50 + 1, "{tries} in {took:?}");
    assert!(world.endpoint.is_ready());
    world.is_over(&[(Outcome::ColdStartTimeout, 1)]);
}

/// Anteroom raises its own soft limit. A model server keeps the limit with which Anteroom was started: programs that
/// close or scan every possible descriptor take minutes under a limit of a million.
#[tokio::test]
async fn model_server_keeps_the_soft_limit_of_files() {
    let noted = tempfile::NamedTempFile::new().unwrap();
    let script = format!(r#"ulimit -S -n > {}; exec "$1" sim --port "$2""#, noted.path().display());
    let command = serde_json::json!(["sh", "-c", script, "-", crate::served::ANTEROOM, "{port}"]);
    let target = format!("target: {{ process: {{ command: {command} }} }}");
    let config = format!(
        "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nallowedHosts: [\"*\"]\nroutes:\n  - {{ name: tiny, match: {{ models: [tiny] }}, {target} }}\n"
    );
    let proxy = ProxyProcess::spawn(&config, |folder| {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "ulimit -S -n 300; exec \"$0\" \"$@\"", crate::served::ANTEROOM]);
        command.args(crate::served::arguments(folder));
        command
    })
    .await;
    assert_eq!(proxy.ask(prompt("x")).await.status(), 200);
    let own = std::fs::read_to_string(format!("/proc/{}/limits", proxy.pid().as_raw_nonzero())).unwrap();
    let own = own.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_ne!(own.split_whitespace().nth(3), Some("300"), "{own}");
    assert_eq!(std::fs::read_to_string(noted.path()).unwrap().trim(), "300");
    proxy.stop().await.assert_outcomes(&[("completed", 1)]);
}
