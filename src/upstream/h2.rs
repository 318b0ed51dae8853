//! HTTP/2 without TLS (h2c) to endpoints that request it: requests of one worker thread share connections.

use std::{
    collections::HashMap,
    error::Error,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderValue, Request, Response, Uri, Version, header};
use http_body::{Body, Frame, SizeHint};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http2::{self, SendRequest},
    },
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};

use super::{
    dial::{Dialed, Dialer},
    send::{Addressed, Connector, MAX_IDLE, Reuse},
    send_error::SendError,
    severable::Severable,
};
use crate::{config::budget::UPSTREAM_BUFFER_BYTES, domain::UpstreamTimeouts, state::Endpoint};

/// Interval between pings on a silent connection with open streams.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Time for the response to a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections of one worker thread, by endpoint.
pub(super) struct Pool<B>(Mutex<HashMap<u64, Arc<H2Connections<B>>>>);

/// Connections to the endpoint of one request.
pub(super) struct StreamConnector<'a, B> {
    dialer: &'a Dialer,
    connections: Arc<H2Connections<B>>,
    /// Error of the request body.
    broke: ConnectionFailure,
    /// Earliest acceptable creation time of a connection.
    since: Option<Instant>,
}

/// Connections to one endpoint.
struct H2Connections<B> {
    shared: Mutex<Vec<SharedConnection<B>>>,
    /// Held while a connection is opened, so that concurrent requests wait for it instead of opening their own.
    connecting: tokio::sync::Mutex<()>,
}

struct SharedConnection<B> {
    sender: SendRequest<RecordedBody<B>>,
    opened_at: Instant,
    usage: Arc<ConnectionUsage>,
}

/// Streams in use on a connection.
struct ConnectionUsage {
    streams: AtomicUsize,
    /// The server's limit of concurrent streams.
    max_streams: AtomicUsize,
    /// Time at which the last stream ended.
    idle: Mutex<Instant>,
}

/// One request on a connection; dropping it frees the slot.
pub(super) struct StreamSlot(Arc<ConnectionUsage>);

/// Request body that keeps its error, which hyper reports only to the server.
pub(super) struct RecordedBody<B> {
    body: B,
    broke: ConnectionFailure,
}

type ConnectionFailure = Arc<Mutex<Option<Box<dyn Error + Send + Sync>>>>;

#[derive(Debug, thiserror::Error)]
#[error("the request body was aborted")]
pub(super) struct BodyFailed;

// === impl Pool ===

impl<B> Default for Pool<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B> Pool<B>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    /// Returns the connections to the endpoint of one request.
    pub(super) fn connector<'a>(
        &self,
        dialer: &'a Dialer,
        endpoint: &Endpoint,
        reuse: Reuse,
    ) -> StreamConnector<'a, B> {
        let connections = self.0.lock().entry(endpoint.id()).or_default().clone();
        let since = (reuse == Reuse::Never).then(Instant::now);
        StreamConnector { dialer, connections, broke: ConnectionFailure::default(), since }
    }

    /// Closes connections idle for too long.
    pub(super) fn sweep(&self) {
        self.0.lock().retain(|_, connections| {
            let mut shared = connections.shared.lock();
            shared.retain(|shared| !shared.sender.is_closed() && !shared.usage.is_over());
            !shared.is_empty() || Arc::strong_count(connections) > 1
        });
    }
}

// === impl H2Connections ===

impl<B> Default for H2Connections<B> {
    fn default() -> Self {
        Self { shared: Mutex::default(), connecting: tokio::sync::Mutex::default() }
    }
}

impl<B> H2Connections<B>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    /// Reserves a stream on a connection opened at `since` or later.
    fn take(&self, since: Option<Instant>) -> Option<(SendRequest<RecordedBody<B>>, StreamSlot)> {
        let mut shared = self.shared.lock();
        shared.retain(|shared| !shared.sender.is_closed());
        let is_new = |shared: &&SharedConnection<B>| since.is_none_or(|since| shared.opened_at >= since);
        let mut free = shared.iter().filter(is_new);
        let free = free.find(|shared| shared.usage.has_room() && !shared.usage.is_over())?;
        Some((free.sender.clone(), StreamSlot::new(&free.usage)))
    }

    /// Reserves a stream on a new connection, opened by this or a concurrent request at `since` or later. Waiting never
    /// exceeds the connect timeout.
    async fn connect(
        &self,
        dialer: &Dialer,
        endpoint: &Endpoint,
        timeouts: UpstreamTimeouts,
        since: Option<Instant>,
    ) -> Result<(SendRequest<RecordedBody<B>>, StreamSlot), SendError> {
        let limit = timeouts.connect_timeout.get();
        let connecting = async {
            let _turn = self.connecting.lock().await;
            if let Some(made) = self.take(since) {
                return Ok(made);
            }
            let dialed = dialer.dial(endpoint.address(), limit, || {}).await?;
            let cut = endpoint.connection();
            // Several requests share the connection, and each of them awaits `severed` itself.
            cut.set_answering(true);
            let shared = match dialed {
                Dialed::Tcp(io) => handshake(Severable { io, cut }).await?,
                Dialed::Other(io) => handshake(Severable { io, cut }).await?,
            };
            let made = (shared.sender.clone(), StreamSlot::new(&shared.usage));
            self.shared.lock().push(shared);
            Ok(made)
        };
        let address = || endpoint.address().into();
        match timeout(limit, connecting).await {
            Ok(made) => made.map_err(|source| SendError::Connect { address: address(), source }),
            Err(_) => Err(SendError::ConnectTimeout(address())),
        }
    }
}

