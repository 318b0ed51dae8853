//! WebSockets: after the endpoint has said 101, bytes go both ways until one side has no more to say. A client whose
//! WebSocket ends for a reason of ours, or of a broken endpoint, is told in a close frame.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{
    Version,
    header::{CONNECTION, UPGRADE},
    request,
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{connection_state::ConnectionState, exchange::Exchange, lease::Lease, ws_frames::Frames};
use crate::{
    config::budget::TUNNEL_BUFFER_BYTES,
    domain::RouteKey,
    error::{Outcome, ProxyError},
};

/// A client's wish to leave HTTP, and the connection on which it does.
pub(super) struct Upgrade {
    client: OnUpgrade,
    connection: Arc<ConnectionState>,
}

/// Both sides of a tunnel, and what it holds on to: the request is in flight until it ends.
pub(super) struct Tunnel {
    pub(super) upstream: OnUpgrade,
    pub(super) lease: Lease,
    pub(super) exchange: Exchange,
    /// When it must have ended.
    pub(super) deadline: Option<Instant>,
}

/// How a tunnel ended.
enum End {
    /// One side closed it, and the other was told.
    Closed,
    ClientBroke,
    UpstreamBroke,
    /// `timeouts.request` of the route.
    TookTooLong,
    /// Neither side said anything for the route's `idleTimeout`.
    Quiet,
    Draining,
}

/// Which end of a copy failed.
enum Broke {
    Reading,
    Writing,
}

/// How long both sides may take to let go of HTTP.
const SWITCHING: Duration = Duration::from_secs(10);

/// How long one side may go on after the other has closed.
const HALF_CLOSED: Duration = Duration::from_secs(30);

/// How long a client may take to read why its WebSocket ends.
const CLOSING: Duration = Duration::from_secs(1);

// === impl Upgrade ===

impl Upgrade {
    /// Takes the wish out of a request. Only WebSockets are tunnelled: over another protocol, such as HTTP/2, a client
    /// could send requests that no rule of ours has seen.
    pub(super) fn asked(head: &mut request::Parts, connection: &Arc<ConnectionState>) -> Option<Self> {
        let wants = head.version == Version::HTTP_11
            && head.headers.get(UPGRADE).is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
            && head.headers.get_all(CONNECTION).iter().any(|options| {
                let options = options.as_bytes().split(|byte| *byte == b',');
                options.map(<[u8]>::trim_ascii).any(|option| option.eq_ignore_ascii_case(b"upgrade"))
            });
        let client = head.extensions.remove::<OnUpgrade>().filter(|_| wants)?;
        Some(Self { client, connection: connection.clone() })
    }

    /// The answer that is about to go out is the last HTTP on its connection; then this begins.
    pub(super) fn begin(self, tunnel: Tunnel) {
        let client = self.client;
        self.connection.then(async move { tunnel.run(client).await });
    }
}

// === impl Tunnel ===

impl Tunnel {
    async fn run(self, client: OnUpgrade) {
        let Self { upstream, lease, mut exchange, deadline } = self;
        let idle = exchange.gate().policy().upstream.idle_timeout.get();
        let switched = timeout(SWITCHING, async { tokio::try_join!(client, upstream) }).await;
        // Otherwise the client has gone before it could see the 101.
        if let Ok(Ok((client, upstream))) = switched {
            let gate = exchange.gate().clone();
            let over = async {
                tokio::select! {
                    // A limit that was known from the start says more than the end of the proxy.
                    biased;
                    () = until(deadline) => End::TookTooLong,
                    () = gate.evicted() => End::Draining,
                }
            };
            match carry(client, upstream, idle, over, gate.key()).await {
                End::Closed => exchange.end(Outcome::Completed),
                End::UpstreamBroke | End::TookTooLong | End::Quiet => exchange.end(Outcome::UpstreamError),
                End::Draining => exchange.end(Outcome::Draining),
                // Why, is for the account to find out: gone, stalled or cut off.
                End::ClientBroke => {}
            }
        }
        drop(lease);
        drop(exchange);
    }
}

// === impl End ===

