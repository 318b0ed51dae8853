//! The conservation law, over random lives of a proxy on a paused clock: every admitted request ends in exactly one
//! outcome, and until then it is held or in flight.
//!
//! Everything is in memory: with real sockets the paused clock would advance while bytes are in transit. The clock
//! advances only when nothing else can run, so after each step that waits the law must hold exactly.

use std::{
    cell::RefCell,
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
    time::Duration,
};

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    config::{Config, Limits},
    domain::{
        ByteCount, Intercept, InterceptTimeouts, Matcher, Overflow, Period, Policy, ResponseMode,
        StaticAnswer, StaticBody, StaticRoute,
    },
    error::{Outcome, Refusal},
    proxy::{Proxy, RouteTable, Shared, serve_connection},
    state::{Cause, Endpoint, Status},
    telemetry::StaticKind,
    upstream::{Dial, Dialer, Dialing, UpstreamIo},
};
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

/// A random event.
#[derive(Clone, Debug)]
enum Step {
    /// A request arrives. `quiet` selects a path that does not count as demand, if the route serves anything.
    Arrive { stream: bool, max_wait: Option<u16>, padding: u16, quiet: bool },
    /// A client disconnects.
    HangUp(prop::sample::Index),
    /// Time passes, in milliseconds.
    Wait(u16),
    /// The endpoint becomes ready, according to its publisher.
    Ready,
    /// The endpoint is no longer ready.
    Unready,
    /// The activation fails.
    Fail,
    /// The endpoint changes its behaviour.
    Behave(Behaviour),
    /// A reload replaces the policies of the route.
    Reload { max: u8, max_requests: u8 },
    /// Draining begins.
    Drain,
    /// All held requests are evicted.
    Evict,
}

/// Reaction of an endpoint to connections and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Behaviour {
    Answer,
    Slow,
    Refuse,
    ResetBeforeHead,
    ResetMidStream,
    NoHealthyUpstream,
    Fail,
}

/// Settings of a route that serves anything.
#[derive(Clone, Copy, Debug)]
struct CatchAllRoute {
    fallback: bool,
    placeholder: bool,
    max_pending: Option<u8>,
    overflow: bool,
    /// Request timeout in seconds.
    request: Option<u8>,
}

struct ScriptedServer {
    behaviour: AtomicU8,
    requests: AtomicU32,
}

struct ConservationTest {
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    proxy: Arc<Proxy>,
    endpoint: Arc<Endpoint>,
    server: Arc<ScriptedServer>,
    clients: Vec<JoinHandle<Vec<u8>>>,
    arrived: u64,
    /// Some requests do not count as demand.
    has_quiet: bool,
}

const ROUTES_CONFIG: &str = "
routes:
  - name: tiny
    match: { models: [tiny] }
    target: { url: 'http://127.0.0.1:1' }
    hold: { maxRequests: 6, maxBytes: 8KiB, timeout: 30s }
    keepalive: { after: 2s, interval: 1s }
    concurrency: { max: 4, rampStart: 1 }
    readiness: { activationTimeout: 60s }
    upstream: { idleTimeout: 20s, responseTimeout: 20s }
";

// === impl CatchAllRoute ===

impl CatchAllRoute {
    fn intercept(self) -> Intercept {
        let answer = |status| StaticAnswer::new(status, [], StaticBody::Text("soon".into())).expect("good");
        let healthz = StaticRoute {
            rules: vec![Matcher { paths: vec!["/healthz".into()], ..Matcher::default() }],
            answer: answer(200),
            mode: ResponseMode::WhenUnavailable,
        };
        Intercept {
            rules: vec![Matcher::default()],
            timeouts: InterceptTimeouts {
                request: self.request.map(|seconds| Period::from_secs(seconds.into())),
                ..InterceptTimeouts::default()
            },
            fallback: self.fallback.then(|| "memory:2".into()),
            placeholder: self.placeholder.then(|| answer(503)),
            max_pending: self.max_pending.map(u32::from),
            overflow: if self.overflow { Overflow::Placeholder } else { Overflow::Reject },
            static_routes: vec![healthz],
        }
    }
}

// === impl ScriptedServer ===

