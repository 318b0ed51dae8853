//! Serves gRPC on a listener: for KEDA, and for other replicas. Every connection, handshake and stream has a bound.

mod tls;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, Sleep, sleep, sleep_until, timeout_at},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{
    Extensions,
    transport::{
        Server,
        server::{Connected, Router},
    },
};

use crate::{
    config::budget::GRPC_CONNECTIONS,
    h2_frames::{Frames, PREFACE, TOO_MANY},
    places::{InUse, Place, Places, Source},
};

pub use tls::{Tls, TlsError};

/// A bound address where gRPC is spoken.
#[derive(Clone)]
pub struct GrpcListener {
    listener: Arc<TcpListener>,
    tls: Option<Arc<Tls>>,
    connections: Arc<Places>,
    open: Arc<Semaphore>,
}

/// A client's connection.
pub struct Connection {
    io: Box<dyn Io>,
    caller: Caller,
    frames: Frames,
    /// As long as its client has not begun to speak HTTP/2.
    beginning: Option<Beginning>,
    /// From then on, until it was idle for too long.
    idle: Option<Idle>,
    /// What h2 has still to read of [`GOODBYE`].
    goodbye: &'static [u8],
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
    _place: Place,
    _open: OwnedSemaphorePermit,
}

/// The connection that a call comes over.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    source: Source,
    uses: Arc<AtomicUsize>,
}

