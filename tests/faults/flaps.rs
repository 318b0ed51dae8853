//! Endpoints that become ready and unready twenty times a second.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use anteroom::{error::Outcome, state::Protocol, upstream::UpstreamIo};
use tokio::{
    io::{AsyncWriteExt, DuplexStream},
    time::{Instant, sleep},
};

use crate::{
    memory::{InMemoryProxy, connection, read_request},
    support::{
        TestUpstream,
        cluster::{FakeCluster, FakePodState},
        until,
        wire::chat,
    },
};

const MAX_CONCURRENCY: usize = 4;
const FLAPS: usize = 400;
/// Half a period, at 20 flaps per second.
const HALF_PERIOD: Duration = Duration::from_millis(25);

/// Server that takes 20 ms per response and counts its requests.
#[derive(Default)]
struct FlappingServer {
    up: AtomicBool,
    dialled: AtomicUsize,
    requests: AtomicUsize,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl FlappingServer {
    fn dial(self: &Arc<Self>) -> io::Result<Box<dyn UpstreamIo>> {
        self.dialled.fetch_add(1, SeqCst);
        if !self.up.load(SeqCst) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = connection();
        tokio::spawn(self.clone().serve(theirs));
        Ok(Box::new(ours))
    }

    /// Closes each connection after its response, so that every request dials.
    async fn serve(self: Arc<Self>, mut io: DuplexStream) {
        if read_request(&mut io).await {
            self.requests.fetch_add(1, SeqCst);
            let now = self.now.fetch_add(1, SeqCst) + 1;
            self.most.fetch_max(now, SeqCst);
            sleep(Duration::from_millis(20)).await;
            self.now.fetch_sub(1, SeqCst);
            let _ =
                io.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await;
        }
    }
}

/// The published readiness flaps while requests arrive as fast as they can be served. Each request is sent exactly once
/// and gets a response; never more than `concurrency.max` run on the server; at every flap, demand equals the
/// clients without a response; at the end there is no demand.
#[tokio::test(start_paused = true)]
async fn flapping_readiness_loses_and_repeats_nothing() {
    let server = Arc::new(FlappingServer::default());
    server.up.store(true, SeqCst);
    let dialled = server.clone();
    let world = InMemoryProxy::new(
        "concurrency: { max: 4, rampStart: 1 }, hold: { maxRequests: 2000 }, scaling: { linger: 0s }",
        move || dialled.dial(),
    );
    let mut clients = Vec::new();
    for flap in 0..FLAPS {
        world.gate.target().ready(&world.endpoint, Some(1));
        clients.extend([world.ask(&chat("x")), world.ask(&chat("y"))]);
        sleep(HALF_PERIOD).await;
        world.assert_conservation();
        world.endpoint.retire();
        sleep(HALF_PERIOD).await;
        world.assert_conservation();
        let counts = world.gate.counts();
        let waiting = clients.iter().filter(|client| !client.is_finished()).count() as u64;
        assert_eq!(counts.held + counts.in_flight, waiting, "at flap {flap}");
    }
    world.gate.target().ready(&world.endpoint, None);
    for client in clients {
        let heard = client.await.unwrap();
        assert!(heard.starts_with("HTTP/1.1 200") && heard.ends_with("ok"), "{heard}");
    }
    sleep(HALF_PERIOD).await;
    world.is_over(&[(Outcome::Completed, 2 * FLAPS as u64)]);
    assert_eq!(server.requests.load(SeqCst), 2 * FLAPS);
    assert!(server.most.load(SeqCst) <= MAX_CONCURRENCY, "{}", server.most.load(SeqCst));
    assert!(!world.gate.demand().is_leased());
}

/// The server itself flaps: half of the time it refuses connections, which only the failing request notices. All
/// requests are served while it is up, and dialling is bounded: each failure removes the endpoint for at least 50 ms,
/// and at most `concurrency.max` attempts can be under way by then.
#[tokio::test(start_paused = true)]
async fn flapping_server_is_dialled_with_backoff() {
    let server = Arc::new(FlappingServer::default());
    let dialled = server.clone();
    let world =
        InMemoryProxy::new("concurrency: { max: 4, rampStart: 4 }, hold: { maxRequests: 2000 }", move || {
            dialled.dial()
        });
    let asked = server.clone();
    world.watch(move || asked.up.load(SeqCst));
    let began = Instant::now();
    let mut clients = Vec::new();
    for flap in 0..FLAPS {
        server.up.store(flap % 2 == 0, SeqCst);
        clients.push(world.ask(&chat("x")));
        sleep(HALF_PERIOD).await;
        world.assert_conservation();
    }
    let failed = server.dialled.load(SeqCst) - server.requests.load(SeqCst);
    let backoffs = began.elapsed().as_millis() as usize / 50 + 1;
    assert!(failed > 0 && failed <= MAX_CONCURRENCY * backoffs, "{failed} in {backoffs} back-offs");
    server.up.store(true, SeqCst);
    for client in clients {
        assert!(client.await.unwrap().ends_with("ok"));
    }
    sleep(HALF_PERIOD).await;
    world.is_over(&[(Outcome::Completed, FLAPS as u64)]);
    assert_eq!(server.requests.load(SeqCst), FLAPS);
    assert!(server.most.load(SeqCst) <= MAX_CONCURRENCY);
}

/// The readiness of a pod flaps in the cluster, behind the real proxy: each change takes effect at once, and every
/// request gets exactly one response.
#[tokio::test]
async fn flapping_pod_serves_while_it_is_ready() {
    // The server is cold so that no probe opens an endpoint that the cluster has closed.
    let mut upstream = TestUpstream::cold().await;
    let cluster = FakeCluster::speaking(Protocol::Http1);
    let proxy = cluster.proxy(None, "").await;
    for flap in 0..200 {
        cluster.publish_pods(&[(upstream.address, FakePodState::NotReady)]);
        until("it to be closed", async || !proxy.gate().await.target().is_up()).await;
        let mut held = proxy.sent(chat(&format!("{flap}"))).await;
        let gate = proxy.gate().await;
        until("one to be held", async || gate.held() == 1).await;
        cluster.publish_pods(&[(upstream.address, FakePodState::Ready)]);
        upstream.call().await.echo().await;
        assert_eq!(held.response().await.json()["text"], format!("{flap}"));
    }
    assert_eq!(upstream.requests(), 200);
    proxy.stop(&[("completed", 200)]).await;
}