impl ScriptedServer {
    fn behaviour(&self) -> Behaviour {
        const ALL: [Behaviour; 7] = [
            Behaviour::Answer,
            Behaviour::Slow,
            Behaviour::Refuse,
            Behaviour::ResetBeforeHead,
            Behaviour::ResetMidStream,
            Behaviour::NoHealthyUpstream,
            Behaviour::Fail,
        ];
        ALL[usize::from(self.behaviour.load(Ordering::Relaxed))]
    }

    async fn serve(self: Arc<Self>, mut io: DuplexStream) -> io::Result<()> {
        while read_request(&mut io).await? {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let behaviour = self.behaviour();
            let pause = Duration::from_millis(if behaviour == Behaviour::Slow { 1500 } else { 20 });
            sleep(pause).await;
            match behaviour {
                Behaviour::ResetBeforeHead => return Ok(()),
                Behaviour::NoHealthyUpstream => {
                    io.write_all(
                        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 19\r\n\r\nno healthy upstream",
                    )
                    .await?;
                }
                Behaviour::Fail => {
                    io.write_all(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}")
                        .await?;
                }
                _ => {
                    io.write_all(
                        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
                    )
                    .await?;
                    for part in 0..3 {
                        if behaviour == Behaviour::ResetMidStream && part == 2 {
                            return Ok(());
                        }
                        sleep(pause).await;
                        io.write_all(b"9\r\ndata: x\n\n\r\n").await?;
                    }
                    io.write_all(b"0\r\n\r\n").await?;
                }
            }
        }
        Ok(())
    }
}

impl Dial for ScriptedDialer {
    fn dial(&self, _: &str) -> Dialing {
        let server = self.0.clone();
        Box::pin(async move {
            if server.behaviour() == Behaviour::Refuse {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = duplex(1024);
            tokio::spawn(server.serve(theirs));
            Ok(Box::new(ours) as Box<dyn UpstreamIo>)
        })
    }
}

struct ScriptedDialer(Arc<ScriptedServer>);

/// Reads a request with a Content-Length. Returns `false` at the end of the connection.
async fn read_request(io: &mut DuplexStream) -> io::Result<bool> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match io.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) if head.is_empty() => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next()?.parse().ok());
    let mut body = vec![0; length.expect("the proxy sends whole bodies")];
    io.read_exact(&mut body).await?;
    Ok(true)
}

// === impl ConservationTest ===

impl ConservationTest {
    fn new(front: Option<CatchAllRoute>) -> Self {
        let mut config = Config::parse(ROUTES_CONFIG, "routes.yaml").expect("a good configuration");
        let mut route = config.routes.remove(0);
        route.intercept = front.map(|front| Arc::new(front.intercept()));
        let gate = Gate::new(route.name.clone(), route.policy(), ColdStarts::new(|_| {}));
        let shared = Shared::new(Limits { max_body_bytes: ByteCount::bytes(4096), ..Limits::default() });
        shared.table.store(Arc::new(RouteTable::new([(route, gate.clone())])));
        let server = Arc::new(ScriptedServer { behaviour: AtomicU8::new(0), requests: AtomicU32::new(0) });
        let proxy = Proxy::new(shared.clone(), Dialer::Other(Arc::new(ScriptedDialer(server.clone()))));
        let endpoint = Endpoint::new("memory:1", 4);
        gate.target().add(&endpoint);
        Self {
            gate,
            shared,
            proxy,
            endpoint,
            server,
            clients: Vec::new(),
            arrived: 0,
            has_quiet: front.is_some(),
        }
    }

    /// Stands in for the prober: a doubted endpoint is probed at once, and a suspect one that is still up gets requests
    /// again after its backoff.
    fn watch_endpoint(&self, up: &Rc<RefCell<bool>>) {
        let (gate, endpoint, up) = (self.gate.clone(), self.endpoint.clone(), up.clone());
        tokio::task::spawn_local(async move {
            loop {
                endpoint.attention().await;
                match endpoint.is_doubted() {
                    true if *up.borrow() => endpoint.record_recovery(),
                    true => endpoint.suspect(),
                    false => {}
                }
                sleep(endpoint.backoff()).await;
                if *up.borrow() && !endpoint.is_ready() {
                    endpoint.record_recovery();
                    gate.target().ready(&endpoint, None);
                }
            }
        });
    }

