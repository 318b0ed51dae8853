//! Connections to endpoints: one pool for each thread that serves requests, and what may be tried again.

mod h2;
mod severable;

use std::{collections::HashMap, future::Future, io, pin::Pin, sync::Arc, time::Duration};

use http::{Request, Response, request};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, sleep},
};

use severable::Severable;

use crate::{
    config::budget::UPSTREAM_BUFFER_BYTES,
    domain::{Period, UpstreamTimeouts},
    state::{Cut, Endpoint, Protocol},
};

/// Connects to endpoints and keeps connections that may be used again.
pub struct Upstream<B> {
    dialer: Dialer,
    idle: Mutex<HashMap<u64, Vec<Idle<B>>>>,
    http2: h2::Pool<B>,
}

/// How connections are made.
#[derive(Clone, Default)]
pub enum Dialer {
    /// Over TCP.
    #[default]
    Tcp,
    /// Otherwise: in memory, for tests on a paused clock.
    Other(Arc<dyn Dial>),
}

/// Makes a connection.
pub trait Dial: Send + Sync {
    /// Connects to `address`.
    fn dial(&self, address: &str) -> Dialing;
}

/// A connection being made.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send>>;

/// A connection in both directions.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

struct Idle<B> {
    pooled: Pooled<B>,
    since: Instant,
}

/// A connection that is free for a request.
struct Pooled<B> {
    sender: SendRequest<B>,
    cut: Arc<Cut>,
}

/// The connection of a request in flight. Returned to the pool when the answer has been read to its end; dropped
/// before, it is closed, by which the server knows that nobody listens any more.
pub struct Connection<B>(Held<B>);

enum Held<B> {
    Http1 {
        pooled: Pooled<B>,
        endpoint: u64,
    },
    /// A part of a connection: dropping the answer's body resets its stream alone.
    Http2 {
        _stream: h2::Stream,
    },
}

/// A connection that was made.
enum Dialed {
    Tcp(TcpStream),
    Other(Box<dyn Io>),
}

/// Why there is no response head.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum SendError {
    #[error("cannot connect to {address}: {source}")]
    Connect { address: Box<str>, source: io::Error },
    #[error("connecting to {0} took too long")]
    ConnectTimeout(Box<str>),
    #[error("{address} broke the connection off before it answered: {}", chain(.source))]
    Reset { address: Box<str>, source: hyper::Error },
    /// Its publisher says so. A server may have seen the request, but nobody will answer it.
    #[error("{0} is gone, as the cluster says")]
    Gone(Box<str>),
    #[error("the request body broke off: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error(
        "{address} answered with more than {limit} header fields, or with a head of more than 64 KiB; \
         `upstream.maxResponseHeaders` of the route says how many there may be"
    )]
    HeadTooLarge { address: Box<str>, limit: usize },
    #[error("{address} sent no response head within {}", Period::from(*.limit))]
    ResponseTimeout { address: Box<str>, limit: Duration },
}

/// Which connection a request may take, and what becomes of it if that breaks before the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// A pooled one. If that turns out to be stale, a new one replaces it, never another pooled one: the server has mostly
    /// closed them all.
    Pooled,
    /// A pooled one, replaced only if nothing was written: what the request does must not be done twice.
    Once,
    /// A new one.
    Never,
}

/// A server closes idle connections after 5 s (uvicorn's default, under vLLM); a request that is sent into one that is
/// being closed fails. So they are used again for a shorter time than that.
const IDLE: Duration = Duration::from_secs(4);

/// A pooled connection that breaks so soon after a request was written had been closed before: the server has not seen
/// the request, or has begun nothing with it. A later break is the server's own.
const STALE: Duration = Duration::from_secs(1);

/// When an endpoint has been silent for 15 s, the kernel asks whether it lives, and three more times every 5 s.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(5))
    .with_retries(3);