/// The place of a stream, whose connection is in use as long as it is open.
pub struct StreamPlace(#[expect(dead_code, reason = "given back when dropped")] (Place, InUse));

/// What a client must have sent, and by when. Afterwards pings find out whether it is there.
struct Beginning {
    missing: usize,
    end: Pin<Box<Sleep>>,
}

/// Tells since when no call has come and no stream is open.
struct Idle {
    /// The newest call when the timer was set.
    newest: u32,
    timer: Pin<Box<Sleep>>,
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// How many connections may be open to one listener. KEDA has one or a few, and so has each replica.
const CONNECTIONS: usize = GRPC_CONNECTIONS;

/// How many of them one source may have. Its next one takes the place of its oldest, of those without a stream if there is one.
const CONNECTIONS_PER_SOURCE: usize = 32;

/// How many more may be open that were evicted and are about to end.
const LEAVING: usize = 32;

/// How many calls may be under way on one connection. KEDA has a single one for all of its ScaledObjects, and what is
/// above the limit waits in silence there; so this is far above what streams there may be.
const CALLS: u32 = 10_000;

/// How long it may take until a client that has connected speaks HTTP/2, with the TLS handshake: one that says nothing
/// would keep its place among [`CONNECTIONS`] for good.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a connection may have no call and no stream. It ends after that, or after twice that where a stream has ended
/// meanwhile. KEDA polls each 30 s by default, and its client connects again by itself.
const IDLE: Duration = Duration::from_secs(300);

/// What h2 is given to read when a connection has been idle for too long: the GOAWAY of a client that needs nothing further
/// (RFC 9113, section 6.8). h2 answers it with its own as soon as no stream is open, and closes. So a call that crosses
/// that is known not to have been looked at, and gRPC's clients send it again over the next connection.
const GOODBYE: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Frames that are no part of a call, in a second and at once: far above those of KEDA when it drops all of its streams.
const MAX_CONTROL_FRAMES: u32 = 10_000;

/// How often a silent client is asked whether it is there, and how long it may take to answer. KEDA never asks us, and
/// without that a connection through a firewall that has forgotten it would be silent for good.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));

/// How long to wait after the system refused a connection for want of something.
const REFUSED: Duration = Duration::from_millis(100);

/// A server with our bounds, to add services to.
pub fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(CALLS)
        .http2_keepalive_interval(Some(PING.0))
        .http2_keepalive_timeout(Some(PING.1))
        .http2_max_header_list_size(16 << 10)
}

// === impl GrpcListener ===

impl GrpcListener {
    /// Binds the address.
    ///
    /// # Errors
    /// When it cannot be had.
    pub async fn bind(address: SocketAddr, tls: Option<Tls>) -> io::Result<Self> {
        Ok(Self {
            listener: Arc::new(TcpListener::bind(address).await?),
            tls: tls.map(Arc::new),
            connections: Places::new(CONNECTIONS, CONNECTIONS_PER_SOURCE),
            open: Arc::new(Semaphore::new(CONNECTIONS + LEAVING)),
        })
    }

    /// Where it is.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `ending`; then connections end with the calls that are under way, and this returns when they
    /// have. Others may serve here at the same time or afterwards.
    pub async fn serve(&self, router: Router, ending: CancellationToken) {
        let (sender, accepted) = mpsc::channel(1);
        let accepting = async {
            tokio::select! {
                // The end first: what comes then is for others.
                biased;
                () = ending.cancelled() => {}
                () = self.accept(sender) => {}
            }
        };
        let accepted = ReceiverStream::new(accepted).map(Ok::<_, Infallible>);
        let serving = router.serve_with_incoming_shutdown(accepted, ending.cancelled());
        let (served, ()) = tokio::join!(serving, accepting);
        if let Err(error) = served {
            tracing::error!(%error, "the gRPC server has ended");
        }
    }

    /// Never ends by itself; cancel-safe, but for handshakes under way.
    async fn accept(&self, sender: mpsc::Sender<Connection>) {
        let mut handshakes = JoinSet::new();
        loop {
            // The semaphore is never closed.
            let Ok(open) = self.open.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                // Both are rare. Ended handshakes first, so that they do not pile up.
                biased;
                Some(_) = handshakes.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let (tls, sender) = (self.tls.clone(), sender.clone());
                    let source = Source::of(peer.ip());
                    let place = self.connections.enter(source, CancellationToken::new());
                    let caller = Caller { source, uses: place.uses().clone() };
                    handshakes.spawn(async move {
                        // Pushes are small, and must not wait for more.
                        let opened = match stream.set_nodelay(true) {
                            Ok(()) => Connection::open(stream, caller, tls, place, open).await,
                            Err(error) => Err(error),
                        };
                        match opened {
                            Ok(connection) => drop(sender.send(connection).await),
                            Err(error) => tracing::debug!(%peer, %error, "a gRPC connection was not made"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a gRPC connection was not accepted");
                    sleep(REFUSED).await;
                }
            }
        }
    }
}

// === impl Connection ===

impl Connection {
    async fn open(
        stream: impl Io + 'static,
        caller: Caller,
        tls: Option<Arc<Tls>>,
        place: Place,
        open: OwnedSemaphorePermit,
    ) -> io::Result<Self> {
        let end = Instant::now() + HANDSHAKE;
        let evicted = || place.evicted().clone();
        let io: Box<dyn Io> = match tls {
            None => Box::new(stream),
            Some(tls) => {
                let acceptor = tls.acceptor().await;
                let handshake = evicted().run_until_cancelled_owned(acceptor.accept(stream));
                let stream = timeout_at(end, handshake).await?.ok_or(io::ErrorKind::ConnectionAborted)?;
                Box::new(stream?)
            }
        };
        let beginning = Beginning { missing: PREFACE.len(), end: Box::pin(sleep_until(end)) };
        let evicted = Box::pin(evicted().cancelled_owned());
        let frames = Frames::new(MAX_CONTROL_FRAMES);
        let beginning = Some(beginning);
        Ok(Self {
            io,
            caller,
            frames,
            beginning,
            idle: None,
            goodbye: &[],
            evicted,
            _place: place,
            _open: open,
        })
    }

    /// Nothing to read: has there been no call and no stream for too long?
    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let newest = self.frames.newest();
        let Some(idle) = &mut self.idle else { return Poll::Pending };
        while idle.timer.as_mut().poll(context).is_ready() {
            if idle.newest == newest && self.caller.uses.load(Ordering::Relaxed) == 0 {
                self.idle = None;
                return Poll::Ready(());
            }
            idle.newest = newest;
            idle.timer.as_mut().reset(Instant::now() + IDLE);
        }
        Poll::Pending
    }

    const fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.frames.wrote(*bytes);
        }
        written
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

// === impl Caller ===

impl Caller {
    /// The connection of a call; of one in memory, nothing is known.
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get().cloned().unwrap_or_default()
    }

    /// Where it comes from.
    pub const fn source(&self) -> Source {
        self.source
    }
}

// === impl StreamPlace ===

impl StreamPlace {
    /// The place of a stream of this caller.
    pub fn new(place: Place, caller: &Caller) -> Self {
        Self((place, InUse::new(caller.uses.clone())))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.goodbye.is_empty() {
            let (now, later) = self.goodbye.split_at(self.goodbye.len().min(buffer.remaining()));
            buffer.put_slice(now);
            self.goodbye = later;
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if read.is_pending() && self.evicted.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if let Some(beginning) = &mut self.beginning {
            beginning.missing = beginning.missing.saturating_sub(buffer.filled().len() - before);
            if beginning.missing == 0 {
                self.beginning = None;
                self.idle = Some(Idle { newest: 0, timer: Box::pin(sleep(IDLE)) });
            } else if read.is_pending() && beginning.end.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        // A client that stops within a frame or a head answers no PING, and ends by that.
        if read.is_pending() && self.frames.is_between() && self.poll_idle(context).is_ready() {
            tracing::debug!(peer = %self.caller.source(), "a gRPC connection was idle for too long");
            self.goodbye = GOODBYE;
            return self.poll_read(context, buffer);
        }
        if !self.frames.came(&buffer.filled()[before..]) {
            tracing::debug!(peer = %self.caller.source(), "a gRPC connection ends: {TOO_MANY}");
            return Poll::Ready(Err(io::Error::other(TOO_MANY)));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.wrote(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
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
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