// === impl StreamConnector ===

impl<B> Connector<B> for StreamConnector<'_, B>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Body = RecordedBody<B>;
    type Connection = (SendRequest<RecordedBody<B>>, StreamSlot);
    type Answered = StreamSlot;

    fn take(&mut self, _: &Addressed<'_>) -> Option<Self::Connection> {
        self.connections.take(None)
    }

    async fn connect(&mut self, to: &Addressed<'_>) -> Result<Self::Connection, SendError> {
        self.connections.connect(self.dialer, to.endpoint, to.timeouts, self.since).await
    }

    fn request(&self, to: &Addressed<'_>, body: B) -> Request<RecordedBody<B>> {
        let mut request = Request::new(RecordedBody { body, broke: self.broke.clone() });
        *request.method_mut() = to.head.method.clone();
        let mut headers = to.head.headers.clone();
        // HTTP/2 uses `:authority` and forbids connection headers.
        let host = headers.remove(header::HOST);
        headers.remove(header::CONNECTION);
        headers.remove(header::UPGRADE);
        *request.headers_mut() = headers;
        let uri = |authority: &[u8]| {
            let path = to.head.uri.path_and_query().map_or("/", |path| path.as_str());
            Uri::builder().scheme("http").authority(authority).path_and_query(path).build()
        };
        // A valid `Host` may be an invalid authority, in which case the endpoint's address takes its place.
        let named = host.as_ref().map(HeaderValue::as_bytes).and_then(|host| uri(host).ok());
        if let Some(uri) = named.or_else(|| uri(to.endpoint.address().as_bytes()).ok()) {
            *request.uri_mut() = uri;
        }
        request
    }

    fn send(
        &self,
        (sender, _): &mut Self::Connection,
        request: Request<RecordedBody<B>>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<RecordedBody<B>>>>> + Send {
        sender.try_send_request(request)
    }

    /// Requests share a connection, so that each waits for the end of the endpoint itself.
    fn severed(&self, to: &Addressed<'_>) -> impl Future<Output = ()> + Send {
        to.endpoint.severed()
    }

    fn answered(
        &self,
        _: &Addressed<'_>,
        (_, stream): Self::Connection,
        response: &mut Response<Incoming>,
    ) -> StreamSlot {
        // Same as over HTTP/1.1; the client's own connection determines the version it gets.
        *response.version_mut() = Version::HTTP_11;
        stream
    }

    /// Streams in flight may still succeed, but new requests avoid this connection.
    fn discard(&mut self, (_, stream): Self::Connection) -> bool {
        self.connections.shared.lock().retain(|shared| !Arc::ptr_eq(&shared.usage, &stream.0));
        self.since = Some(Instant::now());
        false
    }

    fn explain(&self, _: &Addressed<'_>, _: &hyper::Error) -> Option<SendError> {
        self.broke.lock().take().map(SendError::Body)
    }
}

async fn handshake<I, B>(io: I) -> io::Result<SharedConnection<B>>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let (sender, mut connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        // Window of one stream; the connection's is larger, so that a slow reader does not block others.
        .initial_stream_window_size(u32::try_from(UPSTREAM_BUFFER_BYTES).unwrap_or(u32::MAX))
        .max_send_buf_size(UPSTREAM_BUFFER_BYTES)
        .handshake(TokioIo::new(io))
        .await
        .map_err(io::Error::other)?;
    let usage = Arc::new(ConnectionUsage {
        streams: AtomicUsize::new(0),
        max_streams: AtomicUsize::new(connection.current_max_send_streams()),
        idle: Mutex::new(Instant::now()),
    });
    let shared_usage = usage.clone();
    // The task ends with the connection, which ends when all senders and response bodies are gone.
    tokio::spawn(async move {
        let ended = std::future::poll_fn(|cx| {
            let polled = Pin::new(&mut connection).poll(cx);
            // The server's SETTINGS may have changed the limit.
            shared_usage.max_streams.store(connection.current_max_send_streams(), Ordering::Relaxed);
            polled
        });
        if let Err(error) = ended.await {
            tracing::trace!(%error, "a connection to an endpoint ended");
        }
    });
    Ok(SharedConnection { sender, opened_at: Instant::now(), usage })
}

// === impl ConnectionUsage ===

impl ConnectionUsage {
    fn has_room(&self) -> bool {
        self.streams.load(Ordering::Relaxed) < self.max_streams.load(Ordering::Relaxed).max(1)
    }

    /// Returns whether the connection has been idle for so long that the server may be closing it.
    fn is_over(&self) -> bool {
        self.streams.load(Ordering::Relaxed) == 0 && self.idle.lock().elapsed() >= MAX_IDLE
    }
}

// === impl StreamSlot ===

impl StreamSlot {
    fn new(usage: &Arc<ConnectionUsage>) -> Self {
        usage.streams.fetch_add(1, Ordering::Relaxed);
        Self(usage.clone())
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        *self.0.idle.lock() = Instant::now();
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl RecordedBody ===

impl<B> Body for RecordedBody<B>
where
    B: Body + Unpin,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Data = B::Data;
    type Error = BodyFailed;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BodyFailed>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            frame.map_err(|error| {
                *self.broke.lock() = Some(error.into());
                BodyFailed
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