    fn arrive(&mut self, stream: bool, max_wait: Option<u16>, padding: u16, quiet: bool) {
        let path = if quiet && self.has_quiet { "/healthz" } else { "/v1/chat/completions" };
        let (mut client, server) = duplex(16 << 10);
        tokio::spawn(serve_connection(server, None, self.proxy.clone(), CancellationToken::new()));
        let body = format!(r#"{{"model":"tiny","stream":{stream},"p":"{}"}}"#, "x".repeat(padding.into()));
        let wait = max_wait.map_or(String::new(), |seconds| format!("x-anteroom-max-wait: {seconds}\r\n"));
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{wait}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.arrived += 1;
        self.clients.push(tokio::spawn(async move {
            let mut answer = Vec::new();
            let _ = client.write_all(request.as_bytes()).await;
            let _ = client.read_to_end(&mut answer).await;
            answer
        }));
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let counters = self.gate.counters();
        let (held, in_flight) = (self.gate.held() as u64, self.gate.in_flight());
        prop_assert_eq!(
            counters.admitted(),
            counters.ended_in_all() + held + in_flight,
            "ended {:?}, held {}, in flight {}",
            Outcome::ALL.map(|outcome| (outcome.name(), counters.ended_as(outcome))),
            held,
            in_flight
        );
        // A body that is too large is rejected before its model is known, so no route counts it.
        let refused = |refusal| counters.refused(refusal) + self.shared.unrouted.refused(refusal);
        let refused: u64 = Refusal::ALL.into_iter().map(refused).sum();
        let answers: u64 = StaticKind::ALL.into_iter().map(|kind| counters.static_answers(kind)).sum();
        prop_assert_eq!(
            self.arrived,
            counters.admitted() + refused + answers,
            "each is admitted, refused or answered"
        );
        // A story is open at least while its request is held and at most until that ends. Each rejection has one.
        let kept = self.shared.history.kept();
        prop_assert!(kept.running as u64 >= held && kept.running as u64 <= held + in_flight);
        let of_route: u64 = Refusal::ALL.into_iter().map(|refusal| counters.refused(refusal)).sum();
        prop_assert!(kept.at_once.count as u64 >= of_route);
        prop_assert!((kept.waited.count + kept.at_once.count) as u64 <= of_route + counters.ended_in_all());
        Ok(())
    }

    async fn live(mut self, steps: Vec<Step>) -> Result<(), TestCaseError> {
        let up = Rc::new(RefCell::new(false));
        self.watch_endpoint(&up);
        for step in steps {
            match step {
                Step::Arrive { stream, max_wait, padding, quiet } => {
                    self.arrive(stream, max_wait, padding, quiet);
                }
                Step::HangUp(which) if !self.clients.is_empty() => {
                    // Has no effect if the client already has its response.
                    self.clients[which.index(self.clients.len())].abort();
                }
                Step::HangUp(_) => {}
                Step::Wait(ms) => sleep(Duration::from_millis(ms.into())).await,
                Step::Ready => {
                    *up.borrow_mut() = true;
                    self.gate.target().ready(&self.endpoint, Some(1));
                }
                Step::Unready => {
                    *up.borrow_mut() = false;
                    self.endpoint.retire();
                    self.gate.target().set_status(Status::Idle);
                }
                Step::Fail => {
                    *up.borrow_mut() = false;
                    self.endpoint.retire();
                    self.gate.target().failed(
                        "it does not start".into(),
                        &[],
                        Cause::Lasting,
                        Duration::from_secs(1),
                    );
                    self.gate.demand().end_activation();
                }
                Step::Behave(behaviour) => self.server.behaviour.store(behaviour as u8, Ordering::Relaxed),
                Step::Reload { max, max_requests } => {
                    let mut policy: Policy = (**self.gate.policy()).clone();
                    policy.concurrency.max = u32::from(max) + 1;
                    policy.hold.max_requests = usize::from(max_requests) + 1;
                    self.gate.set_policy(policy);
                }
                Step::Drain => self.gate.drain(),
                Step::Evict => {
                    self.gate.evict();
                }
            }
            // The clock advances only when nothing else can run.
            sleep(Duration::from_millis(1)).await;
            self.check()?;
        }
        self.finish(up).await
    }

    /// Checks that all requests have ended after the longest deadline, and that nothing is left behind.
    async fn finish(mut self, up: Rc<RefCell<bool>>) -> Result<(), TestCaseError> {
        *up.borrow_mut() = false;
        self.endpoint.retire();
        // 30 s of holding, then twice the upstream idle timeout of 20 s.
        sleep(Duration::from_secs(120)).await;
        self.check()?;
        prop_assert_eq!((self.gate.held(), self.gate.in_flight(), self.gate.held_bytes()), (0, 0, 0));
        prop_assert_eq!((self.gate.requests(), self.gate.demand_in_flight()), (0, 0));
        prop_assert_eq!(self.shared.memory.bodies(), 0, "every byte of the budget came back");
        let mut seen = Vec::new();
        for client in self.clients.drain(..) {
            prop_assert!(client.is_finished(), "a client is left without an end");
            if let Ok(answer) = client.await {
                seen.push(String::from_utf8_lossy(&answer).into_owned());
            }
        }
        self.check_client_responses(&seen)
    }

    /// Compares the counters with the responses of the clients that stayed connected.
    fn check_client_responses(&self, seen: &[String]) -> Result<(), TestCaseError> {
        let counters = self.gate.counters();
        let with = |text: &str| seen.iter().filter(|answer| answer.contains(text)).count() as u64;
        for (code, outcome) in [
            ("cold_start_timeout", Outcome::ColdStartTimeout),
            ("cold_start_failed", Outcome::ColdStartFailed),
        ] {
            let code = with(&format!("\"code\":\"{code}\""));
            prop_assert!(code <= counters.ended_as(outcome), "{outcome:?}: {code} were told");
        }
        let whole = seen
            .iter()
            .filter(|answer| answer.ends_with("0\r\n\r\n") && !answer.contains("\"error\""))
            .count();
        prop_assert!(whole as u64 <= counters.ended_as(Outcome::Completed));
        prop_assert_eq!(counters.ended_as(Outcome::Internal), 0);
        prop_assert_eq!(counters.ended_as(Outcome::ClientStalled), 0, "all clients read");
        Ok(())
    }
}

fn step() -> impl Strategy<Value = Step> {
    use Behaviour::{Answer, Fail, NoHealthyUpstream, Refuse, ResetBeforeHead, ResetMidStream, Slow};
    let behaviour = prop::sample::select(vec![
        Answer,
        Slow,
        Refuse,
        ResetBeforeHead,
        ResetMidStream,
        NoHealthyUpstream,
        Fail,
    ]);
    prop_oneof![
        6 => (any::<bool>(), prop::option::weighted(0.3, 0_u16..20), 0_u16..5000, prop::bool::weighted(0.2))
            .prop_map(|(stream, max_wait, padding, quiet)| Step::Arrive { stream, max_wait, padding, quiet }),
        2 => any::<prop::sample::Index>().prop_map(Step::HangUp),
        4 => (0_u16..5000).prop_map(Step::Wait),
        3 => Just(Step::Ready),
        1 => Just(Step::Unready),
        1 => Just(Step::Fail),
        2 => behaviour.prop_map(Step::Behave),
        1 => (0_u8..8, 0_u8..8).prop_map(|(max, max_requests)| Step::Reload { max, max_requests }),
        1 => Just(Step::Drain),
        1 => Just(Step::Evict),
    ]
}

fn front() -> impl Strategy<Value = CatchAllRoute> {
    let max_pending = prop::option::of(1_u8..6);
    (any::<bool>(), prop::bool::weighted(0.3), max_pending, any::<bool>(), prop::option::of(1_u8..40))
        .prop_map(|(fallback, placeholder, max_pending, overflow, request)| CatchAllRoute {
            fallback,
            placeholder,
            max_pending,
            overflow,
            request,
        })
}

fn live(front: Option<CatchAllRoute>, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime.expect("a runtime"), async { ConservationTest::new(front).live(steps).await })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_admitted_request_ends_in_exactly_one_outcome(steps in prop::collection::vec(step(), 1..60)) {
        live(None, steps)?;
    }

    #[test]
    fn catch_all_request_ends_in_one_outcome(
        front in front(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        live(Some(front), steps)?;
    }
}
