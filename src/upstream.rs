//! Connections to endpoints: one pool per worker thread, and rules for reusing a connection.

mod h2;
mod send;
mod severable;

use std::{
    collections::HashMap,
    future::{Future, pending},
    io,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures_util::future::Either;
use http::{Request, Response, request};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http1::{self, SendRequest},
    },
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use strum::IntoStaticStr;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, sleep},
};

use send::{Addressed, Connector};
use severable::Severable;

use crate::{
    config::budget::UPSTREAM_BUFFER_BYTES,
    domain::{Period, UpstreamTimeouts},
    state::{Cut, Endpoint, Protocol},
};

/// Connects to endpoints and pools idle connections.
pub struct Upstream<B> {
    dialer: Dialer,
    idle: Mutex<HashMap<u64, Vec<Idle<B>>>>,
    http2: h2::Pool<B>,
}

/// Transport of new connections.
#[derive(Clone, Default)]
pub enum Dialer {
    /// TCP.
    #[default]
    Tcp,
    /// Anything else, such as in-memory connections for tests on a paused clock.
    Other(Arc<dyn Dial>),
}

/// Opens connections.
pub trait Dial: Send + Sync {
    /// Connects to `address`.
    fn dial(&self, address: &str) -> Dialing;
}

/// A connection attempt.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send>>;

/// A bidirectional connection.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

struct Idle<B> {
    pooled: Pooled<B>,
    since: Instant,
}

/// A connection without a request.
struct Pooled<B> {
    sender: SendRequest<B>,
    cut: Arc<Cut>,
}

/// Connection of a request in flight. Return it to the pool once the response has been read to its end; dropping it
/// earlier closes it, which notifies the server that the client is gone.
pub struct Connection<B>(InUse<B>);

enum InUse<B> {
    Http1 {
        pooled: Pooled<B>,
        endpoint: u64,
    },
    /// One stream of a connection; dropping the response body resets only this stream.
    Http2 {
        _stream: h2::Stream,
    },
}

/// An open connection.
enum Dialed {
    Tcp(TcpStream),
    Other(Box<dyn Io>),
}

/// Reason for a missing response head.
#[derive(Debug, Error, IntoStaticStr)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
#[strum(serialize_all = "snake_case")]
pub enum SendError {
    #[error("cannot connect to {address}: {source}")]
    Connect { address: Box<str>, source: io::Error },
    #[error("connecting to {0} timed out")]
    ConnectTimeout(Box<str>),
    #[error("{address} broke the connection off before it answered: {}", chain(.source))]
    Reset { address: Box<str>, source: hyper::Error },
    /// The connection was severed by the endpoint's publisher. A server may have seen the request, but nothing will
    /// answer it.
    #[error("{0} is gone: its pod was deleted or has died")]
    Gone(Box<str>),
    #[error("the request body broke off: {0}")]
    #[strum(serialize = "request_body")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error(
        "{address} answered with more than {limit} header fields, or with a head of more than 64 KiB; \
         raise the route's `upstream.maxResponseHeaders` if that is intended"
    )]
    HeadTooLarge { address: Box<str>, limit: usize },
    #[error("{address} sent no response head within {}", Period::from(*.limit))]
    ResponseTimeout { address: Box<str>, limit: Duration },
}

/// Connections that a request may take, and the handling of one that breaks before the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// A pooled connection. If it is stale, it is replaced by a new one, never by another pooled one: the server has
    /// probably closed them all.
    Pooled,
    /// A pooled connection, replaced only if nothing was written, for requests that must not run twice.
    Once,
    /// A new connection.
    Never,
}

/// Maximum idle time of a pooled connection. Servers close idle connections after 5 s (default of uvicorn, which vLLM
/// uses), and a request sent into a closing one fails.
const MAX_IDLE: Duration = Duration::from_secs(4);

/// A pooled connection that breaks within this time after a write was closed before the server processed the request. A
/// later break is the server's failure.
const STALE_WINDOW: Duration = Duration::from_secs(1);

/// TCP keepalive: probes after 15 s of silence, then three more every 5 s.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(5))
    .with_retries(3);

