//! A model server for HTTP/2 without TLS only. Like [`super::TestUpstream`], it responds to probes by itself.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;

use super::soon;

type H2cResponse = Response<BoxBody<Bytes, Infallible>>;

pub struct H2c {
    pub address: SocketAddr,
    state: Arc<H2cState>,
    calls: mpsc::UnboundedReceiver<H2cCall>,
    serving: tokio::task::JoinHandle<()>,
}

struct H2cState {
    healthy: AtomicBool,
    accepted: AtomicUsize,
    calls: mpsc::UnboundedSender<H2cCall>,
    /// Closes connections gracefully, with GOAWAY.
    ending: parking_lot::Mutex<CancellationToken>,
}

/// A request from the proxy, to be answered by the test. Dropping it resets its stream.
pub struct H2cCall {
    pub request: Request<Incoming>,
    /// Number of the connection that carried it.
    pub connection: usize,
    answer: oneshot::Sender<H2cResponse>,
}

/// Body of a streamed response.
pub struct Streaming(mpsc::UnboundedSender<Result<Frame<Bytes>, Infallible>>);

// === impl H2c ===

impl H2c {
    /// Creates a server that allows `streams` concurrent requests per connection.
    pub async fn new(streams: u32, healthy: bool) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), streams, healthy)
    }

    pub fn on(listener: TcpListener, streams: u32, healthy: bool) -> Self {
        let (sender, calls) = mpsc::unbounded_channel();
        let state = Arc::new(H2cState {
            healthy: AtomicBool::new(healthy),
            accepted: AtomicUsize::new(0),
            calls: sender,
            ending: parking_lot::Mutex::default(),
        });
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(serve(listener, streams, state.clone()));
        Self { address, state, calls, serving }
    }

    pub fn wake(&self) {
        self.state.healthy.store(true, Ordering::SeqCst);
    }

    /// Returns the number of connections accepted, including those of probes.
    pub fn accepted(&self) -> usize {
        self.state.accepted.load(Ordering::SeqCst)
    }

    /// Closes the open connections once their requests in flight have ended.
    pub fn end_connections(&self) {
        std::mem::take(&mut *self.state.ending.lock()).cancel();
    }

    pub async fn call(&mut self) -> H2cCall {
        soon("a request at the model server", self.calls.recv()).await.unwrap()
    }
}

impl Drop for H2c {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(listener: TcpListener, streams: u32, state: Arc<H2cState>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let connection = state.accepted.fetch_add(1, Ordering::SeqCst);
        let ending = state.ending.lock().clone();
        let state = state.clone();
        let service = service_fn(move |request| answer(request, connection, state.clone()));
        connections.spawn(async move {
            let served = http2::Builder::new(TokioExecutor::new())
                .max_concurrent_streams(streams)
                .serve_connection(TokioIo::new(stream), service);
            tokio::pin!(served);
            tokio::select! {
                _ = &mut served => return,
                () = ending.cancelled() => {}
            }
            served.as_mut().graceful_shutdown();
            let _ = served.await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    connection: usize,
    state: Arc<H2cState>,
) -> Result<H2cResponse, oneshot::error::RecvError> {
    if request.uri().path() == "/health" {
        let healthy = state.healthy.load(Ordering::SeqCst);
        let answer = Response::builder().status(if healthy { 200 } else { 503 });
        return Ok(answer.body(Full::default().boxed()).unwrap());
    }
    let (answer, answered) = oneshot::channel();
    let _ = state.calls.send(H2cCall { request, connection, answer });
    answered.await
}

// === impl H2cCall ===

impl H2cCall {
    pub async fn text(&mut self) -> String {
        let body = soon("a whole request body", self.request.body_mut().collect()).await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        body["text"].as_str().unwrap_or_default().to_owned()
    }

    pub fn reply(self, text: &str) {
        let body = Full::from(format!(r#"{{"text":"{text}"}}"#)).boxed();
        let _ = self
            .answer
            .send(Response::builder().header("content-type", "application/json").body(body).unwrap());
    }

    /// Starts a streamed response.
    pub fn stream(self) -> Streaming {
        let (sender, parts) = mpsc::unbounded_channel();
        let body = BoxBody::new(StreamBody::new(UnboundedReceiverStream::new(parts)));
        let answer = Response::builder().header("content-type", "text/event-stream").body(body).unwrap();
        let _ = self.answer.send(answer);
        Streaming(sender)
    }
}

// === impl Streaming ===

impl Streaming {
    pub fn send(&self, text: &str) {
        let _ = self.0.send(Ok(Frame::data(Bytes::copy_from_slice(text.as_bytes()))));
    }

    /// Waits until the reader of the stream is gone.
    pub async fn gone(self) {
        soon("the stream to be reset", self.0.closed()).await;
    }
}