impl End {
    /// What the client is told, if it is there to be told.
    fn error(&self, route: &RouteKey) -> Option<ProxyError> {
        let route = route.clone();
        Some(match self {
            Self::Closed | Self::ClientBroke => return None,
            Self::UpstreamBroke => {
                ProxyError::UpstreamError { route, reason: "the endpoint broke its connection off".into() }
            }
            Self::TookTooLong => {
                ProxyError::UpstreamTimeout { route, reason: "timeouts.request of the route is over".into() }
            }
            Self::Quiet => {
                ProxyError::UpstreamTimeout { route, reason: "nothing was said for too long".into() }
            }
            Self::Draining => ProxyError::Draining { admitted: true },
        })
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn carry(
    client: Upgraded,
    upstream: Upgraded,
    idle: Duration,
    over: impl Future<Output = End>,
    route: &RouteKey,
) -> End {
    let (mut from_client, mut to_client) = split(TokioIo::new(client));
    let (mut from_upstream, mut to_upstream) = split(TokioIo::new(upstream));
    let (moved, closed) = (AtomicBool::new(true), AtomicBool::new(false));
    let (mut asked, mut frames) = (Frames::default(), Frames::default());
    let end = {
        let up = async {
            let copied = async {
                copy(&mut from_client, &mut to_upstream, &mut asked, &moved, &closed).await?;
                to_upstream.shutdown().await.map_err(|_| Broke::Writing)
            };
            copied.await.map_err(|broke| match broke {
                Broke::Reading => End::ClientBroke,
                Broke::Writing => End::UpstreamBroke,
            })
        };
        let down = async {
            let copied = async {
                copy(&mut from_upstream, &mut to_client, &mut frames, &moved, &closed).await?;
                // A server that dies says nothing any more, and its kernel ends the connection in good order.
                if frames.may_close() && !closed.load(Ordering::Relaxed) {
                    return Err(Broke::Reading);
                }
                to_client.shutdown().await.map_err(|_| Broke::Writing)
            };
            copied.await.map_err(|broke| match broke {
                Broke::Reading => End::UpstreamBroke,
                Broke::Writing => End::ClientBroke,
            })
        };
        let quiet = async {
            while moved.swap(false, Ordering::Relaxed) {
                sleep(idle).await;
            }
        };
        let both = async {
            tokio::pin!(up, down);
            tokio::select! {
                // Neither way matters more, and both are polled whenever the task is.
                biased;
                first = &mut up => {
                    first?;
                    let _ = timeout(HALF_CLOSED, down).await;
                }
                first = &mut down => {
                    first?;
                    let _ = timeout(HALF_CLOSED, up).await;
                }
            }
            // The other had nothing to say any more, or was cut off while it still talked to nobody.
            Ok(End::Closed)
        };
        let both = async { both.await.unwrap_or_else(|end| end) };
        tokio::select! {
            // It is not quiet if something moves, and what has ended in time has ended well.
            biased;
            end = both => end,
            () = quiet => End::Quiet,
            end = over => end,
        }
    };
    if let Some(close) = end.error(route).and_then(|error| frames.close(&error)) {
        let closing = async {
            to_client.write_all(&close).await?;
            to_client.shutdown().await
        };
        // Whether or not it reads that, it ends here.
        let _ = timeout(CLOSING, closing).await;
    }
    end
}

/// Copies until there is no more. `closed`: a close frame has been passed on, in whatever direction.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    frames: &mut Frames,
    moved: &AtomicBool,
    closed: &AtomicBool,
) -> Result<(), Broke> {
    let mut buffer = vec![0; TUNNEL_BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await.map_err(|_: io::Error| Broke::Reading)?;
        moved.store(true, Ordering::Relaxed);
        if count == 0 {
            return Ok(());
        }
        frames.begin();
        let written = async {
            to.write_all(&buffer[..count]).await?;
            to.flush().await
        };
        written.await.map_err(|_| Broke::Writing)?;
        frames.pass(&buffer[..count]);
        if frames.is_closed() {
            closed.store(true, Ordering::Relaxed);
        }
    }
}