/// Maximum time that sent data may stay unacknowledged.
#[cfg(target_os = "linux")]
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between connection attempts while this process is out of file descriptors, ports or memory.
const STARVED_RETRY_INTERVAL: Duration = Duration::from_millis(50);

// === impl Upstream ===

impl<B> Upstream<B>
where
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Creates an empty pool.
    pub fn new(dialer: Dialer) -> Self {
        Self { dialer, idle: Mutex::default(), http2: h2::Pool::default() }
    }

    /// Sends a request and waits for the response head. `body` creates the body; it is called again where a stale
    /// connection is replaced after a write.
    ///
    /// # Errors
    ///
    /// If there is no response head. After [`SendError::Reset`] and [`SendError::ResponseTimeout`], a server may have
    /// seen the request.
    pub fn send<'a>(
        &'a self,
        endpoint: &'a Endpoint,
        head: &'a request::Parts,
        body: impl FnMut() -> Option<B> + 'a,
        timeouts: UpstreamTimeouts,
        reuse: Reuse,
    ) -> impl Future<Output = Result<(Response<Incoming>, Connection<B>), SendError>> {
        let to = Addressed { endpoint, head, timeouts };
        match endpoint.protocol() {
            // Boxed, so that HTTP/1.1 requests do not pay for its size.
            Protocol::H2c => {
                let connector = self.http2.connector(&self.dialer, endpoint, reuse);
                Either::Right(Box::pin(send::send(connector, to, body, reuse)))
            }
            Protocol::Http1 => Either::Left(send::send(self, to, body, reuse)),
        }
    }

    /// Returns a connection to the pool after its response was read to the end.
    pub fn put_back(&self, connection: Connection<B>) {
        if let InUse::Http1 { pooled, endpoint } = connection.0
            && !pooled.sender.is_closed()
        {
            pooled.cut.set_answering(false);
            let idle = Idle { pooled, since: Instant::now() };
            self.idle.lock().entry(endpoint).or_default().push(idle);
        }
    }

    /// Closes connections idle for too long.
    pub fn sweep(&self) {
        self.http2.sweep();
        self.idle.lock().retain(|_, idle| {
            idle.retain(|idle| idle.since.elapsed() < MAX_IDLE && !idle.pooled.sender.is_closed());
            !idle.is_empty()
        });
    }
}

impl<B> Connector<B> for &Upstream<B>
where
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Body = B;
    type Connection = Pooled<B>;

    /// Takes the most recently used connection, which is the most likely to be alive.
    fn take(&mut self, to: &Addressed<'_>) -> Option<Pooled<B>> {
        let mut idle = self.idle.lock();
        let idle = idle.get_mut(&to.endpoint.id())?;
        while let Some(candidate) = idle.pop() {
            if candidate.pooled.sender.is_ready() && candidate.since.elapsed() < MAX_IDLE {
                return Some(candidate.pooled);
            }
        }
        None
    }

    async fn connect(&mut self, to: &Addressed<'_>) -> Result<Pooled<B>, SendError> {
        let address = to.endpoint.address();
        let limit = to.timeouts.connect_timeout.get();
        let connecting = async {
            // Idle connections hold the missing resources.
            let dialed = self.dialer.dial(address, limit, || self.idle.lock().clear()).await?;
            let headers = to.timeouts.max_response_headers;
            let cut = to.endpoint.connection();
            let sender = match dialed {
                Dialed::Tcp(io) => handshake(Severable { io, cut: cut.clone() }, headers).await?,
                Dialed::Other(io) => handshake(Severable { io, cut: cut.clone() }, headers).await?,
            };
            io::Result::Ok(Pooled { sender, cut })
        };
        match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(pooled)) => Ok(pooled),
            Ok(Err(source)) => Err(SendError::Connect { address: address.into(), source }),
            Err(_) => Err(SendError::ConnectTimeout(address.into())),
        }
    }

    fn request(&self, to: &Addressed<'_>, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = to.head.method.clone();
        *request.uri_mut() = to.head.uri.clone();
        *request.headers_mut() = to.head.headers.clone();
        request
    }

    fn send(
        &self,
        connection: &mut Pooled<B>,
        request: Request<B>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<B>>>> + Send {
        connection.sender.try_send_request(request)
    }

    fn severed(&self, _: &Addressed<'_>) -> impl Future<Output = ()> + Send {
        pending()
    }

    fn answered(&self, to: &Addressed<'_>, connection: Pooled<B>, _: &mut Response<Incoming>) -> InUse<B> {
        connection.cut.set_answering(true);
        InUse::Http1 { pooled: connection, endpoint: to.endpoint.id() }
    }

    fn discard(&mut self, connection: Pooled<B>) -> bool {
        connection.cut.is_cut()
    }

    fn explain(&self, to: &Addressed<'_>, error: &hyper::Error) -> Option<SendError> {
        let limit = to.timeouts.max_response_headers;
        let address = || to.endpoint.address().into();
        error.is_parse_too_large().then(|| SendError::HeadTooLarge { address: address(), limit })
    }
}

