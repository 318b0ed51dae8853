//! Shared state and accept loop.

use super::{
    SimArgs, SimError,
    api::ResponseStore,
    boot::{LoadSequence, LogSink},
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

const LISTEN_BACKLOG: u32 = 1024;

/// State shared by all connections.
pub(super) struct SimServer {
    pub(super) args: SimArgs,
    pub(super) log: LogSink,
    pub(super) engine: Arc<Engine>,
    pub(super) store: ResponseStore,
    pub(super) ready: AtomicBool,
    pub(super) sequence: AtomicU64,
    /// Crashes the server, for `--exit-after`.
    pub(super) crash: CancellationToken,
    /// Stops connections from accepting further requests.
    pub(super) drain: CancellationToken,
    /// Closes connections immediately.
    pub(super) abort: CancellationToken,
}

// === impl SimServer ===

impl SimServer {
    pub(super) fn new(args: SimArgs, log: LogSink) -> Self {
        Self {
            log,
            engine: Arc::new(Engine::new(&args)),
            store: ResponseStore::default(),
            ready: AtomicBool::new(false),
            sequence: AtomicU64::new(0),
            crash: CancellationToken::new(),
            drain: CancellationToken::new(),
            abort: CancellationToken::new(),
            args,
        }
    }

    /// Loads, opens the port, and serves until `shutdown`.
    pub(super) async fn run(
        self: &Arc<Self>,
        socket: TcpSocket,
        shutdown: &CancellationToken,
    ) -> Result<(), SimError> {
        let mut load = LoadSequence::start(&self.args, self.log);
        tokio::select! {
            // Biased: shutdown takes precedence over readiness.
            biased;
            () = shutdown.cancelled() => return Ok(()),
            closed = load.advance(load.closed) => closed?,
        }
        let address = socket.local_addr().map_err(SimError::Socket)?;
        let listener = socket.listen(LISTEN_BACKLOG).map_err(|source| SimError::listen(address, source))?;
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
        mut load: LoadSequence,
        connections: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Result<(), SimError> {
        let total = load.total;
        let mut loading = std::pin::pin!(load.advance(total));
        loop {
            tokio::select! {
                // Biased: readiness takes precedence over connections, so that a load without an unready phase never
                // returns 503.
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

/// Pauses after accept errors such as exhausted file descriptors, to avoid a busy loop. Aborted connections need none.
async fn pause_after(error: &io::Error) {
    if error.kind() != io::ErrorKind::ConnectionAborted {
        sleep(Duration::from_millis(50)).await;
    }
}
