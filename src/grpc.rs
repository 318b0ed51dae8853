//! gRPC listeners: for KEDA, and for other replicas. Connections, handshakes and streams are bounded.

mod calls;
mod codec;
mod tls;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{JoinSet, coop},
    time::{Instant, Sleep, sleep, sleep_until, timeout_at},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{
    service::Routes,
    transport::{Server, server::Connected},
};
use tower::layer::util::{Identity, Stack};

use crate::{
    config::budget::{GRPC_CONNECTIONS, GRPC_HEAD_BYTES, GRPC_LEAVING_CONNECTIONS},
    h2_frames::{H2FrameParser, PREFACE, TOO_MANY_FRAMES},
    places::{Place, Places, Source},
};

use calls::{CallLayer, CallPlaces};
pub use calls::{Caller, StreamPlace};
pub use codec::SmallBufferCodec;
pub use tls::{Tls, TlsError};

/// A bound address that serves gRPC.
#[derive(Clone)]
pub struct GrpcListener {
    listener: Arc<TcpListener>,
    tls: Option<Arc<Tls>>,
    connections: Arc<Places>,
    open: Arc<Semaphore>,
    calls: Arc<CallPlaces>,
}

/// A client's connection.
pub struct GrpcConnection {
    io: Box<dyn GrpcIo>,
    caller: Caller,
    frames: H2FrameParser,
    /// Deadline of the preface; `None` once the client speaks HTTP/2.
    preface_deadline: Option<PrefaceDeadline>,
    /// Idle timer. Set once the client speaks HTTP/2, and removed once the connection has been idle for too long.
    idle: Option<IdleTimer>,
    /// Rest of [`GOAWAY_FRAME`] that h2 has yet to read.
    unread_goaway: &'static [u8],
    /// The last write did not complete, as the client does not read.
    is_write_blocked: bool,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
    _place: Place,
    _open: OwnedSemaphorePermit,
}

/// Bytes of the preface that a client must still send, and the deadline. Afterwards pings detect dead clients.
struct PrefaceDeadline {
    missing: usize,
    end: Pin<Box<Sleep>>,
}

/// Timer of a connection without calls and streams.
struct IdleTimer {
    /// Id of the newest call when the timer was set.
    newest: u32,
    timer: Pin<Box<Sleep>>,
}

trait GrpcIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> GrpcIo for T {}

/// Maximum number of connections per listener. KEDA has one or a few, and so has each replica.
const MAX_GRPC_CONNECTIONS: usize = GRPC_CONNECTIONS;

/// Maximum number of connections per source. A further connection evicts the oldest one of its source, preferably one
/// without a stream.
const CONNECTIONS_PER_SOURCE: usize = 32;

/// Maximum bytes per read of a connection. h2 keeps every head that it has read until all have been handed to the
/// services, and 12 bytes can be a head.
const MAX_READ_BYTES: usize = 1 << 10;

/// Initial flow-control window of a call, in bytes: how much of its message may arrive unread. That of a connection
/// stays at hyper's 1 MiB: h2 bounds by it the small messages that may arrive at once, and KEDA has many streams on one
/// connection.
const STREAM_WINDOW_BYTES: u32 = 16 << 10;

/// Time from accepting a connection until the client speaks HTTP/2, including the TLS handshake. A silent client would
/// otherwise keep its place among [`MAX_GRPC_CONNECTIONS`] forever.
const GRPC_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time a connection may have no call and no stream. The connection ends after that, or after twice that if a stream
/// has ended meanwhile. KEDA polls every 30 s by default, and its client reconnects by itself.
const GRPC_IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// GOAWAY of a client that makes no further calls (RFC 9113, section 6.8). h2 reads these bytes as if the client had
/// sent them once a connection has been idle for too long. It responds with its own GOAWAY as soon as no stream is
/// open, and closes. A call sent at the same moment is then known to be unprocessed, and gRPC clients send it again
/// over the next connection.
const GOAWAY_FRAME: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Maximum number of frames that are not part of a call, per second and in a burst: far above those of KEDA when it
/// drops all of its streams.
const MAX_CONTROL_FRAMES: u32 = 10_000;

/// Interval of pings to a silent client, and timeout of the response. KEDA sends no pings, so without these a
/// connection that a firewall has dropped would stay open forever.
const PING_INTERVAL_AND_TIMEOUT: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));

