//! A proxy in memory on a paused clock. Time advances only when every task is idle, so durations are exact.

use std::{io, sync::Arc};

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    config::Config,
    error::Outcome,
    proxy::{Proxy, RouteTable, Shared, serve_connection},
    state::Endpoint,
    upstream::{Dial, Dialer, Dialing, UpstreamIo},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

/// Proxy with a route `tiny` and one endpoint, whose connections the test provides.
pub struct InMemoryProxy {
    pub gate: Arc<Gate>,
    pub shared: Arc<Shared>,
    pub endpoint: Arc<Endpoint>,
    proxy: Arc<Proxy>,
}

/// Dialer that calls the test's function.
struct FnDialer<F>(F);

impl<F: Fn() -> io::Result<Box<dyn UpstreamIo>> + Send + Sync> Dial for FnDialer<F> {
    fn dial(&self, _: &str) -> Dialing {
        // Called within the future, where a real dialer would panic.
        let connected = std::panic::AssertUnwindSafe(&self.0);
        match std::panic::catch_unwind(connected) {
            Ok(connected) => Box::pin(async { connected }),
            Err(panic) => Box::pin(async { std::panic::resume_unwind(panic) }),
        }
    }
}

/// Returns the two ends of a connection.
pub fn connection() -> (DuplexStream, DuplexStream) {
    duplex(4096)
}

/// Reads a request with a Content-Length; returns false at the end of the connection.
pub async fn read_request(io: &mut DuplexStream) -> bool {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match io.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return false,
        }
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next()?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    io.read_exact(&mut body).await.is_ok()
}

// === impl InMemoryProxy ===

impl InMemoryProxy {
    /// Creates a proxy whose route has these further settings, in YAML flow style. `dial` makes each connection to the
    /// endpoint.
    pub fn new(
        more: &str,
        dial: impl Fn() -> io::Result<Box<dyn UpstreamIo>> + Send + Sync + 'static,
    ) -> Self {
        let yaml = crate::support::routes(&[crate::support::route("tiny", "http://127.0.0.1:1", more)]);
        let mut config = Config::parse(&yaml, "test.yaml").unwrap();
        let route = config.routes.remove(0);
        let policy = route.policy();
        let endpoint = Endpoint::new("memory:1", policy.concurrency.max);
        let gate = Gate::new(route.name.clone(), policy, ColdStarts::new(|_| {}));
        let shared = Shared::new(config.limits);
        shared.table.store(Arc::new(RouteTable::new([(route, gate.clone())])));
        let proxy = Proxy::new(shared.clone(), Dialer::Other(Arc::new(FnDialer(dial))));
        gate.target().add(&endpoint);
        Self { gate, shared, endpoint, proxy }
    }

    /// Marks the endpoint as ready and supervises it: after a failure it is probed when its backoff is over, when in
    /// doubt at once. `answers` returns the result of a probe.
    pub fn watch(&self, answers: impl Fn() -> bool + Send + 'static) {
        self.gate.target().ready(&self.endpoint, None);
        let (gate, endpoint) = (self.gate.clone(), self.endpoint.clone());
        tokio::spawn(async move {
            loop {
                endpoint.attention().await;
                match endpoint.is_doubted() {
                    true if answers() => endpoint.record_recovery(),
                    true => endpoint.suspect(),
                    false => {}
                }
                while !endpoint.is_ready() {
                    sleep(endpoint.backoff().max(std::time::Duration::from_millis(1))).await;
                    if answers() {
                        endpoint.record_recovery();
                        gate.target().ready(&endpoint, None);
                    }
                }
            }
        });
    }

    /// Opens a client connection.
    pub fn client(&self) -> DuplexStream {
        let (client, server) = connection();
        tokio::spawn(serve_connection(server, None, self.proxy.clone(), CancellationToken::new()));
        client
    }

    /// Sends one request and returns all bytes of the response.
    pub fn ask(&self, request: &str) -> JoinHandle<String> {
        let mut client = self.client();
        let request = request.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        tokio::spawn(async move {
            let mut heard = Vec::new();
            let _ = client.write_all(request.as_bytes()).await;
            let _ = client.read_to_end(&mut heard).await;
            String::from_utf8_lossy(&heard).into_owned()
        })
    }

    /// Asserts that admissions equal outcomes plus held and in-flight requests, which is exact while the clock is
    /// paused.
    pub fn assert_conservation(&self) {
        let counters = self.gate.counters();
        let (held, in_flight) = (self.gate.held() as u64, self.gate.in_flight());
        assert_eq!(
            counters.admitted(),
            counters.ended_in_all() + held + in_flight,
            "ended {:?}, held {held}, in flight {in_flight}",
            self.outcomes()
        );
    }

    /// Asserts that nothing is left, and that exactly these outcomes occurred.
    pub fn is_over(&self, outcomes: &[(Outcome, u64)]) {
        self.assert_conservation();
        assert_eq!((self.gate.held(), self.gate.in_flight(), self.gate.held_bytes()), (0, 0, 0));
        assert_eq!((self.endpoint.in_flight(), self.shared.memory.bodies()), (0, 0));
        let mut expected = outcomes.to_vec();
        expected.sort_by_key(|(outcome, _)| Outcome::ALL.iter().position(|known| known == outcome));
        assert_eq!(self.outcomes(), expected);
    }

    fn outcomes(&self) -> Vec<(Outcome, u64)> {
        let counted = Outcome::ALL.map(|outcome| (outcome, self.gate.counters().ended_as(outcome)));
        counted.into_iter().filter(|(_, count)| *count > 0).collect()
    }
}
