//! Two replicas behind a load balancer with delayed updates, restarted one after the other under load.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use anteroom::{app::Command, drain::StopSignal};
use parking_lot::Mutex;
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::sleep,
};

use crate::{
    law,
    served::ProxyProcess,
    support::{
        TestProxy, TestUpstream, Wire, route, routes, until,
        upstream::{LAST, Port, STREAM, UpstreamCall, chunk},
        wire::{WireResponse, chat, get, streaming},
    },
};

/// Stand-in for kube-proxy: forwards connections to backends that were ready at the last check.
struct Balancer {
    address: SocketAddr,
    backends: Arc<Mutex<Vec<BalancerBackend>>>,
    tasks: [JoinHandle<()>; 2],
}

struct BalancerBackend {
    address: SocketAddr,
    admin: SocketAddr,
    ready: bool,
}

/// Interval between the readiness checks.
const READINESS_INTERVAL: Duration = Duration::from_millis(200);

// === impl Balancer ===

impl Balancer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backends = Arc::new(Mutex::new(Vec::new()));
        let tasks = [
            tokio::spawn(pass_on(listener, backends.clone())),
            tokio::spawn(check_readiness(backends.clone())),
        ];
        Self { address, backends, tasks }
    }

    fn add(&self, replica: &ProxyProcess) {
        let (address, admin) = (replica.address, replica.admin);
        self.backends.lock().push(BalancerBackend { address, admin, ready: false });
    }

    fn remove(&self, replica: &ProxyProcess) {
        self.backends.lock().retain(|backend| backend.address != replica.address);
    }

    async fn sends_to(&self, number: usize) {
        let ready = || self.backends.lock().iter().filter(|backend| backend.ready).count();
        until(&format!("{number} that are ready"), async || ready() == number).await;
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn pass_on(listener: TcpListener, backends: Arc<Mutex<Vec<BalancerBackend>>>) {
    let next = AtomicUsize::new(0);
    while let Ok((mut client, _)) = listener.accept().await {
        let ready: Vec<_> =
            backends.lock().iter().filter(|backend| backend.ready).map(|backend| backend.address).collect();
        let Some(address) = ready.get(next.fetch_add(1, SeqCst) % ready.len().max(1)).copied() else {
            continue;
        };
        tokio::spawn(async move {
            // A backend that has exited refuses the connection, and the client sees the error.
            let mut backend = TcpStream::connect(address).await?;
            copy_bidirectional(&mut client, &mut backend).await
        });
    }
}

async fn check_readiness(backends: Arc<Mutex<Vec<BalancerBackend>>>) {
    loop {
        let all: Vec<_> = backends.lock().iter().map(|backend| backend.admin).collect();
        for admin in all {
            let ready = is_ready(admin).await;
            backends.lock().iter_mut().filter(|one| one.admin == admin).for_each(|one| one.ready = ready);
        }
        sleep(READINESS_INTERVAL).await;
    }
}

/// Returns the readiness of a replica. One that is shutting down may close the connection at any time, and is not
/// ready.
async fn is_ready(admin: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(admin).await else { return false };
    let request = b"GET /readyz HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n";
    let mut answer = Vec::new();
    let asked = async {
        stream.write_all(request).await?;
        stream.read_to_end(&mut answer).await
    };
    asked.await.is_ok() && answer.starts_with(b"HTTP/1.1 200 ")
}

/// Sends one request after the other and counts the responses. Clients of kind 1 keep their connection until a response
/// carries `Connection: close`.
async fn client(address: SocketAddr, kind: usize, over: Arc<AtomicBool>, counts: Arc<ResponseCounts>) {
    let mut kept = None;
    while !over.load(SeqCst) {
        if kind == 0 {
            let mut wire = Wire::connect(address).await;
            wire.send(streaming("stream")).await;
            let head = wire.head().await.expect("the head of a stream");
            if head.status() != 200 {
                let body = wire.body(&head).await.expect("a whole body");
                counts.drained(&WireResponse { head, body });
                continue;
            }
            let all = wire.rest().await.expect("the end of a stream");
            assert_eq!(all.matches("data: ").count(), CHUNKS);
            counts.answered.fetch_add(1, SeqCst);
            continue;
        }
        let mut wire = match kept.take() {
            Some(wire) => wire,
            None => Wire::connect(address).await,
        };
        let response = wire.ask(chat("short")).await;
        if response.status() == 200 {
            counts.answered.fetch_add(1, SeqCst);
        } else {
            counts.drained(&response);
        }
        kept = Some(wire).filter(|_| kind == 1 && response.get("connection") != Some("close"));
    }
}

#[derive(Default)]
struct ResponseCounts {
    answered: AtomicU64,
    drained: AtomicU64,
}

const CHUNKS: usize = 20;

// === impl ResponseCounts ===

impl ResponseCounts {
    /// Counts a response that asks the client to retry.
    fn drained(&self, response: &WireResponse) {
        response.is_error(503, "draining");
        assert_eq!(response.get("x-should-retry"), Some("true"));
        self.drained.fetch_add(1, SeqCst);
    }
}

async fn serve(mut call: UpstreamCall) {
    let body = call.body().await;
    if !body.contains("\"stream\":true") {
        sleep(Duration::from_millis(20)).await;
        return call.reply("short").await;
    }
    call.send(STREAM).await;
    for _ in 0..CHUNKS {
        sleep(Duration::from_millis(20)).await;
        call.send(chunk("data: x\n\n")).await;
    }
    call.finish(LAST).await;
}

/// Starts a replica that knows its peer; both keep their addresses from run to run.
async fn replica(number: usize, ports: &[Port; 2], url: &str) -> ProxyProcess {
    let [own, other] = [&ports[number], &ports[1 - number]].map(|port| port.url().replace("http://", ""));
    let peers = format!("peers: {{ listen: \"{own}\", service: \"{other}\" }}");
    // Far fewer slots than clients, so that some requests are always held.
    let route = route("tiny", url, "concurrency: { max: 2 }");
    // The balancer notices within the drain delay, even on a busy machine; requests held by then have as much time as
    // they need.
    ProxyProcess::start(&format!("drainDelay: 6s\ndrainTimeout: 10m\n{peers}\n{}", routes(&[route]))).await
}

/// Streams, short and held requests run through a balancer while each replica in turn gets SIGTERM, exits, and returns
/// at another port. Every request gets a complete response, or `draining` with permission to retry. Each replica
/// accounts for all requests it admitted and exits with 0; its peer drops it and finds it again.
#[tokio::test]
async fn rolling_restart_fails_no_request() {
    let upstream = TestUpstream::warm().await.automatic(serve);
    // Reserved throughout: client ports come from the same range and could take them while a replica is down.
    let ports = [Port::reserve(), Port::reserve()];
    let balancer = Balancer::start().await;
    let mut replicas = Vec::new();
    for number in 0..2 {
        replicas.push(replica(number, &ports, &upstream.url()).await);
        balancer.add(&replicas[number]);
    }
    balancer.sends_to(2).await;
    let (over, counts) = (Arc::new(AtomicBool::new(false)), Arc::<ResponseCounts>::default());
    let client = |kind: usize| tokio::spawn(client(balancer.address, kind % 4, over.clone(), counts.clone()));
    let clients: Vec<_> = (0..16).map(client).collect();
    let answered = || counts.answered.load(SeqCst);

    let mut completed = 0;
    for number in 0..2 {
        until("requests to be held", async || replicas[number].counts().await.held > 0).await;
        replicas[number].signal(Signal::TERM);
        balancer.sends_to(1).await;
        assert_eq!(replicas[number].exited().await.code(), Some(0));
        let last = replicas[number].logged("stopped").await;
        completed += only_completed(&last);
        balancer.remove(&replicas[number]);
        let before = answered();
        until("the other one to serve", async || answered() > before + 5).await;
        replicas[number] = replica(number, &ports, &upstream.url()).await;
        balancer.add(&replicas[number]);
        balancer.sends_to(2).await;
        let peers = async || law::ask(replicas[1 - number].admin, "/metrics").await.text();
        until("its peer to find it again", async || {
            peers().await.contains("anteroom_peers{state=\"connected\"} 1")
        })
        .await;
    }
    over.store(true, SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    for replica in replicas {
        let counts = replica.stop().await;
        // The replica that returned last may have admitted none.
        assert_eq!(counts.ended("completed"), counts.admitted, "{counts:?}");
        completed += counts.admitted;
    }
    assert_eq!(
        completed,
        answered(),
        "each was answered by one of them, and {} told to come again",
        counts.drained.load(SeqCst)
    );
}

/// Asserts that a replica completed all requests it admitted, and returns their number.
fn only_completed(last: &serde_json::Value) -> u64 {
    let admitted = last["admitted"].as_u64().unwrap();
    let outcomes = last["outcomes"].as_str().unwrap();
    let ended: Vec<_> = outcomes.split(' ').filter(|one| !one.ends_with("=0")).collect();
    assert_eq!(ended, [format!("completed={admitted}")], "{last}");
    assert_eq!((last["held"].as_u64(), last["in_flight"].as_u64()), (Some(0), Some(0)), "{last}");
    admitted
}

/// As soon as a replica starts to shut down, every response on a kept-alive connection carries `Connection: close`,
/// even while new connections are still accepted: the client's next request uses another connection, and never one that
/// is being closed.
#[tokio::test]
async fn kept_alive_connection_gets_connection_close() {
    let mut upstream = TestUpstream::warm().await;
    let config = routes(&[route("tiny", &upstream.url(), "")]);
    let proxy = TestProxy::start(&format!("drainDelay: 10m\ndrainTimeout: 10m\n{config}")).await;
    let mut kept = Vec::new();
    for _ in 0..3 {
        let mut client = proxy.sent(chat("before")).await;
        upstream.call().await.echo().await;
        assert_eq!(client.response().await.get("connection"), None);
        kept.push(client);
    }
    proxy.commands.send(Command::Stop(StopSignal::Terminate)).await.unwrap();
    until("it to be unready", async || proxy.admin("/readyz").await.status() == 503).await;
    kept.push(proxy.client().await);
    let asked = [chat("kept"), get("/health"), get("/nothing"), chat("new")];
    for (mut client, request) in kept.into_iter().zip(asked) {
        client.send(&request).await;
        if request.starts_with("POST") {
            upstream.call().await.echo().await;
        }
        assert_eq!(client.response().await.get("connection"), Some("close"), "{request}");
        assert_eq!(client.end().await, b"");
    }
    proxy.stop(&[("completed", 5)]).await;
}
