//! A model server under the byte-level control of the test. It responds to readiness probes by itself and hands any
//! other request to the test.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};

use super::{
    soon, until,
    wire::{Head, Wire},
};

pub struct TestUpstream {
    pub address: SocketAddr,
    state: Arc<TestUpstreamState>,
    calls: mpsc::UnboundedReceiver<UpstreamCall>,
    tasks: Vec<JoinHandle<()>>,
}

struct TestUpstreamState {
    /// Status of responses to probes.
    health: AtomicU16,
    accepted: AtomicUsize,
    probes: AtomicUsize,
    handed: AtomicUsize,
    calls: mpsc::UnboundedSender<UpstreamCall>,
}

/// A request from the proxy, to be answered by the test. Dropping it closes the connection.
pub struct UpstreamCall {
    pub head: Head,
    /// Number of the connection that carried it.
    pub connection: usize,
    pub wire: Wire,
    state: Arc<TestUpstreamState>,
}

/// Builds a response with this status line and a `Content-Length`.
pub fn answer(status: &str, fields: &[(&str, &str)], body: &str) -> String {
    let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{fields}\r\n{body}", body.len())
}

/// Head of a response that streams events.
pub const STREAM: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

/// End of a chunked body.
pub const LAST: &str = "0\r\n\r\n";

/// Encodes a chunk.
pub fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

// === impl TestUpstream ===

impl TestUpstream {
    /// Creates a server that is ready.
    pub async fn warm() -> Self {
        Self::new(true).await
    }

    /// Creates a server that responds to probes with 503 until [`Self::wake`].
    pub async fn cold() -> Self {
        Self::new(false).await
    }

    async fn new(healthy: bool) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), healthy)
    }

    /// Creates a server on an existing listener.
    pub fn on(listener: TcpListener, healthy: bool) -> Self {
        let (sender, calls) = mpsc::unbounded_channel();
        let state = Arc::new(TestUpstreamState {
            health: AtomicU16::new(if healthy { 200 } else { 503 }),
            accepted: AtomicUsize::new(0),
            probes: AtomicUsize::new(0),
            handed: AtomicUsize::new(0),
            calls: sender,
        });
        let address = listener.local_addr().unwrap();
        let tasks = vec![tokio::spawn(accept(listener, state.clone()))];
        Self { address, state, calls, tasks }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn wake(&self) {
        self.answers_probes(200);
    }

    pub fn sleep(&self) {
        self.answers_probes(503);
    }

    /// Sets the status of responses to probes.
    pub fn answers_probes(&self, status: u16) {
        self.state.health.store(status, Ordering::SeqCst);
    }

    /// Returns the number of connections accepted, including those of probes.
    pub fn accepted(&self) -> usize {
        self.state.accepted.load(Ordering::SeqCst)
    }

    pub fn probes(&self) -> usize {
        self.state.probes.load(Ordering::SeqCst)
    }

    /// Returns the number of requests received.
    pub fn requests(&self) -> usize {
        self.state.handed.load(Ordering::SeqCst)
    }

    /// Waits until the next probe.
    pub async fn probed(&self) {
        let before = self.probes();
        until("a probe", async || self.probes() > before).await;
    }

    /// Waits for the next request.
    pub async fn call(&mut self) -> UpstreamCall {
        soon("a request at the model server", self.calls.recv()).await.unwrap()
    }

    /// Returns the number of requests not yet taken with [`Self::call`].
    pub fn pending(&self) -> usize {
        self.calls.len()
    }

    /// Handles every request from now on with `answer`.
    pub fn automatic<F>(mut self, answer: impl Fn(UpstreamCall) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut calls = std::mem::replace(&mut self.calls, mpsc::unbounded_channel().1);
        self.tasks.push(tokio::spawn(async move {
            while let Some(call) = calls.recv().await {
                tokio::spawn(answer(call));
            }
        }));
        self
    }
}

impl Drop for TestUpstream {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn accept(listener: TcpListener, state: Arc<TestUpstreamState>) {
    while let Ok((stream, _)) = listener.accept().await {
        let connection = state.accepted.fetch_add(1, Ordering::SeqCst);
        stream.set_nodelay(true).unwrap();
        tokio::spawn(wait_for_call(Wire { stream, buf: Vec::new() }, connection, state.clone()));
    }
}

/// Waits for a request without a timeout, since a pooled connection may be idle.
async fn wait_for_call(mut wire: Wire, connection: usize, state: Arc<TestUpstreamState>) {
    if wire.buf.is_empty() && wire.stream.readable().await.is_err() {
        return;
    }
    let Some(head) = wire.head().await else { return };
    if !head.start.starts_with("GET /health ") {
        state.handed.fetch_add(1, Ordering::SeqCst);
        let calls = state.calls.clone();
        let _ = calls.send(UpstreamCall { head, connection, wire, state });
        return;
    }
    state.probes.fetch_add(1, Ordering::SeqCst);
    let status = state.health.load(Ordering::SeqCst);
    wire.send(answer(&format!("{status} As told"), &[], "")).await;
}

// === impl UpstreamCall ===

impl UpstreamCall {
    /// Reads the request body.
    pub async fn body(&mut self) -> String {
        let body = self.wire.body(&self.head).await.expect("a whole request body");
        String::from_utf8(body).unwrap()
    }

    /// Reads the `text` of the JSON body, which identifies requests in tests.
    pub async fn text(&mut self) -> String {
        let body: serde_json::Value = serde_json::from_str(&self.body().await).unwrap();
        body["text"].as_str().unwrap_or_default().to_owned()
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.wire.send(bytes).await;
    }

    /// Sends the (rest of the) response and waits for the next request on this connection.
    pub async fn finish(mut self, bytes: impl AsRef<[u8]>) {
        self.send(bytes).await;
        tokio::spawn(wait_for_call(self.wire, self.connection, self.state));
    }

    /// Reads the body and responds 200 with `{"text": …}`.
    pub async fn echo(mut self) {
        let text = self.text().await;
        self.reply(&text).await;
    }

    /// Responds 200 with `{"text": …}`, after the body has been read.
    pub async fn reply(self, text: &str) {
        let body = format!(r#"{{"text":"{text}"}}"#);
        self.finish(answer("200 OK", &[("Content-Type", "application/json")], &body)).await;
    }

    /// Waits until the proxy closes the connection.
    pub async fn gone(mut self) -> Vec<u8> {
        self.wire.end().await
    }

    /// Closes the connection with a reset.
    pub fn reset(self) {
        reset(self.wire.stream);
    }
}

/// Closes a connection with a reset instead of an orderly end.
pub fn reset(stream: TcpStream) {
    let stream = socket2::Socket::from(stream.into_std().unwrap());
    stream.set_linger(Some(std::time::Duration::ZERO)).unwrap();
}

/// A reserved port, with or without a listener.
pub struct Port {
    address: SocketAddr,
    #[expect(dead_code, reason = "keeps the port from everybody else")]
    reservation: socket2::Socket,
}

impl Port {
    pub fn reserve() -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let reservation = Self::bind(any);
        let address = reservation.local_addr().unwrap().as_socket().unwrap();
        Self { address, reservation }
    }

    fn bind(address: SocketAddr) -> socket2::Socket {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Starts to listen.
    pub fn listen(&self) -> TcpListener {
        let socket = Self::bind(self.address);
        socket.listen(128).unwrap();
        TcpListener::from_std(socket.into()).unwrap()
    }
}