/// How long what was sent to an endpoint may stay without the kernel's acknowledgement there.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// How long connecting rests when this process, and not the endpoint, has nothing left to connect with.
const REST: Duration = Duration::from_millis(50);

// === impl Upstream ===

impl<B> Upstream<B>
where
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// An empty pool.
    pub fn new(dialer: Dialer) -> Self {
        Self { dialer, idle: Mutex::default(), http2: h2::Pool::default() }
    }

    /// Sends a request and waits for the head of its response. A stale connection is replaced by a new one, if `body`
    /// makes the body again where it was written.
    ///
    /// # Errors
    /// When there is no response head. [`SendError::Reset`] and [`SendError::ResponseTimeout`] say that a server may have
    /// seen the request.
    pub async fn send(
        &self,
        endpoint: &Endpoint,
        head: &request::Parts,
        mut body: impl FnMut() -> Option<B>,
        timeouts: UpstreamTimeouts,
        reuse: Reuse,
    ) -> Result<(Response<Incoming>, Connection<B>), SendError> {
        if endpoint.protocol() == Protocol::H2c {
            // On the heap, so that it costs the others nothing.
            let sending = self.http2.send(&self.dialer, endpoint, head, body, timeouts, reuse);
            let (response, stream) = Box::pin(sending).await?;
            return Ok((response, Connection(Held::Http2 { _stream: stream })));
        }
        let mut pooled = (reuse != Reuse::Never).then(|| self.take(endpoint.id())).flatten();
        let mut unsent = None;
        loop {
            let reused = pooled.as_ref().map(|_| Instant::now());
            let mut connection = match pooled.take() {
                Some(pooled) => pooled,
                // On the heap: mostly there is a connection.
                None => Box::pin(self.connect(endpoint, timeouts)).await?,
            };
            // The body is taken when there is a connection for it: until then, one that streams can still be held.
            let Some(request) = unsent.take().or_else(|| body().map(|body| with_head(head, body))) else {
                let source = io::Error::other("the body has been sent already");
                return Err(SendError::Connect { address: endpoint.address().into(), source });
            };
            let limit = timeouts.response_timeout.get();
            let address = || endpoint.address().into();
            let sent = tokio::time::timeout(limit, connection.sender.try_send_request(request)).await;
            match sent {
                Ok(Ok(response)) => {
                    connection.cut.set_answering(true);
                    let held = Held::Http1 { pooled: connection, endpoint: endpoint.id() };
                    return Ok((response, Connection(held)));
                }
                Ok(Err(_)) if connection.cut.is_cut() => return Err(SendError::Gone(address())),
                Ok(Err(mut error)) => match error.take_message() {
                    Some(message) if reused.is_some() => unsent = Some(message),
                    Some(_) => {
                        let source = io::Error::new(io::ErrorKind::ConnectionReset, "closed at once");
                        return Err(SendError::Connect { address: address(), source });
                    }
                    None => {
                        let source = error.into_error();
                        if source.is_parse_too_large() {
                            let limit = timeouts.max_response_headers;
                            return Err(SendError::HeadTooLarge { address: address(), limit });
                        }
                        match reuse.is_stale(reused, &source).then(&mut body).flatten() {
                            Some(again) => unsent = Some(with_head(head, again)),
                            None => return Err(SendError::Reset { address: address(), source }),
                        }
                    }
                },
                Err(_) => return Err(SendError::ResponseTimeout { address: address(), limit }),
            }
        }
    }

    /// The answer has been read to its end: the connection may be used again.
    pub fn put_back(&self, connection: Connection<B>) {
        if let Held::Http1 { pooled, endpoint } = connection.0
            && !pooled.sender.is_closed()
        {
            pooled.cut.set_answering(false);
            let idle = Idle { pooled, since: Instant::now() };
            self.idle.lock().entry(endpoint).or_default().push(idle);
        }
    }

    /// Closes connections that have been idle for too long.
    pub fn sweep(&self) {
        self.http2.sweep();
        self.idle.lock().retain(|_, idle| {
            idle.retain(|idle| idle.since.elapsed() < IDLE && !idle.pooled.sender.is_closed());
            !idle.is_empty()
        });
    }

    /// The connection that was used last is the one most likely to live.
    fn take(&self, endpoint: u64) -> Option<Pooled<B>> {
        let mut idle = self.idle.lock();
        let idle = idle.get_mut(&endpoint)?;
        while let Some(candidate) = idle.pop() {
            if candidate.pooled.sender.is_ready() && candidate.since.elapsed() < IDLE {
                return Some(candidate.pooled);
            }
        }
        None
    }

    async fn connect(&self, endpoint: &Endpoint, timeouts: UpstreamTimeouts) -> Result<Pooled<B>, SendError> {
        let address = endpoint.address();
        let limit = timeouts.connect_timeout.get();
        let connecting = async {
            // What idles has what is wanted.
            let dialed = self.dialer.dial(address, limit, || self.idle.lock().clear()).await?;
            let headers = timeouts.max_response_headers;
            let cut = endpoint.connection();
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
}

// === impl Dialer ===

impl Dialer {
    /// Connects. If there is nothing left to connect with, it waits for some, almost until `limit` and at least for one
    /// rest, so that who tries again and again does not spin; `make_room` gives back what is not needed.
    async fn dial(&self, address: &str, limit: Duration, make_room: impl Fn()) -> io::Result<Dialed> {
        let began = Instant::now();
        loop {
            match self.dial_once(address).await {
                Err(error) if is_starved(&error) => {
                    make_room();
                    sleep(REST).await;
                    if began.elapsed() + 2 * REST > limit {
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
                notice_silence(&stream);
                Ok(Dialed::Tcp(stream))
            }
            Self::Other(dial) => dial.dial(address).await.map(Dialed::Other),
        }
    }
}

/// Has the kernel notice a node that died without a word, within half a minute. A model server may take its time, but its
/// kernel does not. What cannot be set leaves the route's time-outs.
fn notice_silence(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_keepalive(&KEEPALIVE);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
}

/// Whether it was this process or its machine that had no file descriptors, ports or memory left: no word of the endpoint.
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
    // As many as hyper takes by itself are parsed without an allocation.
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

fn with_head<B>(head: &request::Parts, body: B) -> Request<B> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = head.uri.clone();
    *request.headers_mut() = head.headers.clone();
    request
}

// === impl Reuse ===

impl Reuse {
    /// Whether a connection that broke before the answer had been closed before the request was written, at `pooled` if
    /// it came from the pool.
    fn is_stale(self, pooled: Option<Instant>, error: &hyper::Error) -> bool {
        // What cannot be parsed was said by a server that lives.
        self == Self::Pooled && pooled.is_some_and(|at| at.elapsed() < STALE) && !error.is_parse()
    }
}

// === impl SendError ===

impl SendError {
    /// Which one it is, in a word.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "connect",
            Self::ConnectTimeout(_) => "connect_timeout",
            Self::Reset { .. } => "reset",
            Self::Gone(_) => "gone",
            Self::Body(_) => "request_body",
            Self::HeadTooLarge { .. } => "head_too_large",
            Self::ResponseTimeout { .. } => "response_timeout",
        }
    }

    /// Whether it says nothing of the endpoint: there was nothing left here to connect with.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if is_starved(source))
    }
}

/// An error and what caused it, in one line: hyper keeps the cause apart.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// What a node does that dies cannot be shown without one: that the kernel has been told is.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_kernel_is_told_to_notice_silence() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let Dialed::Tcp(stream) = Dialer::Tcp.dial_once(&address).await.unwrap() else { panic!("not TCP") };
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        let asked = (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
        assert_eq!(asked, (Duration::from_secs(15), Duration::from_secs(5)));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(UNACKNOWLEDGED));
    }
}
