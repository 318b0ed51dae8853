//! The proxy between an in-memory client and model server, without the cost of the kernel.

use std::{io, sync::Arc};

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    config::{Config, Limits},
    proxy::{Proxy, RouteTable, Shared, serve_connection},
    state::Endpoint,
    upstream::{Dial, Dialer, Dialing, UpstreamIo},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    runtime::{Builder, Runtime},
};
use tokio_util::sync::CancellationToken;

const TINY_ROUTE_CONFIG: &str =
    "routes: [{ name: tiny, match: { models: [tiny] }, target: { url: 'http://127.0.0.1:1' } }]";

/// Buffer size per direction, enough for a burst.
const BUFFER_BYTES: usize = 1 << 20;

/// Client and model server ends of the connections to the proxy.
pub struct Harness {
    runtime: Runtime,
    client: DuplexStream,
    server: DuplexStream,
}

/// Dialer that returns the proxy's end of the only connection to the model server.
struct SingleDialer(Mutex<Option<DuplexStream>>);

impl Dial for SingleDialer {
    fn dial(&self, _: &str) -> Dialing {
        let io = self.0.lock().take();
        Box::pin(async {
            io.map(|io| Box::new(io) as Box<dyn UpstreamIo>).ok_or(io::ErrorKind::ConnectionRefused.into())
        })
    }
}

// === impl Harness ===

impl Harness {
    pub fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (client, ours) = duplex(BUFFER_BYTES);
        let (server, dialed) = duplex(BUFFER_BYTES);
        let _entered = runtime.enter();
        let route = Config::parse(TINY_ROUTE_CONFIG, "routes.yaml").expect("valid").routes.remove(0);
        let gate = Gate::new(route.name.clone(), route.policy(), ColdStarts::new(|_| {}));
        let shared = Shared::new(Limits::default());
        shared.table.store(Arc::new(RouteTable::new([(route, gate.clone())])));
        let endpoint = Endpoint::new("memory:1", 4);
        gate.target().add(&endpoint);
        gate.target().ready(&endpoint, None);
        let proxy = Proxy::new(shared, Dialer::Other(Arc::new(SingleDialer(Mutex::new(Some(dialed))))));
        runtime.spawn(serve_connection(ours, None, proxy, CancellationToken::new()));
        drop(_entered);
        Self { runtime, client, server }
    }

    /// Sends a request from the client and reads it on the server, up to the last bytes of the body.
    pub fn request(&mut self, request: &[u8], body: &[u8]) {
        self.runtime.block_on(async {
            self.client.write_all(request).await.expect("open");
            read_until(&mut self.server, body).await;
        });
    }

    /// Sends bytes from the server and reads them on the client up to `end`.
    pub fn answer(&mut self, part: &[u8], end: &[u8]) {
        self.runtime.block_on(async {
            self.server.write_all(part).await.expect("open");
            read_until(&mut self.client, end).await;
        });
    }
}

async fn read_until(io: &mut DuplexStream, end: &[u8]) {
    let mut part = [0; 16 << 10];
    let mut last = Vec::with_capacity(64);
    while !last.ends_with(end) {
        let read = io.read(&mut part).await.expect("open");
        assert!(read > 0, "closed after {:?}", String::from_utf8_lossy(&last));
        let tail = &part[read.saturating_sub(64)..read];
        last.extend_from_slice(tail);
        last.drain(..last.len().saturating_sub(64));
    }
}
