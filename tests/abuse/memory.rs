//! The request path on one thread with in-memory connections, timed by a paused clock.

use std::{io, sync::Arc};

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    config::{Config, Limits},
    proxy::{Proxy, RouteTable, Shared, serve_connection},
    state::Endpoint,
    upstream::{Dial, Dialer, Dialing, UpstreamIo},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    runtime::Handle,
};
use tokio_util::sync::CancellationToken;

/// Route `tiny`, at zero until [`Self::ready`].
pub struct MemoryTest {
    pub gate: Arc<Gate>,
    pub shared: Arc<Shared>,
    proxy: Arc<Proxy>,
}

/// Model server that sends the same response to every request, followed by `more` endlessly.
struct EndlessServer {
    answer: Vec<u8>,
    more: Vec<u8>,
}

impl Dial for EndlessServer {
    fn dial(&self, _: &str) -> Dialing {
        let (answer, more) = (self.answer.clone(), self.more.clone());
        Box::pin(async move {
            let (ours, mut theirs) = duplex(64 << 10);
            tokio::spawn(async move {
                while is_whole(&mut theirs).await {
                    theirs.write_all(&answer).await?;
                    while !more.is_empty() {
                        theirs.write_all(&more).await?;
                    }
                }
                io::Result::Ok(())
            });
            Ok(Box::new(ours) as Box<dyn UpstreamIo>)
        })
    }
}

/// Reads up to the end of a body; returns false at the end of the connection.
async fn is_whole(io: &mut DuplexStream) -> bool {
    let mut part = [0; 4096];
    loop {
        match io.read(&mut part).await {
            Ok(0) | Err(_) => return false,
            Ok(read) if part[..read].ends_with(b"}") || part[..read].ends_with(b"\n0\r\n\r\n") => {
                return true;
            }
            Ok(_) => {}
        }
    }
}

// === impl MemoryTest ===

impl MemoryTest {
    /// Builds the route with these limits, and with `matching` as its other fields.
    pub fn new(limits: &str, matching: &str) -> Self {
        Self::serving(limits, matching, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"")
    }

    /// Same as [`Self::new`], with this response of the model server.
    pub fn serving(limits: &str, matching: &str, answer: &[u8], more: &[u8]) -> Self {
        let yaml = format!(
            "limits: {{ {limits} }}\nroutes: [{{ name: tiny, {matching}, target: {{ url: 'http://127.0.0.1:1' }} }}]"
        );
        let mut config =
            Config::parse(&yaml, "test.yaml").unwrap_or_else(|error| panic!("{}", error.report()));
        let route = config.routes.remove(0);
        let gate = Gate::new(route.name.clone(), route.policy(), ColdStarts::new(|_| {}));
        let limits: Limits = config.limits;
        let shared = Shared::new(limits);
        shared.table.store(Arc::new(RouteTable::new([(route, gate.clone())])));
        let server = EndlessServer { answer: answer.to_vec(), more: more.to_vec() };
        let proxy = Proxy::new(shared.clone(), Dialer::Other(Arc::new(server)));
        Self { gate, shared, proxy }
    }

    /// Adds a ready endpoint.
    pub fn ready(&self) {
        let endpoint = Endpoint::new("memory:1", 1000);
        self.gate.target().add(&endpoint);
        self.gate.target().ready(&endpoint, None);
    }

    /// Connects a client, with a buffer of `room` bytes in each direction.
    pub fn client(&self, room: usize) -> DuplexStream {
        let (client, server) = duplex(room);
        tokio::spawn(serve_connection(server, None, self.proxy.clone(), CancellationToken::new()));
        client
    }

    /// Returns true if every admitted request has ended and left no ticket, permit or byte behind.
    pub fn is_empty(&self) -> bool {
        let counters = self.gate.counters();
        self.gate.held() == 0
            && self.gate.in_flight() == 0
            && self.shared.memory.bodies() == 0
            && counters.admitted() == counters.ended_in_all()
    }
}

/// Returns the number of live tasks.
pub fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

/// Runs all runnable tasks.
pub async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}