/// Pause after the system failed to accept a connection for lack of a resource.
const ACCEPT_FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// Returns a server with these bounds, and at most `max_calls` calls under way per connection.
fn server(max_calls: u32) -> Server<Stack<CallLayer, Identity>> {
    Server::builder()
        .max_concurrent_streams(max_calls)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_keepalive_interval(Some(PING_INTERVAL_AND_TIMEOUT.0))
        .http2_keepalive_timeout(Some(PING_INTERVAL_AND_TIMEOUT.1))
        .http2_max_header_list_size(GRPC_HEAD_BYTES)
        .layer(CallLayer)
}

// === impl GrpcListener ===

impl GrpcListener {
    /// Binds an address.
    ///
    /// # Errors
    /// The address is in use or unavailable.
    pub async fn bind(address: SocketAddr, tls: Option<Tls>) -> io::Result<Self> {
        Ok(Self {
            listener: Arc::new(TcpListener::bind(address).await?),
            tls: tls.map(Arc::new),
            connections: Places::new(MAX_GRPC_CONNECTIONS, CONNECTIONS_PER_SOURCE),
            open: Arc::new(Semaphore::new(MAX_GRPC_CONNECTIONS + GRPC_LEAVING_CONNECTIONS)),
            calls: Arc::new(CallPlaces::new()),
        })
    }

    /// Returns the bound address.
    ///
    /// # Errors
    /// The system does not report it.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `ending`; then connections end with the calls under way, and this returns when they have. Others
    /// may serve on this listener at the same time or afterwards. A client that has `max_calls` under way on a
    /// connection delays further ones itself, without an error.
    pub async fn serve(&self, services: Routes, max_calls: u32, ending: CancellationToken) {
        let (sender, accepted) = mpsc::channel(1);
        let accepting = async {
            tokio::select! {
                // Shutdown first: connections accepted later belong to other servers.
                biased;
                () = ending.cancelled() => {}
                () = self.accept(sender) => {}
            }
        };
        let accepted = ReceiverStream::new(accepted).map(Ok::<_, Infallible>);
        let router = server(max_calls).add_routes(services);
        let serving = router.serve_with_incoming_shutdown(accepted, ending.cancelled());
        let (served, ()) = tokio::join!(serving, accepting);
        if let Err(error) = served {
            tracing::error!(%error, "gRPC server failed");
        }
    }

