//! WebSockets: after the endpoint's 101, bytes are copied both ways until one side is finished. If the proxy ends a
//! WebSocket, or its endpoint breaks it off, the client receives a close frame with the reason.

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

use super::{connection_state::ConnectionState, exchange::Exchange, lease::Lease, ws_frames::WsFrameTracker};
use crate::{
    config::budget::TUNNEL_BUFFER_BYTES,
    domain::RouteKey,
    error::{Outcome, ProxyError},
};

/// A client's request to leave HTTP, and its connection.
pub(super) struct Upgrade {
    client: OnUpgrade,
    connection: Arc<ConnectionState>,
}

/// Both sides of a tunnel, and the resources it holds: the request is in flight until the tunnel ends.
pub(super) struct Tunnel {
    pub(super) upstream: OnUpgrade,
    pub(super) lease: Lease,
    pub(super) exchange: Exchange,
    /// Deadline of the whole tunnel.
    pub(super) deadline: Option<Instant>,
}

/// Reason for the end of a tunnel.
enum TunnelEnd {
    /// One side closed the tunnel, and the other was notified.
    Closed,
    ClientBroke,
    UpstreamBroke,
    /// `timeouts.request` of the route has passed.
    TookTooLong,
    /// No traffic for the route's `idleTimeout`.
    Quiet,
    Draining,
}

/// End of a copy that failed.
enum CopyError {
    Reading,
    Writing,
}

/// Timeout for both sides to switch protocols.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time that one side may continue after the other has closed.
const HALF_CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Time for a client to read the close frame.
const CLOSE_FRAME_TIMEOUT: Duration = Duration::from_secs(1);

// === impl Upgrade ===

impl Upgrade {
    /// Takes the upgrade out of a request. Only WebSockets are tunnelled: over another protocol, such as HTTP/2, a
    /// client could send requests that bypass all rules.
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

    /// Starts the tunnel after the next response, the last one over HTTP on its connection.
    pub(super) fn begin(self, tunnel: Tunnel) {
        let client = self.client;
        self.connection.set_takeover(async move { tunnel.run(client).await });
    }
}

// === impl Tunnel ===

impl Tunnel {
    async fn run(self, client: OnUpgrade) {
        let Self { upstream, lease, mut exchange, deadline } = self;
        let idle = exchange.gate().policy().upstream.idle_timeout.get();
        let switched = timeout(UPGRADE_TIMEOUT, async { tokio::try_join!(client, upstream) }).await;
        // Otherwise the client disconnected before it could receive the 101.
        if let Ok(Ok((client, upstream))) = switched {
            let gate = exchange.gate().clone();
            let over = async {
                tokio::select! {
                    // The deadline is a more precise reason than a shutdown of the proxy.
                    biased;
                    () = until(deadline) => TunnelEnd::TookTooLong,
                    () = gate.evicted() => TunnelEnd::Draining,
                }
            };
            match carry(client, upstream, idle, over, gate.key()).await {
                TunnelEnd::Closed => exchange.end(Outcome::Completed),
                TunnelEnd::UpstreamBroke | TunnelEnd::TookTooLong | TunnelEnd::Quiet => {
                    exchange.end(Outcome::UpstreamError)
                }
                TunnelEnd::Draining => exchange.end(Outcome::Draining),
                // The exchange determines the reason: disconnected, stalled or cut off.
                TunnelEnd::ClientBroke => {}
            }
        }
        drop(lease);
        drop(exchange);
    }
}

// === impl TunnelEnd ===

impl TunnelEnd {
    /// Returns the error to report to the client, if it is still connected.
    fn error(&self, route: &RouteKey) -> Option<ProxyError> {
        let route = route.clone();
        Some(match self {
            Self::Closed | Self::ClientBroke => return None,
            Self::UpstreamBroke => ProxyError::UpstreamError {
                route,
                reason: "the endpoint closed the connection without a close frame".into(),
            },
            Self::TookTooLong => ProxyError::UpstreamTimeout {
                route,
                reason: "the request exceeded `timeouts.request` of the route".into(),
            },
            Self::Quiet => ProxyError::UpstreamTimeout { route, reason: "no traffic for too long".into() },
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
    over: impl Future<Output = TunnelEnd>,
    route: &RouteKey,
) -> TunnelEnd {
    let (mut from_client, mut to_client) = split(TokioIo::new(client));
    let (mut from_upstream, mut to_upstream) = split(TokioIo::new(upstream));
    let (moved, closed) = (AtomicBool::new(true), AtomicBool::new(false));
    let (mut asked, mut frames) = (WsFrameTracker::default(), WsFrameTracker::default());
    let end = {
        let up = async {
            let copied = async {
                copy(&mut from_client, &mut to_upstream, &mut asked, &moved, &closed).await?;
                to_upstream.shutdown().await.map_err(|_| CopyError::Writing)
            };
            copied.await.map_err(|broke| match broke {
                CopyError::Reading => TunnelEnd::ClientBroke,
                CopyError::Writing => TunnelEnd::UpstreamBroke,
            })
        };
        let down = async {
            let copied = async {
                copy(&mut from_upstream, &mut to_client, &mut frames, &moved, &closed).await?;
                // Without a close frame the server has died: its kernel then closes the connection cleanly.
                if frames.may_close() && !closed.load(Ordering::Relaxed) {
                    return Err(CopyError::Reading);
                }
                to_client.shutdown().await.map_err(|_| CopyError::Writing)
            };
            copied.await.map_err(|broke| match broke {
                CopyError::Reading => TunnelEnd::UpstreamBroke,
                CopyError::Writing => TunnelEnd::ClientBroke,
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
                // No preference: both are polled whenever the task is.
                biased;
                first = &mut up => {
                    first?;
                    let _ = timeout(HALF_CLOSE_TIMEOUT, down).await;
                }
                first = &mut down => {
                    first?;
                    let _ = timeout(HALF_CLOSE_TIMEOUT, up).await;
                }
            }
            // The other side has finished too, or was cut off after the half-close timeout.
            Ok(TunnelEnd::Closed)
        };
        let both = async { both.await.unwrap_or_else(|end| end) };
        tokio::select! {
            // Traffic precedes the idle timeout, and an end in time precedes the deadline.
            biased;
            end = both => end,
            () = quiet => TunnelEnd::Quiet,
            end = over => end,
        }
    };
    if let Some(close) = end.error(route).and_then(|error| frames.close(&error)) {
        let closing = async {
            to_client.write_all(&close).await?;
            to_client.shutdown().await
        };
        // The tunnel ends even if the client does not read the frame.
        let _ = timeout(CLOSE_FRAME_TIMEOUT, closing).await;
    }
    end
}

/// Copies until the end of `from`. `closed`: a close frame has been passed on, in either direction.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    frames: &mut WsFrameTracker,
    moved: &AtomicBool,
    closed: &AtomicBool,
) -> Result<(), CopyError> {
    let mut buffer = vec![0; TUNNEL_BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await.map_err(|_: io::Error| CopyError::Reading)?;
        moved.store(true, Ordering::Relaxed);
        if count == 0 {
            return Ok(());
        }
        frames.begin();
        let written = async {
            to.write_all(&buffer[..count]).await?;
            to.flush().await
        };
        written.await.map_err(|_| CopyError::Writing)?;
        frames.pass(&buffer[..count]);
        if frames.is_closed() {
            closed.store(true, Ordering::Relaxed);
        }
    }
}
