//! WebSockets: after the endpoint has said 101, bytes go both ways until one side has no more to say.

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

use super::{body::Lease, connection_state::ConnectionState, exchange::Exchange};
use crate::error::Outcome;

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
    TookTooLong,
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

/// How much is read at once in each direction.
const BUFFER: usize = 16 * 1024;

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
            let over = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let end = tokio::select! {
                // What has ended in time has ended well.
                biased;
                end = carry(client, upstream, idle) => end,
                () = over => End::TookTooLong,
            };
            match end {
                End::Closed => exchange.end(Outcome::Completed),
                End::UpstreamBroke | End::TookTooLong => exchange.end(Outcome::UpstreamError),
                // Why, is for the account to find out: gone, stalled or cut off.
                End::ClientBroke => {}
            }
        }
        drop(lease);
        drop(exchange);
    }
}

async fn carry(client: Upgraded, upstream: Upgraded, idle: Duration) -> End {
    let (mut from_client, mut to_client) = split(TokioIo::new(client));
    let (mut from_upstream, mut to_upstream) = split(TokioIo::new(upstream));
    let moved = AtomicBool::new(true);
    let up = async {
        copy(&mut from_client, &mut to_upstream, &moved).await.map_err(|broke| match broke {
            Broke::Reading => End::ClientBroke,
            Broke::Writing => End::UpstreamBroke,
        })
    };
    let down = async {
        copy(&mut from_upstream, &mut to_client, &moved).await.map_err(|broke| match broke {
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
        let (first, other) = tokio::select! {
            // Neither way matters more, and both are polled whenever the task is.
            biased;
            first = &mut up => (first, timeout(HALF_CLOSED, down).await),
            first = &mut down => (first, timeout(HALF_CLOSED, up).await),
        };
        match (first, other) {
            (Err(end), _) => end,
            // It had nothing to say any more, or was cut off while it still talked to nobody.
            (Ok(()), _) => End::Closed,
        }
    };
    tokio::select! {
        // It is not quiet if something moves.
        biased;
        end = both => end,
        () = quiet => End::TookTooLong,
    }
}

/// Copies until there is no more, and says so to the other side.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    moved: &AtomicBool,
) -> Result<(), Broke> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await.map_err(|_: io::Error| Broke::Reading)?;
        moved.store(true, Ordering::Relaxed);
        let written = async {
            match count {
                0 => to.shutdown().await,
                count => {
                    to.write_all(&buffer[..count]).await?;
                    to.flush().await
                }
            }
        };
        written.await.map_err(|_| Broke::Writing)?;
        if count == 0 {
            return Ok(());
        }
    }
}