    /// Accepts connections. Never returns; cancel-safe, except for handshakes under way.
    async fn accept(&self, sender: mpsc::Sender<GrpcConnection>) {
        let mut handshakes = JoinSet::new();
        loop {
            // The semaphore is never closed.
            let Ok(open) = self.open.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                // Both branches become ready rarely. Ended handshakes are joined first, so that they do not pile up.
                biased;
                Some(_) = handshakes.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let (tls, sender) = (self.tls.clone(), sender.clone());
                    let source = Source::of(peer.ip());
                    let place = self.connections.enter(source, CancellationToken::new());
                    let caller = Caller::new(source, &place, self.calls.clone());
                    handshakes.spawn(async move {
                        // Pushes are small and must not wait for more data.
                        let opened = match stream.set_nodelay(true) {
                            Ok(()) => GrpcConnection::open(stream, caller, tls, place, open).await,
                            Err(error) => Err(error),
                        };
                        match opened {
                            Ok(connection) => drop(sender.send(connection).await),
                            Err(error) => tracing::debug!(%peer, %error, "gRPC handshake failed"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a gRPC connection; retrying");
                    sleep(ACCEPT_FAILURE_PAUSE).await;
                }
            }
        }
    }
}

// === impl GrpcConnection ===

impl GrpcConnection {
    async fn open(
        stream: impl GrpcIo + 'static,
        caller: Caller,
        tls: Option<Arc<Tls>>,
        place: Place,
        open: OwnedSemaphorePermit,
    ) -> io::Result<Self> {
        let end = Instant::now() + GRPC_HANDSHAKE_TIMEOUT;
        let evicted = || place.evicted().clone();
        let io: Box<dyn GrpcIo> = match tls {
            None => Box::new(stream),
            Some(tls) => {
                let acceptor = tls.acceptor().await;
                let handshake = evicted().run_until_cancelled_owned(acceptor.accept(stream));
                let stream = timeout_at(end, handshake).await?.ok_or(io::ErrorKind::ConnectionAborted)?;
                Box::new(stream?)
            }
        };
        let beginning = PrefaceDeadline { missing: PREFACE.len(), end: Box::pin(sleep_until(end)) };
        let evicted = Box::pin(evicted().cancelled_owned());
        let frames = H2FrameParser::new(MAX_CONTROL_FRAMES);
        let beginning = Some(beginning);
        Ok(Self {
            io,
            caller,
            frames,
            preface_deadline: beginning,
            idle: None,
            unread_goaway: &[],
            is_write_blocked: false,
            evicted,
            _place: place,
            _open: open,
        })
    }

    /// Polls the idle timer while there is nothing to read. Completes if there has been no call and no stream for too
    /// long.
    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let newest = self.frames.newest();
        let Some(idle) = &mut self.idle else { return Poll::Pending };
        while idle.timer.as_mut().poll(context).is_ready() {
            if idle.newest == newest && self.caller.open_calls.load(Ordering::Relaxed) == 0 {
                self.idle = None;
                return Poll::Ready(());
            }
            idle.newest = newest;
            idle.timer.as_mut().reset(Instant::now() + GRPC_IDLE_TIMEOUT);
        }
        Poll::Pending
    }

    /// Reads some bytes, unless the client does not read its responses: h2 buffers those, and each byte read may
    /// produce more of them. Such a client does not answer a PING either, which ends its connection.
    fn poll_bounded_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_write_blocked {
            return Poll::Pending;
        }
        // TLS may have more buffered than one read returns, and heads are handed on only once reading pauses.
        let budget = ready!(coop::poll_proceed(context));
        let room = buffer.remaining().min(MAX_READ_BYTES);
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
        let read = Pin::new(&mut self.io).poll_read(context, &mut part);
        let bytes = part.filled().len();
        buffer.advance(bytes);
        if read.is_ready() {
            budget.made_progress();
        }
        read
    }

    /// Records the completion of a write, or its lack. Reading continues with the first write that completes.
    fn record_write<T>(&mut self, context: &Context<'_>, written: &Poll<io::Result<T>>) {
        if self.is_write_blocked && written.is_ready() {
            context.waker().wake_by_ref();
        }
        self.is_write_blocked = written.is_pending();
    }

    fn wrote_bytes(
        &mut self,
        context: &Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        self.record_write(context, &written);
        if let Poll::Ready(Ok(bytes)) = &written {
            self.frames.wrote(*bytes);
        }
        written
    }
}

impl Connected for GrpcConnection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for GrpcConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.unread_goaway.is_empty() {
            let (now, later) = self.unread_goaway.split_at(self.unread_goaway.len().min(buffer.remaining()));
            buffer.put_slice(now);
            self.unread_goaway = later;
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        let read = self.poll_bounded_read(context, buffer);
        if read.is_pending() && self.evicted.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if let Some(beginning) = &mut self.preface_deadline {
            beginning.missing = beginning.missing.saturating_sub(buffer.filled().len() - before);
            if beginning.missing == 0 {
                self.preface_deadline = None;
                self.idle = Some(IdleTimer { newest: 0, timer: Box::pin(sleep(GRPC_IDLE_TIMEOUT)) });
            } else if read.is_pending() && beginning.end.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        // A client that stops within a frame or a head answers no PING, which ends its connection.
        if read.is_pending() && self.frames.is_between() && self.poll_idle(context).is_ready() {
            tracing::debug!(peer = %self.caller.source, "closing an idle gRPC connection");
            self.unread_goaway = GOAWAY_FRAME;
            return self.poll_read(context, buffer);
        }
        if !self.frames.parse_frames(&buffer.filled()[before..]) {
            tracing::debug!(peer = %self.caller.source, "closing a gRPC connection: {TOO_MANY_FRAMES}");
            return Poll::Ready(Err(io::Error::other(TOO_MANY_FRAMES)));
        }
        read
    }
}

impl AsyncWrite for GrpcConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.wrote_bytes(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(context);
        self.record_write(context, &flushed);
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(context, slices);
        self.wrote_bytes(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