// === impl Dialer ===

impl Dialer {
    /// Connects. Without file descriptors, ports or memory, retries until shortly before `limit`, after at least one
    /// pause so that callers cannot spin; `make_room` releases idle connections.
    async fn dial(&self, address: &str, limit: Duration, make_room: impl Fn()) -> io::Result<Dialed> {
        let began = Instant::now();
        loop {
            match self.dial_once(address).await {
                Err(error) if is_starved(&error) => {
                    make_room();
                    sleep(STARVED_RETRY_INTERVAL).await;
                    if began.elapsed() + 2 * STARVED_RETRY_INTERVAL > limit {
                        return Err(error);
                    }
                }
                dialed => return dialed,
            }
        }
    }

    async fn dial_once(&self, address: &str) -> io::Result<Dialed> {
        match self {
            Self::Tcp => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                detect_dead_peer(&stream);
                Ok(Dialed::Tcp(stream))
            }
            Self::Other(dial) => dial.dial(address).await.map(Dialed::Other),
        }
    }
}

/// Makes the kernel detect a dead node within half a minute: a model server may be slow, but its kernel is not. If an
/// option cannot be set, the route's timeouts still apply.
fn detect_dead_peer(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_keepalive(&KEEPALIVE);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
}

/// Returns whether this process or machine is out of file descriptors, ports or memory, which says nothing about the
/// endpoint.
fn is_starved(error: &io::Error) -> bool {
    use rustix::io::Errno;
    const STARVED: [Errno; 5] =
        [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
    Errno::from_io_error(error).is_some_and(|errno| STARVED.contains(&errno))
}

async fn handshake<I, B>(io: I, max_headers: usize) -> io::Result<SendRequest<B>>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut builder = http1::Builder::new();
    builder.max_buf_size(UPSTREAM_BUFFER_BYTES);
    // hyper parses its default number of headers without an allocation.
    if max_headers != 100 {
        builder.max_headers(max_headers);
    }
    let (sender, connection) = builder.handshake(TokioIo::new(io)).await.map_err(io::Error::other)?;
    // The task ends with the connection, which ends when the sender and the response body are gone.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::trace!(%error, "a connection to an endpoint ended");
        }
    });
    Ok(sender)
}

// === impl Reuse ===

impl Reuse {
    /// Returns whether a connection that broke before the response was already closed when the request was written, at
    /// `pooled` if it came from the pool.
    fn is_stale(self, pooled: Option<Instant>, error: &hyper::Error) -> bool {
        // A parse error proves that the server is alive.
        self == Self::Pooled && pooled.is_some_and(|at| at.elapsed() < STALE_WINDOW) && !error.is_parse()
    }
}

// === impl SendError ===

impl SendError {
    /// Returns a short name for metrics and records.
    pub fn name(&self) -> &'static str {
        self.into()
    }

    /// Returns whether the failure is local: out of file descriptors, ports or memory.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if is_starved(source))
    }
}

/// Formats an error with its sources in one line; hyper does not include them.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Checks the socket options only: a dying node cannot be simulated here.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn tcp_socket_detects_a_dead_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let Dialed::Tcp(stream) = Dialer::Tcp.dial_once(&address).await.unwrap() else { panic!("not TCP") };
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        let times = (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
        assert_eq!(times, (Duration::from_secs(15), Duration::from_secs(5)));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(TCP_USER_TIMEOUT));
    }
}
