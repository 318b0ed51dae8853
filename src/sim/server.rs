//! What the connections share, and the loop that accepts them.

use super::{
    SimArgs, SimError,
    api::Store,
    boot::{Load, Log},
    connection,
    engine::Engine,
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpSocket},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const BACKLOG: u32 = 1024;

/// What the connections share.
pub(super) struct Server {
    pub(super) args: SimArgs,
    pub(super) log: Log,
    pub(super) engine: Arc<Engine>,
    pub(super) store: Store,
    pub(super) ready: AtomicBool,
    pub(super) sequence: AtomicU64,
    /// Ends this process as `--exit-after` asks.
    pub(super) crash: CancellationToken,
    /// Connections take no further request.
    pub(super) drain: CancellationToken,
    /// Connections end at once.
    pub(super) abort: CancellationToken,
}

// === impl Server ===

impl Server {
    pub(super) fn new(args: SimArgs, log: Log) -> Self {
        Self {
            log,
            engine: Arc::new(Engine::new(&args)),
            store: Store::default(),
            ready: AtomicBool::new(false),
            sequence: AtomicU64::new(0),
            crash: CancellationToken::new(),
            drain: CancellationToken::new(),
            abort: CancellationToken::new(),
            args,
        }
    }

    /// Loads, opens the port when it is time, and serves until `shutdown`.
    pub(super) async fn run(
        self: &Arc<Self>,
        socket: TcpSocket,
        shutdown: &CancellationToken,
    ) -> Result<(), SimError> {
        let mut load = Load::start(&self.args, self.log);
        tokio::select! {
            // Asked to stop and ready in the same instant, it stops.
            biased;
            () = shutdown.cancelled() => return Ok(()),
            closed = load.advance(load.closed) => closed?,
        }
        let address = socket.local_addr().map_err(SimError::Socket)?;
        let listener = socket.listen(BACKLOG).map_err(|source| SimError::listen(address, source))?;
        self.log.listening(address);

        let connections = TaskTracker::new();
        let served = self.accept(listener, load, &connections, shutdown).await;
        self.drain.cancel();
        connections.close();
        if served.is_ok() {
            let _ = timeout(self.args.shutdown_timeout, connections.wait()).await;
        }
        self.abort.cancel();
        self.store.clear();
        connections.wait().await;
        served
    }

    async fn accept(
        self: &Arc<Self>,
        listener: TcpListener,
        mut load: Load,
        connections: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Result<(), SimError> {
        let total = load.total;
        let mut loading = std::pin::pin!(load.advance(total));
        loop {
            tokio::select! {
                // Readiness goes before the next connection, so that a load without an unready phase never
                // shows one.
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = self.crash.cancelled() => return Err(SimError::Crashed),
                loaded = &mut loading, if !self.ready.load(Relaxed) => {
                    loaded?;
                    self.log.ready();
                    self.ready.store(true, Relaxed);
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(connection::serve(Arc::clone(self), stream));
                    }
                    Err(error) => pause_after(&error).await,
                },
            }
        }
    }
}

/// A connection that died in the backlog is nothing; out of file descriptors, trying at once would only spin.
async fn pause_after(error: &io::Error) {
    if error.kind() != io::ErrorKind::ConnectionAborted {
        sleep(Duration::from_millis(50)).await;
    }
}
